"""Getting a model's kernels ready: compiled, loaded and checked on this card before the first step waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipfast import ops
from clipfast.ops import dispatch, fallback, keys, trust

# what a tower takes: one tensor, or several by name
Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class WarmUp:
    """What became of it.

    Attributes:
        device: Where the model is.
        checked: The kernel configurations that serve on this device, in the model or elsewhere in the process.
        refused: Those that do not, and why; PyTorch computes in their place.
        seconds: How long it took.
    """

    device: torch.device
    checked: tuple[str, ...]
    refused: dict[str, str]
    seconds: float

    def __str__(self) -> str:
        head = f"kernels on {fallback.card(self.device)}: {len(self.checked)} ready, {len(self.refused)} refused"
        lines = [f"  ready: {name}" for name in self.checked]
        lines += [f"  refused: {reason}" for reason in self.refused.values()]
        return "\n".join([f"{head} ({self.seconds:.1f} s)", *lines])


def warm_up(
    model: nn.Module, *, images: Inputs | None = None, tokens: Tensor | None = None, training: bool = False
) -> WarmUp:
    """Compile, load and check every kernel that a model will use on its device, by running it once or twice.

    A kernel configuration that was not used on this card before is compared with float64 and launched again and again
    for the same bits (:mod:`clipfast.ops.trust`); one that fails is not used, with a warning. Without this, the first
    call does it. Call it before capturing a CUDA graph: during a capture nothing is compiled, loaded or checked, and
    what is not ready by then is PyTorch's. Call it under the autocast that the model will run under.

    The model, its gradients, its buffers and the random numbers are left as they were; hooks see a call or two more.

    Args:
        model: A model or tower of clipfast, of open_clip or of transformers, or any that takes images; also inside DDP
            or ``torch.compile``, whose own code is not touched.
        images: ``[B, 3, height, width]`` as the model will get them, or the arguments by name that transformers'
            SigLIP 2 takes; two made-up ones if None.
        tokens: Token ids ``[B, L]`` as the model will get them; two made-up captions if None.
        training: Whether the backward passes too, and the contrastive loss of a model with both towers;
            SigLIP's as well for one with a ``logit_bias``.

    Returns:
        A :class:`WarmUp`; printed, it is a list.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` has no parameters, or does not tell what its inputs look like: give ``images`` or
            ``tokens``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"warm_up(model): got {type(model).__name__}, expected a torch.nn.Module")
    model = _unwrapped(model)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        raise ValueError(f"warm_up(model): got a {type(model).__name__} without parameters, expected a model")
    began, device = time.monotonic(), parameter.device
    calls = _calls(model, images, tokens, parameter)
    # what was not ready for an earlier capture may be ready for the next
    fallback.forget_captures()
    with _left_as_it_was(model, device), torch.set_grad_enabled(training):
        # what serves large batches is got ready on small ones too
        for large in (False, True) if keys.sizes_count(device) else (False,):
            with dispatch.as_large_calls(large):
                _run(model, calls, training)
    refused = trust.refused(device) | {
        f"{op}, every configuration": f"{op}: {why}"
        for (op, where), why in fallback.failures().items()
        if where == device
    }
    return WarmUp(device, tuple(trust.checked(device)), refused, time.monotonic() - began)


def _run(model: nn.Module, calls: list[tuple[Callable[[Inputs], Tensor], Inputs]], training: bool) -> None:
    """Run the towers, and in training the loss and the backward passes."""
    features = [encode(inputs) for encode, inputs in calls]
    if training:
        if len(features) == 2:
            features.append(_loss(*features, has_bias=getattr(model, "logit_bias", None) is not None))
        wanted = [p for p in model.parameters() if p.requires_grad]
        total = sum(f.float().sum() for f in features)
        if wanted and total.requires_grad:
            torch.autograd.grad(total, wanted, allow_unused=True)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = model._orig_mod
        else:
            return model


def _calls(
    model: nn.Module, images: Inputs | None, tokens: Tensor | None, parameter: Tensor
) -> list[tuple[Callable[[Inputs], Tensor], Inputs]]:
    """Return the towers of a model, each with its inputs."""
    pairs = (("encode_image", "encode_text"), ("get_image_features", "get_text_features"))
    found = next((p for p in pairs if all(hasattr(model, name) for name in p)), None)
    of_image, of_text = (_pooled(getattr(model, name)) for name in found) if found else (None, None)
    if found is None:
        tower = _pooled(model)
        takes_tokens = tokens is not None or (images is None and hasattr(model, "token_embedding"))
        of_image, of_text = (None, tower) if takes_tokens else (tower, None)
    calls = []
    if of_image is not None:
        images = _made_up_images(model, parameter) if images is None else images
        if isinstance(images, dict):
            images = {name: value.to(parameter.device) for name, value in images.items()}
        else:
            images = images.to(parameter.device)
        calls.append((of_image, images))
    if of_text is not None:
        tokens = _made_up_tokens(model, parameter.device) if tokens is None else tokens.to(parameter.device)
        calls.append((of_text, tokens))
    return calls


def _pooled(encode: Callable[..., Any]) -> Callable[[Inputs], Tensor]:
    """Let a tower return one tensor, whatever kind of output it gives."""

    def call(inputs: Inputs) -> Tensor:
        output = encode(**inputs) if isinstance(inputs, dict) else encode(inputs)
        if isinstance(output, Tensor):
            return output
        pooled = getattr(output, "pooler_output", None)
        return pooled if pooled is not None else output[0]

    return call


def _made_up_images(model: nn.Module, parameter: Tensor) -> Inputs:
    config = getattr(model, "config", None)
    places = (model, getattr(model, "visual", None), config, getattr(config, "vision_config", None))
    size = next((s for s in (getattr(p, "image_size", None) for p in places) if s is not None), None)
    patches = next((p for p in places if size is None and isinstance(getattr(p, "num_patches", None), int)), None)
    if patches is not None:
        return _made_up_patches(patches.num_patches, patches.num_channels * patches.patch_size**2, parameter)
    if size is None:
        raise ValueError(
            f"warm_up(images): got none, and a {type(model).__name__} does not tell its image_size; give some"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(2, 3, height, width, device=parameter.device, dtype=parameter.dtype)


def _made_up_patches(count: int, values: int, parameter: Tensor) -> dict[str, Tensor]:
    """Return what transformers' SigLIP 2 takes: a picture of as many patches as there are, and one of fewer."""
    lengths = torch.tensor([count, max(1, count - 1)])
    return {
        "pixel_values": torch.zeros(2, count, values, device=parameter.device, dtype=parameter.dtype),
        "pixel_attention_mask": (torch.arange(count) < lengths[:, None]).int(),
        "spatial_shapes": torch.stack([torch.ones_like(lengths), lengths], dim=1),
    }


def _made_up_tokens(model: nn.Module, device: torch.device) -> Tensor:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    length = getattr(model, "context_length", None) or getattr(config, "max_position_embeddings", None)
    vocabulary = getattr(model, "vocab_size", None) or getattr(config, "vocab_size", None)
    if length is None or vocabulary is None:
        raise ValueError(
            f"warm_up(tokens): got none, and a {type(model).__name__} does not tell its context_length and vocab_size; "
            "give some"
        )
    eos = getattr(model, "eos_id", None)
    tokens = torch.zeros(2, length, dtype=torch.long, device=device)
    # a short caption and one that fills the context
    tokens[0, min(4, length - 1)] = tokens[1, length - 1] = vocabulary - 1 if eos is None else eos
    return tokens


def _loss(image: Tensor, text: Tensor, has_bias: bool) -> Tensor:
    pairs = min(len(image), len(text))
    image, text = (F.normalize(x[:pairs].float(), dim=-1) for x in (image, text))
    loss = ops.contrastive_loss(image, text, 1.0)
    return loss + ops.siglip_loss(image, text, 1.0) if has_bias else loss


@contextmanager
def _left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Give buffers (BatchNorm's statistics) and random numbers back as they were."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
