"""SigLIP's, NaFlex's, MetaCLIP 2's and CLIPA's weights of every library load, compute the same, and go back bitwise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax_siglip
import numpy as np
import pytest
import tiny
import tiny_siglip
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import clipfast
from clipfast.models.checkpoint_files import read_state_dict
from clipfast.models.key_layouts import detect_layout, from_openai, is_naflex, to_openai
from clipfast.models.stated import stated_heads
from clipfast.models.weights import convert_weights, load_weights


def compare(mine: Tensor, theirs: Tensor) -> None:
    assert mine.dtype == theirs.dtype == torch.float64
    error = (mine - theirs).abs().max() / theirs.abs().max()
    assert error <= 1e-10, error


def both(model: nn.Module) -> tuple[Tensor, Tensor]:
    return model.encode_image(tiny_siglip.images()), model.encode_text(tiny_siglip.tokens())


def clip_inputs() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 98, (3, 16), generator=torch.Generator().manual_seed(3))
    ids[:, 9:] = 99
    return tiny_siglip.images(32), ids


def transformers_features(model: nn.Module) -> tuple[Tensor, Tensor]:
    image = model.get_image_features(pixel_values=tiny_siglip.images()).pooler_output
    return image, model.get_text_features(input_ids=tiny_siglip.tokens()).pooler_output


def naflex_features(model: nn.Module) -> tuple[Tensor, Tensor]:
    pixels = tiny_siglip.patches(tiny_siglip.images())
    shapes = torch.tensor([[3, 3]] * 3)
    mask = torch.ones(3, 9, dtype=torch.int64)
    image = model.get_image_features(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes)
    return image.pooler_output, model.get_text_features(input_ids=tiny_siglip.tokens()).pooler_output


@dataclass
class Source:
    """A rival's model, in which layout its state dict is, and the clipfast model that takes it."""

    layout: str
    make: Callable[[], nn.Module]
    mine: Callable[[], nn.Module]
    theirs: Callable[[nn.Module], Any]
    ours: Callable[[nn.Module], Any]
    naflex: bool = False
    prefix: str = ""  # of a tower alone, as from_openai writes it and its library does not


def clip(config: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: clipfast.create_model(config, dtype=torch.float64).eval()


def vit(**more: Any) -> Callable[[], nn.Module]:
    return lambda: clipfast.ViT(**tiny_siglip.clipfast_vit(**more)).double().eval()


def text(**more: Any) -> Callable[[], nn.Module]:
    sizes = tiny_siglip.TEXT | {"output_dim": 64, "approximate": "tanh"} | more
    return lambda: clipfast.TextTransformer(**sizes).double().eval()


def image_of(model: nn.Module) -> Tensor:
    return model(tiny_siglip.images())


def text_of(model: nn.Module) -> Tensor:
    return model(tiny_siglip.tokens())


def pooled_image(model: nn.Module) -> Tensor:
    return model(pixel_values=tiny_siglip.images()).pooler_output


def pooled_text(model: nn.Module) -> Tensor:
    return model(input_ids=tiny_siglip.tokens()).pooler_output


def timm(**more: Any) -> Callable[[], nn.Module]:
    return lambda: tiny_siglip.timm_vit(**more)


SOURCES = {
    "transformers Siglip": Source(
        "transformers",
        lambda: transformers.SiglipModel(tiny_siglip.siglip_config()),
        clip(tiny_siglip.SIGLIP),
        transformers_features,
        both,
    ),
    "transformers Siglip2": Source(
        "transformers",
        lambda: transformers.Siglip2Model(tiny_siglip.siglip2_config()),
        clip(tiny_siglip.SIGLIP),
        naflex_features,
        both,
        naflex=True,
    ),
    "transformers SiglipVision": Source(
        "transformers",
        lambda: transformers.SiglipVisionModel(tiny_siglip.siglip_config().vision_config),
        vit(),
        pooled_image,
        image_of,
        prefix="vision_model.",
    ),
    "transformers SiglipText": Source(
        "transformers",
        lambda: transformers.SiglipTextModel(tiny_siglip.siglip_config().text_config),
        text(),
        pooled_text,
        text_of,
        prefix="text_model.",
    ),
    "transformers MetaClip2": Source(
        "transformers",
        lambda: transformers.MetaClip2Model(tiny_siglip.metaclip2_config()),
        clip(tiny.CONFIG),
        lambda model: (
            model.get_image_features(pixel_values=clip_inputs()[0]).pooler_output,
            model.get_text_features(input_ids=clip_inputs()[1]).pooler_output,
        ),
        lambda model: (model.encode_image(clip_inputs()[0]), model.encode_text(clip_inputs()[1])),
    ),
    "open_clip SigLIP": Source("open_clip", tiny_siglip.open_clip_siglip, clip(tiny_siglip.ERF_SIGLIP), both, both),
    "open_clip SigLIP image": Source(
        "open_clip", lambda: tiny_siglip.open_clip_siglip().visual, vit(approximate="none"), image_of, image_of
    ),
    "open_clip over timm's mean, with a projection": Source(
        "open_clip",
        tiny_siglip.open_clip_mean,
        clip(tiny_siglip.MEAN),
        lambda model: (model.encode_image(tiny_siglip.images()), model.encode_text(clip_inputs()[1])),
        lambda model: (model.encode_image(tiny_siglip.images()), model.encode_text(clip_inputs()[1])),
    ),
    "open_clip SigLIP text": Source(
        "openai", lambda: tiny_siglip.open_clip_siglip().text, text(approximate="none"), text_of, text_of
    ),
    "open_clip CLIPA": Source(
        "openai",
        tiny_siglip.open_clip_clipa,
        clip(tiny_siglip.CLIPA),
        lambda model: (model.encode_image(clip_inputs()[0]), model.encode_text(clip_inputs()[1])),
        lambda model: (model.encode_image(clip_inputs()[0]), model.encode_text(clip_inputs()[1])),
    ),
    "timm SigLIP": Source("timm", timm(), vit(approximate="none"), image_of, image_of),
    "timm mean": Source(
        "timm",
        timm(name="vit_base_patch16_siglip_gap_224"),
        vit(approximate="none", pool_type="avg"),
        image_of,
        image_of,
    ),
    "timm norm behind the mean": Source(
        "timm",
        timm(name="vit_base_patch16_siglip_gap_224", fc_norm=True),
        vit(approximate="none", pool_type="avg", final_ln_after_pool=True),
        image_of,
        image_of,
    ),
    "timm registers, LayerScale, no bias, projection": Source(
        "timm",
        timm(
            name="vit_base_patch16_siglip_gap_224",
            reg_tokens=2,
            no_embed_class=True,
            init_values=1e-5,
            qkv_bias=False,
            num_classes=20,
        ),
        vit(approximate="none", pool_type="avg", reg_tokens=2, ls_init_value=1e-5, qkv_bias=False, output_dim=20),
        image_of,
        image_of,
    ),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> Source:
    return SOURCES[request.param]


def made(source: Source) -> nn.Module:
    theirs = tiny_siglip.drawn(source.make())
    if isinstance(getattr(theirs, "head", None), nn.Linear) and source.layout == "timm":
        nn.init.zeros_(theirs.head.bias)
    return theirs


def test_loads_computes_the_same_and_goes_back_bitwise(source: Source, tmp_path: Path) -> None:
    theirs = made(source)
    state = theirs.state_dict()
    assert detect_layout(state) == source.layout
    assert is_naflex(state) is source.naflex
    mine = load_weights(source.mine(), state)
    with torch.no_grad():
        expected, actual = source.theirs(theirs), source.ours(mine)
    for one, other in zip(*((v if isinstance(v, tuple) else (v,)) for v in (actual, expected)), strict=True):
        compare(one, other)
    # back by the file that convert writes, as the source is: nobody has to say that it is NaFlex
    convert_weights(state, tmp_path / "back.safetensors", source.layout)
    back = read_state_dict(tmp_path / "back.safetensors")
    if source.layout == "open_clip" and not any(k.startswith("visual.") for k in state):
        back = {k.removeprefix("visual."): v for k, v in back.items()}  # an image tower alone
    tiny.assert_same_state({k.removeprefix(source.prefix): v for k, v in back.items()}, state)
    # and a rival takes what a clipfast model holds
    fresh = source.make().double()
    own = mine.state_dict()
    if not any(k.startswith(("visual.", "token_embedding.")) for k in own):
        own = {f"visual.{k}": v for k, v in own.items()}
    after = getattr(mine, "final_ln_after_pool", False)
    converted = from_openai(own, source.layout, naflex=source.naflex, norm_after_pool=after)
    if source.layout == "open_clip" and "logit_scale" not in own:
        converted = {k.removeprefix("visual."): v for k, v in converted.items()}
    fresh.load_state_dict({k.removeprefix(source.prefix): v for k, v in converted.items()}, strict=True)
    tiny.assert_same_state(fresh.state_dict(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["openai", "open_clip", "transformers", "big_vision"])
@pytest.mark.parametrize("naflex", [False, True])
def test_own_weights_there_and_back_are_bitwise(tmp_path: Path, layout: str, naflex: bool, dtype: torch.dtype) -> None:
    state = tiny_siglip.drawn(clip(tiny_siglip.SIGLIP)()).to(dtype).state_dict()
    path = tmp_path / ("there.npz" if layout == "big_vision" else "there.safetensors")
    if naflex and layout in ("openai", "open_clip"):
        with pytest.raises(ValueError, match=f"naflex: got True with layout '{layout}', expected one of transformers"):
            convert_weights(state, path, layout, naflex=True)
        return
    convert_weights(state, path, layout, naflex=naflex, heads=(2, 2))
    tiny.assert_same_state(to_openai(read_state_dict(path)), state)


@pytest.mark.parametrize("naflex", [False, True])
def test_image_towers_go_to_timm_and_back_bitwise(naflex: bool) -> None:
    state = tiny_siglip.drawn(clip(tiny_siglip.SIGLIP)()).state_dict()
    state = {k: v for k, v in state.items() if k.startswith("visual.")}
    converted = from_openai(state, "timm", naflex=naflex)
    assert ("embeds.pos_embed" in converted) is naflex
    tiny.assert_same_state(to_openai(converted), state)


@pytest.mark.parametrize("side", [(3, 3), (1, 9)])
def test_timm_takes_naflex_weights(side: tuple[int, int], tmp_path: Path) -> None:
    """timm's NaFlexVit has the positions in a grid and embeds patches by a matrix."""
    import timm as library

    rival = library.create_model(
        "naflexvit_base_patch16_siglip", embed_dim=64, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=0,
        pos_embed_grid_size=side,
    )  # fmt: skip
    state = tiny_siglip.drawn(rival).state_dict()
    assert is_naflex(state)
    square = side == (3, 3)
    mine = load_weights(vit()(), state, resize=not square)
    assert torch.equal(mine.positional_embedding, state["embeds.pos_embed"].flatten(0, 2)) is square
    # the grid is the source's
    convert_weights(state, tmp_path / "back.safetensors", "timm")
    tiny.assert_same_state(read_state_dict(tmp_path / "back.safetensors"), state)
    own = {f"visual.{k}": v for k, v in mine.state_dict().items()} | {"visual.positional_embedding": torch.ones(8, 64)}
    with pytest.raises(ValueError, match="pos_embed: got 8 rows, expected 2·2 for NaFlex's grid"):
        from_openai(own, "timm", naflex=True)


@pytest.mark.parametrize("custom_text", [False, True])
def test_clipa_with_and_without_a_prefix_of_text(custom_text: bool) -> None:
    state = tiny_siglip.drawn(tiny_siglip.open_clip_clipa(custom_text)).state_dict()
    mine = load_weights(clip(tiny_siglip.CLIPA)(), state)
    # open_clip reads the plain keys into both of its classes
    back = from_openai(mine.state_dict(), "open_clip")
    tiny.assert_same_state(back, {k.removeprefix("text."): v for k, v in state.items()})


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", ["fixed", "naflex"])
@pytest.mark.parametrize("saved", ["float32", "bfloat16", "no params/", "beside an optimizer"])
def test_big_vision(tmp_path: Path, stacked: bool, kind: str, saved: str) -> None:
    make = SOURCES["transformers Siglip" if kind == "fixed" else "transformers Siglip2"].make
    theirs = tiny_siglip.drawn(make()).float()
    if saved == "bfloat16":
        theirs = theirs.bfloat16().float()
    arrays = flax_siglip.arrays(theirs, stacked=stacked)
    arrays = flax_siglip.naflex(arrays, (3, 3)) if kind == "naflex" else arrays
    if saved == "bfloat16":
        arrays = flax_siglip.bfloat16(arrays)
    elif saved == "no params/":
        arrays = {k.removeprefix("params/"): v for k, v in arrays.items()}
    elif saved == "beside an optimizer":
        arrays |= {"opt/0/mu/img/embedding/bias": np.ones(64, np.float32), "extra/step": np.array(7)}
    np.savez(tmp_path / "siglip.npz", **arrays)
    mine = clipfast.create_model(tiny_siglip.SIGLIP, weights=tmp_path / "siglip.npz", dtype=torch.float64).eval()
    features = transformers_features if kind == "fixed" else naflex_features
    with torch.no_grad():
        for one, other in zip(both(mine), features(theirs.double()), strict=True):
            compare(one, other)
    # back to an .npz: the same arrays, block by block
    convert_weights(tmp_path / "siglip.npz", tmp_path / "back.npz", "big_vision")
    expected = flax_siglip.arrays(theirs.float())
    expected = flax_siglip.naflex(expected, (3, 3)) if kind == "naflex" else expected
    expected = flax_siglip.bfloat16(expected) if saved == "bfloat16" else expected
    with np.load(tmp_path / "back.npz", allow_pickle=False) as back:
        assert set(back) == set(expected)
        for name, value in expected.items():
            assert back[name].dtype == value.dtype, name
            assert back[name].shape == value.shape, name
            assert back[name].tobytes() == value.tobytes(), name


def test_towers_take_their_share_of_a_whole_model() -> None:
    for name in ("transformers Siglip", "open_clip SigLIP"):
        theirs = tiny_siglip.drawn(SOURCES[name].make())
        whole = to_openai(theirs.state_dict())
        image, captions = load_weights(vit()(), theirs.state_dict()), load_weights(text()(), theirs.state_dict())
        tiny.assert_same_state({f"visual.{k}": v for k, v in image.state_dict().items()} | captions.state_dict() | {
            k: whole[k] for k in ("logit_scale", "logit_bias")
        }, whole)  # fmt: skip


def test_towers_with_the_prefix_that_transformers_4_wrote() -> None:
    for name in ("transformers SiglipVision", "transformers SiglipText"):
        source = SOURCES[name]
        state = tiny_siglip.drawn(source.make()).state_dict()
        old = {source.prefix + k: v for k, v in state.items()}
        tiny.assert_same_state(
            load_weights(source.mine(), old).state_dict(), load_weights(source.mine(), state).state_dict()
        )


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(
    "name", ["transformers SiglipVision", "open_clip SigLIP", "open_clip SigLIP image", "timm SigLIP"]
)
def test_wrappers_are_taken_off(name: str, wrapper: str) -> None:
    state = SOURCES[name].make().state_dict()
    tiny.assert_same_state(to_openai({wrapper + k: v for k, v in state.items()}), to_openai(state))


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    return tiny_siglip.drawn(transformers.SiglipForImageClassification(tiny_siglip.siglip_config(num_labels=5)))


class TestClassifiers:
    """transformers' image classifiers: a tower, a pooling that they do not use, and a linear layer of no place here."""

    def test_the_mean_of_tokens_is_what_the_classifier_reads(self, classifier: nn.Module) -> None:
        tower = load_weights(vit(pool_type="avg")(), classifier.state_dict())
        with torch.no_grad():
            logits = classifier.classifier(tower(tiny_siglip.images()))
            compare(logits, classifier(pixel_values=tiny_siglip.images()).logits)

    def test_the_tower_loads_with_its_pooling_too(self, classifier: nn.Module) -> None:
        tower = load_weights(vit()(), classifier.state_dict())
        with torch.no_grad():
            compare(tower(tiny_siglip.images()), classifier.vision_model(tiny_siglip.images()).pooler_output)

    def test_the_linear_layer_is_refused_elsewhere(self, classifier: nn.Module, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"unexpected: classifier\.weight, classifier\.bias"):
            load_weights(clip(tiny_siglip.SIGLIP)(), classifier.state_dict())
        with pytest.raises(ValueError, match=r"no place for: classifier\.weight, classifier\.bias"):
            convert_weights(classifier.state_dict(), tmp_path / "w.pt", "transformers")


@pytest.mark.parametrize(
    ("kind", "config", "tower"),
    [
        (transformers.CLIPForImageClassification, lambda: tiny.transformers_clip().config, tiny.vit),
        (transformers.MetaClip2ForImageClassification, tiny_siglip.metaclip2_config, tiny.vit),
        (transformers.Siglip2ForImageClassification, tiny_siglip.siglip2_config, vit()),
    ],
    ids=["CLIP", "MetaClip2", "Siglip2"],
)
def test_towers_of_other_classifiers(kind: type, config: Callable, tower: Callable) -> None:
    theirs = tiny_siglip.drawn(kind(config()))
    # CLIP's hold no projection
    mine = tower() if "Siglip2" in kind.__name__ else tower(output_dim=None)
    load_weights(mine.double(), theirs.state_dict())
    kept = {f"visual.{k}": v for k, v in mine.state_dict().items()}
    written = from_openai(kept, "transformers", naflex="Siglip2" in kind.__name__)
    tiny.assert_same_state(written, {k: v for k, v in theirs.state_dict().items() if not k.startswith("classifier.")})


def renamed(state: Mapping[str, Tensor], key: str) -> str:
    """Return the one key of a state dict that ends with ``key``, or the first of blocks'."""
    return next(k for k in state if k.endswith(key))


FAULTS = {
    "transformers": (
        "head.probe",
        "head.attention.in_proj_bias",
        "text_model.head.bias",
        "logit_bias",
        "mlp.fc1.weight",
    ),
    "open_clip": ("attn_pool.latent", "attn_pool.norm.bias", "text_projection.bias", "logit_bias", "mlp.fc1.weight"),
    "big_vision": ("MAPHead_0/probe", "out/kernel", "txt/head/bias", "params/b", "Dense_0/kernel"),
}


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    own = tiny_siglip.drawn(clip(tiny_siglip.SIGLIP)()).state_dict()
    return {layout: from_openai(own, layout, heads=(2, 2)) for layout in FAULTS}


@pytest.mark.parametrize(("layout", "key"), [(layout, key) for layout, keys in FAULTS.items() for key in keys])
def test_what_does_not_fit_is_listed_and_nothing_loaded(
    layout: str, key: str, states: dict[str, dict[str, Tensor]]
) -> None:
    state = states[layout]
    name = renamed(state, key)
    model = clip(tiny_siglip.SIGLIP)()
    before = tiny.cloned(model.state_dict())
    without = {k: v for k, v in state.items() if k != name}
    with pytest.raises(ValueError, match="1 missing"):
        load_weights(model, without)
    with pytest.raises(ValueError, match=r"unexpected: .*surplus"):
        load_weights(model, state | {"surplus": torch.ones(1)})
    cut = state[name].expand(2, *state[name].shape).flatten(0, 1 if state[name].dim() else 0)
    with pytest.raises(ValueError, match="1 misshapen"):
        load_weights(model, state | {name: cut})
    with pytest.raises(ValueError, match="1 not floating point"):
        load_weights(model, state | {name: state[name].round().long()})
    tiny.assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize(
    ("layout", "pattern"),
    [
        ("transformers", r"encoder\.layers\.0\.self_attn\.k_proj\.weight"),
        ("open_clip", r"attn_pool\.kv\.weight"),
        ("open_clip", r"attn_pool\.q\.bias"),
        ("big_vision", r"query/bias"),
        ("big_vision", r"value/kernel"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "shape", "dtype"])
def test_parts_of_a_projection_must_be_there_and_alike(
    layout: str, pattern: str, fault: str, states: dict[str, dict[str, Tensor]]
) -> None:
    state = dict(states[layout])
    name = renamed(state, pattern.replace("\\", ""))
    value = state.pop(name)
    if fault != "missing":
        state[name] = value[:-1] if fault == "shape" else value.half()
    with pytest.raises(ValueError, match=r"state dict: got .* for .*in_proj_(weight|bias), expected"):
        to_openai(state)


class TestTextThatDoesNotProject:
    """SigLIP so400m's multilingual text tower has no projection, and transformers an identity in its place."""

    CONFIG = tiny_siglip.SIGLIP | {
        "text_cfg": tiny_siglip.TEXT | {"width": 64, "proj_bias": False, "proj_type": "none"}
    }

    def state(self) -> dict[str, Tensor]:
        state = tiny_siglip.drawn(clip(self.CONFIG)()).state_dict()
        assert not any(k.startswith("text_projection") for k in state)
        return state

    def test_transformers_gets_the_identity_and_gives_it_back(self) -> None:
        state = self.state()
        config = tiny_siglip.siglip_config()
        config.text_config.hidden_size, config.text_config.intermediate_size = 64, 128
        theirs = transformers.SiglipModel(config).double().eval()
        theirs.load_state_dict(from_openai(state, "transformers"), strict=True)
        mine = load_weights(clip(self.CONFIG)(), theirs.state_dict())
        tiny.assert_same_state(mine.state_dict(), state)
        with torch.no_grad():
            compare(both(mine)[1], transformers_features(theirs)[1])
        tower = tiny_siglip.TEXT | {"width": 64, "output_dim": None, "approximate": "tanh", "proj_bias": False}
        load_weights(clipfast.TextTransformer(**tower).double(), theirs.state_dict())

    @pytest.mark.parametrize("key", ["text_model.head.weight", "text_model.head.bias"])
    def test_another_projection_is_not_dropped(self, key: str) -> None:
        weights = from_openai(self.state(), "transformers")
        weights[key].view(-1)[3] += 1e-6
        with pytest.raises(ValueError, match=r"2 unexpected: text_projection\.weight, text_projection\.bias"):
            load_weights(clip(self.CONFIG)(), weights)

    @pytest.mark.parametrize("layout", ["openai", "open_clip", "big_vision"])
    def test_the_others_have_none(self, layout: str) -> None:
        state = self.state()
        tiny.assert_same_state(to_openai(from_openai(state, layout, heads=(2, 2))), state)


def test_a_bias_of_logits_needs_a_place() -> None:
    with_bias = tiny_siglip.drawn(clip(tiny_siglip.SIGLIP)()).state_dict()
    without = {k: v for k, v in with_bias.items() if k != "logit_bias"}
    config = {k: v for k, v in tiny_siglip.SIGLIP.items() if k != "init_logit_bias"}
    with pytest.raises(ValueError, match="1 unexpected: logit_bias"):
        load_weights(clip(config)(), with_bias)
    with pytest.raises(ValueError, match="1 missing: logit_bias"):
        load_weights(clip(tiny_siglip.SIGLIP)(), without)


def test_transformers_has_no_class_of_both_families() -> None:
    state = tiny.open_clip_clip(init_logit_bias=-10.0).state_dict()
    with pytest.raises(ValueError, match="no place for: logit_bias"):
        from_openai(state, "transformers")
    siglip = clip(tiny_siglip.SIGLIP)().state_dict()
    mixed = {k: v for k, v in tiny.open_clip_clip().state_dict().items() if k.startswith("visual.")}
    mixed |= {k: v for k, v in siglip.items() if not k.startswith("visual.")}
    with pytest.raises(ValueError, match=r"no place for: .*text_projection\.weight"):
        from_openai(mixed, "transformers")


class TestGelu:
    """Each tower's GELU is known where a configuration or the format says it."""

    def test_big_vision_is_tanh(self, tmp_path: Path) -> None:
        own = clip(tiny_siglip.SIGLIP)().state_dict()
        convert_weights(own, tmp_path / "w.npz", "big_vision", heads=(2, 2))
        for wrong in (tiny_siglip.ERF_SIGLIP, tiny_siglip.SIGLIP | {"approximate": "quick"}):
            with pytest.raises(ValueError, match=r"expected 'tanh', which the weights.*-tanhgelu"):
                load_weights(clip(wrong)(), tmp_path / "w.npz")

    @pytest.mark.parametrize("tower", ["image", "text"])
    def test_one_tower_alone(self, tower: str, tmp_path: Path) -> None:
        config = tiny_siglip.siglip_config()
        (config.vision_config if tower == "image" else config.text_config).hidden_act = "gelu"
        transformers.SiglipModel(config).save_pretrained(tmp_path)
        mixed = tiny_siglip.SIGLIP | {"approximate": "none" if tower == "text" else "tanh"}
        mixed |= {"vision_cfg": tiny_siglip.VISION | {"approximate": "none" if tower == "image" else "tanh"}}
        load_weights(clip(mixed)(), tmp_path)
        with pytest.raises(ValueError, match=f"got approximate='tanh' in the {tower} tower, expected 'none'"):
            load_weights(clip(tiny_siglip.SIGLIP)(), tmp_path)
        other = vit() if tower == "text" else text()
        load_weights(other(), tmp_path)


class TestResize:
    """Positions without a class token, and text of another length."""

    def test_images_of_another_size_as_timm(self) -> None:
        from timm.layers import resample_abs_pos_embed

        state = tiny_siglip.drawn(clip(tiny_siglip.SIGLIP)()).state_dict()
        for layout in ("openai", "transformers", "big_vision"):
            weights = from_openai(state, layout, heads=(2, 2))
            config = tiny_siglip.SIGLIP
            larger = clipfast.create_model(config, image_size=(64, 96), weights=weights, dtype=torch.float64)
            positions = resample_abs_pos_embed(
                state["visual.positional_embedding"][None], [4, 6], [3, 3], num_prefix_tokens=0
            )[0]
            # timm resamples in float32
            torch.testing.assert_close(larger.visual.positional_embedding.detach(), positions, rtol=0, atol=1e-6)
            assert larger.visual.positional_embedding.shape == (24, 64)
        with pytest.raises(ValueError, match=r"misshapen: visual\.positional_embedding \(got \(9, 64\), expected"):
            load_weights(clip(config | {"vision_cfg": tiny_siglip.VISION | {"image_size": 64}})(), state)

    def test_a_grid_of_big_vision_is_known(self, tmp_path: Path) -> None:
        tall = tiny_siglip.SIGLIP | {"vision_cfg": tiny_siglip.VISION | {"image_size": (64, 32)}}
        state = tiny_siglip.drawn(clip(tall)()).state_dict()
        weights = from_openai(state, "big_vision", heads=(2, 2), naflex=True, grid=(4, 2))
        resized = load_weights(clip(tiny_siglip.SIGLIP)(), weights, resize=True)
        expected = load_weights(clip(tiny_siglip.SIGLIP)(), state, resize=True, grid=(4, 2))
        tiny.assert_same_state(resized.state_dict(), expected.state_dict())

    def test_text_of_another_length_as_open_clip(self) -> None:
        from open_clip.model import resize_text_pos_embed

        state = tiny_siglip.drawn(clip(tiny_siglip.SIGLIP)()).state_dict()
        longer = clipfast.create_model(tiny_siglip.SIGLIP, context_length=20, weights=state, dtype=torch.float64)
        rival = tiny_siglip.open_clip_siglip()
        rival.text.positional_embedding = nn.Parameter(torch.zeros(20, 48))
        rival.text.context_length = rival.text.num_pos = 20
        theirs = {"positional_embedding": state["positional_embedding"].clone()}
        resize_text_pos_embed(theirs, rival.text)
        assert torch.equal(longer.positional_embedding, theirs["positional_embedding"])


def test_heads_of_big_vision_are_asked_for_where_nothing_tells(tmp_path: Path) -> None:
    state = clip(tiny_siglip.SIGLIP)().state_dict()
    with pytest.raises(ValueError, match=r"heads: got none for .* of width (64|48), expected \(image, text\)"):
        convert_weights(state, tmp_path / "w.npz", "big_vision")
    with pytest.raises(ValueError, match="heads: got 5 for .*, expected a divisor of the width"):
        convert_weights(state, tmp_path / "w.npz", "big_vision", heads=(5, 2))
    for heads in ((2,), (0, 2), (2, -2), (2.0, 2)):
        with pytest.raises(ValueError, match=r"heads: got .*, expected \(image, text\), each at least 1"):
            convert_weights(state, tmp_path / "w.npz", "big_vision", heads=heads)
    assert not list(tmp_path.iterdir())
    # a configuration beside the weights tells them, and so do big_vision's own variants' widths
    (tmp_path / "model").mkdir()
    tiny_siglip.drawn(SOURCES["transformers Siglip"].make()).save_pretrained(tmp_path / "model")
    convert_weights(tmp_path / "model", tmp_path / "w.npz", "big_vision")
    with np.load(tmp_path / "w.npz") as arrays:
        assert arrays["params/img/MAPHead_0/MultiHeadDotProductAttention_0/query/bias"].shape == (2, 32)
        assert arrays["params/txt/Encoder_0/encoderblock_0/MultiHeadDotProductAttention_0/query/bias"].shape == (2, 24)
    wide = {"visual.transformer.resblocks.0.attn.in_proj_bias": torch.zeros(3 * 1152)}
    name = "params/img/Transformer/encoderblock_0/MultiHeadDotProductAttention_0/key/bias"
    assert from_openai(wide, "big_vision")[name].shape == (16, 72)


@pytest.mark.parametrize(
    ("file", "values", "heads"),
    [
        ("config.json", {"model_type": "siglip"}, (12, 12)),
        ("config.json", {"model_type": "siglip", "vision_config": {"num_attention_heads": 16}}, (16, None)),
        ("config.json", {"model_type": "siglip", "vision_config": {"hidden_size": 1152}, "text_config": {}}, (12, 12)),
        ("config.json", {"model_type": "siglip_text_model", "num_attention_heads": 4}, (None, 4)),
        ("config.json", {"model_type": "clip", "text_config": {}}, (None, 8)),
        ("model.json", {"vision_cfg": {"width": 96, "head_width": 32}, "text_cfg": {"heads": 5}}, (3, 5)),
        (
            "open_clip_config.json",
            {"model_cfg": {"vision_cfg": {"timm_model_name": "x"}, "text_cfg": {}}},
            (None, None),
        ),
        ("other.json", {}, (None, None)),
    ],
)
def test_heads_that_a_configuration_states(file: str, values: dict, heads: tuple, tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps(values))
    assert stated_heads(tmp_path) == heads


def test_a_folder_says_where_timms_last_norm_stands(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(clipfast.CLIPConfig.from_dict(tiny_siglip.CLIPA).to_dict()))
    state = clip(tiny_siglip.CLIPA)().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    for source, name in ((tmp_path, "fc_norm.weight"), (state, "norm.weight")):
        convert_weights(source, tmp_path / "out.safetensors", "timm")
        written = read_state_dict(tmp_path / "out.safetensors")
        assert torch.equal(written[name], state["visual.ln_post.weight"])


def test_a_naflex_folder_stays_one(tmp_path: Path) -> None:
    """What the configuration beside the weights says is followed, and --no-naflex overrules it."""
    own = clip(tiny_siglip.SIGLIP)()
    (tmp_path / "model.json").write_text(json.dumps(clipfast.CLIPConfig.from_dict(tiny_siglip.NAFLEX).to_dict()))
    save_file(own.state_dict(), tmp_path / "model.safetensors")
    for naflex, dims in ((None, 2), (True, 2), (False, 4)):
        convert_weights(tmp_path, tmp_path / "out.safetensors", "transformers", naflex=naflex)
        written = read_state_dict(tmp_path / "out.safetensors")
        assert written["vision_model.embeddings.patch_embedding.weight"].dim() == dims
