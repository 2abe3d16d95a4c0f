"""A card of Python's own, the device ``pretend:0``: it computes in host memory, and writes down whoever waits for it.

PyTorch takes it for an accelerator like any other. Its tensors have no values that the host could reach but through its
operators, and every operator that runs on it, forward and backward, passes through :func:`_run`, which does on the same
memory what the CPU would and says whether a GPU's host would have had to wait.

Installing it cannot be undone, and PyTorch makes its backward threads for the devices of the process' first backward
pass: it wants a process of its own. An exception in the backward pass ends that process.
"""

from __future__ import annotations

import functools
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten
_CPU = torch._C.DispatchKey.CPU
_set = aten.set_.source_Storage_storage_offset

# the host memory behind the card's, by its address, as long as a tensor of the card has it
_memory: dict[int, torch.UntypedStorage] = {}
_pinned: set[int] = set()
_libraries: list[torch.library.Library] = []


@dataclass
class Record:
    """What happened while :func:`watching`.

    Attributes:
        operators: The names of all operators that ran on the card, and of the kernels that were launched.
        waits: What made the host wait, and where; a copy to the host is among them.
        sends: What was copied to the card from pinned memory, without waiting: elements and dtype.
        marks: How many operators, waits and sends there were when :meth:`mark` was called.
    """

    operators: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    sends: list[str] = field(default_factory=list)
    marks: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        """Remember a moment, the first of its name."""
        self.marks.setdefault(name, (len(self.operators), len(self.waits), len(self.sends)))


_record: Record | None = None


@contextmanager
def watching() -> Iterator[Record]:
    """Write down what happens on the card inside a ``with`` block, in every thread."""
    global _record
    previous, _record = _record, Record()
    try:
        yield _record
    finally:
        _record = previous


def note(operator: str, wait: str | None = None, send: str | None = None) -> None:
    """Write down an operator, and why its host waits or what it sends without waiting."""
    if _record is None:
        return
    if operator == "aten.index_select.default":
        # the tokens' embeddings are looked up; a hook would not do: a layer that is watched gets whole captions
        _record.mark("first layer")
    _record.operators.append(operator)
    if wait is not None:
        _record.waits.append(f"{operator} {wait}, {_place()}")
    if send is not None:
        _record.sends.append(send)


def _place() -> str:
    """Return the innermost line that is not this file's nor PyTorch's: in the backward pass there may be none."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].name}" if frames else "in PyTorch's backward pass"


def is_on_card(x: object) -> bool:
    """Return whether ``x`` is a tensor of the card."""
    return isinstance(x, Tensor) and x.device.type == NAME


def host_view(x: Tensor) -> Tensor:
    """Return a CPU tensor over the memory of a card's tensor, for those who compute in the card's place."""
    storage = x.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    view = torch.empty(0, dtype=x.dtype)
    return view.set_(_memory[storage.data_ptr()], x.storage_offset(), x.size(), x.stride())


def _place_on_card(x: Tensor, like: Tensor, storages: dict[int, Any]) -> Tensor:
    """Make the card's tensor ``x`` one over the memory of the CPU tensor ``like``, and return it."""
    memory = like.untyped_storage()
    address = memory.data_ptr()
    storage = storages.get(address)
    if storage is None:
        device = torch.device(NAME, 0)
        storage = torch._C._construct_storage_from_data_pointer(address, device, memory.nbytes())
        if address:
            _memory[address] = memory
            weakref.finalize(storage, _memory.pop, address)
    return _set._op_dk(_CPU, x, storage, like.storage_offset(), like.size(), like.stride())


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return target.copy_(source)


def _convolution_backward(d_out: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return aten.convolution_backward(d_out, x, weight, [d_out.shape[1]], *rest)


def _flash(
    tensors: tuple[Tensor, ...], of_queries: Tensor, of_keys: Tensor, most_queries: int, most_keys: int, dropout: float,
    causal: bool, *, scale: float, window_size_left: int | None = None, window_size_right: int | None = None,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Return FlashAttention's weights and output of each packed sequence; check what it asks of its arguments."""
    for x in tensors:
        assert x.dtype in (torch.float16, torch.bfloat16)
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0
    for offsets, most in ((of_queries, most_queries), (of_keys, most_keys)):
        assert offsets.dtype == torch.int32
        assert offsets.is_contiguous()
        assert most == int(offsets.diff().max())
    assert dropout == 0
    assert (window_size_left, window_size_right) in ((None, None), (-1, 0 if causal else -1))
    found = []
    for query, key, value in _sequences(tensors, of_queries, of_keys):
        scores = torch.einsum("nhd,mhd->hnm", query, key) * scale
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = (scores.masked_fill(hidden, -torch.inf) if causal else scores).softmax(-1)
        found.append((weights, torch.einsum("hnm,mhd->nhd", weights, value)))
    return found


def _sequences(tensors: Sequence[Tensor], of_queries: Tensor, of_keys: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield each sequence's query, key and value, and its part of what more there is, as that of the query."""
    offsets = [of_queries, of_keys, of_keys, *[of_queries] * (len(tensors) - 3)]
    parts = [x.double().tensor_split(o[1:-1].long()) for x, o in zip(tensors, offsets, strict=True)]
    yield from zip(*parts, strict=True)


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    options = {k: v for k, v in kwargs.items() if k.startswith(("scale", "window"))}
    out = torch.cat([out for _, out in _flash((query, key, value), *args[:6], **options)]).to(query.dtype)
    return out, torch.zeros(out.shape[1], out.shape[0]), torch.zeros(2), torch.zeros(0), torch.zeros(0)


def _flash_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    found = _flash((query, key, value), *args[:6], **kwargs)
    gradients = []
    for (weights, y), (q, k, v, dy) in zip(found, _sequences((query, key, value, d_out), *args[:2]), strict=True):
        d_weights = torch.einsum("nhd,mhd->hnm", dy, v) - (dy * y).sum(-1).T[:, :, None]
        d_scores = weights * d_weights * kwargs["scale"]
        of_query, of_key = torch.einsum("hnm,mhd->nhd", d_scores, k), torch.einsum("hnm,nhd->mhd", d_scores, q)
        gradients.append((of_query, of_key, torch.einsum("hnm,nhd->mhd", weights, dy)))
    return tuple(torch.cat(parts).to(query.dtype) for parts in zip(*gradients, strict=True))


# What a backend of its own has under other names, or where PyTorch asks it for its choice: attention by its products.
# FlashAttention is there for whoever calls it by name.
_STAND_INS: dict[Any, Callable[..., Any]] = {
    aten._copy_from.default: _copy,
    aten.convolution_overrideable.default: aten.convolution.default,
    aten.convolution_backward_overrideable.default: _convolution_backward,
    aten._fused_sdp_choice.default: lambda *args, **kwargs: 0,
    aten._flash_attention_forward.default: _flash_forward,
    aten._flash_attention_backward.default: _flash_backward,
}
_DEPENDS_ON_DATA = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


def why_host_waits(op: Any, *args: Any, **kwargs: Any) -> str | None:
    """Return why the host waits for a GPU in a call of an operator other than a copy, or None."""
    if op in _INDEXING:  # whose tags speak of masks
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            return "counts the values of a mask"
        on_host = any(i.device.type == "cpu" for i in indices)
        return "copies indices from the host and waits" if on_host else None
    if op is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
        return None
    return "needs the values on the host" if _DEPENDS_ON_DATA.intersection(op.tags) else None


def _note_copy(op: Any, source: Tensor, target: Tensor, non_blocking: bool = False) -> None:
    wait = send = None
    if not is_on_card(target):
        wait = "copies to the host"
    elif not is_on_card(source):
        if non_blocking and source.is_pinned():
            send = f"{source.numel()} {str(source.dtype).removeprefix('torch.')}"
        else:
            wait = f"copies from the host {'not pinned' if non_blocking else 'and waits'}"
    note(str(op), wait, send)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator as the CPU does, on the memory of the card's tensors; results are the card's."""
    is_copy = op in (aten._copy_from.default, aten.copy_.default)
    if op is aten._copy_from.default:
        _note_copy(op, *args, **kwargs)
    elif op is aten.copy_.default:
        _note_copy(op, args[1], args[0], *args[2:])
    else:
        note(str(op), why_host_waits(op, *args, **kwargs))
    flat, spec = pytree.tree_flatten((args, kwargs))
    strangers = [x for x in flat if isinstance(x, Tensor) and not is_on_card(x) and x.dim() > 0]
    if strangers and not is_copy and op not in _INDEXING:
        raise RuntimeError(f"{op}: tensors on {NAME} and {strangers[0].device}")
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in flat if is_on_card(x)}
    hosts = [_on_host(x) for x in flat]
    owners = {id(h): x for h, x in zip(hosts, flat, strict=True) if isinstance(h, Tensor)}
    before = [_layout(h) for h in hosts]
    args, kwargs = pytree.tree_unflatten(hosts, spec)
    out = _STAND_INS.get(op, op)(*args, **kwargs)
    for h, x, layout in zip(hosts, flat, before, strict=True):
        if is_on_card(x) and _layout(h) != layout:
            _place_on_card(x, h, storages)  # resized, as results that were handed in are
    to_host = any(isinstance(x, torch.device) and x.type == "cpu" for x in flat)

    def back(value: object) -> object:
        if not isinstance(value, Tensor) or to_host:
            return value
        if id(value) in owners:
            return owners[id(value)]
        return _place_on_card(torch._C._acc.create_empty_tensor([0], value.dtype), value, storages)

    return pytree.tree_map(back, out)


def _on_host(x: object) -> object:
    if isinstance(x, torch.device) and x.type == NAME:
        return torch.device("cpu")
    return host_view(x) if is_on_card(x) else x


def _layout(x: object) -> tuple[Any, ...] | None:
    if not isinstance(x, Tensor):
        return None
    return x.untyped_storage().data_ptr(), x.size(), x.stride(), x.storage_offset()


# The operators of CLIP that CUDA's autocast computes in half precision, and in float32.
_HALF = ["linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d", "_convolution", "scaled_dot_product_attention"]
_FLOAT = [
    "layer_norm",
    "softmax.int",
    "log_softmax.int",
    "cross_entropy_loss",
    "nll_loss",
    "exp",
    "log",
    "pow.Tensor_Scalar",
    "sum",
    "sum.dim_IntList",
    "norm.ScalarOpt_dim",
    "logsumexp",
]


def _autocast(op: Any, to_float: bool, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.float32 if to_float else torch.get_autocast_dtype(NAME)

    def cast(x: object) -> object:
        eligible = is_on_card(x) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        return x.to(dtype) if eligible else x

    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return op(*pytree.tree_map(cast, args), **pytree.tree_map(cast, kwargs))


class _Module(_DummyBackendModule):
    """``torch.pretend``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return what autocast may compute in."""
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: object = None) -> None:
        """Wait for the card."""
        note("synchronize", "waits for all that was launched")


def _pin(x: Tensor, device: torch.device | None = None) -> Tensor:
    copy = x.clone()
    storage = copy.untyped_storage()
    if storage.nbytes():
        _pinned.add(storage.data_ptr())
        weakref.finalize(storage, _pinned.discard, storage.data_ptr())
    return copy


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def install() -> None:
    """Make ``pretend:0`` a device of this process; what Python registers for CUDA from now on serves it too."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    everything, library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend((everything, library))
    everything.fallback(_run, "PrivateUse1")
    # whatever the CPU has a kernel for, CUDA has too: without one of its own the card would run a composition of others
    of_cpu = {
        name.removeprefix("aten::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    }
    for name in of_cpu | {op.name().removeprefix("aten::") for op in _STAND_INS}:
        library.impl(name, functools.partial(_run, _overload(name)), "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, to_float in ((_HALF, False), (_FLOAT, True)):
        for name in names:
            library.impl(name, functools.partial(_autocast, _overload(name), to_float), "AutocastPrivateUse1")
    impl = torch.library.Library.impl

    def for_both(self: torch.library.Library, name: Any, function: Any, key: str = "", **options: Any) -> None:
        impl(self, name, function, key, **options)
        if key == "CUDA":
            impl(self, name, function, "PrivateUse1", **options)

    torch.library.Library.impl = for_both
    library.impl("_pin_memory", _pin, "CPU")
    library.impl("is_pinned", lambda x, device=None: x.untyped_storage().data_ptr() in _pinned, "CPU")
