"""The training engine. ``clipfast.train(config)`` trains: see :func:`clipfast.train.start.train`."""

from clipfast.rooms import callable_as

callable_as(__name__, "clipfast.train.start:train")
