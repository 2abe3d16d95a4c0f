from __future__ import annotations

import json
import re
from html import unescape

import numpy as np
import pytest
import small
import torch
from PIL import Image

import clipfast
from clipfast.data.transform import ImageError
from clipfast.models.open_model import weights_digest
from clipfast.visualize.figures import INK, new_figure, save_png
from clipfast.visualize.model_facts import facts_of
from clipfast.visualize.show import show


@pytest.fixture
def pictures(tmp_path):
    return small.write_pictures(tmp_path / "pictures", 3)


def names(files) -> list[str]:
    return [file.name for file in files]


def test_everything_is_drawn(pictures, tmp_path):
    log = tmp_path / "log.jsonl"
    records = [{"step": i, "loss": 2.0, "logit_scale": 14.0, "samples_per_second": 9.0} for i in (1, 2)]
    log.write_text("".join(json.dumps(r) + "\n" for r in [*records, {"event": "other"}]))
    files = show(small.model(), pictures, tmp_path / "out", texts=["one", "two", "a <third>"], log=log)
    heads = [f"heads-0{i}-0{i}.png" for i in range(3)]
    assert names(files) == ["similarity.png", "space.png", "attention.png", *heads, "training.png", "report.html"]
    assert sorted(names((tmp_path / "out").iterdir())) == sorted(names(files))
    for file in files[:-1]:
        pixels = np.asarray(Image.open(file).convert("RGB"))
        assert min(pixels.shape[:2]) > 100
        assert (pixels[0, 0] == 255).all()
        assert pixels.std() > 5
    html = files[-1].read_text(encoding="utf-8")
    assert html.count("<svg") == 7
    assert "a &lt;third&gt;" in html
    # words follow the reader's light or dark page; only figures in cells have ink of their own
    words = re.findall(r"<text ([^>]*)>([^<]*)</text>", html)
    assert {"one", "two", "head 1", "rollout", "loss"} <= {word for _, word in words}
    for style, word in words:
        assert "currentColor" in style or re.fullmatch(r"-?\d\.\d\d|<1%|\d+%", word), (style, word)


def text_of(html: str) -> str:
    words = re.sub("<svg.*?</svg>|<style.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL)
    return " ".join(unescape(words).split())


def test_the_page_and_every_png_say_which_model_and_weights(pictures, tmp_path):
    model = small.model()
    report = show(model, pictures[:1], tmp_path / "a")[-1]
    assert "model a model made in Python" in text_of(report.read_text())
    assert "random weights, never trained (SHA-256 " in text_of(report.read_text())
    # one step of training moves every norm
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0].ln_1.bias += 1e-6
    source = {"spec": "runs/<first>", "weights": "w.safetensors"}
    *files, report = show(model, pictures[:1], tmp_path / "b", texts=["one"], model_source=source)
    digest = weights_digest(model.state_dict())[:12]
    said = text_of(report.read_text())
    assert f"1 picture and 1 text. model runs/<first> weights w.safetensors (SHA-256 {digest}…) towers ViT" in said
    assert "random" not in said
    for file in files:
        assert Image.open(file).info["Description"] == f"runs/<first> · weights: w.safetensors (SHA-256 {digest}…)"
    # an image tower of its own, beside texts that nobody learned
    half = small.model()
    half.visual.ln_post.weight *= 1.01
    assert facts_of(half, {"spec": "run"}).weights.endswith("; random weights, never trained, in the text tower")


def test_it_says_what_the_numbers_mean(pictures, tmp_path):
    said = text_of(show(small.model(), pictures[:1], tmp_path / "a", texts=["one", "two"])[-1].read_text())
    assert "in colours from 0.29 to 1.00 whatever the pictures and texts are" in said
    assert "This model's scale is 14.3" in said
    assert "the best of these, which need not fit" in said
    sigmoid = small.model(init_logit_bias=-10.0)
    said = text_of(show(sigmoid, pictures[:1], tmp_path / "b", texts=["one"])[-1].read_text())
    assert "of each pair by itself, on a scale from 0 to 1" in said
    assert "learned by a sigmoid: logit = 14.3 · cosine -10.0" in said


@pytest.mark.filterwarnings("ignore:Glyph")  # of what the font lacks
def test_texts_and_names_are_no_formulas_and_no_markup(pictures, tmp_path):
    hard = ["costs $\\frac$ and $^$", "a \ud83d cat & <b>", "\x1b[31mred"]
    odd = tmp_path / "caf\udce9 $x_$ [b].png"
    odd.write_bytes(pictures[0].read_bytes())
    files = show(small.model(), [odd, *pictures[1:]], tmp_path / "out", texts=hard)
    assert len(files) == 7
    html = files[-1].read_text(encoding="utf-8")
    for words in ("costs $\\frac$ and $^$", "a \\ud83d cat &amp; &lt;b&gt;", "\\x1b[31mred", "caf\\udce9 $x_$ [b].png"):
        assert words in html, words


def test_without_texts_or_pairs(pictures, tmp_path):
    assert "similarity.png" not in names(show(small.model(), pictures, tmp_path / "a"))
    files = names(show(small.model(), pictures, tmp_path / "b", texts=["one"], dark=True))
    assert "similarity.png" in files
    assert "space.png" not in files
    corner = np.asarray(Image.open(tmp_path / "b" / "similarity.png").convert("RGB"))[0, 0]
    assert corner.max() < 40


def test_a_resnet_has_no_maps(pictures, tmp_path):
    config = small.CONFIG | {"vision_cfg": {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}}
    files = show(clipfast.create_model(config).eval(), pictures, tmp_path / "out", texts=["one", "two"])
    assert names(files) == ["similarity.png", "report.html"]
    assert "This image tower is a ResNet" in files[-1].read_text()


def test_mistakes(pictures, tmp_path):
    with pytest.raises(ValueError, match="images: got none"):
        show(small.model(), [], tmp_path)
    with pytest.raises(TypeError, match="images: got .*00.png'.* alone, expected a list"):
        show(small.model(), pictures[0], tmp_path)
    with pytest.raises(TypeError, match="texts: got 'adog' alone, expected a list"):
        show(small.model(), pictures, tmp_path, texts="adog")
    with pytest.raises(ValueError, match="texts: got an empty one"):
        show(small.model(), pictures, tmp_path, texts=[" "])
    with pytest.raises(ValueError, match="method: got 'pca', expected 'tsne' or 'umap'"):
        show(small.model(), pictures, tmp_path, method="pca")
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(NotADirectoryError, match=r"output: got .*log.jsonl is a file"):
        show("no model", pictures, tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="block: got 2, expected -2 to 1"):
        show(small.model(), pictures, tmp_path / "out", block=2)
    pictures[1].write_bytes(b"no")
    with pytest.raises(ImageError, match=r"01\.png"):
        show(small.model(), pictures, tmp_path)
    broken = small.model()
    with torch.no_grad():
        broken.visual.proj.fill_(torch.nan)
    with pytest.raises(ValueError, match="model: got features with NaN"):
        show(broken, pictures[:1], tmp_path)


@pytest.mark.parametrize(
    ("dark", "page", "ink"), [(False, (255, 255, 255), (29, 33, 41)), (True, (20, 23, 28), (232, 234, 238))]
)
def test_a_png_has_a_page_of_its_own(tmp_path, dark, page, ink):
    figure, panels = new_figure(2, 2)
    panels[0, 0].set_axis_off()
    panels[0, 0].text(0, 0.5, "█████", color=INK, fontsize=40)
    save_png(figure, tmp_path / "f.png", dark=dark)
    colours = [tuple(c) for c in np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).reshape(-1, 3).tolist()]
    assert colours[0] == page
    assert max(set(colours) - {page}, key=colours.count) == ink
