"""The folder for what is made once and kept; drawn pictures are."""

from __future__ import annotations

from clipfast.files import cache_folder

__all__ = ["cache_folder"]
