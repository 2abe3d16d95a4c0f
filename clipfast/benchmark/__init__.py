"""The performance report: what ``pytest benchmarks/`` measures with, and ``clipfast-bench`` reads, compares and draws."""
