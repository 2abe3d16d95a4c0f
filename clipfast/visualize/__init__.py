"""Pictures of what a model learned, and the report that holds them.

``clipfast.visualize(model, images, output)`` draws: see :func:`clipfast.visualize.show.show`. The report of benchmarks
takes its page and its style from here; its own figures are in ``clipfast.benchmark``.
"""

from clipfast.rooms import callable_as

callable_as(__name__, "clipfast.visualize.show:show")
