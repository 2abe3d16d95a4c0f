"""A tower's options: pooling, mask, prefix tokens, LayerScale and biases, each against plain PyTorch or a rival."""

from __future__ import annotations

import copy
import math
from functools import partial

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from dense_towers import assert_same_as_dense, image_tower, outputs_and_gradients, rows_seen, text_tower
from oracle import assert_as_exact_as_reference, relative_error
from tiny import drawn
from torch import Tensor, nn

import clipfast
from clipfast.modules.pooling import AttentionPool
from clipfast.modules.shortcuts import exact_shortcuts

BOUND = 1e-12
SIGLIP = {"pool_type": "map", "class_token": False, "no_ln_pre": True, "patch_bias": True, "norm_eps": 1e-6}
BIDIRECTIONAL = {"pool_type": "last", "no_causal_mask": True, "proj_bias": True, "norm_eps": 1e-6}
CONTEXT, BATCH = 12, 4


def siglip(**changes: object) -> clipfast.ViT:
    return drawn(image_tower(output_dim=None, **SIGLIP, **changes))


def text(**changes: object) -> clipfast.TextTransformer:
    return drawn(text_tower(context_length=CONTEXT, **changes))


def tokens(model: clipfast.TextTransformer, batch: int = BATCH) -> Tensor:
    """Return ids whose first EOS lies anywhere."""
    ids = torch.randint(1, model.vocab_size - 1, (batch, CONTEXT), generator=torch.Generator().manual_seed(0))
    ids[torch.arange(batch), torch.arange(batch) % (CONTEXT - 3) + 2] = model.eos_id
    return ids


def pictures(batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pool_type", ["eos", "argmax", "last", "first"])
def test_text_is_read_where_it_should_and_shortcuts_change_nothing(pool_type: str, bidirectional: bool) -> None:
    model = text(pool_type=pool_type, no_causal_mask=bidirectional, proj_bias=bidirectional)
    ids = tokens(model)
    features, rows = model.forward_features(ids), torch.arange(BATCH)
    ends = {"eos": (ids == model.eos_id).int().argmax(-1), "argmax": ids.argmax(-1), "last": CONTEXT - 1, "first": 0}
    pooled = features[rows, ends[pool_type]]
    expected = model.text_projection(pooled) if bidirectional else pooled @ model.text_projection
    assert relative_error(model(ids), expected) <= BOUND
    assert relative_error(model.forward_intermediates(ids)["text_features"], expected) <= BOUND
    assert_same_as_dense(model, ids)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # padding is attended to: the last block alone computes one token a caption
        (BIDIRECTIONAL, [BATCH * CONTEXT, BATCH * CONTEXT, BATCH]),
        ({"pool_type": "first", "no_causal_mask": True}, [BATCH * CONTEXT, BATCH * CONTEXT, BATCH]),
        ({"pool_type": "eos", "no_causal_mask": True}, [BATCH * CONTEXT, BATCH * CONTEXT, BATCH]),
        ({"pool_type": "last"}, [BATCH * CONTEXT, BATCH * CONTEXT, BATCH]),
        # the first token sees no other
        ({"pool_type": "first"}, [BATCH, BATCH, BATCH]),
    ],
)
def test_what_text_towers_leave_out(changes: dict, expected: list[int]) -> None:
    model = text(**changes)
    with rows_seen(model) as seen:
        model(tokens(model))
    assert seen == expected
    seen.clear()
    with exact_shortcuts(False), rows_seen(model) as seen:
        model(tokens(model))
    assert seen == [BATCH * CONTEXT] * 3


def test_padding_counts_where_it_is_attended_to() -> None:
    model = text(**BIDIRECTIONAL)
    assert not model.ignores_padding
    assert text().ignores_padding
    ids = tokens(model)
    other = ids.clone()
    other[:, -2] = 7
    assert not torch.allclose(model(ids), model(other))
    # of somebody else's block nobody knows
    foreign = text()
    foreign.transformer.resblocks[0] = nn.Identity()
    assert not foreign.ignores_padding
    assert foreign.attn_mask is not None
    # and no EOS is asked for
    assert model(torch.ones(2, 5, dtype=torch.long)).shape == (2, 24)


@pytest.mark.parametrize(
    "changes",
    [
        SIGLIP,
        SIGLIP | {"reg_tokens": 2, "class_token": True},
        {"pool_type": "avg"},
        {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "class_token": False},
        {"reg_tokens": 3},
        {"ls_init_value": 0.3, "qkv_bias": False},
        {"ls_init_value": 0.3, "pool_type": "map", "patch_dropout": 0.5},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_image_towers_with_and_without_shortcuts(changes: dict) -> None:
    model = drawn(image_tower(**changes))
    assert_same_as_dense(model, pictures())
    before = outputs_and_gradients(model, pictures())
    model.set_grad_checkpointing()
    for name, value in outputs_and_gradients(model, pictures()).items():
        assert relative_error(value, before[name]) <= BOUND, name
    model.eval()
    output = model.forward_intermediates(pictures(), 1, output_extra_tokens=True, output_fmt="NLC")
    assert relative_error(output["image_features"], model(pictures())) <= BOUND
    prefix = model.prefix_tokens
    assert output["image_intermediates"][0].shape == (3, 16, 32)
    found = output.get("image_intermediates_prefix", [torch.empty(3, 0, 32)])[0]
    assert found.shape == (3, prefix, 32)
    assert model.forward_features(pictures()).shape == (3, prefix + 16, 32)
    assert model.get_attention_maps(pictures()).shape == (3, 3, 2, prefix + 16, prefix + 16)


def test_patch_dropout_keeps_the_prefix() -> None:
    model = image_tower(reg_tokens=2, patch_dropout=0.5)
    assert model.transformer.attention_maps(model._embed(pictures())).shape[-1] == 3 + 8
    assert relative_error(model._embed(pictures())[:, :3], model.eval()._embed(pictures())[:, :3]) <= BOUND


def test_prefix_tokens_layer_scale_and_missing_biases_are_timms() -> None:
    rival = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0, reg_tokens=2, init_values=0.3,
        qkv_bias=False, no_embed_class=True, pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )  # fmt: skip
    rival = drawn(rival).double()
    model = image_tower(reg_tokens=2, ls_init_value=0.3, qkv_bias=False, output_dim=None)
    state = rival.state_dict()
    renamed = {
        "class_embedding": state["cls_token"].flatten(),
        "reg_tokens": state["reg_token"][0],
        # timm's class token has no position here
        "positional_embedding": F.pad(state["pos_embed"][0], (0, 0, 1, 0)),
    }
    names = {"patch_embed.proj": "conv1", "norm_pre": "ln_pre", "norm": "ln_post", "attn.proj": "attn.out_proj"}
    names |= {"norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for key, value in state.items():
        name = key.replace("blocks.", "transformer.resblocks.").replace("attn.qkv.", "attn.in_proj_")
        head, _, last = name.rpartition(".")
        for old, new in names.items():
            if head == old or head.endswith(f".{old}"):
                head = head.removesuffix(old) + new
        if head:
            renamed[f"{head}.{last}" if "in_proj" not in last else name] = value
    renamed = {k.replace("ls1", "ls_1").replace("ls2", "ls_2"): v for k, v in renamed.items()}
    model.load_state_dict(renamed)
    assert relative_error(model.eval()(pictures()), rival.eval()(pictures())) <= BOUND


def test_layer_scale_is_open_clips() -> None:
    block = {"width": 32, "layers": 2, "ls_init_value": 0.2}
    sizes = {
        "embed_dim": 24,
        "vision_cfg": block | {"image_size": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": block | {"context_length": 12, "vocab_size": 50, "heads": 2},
    }
    rival = drawn(open_clip.CLIP(**sizes)).double()
    model = clipfast.create_model(sizes, dtype=torch.float64)
    assert list(model.state_dict()) == list(rival.state_dict())
    model.load_state_dict(rival.state_dict())
    ids = torch.randint(1, 49, (3, 12))
    ids[:, 6] = 49
    for actual, expected in zip(model(pictures(), ids), rival(pictures(), ids), strict=True):
        assert relative_error(actual, expected) <= BOUND


def test_classic_clip_has_the_keys_it_had() -> None:
    sizes = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 1}, "text_cfg": {"layers": 1}}
    with torch.device("meta"):
        rival, model = open_clip.CLIP(**sizes), clipfast.CLIP(clipfast.CLIPConfig.from_dict(sizes))
    assert list(model.state_dict()) == list(rival.state_dict())
    # and its blocks have no module more
    assert [name for name, _ in model.visual.transformer.resblocks[0].named_modules()] == [
        "", "ln_1", "attn", "attn.out_proj", "ln_2", "mlp", "mlp.c_fc", "mlp.c_proj",
    ]  # fmt: skip


class Pool(nn.Module):
    """The head in PyTorch's own modules, as transformers has it."""

    def __init__(self, source: AttentionPool) -> None:
        super().__init__()
        width = source.probe.shape[0]
        self.probe, self.ln, self.mlp = source.probe, nn.LayerNorm(width, eps=source.ln.eps), source.mlp
        self.ln.weight, self.ln.bias = source.ln.weight, source.ln.bias
        self.attention = nn.MultiheadAttention(width, source.attn.heads, batch_first=True)
        self.attention.in_proj_weight, self.attention.in_proj_bias = (
            source.attn.in_proj_weight,
            source.attn.in_proj_bias,
        )
        self.attention.out_proj = source.attn.out_proj

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probe = self.probe.expand(x.shape[0], 1, -1)
        y, weights = self.attention(probe, x, x, average_attn_weights=False)
        return (y + self.mlp(self.ln(y)))[:, 0], weights[:, :, 0]


def results(pool: AttentionPool, x: Tensor, out: Tensor) -> list[Tensor]:
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad((weights * out).sum(), [x, *pool.parameters()])]


@pytest.mark.parametrize("heads", [2, 3])
def test_attention_pool_is_multihead_attention_of_a_probe(heads: int) -> None:
    torch.manual_seed(0)
    pool = drawn(AttentionPool(48, heads, 3.7362, "tanh")).double()
    x = torch.randn(5, 7, 48, dtype=torch.float64, requires_grad=True)
    expected, weights = Pool(pool)(x)
    for a, b in zip(results(pool, x, pool(x)), results(pool, x, expected), strict=True):
        assert relative_error(a, b) <= BOUND
    assert relative_error(pool.weights(x), weights) <= BOUND


def test_attention_pool_of_packed_sequences() -> None:
    torch.manual_seed(0)
    pool = drawn(AttentionPool(32, 2)).double()
    lengths = [3, 9, 1, 9, 4]
    x = torch.randn(sum(lengths), 32, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    alone = torch.cat([pool(part[None]) for part in x.split(lengths)])
    for a, b in zip(results(pool, x, pool(x, offsets)), results(pool, x, alone), strict=True):
        assert relative_error(a, b) <= BOUND


def test_attention_pool_projects_every_token_once() -> None:
    pool, rows = AttentionPool(32, 2), []
    original = F.linear

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append((x.shape[:-1].numel(), weight.shape[0]))
        return original(x, weight, bias)

    # without gradients keys and values are the op library's product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", counting)
        pool(torch.randn(20, 7, 32))
    # keys and values of all tokens once, the probe once, and one row a picture from there on
    assert rows == [(140, 64), (1, 32), (20, 32), (20, 128), (20, 32)]


@pytest.mark.parametrize("batch", [1, 5])
def test_attention_pool_in_single_precision(batch: int) -> None:
    torch.manual_seed(0)
    exact = drawn(AttentionPool(768, 12)).double()
    pool = copy.deepcopy(exact).float()
    x = torch.randn(batch, 9, 768)
    oracle = results(exact, wide := x.double().requires_grad_(), exact(wide))
    fast = results(pool, single := x.clone().requires_grad_(), pool(single))
    reference = results(pool, single := x.clone().requires_grad_(), Pool(pool)(single)[0])
    names = ["output", "x", *(name for name, _ in pool.named_parameters())]
    for name, *found in zip(names, fast, reference, oracle, strict=True):
        assert_as_exact_as_reference(*found, name)


@pytest.mark.parametrize("build", [siglip, lambda: text(**BIDIRECTIONAL)], ids=["image", "text"])
def test_compiled_and_under_autocast(build: object) -> None:
    model = build()
    inputs = tokens(model) if isinstance(model, clipfast.TextTransformer) else pictures()
    expected = outputs_and_gradients(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name, value in outputs_and_gradients(compiled, inputs).items():
        assert relative_error(value, expected[name.replace("_orig_mod.", "")]) <= BOUND, name

    single = copy.deepcopy(model).float()
    inputs = inputs.float() if inputs.is_floating_point() else inputs

    def run() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return outputs_and_gradients(single, inputs)

    fast = run()
    with clipfast.backend("reference"), exact_shortcuts(False):
        reference = run()
    for name, value in fast.items():
        assert_as_exact_as_reference(value.float(), reference[name].float(), expected[name], name, dtype=torch.bfloat16)


def test_initialisation_is_big_visions() -> None:
    torch.manual_seed(0)
    width, hidden, patch = 128, 512, 14
    block = {"width": width, "layers": 2}
    config = {
        "embed_dim": width,
        "vision_cfg": SIGLIP | block | {"image_size": 224, "patch_size": patch, "proj_type": "none"},
        "text_cfg": BIDIRECTIONAL | block | {"context_length": 64, "vocab_size": 500, "heads": 2},
        "init_logit_bias": -10,
        "init_logit_scale": math.log(10),
    }
    model = clipfast.create_model(config).requires_grad_(False)
    assert model.logit_bias.item() == -10
    assert math.isclose(model.logit_scale.exp().item(), 10, rel_tol=1e-6)
    square, mlp, lecun = math.sqrt(6 / (2 * width)), math.sqrt(6 / (width + hidden)), math.sqrt(1 / width)
    pool = model.visual.attn_pool
    for attention, layers in (
        *((b.attn, b.mlp) for t in (model.visual, model) for b in t.transformer.resblocks),
        (pool.attn, pool.mlp),
    ):
        for weight in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
            assert square * 0.99 < weight.abs().max() <= square  # uniform to its edge
            assert math.isclose(weight.std(), square / 3**0.5, rel_tol=0.02)
        assert not attention.in_proj_bias.any()
        for linear in (layers.c_fc, layers.c_proj):
            assert mlp * 0.99 < linear.weight.abs().max() <= mlp
            assert 0.5e-6 < linear.bias.std() < 1.5e-6
    assert 0.8 * math.sqrt(6 / (1 + width)) < pool.probe.abs().max() <= math.sqrt(6 / (1 + width))
    for weight, std in (
        (model.visual.positional_embedding, width**-0.5),
        (model.positional_embedding, width**-0.5),
        (model.token_embedding.weight, width**-0.5),
        (model.text_projection.weight, lecun),
        (model.visual.conv1.weight, (3 * patch * patch) ** -0.5),
    ):
        assert math.isclose(weight.std(), std, rel_tol=0.03)
    # a normal that is cut, not one that is not
    assert model.text_projection.weight.abs().max() < 2.3 * lecun
    assert not model.text_projection.bias.any()
    assert not model.visual.conv1.bias.any()


def test_classic_clip_starts_as_it_did() -> None:
    model = clipfast.create_model(
        {"embed_dim": 64, "vision_cfg": {"layers": 1}, "text_cfg": {"layers": 1, "width": 256}}
    )
    assert math.isclose(model.token_embedding.weight.detach().std(), 0.02, rel_tol=0.01)
    assert model.logit_bias is None


def test_locking_resizing_and_weight_decay() -> None:
    model = siglip()
    assert model.no_weight_decay() == {"positional_embedding", "attn_pool.probe"}
    assert image_tower().no_weight_decay() == {"positional_embedding", "class_embedding"}
    model.lock(1)
    learns = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {"transformer", "ln_post", "attn_pool"}
    assert not any(p.requires_grad for p in model.transformer.resblocks[:-1].parameters())
    model.lock(4)
    assert all(p.requires_grad for p in model.parameters())
    rows = model.positional_embedding.clone()
    model.set_image_size((64, 32))
    assert model.positional_embedding.shape == (32, 32)
    assert model(torch.randn(2, 3, 64, 32).double()).shape == (2, 32)
    expected = F.interpolate(rows.T.reshape(1, 32, 4, 4), (8, 4), mode="bicubic", antialias=True)
    assert relative_error(model.positional_embedding, expected[0].flatten(1).T) <= 1e-6
    tower = text(**BIDIRECTIONAL)
    assert tower.attn_mask is None
    tower.attn_mask = None
    with pytest.raises(ValueError, match="attn_mask: got .*, expected None"):
        tower.attn_mask = torch.zeros(CONTEXT, CONTEXT)
    tower.lock(1)
    assert [name for name, p in tower.named_parameters() if p.requires_grad] == [
        "text_projection.weight",
        "text_projection.bias",
    ]


def test_who_watches_the_pooling_sees_it() -> None:
    model, seen = siglip(), []
    expected = model(pictures())
    for part in ("attn_pool", "attn_pool.attn", "attn_pool.ln", "attn_pool.mlp", "attn_pool.attn.out_proj", "ln_post"):
        model.get_submodule(part).register_forward_hook(lambda m, args, out, part=part: seen.append(part))
    assert torch.equal(model(pictures()), expected)
    assert seen == [
        "ln_post",
        "attn_pool.attn.out_proj",
        "attn_pool.attn",
        "attn_pool.ln",
        "attn_pool.mlp",
        "attn_pool",
    ]


def test_pool_weights() -> None:
    for changes, heads in ((SIGLIP, 2), ({"pool_type": "avg", "reg_tokens": 1}, 1), ({}, 1)):
        model = image_tower(**changes)
        weights = model.get_pool_weights(pictures())
        assert weights.shape == (3, heads, model.prefix_tokens + 16)
        assert torch.allclose(weights.sum(-1), torch.ones(()).double())
        assert (weights[..., : model.prefix_tokens].sum() > 0) == (model.pool_type == "tok")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_type": "max"}, "pool_type.*'max'.*'tok', 'avg', 'map'"),
        ({"class_token": False}, "'tok' without a class token"),
        ({"pool_type": "map", "final_ln_after_pool": True}, "final_ln_after_pool.*'map'"),
    ],
)
def test_wrong_options(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_tower(**changes)
