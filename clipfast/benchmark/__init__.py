"""The performance report: what ``pytest benchmarks/`` measures with, and what ``clipfast-bench`` reads and draws.

The rows themselves are in ``benchmarks/``, a file an op. What a model is worth is measured in ``clipfast.evaluate``.
"""
