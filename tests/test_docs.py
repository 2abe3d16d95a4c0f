"""The pages: what they link to and name is there, and the picture of the layers is that of the imports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import clipfast

ROOT = Path(__file__).parent.parent
if not (ROOT / "docs").is_dir():
    pytest.skip("not a clone", allow_module_level=True)

LEFT_OUT = ("build", "dist", "runs")
PAGES = sorted(
    page
    for top in (ROOT, *(p for p in ROOT.iterdir() if p.is_dir() and p.name not in LEFT_OUT and p.name[0] != "."))
    for page in (top.glob("*.md") if top == ROOT else top.rglob("*.md"))
)
FOLDERS = "clipfast|kernels|csrc|tests|benchmarks|scripts|docs|examples"
# an install makes these
MADE = ("clipfast/libclipfast.so", "clipfast/_build.json")
# rooms that may reach up, each for what says so in its own words
UPWARDS = {("models/clip.py", "data")}
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]

FENCED = re.compile(r"^( *)```.*?^\1```$", re.M | re.S)
SPANS = re.compile(r"`([^`\n]+)`")


def links_of(text: str) -> list[str]:
    """Relative links and pictures of a page, Markdown's and HTML's; what stands in code is none."""
    plain = SPANS.sub("", FENCED.sub("", text))
    found = re.findall(r"\]\(<?([^)\s>]+)", plain) + re.findall(r"^\[[^\]]+\]: (\S+)", plain, re.M)
    found += re.findall(r'(?:src|href)="([^"]+)"', plain)
    found += [part.split()[0] for value in re.findall(r'srcset="([^"]+)"', plain) for part in value.split(",")]
    return [link for link in found if not re.match(r"[a-z][a-z+.-]*:|//", link)]


def anchors_of(text: str) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ +(.+?) *#*$", FENCED.sub("", text), re.M)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return set(slugs) | {f"{slug}-{i}" for i, slug in enumerate(slugs) if slug in slugs[:i]}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in links_of(page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def code_of(text: str) -> list[str]:
    """Spans of code and lines of commands."""
    blocks = [line.strip() for block in FENCED.finditer(text) for line in block.group().splitlines()]
    return SPANS.findall(FENCED.sub("", text)) + blocks


def unknown_names(text: str) -> list[str]:
    """What a page names in code and is not there: paths, targets of make, files and words of pytest."""
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    unknown = []
    for code in code_of(text):
        for path in re.findall(rf"(?<![\w./\-])(?:{FOLDERS})/[\w./*\-]*", code):
            path = path.rstrip(".")
            if path not in MADE and not (list(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()):
                unknown.append(path)
        wanted = re.findall(r"(?:^|[^\w-])make ([a-z][\w-]*)", code)
        unknown += [f"make {name}" for name in wanted if name not in targets]
        for path, word in re.findall(r"pytest (\S+\.py) -k \"?(\w+)", code):
            # a word of a selection is of a test's name, or of its parameters
            if (ROOT / path).exists() and word not in (ROOT / path).read_text(encoding="utf-8"):
                unknown.append(f"{path} -k {word}")
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_named_is_there(page: Path) -> None:
    assert unknown_names(page.read_text(encoding="utf-8")) == []


def test_what_is_missing_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading, here\n[a](gone.md) [b](page.md#a-heading-here) [c](#no-heading) [d](https://x.org/y)\n"
        '<img src="gone.svg"> <source srcset="dark.svg 2x, page.md">\n```\n[in code](gone.md)\n```\n'
    )
    assert broken_links(page) == ["gone.md", "#no-heading", "gone.svg", "dark.svg"]
    text = "`make test`, `make tea`, `clipfast/ops/`, `clipfast/gone.py`, `csrc/cpu/*.zip`, `kernels/layer_norm.py`\n"
    text += "```\npytest tests/test_house.py -k circles\npytest tests/test_house.py -k nowhere\n```\n"
    assert unknown_names(text) == ["make tea", "clipfast/gone.py", "csrc/cpu/*.zip", "tests/test_house.py -k nowhere"]


def test_the_picture_is_that_of_the_imports() -> None:
    picture = FENCED.search((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")).group().splitlines()[1:-1]
    floors = [re.findall(r"\b(?:clipfast/)?(\w+)/(?= |$)", line) for line in picture]
    height = {room: -floor for floor, rooms in enumerate(floors) for room in rooms}
    packages = {path.parent.name for path in (ROOT / "clipfast").glob("*/__init__.py")}
    assert set(height) == packages | {"kernels", "csrc"}
    up = set()
    for room in height:
        folder = ROOT / room if room in ("kernels", "csrc") else ROOT / "clipfast" / room
        for path in folder.rglob("*.py"):
            for other in re.findall(r"^\s*(?:from|import) clipfast\.(\w+)", path.read_text(encoding="utf-8"), re.M):
                if other != room and height.get(other, -100) >= height[room]:
                    up.add((str(path.relative_to(ROOT / "clipfast")), other))
    assert up == UPWARDS


def test_the_version_is_one() -> None:
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    assert written == clipfast.__version__
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d$", text, re.M)
    assert ".".join(versions[0]) == written
    assert sorted(versions, key=lambda v: tuple(map(int, v)), reverse=True) == versions
    assert re.findall(r"^## (.+)$", text, re.M)[0] == "[Unreleased]"
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= set(KINDS)


def test_every_optimisation_has_a_verdict() -> None:
    text = (ROOT / "docs" / "history.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    heads = [row for row in rows if row[-1] == "verdict"]
    assert heads
    for row in rows:
        if row in heads:
            continue
        assert len(row) == len(heads[0]), row
        assert all(row), row
        assert re.match(r"(kept|dropped|not built|open)\b", row[-1]), row
