"""A driver and a compiler in the place of Triton's: kernels are bound and launched as on a card that is not there.

Nothing is compiled but what a kernel would have been specialised on, and nothing runs but a note of the launch. Tensors
are the CPU's. Importing this installs it, which cannot be undone, and it wants to come before whoever lets Triton
interpret kernels: as a plugin of pytest's in a process of its own, ``python -m pytest -p mocked_driver``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class Specialised(NamedTuple):
    """What a kernel is compiled for."""

    name: str
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    device: int


class Launch(NamedTuple):
    """A launch: of what, where, and with which arguments."""

    specialised: Specialised
    grid: tuple[int, int, int]
    stream: int
    hooks: tuple[Any, Any, Any]
    arguments: tuple[Any, ...]


launches: list[Launch] = []
compiled: list[Specialised] = []
# the current device, and that the launch of a compiled kernel raises an error
device = 0
error: Exception | None = None


class Compiled:
    """Stands for a kernel's binary, which the first launch loads."""

    def __init__(self, specialised: Specialised) -> None:
        self.specialised = specialised
        self.function = 1000 + len(compiled)
        self.packed_metadata = (4, 1, 0)
        compiled.append(specialised)

    def launch_metadata(self, grid: Any, stream: int, *arguments: Any) -> str:
        """Return what hooks are given."""
        return "metadata"

    def run(self, x: int, y: int, z: int, stream: int, function: int, metadata: Any, *rest: Any) -> None:
        """Note a launch."""
        assert (function, metadata) == (self.function, self.packed_metadata)
        assert self.specialised.device == device, "a kernel of another device"
        if error is not None:
            raise error
        for hook in rest[1:2]:
            if hook is not None:
                hook(rest[0])
        launches.append(Launch(self.specialised, (x, y, z), stream, rest[:3], rest[3:]))


def _compile(src: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> Compiled:
    return Compiled(Specialised(src.name, src.signature, src.constants, src.attrs, dict(options), device))


class _Driver:
    def get_current_device(self) -> int:
        """Return the current device."""
        return device

    def get_current_stream(self, of: int) -> int:
        """Return the current stream of a device."""
        return 70 + of

    def get_current_target(self) -> GPUTarget:
        """Return a Hopper card."""
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """Return where its tensors are."""
        return torch.device("cpu")


assert not triton.knobs.runtime.interpret, "kernels are interpreted: run pytest with -p mocked_driver"
triton.compiler.compile = _compile
driver.set_active(_Driver())
