#!/usr/bin/env python3
"""The manylinux tag of the op library: what it needs of a system, and linking it for an older one than this.

    scripts/manylinux.py check LIBRARY [TAG]     says what the library needs, and fails where TAG does not allow it

A library that is linked here asks for the newest version of every symbol of this system's C library, also where an
older version of the symbol is the same function. :func:`link_options` makes stand-ins for the system's libraries that
know the older versions alone; linked first, they decide. Whoever loads the library gets the real ones.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

Version = tuple[int, ...]

# by the C library's version, the newest symbols that a wheel of that tag may need (PEP 600; the table is auditwheel's)
POLICIES: dict[Version, dict[str, Version]] = {
    (2, 17): {"GLIBCXX": (3, 4, 19), "CXXABI": (1, 3, 7), "GCC": (4, 8, 0)},
    (2, 28): {"GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)},
    (2, 31): {"GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12), "GCC": (7, 0, 0)},
    (2, 34): {"GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)},
    (2, 35): {"GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)},
    (2, 39): {"GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0, 0)},
}
# what every such system has; PyTorch brings its own
SYSTEM_LIBRARIES = re.compile(r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so\.\d|ld-linux-.*\.so\.\d")
C_LIBRARIES = ("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1")
TORCH_LIBRARIES = {"libtorch_cpu.so"}
STABLE_ABI = ("aoti_torch_", "torch_")
# of no library: weak marks of the compiler and the C runtime
MARKS = ("_ITM_", "__gmon_start__", "__cxa_finalize", "__cxa_pure_virtual")


class NotAllowed(Exception):
    """What the library needs and its tag does not allow, or what cannot be linked for an older system."""


def machine() -> str:
    """Return the processor that is built for: this one's, or what _PYTHON_HOST_PLATFORM names."""
    return sysconfig.get_platform().rpartition("-")[2]


@dataclass(frozen=True)
class Symbol:
    """One symbol that a library takes from others: ``owner`` is GLIBC, GLIBCXX …, or None without a version."""

    name: str
    owner: str | None
    version: Version
    weak: bool

    def __str__(self) -> str:
        return self.name if self.owner is None else f"{self.name}@{self.owner}_{'.'.join(map(str, self.version))}"


def _run(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        raise NotAllowed(f"{command[0]} was not found; it comes with binutils or the compiler")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotAllowed(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


def _number(text: str) -> Version:
    return tuple(map(int, text.split(".")))


def needed_symbols(library: Path) -> list[Symbol]:
    """Return every symbol that a library takes from others."""
    symbols = []
    for line in _run("nm", "-D", "--undefined-only", library).splitlines():
        kind, name = line.split()[-2:]
        name, _, tag = name.partition("@")
        match = re.fullmatch(r"@?([A-Z]+)_([\d.]+)", tag)
        owner, version = (match[1], _number(match[2])) if match else (tag or None, ())
        symbols.append(Symbol(name, owner, version, kind in "wv"))
    return symbols


def needed_libraries(library: Path) -> list[str]:
    """Return the names of the libraries that a library loads."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _run("readelf", "-W", "-d", library))


def violations(library: Path, glibc: Version) -> list[str]:
    """Return what a library needs beyond the systems of ``manylinux_<glibc>`` and PyTorch's stable ABI."""
    limits = {"GLIBC": glibc} | POLICIES[max(known for known in POLICIES if known <= glibc)]
    found = []
    for symbol in needed_symbols(library):
        if symbol.owner is None:
            of_torch = symbol.name.startswith(STABLE_ABI)
            if not of_torch and not (symbol.weak and symbol.name.startswith(MARKS)):
                found.append(f"{symbol} is no part of PyTorch's stable ABI")
        elif symbol.owner not in limits:
            found.append(f"{symbol} is of no library that manylinux knows")
        elif symbol.version > limits[symbol.owner]:
            found.append(f"{symbol} is newer than {'.'.join(map(str, limits[symbol.owner]))}")
    for name in needed_libraries(library):
        if name not in TORCH_LIBRARIES and SYSTEM_LIBRARIES.fullmatch(name) is None:
            found.append(f"{name} is no part of the system")
    if re.search(r"\((RPATH|RUNPATH)\)", _run("readelf", "-W", "-d", library)):
        found.append("it has a run path")
    return found


def best_tag(library: Path, machine: str, oldest: Version = (2, 28)) -> str:
    """Return the widest manylinux tag that is true of a library, and no older one than PyTorch's own wheels have.

    Raises:
        NotAllowed: None is; the message lists why the newest is not.
    """
    newest = max((s.version for s in needed_symbols(library) if s.owner == "GLIBC"), default=oldest)[:2]
    for glibc in sorted({oldest, newest, *POLICIES}):
        if glibc >= oldest and not violations(library, glibc):
            return f"manylinux_{glibc[0]}_{glibc[1]}_{machine}"
    raise NotAllowed("\n".join([f"{library.name} fits no manylinux tag:", *violations(library, max(POLICIES))]))


def link_options(
    library: Path, glibc: Version, temporary: Path, compiler: list[str], system: Iterable[Path] = ()
) -> list[Path]:
    """Return files that make the linker take symbols of an older C library, put before all others.

    Args:
        library: The library as it was linked without them.
        glibc: The C library's version that it shall need at most.
        temporary: The folder for the files.
        compiler: The C or C++ compiler.
        system: Where this system's libc and libm are; asked of the compiler where nothing is given.

    Raises:
        NotAllowed: A symbol has no version that is old enough.
    """
    temporary.mkdir(parents=True, exist_ok=True)
    files = list(system) or [Path(_run(*compiler, f"-print-file-name={name}").strip()) for name in C_LIBRARIES]
    known: dict[str, list[tuple[Version, str]]] = {}
    for file in filter(Path.exists, files):
        for line in _run("objdump", "-T", file).splitlines():
            match = re.search(r"\(?GLIBC_([\d.]+)\)?\s+(\w+)$", line)
            if match and "*UND*" not in line:
                known.setdefault(match[2], []).append((_number(match[1]), file.name))
    wanted: dict[str, dict[Version, list[str]]] = {}
    options, needed = [], needed_symbols(library)
    for symbol in needed:
        if symbol.owner != "GLIBC" or symbol.version <= glibc:
            continue
        if symbol.name == "__libc_single_threaded":
            # not known before 2.32: it lets counters do without atomic operations, and 0 says that they may not
            options.append(_hidden_zero(temporary, symbol.name, compiler))
            continue
        older = [(version, file) for version, file in known.get(symbol.name, []) if version <= glibc]
        if not older:
            raise NotAllowed(f"{symbol} has no version of glibc {'.'.join(map(str, glibc))} or older")
        version, file = max(older)
        wanted.setdefault(_old_home(symbol.name, file), {}).setdefault(version, []).append(symbol.name)
    for symbol in needed:
        # the linker takes no second library of a name: the first has to have whatever else is needed of it
        for version, file in known.get(symbol.name, []):
            if symbol.owner == "GLIBC" and symbol.version == version <= glibc and file in wanted:
                wanted[file].setdefault(version, []).append(symbol.name)
    return options + [_stand_in(temporary, name, versions, compiler) for name, versions in sorted(wanted.items())]


def _old_home(symbol: str, file: str) -> str:
    """Return the library that held a symbol before glibc 2.34 made one of them all."""
    for prefix, library in (("pthread_", "libpthread.so.0"), ("sem_", "libpthread.so.0"), ("dl", "libdl.so.2")):
        if symbol.startswith(prefix):
            return library
    return "librt.so.1" if symbol.startswith(("shm_", "mq_", "timer_", "aio_")) else file


def _hidden_zero(temporary: Path, variable: str, compiler: list[str]) -> Path:
    """Compile a variable that is 0 and seen by the library alone."""
    source, target = temporary / f"{variable}.c", temporary / f"{variable}.o"
    source.write_text(f'__attribute__((visibility("hidden"))) char {variable} = 0;\n')
    _run(*compiler, "-x", "c", "-fPIC", "-c", source, "-o", target)
    return target


def _stand_in(temporary: Path, name: str, versions: dict[Version, list[str]], compiler: list[str]) -> Path:
    """Make a library of a name that has some symbols, each in one version, and nothing in them."""
    source, script, target = (temporary / f"{name}.{suffix}" for suffix in ("c", "map", "stub.so"))
    nodes: list[str] = []
    symbols = [symbol for names in versions.values() for symbol in names]
    source.write_text("".join(f"void {symbol}(void) {{}}\n" for symbol in symbols))
    for version, names in versions.items():
        node = f"GLIBC_{'.'.join(map(str, version))}"
        nodes.append(f"{node} {{ global: {' '.join(f'{n};' for n in names)} }};\n")
    script.write_text("".join(nodes))
    options = [f"-Wl,-soname,{name}", f"-Wl,--version-script,{script}"]
    flags = ["-x", "c", "-fno-builtin", "-ffreestanding", "-fPIC", "-shared", "-nostdlib", "-w"]
    _run(*compiler, *flags, source, "-o", target, *options)
    return target


def main() -> int:
    """Check a library and say what it needs."""
    if len(sys.argv) not in (3, 4) or sys.argv[1] != "check":
        print(__doc__, file=sys.stderr)
        return 2
    library = Path(sys.argv[2])
    try:
        if len(sys.argv) == 4:
            match = re.match(r"manylinux_(\d+)_(\d+)", sys.argv[3])
            if match is None:
                raise NotAllowed(f"TAG: got {sys.argv[3]!r}, expected such as manylinux_2_28")
            wrong = violations(library, (int(match[1]), int(match[2])))
            if wrong:
                raise NotAllowed("\n".join(wrong))
        newest: dict[str, Version] = {}
        for symbol in needed_symbols(library):
            if symbol.owner:
                newest[symbol.owner] = max(newest.get(symbol.owner, ()), symbol.version)
        needs = ", ".join(f"{owner} {'.'.join(map(str, v))}" for owner, v in sorted(newest.items()))
        print(f"{library.name} needs {needs}; it loads {', '.join(needed_libraries(library))}")
        print(best_tag(library, machine()))
    except NotAllowed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
