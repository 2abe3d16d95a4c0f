"""What is tuned: the calls that a model makes of every op, written down while a small copy of it runs.

The copy has the named model's widths, heads, tokens, GELU and shortcuts, but four blocks a tower and few words. What it
asks of an op is what the model will ask, in the same dtypes, memory layouts and surroundings (gradients, autocast), so
that no list here has to follow the modules.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast import ops
from clipfast.models.clip import CLIP
from clipfast.models.config import CLIPConfig
from clipfast.models.create import create_model
from clipfast.models.foreign_config import config_of
from clipfast.modules import transformer
from clipfast.modules.shortcuts import exact_shortcuts
from clipfast.ops import dispatch

# downloads a month (docs/tuning.md): OpenAI's B/32, L/14 and B/16, and LAION's B/32
DEFAULT_MODELS = ("ViT-B-32-quickgelu", "ViT-L-14-quickgelu", "ViT-B-32", "ViT-B-16-quickgelu")
# dtype of the weights, and of autocast; named as the settings of training are
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.float32, torch.bfloat16),
    "fp16": (torch.float32, torch.float16),
    "pure_bf16": (torch.bfloat16, None),
    "pure_fp16": (torch.float16, None),
}
DEFAULT_PRECISIONS = {"cpu": ("fp32", "bf16", "pure_bf16"), "cuda": ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16")}
# their weights and those of their gradients exceed the caches, as the whole model's do
_LAYERS = 4
_WORDS = 1024
# elements [images · tokens · width] of an image tower's stream: a card is busy for milliseconds, a core for tens
_ELEMENTS = {"cuda": 10_000_000, "cpu": 330_000}
_MOST_IMAGES = {"cuda": 256, "cpu": 8}
_PAIRS = {"cuda": 4096, "cpu": 256}
_SEED = 17


@dataclass(frozen=True)
class Call:
    """One call of an op, as a model made it.

    Attributes:
        op: The op.
        key: Its shape class there.
        args, kwargs: What it was called with; tensors are detached.
        wanted: Which of the arguments' tensors had a gradient taken, by their place among them.
        training: Whether gradients were recorded.
        autocast: The dtype of autocast, or None.
        source: What was running.
    """

    op: str
    key: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: tuple[int, ...]
    training: bool
    autocast: torch.dtype | None
    source: str

    @property
    def device(self) -> torch.device:
        """Where it ran."""
        return next(t.device for t in tensors_of(self))

    @property
    def elements(self) -> int:
        """How large its first tensor is."""
        return next(t.numel() for t in tensors_of(self))

    @property
    def form(self) -> tuple[Any, ...]:
        """What tells it from other calls; two of one form cost the same."""
        shapes = tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors_of(self))
        rest = tuple(repr(a) for a in self.args if isinstance(a, str | bool | int | float))
        return self.op, self.key, shapes, rest, tuple(sorted(map(str, self.kwargs))), self.training, self.autocast

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """Have the gradients' recording and the autocast that it ran under."""
        enabled = self.autocast is not None
        with torch.set_grad_enabled(self.training), torch.autocast(self.device.type, self.autocast, enabled=enabled):
            yield


def tensors_of(call: Call) -> list[Tensor]:
    """Return the tensors among a call's arguments, in their order."""
    return [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)]


def with_tensors(call: Call, tensors: Sequence[Tensor]) -> Call:
    """Return the call with other tensors in the place of its own."""
    rest = iter(tensors)
    args = tuple(next(rest) if isinstance(a, Tensor) else a for a in call.args)
    kwargs = {name: next(rest) if isinstance(a, Tensor) else a for name, a in call.kwargs.items()}
    return replace(call, args=args, kwargs=kwargs)


@dataclass(frozen=True)
class Pass:
    """Something that a model does as a whole: a tower forward, or forward and backward, or a loss.

    Attributes:
        name: In words.
        run: Does it.
        is_tower: Whether it is made of blocks, so that what single ops gain can be lost in it again.
    """

    name: str
    run: Callable[[], object]
    is_tower: bool = True


def small_copy(name: str) -> CLIPConfig:
    """Return a named model's sizes with four blocks a tower and few words.

    Raises:
        ValueError: There is no such model.
    """
    config = config_of(name, training=False)
    layers = config.vision_cfg.layers
    layers = min(layers, _LAYERS) if isinstance(layers, int) else tuple(1 for _ in layers)
    vision = replace(config.vision_cfg, layers=layers)
    text = replace(config.text_cfg, layers=min(config.text_cfg.layers, _LAYERS), vocab_size=_WORDS, eos_id=None)
    return replace(config, vision_cfg=vision, text_cfg=text)


def label_of(name: str) -> str:
    """Return a model's name without the folders that somebody keeps its file in."""
    path = Path(os.path.abspath(name)) if os.path.isdir(name) else Path(name)
    label = path.stem if name.endswith(".json") else path.name
    return "".join(letter for letter in label if letter.isprintable())[:100]


def passes(name: str, precision: str, device: torch.device, made: dict[torch.dtype, CLIP] | None = None) -> list[Pass]:
    """Return what a model does in training and inference: both towers and the losses.

    Args:
        name: Of the model.
        precision: A key of :data:`PRECISIONS`.
        device: Where.
        made: Keeps the model's copies, by the dtype of their weights, for other precisions.

    Raises:
        ValueError: There is no such model or precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")
    dtype, autocast = PRECISIONS[precision]
    config = small_copy(name)
    generator = torch.Generator().manual_seed(_SEED)
    made = {} if made is None else made
    if dtype not in made:
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            torch.manual_seed(_SEED)
            made[dtype] = create_model(config, device=device, dtype=dtype)
    model = made[dtype]
    height, width = _sides(config)
    batch = _batch(config, height * width, device.type)
    pixels = torch.randn(batch, 3, height, width, generator=generator).to(device, dtype)
    tokens = _captions(max(16, 4 * batch), config.text_cfg.context_length, generator).to(device)
    about = f"{label_of(name)}, {precision}"
    found: list[Pass] = []
    for training in (True, False):
        how = "training" if training else "inference"
        for tower, encode, inputs in (
            ("image tower", model.encode_image, pixels),
            ("text tower", model.encode_text, tokens),
        ):
            # a model that serves takes one picture at a time, or many
            for count in dict.fromkeys([len(inputs)] if training else [len(inputs), 1]):
                run = _encoding(encode, inputs[:count], list(model.parameters()) if training else None, autocast)
                found.append(Pass(f"{tower} of {about}, {how}, {count} at a time", run))
            # a tower that is compiled, or that somebody watches, takes no shortcuts; and hooks, adapters and other
            # dtypes keep packed weights from serving on the CPU, so that the modules call op by op
            few = inputs[: max(2, len(inputs) // 4)]
            run = _encoding(encode, few, list(model.parameters()) if training else None, autocast)
            found.append(Pass(f"{tower} of {about}, {how} without shortcuts", _by_modules(run, shortcuts=False)))
            if not training and device.type == "cpu":
                found.append(Pass(f"{tower} of {about}, {how} by modules", _by_modules(run, shortcuts=True)))
    for loss in (ops.contrastive_loss, ops.siglip_loss):
        # training takes logits in float32; who calls with what a 16-bit model gives has its dtype
        for kind in dict.fromkeys((torch.float32, dtype)):
            run = _loss(loss, _PAIRS[device.type], config.embed_dim, kind, device, generator)
            found.append(Pass(f"{loss.__name__} of {about}, {_PAIRS[device.type]} pairs", run, is_tower=False))
    return found


def _sides(config: CLIPConfig) -> tuple[int, int]:
    size = config.vision_cfg.image_size
    return (size, size) if isinstance(size, int) else size


def _batch(config: CLIPConfig, pixels: int, device_type: str) -> int:
    vision = config.vision_cfg
    # a ResNet's stem has a quarter of the pixels a side, and few channels
    tokens = pixels // vision.patch_size**2 + 1 if vision.patch_size else pixels // 16
    return max(2, min(_MOST_IMAGES[device_type], _ELEMENTS[device_type] // (tokens * vision.width)))


def _captions(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return captions of 8 to 32 tokens, as people write them."""
    tokens = torch.zeros(count, length, dtype=torch.long)
    lengths = torch.randint(8, min(32, length) + 1, (count,), generator=generator)
    for row, end in zip(tokens, lengths.tolist(), strict=True):
        row[:end] = torch.randint(1, _WORDS - 1, (end,), generator=generator)
        # the last id ends a caption
        row[end - 1] = _WORDS - 1
    return tokens


def _encoding(
    encode: Callable[[Tensor], Tensor], inputs: Tensor, parameters: list[Tensor] | None, autocast: torch.dtype | None
) -> Callable[[], object]:
    """Return a function that encodes; with the parameters' gradients where they are given."""
    kind = inputs.device.type

    def run() -> object:
        with torch.set_grad_enabled(parameters is not None), torch.autocast(kind, autocast, enabled=bool(autocast)):
            features = encode(inputs)
        if parameters is None:
            return features
        return torch.autograd.grad(features.float().square().sum(), parameters, allow_unused=True)

    return run


def _by_modules(run: Callable[[], object], shortcuts: bool) -> Callable[[], object]:
    """Return the function with no packed weights to serve it, and with or without exact shortcuts."""

    def without() -> object:
        before, transformer.refusal = transformer.refusal, lambda encoder: "tuning measures the modules' own ops"
        try:
            with exact_shortcuts(shortcuts):
                return run()
        finally:
            transformer.refusal = before

    return without


def _loss(
    loss: Callable[..., Tensor],
    pairs: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Callable[[], object]:
    drawn = torch.randn(2, pairs, width, generator=generator)
    # of pairs that a model has learned something of
    images, texts = F.normalize(drawn[0], dim=-1), F.normalize(drawn[0] + 2 * drawn[1], dim=-1)
    leaves = [x.to(device, dtype).requires_grad_() for x in (images, texts)]
    scale = torch.tensor(20.0, device=device, requires_grad=True)

    def run() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(loss(*leaves, scale), (*leaves, scale))

    return run


def calls_of(what: Pass) -> list[Call]:
    """Run something once, and return the calls of ops that it makes, one of each form.

    Calls that an implementation makes of other ops are its own affair. On a card it runs once more with kernels asked
    for: modules hand the bias of a linear layer to a GELU only where a kernel takes it.
    """
    found: dict[tuple[Any, ...], Call] = {}
    original, inside = dispatch.call, False

    def recording(op: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if not inside:
            call = _written_down(op, args, kwargs, what.name)
            found.setdefault(call.form, call)
        before, inside = inside, True
        try:
            return original(op, *args, **kwargs)
        finally:
            inside = before

    dispatch.call = recording
    try:
        what.run()
        if any(call.device.type == "cuda" for call in found.values()):
            with dispatch.backend("triton"), warnings.catch_warnings():
                warnings.simplefilter("ignore", dispatch.FallbackWarning)
                what.run()
    finally:
        dispatch.call = original
    return list(found.values())


def _written_down(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], source: str) -> Call:
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    kind = given[0].device.type
    call = Call(
        op=op,
        key=dispatch.shape_class(op, *args, **kwargs),
        args=args,
        kwargs=kwargs,
        wanted=tuple(i for i, t in enumerate(given) if t.requires_grad) if torch.is_grad_enabled() else (),
        training=torch.is_grad_enabled(),
        autocast=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        source=source,
    )
    return with_tensors(call, [t.detach() for t in given])
