"""Training with frozen towers or first blocks: they stay as they were, and cost nothing in the backward pass."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import clipfast
from clipfast.cli import app
from clipfast.modules.resnet import FrozenBatchNorm2d
from clipfast.train.config import TrainConfig, make_run_config
from clipfast.train.gradients import StepSeeds, compute_gradients
from clipfast.train.towers import Towers
from clipfast.train.trainer import Trainer
from clipfast.train.workplace import Workplace

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 32, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 3},
}
RESNET = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}
ALONE = Workplace(torch.device("cpu"))
LOCKS = [
    {"lock_image": True},
    {"lock_text": True},
    {"lock_image": True, "lock_text": True},
    {"lock_image": True, "lock_image_unlocked_groups": 2},
    # all but the first two groups: embeddings and one block
    {"lock_image": True, "lock_image_unlocked_groups": -2, "lock_text": True, "lock_text_unlocked_layers": -2},
]


def model_of(**vision: object) -> clipfast.CLIP:
    torch.manual_seed(0)
    return clipfast.create_model(TINY | {"vision_cfg": vision or TINY["vision_cfg"]})


def pairs(side: int = 16, count: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 38, (count, 6), generator=generator)
    tokens[:, -1] = 39
    return torch.randn(count, 3, side, side, generator=generator), tokens


def locked(model: clipfast.CLIP, locks: dict) -> clipfast.CLIP:
    if "lock_image" in locks:
        model.lock_image_tower(locks.get("lock_image_unlocked_groups", 0))
    if "lock_text" in locks:
        model.lock_text_tower(locks.get("lock_text_unlocked_layers", 0))
    return model


@pytest.mark.parametrize(("locks", "size"), list(itertools.product(LOCKS, (None, 3))))
def test_gradients_are_those_of_plain_autograd(locks, size):
    model = locked(model_of().double(), locks).train()
    images, tokens = pairs()
    images = images.double()
    towers = Towers(model, "fp32", ALONE)
    found = compute_gradients(
        towers, images, tokens, StepSeeds(0, 0, 0), micro_batch_size=size, loss_factor=3.0, label_smoothing=0.1
    )
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    image, text = (F.normalize(x, dim=-1) for x in (model.encode_image(images), model.encode_text(tokens)))
    logits = model.logit_scale.exp() * image @ text.T
    labels = torch.arange(len(images))
    expected = sum(F.cross_entropy(x, labels, label_smoothing=0.1) for x in (logits, logits.T)) / 2
    (3 * expected).backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-13)
    for name, parameter in model.named_parameters():
        assert (gradients[name] is None) == (parameter.grad is None) == (not parameter.requires_grad), name
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-11, atol=1e-13, msg=name)
    assert any(g is None for g in gradients.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16", "fp16"])
@pytest.mark.parametrize("locks", LOCKS)
def test_what_is_frozen_stays_and_the_rest_learns(locks, precision):
    model = model_of()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    # fp16's scale comes down before the first step is taken
    steps = 12 if precision == "fp16" else 4
    config = TrainConfig(steps, learning_rate=1e-2, warmup_steps=0, weight_decay=0.5, precision=precision, **locks)
    trainer = Trainer(model, config)
    losses = [trainer.take_step(*pairs()).loss for _ in range(steps)]
    assert losses[-1] < losses[0]
    assert trainer.frozen.keys() | trainer.weights.keys() == before.keys()
    assert set(trainer.frozen) == {n for n, p in locked(model_of(), locks).named_parameters() if not p.requires_grad}
    for name, weight in trainer.frozen.items():
        assert torch.equal(weight, before[name]), name
        assert torch.equal(model.get_parameter(name), before[name].to(model.get_parameter(name).dtype)), name
    moved = [n for n, w in trainer.weights.items() if not torch.equal(w, before[n])]
    assert moved == list(trainer.weights)


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
def test_it_goes_on_from_its_state_bitwise(precision):
    config = TrainConfig(4, precision=precision, lock_image=True, lock_text=True, lock_text_unlocked_layers=1)
    straight, first = (Trainer(model_of(), config) for _ in range(2))
    # another model's weights, which the state replaces, frozen ones too
    torch.manual_seed(1)
    second = Trainer(clipfast.create_model(TINY), config)
    for step in range(4):
        straight.take_step(*pairs(count=step + 2))
    for step in range(2):
        first.take_step(*pairs(count=step + 2))
    kept, target = copy.deepcopy(first.state()), second.state()
    assert kept.keys() == target.keys()
    for name, value in kept.items():
        target[name].copy_(value)
    second.loaded(first.numbers())
    for step in range(2, 4):
        second.take_step(*pairs(count=step + 2))
    for name, value in straight.state().items():
        assert torch.equal(second.state()[name], value), name
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(second.model.get_parameter(name), parameter), name


def kept_for_backward(model: clipfast.CLIP, checkpointing: bool = False) -> tuple[int, int]:
    """Return how many tensors that are no parameters the image and the text tower keep."""
    counts = []
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    model.set_grad_checkpointing(checkpointing)

    def keep(x: Tensor) -> Tensor:
        counts[-1] += x.untyped_storage().data_ptr() not in parameters
        return x

    images, tokens = pairs()
    towers = Towers(model.train(), "fp32", ALONE)
    for images_or_none, tokens_or_none in ((images, None), (None, tokens)):
        counts.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            towers(images_or_none, tokens_or_none)
    return tuple(counts)


def test_what_is_frozen_keeps_no_activations():
    free = kept_for_backward(model_of())
    image_locked = kept_for_backward(locked(model_of(), {"lock_image": True}))
    text_locked = kept_for_backward(locked(model_of(), {"lock_text": True}))
    # only the temperature's own
    scale = image_locked[0]
    assert scale == text_locked[1] <= 2
    assert (image_locked[1], text_locked[0]) == (free[1], free[0])
    # the last of three blocks, and what comes after it: no more than a model of one block keeps
    last = kept_for_backward(locked(model_of(), {"lock_image": True, "lock_image_unlocked_groups": 2}))
    one_block = kept_for_backward(model_of(**TINY["vision_cfg"] | {"layers": 1}))
    assert scale < last[0] <= one_block[0] < free[0]
    # nor does a frozen tower whose blocks would be computed again
    again = locked(model_of(), {"lock_image": True, "lock_text": True, "lock_text_unlocked_layers": -1})
    assert kept_for_backward(again, checkpointing=True)[0] == scale


@pytest.mark.parametrize(("size", "images", "texts"), [(None, 1, 1), (3, 3, 6)])
def test_a_frozen_tower_is_encoded_once_and_without_a_graph(size, images, texts):
    calls = []
    model = model_of()
    trainer = Trainer(model, TrainConfig(2, micro_batch_size=size, lock_image=True))
    # even a graph that nothing is kept for forbids what inference may do
    model.visual.register_forward_hook(lambda *_: calls.append("graph" if torch.is_grad_enabled() else "image"))
    model.ln_final.register_forward_hook(lambda *_: calls.append("text"))
    trainer.take_step(*pairs(count=9))
    assert sorted(calls) == ["image"] * images + ["text"] * texts


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
@pytest.mark.parametrize("kept", [False, True])
def test_batch_statistics_of_a_frozen_resnet(kept, precision):
    model = model_of(**RESNET)
    before = model.visual.bn1.running_mean.clone()
    config = TrainConfig(2, precision=precision, lock_image=True, lock_image_freeze_bn_stats=kept)
    trainer = Trainer(model, config)
    for _ in range(2):
        trainer.take_step(*pairs(32))
    assert torch.equal(model.visual.bn1.running_mean, before) == kept
    assert any(isinstance(m, FrozenBatchNorm2d) for m in model.modules()) == kept
    assert all(p.requires_grad == ("visual." not in n) for n, p in model.named_parameters())


def test_frozen_statistics_do_not_depend_on_the_batch():
    """So that gradients may be had by parts, which batches' own statistics forbid."""
    losses = []
    for size in (None, 4):
        locks = {"lock_image": True, "lock_image_freeze_bn_stats": True}
        trainer = Trainer(model_of(**RESNET), TrainConfig(2, micro_batch_size=size, **locks))
        losses.append([trainer.take_step(*pairs(32)).loss for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(ValueError, match="micro_batch_size: got a model with BatchNorm"):
        Trainer(model_of(**RESNET), TrainConfig(2, micro_batch_size=4, lock_image=True))


def test_what_the_owner_froze_stays_frozen():
    model = model_of()
    model.lock_text_tower()
    trainer = Trainer(model, TrainConfig(1, lock_image=True))
    assert set(trainer.weights) == {"logit_scale"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing: got 1.0, expected"),
        ({"label_smoothing": -0.1}, "label_smoothing: got -0.1"),
        ({"label_smoothing": float("nan")}, "label_smoothing: got nan"),
        ({"lock_image_unlocked_groups": 2}, "lock_image_unlocked_groups: got 2 without lock_image"),
        ({"lock_image_freeze_bn_stats": True}, "lock_image_freeze_bn_stats: got True without lock_image"),
        ({"lock_text_unlocked_layers": 1}, "lock_text_unlocked_layers: got 1 without lock_text"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(3, **settings)
    with pytest.raises(ValueError, match=message):
        make_run_config({"data": "x", "steps": 3} | settings)


def test_a_resnet_is_frozen_as_a_whole():
    with pytest.raises(ValueError, match="unlocked_groups: got 1, expected 0"):
        Trainer(model_of(**RESNET), TrainConfig(1, lock_image=True, lock_image_unlocked_groups=1))


def test_a_run_writes_what_is_frozen_as_it_came(tmp_path):
    config = TINY | {"text_cfg": {k: v for k, v in TINY["text_cfg"].items() if k != "vocab_size"}}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    before = clipfast.create_model(config).state_dict()
    save_file(before, tmp_path / "start.safetensors")
    data = tmp_path / "data"
    data.mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"red {i}")
    flags = ["--data", str(data), "--model", str(tmp_path / "tiny.json"), "--output", str(tmp_path / "run")]
    flags += ["--weights", str(tmp_path / "start.safetensors"), "--batch-size", "4", "--save-every", "2"]
    flags += ["--device", "cpu", "--workers", "0", "--no-tensorboard", "--precision", "pure_bf16", "--ema-decay", "0.5"]
    flags += ["--lock-image", "--lock-image-unlocked-groups", "1", "--label-smoothing", "0.1"]
    # it goes on from the checkpoint of the first two
    for steps in ("2", "4"):
        done = CliRunner().invoke(app, ["train", *flags, "--steps", steps])
        assert done.exit_code == 0, done.output
    assert "going on from step 2" in done.output
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert after.keys() == before.keys()
    same = {n for n, w in before.items() if torch.equal(after[n], w)}
    assert same == {n for n in before if n.startswith("visual.") and n != "visual.proj"}
