"""What the report says first, and how its bars are drawn, from runs that are made up."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest

from clipfast.benchmark.bars import Scale, scale_of
from clipfast.benchmark.figures import plot_lines, plot_roofline
from clipfast.benchmark.groups import groups_of
from clipfast.benchmark.report import report_html
from clipfast.benchmark.results import DENSE, Limits, Row, Run, Side, write_run
from clipfast.benchmark.summary import does_it_all, lines_of, memory_ratio, own_operator, ratio_text, share_of_limit
from clipfast.benchmark.tiles import tiles_of
from clipfast.ops import dispatch
from clipfast.visualize.figures import figure_svg
from clipfast.visualize.report import Report

MB = 10**6


def side(seconds, megabytes=None):
    return Side([seconds] * 3, [seconds] * 3, None if megabytes is None else round(megabytes * MB))


def row(op, label, unit="items", direction="forward", dtype="float32", served=None, missing=(), **sides):
    """A row whose clipfast takes a second and 2 MB; ``sides`` are times, or times with megabytes."""
    sides = {"clipfast": (1.0, 2.0)} | {name.replace("_clip_", "_clip, "): figures for name, figures in sides.items()}
    if "dense" in sides:
        sides = {"clipfast": sides.pop("clipfast"), DENSE: sides.pop("dense"), **sides}
    made = {name: side(*(figures if isinstance(figures, tuple) else (figures,))) for name, figures in sides.items()}
    facts = {} if served is None else {"served_by": served}
    name = f"{op}, {label}, {direction}"
    return Row(op, name, label, direction, dtype, unit, 4, sides=made, missing=dict(missing), facts=facts)


SDPA = "torch (scaled_dot_product_attention)"


def rows():
    both = "forward and backward"
    return [
        row("attention", "50 tokens", served=SDPA, PyTorch=1.25, SDPA=1.01),
        row("bias_gelu", "quick", served="reference (plain PyTorch)", PyTorch=1.0, compiled=0.4),
        row("bias_gelu", "none", served="native (bias and GELU in one pass)", PyTorch=1.5, compiled=1.2),
        row("block", "50 tokens of 768", open_clip=0.5),
        replace(row("contrastive_loss", "B = 4,096, bfloat16", "pairs", both, "bfloat16", open_clip=(1.3, 9)), at=4096),
        replace(row("contrastive_loss", "B = 512, float32", "pairs", both, open_clip=(0.5, 3)), at=512),
        replace(
            row(
                "contrastive_loss", "B = 4,096, float32", "pairs", both, missing={"memeff": "not installed"}.items(),
                clipfast=(1, 18), open_clip=(1.55, 621), PyTorch=(1.1, 500),
            ),
            at=4096,
        ),
        row("dispatch", "layer_norm", alone=0.7),
        row("layer_norm", "LayerNorm", served="native (one pass over the rows)", PyTorch=20),
        row("tokenizer", "ASCII", "texts", open_clip=30),
        row("towers", "ViT, 1 image", "images", open_clip=(1.3, 0.5), timm=(1.25, 4)),
        row("towers", "ViT, 4 images", "images", open_clip=(1.2, 6)),
        row("towers", "ViT, 16 images", "images", open_clip=1.1, clipfast=1.0),
        row("towers", "ViT, gradients", "images", "step", open_clip=1.1),
        row("towers", "ViT, 32 prompts", "prompts", open_clip=10.2, open_clip_compiled=8, dense=7.5),
        row("towers", "ViT, training, 8 pairs", "pairs", "step", open_clip=1.4),
        row("accelerate", "open_clip's ViT", "scores", open_clip=1.6),
    ]  # fmt: skip


def make_run(some=None, device="cpu"):
    some = rows() if some is None else some
    return Run("A card", device, {}, "abc1234567", "2026-01-02", "short", True, Limits(30, {"float32": 0.2}), some)


@pytest.fixture(scope="module")
def html():
    return report_html(make_run())


def section(html, heading):
    return re.search(rf"<h2>{re.escape(heading)}</h2>(.*?)(?:<h2>|<footer>)", html, re.DOTALL)[1]


BAR = re.compile(r'<i class="([^"]*)" style="left:([\d.]+)%;width:([\d.]+)%"></i>')
LINE = re.compile(r'<li class="bar[^"]*"><span class="who">(.*?)</span>(.*?)</li>')


def lines(html):
    """The drawn lines: a rival, and for time and memory its bars and its ratios as they are written."""
    for who, rest in LINE.findall(html):
        for cell in rest.split('<span class="cell ')[1:]:
            bars = [(kind.split(), float(left), float(width)) for kind, left, width in BAR.findall(cell)]
            yield unescape(who), cell.split('"')[0], bars, re.findall(r"([\d.,]+)\u00a0×", cell)


def test_what_users_gain_comes_first(html):
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings[:11] == [
        # what users run
        "Zero-shot prompts", "One line: clipfast.accelerate(model)", "Training step", "Whole towers",
        "Contrastive loss",
        # what stands around it, though its gain be larger; then the parts
        "Tokenizer",
        "LayerNorm, and residual + LayerNorm", "Bias + GELU", "Attention",
        "What the choice of an implementation costs a call", "A transformer block",
    ]  # fmt: skip
    slower = [replace(r, sides=r.sides | {"open_clip": side(1.2)}) if r.unit == "prompts" else r for r in rows()]
    slower = [replace(r, sides={k: v for k, v in r.sides.items() if "compiled" not in k}) for r in slower]
    assert [group.heading for group in groups_of(make_run(slower))][:3] == [
        "One line: clipfast.accelerate(model)", "Training step", "Zero-shot prompts",
    ]  # fmt: skip


def test_the_order_is_not_that_of_measuring():
    assert [g.heading for g in groups_of(make_run(rows()[::-1]))] == [g.heading for g in groups_of(make_run())]


def test_every_bar_has_the_pages_scale(html):
    (one,), (octave,) = re.findall(r"--one: ([\d.]+)%", html), re.findall(r"--octave: ([\d.]+)%", html)
    drawn = list(lines(html))
    assert len(drawn) > 25
    for who, kind, bars, ratios in drawn:
        assert len(bars) == len(ratios), (who, kind)
        for (classes, left, width), ratio in zip(bars, map(float, ratios), strict=True):
            start = left if ratio >= 1 else left + width
            assert start == pytest.approx(float(one), abs=0.02), (who, ratio)
            # ratios are written with three digits
            assert width == pytest.approx(abs(math.log2(ratio)) * float(octave), abs=0.2), (who, ratio)
            assert ("more" in classes, "less" in classes) == (ratio >= 1, ratio < 1), (who, ratio)
    assert any(float(ratio) < 1 for *_, ratios in drawn for ratio in ratios)
    # the line is drawn from the one place by the one rule, and so are the words above it
    assert html.count("var(--one)") == 1
    ticks = re.findall(r'<s class=one style="left:([\d.]+)%">1\u00a0×</s>', html)
    assert len(ticks) == 2 * html.count('class="axis"') > 20
    assert set(ticks) == {one}


def test_less_is_grey_and_more_is_not(html):
    rules = dict(re.findall(r"^([^\n{}]+) \{ ([^{}]*?) \}", html, re.MULTILINE))
    assert "background: var(--less)" in rules[".track i"]
    assert rules[".track i.more"] == "background: var(--time);"
    assert rules[".memory .track i.more"] == "background: var(--memory);"
    assert ".track i.less" not in rules


def test_dense_stands_below_the_same_rival(html):
    (first, second) = [line for line in lines(section(html, "Zero-shot prompts")) if line[1] == "time"]
    assert first[3] == ["10.2", "1.36"]
    assert second[3] == ["8.00", "1.07"]
    assert [bar[0] for bar in first[2]] == [["more"], ["more", "dense"]]


def test_memory_stands_beside_time(html):
    loss = list(lines(section(html, "Contrastive loss")))
    assert [(who, kind, ratios) for who, kind, _, ratios in loss[4:8]] == [
        ("open_clip", "time", ["1.55"]), ("open_clip", "memory", ["34.5"]),
        ("PyTorch", "time", ["1.10"]), ("PyTorch", "memory", ["27.8"]),
    ]  # fmt: skip
    towers = section(html, "Whole towers")
    assert "under 1 MB; clipfast’s 2.00 MB" in towers  # which no ratio is made of
    assert [ratios for who, kind, _, ratios in lines(towers) if kind == "memory" and ratios] == [["2.00"], ["3.00"]]


def test_memory_that_was_not_counted():
    few = row("towers", "few", open_clip=(1, 1e-3), timm=1.0)
    assert memory_ratio(few, "open_clip", "cpu") is None
    assert memory_ratio(few, "open_clip", "cuda") == pytest.approx(5e-4)  # an allocator counts every byte
    assert memory_ratio(few, "timm", "cuda") is None
    none = replace(few, sides=few.sides | {"open_clip": side(1.0, 0)})
    assert memory_ratio(none, "open_clip", "cuda") is None
    assert "nothing; clipfast’s 2.00 MB" in report_html(make_run([none], "cuda"))


def test_tiles_say_what_a_user_gains(html):
    assert tiles_of(make_run()) == [
        (
            "10.2\u00a0× faster",
            "than open_clip, and 8.00\u00a0× faster than the fastest rival there (open_clip, compiled): "
            "ViT, 32 prompts",
            "Zero-shot prompts",
        ),
        ("1.40\u00a0× faster", "than open_clip: ViT, training, 8 pairs", "Training step"),
        ("1.60\u00a0× faster", "than open_clip: open_clip's ViT", "One line, clipfast.accelerate"),
        ("1.20\u00a0× faster", "than open_clip: ViT, 4 images", "Images"),  # neither the best row nor the worst
        ("18.0 MB", "in place of open_clip’s 621 MB: 34.5\u00a0× less memory", "Loss at B = 4,096"),
        (
            "1.55\u00a0× faster",
            "than open_clip, and 1.10\u00a0× faster than the fastest rival there (PyTorch): B = 4,096, float32",
            "Loss at B = 4,096",
        ),
    ]
    tiles = html[html.index('<div class="tiles">') : html.index("<h2>")]
    assert tiles.count('<div class="tile">') == 6
    for text in ("Zero-shot prompts", "10.2\u00a0× faster", "in place of open_clip’s 621 MB"):
        assert text in tiles
    assert "GB/s" not in tiles.split("How this was measured")[0]
    assert "a copy 30 GB/s" in section(html, "Roofline")


@pytest.mark.parametrize(
    ("seconds", "figure", "meaning"),
    [
        (0.8, "1.25\u00a0× slower", "than timm: ViT"),
        (1.01, "as fast", "as timm: ViT"),
        (2, "2.00\u00a0× faster", "than timm: ViT"),
    ],
)  # fmt: skip
def test_a_tile_of_a_loss_says_so(seconds, figure, meaning):
    """And without open_clip the fastest rival stands in its place."""
    assert tiles_of(make_run([row("towers", "ViT", "images", timm=seconds, torchvision=9)])) == [
        (figure, meaning, "Images")
    ]


def test_runs_without_rivals_have_no_tiles():
    assert tiles_of(make_run([row("towers", "ViT", "images", missing={"timm": "not installed"}.items())])) == []
    html = report_html(make_run([row("towers", "ViT", "images", missing={"timm": "not installed"}.items())]))
    assert '<div class="tiles">' not in html
    assert '<li class="absent">timm: not installed</li>' in html


def test_rows_of_the_same_operator_are_folded_at_the_end(html):
    gelu = section(html, "Bias + GELU")
    before, folded = gelu.split("<details><summary>The same operator on both sides: ")
    # what the fold hides is told: a compiled rival that is faster
    assert folded.startswith("1 row, rivals take 0.40 to 1.00\u00a0× clipfast’s time</summary>")
    assert "<h3>none</h3>" in before
    assert "Served by native (bias and GELU in one pass)." in before
    assert "quick" not in before
    assert "<h3>quick</h3>" in folded
    assert "PyTorch’s own operator serves clipfast’s call: plain PyTorch." in folded
    assert "The fastest rival takes 1.20\u00a0× clipfast’s time." in before
    attention = section(html, "Attention")
    assert "clipfast calls PyTorch’s own operator in every row." in attention
    assert "1 row, rivals take 1.01 to 1.25\u00a0×" in attention
    assert "The same operator" not in section(html, "Whole towers")
    # all figures of all rows are there, folded or not
    for made in rows():
        assert f"<td>{made.name}</td>".replace("'", "&#x27;") in html


PYTORCHS_OWN = {
    "reference (F.layer_norm)", "reference (addition, then F.layer_norm)", "reference (plain PyTorch)",
    "reference (explicit softmax in plain PyTorch)", "reference (all logits at once, in PyTorch)",
    "reference (block by block in plain PyTorch)", "torch (scaled_dot_product_attention)",
    "torch (PyTorch's FlashAttention for sequences of any lengths, varlen_attn)",
}  # fmt: skip


def test_every_implementation_is_ours_or_pytorchs_own():
    """A new one has to be put on a side: whoever adds it sees this test fail where its words are PyTorch's."""
    served = {f"{i.backend} ({i.description})" for op in dispatch.entries.values() for i in op.implementations}
    assert len(served) > 12
    assert {words for words in served if own_operator(row("x", "x", served=words))} == PYTORCHS_OWN & served
    assert {words for words in served if words.startswith("reference")} <= PYTORCHS_OWN
    assert own_operator(row("x", "x", served=SDPA)) == "scaled_dot_product_attention"
    assert own_operator(row("x", "x", served="torch (tiles in PyTorch)")) is None
    assert own_operator(row("x", "x")) is None


class Spoken(HTMLParser):
    """What is read aloud: nothing of what is hidden from that."""

    def __init__(self, html):
        super().__init__()
        self.hidden, self.words = 0, ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if self.hidden and tag not in ("wbr", "br"):
            self.hidden += 1
        elif ("aria-hidden", "true") in attrs:
            self.hidden = 1

    def handle_endtag(self, tag):
        self.hidden -= bool(self.hidden)

    def handle_data(self, data):
        self.words += "" if self.hidden else data + " "


def test_bars_are_told_in_words(html):
    def words(heading):
        return " ".join(Spoken(section(html, heading)).words.replace("\u00a0", " ").split())

    assert "open_clip time 10.2 × dense 1.36 ×" in words("Zero-shot prompts")
    assert "open_clip time 1.55 × memory 34.5 × PyTorch time 1.10 × memory 27.8 ×" in words("Contrastive loss")
    assert "memeff : not installed" in words("Contrastive loss").replace("memeff:", "memeff :")
    # tables that are wider than the page are scrolled by keys, and what opens is the browser's own
    assert html.count('tabindex="0" role="region" aria-label="') == html.count('class="scroll"')
    assert html.count("<details>") == html.count("<summary>") > 11


def test_colours_can_be_told_from_both_pages(html):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    light, dark, bars = ({}, {}, {})
    for block, found in zip(re.findall(r":root \{([^}]*)\}", html)[:4], (light, dark, {}, bars), strict=True):
        for name, colour in re.findall(r"--(\w+): (#\w+)", block):
            found[name] = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
    assert bars.keys() == {"time", "memory", "less"}
    for page in (light, dark):
        assert all(contrast(colour, page["page"]) >= 3 for colour in bars.values())
        for text in ("ink", "soft", "accent"):
            assert contrast(page[text], page["page"]) >= 4.5
            assert contrast(page[text], page["panel"]) >= 4.5


def test_a_scale_holds_what_is_drawn():
    assert Scale.of([]) == Scale(-1, 2)
    assert Scale.of([0.3, 9]) == Scale(-2, 4)
    assert Scale.of([1e-9, 1e9]) == Scale(-4, 10)
    scale = Scale(-2, 4)
    assert [scale.place(r) for r in (0.25, 1, 16, 1e9, 1e-9)] == pytest.approx([0, 100 / 3, 100, 100, 0])
    assert [scale.is_beyond(r) for r in (0.25, 16, 17, 0.2)] == [False, False, True, True]
    assert [words for _, words in scale.ticks()] == ["¼", "½", "1\u00a0×", "2", "4", "8", "16"]
    for low in range(-4, 0):
        for high in range(2, 11):
            ticks = [words for _, words in Scale(low, high).ticks()]
            assert "1\u00a0×" in ticks
            assert 2 <= len(ticks) <= 8
    assert scale_of(make_run()) == Scale(-2, 6)  # 0.4 in time, 34.5 in memory


def test_a_bar_beyond_the_scale_has_an_arrow():
    html = report_html(make_run([row("towers", "ViT", "images", open_clip=5000, timm=1e-3)]))
    (long, short) = [bars[0] for _, kind, bars, _ in lines(html) if kind == "time"]
    assert (long[0], short[0]) == (["more", "beyond"], ["less", "beyond"])
    assert (short[1], long[1] + long[2]) == (0, pytest.approx(100, abs=0.02))
    assert [ratios[0] for _, kind, _, ratios in lines(html) if kind == "time"] == ["5,000", "0.001"]


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (0.934, "0.93"),
        (1.4, "1.40"),
        (10.24, "10.2"),
        (140.4, "140"),
        (2345, "2,345"),
        (0.996, "1.00"),
        (0.0123, "0.012"),
    ],
)
def test_ratios_in_words(ratio, text):
    assert ratio_text(ratio) == f"{text}\u00a0×"


def test_names_that_are_markup():
    html = report_html(
        make_run([row("a<op>", "<l>", served="x <y>", missing={"<b>n": "<i>why"}.items(), **{"<u>r": 2.0})])
    )
    for name in ("a<op>", "<l>", "x <y>", "<b>n", "<i>why", "<u>r"):
        assert name not in html
        assert name.replace("<", "&lt;").replace(">", "&gt;") in html


def test_logarithmic_axes_have_numbers():
    """Matplotlib writes powers as formulas, which the house's style shows as they are typed."""
    some = [
        replace(r, flops=1e9 * r.at**2, bytes=1e6, series="loss", axis="batch", at=r.at)
        for r in rows() if r.at is not None and r.dtype == "float32"
    ]  # fmt: skip
    run = make_run(some)
    for figure in (
        plot_roofline(run),
        plot_lines(lines_of(run, "loss", "time")),
        plot_lines(lines_of(run, "loss", "memory")),
    ):
        svg = figure_svg(figure, "figure")
        assert "mathdefault" not in svg
        axes = figure.axes[0]
        low, high = axes.get_ylim()
        ticks = [float(t.get_text().replace(",", "")) for t in axes.get_yticklabels() if t.get_text()]
        assert len([tick for tick in ticks if low <= tick <= high]) >= 2


def test_accelerated_models_do_less_than_a_limit_counts():
    one = replace(row("accelerate", "x", open_clip=2), flops=1e9, bytes=1e6, limit_s=0.5)
    assert not does_it_all(one, "clipfast")
    assert share_of_limit(one, "clipfast") is None
    assert share_of_limit(one, "open_clip") == pytest.approx(0.25)
    points = {line.get_label(): len(line.get_xdata()) for line in plot_roofline(make_run([one])).axes[0].get_lines()}
    assert points["fastest rival"] == 1
    assert "clipfast" not in points


def test_the_same_run_gives_the_same_bytes_in_any_process(tmp_path):
    write_run(tmp_path / "run.json", make_run())
    code = (
        "import sys, pathlib\n"
        "from clipfast.benchmark.results import read_run\n"
        "from clipfast.benchmark.report import report_html\n"
        "sys.stdout.buffer.write(report_html(read_run(pathlib.Path(sys.argv[1]))).encode())"
    )
    pages = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run.json")], check=True, capture_output=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(pages) == 1
    assert b"Zero-shot prompts" in pages.pop()


def test_a_tile_says_what_it_is_of():
    page = Report("Title", "lead")
    page.add_tiles([("5 ×", "faster than <x>", "Prompts & more"), ("7", "alone")])
    html = page.html()
    assert "<small>Prompts &amp; more</small><b>5 ×</b><small>faster than &lt;x&gt;</small>" in html
    assert '<div class="tile"><b>7</b><small>alone</small></div>' in html
