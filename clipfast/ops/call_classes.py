"""What of a call, and of the machine that it runs on, decides which implementation serves it.

:mod:`clipfast.ops.keys` makes a :class:`Key` of a call; tuned files, shipped measurements and :mod:`clipfast.ops.rules`
decide by it.
"""

from __future__ import annotations

from typing import NamedTuple

# Elements [rows · width] of the residual stream from which on the card, and not the host, is a block's bottleneck.
# Host, forward + backward, with kernels: 143 + 166 (norms) + 112 (GELU) + 122 (attention) + about 300 (four linear
# layers, views) = 0.85 ms. Card: 72·W² operations a token at 798 TFLOP/s and 88 bytes a token and channel at 3.0 TB/s:
# 53 + 23 ns a token at W = 768, 95 + 30 at 1024. So 11,000 tokens of 768 (8.6 million elements), 6,800 of 1024
# (7.0 million) keep the card busy; slower cards need fewer. From there on a launch costs nothing and a byte does.
LARGE = 2**23

# Elements from which on the CPU, in training, a LayerNorm's bytes outweigh its bookkeeping: see the rule about it.
LARGE_ON_HOST = 2**17

# bounds of classes
WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
LENGTHS = (64, 80, 128, 256, 257, 577)


class Key(NamedTuple):
    """What of a call decides: a class of calls, coarse enough that a few measurements decide every call.

    Attributes:
        op: The op.
        dtypes: Of the tensors, by their place: the op's main one first. Under autocast they are what the op is given.
        training: Whether gradients are recorded.
        autocast: Whether autocast is on for the device.
        compiled: Whether ``torch.compile`` traces the call. Ops that it does not look into leave it False.
        large: Whether the call is large enough for its bytes to outweigh its launches (``LARGE``). True for all sizes
            where the choice may not depend on the batch: under ``deterministic()``, and while a compiler traces. None
            where sizes do not count: off the GPU, but for LayerNorms with gradients on the CPU, and for the losses,
            which all ranks have to serve alike.
        width: A bound of the width of rows, of an encoder, of features; 0 for wider ones, None where it does not count.
            Attention: the head_dim.
        form: The GELU.
        bias: Whether a bias is added before the GELU.
        tokens: A bound of the length of attention's sequences; 0 for longer ones, None for packed ones.
        causal: Whether attention is.
    """

    op: str
    dtypes: tuple[str, ...]
    training: bool = False
    autocast: bool = False
    compiled: bool = False
    large: bool | None = None
    width: int | None = None
    form: str = ""
    bias: bool = False
    tokens: int | None = None
    causal: bool = False

    @property
    def name(self) -> str:
        """The name in files, such as ``bfloat16, width ≤ 1024, large, training``."""
        same = len(set(self.dtypes)) == 1
        parts = [self.form, self.dtypes[0] if same else "/".join(self.dtypes)]
        if self.op == "bias_gelu":
            parts.append("bias" if self.bias else "no bias")
        if self.op == "attention":
            length = (
                "packed"
                if self.tokens is None
                else f"≤ {self.tokens} tokens"
                if self.tokens
                else f"> {LENGTHS[-1]} tokens"
            )
            parts += [f"head_dim {self.width}", "causal" if self.causal else "", length]
        elif self.width is not None:
            parts.append(f"width ≤ {self.width}" if self.width else f"width > {WIDTHS[-1]}")
        parts += [{True: "large", False: "small", None: ""}[self.large]]
        parts += ["training" if self.training else "inference"]
        parts += ["autocast" if self.autocast else "", "compiled" if self.compiled else ""]
        return ", ".join(filter(None, parts))


class Machine(NamedTuple):
    """Where a call runs.

    Attributes:
        kind: The type of device, such as ``cuda``.
        capability: An NVIDIA card's compute capability; None elsewhere.
        amx: Whether the CPU multiplies bfloat16 by AMX.
        native_amx: Whether the op library does so, too.
        arm: Whether the CPU is one of Arm's.
    """

    kind: str
    capability: tuple[int, int] | None = None
    amx: bool = False
    native_amx: bool = False
    arm: bool = False


def bound(size: int, bounds: tuple[int, ...]) -> int:
    """Return the first of ascending bounds that a size does not exceed, or 0."""
    return next((b for b in bounds if size <= b), 0)
