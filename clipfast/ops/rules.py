"""The rule: which implementation serves a call on a machine that nobody measured, by arithmetic that is written down.

:mod:`clipfast.ops.plan` asks it where neither a tuned file nor a shipped measurement speaks. It needs no card: a
:class:`Key` says what is asked for and a :class:`Machine` where. The first of :data:`RULES` that applies decides, and
every one carries its reckoning. Numbers are those of an H100 (3.0 TB/s) unless another card is named; all are
predicted, none is measured. ``docs/kernels.md`` has the decisions for the named models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from clipfast.ops.call_classes import Key, Machine

# goes up when a decision changes: the ranks of a run must share it
VERSION = 2

# What registers, spills and shared memory are known for. Others get PyTorch's operators: `clipfast tune` tells.
KNOWN = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))

# A kernel has to save a sixth of the bytes: the norms' and the erf GELU's forward kernels are bound by the issue of
# instructions at 78% of the bandwidth, PyTorch's reach about as much.
_FEWER = 1.2

_WIDE = {"float32": 4, "float64": 8}
_ROW_OPS = ("layer_norm", "add_layer_norm", "bias_gelu")
_LOSSES = ("contrastive_loss", "siglip_loss", "distillation_loss")


class Verdict(NamedTuple):
    """What the rule says: a backend, and why in a few words."""

    backend: str
    says: str


@dataclass(frozen=True)
class Rule:
    """One entry of the rule.

    Attributes:
        ops: The ops that it is about.
        applies: Whether it decides a call.
        backend: What it decides for.
        says: Why, in the few words that ``explain`` has room for.
        reckoning: Why, with the numbers.
    """

    ops: tuple[str, ...]
    applies: Callable[[Key, Machine], bool]
    backend: str
    says: str
    reckoning: str


def size_of(dtype: str) -> int:
    """Return the bytes of a value."""
    return _WIDE.get(dtype, 2)


def bytes_moved(key: Key) -> tuple[int, int]:
    """Return the bytes of device memory an element that PyTorch's operators move for a row op, and the kernels.

    Forward, and backward where the key is one of training. Sums over rows, statistics and weights are not counted.
    """
    e = size_of(key.dtypes[0])
    if key.op == "bias_gelu":
        # the sigmoid form: 1.702·x, σ, x·σ; backward dy·σ, dy·x, σ', ·1.702 and the sum of both
        forward, backward = (7, 14) if key.form == "quick" else (2, 3)
        # the product adds the bias for nothing, but its gradient is a pass of its own
        return (forward + key.training * (backward + key.bias)) * e, (2 + 3 * key.training) * e
    if key.op == "layer_norm":
        forward, backward = _norm(key, e)
        return forward + key.training * backward, (2 + 3 * key.training) * e
    r = size_of(key.dtypes[1])
    s = 4 if key.dtypes[0] != key.dtypes[1] else e
    forward, backward = _norm(key, s)
    # backward: the gradient of the stream is a sum of two, and a cast for each term of another dtype
    backward += 3 * s + sum(s + t for t in (e, r) if t != s)
    writes = e if e == r else e + r
    return e + r + s + forward + key.training * backward, e + r + 2 * s + key.training * (3 * s + writes)


def _norm(key: Key, e: int) -> tuple[int, int]:
    """Return the bytes of ``F.layer_norm`` forward and backward: dx reads dy and x, and so do the sums over rows."""
    wide = 4 if e < 4 and (key.autocast or len(set(key.dtypes)) > 1) else e
    # casts before and behind where the weights, or autocast, want float32
    casts = 2 * (e + wide) if wide != e else 0
    return 2 * wide + casts, 5 * wide + casts


def _is_known(key: Key, machine: Machine) -> bool:
    return machine.kind == "cuda" and machine.capability in KNOWN


def _is_16_bit(key: Key) -> bool:
    return key.dtypes[0] in ("float16", "bfloat16")


def _has_flash(key: Key, machine: Machine) -> bool:
    capable = machine.kind == "cuda" and machine.capability is not None and machine.capability >= (8, 0)
    return key.tokens is None and capable and _is_16_bit(key)


def _is_narrow_float32(key: Key) -> bool:
    # wider heads spill: 59 to 324 registers with head_dim 128 on 8.9
    return key.dtypes[0] == "float32" and 0 < (key.width or 0) <= 64


def _saves_bytes(key: Key, machine: Machine) -> bool:
    pytorch, kernels = bytes_moved(key)
    if not _is_known(key, machine) or "float64" in key.dtypes:
        return False
    # products of float32 take twelve times as long as those of 16 bits: what is saved beside them is under 3%
    reduced = key.autocast or any(size_of(d) == 2 for d in key.dtypes)
    return reduced and key.large is not False and pytorch >= _FEWER * kernels


def _is_hopper_in_16_bit(key: Key, machine: Machine) -> bool:
    return machine.kind == "cuda" and machine.capability == (9, 0) and _is_16_bit(key) and key.large is not False


def _trains_short(key: Key, machine: Machine) -> bool:
    # what one kernel holds in the backward pass; 257 by the class token beside 256, which a mask forbids
    longest = 128 if (key.width or 0) > 64 else 256 if key.causal else 257
    short = key.tokens is not None and 0 < key.tokens <= longest
    return _is_hopper_in_16_bit(key, machine) and key.training and short


def _infers_shortest(key: Key, machine: Machine) -> bool:
    short = key.tokens is not None and 0 < key.tokens <= 80
    return _is_hopper_in_16_bit(key, machine) and not key.training and short


RULES: tuple[Rule, ...] = (
    Rule(
        _ROW_OPS,
        lambda key, machine: machine.kind not in ("cuda", "cpu"),
        "reference",
        "the kernels are for NVIDIA GPUs and CPUs",
        "0 bytes saved: PyTorch's operators are the only ones here.",
    ),
    Rule(
        _ROW_OPS,
        lambda key, machine: key.compiled,
        "reference",
        "Inductor fuses it with what is before and behind it",
        "Elementwise work fused into its neighbours moves 0 bytes of its own; an operator that the compiler cannot "
        "look into moves at least 2 values an element, and torch.compile's LayerNorm alone matches the best "
        "kernels.",
    ),
    Rule(
        ("layer_norm", "add_layer_norm"),
        lambda key, machine: machine.kind == "cpu" and key.large is False,
        "reference",
        "a small call's time is its bookkeeping, of which PyTorch's own operators have less",
        "An autograd function takes 25 µs more than PyTorch's own operator, forward + backward; the library's "
        "LayerNorm saves about 0.2 ns an element. 25 µs / 0.2 ns = 125,000 elements (LARGE_ON_HOST). Without gradients "
        "there is no such function, and 4 rows of 64 take 8.4 µs against 11.0. GELU: PyTorch has two to six operators "
        "and as many nodes to record, 150 µs against 270 at 4 rows of 64, forward + backward, on a busy machine.",
    ),
    Rule(
        ("layer_norm",),
        lambda key, machine: machine.kind == "cpu" and not key.training and set(key.dtypes) == {"float32"},
        "reference",
        "PyTorch's float32 LayerNorm passes over memory once too",
        "Forward alone, 8 bytes an element by either. On a Zen 4, two threads, PyTorch's took 0.79 of the time at 800 "
        "rows of 768 and 0.98 at 4112 of 1024: in the cache its rows are read twice, the library's three times.",
    ),
    Rule(
        _ROW_OPS,
        lambda key, machine: machine.kind == "cpu",
        "native",
        "it passes over memory once",
        "Tensors read and written, PyTorch : library. bias + GELU: 4 : 2 forward (erf, tanh), 8 : 2 (quick), 8 : 3 and "
        "15 : 3 backward with the bias' gradient; residual + LayerNorm: 5 : 4 forward, 7 : 4 backward. LayerNorm alone "
        "moves the same: its gain, 1.0 to 1.4 times, is that gradients of weight and bias are summed while a row is in "
        "the first-level cache. Fresh pages count too: each tensor that is not made is 0.25 µs a 4 KB page saved where "
        "the C library gives pages back.",
    ),
    Rule(
        _ROW_OPS,
        _saves_bytes,
        "triton",
        "it moves fewer bytes, and the call is large enough for bytes to outweigh launches",
        "Bytes an element, PyTorch : kernel (bytes_moved). layer_norm, training: 14 : 10 in bfloat16, 28 : 20 on "
        "autocast's float32 stream, 52 : 10 with float32 weights beside 16-bit rows. add_layer_norm: 10 : 8 in "
        "inference, 26 : 16 in training, 56 : 32 under autocast. GELU, training, with the bias: 12 : 10 (erf, "
        "tanh), 44 : 10 (quick). Forward alone, LayerNorm and the erf and tanh GELUs move 4 : 4: PyTorch's. From "
        "2^23 elements of the stream on, the card is the bottleneck (LARGE), and 110 µs (LayerNorm), 132 (with the "
        "residual) or 67 (GELU) more of the host's time a call, forward + backward, are hidden.",
    ),
    Rule(
        _ROW_OPS,
        lambda key, machine: True,
        "reference",
        "a kernel would save too few bytes here for its launches, or nothing is known of the machine",
        "Below 2^23 elements the host is the bottleneck: a LayerNorm takes it 143 µs by kernels and 33 by PyTorch, "
        "forward + backward. In float32, products take 12 times as long (67 TFLOP/s beside 798), and 60 bytes saved"
        " a token and channel are 15 ns of 700 a token at W = 768: 2%. On a card outside KNOWN nobody has counted "
        "spills.",
    ),
    Rule(
        ("attention",),
        lambda key, machine: key.tokens is None and _is_known(key, machine) and _is_16_bit(key),
        "triton",
        "one kernel for captions of all lengths, which writes its gradients packed and without atomics",
        "Values of 16 bits a token and channel, forward + backward: the kernels 4 + 12 (two of them) = 16, 32 bytes; "
        "PyTorch's varlen_attn 4 + 4 (dO, O, and queries' sums set to zero) + 10 (these sums are in float32 and added "
        "to by atomics) + 3 (their cast) + 6 (three gradients stacked) = 27, or 54 bytes. At 5,120 tokens of 512 and "
        "3.0 TB/s: 28 µs against 47, so that the kernels are sooner from 60% of the bandwidth on. Launches: 1 + 2 "
        "against 1 + 4. Host: 122 µs against about 200.",
    ),
    Rule(
        ("attention",),
        _has_flash,
        "torch",
        "PyTorch's FlashAttention takes captions of all lengths in one launch",
        "256 captions of 11 to 31 tokens, a layer, forward + backward: 1 + 4 launches, against 3 + 5 for one bucket of "
        "SDPA, 6 + 10 for three. Where the kernels' registers and spills are unknown, PyTorch's kernels are what its "
        "own tests run on the card. Where varlen_attn cannot serve, SDPA does in at most 4 buckets, which pad by 10 to "
        "25% (a bucket more is worth 1,024 tokens).",
    ),
    Rule(
        ("attention",),
        lambda key, machine: key.tokens is None and _is_known(key, machine) and _is_narrow_float32(key),
        "triton",
        "one kernel for captions of all lengths, where SDPA wants them padded and in buckets",
        "In float32 PyTorch has no attention for packed sequences: 3 + 5 launches for one bucket, 6 + 10 for three, "
        "against 1 + 2. Bytes, 5,120 tokens of 512: 16 values of 4 bytes, 168 MB or 56 µs, against 36 and 1.2 times as "
        "many tokens: 151 µs. Both multiply without tensor cores, in tiles of 64: 5 µs a layer and 1,000 tokens [E].",
    ),
    Rule(
        ("attention",),
        _trains_short,
        "triton",
        "a kernel holds a whole head, and writes its gradients packed",
        "Forward + backward, SDPA moves 18 values a token and channel: 12, and 6 to stack and clone packed "
        "gradients; the kernels 12. At 50 / 77 / 197 / 257 tokens they are bound by HBM to 100 / 100 / 100 / 89% "
        "forward and 100 / 100 / 70 / 71% backward: 1.5 times fewer bytes at 0.8 of the rate in the worst case. "
        "Host: 122 µs against 98, hidden from 24 µs · 3.0 TB/s / 12 bytes = 6 million elements on. Where the "
        "backward pass takes two kernels (above 128 tokens with head_dim above 64, 257 with a mask) the kernels "
        "move 16 values, and nothing is left. 8.x: no such reckoning, and at most 128 keys a kernel; 10.0: a "
        "backward of 256 keys takes all 512 columns of tensor memory; 12.0: 7 of 27 configurations spill.",
    ),
    Rule(
        ("attention",),
        _infers_shortest,
        "triton",
        "up to 80 tokens its tiles waste less than those that SDPA pads to",
        "Both move 4 values a token and channel. At 50 tokens tiles of 64 compute 1.6 times what is needed, tiles "
        "of 128 6.6 times; at 77, 64 + 16 compute 1.1 times, 128 2.8 times. The kernels reach 100% of HBM (1,930 "
        "and 2,972 clocks a head against 882 and 1,971 of issue); public kernels are tuned from 512 tokens up. "
        "Above 80, both pad alike.",
    ),
    Rule(
        ("attention",),
        lambda key, machine: True,
        "torch",
        "nothing says that a kernel is faster than SDPA here",
        "Inference above 80 tokens: the same bytes, and SDPA's kernels are measured on every card. float32: no "
        "tensor cores in ours, and 59 to 324 spills on 8.9 with head_dim 128. Above 257 tokens: the forward kernel "
        "at 577 is bound by issue to 58% of HBM. Small calls: 122 µs of host time against 98.",
    ),
    Rule(
        ("single_query_attention",),
        lambda key, machine: True,
        "torch",
        "it has no kernel",
        "One query a sequence reads keys and values once: 2 values a token and channel, by SDPA as by anything else.",
    ),
    Rule(
        _LOSSES,
        lambda key, machine: True,
        "native",
        "its tiles stay on chip, where PyTorch's pass through memory about forty times",
        "CUDA, D = 512, B = 8k / 32k / 64k, 16-bit (float32 under autocast too): the op library's kernels 0.8 / 13.3 / "
        "53 ms, scripts/reckon_loss.py; SigLIP, whose gradients come with the loss, 0.6 / 9.3 / 37. Chunks through "
        "torch.mm(out_dtype=float32), as PyTorch's tiles are, would take 0.7 / 12 / 47 if one kernel did all "
        "between the products and nothing were lost; there is none, and PyTorch's elementwise operators move 64 bytes "
        "a logit for the statistics and 106 for the gradients: 170 · B² / 3.0 TB/s = 3.8 / 61 / 244 ms beside products "
        "of 8 at 32k (the gradients' in two terms). float32 features outside autocast: 102 ms at 32k by the kernel; "
        "8·B²·D / 67 TFLOP/s = 66 and 61 between them by PyTorch. CPU: 2.3 times open_clip's loss at B = 8,192 in "
        "bfloat16.",
    ),
    Rule(
        ("encoder",),
        lambda key, machine: machine.amx and machine.native_amx and key.dtypes[0] == "bfloat16",
        "native",
        "the op library multiplies by AMX, with bias, GELU, residual and norms in the products",
        "Predicted. A Xeon core: tile loops with packed operands 1,040 to 1,230 GFLOP/s on ViT-B's shapes, oneDNN's "
        "packed weights half of 590 to 2,000 on two cores for 50 to 1,600 rows. A whole encoder of such loops took 81 "
        "ms where oneDNN's took 172 (B/32, 16 images), 242 where it took 284 (B/16, 12 images).",
    ),
    Rule(
        ("encoder",),
        lambda key, machine: machine.amx and key.dtypes[0] == "bfloat16",
        "torch",
        "this CPU has AMX, which oneDNN uses and the op library cannot",
        "AMX multiplies bfloat16 at 1,000 to 1,200 GFLOP/s a core through oneDNN's packed weights; the library's "
        "products on AVX512-BF16 took 3.8 to 7 times as long on such a CPU.",
    ),
    Rule(
        ("encoder",),
        lambda key, machine: machine.arm,
        "torch",
        "no CPU of Arm was measured, and its oneDNN has Arm's own products",
        "Both multiply at the same rate. The library's own tiles load 14 registers for 24 products, which a core that "
        "loads two a clock may not keep up with: `clipfast tune` finds out.",
    ),
    Rule(
        ("encoder",),
        lambda key, machine: True,
        "native",
        "bias, GELU, residual and norms are fused into the products",
        "Without AMX both multiply by AVX-512 at the same rate; what oneDNN leaves between products, norms and "
        "attention, is 15 to 25% of a ViT-B's time, and fresh memory of every step costs page faults.",
    ),
)


def decide(key: Key, machine: Machine) -> Verdict:
    """Return which backend the rule takes for a class of calls on a machine, and why."""
    rule = rule_for(key, machine)
    return Verdict(rule.backend, rule.says)


def rule_for(key: Key, machine: Machine) -> Rule:
    """Return the entry of :data:`RULES` that decides.

    Raises:
        LookupError: There is none for the op.
    """
    for rule in RULES:
        if key.op in rule.ops and rule.applies(key, machine):
            return rule
    raise LookupError(f"rule_for(key): no rule is about {key.op!r}")
