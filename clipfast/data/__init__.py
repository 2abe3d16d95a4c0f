"""Text and images in: tokenizers, image transforms, and pairs from shards, tables, folders, Parquet and the emoji.

Here belongs all that reads what a user has, and the batches that are made of it. What a model computes of a batch does
not: see ``clipfast.models``, ``clipfast.train``, ``clipfast.evaluate`` and ``clipfast.embed``.
"""
