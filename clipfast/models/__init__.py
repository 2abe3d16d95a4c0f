"""Whole CLIP models: named configurations, the two towers together, weights in every layout, other libraries' models.

Here belong what a model is called and made of, how weights are read and written, how models of open_clip, transformers,
timm and torchvision are accelerated, and what is done to a whole model (``warm_up``, ``graphed``, ``export``). Layers
belong to ``clipfast.modules``; pictures, texts and tokenizers belong to ``clipfast.data``.
"""
