"""Inference by CUDA graphs: one graph for every size of batch that is asked for, replayed instead of launched.

A tower's forward pass is some hundred launches, which take the host longer than a card needs for a few pictures. A
graph is one launch. It computes for one number of rows: a batch is padded to the next size that has a graph, and the
rows that were added are cut off again. Rows do not see each other, so the others' results are the model's own.

A graph keeps what was launched when it was captured, and the addresses of the weights. Weights that are written to in
place count at the next call. Whatever else somebody does to the model is looked for at every call: weights that moved
and code or attributes that changed are captured anew, and where a graph could not be right the model itself computes.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.models.clip import CLIP
from clipfast.models.warm_up import warm_up
from clipfast.modules import shortcuts
from clipfast.modules.packing import CAPTION_BUCKETS
from clipfast.modules.plainness import Watch, is_transformed, is_watched_globally
from clipfast.modules.text import TextTower
from clipfast.ops import FallbackWarning, capturing, dispatch, fallback, plan, switches

# a model that is another one after so many captures is not worth the next
_MOST_REBUILDS = 8
# of one method, each with memory of its own for what comes in
_MOST_GRAPHS = 64


def graphed(model: nn.Module, batch_sizes: Sequence[int]) -> Graphed:
    """Return what encodes as ``model`` does, by CUDA graphs.

    Args:
        model: In ``eval()``, on a card: a :class:`clipfast.CLIP` or a model with its ``encode_image`` and
            ``encode_text``, or a tower that takes images or tokens. It stays as it is.
        batch_sizes: The numbers of rows that get a graph each, when they first occur. A batch of fewer rows is padded
            to the next of them; one of more rows than all is the model's.

    Returns:
        A :class:`Graphed`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``batch_sizes`` is empty, or holds something else than positive whole numbers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"graphed(model): got {type(model).__name__}, expected a torch.nn.Module")
    sizes = tuple(batch_sizes) if isinstance(batch_sizes, Sequence) else (batch_sizes,)
    if not sizes or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise ValueError(f"graphed(batch_sizes): got {batch_sizes!r}, expected positive whole numbers")
    return Graphed(model, tuple(sorted(set(sizes))))


class Graphed:
    """A model whose towers run as CUDA graphs; :func:`graphed` makes it.

    Attributes:
        model: The model.
        batch_sizes: The numbers of rows that graphs are for, smallest first.
        fallbacks: Why calls were the model's own, and how many of them.
    """

    def __init__(self, model: nn.Module, batch_sizes: tuple[int, ...]) -> None:
        self.model, self.batch_sizes = model, batch_sizes
        self.fallbacks: dict[str, int] = {}
        self._lock = threading.RLock()
        self._towers: dict[str, _Tower] = {}

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Encode images ``[B, 3, height, width]`` as the model's ``encode_image`` does: features ``[B, E]``."""
        return self._encode("encode_image", image, normalize)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Encode captions, token ids ``[B, L]``, as the model's ``encode_text`` does: features ``[B, E]``.

        In a graph no caption is packed, since lengths are data: every column is computed that comes in, so let
        :func:`clipfast.trim_captions` cut off what no caption reaches.
        """
        return self._encode("encode_text", text, normalize)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return what the model returns: of a tower its features, of a CLIP the features of both and the scale."""
        if self._is_plain_clip():
            # which calls the methods above, and asks for the model's attributes
            return _FORWARD(self, *inputs, **named)
        if hasattr(self.model, "encode_image") or len(inputs) != 1 or named:
            return self.model(*inputs, **named)
        return self._encode("forward", inputs[0], False)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.model, name)

    def __repr__(self) -> str:
        graphs = sum(len(tower.graphs) for tower in self._towers.values())
        lines = [f"{type(self.model).__name__} by CUDA graphs for {self.batch_sizes} rows, {graphs} captured"]
        return "\n".join([*lines, *(f"  the model itself, {n} ×: {why}" for why, n in self.fallbacks.items())])

    def _encode(self, method: str, inputs: Tensor, normalize: bool) -> Tensor:
        encode = self.model if method == "forward" else getattr(self.model, method)
        why = self._refusal(method, inputs)
        if why is None:
            with self._lock:
                if method not in self._towers:
                    self._towers[method] = _Tower(self.model, method, self.batch_sizes)
                features = self._towers[method].replayed(encode, inputs)
            if isinstance(features, Tensor):
                return F.normalize(features, dim=-1) if normalize else features
            why = features
        self._tell(why)
        return encode(inputs, normalize=True) if normalize else encode(inputs)

    def _refusal(self, method: str, inputs: Any) -> str | None:
        """Return why no graph can serve a call, whatever became of the model, or None."""
        if type(inputs) is not Tensor:
            return "its input is no plain tensor"
        if not 0 < len(inputs) <= self.batch_sizes[-1]:
            return f"a batch of {len(inputs)} rows has no graph"
        if dispatch.is_deterministic():
            return "results may not depend on the batch (clipfast.deterministic)"
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
            return "it is traced or transformed"
        return None

    def _is_plain_clip(self) -> bool:
        model = self.model
        plain = type(model) is CLIP and CLIP.forward is _FORWARD and "forward" not in model.__dict__
        return plain and not (shortcuts.has_hooks(model) or is_watched_globally())

    def _tell(self, why: str) -> None:
        if why not in self.fallbacks:
            warnings.warn(f"clipfast.graphed: the model itself computes: {why}", FallbackWarning, stacklevel=4)
        self.fallbacks[why] = self.fallbacks.get(why, 0) + 1


_FORWARD = CLIP.forward
_WANTS = attrgetter("requires_grad")


class _Graph(NamedTuple):
    """What is written to before a replay, and read after it."""

    inputs: Tensor
    outputs: Tensor
    replay: Callable[[], None]


class _Tower:
    """One method of a model, and its graphs."""

    def __init__(self, model: nn.Module, method: str, batch_sizes: tuple[int, ...]) -> None:
        self.model, self.method, self.batch_sizes = model, method, batch_sizes
        self.takes_tokens = method == "encode_text" or (method == "forward" and hasattr(model, "token_embedding"))
        # or why there is none
        self.graphs: dict[Any, _Graph | str] = {}
        self._rebuilds, self._broken = -1, ""
        self._pool: Any = None
        self._done: Any = None
        self._look()

    def replayed(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor | str:
        """Return the features of a batch, or why the model itself has to compute them."""
        why = self._refusal()
        if why is None and torch.is_grad_enabled() and (inputs.requires_grad or any(map(_WANTS, self._tensors()))):
            why = "gradients are recorded"
        if why is not None:
            return why
        if self.takes_tokens and isinstance(self.model, TextTower):
            self.model._check_tokens(inputs)
        elif inputs.device != self._device:
            return f"its input lies on {inputs.device}"
        shape = (next(n for n in self.batch_sizes if n >= len(inputs)), *self._padded(inputs.shape[1:]))
        key = (shape, inputs.dtype, _settings(self._device))
        graph = self.graphs.get(key)
        if graph is None:
            if len(self.graphs) >= _MOST_GRAPHS:
                return f"there are {_MOST_GRAPHS} graphs already"
            graph = self.graphs[key] = self._captured(encode, shape, inputs)
        if isinstance(graph, str):
            return graph
        with torch.no_grad(), _in_turn(self):
            _part_of(graph.inputs, inputs.shape).copy_(inputs, non_blocking=True)
            if shape[1:] != inputs.shape[1:]:
                # no end of an earlier caption may lie behind one that has none
                graph.inputs[:, inputs.shape[1] :].zero_()
            graph.replay()
            return graph.outputs[: len(inputs)].clone()

    def _look(self) -> None:
        """Take the model as it is now."""
        self._rebuilds += 1
        self.graphs.clear()
        modules = list(self.model.modules())
        if self.method != "forward" and isinstance(visual := getattr(self.model, "visual", None), nn.Module):
            inside = set(visual.modules())
            modules = [m for m in modules if m is self.model or (m in inside) != self.takes_tokens]
        self._modules, self._watch = modules, Watch(modules)
        self._addresses = self._addresses_now()
        self._device = next((p.device for m in modules for p in m._parameters.values() if p is not None), None)

    def _tensors(self) -> Iterator[Tensor]:
        found = (t for m in self._modules for table in (m._parameters, m._buffers) for t in table.values())
        return (t for t in found if t is not None)

    def _addresses_now(self) -> list[tuple[int, torch.dtype, tuple[int, ...]]]:
        return [(t.data_ptr(), t.dtype, t.stride()) for t in self._tensors()]

    def _refusal(self) -> str | None:
        if self._broken:
            return self._broken
        if is_watched_globally() or self._watch.is_hooked():
            return "a hook waits for a module"
        if not self._watch.holds() or self._addresses_now() != self._addresses:
            if self._rebuilds >= _MOST_REBUILDS:
                return f"the model was changed more than {_MOST_REBUILDS} times"
            self._look()
            if self._watch.is_hooked():
                return "a hook waits for a module"
        if self._device is None or not _has_graphs(self._device):
            return f"the model is on {self._device}"
        if any(m.training for m in self._modules):
            return "the model is in training mode"
        if fallback.captures(self._device):
            return "a graph is being captured"
        return None

    def _padded(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a row in a graph: of tokens the next length that captions are cut to.

        Tokens behind a caption change nothing where the mask hides them; other towers get what came.
        """
        if not (self.takes_tokens and isinstance(self.model, TextTower) and self.model.ignores_padding):
            return tuple(shape)
        context = self.model.context_length
        return (min((n for n in CAPTION_BUCKETS if shape[0] <= n <= context), default=context),)

    def _captured(self, encode: Callable[[Tensor], Tensor], shape: tuple[int, ...], like: Tensor) -> _Graph | str:
        """Capture a graph for one shape."""
        # not while gradients or views are of a kind that may not be written to later
        with torch.inference_mode(False), torch.no_grad(), _without_cached_casts(self._device), capturing.rehearsal():
            inputs = torch.zeros(shape, dtype=like.dtype, device=self._device)
            _part_of(inputs, like.shape).copy_(like)
            try:
                # whatever a capture needs is ready before it
                warm_up(self.model, **{"tokens" if self.takes_tokens else "images": inputs[:2]})
                if not isinstance(encode(inputs), Tensor):
                    return "its output is no tensor"
            except Exception as error:
                if fallback.is_final(error):
                    raise
                # if the call is wrong, the model says so itself
                return f"its rehearsal failed ({fallback.in_words(error)})"
            try:
                self._pool = self._pool or _new_pool()
                outputs, replay = _capture(lambda: encode(inputs), self._device, self._pool)
            except Exception as error:
                if fallback.is_final(error) and "captur" not in str(error):
                    raise
                self._broken = f"its capture failed ({fallback.in_words(error)})"
                return self._broken
        return _Graph(inputs, outputs, replay)


def _part_of(whole: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a view of the first rows, and of tokens the first columns."""
    return whole[tuple(slice(n) for n in shape)]


def _settings(device: torch.device) -> tuple[Any, ...]:
    """Return what was decided when a graph was captured, and would be decided otherwise with other settings."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        *switches.current, plan.generation, shortcuts.shortcuts_enabled(),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        torch.get_float32_matmul_precision(), cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction, torch.are_deterministic_algorithms_enabled(),
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# the card


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None


def _new_pool() -> Any:
    return torch.cuda.graph_pool_handle()


def _capture(run: Callable[[], Tensor], device: torch.device, pool: Any) -> tuple[Tensor, Callable[[], None]]:
    """Return what ``run`` gave while it was captured, and what computes it anew in the same place."""
    with torch.cuda.device(device):
        # on a stream of its own first, as libraries get their workspaces then
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on allocating and copying
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = run()
    return outputs, graph.replay


@contextmanager
def _in_turn(tower: _Tower) -> Iterator[None]:
    """Let calls from several streams go one after the other: they write to the same memory."""
    if tower._device.type != "cuda":
        yield
        return
    with torch.cuda.device(tower._device):
        stream = torch.cuda.current_stream()
        if tower._done is not None:
            stream.wait_event(tower._done)
        yield
        tower._done = stream.record_event()


def _without_cached_casts(device: torch.device) -> Any:
    """Let autocast keep no copy of a weight, which a graph would go on reading when it is gone."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)
