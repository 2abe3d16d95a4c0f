"""The compiled op library: loading it when it is first needed, and saying why where it cannot be used."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import struct
from pathlib import Path
from typing import Any

import torch

from clipfast.ops.switches import constant_when_compiled

_PACKAGE = Path(__file__).parent.parent
# Orin and Thor, for which NVIDIA promises nothing of code that was made for another number (CUDA C++ Programming Guide,
# "Binary Compatibility"); PTX serves them as it does others
_EMBEDDED = ((8, 7), (11, 0))
_MACHINES = {3: "i386", 21: "ppc64le", 22: "s390x", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
#: what :func:`card_support` says of a library that holds nothing for any card
WITHOUT_CUDA = "the op library was built without CUDA: build it where nvcc is"
# what the package calls; a library of an older clipfast may lack one
_OPS = (
    "build_info",
    "contrastive_statistics",
    "contrastive_gradients",
    "contrastive_statistics_and_products",
    "contrastive_gradients_of_products",
    "siglip_statistics",
    "siglip_gradients",
    "why_no_amx",
    "can_encode",
    "pack_weight",
    "packed_linear",
    "encode",
    "release_workspace",
    "missing_cuda_entry_points",
    "fingerprint",
    "changed_weight",
    "row_vectors",
    "native_layer_norm",
    "native_layer_norm_backward",
    "native_add_layer_norm",
    "native_add_layer_norm_backward",
    "native_bias_gelu",
    "native_bias_gelu_backward",
)


def torch_is_older() -> bool:
    """Return whether PyTorch is older than 2.10, the first with all of the stable ABI that the library uses."""
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return match is not None and (int(match[1]), int(match[2])) < (2, 10)


def path() -> Path:
    """Return where the op library lies, or would."""
    return _PACKAGE / "libclipfast.so"


def record() -> dict[str, Any]:
    """Return what the build wrote down beside the library: ``reason``, ``remedy``, ``cuda_reason`` and more."""
    try:
        found = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_switched_off() -> bool:
    """Return whether the user wants no op library."""
    return os.environ.get("CLIPFAST_NO_LIBRARY") == "1"


@functools.cache
def unavailable() -> str | None:
    """Load the op library, once; return None, or why it cannot be used. It never raises."""
    if is_switched_off():
        return "the op library is not used: CLIPFAST_NO_LIBRARY=1 is set"
    library = path()
    try:
        if not library.exists():
            return f"the op library was not built: {record().get('reason') or 'clipfast was not installed with it'}"
        reason = _damage(library, record().get("sha256")) or _load(library)
    except Exception as error:
        # whatever it is, PyTorch's operators serve
        reason = f"{type(error).__name__}: {error}"
    return None if reason is None else f"the op library does not load: {' '.join(reason.split())}"


def _damage(library: Path, sha256: str | None) -> str | None:
    """Return what is wrong with the file, or None: loading a file that ends too early kills the process."""
    content = library.read_bytes()
    if content[:4] != b"\x7fELF":
        return f"{library} is no ELF file but starts with {content[:4]!r}; install clipfast again"
    if len(content) < 64 or content[4:6] != b"\x02\x01":
        return f"{library} is damaged: {len(content)} bytes, no header of a 64-bit library; install clipfast again"
    machine, here = struct.unpack_from("<H", content, 18)[0], platform.machine()
    if here in _MACHINES.values() and _MACHINES.get(machine) != here:
        built_for = _MACHINES.get(machine, f"machine type {machine}")
        return f"{library} is built for {built_for}, this machine is {here}; install the wheel for {here}"
    (segments, sections) = struct.unpack_from("<QQ", content, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<HHHH", content, 54)
    end = max(segments + segment_size * segment_count, sections + section_size * section_count)
    if segments + segment_size * segment_count <= len(content):
        for at in range(segments, segments + segment_size * segment_count, segment_size):
            offset, _, _, size = struct.unpack_from("<QQQQ", content, at + 8)
            end = max(end, offset + size)
    if end > len(content):
        return f"{library} is cut off: {len(content)} bytes of at least {end}; install clipfast again"
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        return f"{library} is not the file that was built: its SHA-256 differs from _build.json; install clipfast again"
    return None


def _load(library: Path) -> str | None:
    """Load the file; return why its ops cannot be used, or None."""
    if torch_is_older():
        return (
            f"PyTorch {torch.__version__} is older than 2.10, whose stable ABI it needs: upgrade PyTorch, "
            "to the same kind of build"
        )
    loaded = torch.ops.loaded_libraries
    if hasattr(torch.ops.clipfast, "build_info") and str(library.resolve()) not in loaded:
        # a second registration of the same ops would end the process
        other = next((p for p in loaded if Path(p).name == library.name), "another file")
        return f"this process has already loaded the op library of {other}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        cause = str(error.__cause__ or error)
        if "undefined symbol" in cause:
            cause += (
                f"; it does not fit PyTorch {torch.__version__}: build clipfast again beside this PyTorch, or take a "
                "clipfast or a PyTorch (2.10 or later) of the other's time"
            )
        elif re.search(r"version .(GLIBC|CXXABI)", cause):
            cause += "; it was built on a newer system: build it here, or take the wheel for this system"
        return cause
    missing = [name for name in _OPS if not hasattr(torch.ops.clipfast, name)]
    if missing:
        return f"{library} has no op {', '.join(missing)}: it is of another clipfast; install clipfast again"
    # all are asked here, once: later, a caller's dispatch mode would see the operators
    _missing_cuda_entry_points()
    _why_no_amx()
    if "cuda" not in _fields():
        return f"{library} does not tell what it was built with; install clipfast again"
    return None


@functools.cache
def _fields() -> dict[str, str]:
    return dict(field.split("=", 1) for field in torch.ops.clipfast.build_info().split(";"))


def build_info() -> dict[str, str]:
    """Return what the op library was built with: ``compiler``, ``torch_target``, ``cpu`` and ``cuda``.

    Raises:
        RuntimeError: The library is not there or does not load; the message says why.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    return dict(_fields())


@functools.cache
def _why_no_amx() -> str | None:
    return torch.ops.clipfast.why_no_amx() or None


@constant_when_compiled
def why_no_amx() -> str | None:
    """Return why the op library does not multiply bfloat16 by AMX in this process, or None where it does."""
    return unavailable() or _why_no_amx()


@functools.cache
def _missing_cuda_entry_points() -> str | None:
    return torch.ops.clipfast.missing_cuda_entry_points() or None


@constant_when_compiled
def missing_cuda_entry_points() -> str | None:
    """Return why the op library's CUDA code cannot reach PyTorch's streams in this process, or None.

    No GPU is asked for: it is a question of how PyTorch and the library were built.
    """
    return unavailable() or _missing_cuda_entry_points()


def card_support(cuda: str, capability: tuple[int, int], driver: tuple[int, int] | None) -> tuple[bool, str]:
    """Say whether a build runs on a card.

    Args:
        cuda: The field of :func:`build_info`, such as ``13.0:80,90a,100,100+PTX``, or ``none``.
        capability: The card's compute capability.
        driver: The newest CUDA that the driver serves, or None where it is not known.

    Returns:
        Whether it does, and by which code, or why not and what to do.
    """
    toolkit, _, names = cuda.partition(":")
    if toolkit == "none":
        return False, WITHOUT_CUDA
    card = f"{capability[0]}.{capability[1]}"
    version = tuple(map(int, re.findall(r"\d+", toolkit)[:2]))
    if driver is not None and version and driver[0] < version[0]:
        has, needs = f"{driver[0]}.{driver[1]}", f"{version[0]}.0"
        return False, f"the driver serves CUDA {has}, the op library needs {needs} or later: update the driver"
    compiled = None
    for name in filter(None, names.split(",")):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", name)
        if match is None:
            continue
        arch, suffix, ptx = (int(match[1]), int(match[2])), match[3], match[4]
        if ptx:
            if capability >= arch and (driver is None or driver >= version):
                compiled = compiled or (False, f"PTX of compute_{match[1]}{match[2]}, compiled by the driver")
        elif capability == arch:
            return True, f"code for sm_{name}"
        elif capability[0] == arch[0] and capability > arch and suffix != "a" and capability not in _EMBEDDED:
            # code of a lower number of the same generation runs
            compiled = True, f"code for sm_{name}, which runs on {card}"
    if compiled is not None:
        return True, compiled[1]
    if capability < (8, 0):
        return False, f"the card has compute capability {card}, the op library needs 8.0 or later"
    return False, f'no code for compute capability {card} (only {names}): build it with TORCH_CUDA_ARCH_LIST="{card}"'


def driver_version() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver serves, or None where PyTorch cannot tell."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    number = ask() if ask is not None else 0
    return (number // 1000, number % 1000 // 10) if number else None


@functools.cache
def _card_refusal(capability: tuple[int, int]) -> str | None:
    served, how = card_support(build_info()["cuda"], capability, driver_version())
    return None if served else how


@constant_when_compiled
def card_refusal(index: int | None) -> str | None:
    """Return why the op library's CUDA code does not run on a card, or None."""
    return _card_refusal(torch.cuda.get_device_capability(index))
