"""``clipfast doctor``'s report, for a reader."""

from __future__ import annotations

from typing import Any


def render(report: dict[str, Any]) -> str:
    """Return the report for a reader, with a block to paste in a bug report at its end."""
    lines = _facts(report)
    for device, ops in report.get("ops", {}).items():
        lines += ["", f"which implementation serves on {device}"]
        lines += [f"  {line}" for said in ops.values() for line in said.splitlines()]
    if "self_test" in report:
        results = report["self_test"]
        passed = sum(r["passed"] for r in results)
        lines += ["", f"self-test: {passed} of {len(results)} right, forward and backward ({report['seconds']} s)"]
    lines += ["", *(f"{level + ':':9}{text}" for level, text in report["problems"])]
    counts = [sum(level == wanted for level, _ in report["problems"]) for wanted in ("failed", "warning")]
    if counts[0]:
        lines.append("clipfast does not work here as it should")
    elif counts[1]:
        lines.append("clipfast computes what it should, slower than it could")
    else:
        lines.append("all is well")
    lines += ["", "to paste in a bug report:", "", "```", *_facts(report)]
    for device, ops in report.get("ops", {}).items():
        chosen = ", ".join(said.splitlines()[0].split(" (")[0].replace(": ", "=") for said in ops.values())
        lines.append(f"{device:10}{chosen}")
    return "\n".join([*lines, *(f"{level + ':':10}{text}" for level, text in report["problems"]), "```"])


def _facts(report: dict[str, Any]) -> list[str]:
    cpu = report["cpu"]
    facts = {
        "clipfast": f"{report['clipfast']} in {report['package']}",
        "platform": f"{report['platform']}, glibc {report['glibc'] or 'none'}, Python {report['python']}",
        "CPU": f"{cpu['model'] or 'unknown'}, {cpu['cores']} cores, {cpu.get('capability', '')}".rstrip(", "),
        "driver": report["driver"] or "none",
    }
    if "torch" in report:
        cuda = report["torch"]["cuda"]
        facts["PyTorch"] = f"{report['torch']['version']}, {f'CUDA {cuda}' if cuda else 'without CUDA'}"
        facts["Triton"] = f"{report['triton']['version'] or ''} {report['triton']['reason'] or ''}".strip()
        for card in report["cards"]:
            how = f": {card['how']}" if card.get("served") else ": not served by the op library"
            facts[f"card {card['index']}"] = f"{card['name']} ({card['capability']}){how}"
        facts["library"] = _describe_library(report["library"])
        if report["library"]["reason"] is None:
            why_not = report["library"]["why_no_amx"]
            facts["AMX"] = f"not used: {why_not}" if why_not else "multiplies bfloat16 in the encoder and the losses"
        facts |= {f"tuned {device}: ": _describe_tuned(about) for device, about in report["tuned"].items()}
        if cuda:
            facts["CUDA entry points: "] = report["library"]["cuda_entry_points"]
    if report["environment"]:
        facts["set"] = " ".join(f"{name}={value}" for name, value in report["environment"].items())
    return [f"{name:10}{value}" for name, value in facts.items()]


def _describe_tuned(tuned: dict[str, Any]) -> str:
    if tuned["reason"] is not None:
        return tuned["reason"]
    age = "today" if tuned["days"] == 0 else f"{tuned['days']} days ago" if tuned["days"] > 1 else "yesterday"
    return (
        f"{tuned['path']}, made {age}: {tuned['changed']} choices other than the rule's, {tuned['confirmed']} the same"
    )


def _describe_library(library: dict[str, Any]) -> str:
    if library["reason"] is not None:
        return "not used"
    cuda = "without CUDA"
    if library["cuda"]:
        names = ", ".join(
            f"PTX of compute_{a.removesuffix('+PTX')}" if a.endswith("+PTX") else f"sm_{a}"
            for a in library["architectures"]
        )
        cuda = f"CUDA {library['cuda']} for {names}"
    elif library["cuda_reason"]:
        cuda = f"without CUDA ({library['cuda_reason']})"
    size = f"{library['bytes'] / 1e6:.1f} MB"
    return f"{library['path']}, {size}, {library['cpu']}, compiler {library['compiler']}, {cuda}"
