from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from clipfast.visualize.figures import figure_svg, new_figure, picture_uri
from clipfast.visualize.report import Report

VOID = {"meta", "img", "br", "path", "use", "rect", "image"}


class Tags(HTMLParser):
    """Checks that every element is closed, and collects those with an address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    return tags


def report() -> Report:
    page = Report("Title <1>", "lead & more")
    page.add_tiles([("71%", "of <all>")])
    page.add_section("Section", "words")
    page.add_table(("name", "value"), [("a<b", "1.5")])
    page.add_table((), [("seed", "0")])
    figure, panels = new_figure()
    panels[0, 0].plot([1, 2], [3, 4])
    panels[0, 0].set_xlabel("steps taken")
    page.add_figure(figure, 'a "figure"')
    page.add_html(f'<img src="{picture_uri(np.zeros((2, 2, 3), np.uint8))}" alt="black">')
    return page


def test_page_is_well_formed_and_needs_no_other_file(tmp_path):
    path = tmp_path / "new" / "report.html"
    report().write(path, footer="credit where due")
    html = path.read_text(encoding="utf-8")
    tags = parse(html)
    assert all(address.startswith(("data:", "#")) for address in tags.addresses)
    assert any(address.startswith("data:") for address in tags.addresses)
    assert "<script" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    for shown in ("Title <1>", "lead & more", "of <all>", "a<b", "steps taken", "credit where due"):
        assert shown in tags.text


def test_page_follows_the_reader():
    html = report().html()
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert "currentColor" in svg
    assert "var(--rule)" in svg
    # nothing of the figure is painted in a colour that only one of the two pages can show
    assert not re.search(r"(fill|stroke): #(000000|ffffff|010203|040506)", svg)


def test_same_figure_same_svg():
    def draw() -> str:
        figure, panels = new_figure()
        panels[0, 0].plot([1, 2], [3, 4], marker="o")
        return figure_svg(figure, "line")

    assert draw() == draw()


def test_picture_survives():
    picture = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    data = base64.b64decode(picture_uri(picture).split(",")[1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), picture)
