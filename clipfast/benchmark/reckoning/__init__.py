"""What a kernel costs a multiprocessor, reckoned from its machine code: nothing here has run on a card.

``sass`` reads the machine code and finds its loops, ``cards`` says what each card is assumed to do a clock, ``cost``
multiplies the two. docs/kernels.md has the formulas; whatever comes out is a prediction.
"""
