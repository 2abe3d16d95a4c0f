"""Whole CLIP models: named configurations, the two towers together, and weights in every layout."""
