"""What a README says of a run: which rows it takes, its sentence, its chart and its tables, and the command."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from clipfast.benchmark.chart import THEMES, chart_svg, chart_words
from clipfast.benchmark.cli import app
from clipfast.benchmark.front_page import comparison_of, comparisons, joined
from clipfast.benchmark.markdown import (
    effect,
    headline,
    is_same_operator,
    markdown_table,
    marks,
    regenerated,
    short_table,
    update_section,
)
from clipfast.benchmark.results import DENSE, Limits, Row, Run, Side, write_run

COMPILED = "open_clip, compiled, frozen"


def side(seconds: float, peak: int | None = None) -> Side:
    return Side([seconds * factor for factor in (1.0, 1.1, 0.9)], [seconds] * 3, peak)


def sides(**seconds: float) -> dict[str, Side]:
    return {name.replace("_c_", COMPILED): side(value) for name, value in seconds.items()}


def row(op: str, label: str, unit: str, items: int, dtype: str, direction: str = "forward", **more: object) -> Row:
    return Row(op, f"{label}, {direction}, {dtype}, in full", label, direction, dtype, unit, items, **more)


def loss(batch: int, dtype: str, **peaks: int) -> Row:
    by = {"clipfast": 0.2, "PyTorch": 0.19, "open_clip": 0.3}
    figures = {name: side(by[name], peaks.get(name, 100 * batch)) for name in by}
    label, series = f"B = {batch:,}, {dtype}", f"contrastive loss, {dtype}"
    return row(
        "contrastive_loss", label, "pairs", batch, dtype, "forward and backward", series=series, axis="batch", at=batch,
        sides=figures,
    )  # fmt: skip


def make_run() -> Run:
    fast = sides(clipfast=0.01, open_clip=0.1, transformers=0.2, _c_=0.05) | {DENSE: side(0.08)}
    slow = sides(clipfast=0.4, open_clip=0.3, transformers=0.5)
    towers = [
        ("ViT-B-16-SigLIP2-NaFlex, packed, bfloat16", "images", 900, "bfloat16", slow),
        ("ViT-B-16-SigLIP, 4 images, bfloat16", "images", 4, "bfloat16", slow),
        ("ViT-B-32, 1 image, bfloat16", "images", 1, "bfloat16", slow),
        ("ViT-B-32, 16 images, bfloat16", "images", 16, "bfloat16", fast),
        ("ViT-L-14, 64 images, bfloat16", "images", 64, "bfloat16", slow),
        ("ViT-B-32, 4 images, float32", "images", 4, "float32", fast),
        ("ViT-B-32, 32 prompts, bfloat16", "prompts", 32, "bfloat16", fast),
    ]
    rows = [row("towers", label, unit, n, dtype, sides=s) for label, unit, n, dtype, s in towers]
    rows.append(row("towers", "ViT-B-32, training, 4 pairs", "pairs", 4, "float32", "step", sides=fast))
    for library, ours in (("open_clip", 0.05), ("transformers", 0.04)):
        label = f"{library}'s ViT-B-32, 4 images against 32 prompts, bfloat16"
        figures = {"clipfast": side(ours), library: side(0.2)}
        rows.append(row("accelerate", label, "scores", 128, "bfloat16", sides=figures))
    rows += [
        loss(1024, "float32"),
        loss(4096, "float32", clipfast=18_000_000, PyTorch=400_000_000, open_clip=600_000_000),
    ]
    own = {"served_by": "torch (scaled_dot_product_attention)"}
    rows.append(
        row("attention", "50 tokens", "sequences", 4, "float32", sides=sides(clipfast=1.0, PyTorch=1.0), facts=own)
    )
    details = {"threads": "2", "torch": "2.13.0+cpu"}
    limits = Limits(30.0, {"float32": 0.2})
    return Run("A CPU", "cpu", details, "abc1234567", "2026-01-02", "short", True, limits, rows)


def test_the_rows_that_users_decide_by():
    found = {c.key: c for c in comparisons(make_run())}
    assert list(found) == [
        "prompts", "image", "image, fp32", "SigLIP", "training", "accelerate", "loss", "loss memory",
    ]  # fmt: skip
    image = found["image"]  # not NaFlex's, nor the second model's, nor one image
    assert (image.title, image.what, image.model) == ("images, bf16", "16 images, bf16", "ViT-B-32")
    assert (found["SigLIP"].what, found["SigLIP"].model) == ("4 SigLIP images, bf16", "ViT-B-16-SigLIP")
    assert found["training"].what == "training step, 4 pairs, fp32"
    assert (found["loss"].title, found["loss"].what) == ("loss: time, fp32", "loss: time, 4,096 pairs, fp32")
    assert found["prompts"].ours == "10.0 ms"
    assert found["prompts"].best == COMPILED
    assert found["prompts"].ratios == pytest.approx({"open_clip": 10, "transformers": 20, COMPILED: 5})
    memory = found["loss memory"]
    assert (memory.ours, memory.theirs["open_clip"], memory.best) == ("18.0 MB", "600 MB", "PyTorch")
    accelerated = found["accelerate"]
    assert accelerated.ratios == pytest.approx({"open_clip": 4, "transformers": 5})
    assert (accelerated.ours, accelerated.best) == ("50.0, 40.0 ms", None)


def test_memory_that_is_lost_in_the_counting_is_no_figure():
    run = make_run()
    peaks = {"clipfast": 500_000, "PyTorch": 4_000_000, "open_clip": 800_000}
    assert "loss memory" not in {c.key for c in comparisons(replace(run, rows=[loss(4096, "float32", **peaks)]))}
    (_, found) = comparisons(replace(run, rows=[loss(4096, "float32", **peaks | {"clipfast": 2_000_000})]))
    assert (found.key, found.ratios, found.best) == ("loss memory", {"PyTorch": 2.0}, "PyTorch")
    # a card's allocator counts every byte
    run = replace(run, device="cuda", rows=[loss(4096, "float32", **peaks | {"open_clip": 0})])
    assert comparisons(run)[1].ratios == {"PyTorch": 8.0}


def test_the_clipfast_sides_are_no_rivals():
    for comparison in comparisons(make_run()):
        assert not any(name.startswith("clipfast") for name in comparison.ratios)


def test_names_do_not_matter():
    run = make_run()
    renamed = replace(run, rows=[replace(r, name=f"row {i}") for i, r in enumerate(run.rows)])
    assert comparisons(renamed) == comparisons(run)


def test_rows_that_a_run_lacks_are_left_out():
    run = make_run()
    without = replace(run, rows=[r for r in run.rows if r.op != "accelerate" and "SigLIP" not in r.label])
    assert [c.key for c in comparisons(without)] == [
        "prompts",
        "image",
        "image, fp32",
        "training",
        "loss",
        "loss memory",
    ]
    assert effect(without) == ""
    assert "SigLIP" not in short_table(without)
    assert comparisons(replace(run, rows=[])) == []


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        (lambda r: r.unit == "prompts", "got no row for prompts"),
        (lambda r: r.direction == "step", "got no row for training"),
        (lambda r: r.op == "contrastive_loss", "got no row for loss memory"),
    ],
)
def test_the_sentence_needs_its_rows(lacks, message):
    run = make_run()
    with pytest.raises(ValueError, match=message):
        headline(replace(run, rows=[r for r in run.rows if not lacks(r)]))


def test_the_sentence_needs_open_clip():
    run = make_run()
    for r in run.rows:
        r.sides.pop("open_clip", None)
    with pytest.raises(ValueError, match="prompts has no open_clip"):
        comparison_of(run, "prompts", "open_clip")
    with pytest.raises(ValueError, match="no open_clip"):
        headline(run)


def test_the_sentence():
    text = headline(make_run())
    sentence = text.splitlines()[0]
    assert "**10.0 times**" in sentence
    assert "loss of 4,096 pairs in **18.0 MB** instead of **600 MB** (A CPU, 2 threads)." in sentence
    assert 'srcset="docs/images/speed-dark.svg"' in text
    assert 'src="docs/images/speed-light.svg"' in text


def test_the_effect_of_one_line():
    assert effect(make_run()).replace("\u00a0", " ") == (
        "4 images against 32 prompts, bf16: open_clip's 200 → 50.0 ms (**4.00 ×**), transformers's 200 → 40.0 ms "
        "(**5.00 ×**).\n"
    )


def test_the_short_table():
    table = short_table(make_run())
    assert "at commit `abc1234567`: A CPU, 2 threads, PyTorch 2.13.0; ViT-B-32, ViT-B-16-SigLIP." in table
    lines = [line.replace("&nbsp;", " ").replace("\u00a0", " ") for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 8
    assert len({line.count("|") for line in lines}) == 1
    prompts, siglip = lines[2], lines[5]
    assert prompts.endswith("| 32 zero-shot prompts, bf16 | 10.0 ms | 10.0 × | 20.0 × | 5.00 × open_clip compiled |")
    assert siglip.endswith("| 0.75 × | 1.25 × | 0.75 × open_clip: clipfast is slower |")
    assert lines[7].endswith("| 4.00 × | 5.00 × | – |")
    assert lines[8].endswith("| 1.50 × | – | 0.95 × plain PyTorch: clipfast is slower |")
    assert lines[9].endswith("| 18.0 MB | 33.3 × | – | 22.2 × plain PyTorch |")


def test_figures_share_a_unit():
    assert joined(["200 ms", "50.0 ms"]) == "200, 50.0 ms"
    assert joined(["1.20 s", "50.0 ms"]) == "1.20 s, 50.0 ms"


def test_rows_of_one_operator_say_so():
    run = make_run()
    line = next(line for line in markdown_table(run).splitlines() if line.startswith("| 50 tokens"))
    assert "PyTorch" in line
    attention = run.rows[-1]
    assert not is_same_operator(attention)  # SDPA beside attention that is written out
    sdpa = replace(attention, sides={"clipfast": side(1.0), "SDPA flash": side(1.0), "PyTorch": side(3.0)})
    assert is_same_operator(sdpa)
    assert "SDPA flash, the same operator" in markdown_table(replace(run, rows=[sdpa]))
    norm = replace(attention, facts={"served_by": "reference (F.layer_norm)"})
    assert is_same_operator(norm)
    assert not is_same_operator(replace(norm, sides={"clipfast": side(1.0), "torch.compile": side(0.5)}))
    assert not is_same_operator(replace(norm, facts={"served_by": "native (one pass)"}))
    assert not is_same_operator(replace(norm, facts={"served_by": "torch (tiles in PyTorch)"}))
    assert not is_same_operator(replace(norm, facts={}))


@pytest.mark.parametrize("theme", THEMES)
def test_the_chart(theme):
    found = comparisons(make_run())
    svg = chart_svg(found, THEMES[theme])
    assert chart_svg(comparisons(make_run()), THEMES[theme]) == svg
    root = ElementTree.fromstring(svg)
    tags = [element.tag.rsplit("}")[-1] for element in root.iter()]
    assert tags.count("rect") == 1 + len(found)  # the legend's, and a bar each
    words = " ".join("".join(element.itertext()) for element in root.iter()).replace("\u00a0", " ")
    for expected in ("zero-shot prompts", "5.00 ×", "0.75 ×", "22.2 ×", "open_clip", "transformers"):
        assert expected in words
    assert not re.search(r"(?:href|url\()", svg)
    assert svg.count(THEMES[theme].behind) == 2  # SigLIP, and the loss's time
    width, height = float(root.get("width")), float(root.get("height"))
    for bar in list(root.iter("{http://www.w3.org/2000/svg}rect")):
        assert 0 <= float(bar.get("x")) <= float(bar.get("x")) + float(bar.get("width")) <= width
        assert 0 <= float(bar.get("y")) <= height


def test_bars_are_as_long_as_the_logarithm():
    svg = chart_svg(comparisons(make_run()), THEMES["light"])
    bars = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)][1:]
    prompts, memory = bars[0], bars[-1]
    assert memory / prompts == pytest.approx(1.927, abs=0.01)  # log 22.2 over log 5


def test_themes_differ_in_colours_alone():
    light, dark = (re.sub(r"#[0-9a-f]{6}", "", chart_svg(comparisons(make_run()), t)) for t in THEMES.values())
    assert light == dark
    assert "3.00" not in chart_words(comparisons(make_run()))


# --- pages and the command ----------------------------------------------------------------------------------


def clone(folder: Path) -> Path:
    """Write a README and a page with marks and nothing between them; return the README."""
    readme, page = folder / "README.md", folder / "docs" / "benchmarks.md"
    page.parent.mkdir(parents=True)
    parts = ["\n".join(marks(name)) for name in ("headline", "accelerate", "table")]
    readme.write_text("# A title\n\n" + "\n\nbetween\n\n".join(parts) + "\nafter\n")
    page.write_text("before\n" + "\n".join(marks("rows")) + "\n")
    return readme


def test_the_command_writes_all_parts(tmp_path):
    readme, path = clone(tmp_path / "clone"), tmp_path / "run.json"
    write_run(path, make_run())
    result = CliRunner().invoke(app, ["readme", str(path), str(readme)])
    assert result.exit_code == 0, result.output
    written = {file: file.read_bytes() for file in regenerated(make_run(), readme)}
    assert {str(file.relative_to(readme.parent)) for file in written} == {
        "README.md", "docs/benchmarks.md", "docs/images/speed-light.svg", "docs/images/speed-dark.svg",
    }  # fmt: skip
    text = readme.read_text()
    assert text.startswith("# A title\n")
    assert text.endswith("\nafter\n")
    assert text.count("between") == 2
    assert "**10.0 times**" in text
    assert "in full" in (readme.parent / "docs" / "benchmarks.md").read_text()
    assert CliRunner().invoke(app, ["readme", str(path), str(readme)]).exit_code == 0
    assert {file: file.read_bytes() for file in written} == written


@pytest.mark.parametrize("broken", ["no page", "no mark", "no rows", "no run"])
def test_nothing_is_written_where_something_is_missing(tmp_path, broken):
    readme, path = clone(tmp_path / "clone"), tmp_path / "run.json"
    run = make_run()
    write_run(path, replace(run, rows=[]) if broken == "no rows" else run)
    if broken == "no page":
        (readme.parent / "docs" / "benchmarks.md").unlink()
    elif broken == "no mark":
        readme.write_text(readme.read_text().replace(marks("table")[1], ""))
    elif broken == "no run":
        path = readme
    before = {file: file.read_bytes() for file in readme.parent.rglob("*") if file.is_file()}
    result = CliRunner().invoke(app, ["readme", str(path), str(readme)])
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert len(result.output.strip().splitlines()) == 1
    assert {file: file.read_bytes() for file in readme.parent.rglob("*") if file.is_file()} == before


BEGIN, END = marks("rows")


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_page_without_the_marks(text):
    with pytest.raises(ValueError, match="expected"):
        update_section(text, "rows", "content\n")


def test_a_section_of_a_page():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = update_section(text, "rows", "new\n")
    assert once == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert update_section(once, "rows", "new\n") == once
