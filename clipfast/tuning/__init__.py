"""``clipfast tune``: this machine measures which implementation of every op is its fastest.

Here belong the measurement and the decision. Reading what it wrote, and going by it, belongs to ``clipfast.ops``.
"""
