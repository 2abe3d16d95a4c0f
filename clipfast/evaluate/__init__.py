"""What a trained model is worth: zero-shot accuracy, retrieval recall and linear probes.

``clipfast.evaluate(model, data)`` measures: see :func:`clipfast.evaluate.run.evaluate`. How soon a model computes is
measured in ``clipfast.benchmark``; figures are drawn in ``clipfast.visualize``.
"""

from clipfast.rooms import callable_as

callable_as(__name__, "clipfast.evaluate.run:evaluate")
