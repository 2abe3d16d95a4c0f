"""Text and images in: CLIP's tokenizer, the image transform, and the emoji pairs of the demo."""
