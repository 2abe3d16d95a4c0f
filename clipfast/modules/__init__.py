"""The block, the towers and the losses, as `torch.nn.Module`s that take the place of open_clip's.

Here belong layers with Parameters, and what a tower leaves out, packs or pools. A new option of a family is a field of
the one block or tower. Arithmetic belongs to ``clipfast.ops``; names of models, layouts of keys, files of weights and
other libraries' classes belong to ``clipfast.models``.
"""
