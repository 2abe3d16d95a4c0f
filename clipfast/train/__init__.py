"""The training engine: settings, steps on one rank or many, checkpoints, logs, and the demo.

``clipfast.train(config)`` trains: see :func:`clipfast.train.start.train`. Reading pairs belongs to ``clipfast.data``;
layers and losses, which a loop of somebody's own uses too, belong to ``clipfast.modules``.
"""

from clipfast.rooms import callable_as

callable_as(__name__, "clipfast.train.start:train")
