"""NaFlex: pictures of any aspect, packed, against transformers' tower with its masks, and against themselves."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import siglip2_keys
import torch
from torch import Tensor, nn

import clipfast
from clipfast.modules import packed_images, positions, transformer
from clipfast.modules.naflex import Patches, cut, uncut
from clipfast.modules.positions import resampled_positions
from clipfast.modules.vit import ViT

PATCH, WIDTH, LAYERS, HEADS, SIDE = 4, 64, 3, 4, 6
# five aspects, the longest not first: of a batch in whatever order
GRIDS = [(3, 5), (7, 2), (1, 13), (6, 6), (4, 3)]


def tower(dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> ViT:
    torch.manual_seed(seed)
    made = ViT(
        SIDE * PATCH, PATCH, WIDTH, LAYERS, HEADS, 2.0, None, approximate="tanh", class_token=False, no_ln_pre=True,
        patch_bias=True, norm_eps=1e-6, naflex=True, **{"pool_type": "map"} | options,
    )  # fmt: skip
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.2)
    return made.to(dtype).eval()


def batch_of(grids, dtype: torch.dtype = torch.float64, seed: int = 1) -> clipfast.NaFlexBatch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(rows * columns for rows, columns in grids)
    return clipfast.NaFlexBatch(torch.randn(total, 3 * PATCH**2, generator=generator, dtype=dtype), grids)


def pictures_of(batch: clipfast.NaFlexBatch) -> list[Tensor]:
    """Return each picture as an image ``[1, 3, H, W]``."""
    return [uncut(one.patches[None], tuple(one.grids[0].tolist()), PATCH) for one in batch.split(1)]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


# --- transformers -----------------------------------------------------------------------------------------


def theirs_and_ours(dtype: torch.dtype) -> tuple[nn.Module, ViT]:
    pytest.importorskip("transformers")
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_patches=SIDE**2,
        patch_size=PATCH,
    )
    torch.manual_seed(3)
    theirs = Siglip2VisionModel(config).to(dtype).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours = tower(dtype)
    ours.load_state_dict(siglip2_keys.clipfast_keys(theirs.state_dict(), PATCH))
    return theirs, ours


def padded(batch: clipfast.NaFlexBatch) -> dict[str, Tensor]:
    """Return a batch in the form of transformers' processor."""
    longest = int(batch.lengths.max())
    pixels, mask = [], []
    for patches in batch.patches.split(batch.lengths.tolist()):
        patches = patches.unflatten(1, (3, -1)).transpose(1, 2).flatten(1)
        pixels.append(nn.functional.pad(patches, (0, 0, 0, longest - len(patches))))
        mask.append((torch.arange(longest) < len(patches)).int())
    return {
        "pixel_values": torch.stack(pixels),
        "pixel_attention_mask": torch.stack(mask),
        "spatial_shapes": batch.grids,
    }


def test_float64_is_transformers_with_its_masks_in_outputs_and_all_gradients():
    theirs, ours = theirs_and_ours(torch.float64)
    batch = batch_of(GRIDS)
    inputs = padded(batch)
    mask = inputs["pixel_attention_mask"].bool()
    for compute, read in (
        (ours, lambda output: output.pooler_output),
        (ours.forward_features, lambda output: output.last_hidden_state[mask]),
    ):
        found, wanted = compute(batch), read(theirs(**inputs))
        assert (found - wanted).abs().max() <= 1e-10
        weights = torch.randn_like(found)
        found, wanted = gradients(ours, (found * weights).sum()), gradients(theirs, (wanted * weights).sum())
        wanted = siglip2_keys.clipfast_keys({name: g for name, g in wanted.items() if g is not None}, PATCH)
        assert {name for name, g in found.items() if g is not None} == wanted.keys()
        for name, gradient in wanted.items():
            assert gradient.abs().max() > 1e-3
            assert (found[name] - gradient).abs().max() <= 1e-10, name


def test_float32_in_inference_and_in_training():
    theirs, ours = theirs_and_ours(torch.float32)
    batch = batch_of([*GRIDS, (2, 2), (3, 5)], torch.float32)
    expected = copy.deepcopy(theirs).double()(**padded(batch.to(torch.float64))).pooler_output
    scale = expected.abs().max()
    with torch.no_grad():
        assert (ours(batch) - expected).abs().max() <= 2e-6 * scale
    assert (ours(batch) - expected).abs().max() <= 2e-6 * scale


def test_what_the_processor_gives_is_what_the_tower_takes():
    theirs, ours = theirs_and_ours(torch.float64)
    inputs = padded(batch_of(GRIDS))
    batch = clipfast.NaFlexBatch.from_padded(**inputs)
    assert (ours(batch) - theirs(**inputs).pooler_output).abs().max() <= 1e-10
    inputs["pixel_attention_mask"][0, 0] = 0
    with pytest.raises(ValueError, match="pixel_attention_mask"):
        clipfast.NaFlexBatch.from_padded(**inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_positions_are_bitwise_transformers(dtype):
    embeddings = pytest.importorskip("transformers.models.siglip2.modeling_siglip2").Siglip2VisionEmbeddings
    table = torch.randn(16, 16, 24, dtype=dtype, requires_grad=True)
    grids = [(16, 16), (3, 40), (40, 3), (1, 1), (32, 8), (1, 2)]
    expected = embeddings.resize_positional_embeddings(table, torch.tensor(grids), 256)
    upstream = torch.randn_like(expected)
    found = resampled_positions(table, grids)
    sizes = [rows * columns for rows, columns in grids]
    for rows, wanted, size in zip(found, expected, sizes, strict=True):
        assert torch.equal(rows, wanted[:size])
    (wanted,) = torch.autograd.grad(
        sum((e[:n] * u[:n]).sum() for e, u, n in zip(expected, upstream, sizes, strict=True)), table
    )
    (gradient,) = torch.autograd.grad(
        sum((rows * u[:n]).sum() for rows, u, n in zip(found, upstream, sizes, strict=True)), table
    )
    assert torch.equal(gradient, wanted)


# --- packed, one by one, and as plain images --------------------------------------------------------------


@pytest.mark.parametrize("pool", [{}, {"pool_type": "avg"}, {"pool_type": "avg", "final_ln_after_pool": True}], ids=str)
@pytest.mark.parametrize(
    "grids",
    [GRIDS, [(1, 1)], [(6, 6)] * 3, [(2, 3), (3, 2), (6, 1), (2, 3), (1, 1), (1, 6)], [(1, 1), (1, 1), (20, 1)]],
    ids=["five", "one-patch", "one-grid", "repeated", "long"],
)
def test_a_batch_is_its_pictures_one_by_one(grids, pool):
    model, batch = tower(**pool), batch_of(grids)
    features, tokens = model(batch), model.forward_features(batch)
    assert features.shape == (len(grids), WIDTH)
    assert tokens.shape == (batch.total, WIDTH)
    images = pictures_of(batch)
    for i, (image, of_picture) in enumerate(zip(images, tokens.split(batch.lengths.tolist()), strict=True)):
        torch.testing.assert_close(features[i : i + 1], model(image), rtol=0, atol=1e-11)
        torch.testing.assert_close(of_picture[None], model.forward_features(image), rtol=0, atol=1e-11)
        torch.testing.assert_close(features[i : i + 1], model(batch.split(1)[i]), rtol=0, atol=1e-11)
    # gradients too: those of positions are added up in float32
    weights = torch.randn_like(features)
    packed = gradients(model, (features * weights).sum())
    alone = gradients(model, sum((model(x) * w).sum() for x, w in zip(images, weights, strict=True)))
    for name, gradient in packed.items():
        within = 1e-6 if name == "positional_embedding" else 1e-11
        torch.testing.assert_close(
            gradient, alone[name], rtol=within, atol=within * gradient.abs().max().item() + 1e-11
        )


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_the_order_of_pictures_is_theirs(mode):
    model, batch = tower(torch.float32), batch_of([*GRIDS, (2, 2), (3, 5)], torch.float32)
    order = [4, 0, 6, 2, 5, 1, 3]
    parts = batch.split(1)
    moved = clipfast.NaFlexBatch(torch.cat([parts[i].patches for i in order]), batch.grids[order])
    with torch.set_grad_enabled(mode == "training"):
        torch.testing.assert_close(model(moved), model(batch)[order], rtol=0, atol=1e-4)
        tokens = model.forward_features(batch).split(batch.lengths.tolist())
        moved_tokens = model.forward_features(moved).split(moved.lengths.tolist())
    for i, found in zip(order, moved_tokens, strict=True):
        torch.testing.assert_close(found, tokens[i], rtol=0, atol=1e-4)


def test_results_depend_on_no_company_where_that_is_asked_for():
    model, batch = tower(torch.float32), batch_of(GRIDS, torch.float32)
    with clipfast.deterministic(), torch.no_grad():
        together = model(batch)
        assert torch.equal(together, torch.cat([model(one) for one in batch.split(1)]))
        assert torch.equal(together[1:3], model(batch.split([1, 2, 2])[1]))


def test_images_of_any_multiple_of_the_patch_size():
    model = tower()
    images = torch.randn(2, 3, 5 * PATCH, 3 * PATCH, dtype=torch.float64)
    batch = clipfast.NaFlexBatch.of(Patches(patches, (5, 3)) for patches in cut(images, PATCH))
    torch.testing.assert_close(model(images), model(batch), rtol=0, atol=1e-12)
    maps = model.forward_intermediates(images, 1)["image_intermediates"][0]
    assert maps.shape == (2, WIDTH, 5, 3)
    assert model.get_attention_maps(images).shape == (LAYERS, 2, HEADS, 15, 15)
    # of the table's own grid it is a tower without NaFlex, whose positions are not rounded to float32
    fixed = ViT(
        SIDE * PATCH, PATCH, WIDTH, LAYERS, HEADS, 2.0, None, approximate="tanh", class_token=False, no_ln_pre=True,
        patch_bias=True, norm_eps=1e-6, pool_type="map",
    ).double()  # fmt: skip
    fixed.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)
    torch.testing.assert_close(model(images), fixed(images), rtol=0, atol=1e-5)


@torch.no_grad()
def test_inference_on_the_cpu_runs_the_packed_encoder_on_packed_rows(monkeypatch):
    model, batch, calls = tower(torch.float32), batch_of(GRIDS, torch.float32), []

    def encode(x, encoder, *, cu_seqlens, read=None):
        calls.append((tuple(x.shape), cu_seqlens.tolist()))
        return original(x, encoder, cu_seqlens=cu_seqlens, read=read)

    original = transformer.encode
    monkeypatch.setattr(transformer, "encode", encode)
    model(batch)
    # once for all, the shortest first
    assert calls == [((90, WIDTH), [0, 12, 25, 39, 54, 90])]


def test_a_projection_and_the_whole_model():
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": SIDE * PATCH, "patch_size": PATCH, "width": WIDTH, "layers": 1, "head_width": 16,
            "class_token": False, "pool_type": "map", "no_ln_pre": True, "naflex": True,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1},
    }  # fmt: skip
    model = clipfast.create_model(config, dtype=torch.float64)
    batch, tokens = batch_of(GRIDS), torch.full((5, 8), 15)
    image, text, _ = model(batch, tokens)
    assert image.shape == text.shape == (5, 32)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert model.encode_image(batch).shape == (5, 32)


def test_named_models_have_the_published_sizes():
    with torch.device("meta"):
        model = clipfast.create_model("ViT-B-16-SigLIP2-NaFlex", device="meta")
    assert sum(p.numel() for p in model.visual.parameters()) == 92_930_304
    assert model.visual.positional_embedding.shape == (256, 768)


# --- training ---------------------------------------------------------------------------------------------


def test_dropped_patches():
    model, batch = tower(patch_dropout=0.5), batch_of([(4, 4), (1, 1), (2, 3), (4, 4)])
    assert torch.equal(model(batch), model(batch))
    model.train()
    torch.manual_seed(0)
    tokens = model.forward_features(batch)
    assert len(tokens) == 8 + 1 + 3 + 8
    torch.manual_seed(0)
    features = model(batch)
    # of one patch none is left out
    torch.testing.assert_close(features[1], model(batch.split(1)[1])[0], rtol=0, atol=1e-12)
    # and tokens lie in the order of the pictures
    pooled = model.attn_pool(tokens, torch.tensor([0, 8, 9, 12, 20]))
    torch.testing.assert_close(pooled, features, rtol=0, atol=1e-12)
    assert not torch.equal(features, model(batch))


def test_checkpointing_accumulation_and_autocast():
    model, batch = tower(), batch_of(GRIDS)
    weights = torch.randn(5, WIDTH, dtype=torch.float64)
    whole = gradients(model, (model(batch) * weights).sum())
    model.train()
    model.set_grad_checkpointing()
    for name, gradient in gradients(model, (model(batch) * weights).sum()).items():
        assert torch.equal(gradient, whole[name]), name
    model.zero_grad(set_to_none=True)
    for part, w in zip(batch.split(2), weights.split(2), strict=True):
        (model(part) * w).sum().backward()
    for name, p in model.named_parameters():
        within = 1e-6 if name == "positional_embedding" else 1e-11
        torch.testing.assert_close(p.grad, whole[name], rtol=0, atol=within * max(1, whole[name].abs().max().item()))
    model, batch = tower(torch.float32), batch_of(GRIDS, torch.float32)
    exact = model(batch)
    for grad in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            low = model(batch)
            alone = torch.cat([model(image) for image in pictures_of(batch)])
        error = (alone - exact).abs().max()
        assert (low - exact).abs().max() <= 2 * error + 2**-7 * exact.abs().max()
        assert error < 0.1 * exact.abs().max()


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_many_pictures_of_one_grid_add_up_in_float32(how):
    count = 400
    exact, images = tower(patch_dropout=0.0), torch.randn(count, 3, 2 * PATCH, PATCH, dtype=torch.float64)
    weights = torch.randn(count, WIDTH, dtype=torch.float64) + 1
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    low, pixels = copy.deepcopy(exact).to(dtype), images.to(dtype)
    batch = clipfast.NaFlexBatch.of(Patches(patches, (2, 1)) for patches in cut(pixels, PATCH))
    wanted = gradients(exact, (exact(images) * weights).sum())["positional_embedding"]
    errors = []
    for inputs in (pixels, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = (low(inputs) * weights.to(dtype)).sum()
        errors.append((gradients(low, loss)["positional_embedding"] - wanted).abs().max())
    assert errors[1] <= 2 * errors[0] + 2 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()
    assert errors[0] < 0.1 * wanted.abs().max()


def test_float16():
    model, batch = tower(torch.float32), batch_of(GRIDS, torch.float32)
    exact = model(batch)
    low = copy.deepcopy(model).half()(batch.to(torch.float16))
    assert low.dtype == torch.float16
    assert (low - exact).abs().max() < 0.02 * exact.abs().max()


def test_gradients_of_pixels():
    model, batch = tower(), batch_of(GRIDS)
    patches = batch.patches.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(clipfast.NaFlexBatch(patches, GRIDS)).sin().sum(), patches)
    images = [image.requires_grad_() for image in pictures_of(batch)]
    wanted = torch.autograd.grad(sum(model(image).sin().sum() for image in images), images)
    torch.testing.assert_close(found, torch.cat([cut(g, PATCH)[0] for g in wanted]), rtol=0, atol=1e-11)


# --- what a user did --------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A block of somebody else's, which wants ``[B, N, W]`` and no more."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 3
        return 2 * x + x.mean(dim=1, keepdim=True)


class Backwards(transformer.Transformer):
    """A stack of somebody else's."""

    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(self.resblocks):
            x = block(x)
        return x


class Mean(nn.Module):
    """A pooling of somebody else's."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def changed(model: ViT, how: str) -> list[tuple[int, ...]]:
    """Change a tower, and return the list of the shapes that somebody sees."""
    seen: list[tuple[int, ...]] = []

    def look(module: nn.Module, args: tuple, result: Tensor) -> None:
        seen.append(tuple(result.shape))

    if how == "another block":
        model.transformer.resblocks[1] = Doubled()
    elif how == "a patched block":
        original = model.transformer.resblocks[1].forward
        model.transformer.resblocks[1].forward = lambda x: 2 * original(x)
    elif how == "a patched transformer":
        original = model.transformer.forward
        model.transformer.forward = lambda x: original(x) + x.mean(dim=1, keepdim=True)
    elif how == "another transformer":
        model.transformer = Doubled()
    elif how == "a transformer of another class":
        model.transformer.__class__ = Backwards
    elif how == "another pooling":
        model.attn_pool = Mean()
    elif how == "a patched convolution":
        original = model.conv1.forward
        model.conv1.forward = lambda x: 3 * original(x)
    else:
        where = {
            "a hook on a block": model.transformer.resblocks[0],
            "a hook in a block": model.transformer.resblocks[2].mlp.c_fc,
            "a hook on the convolution": model.conv1,
            "a hook on the norm": model.ln_post,
            "a hook on the pooling": model.attn_pool,
            "a hook in the pooling": model.attn_pool.mlp,
        }
        where[how].register_forward_hook(look)
    return seen


HOOKS = ["on a block", "in a block", "on the convolution", "on the norm", "on the pooling", "in the pooling"]
CHANGES = ["another block", "a patched block", "a patched transformer", "another pooling", "a patched convolution"]
CHANGES += ["another transformer", "a transformer of another class"]


@pytest.mark.parametrize("how", [*(f"a hook {where}" for where in HOOKS), *CHANGES])
def test_changed_towers_are_computed_grid_by_grid_and_agree(how):
    model, batch = tower(), batch_of([*GRIDS, (2, 2), (3, 5)])
    unchanged = model(batch)
    seen = changed(model, how)
    features = model(batch)
    assert not packed_images.takes_packed(model)
    if seen:
        # images of one grid at once, in the shape that dense images have
        assert len(seen) == 6
        assert sorted(shape[0] for shape in seen) == [1, 1, 1, 1, 1, 2]
        torch.testing.assert_close(features, unchanged, rtol=0, atol=1e-11)
    alone = torch.cat([model(image) for image in pictures_of(batch)])
    torch.testing.assert_close(features, alone, rtol=0, atol=1e-11)
    if "hook" not in how:
        assert (features - unchanged).abs().max() > 1e-3
    tokens = torch.cat([model.forward_features(image)[0] for image in pictures_of(batch)])
    torch.testing.assert_close(model.forward_features(batch), tokens, rtol=0, atol=1e-11)


def test_a_hook_on_the_tower_itself_sees_the_batch_and_its_features():
    model, batch, seen = tower(), batch_of(GRIDS), []
    model.register_forward_hook(lambda module, args, result: seen.append((args[0], result.shape)))
    model(batch)
    assert seen == [(batch, (5, WIDTH))]
    assert packed_images.takes_packed(model)


def test_adapted_layers_stay_packed():
    peft = pytest.importorskip("peft")
    model, batch = tower(), batch_of(GRIDS)
    before = model(batch)
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["c_fc"], init_lora_weights=False), model)
    adapted = adapted.double()
    assert packed_images.takes_packed(model)
    after = model(batch)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, torch.cat([model(image) for image in pictures_of(batch)]), rtol=0, atol=1e-11)


def test_a_compiled_tower():
    model, backend = tower(), "eager"
    del model.transformer.resblocks[1:]
    model.transformer.layers = 1
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for grids in (GRIDS, [(2, 2), (5, 1)]):
        batch = batch_of(grids)
        weights = torch.randn(len(grids), WIDTH, dtype=torch.float64)
        wanted = gradients(model, (model(batch) * weights).sum())
        found = gradients(model, (compiled(batch) * weights).sum())
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-6 if "positional" in name else 1e-11)
    images = torch.randn(2, 3, 2 * PATCH, 3 * PATCH, dtype=torch.float64)
    whole = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(whole(images), model(images), rtol=0, atol=1e-12)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="how many patches a NaFlexBatch has is data"):
        whole(batch)
    torch._dynamo.reset()


# --- what is kept between calls ---------------------------------------------------------------------------


def counted(monkeypatch) -> list:
    calls = []

    def resampled(table, grids):
        calls.append(list(grids))
        return resampled_positions(table, grids)

    monkeypatch.setattr(positions, "resampled_positions", resampled)
    return calls


@torch.no_grad()
def test_positions_are_resampled_once_a_grid_and_kept(monkeypatch):
    calls = counted(monkeypatch)
    model, batch = tower(torch.float32), batch_of([*GRIDS, (3, 5), (3, 5)], torch.float32)
    first = model(batch)
    assert calls == [GRIDS]
    assert torch.equal(model(batch), first)
    model(batch_of([(9, 9), (3, 5)], torch.float32))
    assert calls == [GRIDS, [], [(9, 9)]]
    # a write counts, as it does for other weights
    model.positional_embedding[:] *= 2
    assert (model(batch) - first).abs().max() > 1e-3
    model.positional_embedding.data.div_(2)
    torch.testing.assert_close(model(batch), first, rtol=0, atol=1e-4)
    model.positional_embedding = nn.Parameter(torch.zeros_like(model.positional_embedding))
    assert (model(batch) - first).abs().max() > 1e-3
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(copied(batch), model(batch))


def test_what_was_kept_in_inference_mode_serves_training(monkeypatch):
    calls = counted(monkeypatch)
    model, batch = tower(torch.float32), batch_of(GRIDS, torch.float32)
    model.positional_embedding.requires_grad_(False)
    with torch.inference_mode():
        model(batch)
    model(batch).sum().backward()
    assert model.conv1.weight.grad is not None
    assert [len(grids) for grids in calls] == [5, 0]
    model.positional_embedding.requires_grad_(True)
    model(batch).sum().backward()
    assert model.positional_embedding.grad.abs().max() > 0


def test_no_more_are_kept_than_fit(monkeypatch):
    monkeypatch.setattr(positions, "MOST_ROWS", 40)
    kept = positions.KeptPositions(torch.randn(4, 4, 8))
    calls = counted(monkeypatch)
    for grids in ([(5, 2)], [(2, 5), (3, 5)], [(5, 2)], [(1, 6)], [(2, 5)], [(5, 2)], [(9, 9)], [(9, 9)]):
        assert [len(rows) for rows in kept.of(grids)] == [math.prod(grid) for grid in grids]
    # 10 + 25 and 6 more: the one that was not asked for longest goes; one too large for all is never kept
    assert calls == [[(5, 2)], [(2, 5), (3, 5)], [], [(1, 6)], [(2, 5)], [], [(9, 9)], [(9, 9)]]


# --- batches ----------------------------------------------------------------------------------------------


def test_batches():
    batch = batch_of(GRIDS, torch.float32)
    assert len(batch) == 5
    assert batch.total == 90
    assert batch.cu_seqlens.tolist() == [0, 15, 29, 42, 78, 90]
    assert batch.patch_size == PATCH
    assert repr(batch) == "NaFlexBatch(5 pictures, 90 patches, torch.float32 on cpu)"
    low = batch.to(torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low.grids, batch.grids)
    assert batch.to("cpu") is batch
    assert batch.to("meta").device.type == "meta"
    joined = clipfast.NaFlexBatch(torch.cat([p.patches for p in batch.split([2, 3])]), batch.grids)
    assert torch.equal(joined.patches, batch.patches)
    assert [len(p) for p in batch.split(2)] == [2, 2, 1]
    copied = pickle.loads(pickle.dumps(batch))
    assert torch.equal(copied.patches, batch.patches)
    assert torch.equal(copied.cu_seqlens, batch.cu_seqlens)


def test_another_default_device_changes_nothing():
    model, batch = tower(torch.float32), batch_of(GRIDS, torch.float32)
    expected = model(batch)
    try:
        torch.set_default_device("meta")
        again = clipfast.NaFlexBatch(batch.patches, GRIDS)
        assert torch.equal(model(again), expected)
        assert torch.equal(model.forward_features(again.split(2)[1]), model.forward_features(batch.split(2)[1]))
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("patches", "grids", "error", "message"),
    [
        (torch.zeros(6, 48), [(2, 2)], ValueError, "got 6 patches, expected 4"),
        (torch.zeros(4, 47), [(2, 2)], ValueError, r"got shape \(4, 47\)"),
        (torch.zeros(1, 4, 48), [(2, 2)], ValueError, r"got shape \(1, 4, 48\)"),
        (torch.zeros(4, 48, dtype=torch.uint8), [(2, 2)], TypeError, "got torch.uint8"),
        ([1.0], [(1, 1)], TypeError, "got list"),
        (torch.zeros(0, 48), [], ValueError, r"grids\): got shape"),
        (torch.zeros(0, 48), [(0, 3)], ValueError, r"got a grid of \(0, 3\)"),
        (torch.zeros(4, 48), [(2.0, 2.0)], TypeError, "got torch.float32, expected integers"),
        (torch.zeros(4, 48), torch.tensor([2, 2]), ValueError, r"got shape \(2,\)"),
        (torch.zeros(4, 48), torch.empty(1, 2, dtype=torch.int64, device="meta"), ValueError, "expected host memory"),
    ],
)
def test_batches_that_do_not_fit(patches, grids, error, message):
    with pytest.raises(error, match=message):
        clipfast.NaFlexBatch(patches, grids)


def test_pictures_that_do_not_fit_together():
    small, large = Patches(torch.zeros(4, 48), (2, 2)), Patches(torch.zeros(4, 192), (2, 2))
    with pytest.raises(ValueError, match="got none"):
        clipfast.NaFlexBatch.of([])
    with pytest.raises(ValueError, match="expected those of one kind"):
        clipfast.NaFlexBatch.of([small, large])
    with pytest.raises(ValueError, match="got 4 patches for picture 1, expected 2·3"):
        clipfast.NaFlexBatch.of([small, Patches(torch.zeros(4, 48), (2, 3))])


def test_what_a_tower_does_not_take():
    model, batch = tower(torch.float32), batch_of(GRIDS, torch.float32)
    with pytest.raises(TypeError, match="got torch.float64, expected torch.float32"):
        model(batch.to(torch.float64))
    with pytest.raises(ValueError, match="got device meta, expected cpu"):
        model(batch.to("meta"))
    with pytest.raises(ValueError, match="got patches of 2 pixels a side, expected 4"):
        model(clipfast.NaFlexBatch(torch.zeros(4, 12), [(2, 2)]))
    with pytest.raises(ValueError, match="got 9×8 pixels, expected multiples of patch_size = 4"):
        model(torch.zeros(1, 3, 9, 8))
    with pytest.raises(TypeError, match="got NaFlexBatch, expected a tensor"):
        ViT(8, 4, 32, 1, 2, output_dim=None)(batch)
    for call in (model.forward_intermediates, model.get_attention_maps):
        with pytest.raises(TypeError, match="got NaFlexBatch, expected a tensor"):
            call(batch)
    for wrong in ({"class_token": True}, {"reg_tokens": 2}):
        with pytest.raises(ValueError, match="expected neither"):
            ViT(8, 4, 32, 1, 2, naflex=True, **{"class_token": False, "pool_type": "avg"} | wrong)
