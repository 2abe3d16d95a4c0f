"""The tree itself: no module imports one that imports it, and no file holds two ideas."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCT = ("clipfast", "kernels", "csrc", "scripts", "examples")
MOST_LINES = 350


def modules() -> dict[str, Path]:
    """Every module by the name that it is imported by."""
    found = {}
    for folder, package in (("clipfast", "clipfast"), ("kernels", "clipfast.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
            found[name.removesuffix(".__init__")] = path
    return found


def imports_of(source: str, known: set[str]) -> set[str]:
    """The known modules that a source imports, inside functions too; what only a type checker reads does not count."""
    found: set[str] = set()
    pending = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
        pending += ast.iter_child_nodes(node)
    return found & known


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """A way from each module back to itself, where there is one."""
    for start in graph:
        came_from: dict[str, str] = {}
        pending = [start]
        while pending:
            here = pending.pop()
            for there in graph[here]:
                if there not in came_from:
                    came_from[there] = here
                    pending.append(there)
        if start in came_from:
            way = [start]
            while len(way) == 1 or way[-1] != start:
                way.append(came_from[way[-1]])
            yield way[::-1]


def test_imports_run_downwards() -> None:
    known = modules()
    assert len(known) > 200
    graph = {name: imports_of(path.read_text(), set(known)) - {name} for name, path in known.items()}
    assert graph["clipfast.ops.trust"] >= {"clipfast.ops.plan"}
    assert [" → ".join(way) for way in circles(graph)] == []


def test_circles_are_found() -> None:
    source = "def f():\n    from a import b\n    import c.d\n"
    assert imports_of(source, {"a", "a.b", "c.d"}) == {"a.b", "c.d"}
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == [["b", "c", "b"], ["c", "b", "c"]]
    assert list(circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})) == []


def test_files_are_short() -> None:
    files = [p for top in PRODUCT for p in (ROOT / top).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in [*files, ROOT / "setup.py"]}
    assert len(lengths) > 250
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}
