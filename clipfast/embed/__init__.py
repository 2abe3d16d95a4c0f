"""Features of many pictures or texts in a file, and the nearest among them.

``clipfast.embed(model, source, output)`` writes them: see :func:`clipfast.embed.embed.embed`. What is read, and how,
belongs to ``clipfast.data``.
"""

from clipfast.rooms import callable_as

callable_as(__name__, "clipfast.embed.embed:embed")
