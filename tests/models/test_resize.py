"""Position embeddings for another resolution or context length: open_clip's, Long-CLIP's, or an error that says why."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from safetensors.torch import save_file
from torch import Tensor

import clipfast
from clipfast.models.key_layouts import from_openai, to_openai
from clipfast.models.long_clip import stretch_positions
from clipfast.models.weights import load_weights


def config(image_size: object = 32, context_length: int = 16) -> dict:
    return tiny.CONFIG | {
        "vision_cfg": tiny.CONFIG["vision_cfg"] | {"image_size": image_size},
        "text_cfg": tiny.CONFIG["text_cfg"] | {"context_length": context_length},
    }


def of_open_clip(state: dict[str, Tensor], sizes: dict) -> dict[str, Tensor]:
    """Return what open_clip makes of weights for a model of other sizes."""
    resized, model = dict(state), open_clip.CLIP(**sizes)
    resize_pos_embed(resized, model)
    resize_text_pos_embed(resized, model)
    model.load_state_dict(resized)
    return resized


@pytest.mark.parametrize(
    ("image_size", "context_length", "dtype"),
    [(64, 16, torch.float32), (32, 40, torch.float64), (16, 5, torch.float32), ((48, 80), 77, torch.float32)],
)
def test_both_towers_are_resized_as_open_clip_does(image_size: object, context_length: int, dtype: torch.dtype) -> None:
    state = tiny.open_clip_clip().to(dtype).state_dict()
    sizes = config(image_size, context_length)
    expected = of_open_clip(state, sizes)
    for source in (state, from_openai(state, "transformers")):
        made = clipfast.create_model(
            tiny.CONFIG, image_size=image_size, context_length=context_length, weights=source, dtype=dtype
        )
        tiny.assert_same_state(made.state_dict(), expected)
        assert made.config == clipfast.CLIPConfig.from_dict(sizes)
        tiny.assert_same_state(
            load_weights(clipfast.create_model(sizes, dtype=dtype), source, resize=True).state_dict(), expected
        )
    images = torch.randn(2, 3, *made.visual.image_size, dtype=dtype)
    assert made.encode_image(images).isfinite().all()
    tokens = torch.full((2, context_length), 99)
    assert made.encode_text(tokens).isfinite().all()


def test_only_what_was_asked_for_is_resized() -> None:
    state = tiny.open_clip_clip().state_dict()
    other = clipfast.create_model(config(64, 24))
    for resize, fault in (("image", r"1 misshapen: positional_embedding"), ("text", r"1 misshapen: visual\.pos")):
        with pytest.raises(ValueError, match=fault):
            load_weights(other, state, resize=resize)
    with pytest.raises(ValueError, match="2 misshapen"):
        load_weights(other, state)
    # a longer text table is not shortened because another image size was asked for
    longer = tiny.open_clip_clip().state_dict() | {"positional_embedding": torch.randn(40, 48)}
    with pytest.raises(ValueError, match=r"1 misshapen: positional_embedding"):
        clipfast.create_model(tiny.CONFIG, image_size=64, weights=longer)
    with pytest.raises(ValueError, match="resize: got 'both', expected True, False, 'image' or 'text'"):
        load_weights(other, state, resize="both")


@pytest.mark.parametrize("image_size", [(64, 128), (128, 64), (32, 512), 160])
def test_grids_that_are_not_square(image_size: object) -> None:
    rival = tiny.vit(image_size=(64, 256))  # 4 × 16
    state = rival.state_dict()
    vit = load_weights(tiny.vit(image_size=image_size), state, resize=True, grid=(4, 16))
    grid = state["positional_embedding"][1:].T.reshape(1, 64, 4, 16)
    expected = F.interpolate(grid, size=vit.grid_size, mode="bicubic", antialias=True)[0].flatten(1).T
    assert torch.equal(vit.positional_embedding, torch.cat([state["positional_embedding"][:1], expected]))
    other = load_weights(tiny.vit(image_size=image_size), state, resize=True, grid=[16, 4])
    assert not torch.equal(vit.positional_embedding, other.positional_embedding)


@pytest.mark.parametrize("image_size", [160, 64, (64, 128), (128, 512)])
@pytest.mark.parametrize("layout", ["openai", "timm"])
def test_a_grid_that_is_not_known_is_asked_for(layout: str, image_size: object) -> None:
    state = from_openai(to_openai(tiny.vit(image_size=(64, 256)).state_dict()), layout)
    vit = tiny.vit(image_size=image_size)
    before = tiny.cloned(vit.state_dict())
    for option in ({"resize": True}, {"resize": "image"}, {"interpolate_image_positions": True}):
        with pytest.raises(ValueError, match=r"64 patches may be 8×8, 4×16, 16×4 or others; pass grid=\(rows, col"):
            load_weights(vit, state, **option)
    with pytest.raises(ValueError, match=r"grid: got 4×15, expected rows · columns = 64"):
        load_weights(vit, state, resize=True, grid=(4, 15))
    tiny.assert_same_state(vit.state_dict(), before)


def test_as_many_patches_of_another_grid() -> None:
    state = tiny.vit(image_size=(64, 256)).state_dict()
    # nothing tells: as every library does, they are taken as they are
    square = load_weights(tiny.vit(image_size=128), state, resize=True)
    tiny.assert_same_state(square.state_dict(), state)
    known = load_weights(tiny.vit(image_size=128), state, resize=True, grid=(4, 16))
    assert not torch.equal(known.positional_embedding, square.positional_embedding)


def test_wrong_options() -> None:
    state = tiny.open_clip_clip().state_dict()
    for grid in (4, (4,), (0, 4), ("4", "16"), (2.0, 2.0)):
        with pytest.raises(ValueError, match=r"grid: got .*, expected \(rows, columns\) of patches"):
            load_weights(tiny.clip(), state, resize=True, grid=grid)
    with pytest.raises(ValueError, match="grid: got .* without resize"):
        load_weights(tiny.clip(), state, grid=(2, 2))
    with pytest.raises(ValueError, match="text_positions: got 'longclip' without resize"):
        load_weights(tiny.clip(), state, text_positions="longclip")
    with pytest.raises(ValueError, match="text_positions: got 'cubic', expected one of 'linear', 'longclip'"):
        load_weights(tiny.clip(), state, resize=True, text_positions="cubic")
    with pytest.raises(ValueError, match="text_positions: got 'longclip' without another context_length"):
        clipfast.create_model(tiny.CONFIG, weights=state, text_positions="longclip")
    for length in (0, -1, 2.0):
        with pytest.raises(ValueError, match="context_length: got"):
            clipfast.create_model(tiny.CONFIG, context_length=length)


def test_a_models_name_tells_the_grid() -> None:
    # 14 × 14 patches could be 7 × 28 as well, but not those of a ViT-B-16
    base = config(224)
    state = open_clip.CLIP(**base).state_dict()
    expected = of_open_clip(state, config(336))
    made = clipfast.create_model(base, image_size=336, weights=state)
    tiny.assert_same_state(made.state_dict(), expected)
    later = load_weights(clipfast.create_model(base, image_size=336), state, resize=True)
    tiny.assert_same_state(later.state_dict(), expected)
    with pytest.raises(ValueError, match="196 patches may be 14×14, 7×28, 28×7 or others"):
        load_weights(clipfast.create_model(config(336)), state, resize=True)


@pytest.mark.parametrize("kind", ["transformers", "open_clip", "clipfast"])
def test_a_configuration_beside_tells_the_grid(tmp_path: Path, kind: str) -> None:
    size = [64, 64] if kind == "transformers" else [32, 128]
    state = open_clip.CLIP(**config(tuple(size))).state_dict()
    files = {
        "transformers": ("config.json", {"model_type": "clip", "vision_config": {"image_size": 64, "patch_size": 16}}),
        "open_clip": ("open_clip_config.json", {"model_cfg": config(size)}),
        "clipfast": ("model.json", config(size)),
    }
    name, content = files[kind]
    if kind == "transformers":
        content["vision_config"]["hidden_act"] = content.setdefault("text_config", {})["hidden_act"] = "gelu"
    (tmp_path / name).write_text(json.dumps(content))
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    grid = (size[0] // 16, size[1] // 16)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        made = load_weights(clipfast.create_model(config(96)), source, resize=True)
        expected = load_weights(clipfast.create_model(config(96)), state, resize=True, grid=grid)
        tiny.assert_same_state(made.state_dict(), expected.state_dict())
    # as many patches, but not the same: they are not loaded as if they were
    other = clipfast.create_model(config((16 * grid[1], 16 * grid[0]) if grid[0] != grid[1] else (32, 128)))
    with pytest.raises(
        ValueError, match=r"got weights of \d×\d patches, by the configuration beside them.*resize=True"
    ):
        load_weights(other, tmp_path)
    resized = load_weights(other, tmp_path, resize=True).visual.positional_embedding
    assert not torch.equal(resized, state["visual.positional_embedding"])


def test_openais_archives_are_square() -> None:
    state = open_clip.CLIP(**config(128), quick_gelu=True).state_dict()
    model = clipfast.create_model(config(96, 24) | {"approximate": "quick"})
    with pytest.raises(ValueError, match="8×8, 4×16"):
        load_weights(model, state, resize=True)
    sizes = {"input_resolution": 128, "context_length": 16, "vocab_size": 100}
    load_weights(model, state | {k: torch.tensor(v) for k, v in sizes.items()}, resize=True)
    tiny.assert_same_state(model.state_dict(), of_open_clip(state, config(96, 24)))


def test_resnets_positions_are_square() -> None:
    state = tiny.open_clip_clip(resnet=True).state_dict()
    made = clipfast.create_model(tiny.RESNET_CONFIG, image_size=64, weights=state)
    old = state["visual.attnpool.positional_embedding"]
    assert old.shape[0] == 2
    assert torch.equal(made.visual.attnpool.positional_embedding, torch.cat([old[:1], *[old[1:]] * 4]))
    with pytest.raises(ValueError, match=r"positions: got 4 rows"):
        load_weights(made, state | {"visual.attnpool.positional_embedding": torch.ones(4, 256)}, resize=True)


def stretched(old: Tensor) -> Tensor:
    """Return Long-CLIP's longer table, row by row as the paper has it."""
    rows = [old[i] for i in range(20)]
    for i in range(20, len(old) - 1):
        rows += [(1 - k / 4) * old[i] + k / 4 * old[i + 1] for k in range(4)]
    rows += [old[-1] + k / 4 * (old[-1] - old[-2]) for k in range(4)]
    return torch.stack(rows)


def test_long_clips_stretching() -> None:
    old = torch.randn(77, 6, dtype=torch.float64)
    new = stretch_positions(old)
    assert new.shape == (248, 6)
    assert torch.equal(new[:20], old[:20])
    assert torch.equal(new[20::4], old[20:])
    assert (new - stretched(old)).abs().max() < 1e-15
    half = stretch_positions(old.half())
    assert half.dtype == torch.float16
    assert torch.equal(half, stretched(old.half().double()).half())
    with pytest.raises(ValueError, match="positions: got 21 rows, expected at least 22"):
        stretch_positions(old[:21])


def test_long_context_by_name() -> None:
    sizes = config(32, 77)
    state = open_clip.CLIP(**sizes).state_dict()
    made = clipfast.create_model(sizes, context_length=248, weights=state, text_positions="longclip")
    assert torch.equal(made.positional_embedding, stretch_positions(state["positional_embedding"]))
    linear = clipfast.create_model(sizes, context_length=248, weights=state)
    assert torch.equal(linear.positional_embedding, of_open_clip(state, config(32, 248))["positional_embedding"])
    with pytest.raises(ValueError, match=r"77 positions for context_length = 256, expected context_length = 248"):
        clipfast.create_model(sizes, context_length=256, weights=state, text_positions="longclip")


LONG = {
    "openai": ("", "positional_embedding", ""),
    "transformers": ("text_model.embeddings.", "position_embedding", ".weight"),
}


@pytest.mark.parametrize("layout", LONG)
def test_long_clips_two_tables(layout: str) -> None:
    model = clipfast.create_model(config(32, 40))
    before, name, after = LONG[layout]
    theirs = from_openai(tiny.cloned(model.state_dict()), layout)
    del theirs[before + name + after]
    upto = (torch.arange(40) < 20).float()[:, None]
    masks = {f"{before}mask1": upto, f"{before}mask2": 1 - upto}
    for first_is, beside, prefix in itertools.product(("", "_ori"), ({}, masks), ("", "module.")):
        first, second = torch.randn(2, 40, 48)
        tables = {f"{before}{name}{first_is}{after}": first, f"{before}{name}_res{after}": second}
        load_weights(model, {prefix + k: v for k, v in (theirs | tables | beside).items()})
        # what Long-CLIP's encode_text adds to the embeddings
        assert torch.equal(model.positional_embedding, first * upto + second * (1 - upto))


def test_long_clips_tables_that_do_not_fit() -> None:
    state = open_clip.CLIP(**config(32, 40)).state_dict()
    model = clipfast.create_model(config(32, 40))
    with pytest.raises(ValueError, match=r"Long-CLIP's positional_embedding_res \(30, 48\), expected a first table"):
        load_weights(model, state | {"positional_embedding_res": torch.ones(30, 48)})
    alone = {k: v for k, v in state.items() if k != "positional_embedding"}
    with pytest.raises(ValueError, match=r"got none beside Long-CLIP's positional_embedding_res"):
        load_weights(model, alone | {"positional_embedding_res": torch.ones(40, 48)})
    with pytest.raises(ValueError, match="Long-CLIP's masks"):
        load_weights(model, state | {"positional_embedding_res": torch.ones(40, 48), "mask1": torch.ones(40, 1)})
    with pytest.raises(ValueError, match="unexpected: mask1"):
        load_weights(model, state | {"mask1": torch.ones(40, 1)})
