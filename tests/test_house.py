"""The tree itself: no module imports one that imports it, no file holds two ideas, and none stands there twice."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCT = ("clipfast", "kernels", "csrc", "scripts", "examples")
MOST_LINES = 350
# as many lines on end as may stand in two places, and what a comment beside them begins with where there are reasons
MOST_TWICE = 7
REASON = re.compile(r"(?:#|//) twice: \S")


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


def product(*more: str) -> dict[str, str]:
    """Every file of the product by its name."""
    files = [p for top in (*PRODUCT, *more) for p in (ROOT / top).rglob("*")]
    kinds = (".py", ".cpp", ".h", ".cu", ".cuh")
    return {str(p.relative_to(ROOT)): p.read_text() for p in [*files, ROOT / "setup.py"] if p.suffix in kinds}


def test_files_are_short() -> None:
    lengths = {name: len(text.splitlines()) for name, text in product().items()}
    assert len(lengths) > 250
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def counted(name: str, text: str) -> Iterator[tuple[int, str]]:
    """Lines that may not stand in two places, with their numbers: no blank ones, comments, imports or brackets."""
    lines = text.splitlines()
    left_out: set[int] = set()
    if name.endswith(".py"):
        imports = (node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom)))
        left_out |= {number for node in imports for number in range(node.lineno, node.end_lineno + 1)}
    for number, line in enumerate(lines, 1):
        if number not in left_out and re.search(r"\w", line) and not re.match(r"\s*(#|//)", line):
            yield number, " ".join(line.split())


def twice(files: dict[str, str]) -> list[str]:
    """Runs of lines that stand in two places, but for those with a reason beside them."""
    lines = {name: list(counted(name, text)) for name, text in files.items()}
    places = defaultdict(list)
    for name, found in lines.items():
        for first in range(len(found) - MOST_TWICE):
            places[tuple(line for _, line in found[first : first + MOST_TWICE + 1])].append((name, first))
    reasons = {name: [i for i, x in enumerate(t.splitlines(), 1) if REASON.search(x)] for name, t in files.items()}

    def is_told(name: str, first: int) -> bool:
        # among the lines, or above the signature or block that they are of
        begin, end = lines[name][first][0], lines[name][first + MOST_TWICE][0]
        return any(begin - 8 <= number <= end for number in reasons[name])

    found = []
    for several in places.values():
        for one, other in pairwise(several):
            if not is_told(*one) and not is_told(*other):
                found.append(" ~ ".join(f"{name}:{lines[name][first][0]}" for name, first in (one, other)))
    return found


def test_nothing_is_written_twice() -> None:
    assert twice(product("benchmarks")) == []


def test_what_is_written_twice_is_found() -> None:
    body = "\n\n".join(f"    x{i} = {i}  # as it is" for i in range(MOST_TWICE + 1))
    one, other = f"import a\n\n\ndef f():\n{body}\n", f"def g():\n    # why\n{body}\n    return x1\n"
    assert twice({"a.py": one, "b.py": other}) == ["a.py:5 ~ b.py:3"]
    assert twice({"a.cuh": one, "b.h": other.replace("# why", "// why")}) == ["a.cuh:5 ~ b.h:3"]
    assert twice({"a.py": f"{one}\n{other}"}) == ["a.py:5 ~ a.py:23"]
    assert twice({"a.py": one, "b.py": other.replace("why", "twice: another's signature")}) == []
    assert twice({"a.py": one, "b.py": other.replace("x3 = 3", "x3 = 4")}) == []


def test_the_longest_tests_are_told_and_begin() -> None:
    (longest,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "tests" / "conftest.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LONGEST"
    )
    assert [name for name in longest if not (ROOT / "tests" / name).is_file()] == []
    table = re.findall(r"^\| `tests/(\S+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert len(table) >= 10
    assert set(table) <= set(longest)
