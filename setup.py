"""Builds the op library (csrc/) into the package; everything else about the package is in pyproject.toml.

The library is C++ and CUDA on PyTorch's stable ABI, without Python: one file serves every Python and every
PyTorch from 2.10 on, with CUDA and without. It needs PyTorch's headers, but PyTorch need not be importable where the
build runs, and is never installed or changed by it. No GPU is asked for. Where the library or its CUDA half cannot be
built, the package installs without it and keeps the reason in clipfast/_build.json; ``clipfast.ops.library`` tells it.

Environment:
    CXX             the C++ compiler (default: c++, then g++, then clang++)
    CUDA_HOME       the CUDA toolkit (default: the one whose nvcc is on PATH)
    TORCH_CUDA_ARCH_LIST      GPU architectures, such as "8.0;9.0a;10.0+PTX" (the default)
    CLIPFAST_SKIP_CUDA=1      builds without the CUDA kernels
    CLIPFAST_SKIP_LIBRARY=1   installs without the library
    CLIPFAST_GLIBC            links for systems with this version of the C library, such as 2.28, and later
    _PYTHON_HOST_PLATFORM     Python's own name of what is built for, such as linux-aarch64; CXX has to be its compiler
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
LIBRARY = "libclipfast.so"
# the oldest PyTorch whose stable ABI the library may use: 2.10
TORCH_TARGET_VERSION = "0x020a000000000000ull"
# what lets the compiler turn the loops of csrc/cpu/tile.h into vectors, none of which changes a result but by rounding
VECTORISED = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd"]


# 10.0 and not 10.0a, whose code would run on 10.0 alone: 10.3 is served too, and no instruction is one card's own
CUDA_ARCHITECTURES = "8.0;9.0a;10.0+PTX"
JOBS = 2


class CannotBuild(Exception):
    """Why the op library, or its CUDA half, is left out, and what to do before another install."""

    def __init__(self, why: str, remedy: str | None = None) -> None:
        super().__init__(why)
        self.remedy = remedy


def find_torch() -> Path:
    """Return the folder of the PyTorch package whose headers the library is built with."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    # under build isolation PyTorch is not importable, but its headers lie in the environment that pip installs into
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    for folder in folders:
        if (Path(folder) / "torch" / "include").is_dir():
            return Path(folder) / "torch"
    raise CannotBuild("PyTorch's headers were not found", "install PyTorch (2.10 or newer)")


def find_compiler() -> str:
    """Return the C++ compiler."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            return name
    remedy = "set CXX to a C++ compiler" if wanted else "install g++ or clang++"
    raise CannotBuild(f"no C++ compiler was found ({wanted or 'c++, g++, clang++'})", remedy)


def run(command: list[str]) -> None:
    """Run a build step; its output is the reason where it fails."""
    print(" ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        why = errors[0] if errors else f"exit status {done.returncode}"
        raise CannotBuild(f"{command[0]} failed: {why}", "mend what it says (pip's option -v shows all of it)")


def find_nvcc() -> str:
    """Return CUDA's compiler."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")
    if nvcc is None:
        where = f"in {home}/bin, as CUDA_HOME says" if home else "on PATH"
        raise CannotBuild(f"no nvcc was found ({where})", "install the CUDA toolkit and set CUDA_HOME to its folder")
    return nvcc


def cuda_architectures() -> tuple[list[str], list[str]]:
    """Return nvcc's flags and the names for the record, such as ``80``, ``90a`` and ``100+PTX``."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    flags, names = [], []
    for item in re.split(r"[;, ]+", wanted.strip("; ,")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            why = f"TORCH_CUDA_ARCH_LIST: got {item!r}, expected numbers such as 8.0, 9.0a or 10.0+PTX"
            raise CannotBuild(why, "correct TORCH_CUDA_ARCH_LIST")
        major, minor, suffix, ptx = match.groups()
        if int(major) < 8:
            why = f"TORCH_CUDA_ARCH_LIST: got {item}, the kernels need 8.0 or later"
            raise CannotBuild(why, "correct TORCH_CUDA_ARCH_LIST")
        name = major + minor + suffix
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        names.append(name)
        if ptx:
            # PTX of an `a` architecture runs on that one alone; the plain one's runs on all that come after
            flags.append(f"-gencode=arch=compute_{major}{minor},code=compute_{major}{minor}")
            names.append(f"{major}{minor}+PTX")
    return flags, names


def compile_all(commands: list[list[str]]) -> None:
    """Run build steps that do not depend on each other, two at a time."""
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(run, commands))


def compile_cuda(torch: Path, temporary: Path) -> tuple[list[str], list[str], str]:
    """Compile csrc/cuda/; return nvcc as the linker, the objects, and what was built."""
    if os.environ.get("CLIPFAST_SKIP_CUDA") == "1":
        raise CannotBuild("CLIPFAST_SKIP_CUDA=1 was set", "unset CLIPFAST_SKIP_CUDA")
    nvcc = [find_nvcc()]
    if os.environ.get("CXX"):
        # the compiler of the C++ files is the one behind nvcc too
        nvcc += ["-ccbin", os.environ["CXX"].split()[0]]
    architectures, names = cuda_architectures()
    version = subprocess.run([nvcc[0], "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", version)
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", str(JOBS), *architectures]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-I{torch / 'include'}", "-Icsrc"]
    flags += ["-Xcompiler", no_paths(torch)]
    objects = [str(temporary / f"{Path(source).stem}.cu.o") for source in sources(".cu")]
    for source, target in zip(sources(".cu"), objects, strict=True):
        run([*nvcc, *flags, *same_names(source, temporary), "-c", source, "-o", target])
    linker = [*nvcc, "-cudart", "static"]
    # a toolkit without its runtime library shows here, where the C++ half can still be built alone
    run([*linker, "-shared", *objects, "-o", str(temporary / "cuda_alone.so")])
    return linker, objects, f"{release[1] if release else 'unknown'}:{','.join(names)}"


def same_names(source: str, temporary: Path) -> list[str]:
    """Return the options without which names in an object hold random numbers, and the number of the process."""
    kept = temporary / "nvcc" / Path(source).stem
    kept.mkdir(parents=True, exist_ok=True)
    return [f"-frandom-seed={Path(source).stem}", "--keep", "--keep-dir", str(kept)]


def build_library(target: Path, temporary: Path) -> dict[str, str | None]:
    """Compile csrc/ into ``target``; return what became of the CUDA half."""
    if os.environ.get("CLIPFAST_SKIP_LIBRARY") == "1":
        raise CannotBuild("CLIPFAST_SKIP_LIBRARY=1 was set", "unset CLIPFAST_SKIP_LIBRARY")
    if sys.platform != "linux":
        raise CannotBuild(f"the op library is built on Linux only, this is {sys.platform}")
    compiler, torch = find_compiler().split(), find_torch()
    if not (torch / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        why = f"the PyTorch in {torch.parent.name} is older than 2.10 and has no stable ABI"
        raise CannotBuild(why, "upgrade PyTorch, to the same kind of build")
    temporary.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    linker, cuda_objects, cuda, left_out = compiler, [], None, {"cuda_reason": None}
    try:
        linker, cuda_objects, cuda = compile_cuda(torch, temporary)
    except CannotBuild as why:
        left_out = {"cuda_reason": str(why), "cuda_remedy": why.remedy}
        print(f"\nclipfast: THE OP LIBRARY IS BUILT WITHOUT CUDA: {why}\n", flush=True)
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    flags += [no_paths(torch), *VECTORISED, f"-DCLIPFAST_CUDA={cuda or 'none'}"]
    includes = [f"-I{torch / 'include'}", "-Icsrc"]
    objects = [str(temporary / f"{Path(source).stem}.o") for source in sources(".cpp")]
    steps = zip(sources(".cpp"), objects, strict=True)
    compile_all([[*compiler, *flags, *includes, "-c", source, "-o", o] for source, o in steps])
    # found by its name in the process, whichever PyTorch that loaded: no path is kept
    links = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ldl"]
    for option in ("-z,relro", "-z,now", "--exclude-libs,ALL", "--strip-all"):
        links += ["-Xlinker", option] if cuda else [f"-Wl,{option}"]
    oldest = os.environ.get("CLIPFAST_GLIBC")
    if oldest:
        # C++'s library becomes part of the file. The compiler's own, which unwinds exceptions, stays the process's: a
        # part of it would ask for glibc 2.35
        links += ["-Xcompiler", "-static-libstdc++", "-Xlinker", "--gc-sections"] if cuda else []
        links += [] if cuda else ["-static-libstdc++", "-Wl,--gc-sections"]
    run([*linker, "-shared", *objects, *cuda_objects, "-o", str(target), *links])
    if oldest:
        first = old_symbols(target, oldest, temporary / "glibc", compiler)
        run([*linker, "-shared", *first, *objects, *cuda_objects, "-o", str(target), *links])
    found = {"cuda": cuda, "torch": version_of(torch), "libstdcxx": compiler_version(compiler) if oldest else None}
    return left_out | found


def version_of(torch: Path) -> str | None:
    """Return the version of a PyTorch that may not be importable here."""
    file = torch / "version.py"
    match = re.search(r"^__version__ = '(.+)'$", file.read_text() if file.exists() else "", re.M)
    return match and match[1]


def compiler_version(compiler: list[str]) -> str:
    """Return GCC's version, which is that of its C++ library, or ``unknown``."""
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    match = None if "clang" in done.stdout else re.search(r"\b(\d+\.\d+\.\d+)$", done.stdout, re.M)
    return match[1] if match else "unknown"


def no_paths(torch: Path) -> str:
    """Return the option that keeps the place of PyTorch's headers out of messages, and so out of the library."""
    return f"-fmacro-prefix-map={torch.parent}/="


def script(name: str) -> ModuleType:
    """Import a file of scripts/."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def old_symbols(library: Path, glibc: str, temporary: Path, compiler: list[str]) -> list[str]:
    """Return what is linked first so that a library needs no newer C library than the one of a version."""
    manylinux = script("manylinux")
    if re.fullmatch(r"\d+\.\d+", glibc) is None:
        why = f"CLIPFAST_GLIBC: got {glibc!r}, expected a version such as 2.28"
        raise CannotBuild(why, "correct CLIPFAST_GLIBC")
    try:
        version = tuple(map(int, glibc.split(".")))
        first = [str(p) for p in manylinux.link_options(library, version, temporary, compiler)]
    except manylinux.NotAllowed as error:
        # it works here; scripts/manylinux.py tells on which systems else
        print(f"\nclipfast: THE OP LIBRARY NEEDS A NEWER C LIBRARY THAN CLIPFAST_GLIBC={glibc}: {error}\n", flush=True)
        return []
    # a linker that leaves out what nobody has asked for yet would leave them out
    around = [["-Xlinker", option] for option in ("--push-state", "--no-as-needed", "--pop-state")]
    return [*around[0], *around[1], *first, *around[2]]


def sources(suffix: str) -> list[str]:
    """Return the files of the library in one language, relative to the project."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob(f"*{suffix}"))


class BuildLibrary(build_ext):
    """Builds the op library in the place of a Python extension, or leaves it out and keeps the reason."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library without Python's version: it does not depend on it."""
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        """Build it, and write the record beside it."""
        target = Path(self.get_ext_fullpath(ext.name))
        record = {"library": LIBRARY, "platform": script("manylinux").machine(), "reason": None}
        try:
            record |= build_library(target, Path(self.build_temp))
            # loading a damaged library can end the process; it is compared with this before
            record["sha256"] = hashlib.sha256(target.read_bytes()).hexdigest()
        except CannotBuild as why:
            target.unlink(missing_ok=True)
            record |= {"library": None, "reason": str(why), "remedy": why.remedy}
            words = f"clipfast: THE OP LIBRARY WAS NOT BUILT: {why}\nclipfast works without it, in PyTorch."
            print(f"\n{words}\n", flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (target.parent / "_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Bring what was made into the source tree, for an editable install."""
        package = Path(self.get_finalized_command("build_py").get_package_dir("clipfast"))
        for name in (LIBRARY, "_build.json"):
            (package / name).unlink(missing_ok=True)
        for output in self.get_outputs():
            shutil.copy2(output, package)

    def get_outputs(self) -> list[str]:
        """List what was made."""
        made = (Path(self.build_lib) / "clipfast" / name for name in (LIBRARY, "_build.json"))
        return [str(p) for p in made if p.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """An editable install takes its copies from :meth:`copy_extensions_to_source`."""
        return {}


class Editable(editable_wheel):
    """Lets an editable install be found where a folder named clipfast lies in the working directory."""

    def run(self) -> None:
        """Build the wheel, and put our finder in it."""
        super().run()
        for wheel in Path(self.dist_dir).glob("*.whl"):
            script("editable").use_our_finder(wheel, ROOT)


class Wheel(bdist_wheel):
    """Tags the wheel by platform alone, and puts its bill of materials in."""

    def get_tag(self) -> tuple[str, str, str]:
        """Serve every Python 3."""
        return "py3", "none", super().get_tag()[2]

    def write_wheelfile(self, wheelfile_base: str, *arguments: str, **named: str) -> None:
        """Write the bill of materials where the rest of the metadata is written."""
        super().write_wheelfile(wheelfile_base, *arguments, **named)
        package = Path(wheelfile_base).parent / "clipfast"
        record = package / "_build.json"
        # an editable install has metadata alone
        if record.exists():
            bill = script("sbom").document(self.distribution.get_version(), package, json.loads(record.read_text()))
            folder = Path(wheelfile_base) / "sboms"
            folder.mkdir(exist_ok=True)
            (folder / "clipfast.cdx.json").write_text(bill)


setup(
    ext_modules=[Extension("clipfast.libclipfast", sources(".cpp"))],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel, "editable_wheel": Editable},
)
