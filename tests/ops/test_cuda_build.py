"""The CUDA half of the op library: registers, spills and tensor cores of its kernels, and what it needs to load."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from clipfast.benchmark.reckoning import losses, sass
from clipfast.benchmark.reckoning.cards import CARDS
from clipfast.ops import library

ROOT = Path(__file__).parent.parent.parent
# what is built by default, and what the wheel holds besides
ARCHITECTURES = (("80", "90a", "100"), pytest.param(("86", "89", "120"), marks=pytest.mark.exhaustive))
KERNELS = ("softmax_statistics_kernel", "sigmoid_statistics_kernel", "logit_gradient_kernel")


def cuobjdump() -> str | Path | None:
    """Return the toolkit's program that shows SASS, or the one that Triton ships."""
    triton = importlib.util.find_spec("triton")
    shipped = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else Path("nowhere")
    return shutil.which("cuobjdump") or (shipped if shipped.exists() else None)


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda names: "-".join(names))
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, tuple[str, ...]]:
    """Compile the kernels to one object for some architectures; give it, what ptxas said, and their names."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    target = tmp_path_factory.mktemp("cuda") / "contrastive_loss.o"
    command = ["nvcc", "-c", ROOT / "csrc" / "cuda" / "contrastive_loss.cu", "-o", target, "-std=c++17", "-O3"]
    command += [f"-I{Path(torch.__file__).parent / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000ull"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in request.param]
    command += ["-Xptxas", "-v", "-Xcompiler", "-fPIC", "--threads", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target, done.stdout + done.stderr, request.param


@pytest.mark.slow
def test_no_kernel_spills(compiled: tuple[Path, str, tuple[str, ...]]) -> None:
    architectures = compiled[2]
    blocks = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        compiled[1],
        re.DOTALL,
    )
    assert {arch for _, arch, *_ in blocks} == set(architectures)
    for kernel in KERNELS:
        # four dtypes, and two losses' gradients
        count = 8 if kernel.startswith("logit") else 4
        assert sum(kernel in name for name, *_ in blocks) == count * len(architectures)
    for name, arch, stack, stores, loads, registers in blocks:
        # float64 on sm_120, at a 64th of float32's rate, would not notice a register in local memory
        most = 16 if arch == "120" and re.search(r"kernelId", name) else 0
        assert max(int(stack), int(stores), int(loads)) <= most, f"{name} spills on sm_{arch}"
        # two blocks of 128 threads share a multiprocessor's 65,536 registers
        if any(kernel in name for kernel in KERNELS):
            assert int(registers) <= 256, f"{name} on sm_{arch}"


@pytest.mark.slow
def test_sixteen_bit_kernels_use_tensor_cores(compiled: tuple[Path, str, tuple[str, ...]]) -> None:
    if cuobjdump() is None:
        pytest.skip("no cuobjdump, in the toolkit or in Triton")
    sass = subprocess.run([cuobjdump(), "-sass", compiled[0]], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : ", sass)[1:]
    for kernel in KERNELS:
        of_kernel = [f for f in functions if kernel in f.split("\n", 1)[0]]
        assert of_kernel
        for function in of_kernel:
            name = function.split("\n", 1)[0]
            sixteen_bit = "__half" in name or "__nv_bfloat16" in name
            assert ("HMMA" in function) == sixteen_bit, name
            if "Id" not in name:
                assert not re.search(r"\b(LDL|STL)\b", function), f"{name} spills"


@pytest.mark.slow
def test_what_the_losses_are_predicted_to_take(compiled: tuple[Path, str, tuple[str, ...]], tmp_path: Path) -> None:
    """From the machine code, as docs/contrastive_loss.md has it: no measurement."""
    if cuobjdump() is None or "90a" not in compiled[2]:
        pytest.skip("no cuobjdump, or no code for an H100")
    subprocess.run([cuobjdump(), "-xelf", "all", compiled[0]], cwd=tmp_path, capture_output=True, check=True)
    (cubin,) = tmp_path.glob("*sm_90a*.cubin")
    kernels, card = sass.disassemble(cubin.read_bytes()), CARDS[90]
    tiles = losses.tiles_of(kernels, card)
    for tile in tiles.values():
        # 64 tensor-core steps, 16 loads of fragments, 8 copies; addresses are not worked out anew
        assert 88 < tile.instructions[0] < 150
    assert losses.loss_ms(tiles, card, 32768, 512)["all"] <= 14
    assert losses.loss_ms(tiles, card, 65536, 768, sigmoid=True)["all"] <= 60
    lines: list[str] = []
    losses.report(kernels, lines.append)
    written = (ROOT / "docs" / "contrastive_loss.md").read_text()
    for line in lines[lines.index("") + 3 :]:
        # the figures move a little with nvcc's version
        told = [float(x) for x in re.findall(r"[\d.]+ (?=\()", line)]
        (there,) = (w for w in written.splitlines() if w.startswith(" | ".join(line.split(" | ")[:2])))
        assert [float(x) for x in re.findall(r"[\d.]+ (?=\()", there)] == pytest.approx(told, rel=0.05, abs=0.1)


def test_it_loads_whatever_pytorch_is_there() -> None:
    if not (library._PACKAGE / "libclipfast.so").exists():
        pytest.skip(str(library.unavailable()))
    assert library.unavailable() is None
    cuda = library.build_info()["cuda"]
    assert cuda == "none" or re.fullmatch(r"[\d.]+:[\w+]+(,[\w+]+)*", cuda)
    # the kernels are registered where they were built in, GPU or not
    for op in ("contrastive_statistics", "contrastive_gradients", "siglip_statistics", "siglip_gradients"):
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"clipfast::{op}", "CUDA")
        assert has == (cuda != "none"), op


def test_it_needs_the_stable_abi_alone() -> None:
    path = library._PACKAGE / "libclipfast.so"
    if not path.exists() or shutil.which("nm") is None:
        pytest.skip("no library, or no nm")
    listing = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-2:] for line in listing.splitlines()]
    for kind, symbol in symbols:
        name = symbol.split("@")[0]
        system = "@" in symbol and re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP)_", symbol)
        from_torch = name.startswith(("aoti_torch_", "torch_"))
        weak_marker = kind == "w" and name.startswith(("_ITM_", "__gmon_start__", "__cxa_"))
        assert system or from_torch or weak_marker, f"{symbol} is no part of the stable ABI"
        # a weak one would stay null beside a PyTorch with CUDA: csrc/cuda/entry_points.cpp asks for those by name
        lies_in_cuda = "cuda" in name and not name.startswith("aoti_torch_device_type")
        assert not lies_in_cuda, f"{symbol} lies in libtorch_cuda, which the library does not name"


ERRORS = r"""
#include "cuda/launch_errors.cuh"

#include <cstdio>

__global__ void kernel() {}

template <typename Run>
void say(Run run) {
    try {
        run();
        std::puts("nothing");
    } catch (const std::runtime_error& error) {
        std::puts(error.what());
    }
}

int main() {
    const cudaError_t before = cudaPeekAtLastError();
    say([] { clipfast::check_launch("op", cudaSuccess); });
    for (const cudaError_t error : {CODES}) say([&] { clipfast::check_launch("op", error); });
    say([] { clipfast::allow_shared(kernel, "kernel", 1 << 30); });
    // without a driver, every call says so
    std::puts(cudaPeekAtLastError() == before ? "forgotten" : "remembered");
}
"""
NEVER_BEGAN = ("NoKernelImageForDevice", "InvalidValue", "UnsupportedPtxVersion", "InsufficientDriver")
NEVER_BEGAN += ("LaunchOutOfResources", "InvalidConfiguration", "InvalidPtx", "InvalidDeviceFunction")
OTHERS = ("MemoryAllocation", "IllegalAddress", "LaunchFailure", "StreamCaptureInvalidated", "Assert")


def test_errors_of_a_launch_are_told_from_others(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    codes = ", ".join(f"cudaError{name}" for name in (*NEVER_BEGAN, *OTHERS))
    source = tmp_path / "errors.cu"
    source.write_text(ERRORS.replace("CODES", codes))
    includes = [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}"]
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-cudart", "static", *includes, source, "-o", tmp_path / "errors"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = subprocess.run([tmp_path / "errors"], capture_output=True, text=True, check=True).stdout.splitlines()
    nothing, *lines, shared, after = said
    assert nothing == "nothing"
    for name, line in zip((*NEVER_BEGAN, *OTHERS), lines, strict=True):
        if name in NEVER_BEGAN:
            assert re.search(rf" op: a kernel could not be launched: cudaError{name}: \w", line), line
        else:
            assert re.search(rf" op: CUDA error: \w.*\(cudaError{name}\)", line), line
    # no driver, or a card that has not so much
    reason = r"cudaError(InsufficientDriver|InvalidValue): .+"
    limit = r"\(it asks for 1073741824 of at most \d+ bytes of shared memory on device 0\)"
    no_card = r"kernel: CUDA error: .+ \(cudaErrorNoDevice\) "
    assert re.search(rf" (kernel: a kernel could not be launched: {reason} |{no_card}){limit}", shared), shared
    assert after == "forgotten"
