"""Encoders, tokens and what every implementation of the packed encoder is held to."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_exact_as_reference
from torch import Tensor

import clipfast
from clipfast.ops import library
from clipfast.ops.encoder import BlockWeights, PackedEncoder, encode

DTYPES = [torch.float32, torch.bfloat16]


def unable(backend: str, dtype: torch.dtype) -> str | None:
    """Return why a backend cannot serve here, or None."""
    if backend == "native":
        if library.unavailable() is not None:
            return library.unavailable()
        return None if torch.ops.clipfast.can_encode(dtype == torch.bfloat16) else "this CPU lacks the instructions"
    bfloat16 = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "oneDNN has no bfloat16 on this CPU" if bfloat16 else None


def skip_if_unable(backend: str, dtype: torch.dtype) -> None:
    """Skip the test that asks."""
    reason = unable(backend, dtype)
    if reason is not None:
        pytest.skip(reason)


def block_weights(width: int, hidden: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return a block's weights and biases, in float32."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    def layer(out: int, into: int) -> tuple[Tensor, Tensor]:
        return drawn(out, into, scale=into**-0.5), drawn(out, scale=0.1)

    norm = lambda: (1 + drawn(width, scale=0.1), drawn(width, scale=0.1))  # noqa: E731
    return [norm(), layer(3 * width, width), layer(width, width), norm(), layer(hidden, width), layer(width, hidden)]


def encoder_of(
    dtype: torch.dtype,
    width: int = 64,
    heads: int = 2,
    layers: int = 3,
    *,
    causal: bool = False,
    approximate: str = "none",
    hidden: int | None = None,
    eps: float = 1e-5,
    rounded_to: torch.dtype | None = None,
) -> PackedEncoder:
    """Return an encoder in ``dtype`` whose weights were rounded to ``rounded_to``, by default the same."""
    blocks = []
    for i in range(layers):
        pairs = block_weights(width, 4 * width if hidden is None else hidden, i)
        blocks.append(BlockWeights(*(tuple(t.to(rounded_to or dtype).to(dtype) for t in pair) for pair in pairs)))
    return PackedEncoder(blocks, heads, causal, approximate, eps)


def tokens_of(lengths: list[int], width: int = 64, seed: int = 9) -> tuple[Tensor, Tensor]:
    """Return tokens of sequences, in float32, and their offsets."""
    x = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor([0, *torch.tensor(lengths).cumsum(0)])


def run(backend: str, x: Tensor, encoder: PackedEncoder, offsets: Tensor, read: int | None) -> Tensor:
    """Encode by a backend."""
    with clipfast.backend(backend):
        return encode(x, encoder, cu_seqlens=offsets, read=read)


CASES = {
    "images": ({}, [17] * 3, 0),
    "images, all tokens": ({}, [17] * 3, None),
    "a later token": ({}, [5, 9], 4),
    "captions": ({"causal": True}, [5, 1, 9, 33, 9], -1),
    "captions, all tokens": ({"causal": True}, [5, 1, 9, 33, 9], None),
    "tanh": ({"approximate": "tanh"}, [9, 9], 0),
    "quick": ({"approximate": "quick"}, [9, 9], 0),
    "one layer": ({"layers": 1}, [9, 2], 0),
    "one token": ({"causal": True}, [1], -1),
    "heads of 80": ({"width": 160}, [50, 50], 0),
    "heads of 8": ({"heads": 8}, [50, 7], 0),
    "heads of 72": ({"width": 288, "heads": 4, "hidden": 1076, "layers": 1}, [33, 20], None),
    "hidden 72": ({"hidden": 72}, [50], 0),
    "as wide as ViT-B": ({"width": 768, "heads": 12, "layers": 2}, [50, 50], None),
    "heads of 88": ({"width": 352, "heads": 4, "hidden": 42, "layers": 1}, [33, 9], None),
    "heads of 96": ({"width": 192, "approximate": "tanh"}, [33, 9], None),
    "heads of 104": ({"width": 416, "heads": 4, "layers": 1}, [33, 9], 0),
    "as wide as SigLIP's so400m": (
        {"width": 1152, "heads": 16, "hidden": 4304, "layers": 1, "approximate": "tanh", "eps": 1e-6},
        [37, 5],
        None,
    ),
    "as wide as bigG": ({"width": 1664, "heads": 16, "hidden": 8192, "layers": 1}, [17], 0),
    "read at the last, not causal": ({}, [64, 64, 1, 5], -1),
    "pictures of any aspect": ({"width": 96, "layers": 2, "approximate": "tanh"}, [1, 1024, 7, 300, 256, 2], None),
    "more than a chunk": ({"layers": 2}, [197] * 4 + [600], 0),
}


def check_exactness(backend: str, dtype: torch.dtype, changes: dict, lengths: list[int], read: int | None) -> None:
    """Hold an encoder, as in :data:`CASES`, to the bound of every fast path."""
    x, offsets = tokens_of(lengths, changes.get("width", 64))
    x = x.to(dtype)
    encoder = encoder_of(dtype, **changes)
    options = encoder.heads, encoder.causal, encoder.approximate, encoder.eps
    oracle = PackedEncoder([block.to(torch.float64) for block in encoder.blocks], *options)
    fast = run(backend, x, encoder, offsets, read)
    reference = run("reference", x, encoder, offsets, read)
    exact = run("reference", x.double(), oracle, offsets, read)
    assert_as_exact_as_reference(fast, reference, exact, "tokens")


def check_company(dtype: torch.dtype, causal: bool) -> None:
    """Check that a sequence's result is the same bits alone and beside others."""
    lengths = [3, 50, 1, 197, 77, 8, 50]
    encoder = encoder_of(dtype, causal=causal)
    x, offsets = tokens_of(lengths)
    together = run("native", x.to(dtype), encoder, offsets, -1 if causal else 0)
    for i, sequence in enumerate(x.to(dtype).split(lengths)):
        alone = run("native", sequence, encoder, torch.tensor([0, lengths[i]]), -1 if causal else 0)
        assert torch.equal(alone[0], together[i]), f"sequence {i} of {lengths[i]} tokens"
