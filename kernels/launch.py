"""A second launch of a compiled kernel, without what the first one had to find out.

Triton's own launch binds the arguments, writes its options out as text, and looks through its settings and hooks every
time, which takes longer than a small kernel. Here a launch is known by what Triton specialises a kernel on, as Triton's
own function tells it of the arguments (dtypes, pointers and integers divisible by 16, ones), by the constexprs, options
and settings, and by the device. One that is known goes straight to the compiled kernel. Every other one is Triton's:
the first of its kind, those that hooks look at, and all of them in versions of Triton that this was not written for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import repeat
from typing import Any

import triton
from triton import knobs
from triton.runtime import jit as _jit
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# those whose launch is what this does: the first one, and the first behind the last
VERSIONS = ((3, 6), (3, 10))

_specialize = getattr(_jit, "native_specialize_impl", None)
_HookChain = getattr(knobs, "HookChain", None)
_MISSING = object()


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Make a kernel of a function, as ``triton.jit`` does and with its options; its repeated launches cost less."""
    if function is None:
        return functools.partial(jit, **options)
    return triton.jit(function, **options) if knobs.runtime.interpret else Kernel(function, **options)


def is_known_version(version: str) -> bool:
    """Return whether a version of Triton launches kernels as this module does."""
    try:
        return VERSIONS[0] <= tuple(int(part) for part in version.split(".")[:2]) < VERSIONS[1]
    except ValueError:
        return False


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up; ``triton.cdiv`` does the same on the host in 2 µs."""
    return -(-a // b)


class Kernel(JITFunction):
    """A kernel of Triton's, launched as any: ``kernel[grid](*arguments, **named)``."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__(function, **options)
        # by device: what Triton keeps for it, and the launches that are known
        self._known: dict[int, tuple[Any, Any, dict[Any, tuple[Any, ...]]]] = {}
        runtime = [p for p in self.params if not p.is_constexpr]
        self._runtime_arguments = len(runtime)
        self._is_const = tuple(p.is_const for p in runtime)
        self._specializes = tuple(not p.do_not_specialize for p in runtime)
        self._aligns = tuple(not p.do_not_specialize_on_alignment for p in runtime)
        self._is_quick = (
            is_known_version(triton.__version__)
            and _specialize is not None
            and _HookChain is not None
            # they come first, and nothing but their values says what they are
            and not any(p.is_constexpr for p in self.params[: len(runtime)])
            and not any(p.annotation_type for p in runtime)
        )

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        """Return the kernel's launch on a grid."""
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Any, *arguments: Any, **named: Any) -> Any:
        active = driver.active
        device = active.get_current_device()
        known = self._known.get(device)
        # another driver, or kernels that were dropped, leave nothing known
        if known is not None and known[0] is self.device_caches.get(device):
            try:
                found = known[2].get(self._key(known[1], arguments, named))
            except TypeError:
                # an argument of no type that Triton knows or that can be looked up: it says so itself
                found = None
            if found is not None and not callable(grid) and self._is_unwatched():
                run, function, metadata, defaults = found
                x, y, z = (*grid, 1, 1)[:3]
                stream = active.get_current_stream(device)
                run(x, y, z, stream, function, metadata, None, None, None, *arguments, *defaults)
                return None
        compiled = self.run(*arguments, grid=grid, warmup=False, **named)
        if self._is_quick and not callable(grid):
            self._remember(device, compiled, arguments, named)
        return compiled

    def _key(self, backend: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """Return what a launch's compiled kernel depends on."""
        specialized = map(
            _specialize, repeat(backend), arguments, self._is_const, self._specializes, self._aligns
        )  # stops where the constexprs begin
        return tuple(specialized), arguments[self._runtime_arguments :], tuple(named.items()), self._settings()

    def _settings(self) -> tuple[Any, ...]:
        runtime, compilation = knobs.runtime, knobs.compilation
        return (
            self.debug or runtime.debug,
            compilation.instrumentation_mode,
            getattr(compilation, "fpsan_homomorphic_casts", None),
        )

    def _is_unwatched(self) -> bool:
        """Return whether no hook wants to see a launch, and no global that the kernel was compiled with has changed."""
        runtime = knobs.runtime
        return not (
            self.pre_run_hooks
            or runtime.add_stages_inspection_hook is not None
            or _is_set(runtime.launch_enter_hook)
            or _is_set(runtime.launch_exit_hook)
            or (self.used_global_vals and self._is_outdated())
        )

    def _is_outdated(self) -> bool:
        for (name, _), (value, scope) in self.used_global_vals.items():
            found = scope.get(name, _MISSING)
            if found is not value and found != value:
                return True
        return False

    def _remember(self, device: int, compiled: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Keep a launch that Triton has made."""
        if getattr(compiled, "function", None) is None:
            return
        try:
            caches = self.device_caches[device]
            _, _, _, backend, binder = caches
            bound, specialization, _ = binder(*arguments, **named)
            key = self._key(backend, arguments, named)
            # what is not among the arguments by position is constant, and in the key by name
            defaults = tuple(bound.values())[len(arguments) :]
            same = key[0] == tuple(specialization[: self._runtime_arguments])
            if same and len(arguments) >= self._runtime_arguments:
                known = self._known.get(device)
                if known is None or known[0] is not caches:
                    known = self._known[device] = (caches, backend, {})
                known[2][key] = compiled.run, compiled.function, compiled.packed_metadata, defaults
            self._is_quick = same
        except Exception:
            # this Triton is another one than it seems
            self._is_quick = False


def _is_set(hook: Any) -> bool:
    return hook is not None and not (type(hook) is _HookChain and not hook.calls)
