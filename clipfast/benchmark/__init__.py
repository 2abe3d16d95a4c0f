"""The performance report: what ``pytest benchmarks/`` measures with, and what ``clipfast-bench`` reads and draws."""
