"""load_weights loads all or nothing: what does not fit is listed, and the model stays as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import archives
import pytest
import tiny
import torch
from torch import Tensor, nn

import clipfast
from clipfast.models.checkpoint_files import read_state_dict, write_state_dict
from clipfast.models.weights import load_weights


def weights_with(**changes: Tensor | None) -> dict[str, Tensor]:
    state = tiny.open_clip_clip().state_dict() | changes
    return {k: v for k, v in state.items() if v is not None}


def written(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "w.pt").write_bytes(content)
    return tmp_path / "w.pt"


BLOCK = "transformer.resblocks.2.mlp.c_fc"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda _: weights_with(**{"ln_final.bias": None, "visual.proj": None}),
        r"do not fit this CLIP; nothing was loaded.*2 missing: visual\.proj, ln_final\.bias$",
    ),
    "unexpected": (
        lambda _: weights_with(**{"ln_last.bias": torch.ones(1), "visual.ln_mid": torch.ones(1)}),
        r"2 unexpected: ln_last\.bias, visual\.ln_mid$",
    ),
    "misshapen": (
        lambda _: weights_with(**{f"{BLOCK}.bias": torch.ones(191), "logit_scale": torch.ones(1)}),
        r"2 misshapen: logit_scale \(got \(1,\), expected \(\)\), .*c_fc\.bias \(got \(191,\), expected \(192,\)\)$",
    ),
    "all three": (
        lambda _: weights_with(**{"visual.proj": None, "prelogits": torch.ones(1), "ln_final.bias": torch.ones(2)}),
        r"missing: visual\.proj\n  1 unexpected: prelogits\n  1 misshapen: ln_final\.bias \(got \(2,\)",
    ),
    "integers": (
        lambda _: weights_with(**{"visual.proj": torch.ones(64, 32, dtype=torch.int8)}),
        r"not floating point: visual\.proj \(got torch\.int8, expected torch\.float32\)",
    ),
    "complex": (
        lambda _: weights_with(**{"visual.proj": torch.ones(64, 32, dtype=torch.complex64)}),
        r"not floating point: visual\.proj",
    ),
    "image tower only": (
        lambda _: {k: v for k, v in weights_with().items() if k.startswith("visual.")},
        r"missing: positional_embedding, text_projection, logit_scale",
    ),
    "transformers text only": (
        lambda _: tiny.transformers_text(projection=True).state_dict(),
        r"missing: logit_scale, visual\.",
    ),
    "timm": (
        lambda _: tiny.timm_vit().state_dict(),
        r"missing: positional_embedding, text_projection, logit_scale, ",
    ),
    "more layers": (
        lambda _: {k.replace("resblocks.1", "resblocks.9"): v for k, v in weights_with().items()},
        r"missing: .*resblocks\.1\.ln_1.*unexpected: .*resblocks\.9\.ln_1",
    ),
    "ResNet": (
        lambda _: tiny.open_clip_clip(resnet=True).state_dict(),
        r"missing: .*unexpected: .*visual\.bn1\.weight",
    ),
    "classifier": (
        lambda _: tiny.transformers_clip().state_dict() | {"classifier.weight": torch.ones(10, 64)},
        r"unexpected: classifier\.weight$",
    ),
    "SigLIP's bias": (
        lambda _: tiny.open_clip_clip(init_logit_bias=-10.0).state_dict(),
        r"unexpected: logit_bias$",
    ),
    "other model": (lambda _: nn.Linear(2, 2).state_dict(), r"no known layout \(weight, bias\)"),
    "empty": (lambda _: {}, r"state dict: got no entries"),
    "no tensors": (lambda _: {"visual.proj": [1.0]}, r"state dict: got 'visual\.proj': list"),
    "on meta": (lambda _: weights_with(**{"visual.proj": torch.ones(64, 32, device="meta")}), r"tensor on meta"),
    "half a QKV": (
        lambda _: {k: v for k, v in tiny.transformers_clip().state_dict().items() if "layers.1.self_attn.v" not in k},
        r"v_proj missing",
    ),
    "no file": (lambda path: path / "w.safetensors", r"w\.safetensors: there is no such file"),
    "empty folder": (lambda path: path, "folder without weights"),
    "empty file": (lambda path: written(path, b""), r"w\.pt: corrupt"),
    "garbage": (lambda path: written(path, b"garbage" * 100), r"w\.pt: corrupt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_never_a_partial_load(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    model = tiny.clip()
    before = tiny.cloned(model.state_dict())
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        load_weights(model, make(tmp_path))
    tiny.assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin", "ViT-B-32.pt"])
def test_truncated_weights_leave_the_model(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "ViT-B-32.pt":
        archives.save_scripted(tiny.open_clip_clip(), path)
    else:
        write_state_dict(tiny.open_clip_clip().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    model = tiny.clip()
    before = tiny.cloned(model.state_dict())
    with pytest.raises(ValueError, match=rf"{path.name}: corrupt, truncated"):
        load_weights(model, path)
    tiny.assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize(
    ("tower", "state", "message"),
    [
        (
            tiny.vit,
            lambda: tiny.timm_vit().state_dict() | {"blocks.0.ls1.gamma": torch.ones(64)},
            r"unexpected: transformer\.resblocks\.0\.ls_1\.gamma$",
        ),
        (
            tiny.vit,
            lambda: tiny.timm_vit().state_dict() | {"patch_embed.proj.bias": torch.ones(64)},
            r"unexpected: conv1\.bias$",
        ),
        (tiny.vit, lambda: tiny.timm_vit(0).state_dict(), r"missing: proj$"),
        (lambda: tiny.vit(output_dim=None), lambda: tiny.timm_vit().state_dict(), r"unexpected: proj$"),
        (tiny.vit, lambda: tiny.transformers_vision(projection=False).state_dict(), r"missing: proj$"),
        (
            tiny.vit,
            lambda: tiny.transformers_clip().state_dict() | {"vision_model.head.probe": torch.ones(1)},
            r"unexpected: attn_pool\.probe$",
        ),
        (
            tiny.vit,
            lambda: tiny.transformers_text(projection=True).state_dict(),
            r"missing: class_embedding",
        ),
        (tiny.vit, lambda: tiny.open_clip_clip(resnet=True).state_dict(), r"unexpected: .*conv2\.weight, "),
        (
            tiny.text_transformer,
            lambda: tiny.transformers_text(projection=False).state_dict(),
            r"missing: text_projection$",
        ),
        (
            tiny.text_transformer,
            lambda: tiny.transformers_clip().state_dict() | {"text_model.bias": torch.ones(1)},
            r"unexpected: text_model\.bias$",
        ),
        (
            tiny.text_transformer,
            lambda: tiny.timm_vit().state_dict(),
            r"missing: positional_embedding, text_projection",
        ),
    ],
)
def test_never_a_partial_load_of_a_tower(tower: Callable, state: Callable, message: str) -> None:
    model = tower()
    before = tiny.cloned(model.state_dict())
    with pytest.raises(ValueError, match=rf"(?s)do not fit this {type(model).__name__}.*{message}"):
        load_weights(model, state())
    tiny.assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize("kind", ["missing", "unexpected", "misshapen"])
def test_ten_keys_are_named_and_the_others_counted(kind: str) -> None:
    state = weights_with()
    if kind == "missing":
        state = {k: v for k, v in state.items() if "resblocks" not in k}
    elif kind == "unexpected":
        state |= {f"prelogits.{i}.weight": torch.ones(1) for i in range(40)}
    else:
        state = {k: v[None] if "resblocks" in k else v for k, v in state.items()}
    with pytest.raises(ValueError, match="do not fit this CLIP") as told:
        load_weights(tiny.clip(), state)
    (line,) = [line for line in str(told.value).splitlines() if kind in line]
    count, more = (int(number) for number in re.fullmatch(rf"  (\d+) {kind}: .*, … and (\d+) more", line).groups())
    assert len(re.findall(r"resblocks\.\d|prelogits\.\d", line)) == 10 == count - more


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            lambda: tiny.timm_vit().state_dict(),
            r"an image tower alone, in the layout of timm\. A CLIP needs a text tower",
        ),
        (
            lambda: tiny.transformers_text(projection=True).state_dict(),
            r"a text tower alone, in the layout of transformers\. A CLIP needs an image tower",
        ),
    ],
)
def test_a_tower_alone_is_called_so(state: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=rf"They are {words} too"):
        load_weights(tiny.clip(), state())


def test_what_is_said_of_a_tower_alone_is_right() -> None:
    """What the error proposes works; it says nothing of whole models, and of towers what they are for."""
    load_weights(tiny.clip().visual, tiny.timm_vit().state_dict())
    with pytest.raises(ValueError, match="1 missing: ln_final.bias") as told:
        load_weights(tiny.clip(), weights_with(**{"ln_final.bias": None}))
    assert "alone" not in str(told.value)
    for model, state, words in (
        (tiny.vit(), tiny.transformers_text(projection=True), "They are a text tower alone.*This is an image tower"),
        (tiny.text_transformer(), tiny.timm_vit(), "They are an image tower alone.*This is a text tower"),
    ):
        with pytest.raises(ValueError, match=words):
            load_weights(model, state.state_dict())


def test_what_belongs_to_the_other_tower_does_not_matter() -> None:
    state = tiny.transformers_clip().state_dict()
    load_weights(tiny.text_transformer(), state | {"vision_model.head.probe": torch.ones(1)})
    load_weights(tiny.vit(), state | {"text_model.head.probe": torch.ones(1)})


def test_models_that_cannot_be_loaded() -> None:
    with pytest.raises(TypeError, match=r"model: got str, expected a CLIP, ViT, ModifiedResNet or TextTransformer"):
        load_weights("ViT-B-32.pt", tiny.clip())
    with torch.device("meta"):
        model = clipfast.create_model(tiny.CONFIG, device="meta")
    with pytest.raises(ValueError, match="on the meta device, where nothing can be loaded: positional_embedding"):
        load_weights(model, tiny.open_clip_clip().state_dict())


@pytest.mark.parametrize("rows", [8, 0])
def test_positions_of_no_square_grid(rows: int) -> None:
    state = weights_with(**{"visual.positional_embedding": torch.ones(rows, 64)})
    with pytest.raises(ValueError, match=rf"positions: got {rows} rows, expected 1 \+"):
        load_weights(tiny.clip(), state, interpolate_image_positions=True)
    state = weights_with(**{"visual.positional_embedding": torch.ones(())})
    with pytest.raises(ValueError, match=r"misshapen: visual\.positional_embedding \(got \(\)"):
        load_weights(tiny.clip(), state, interpolate_image_positions=True)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_openai_archives_need_quick_gelu(tmp_path: Path, approximate: str) -> None:
    path = archives.save_scripted(tiny.open_clip_clip(quick_gelu=True), tmp_path / "ViT-B-32.pt")
    for model in (
        tiny.clip(tiny.CONFIG | {"approximate": approximate}),
        tiny.vit(approximate=approximate),
        tiny.text_transformer(approximate=approximate),
    ):
        before = tiny.cloned(model.state_dict())
        with pytest.raises(
            ValueError, match=rf"approximate='{approximate}' in the \w+ tower, expected 'quick'.*-quickgelu"
        ):
            load_weights(model, path)
        tiny.assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize(("hidden_act", "wrong"), [("gelu", "quick"), ("quick_gelu", "none")])
def test_transformers_folders_say_which_gelu(tmp_path: Path, hidden_act: str, wrong: str) -> None:
    rivals = {
        "whole": (tiny.transformers_clip(hidden_act), tiny.clip(tiny.CONFIG | {"approximate": wrong})),
        "vision": (tiny.transformers_vision(projection=True, hidden_act=hidden_act), tiny.vit(approximate=wrong)),
        "text": (
            tiny.transformers_text(projection=True, hidden_act=hidden_act),
            tiny.text_transformer(approximate=wrong),
        ),
    }
    for name, (theirs, model) in rivals.items():
        folder = tmp_path / name
        theirs.save_pretrained(folder)
        for source in (folder, folder / "model.safetensors"):
            with pytest.raises(
                ValueError, match=rf"got approximate='{wrong}' in the \w+ tower, expected '(none|quick)', which the"
            ):
                load_weights(model, source)
        # a state dict does not say, and is believed
        load_weights(model, read_state_dict(folder))


@pytest.mark.parametrize("quick", [False, True])
def test_open_clip_folders_say_which_gelu(tmp_path: Path, quick: bool) -> None:
    state = tiny.open_clip_clip().state_dict()
    write_state_dict(state, tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": tiny.CONFIG | ({"quick_gelu": True} if quick else {}), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    right = clipfast.create_model(tmp_path / "open_clip_config.json", weights=tmp_path)
    tiny.assert_same_state(right.state_dict(), state)
    with pytest.raises(ValueError, match="approximate="):
        load_weights(tiny.clip(tiny.CONFIG if quick else tiny.QUICK_CONFIG), tmp_path)
