"""``clipfast doctor``: what this machine has, what of it clipfast uses, and whether it computes what it should.

The examination runs in a process of its own: where a broken library ends that process, the report says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import clipfast
from clipfast.files import short

_MARK = "clipfast-doctor-report:"
_TIMEOUT = 300
_VARIABLES = (
    "CLIPFAST_BACKEND",
    "CLIPFAST_CHECK",
    "CLIPFAST_NO_LIBRARY",
    "CLIPFAST_TUNED",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
)


def examine() -> dict[str, Any]:
    """Look at everything in this process and return the report, which JSON can hold.

    Its ``problems`` are pairs of a level and a line: ``failed`` (an op computes wrong results or none), ``warning``
    (clipfast is right but slower than it could be) and ``note``.
    """
    import torch

    from clipfast import self_test
    from clipfast.ops import library, library_notice

    began = time.monotonic()
    report = basics()
    problems = report["problems"]
    report["torch"] = {"version": torch.__version__, "cuda": torch.version.cuda}
    report["cpu"]["capability"] = torch.backends.cpu.get_cpu_capability()
    has_cuda = torch.version.cuda is not None
    report["library"] = _library(problems, has_cuda)
    report["cards"] = _cards(problems)
    report["triton"] = _triton(problems, wanted=has_cuda)
    if report["library"]["reason"] is None and report["cards"]:
        for card in report["cards"]:
            capability = tuple(map(int, card["capability"].split(".")))
            served, how = library.card_support(library.build_info()["cuda"], capability, library.driver_version())
            card |= {"served": served, "how": how}
            if not served:
                why = _without_user(library_notice.words_of_cuda(how))
                problems.append(("warning", f"card {card['index']}: the losses run in PyTorch: {why}"))
    devices = [torch.device("cpu")]
    # one card of each name stands for all
    devices += [torch.device("cuda", i) for i in {c["name"]: c["index"] for c in reversed(report["cards"])}.values()]
    report["tuned"] = {str(device): _tuned(device, problems) for device in devices}
    report["ops"], report["self_test"] = {}, []
    for device in devices:
        try:
            report["ops"][str(device)] = self_test.explanations(device)
        except Exception as error:
            problems.append(("failed", f"{device}: no choice of implementations: {_line(error)}"))
        report["self_test"] += [dataclasses.asdict(result) for result in self_test.run(device)]
    for result in report["self_test"]:
        if not result["passed"]:
            name = " ".join(filter(None, (result["op"], result["what"])))
            where = f"{name} ({result['backend']}, {result['device']}, {result['dtype']})"
            problems.append(("failed", f"self-test of {where}: {result['reason']}"))
    report["seconds"] = round(time.monotonic() - began, 2)
    return report


def basics() -> dict[str, Any]:
    """Return what can be said without PyTorch."""
    return {
        "clipfast": clipfast.__version__,
        "package": short(Path(clipfast.__file__).parent),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "glibc": platform.libc_ver()[1] or None,
        "cpu": {"model": _first(r"model name\s*:\s*(.+)", "/proc/cpuinfo"), "cores": os.cpu_count()},
        "driver": _first(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", "/proc/driver/nvidia/version"),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "problems": [],
    }


def _library(problems: list[tuple[str, str]], wants_cuda: bool) -> dict[str, Any]:
    """Return what the op library is and holds; ``wants_cuda`` where PyTorch has CUDA."""
    from clipfast.ops import library, library_notice

    reason = library.unavailable()
    missing = library.missing_cuda_entry_points()
    found: dict[str, Any] = {"path": short(library.path()), "reason": reason, "bytes": None}
    found["cuda_entry_points"] = "found" if missing is None else f"missing ({missing})"
    with contextlib.suppress(OSError):
        found["bytes"] = library.path().stat().st_size
    if reason is not None:
        problems.append(("warning", _without_user(library_notice.words())))
        return found
    info = library.build_info()
    toolkit, _, names = info["cuda"].partition(":")
    architectures = names.split(",") if names else []
    # a build without CUDA is told of beside each card
    if missing is not None and names and wants_cuda:
        problems.append(
            ("warning", f"the op library cannot reach PyTorch's CUDA: {missing}: the losses run in PyTorch")
        )
    return found | {
        "compiler": info["compiler"],
        "torch_target": info["torch_target"],
        "cpu": info["cpu"],
        "why_no_amx": library.why_no_amx(),
        "cuda": None if toolkit == "none" else toolkit,
        "architectures": architectures,
        "cuda_reason": library.record().get("cuda_reason"),
    }


def _tuned(device: Any, problems: list[tuple[str, str]]) -> dict[str, Any]:
    """Return which tuned file counts on a device, or why none does."""
    from clipfast.ops import tuned

    found, why = tuned.find(device)
    if found is None:
        if why == tuned.NONE:
            problems.append(("note", f"{device}: {tuned.NONE}, the rule decides: clipfast tune measures this machine"))
        else:
            problems.append(("note", f"{device}: the tuned file is not used, the rule decides: {why}"))
        return {"path": None, "reason": why}
    changed, confirmed = (sum(map(len, of_ops.values())) for of_ops in (found.fastest, found.confirmed))
    made = {"path": short(found.path), "date": found.date, "days": found.days}
    return made | {"reason": None, "changed": changed, "confirmed": confirmed}


def _triton(problems: list[tuple[str, str]], wanted: bool) -> dict[str, Any]:
    """Return Triton's version, or why it is not there; ``wanted`` where PyTorch could use it on a card."""
    level = "warning" if wanted else "note"
    version = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("triton")
    try:
        import triton

        version = triton.__version__
        # what the ops will ask of it
        for family in ("attention", "layer_norm", "bias_gelu"):
            importlib.import_module(f"clipfast.kernels.{family}")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            because = "PyTorch's operators serve in place of its kernels" if wanted else "it would serve GPUs alone"
            problems.append((level, f"Triton is not installed: {because}"))
            return {"version": None, "reason": "not installed"}
        named = " ".join(filter(None, ("Triton", version)))
        problems.append((level, f"{named} does not import: {_line(error)}: PyTorch's operators serve"))
        return {"version": version, "reason": _line(error)}
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(_triton_home()) / ".triton" / "cache")
    if wanted and not _writable(folder):
        text = f"Triton cannot write its cache {short(folder)}, and its kernels cannot run: set TRITON_CACHE_DIR"
        problems.append(("warning", text))
    return {"version": version, "reason": None, "cache": short(folder)}


def _triton_home() -> str:
    return os.environ.get("TRITON_HOME") or os.path.expanduser("~/")


def _writable(folder: Path) -> bool:
    """Return whether a folder can be written, or made where it is not there."""
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _cards(problems: list[tuple[str, str]]) -> list[dict[str, Any]]:
    import torch

    driver = Path("/proc/driver/nvidia/version").exists()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        if driver and torch.version.cuda is None:
            problems.append(("warning", "there is an NVIDIA driver, but this PyTorch is built without CUDA"))
        elif driver:
            why = f": {_line(said[0].message)}" if said else ""
            problems.append(("warning", f"there is an NVIDIA driver, but PyTorch finds no card that it can use{why}"))
        else:
            problems.append(("note", "no NVIDIA GPU: what runs on one was not tested here"))
        return []
    cards = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        card = {"index": i, "name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        cards.append(card | {"gigabytes": round(properties.total_memory / 2**30, 1)})
    return cards


def exit_code(report: dict[str, Any], strict: bool = False) -> int:
    """Return 1 where a self-test failed, or with ``strict`` where something is missing, else 0."""
    levels = {level for level, _ in report["problems"]}
    return int("failed" in levels or (strict and "warning" in levels))


def diagnose() -> dict[str, Any]:
    """Examine in a fresh process and return its report; it never raises."""
    report, end = _in_a_process()
    if report is not None:
        return report
    # what ends a process is compiled code: first of all our own, then Triton's
    for culprit, environment, without_triton, advice in (
        (
            "the op library",
            {"CLIPFAST_NO_LIBRARY": "1"},
            False,
            "install clipfast again; until then, CLIPFAST_NO_LIBRARY=1",
        ),
        ("Triton", {}, True, "install the Triton of this PyTorch; until then, uninstalling Triton"),
    ):
        report, _ = _in_a_process(environment, without_triton)
        if report is not None:
            line = f"the examination {end} with {culprit}, and not without: {advice} makes PyTorch serve"
            report["problems"].insert(0, ("failed", line))
            return report
    report = basics()
    report["problems"].append(("failed", f"the examination {end}"))
    return report


def _in_a_process(
    environment: dict[str, str] | None = None, without_triton: bool = False
) -> tuple[dict[str, Any] | None, str]:
    """Return the report, or None and how the process ended."""
    # None in the place of a module makes it one that is not installed
    hidden = "sys.modules['triton'] = None; " if without_triton else ""
    code = f"import sys; {hidden}sys.path[:] = {sys.path!r}; from clipfast.doctor import _report; _report()"
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        done = subprocess.run(
            command,
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return None, f"took longer than {_TIMEOUT} s"
    except OSError as error:
        return None, f"could not be started: {_line(error)}"
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            report = json.loads(line.removeprefix(_MARK))
            report["problems"] = [tuple(problem) for problem in report["problems"]]
            return report, "ended"
    if done.returncode < 0:
        return None, f"was ended by {signal.Signals(-done.returncode).name}"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return None, f"ended with status {done.returncode}: {last}"


def _report() -> None:
    """Examine, and print the report for the process that asked."""
    try:
        report = examine()
    except Exception as error:
        report = basics()
        report["problems"].append(("failed", f"clipfast cannot be used: {_line(error)}"))
    print(f"\n{_MARK}{json.dumps(report)}", flush=True)


def _without_user(words: str) -> str:
    """Return words without the name of the user, which paths may hold."""
    home = os.path.expanduser("~")
    return words.replace(home + os.sep, "~" + os.sep) if home != os.sep else words


def _line(error: Any) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if isinstance(error, Exception) else text


def _first(pattern: str, path: str) -> str | None:
    """Return the first match of a pattern in a file, or None."""
    try:
        match = re.search(pattern, Path(path).read_text(errors="replace"))
    except OSError:
        return None
    return match[1].strip() if match else None
