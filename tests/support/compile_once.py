"""A C++ compiler that compiles a file once in a test run: ``compile_once.py FOLDER COMPILER ARGUMENTS...``.

Several tests build the op library in places of their own. An object is taken from the folder where the compiler, its
options, the source and every header that was read are the same, by their content; all else goes to the compiler as it
is. Relative names are the same in whichever place. Nothing looks for a header that has come since and would be found
first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
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
    call = hashlib.sha256(b"\0".join([version, *map(os.fsencode, (compiler, *options))])).hexdigest()
    kept = folder / call
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for record in kept.glob("*.json"):
            read = json.loads(record.read_text())
            if all(digest_of(name) == digest for name, digest in read.items()):
                shutil.copyfile(record.with_suffix(".o"), target)
                return 0
        with tempfile.NamedTemporaryFile("r", suffix=".d") as rule:
            done = subprocess.run([compiler, *arguments, "-MD", "-MF", rule.name])
            if done.returncode:
                return done.returncode
            read = {name: digest_of(name) for name in files_of(rule.read())}
        record = kept / f"{len(list(kept.glob('*.json')))}.json"
        shutil.copyfile(target, record.with_suffix(".o"))
        record.write_text(json.dumps(read))
    return 0


def files_of(rule: str) -> list[str]:
    """Return the names in a rule for make: what was read, behind the target's name."""
    return [re.sub(r"\\(.)", r"\1", name) for name in re.findall(r"(?:\\.|[^\s\\])+", rule.partition(": ")[2])]


def digest_of(name: str) -> str | None:
    """Return the digest of a file, None where it is not there."""
    try:
        return hashlib.sha256(Path(name).read_bytes()).hexdigest()
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
