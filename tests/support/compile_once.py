"""A C++ compiler that compiles a file once in a test run: ``compile_once.py FOLDER COMPILER ARGUMENTS...``.

Several tests build the op library in places of their own. An object is taken from the folder where the compiler, its
options and the preprocessed source are the same; all else goes to the compiler as it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def command(folder: Path) -> str | None:
    """Return what ``CXX`` is set to in a build without CUDA (nvcc takes no command of words), or None."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    words = (sys.executable, str(Path(__file__).resolve()), str(folder), compiler)
    return None if any(" " in word for word in words) else " ".join(words)


def main(folder: Path, compiler: str, *arguments: str) -> int:
    """Compile; return the exit status."""
    if "-c" not in arguments or "-o" not in arguments:
        return subprocess.run([compiler, *arguments]).returncode
    place = arguments.index("-o")
    target, options = Path(arguments[place + 1]), [*arguments[:place], *arguments[place + 2 :]]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    # -E takes the place of -c: the text that is compiled, with the names of all its headers
    text = subprocess.run([compiler, *("-E" if o == "-c" else o for o in options)], capture_output=True)
    if text.returncode:
        return subprocess.run([compiler, *arguments]).returncode
    digest = hashlib.sha256(version)
    for part in (compiler, *options):
        digest.update(part.encode() + b"\0")
    digest.update(text.stdout)
    kept = folder / f"{digest.hexdigest()}.o"
    folder.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            done = subprocess.run([compiler, *arguments])
            if done.returncode:
                return done.returncode
            part = kept.with_suffix(".part")
            shutil.copyfile(target, part)
            part.rename(kept)
            return 0
    shutil.copyfile(kept, target)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
