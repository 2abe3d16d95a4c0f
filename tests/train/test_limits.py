"""Settings that make no sense are refused by name, with what came and what was expected, before anything is opened."""

from __future__ import annotations

import math
import types
from dataclasses import fields
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest

from clipfast.train.config import RunConfig, TrainConfig, make_run_config
from clipfast.train.limits import RULES, RUN_RULES, patch_counts

HINTS = get_type_hints(RunConfig)
GOOD = {"data": "shards", "steps": 100}

BAD = {
    "steps": [-1, 10**9, 2.5, "many", True],
    "epochs": [-0.5, math.nan, math.inf, 1e9, 1e300],
    "learning_rate": [0.0, -1e-3, math.nan, math.inf, "fast", True],
    "warmup_steps": [-1, 101, 0.5],
    "weight_decay": [-0.1, math.nan, math.inf, 1e4],
    "max_grad_norm": [0.0, -1.0, math.nan, math.inf],
    "schedule": ["linear", "", 3],
    "loss": ["sigmoid", "", 3],
    "precision": ["fp8", "FP32", ""],
    "strategy": ["dp", ""],
    "compile": ["yes", "", 3, "max-autotune-no-graphs"],
    "micro_batch_size": [0, -8, 1.5],
    "ema_decay": [-0.1, 1.0, 1.5, math.nan],
    "patch_dropout": [-0.1, 1.0, math.nan],
    "naflex_max_patches": ["", "many", "0", "128,", "128;256", "-1", 2.5],
    "naflex_tokens_per_batch": [0, -1, 1.5],
    "label_smoothing": [-0.1, 1.0, math.nan],
    "lock_image_unlocked_groups": [1, 0.5],
    "lock_text_unlocked_layers": [1, 0.5],
    "lock_image_freeze_bn_stats": [True],
    "seed": [-1, 2**63, 0.5],
    "batch_size": [1, 0, -256, 2.5],
    "val_every": [0, -1],
    "val_pairs": [1, 0, -1],
    "save_every": [0, -1],
    "keep": [0, -1],
    "workers": [-1, 10**6],
    "shuffle_pool": [0, -1],
    "timeout": [0.0, -1.0, math.nan, math.inf, 1e300],
    "separator": ["", "ab", '"'],
    "encoding": ["", "utf-9"],
}
FREE = {name for name, kind in HINTS.items() if bool in (kind, *get_args(kind)) and name not in BAD}
TEXTS = [name for name, kind in HINTS.items() if str in (kind, *get_args(kind)) and name not in BAD]
BAD |= {name: ["", " ", 3] for name in TEXTS}


def test_every_setting_has_a_rule_and_a_case():
    """A new setting is not in the tables, and fails here until it is."""
    assert {field.name for field in fields(RunConfig)} == set(RUN_RULES)
    assert {field.name for field in fields(TrainConfig)} == set(RULES)
    assert {field.name for field in fields(RunConfig)} == set(BAD) | FREE


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_what_makes_no_sense_is_refused(name, value):
    # epochs are an alternative to steps, and must be refused by themselves
    settings = GOOD | ({"steps": 0} if name == "epochs" else {}) | {name: value}
    if name == "weight_decay":
        settings["learning_rate"] = 1e-3
    with pytest.raises(ValueError, match=rf"^{name}: .*expected .+") as error:
        # how many steps epochs are is known with the data
        RunConfig(**settings).training(10**9)
    assert repr(value) in str(error.value) or f"{value:g}" in str(error.value)
    # the names of a run's checkpoints have nine digits
    if name in RULES and value != 10**9:
        with pytest.raises(ValueError, match=f"^{name}: got "):
            TrainConfig(**{"steps": 100} | ({"learning_rate": 1e-3} if name == "weight_decay" else {}) | {name: value})


@pytest.mark.parametrize("name", sorted(FREE))
def test_a_switch_is_a_bool(name):
    with pytest.raises(ValueError, match=rf"^{name}: got 'yes', expected bool"):
        RunConfig(**GOOD | {name: "yes"})


@pytest.mark.parametrize("name", sorted(HINTS))
def test_none_only_where_it_means_something(name):
    kind = HINTS[name]
    if get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind):
        RunConfig(**GOOD | {name: None})
    else:
        with pytest.raises(ValueError, match=rf"^{name}: got None"):
            RunConfig(**GOOD | {name: None})


def test_with_epochs_all_other_settings_are_checked_at_once():
    """How many steps they are is known with the data; the rest need not wait for them."""
    with pytest.raises(ValueError, match="max_grad_norm: got -1"):
        RunConfig(data="shards", epochs=1.0, max_grad_norm=-1.0)


GRAPHS = ("reduce-overhead", "max-autotune")


@pytest.mark.parametrize("mode", get_args(HINTS["compile"]))
@pytest.mark.parametrize(
    ("name", "value"), [("micro_batch_size", 4), ("strategy", "fsdp"), ("grad_checkpointing", True)]
)
def test_graphs_are_refused_where_they_cannot_be_right(mode, name, value):
    if mode not in GRAPHS:
        assert RunConfig(**GOOD | {"compile": mode, name: value}).compile == mode
        return
    with pytest.raises(ValueError, match=rf"^compile: got '{mode}' with {name} = .*expected a mode without"):
        RunConfig(**GOOD | {"compile": mode, name: value})


@pytest.mark.parametrize(
    ("name", "settings"),
    [("label_smoothing", {"label_smoothing": 0.1}), ("distill_model", {"distill_model": "a", "distill_weights": "b"})],
)
def test_what_the_sigmoid_loss_has_no_place_for(name, settings):
    RunConfig(**GOOD | settings, loss="clip")
    with pytest.raises(ValueError, match=rf"^{name}: got .* with the sigmoid loss, expected .*loss = 'clip'"):
        RunConfig(**GOOD | settings, loss="siglip")


def test_an_unknown_setting_from_python_is_told_as_in_a_file():
    with pytest.raises(ValueError, match="^settings: got 'batchsize'; did you mean batch_size"):
        make_run_config(GOOD | {"batchsize": 3})


def test_several_numbers_of_patches_want_a_budget():
    several = {"naflex_max_patches": "128, 256"}
    with pytest.raises(
        ValueError, match="^naflex_max_patches: got '128, 256' without naflex_tokens_per_batch, expected"
    ):
        RunConfig(**GOOD | several)
    assert patch_counts(RunConfig(**GOOD | several, naflex_tokens_per_batch=4096).naflex_max_patches) == (128, 256)
    # as TOML has one
    assert make_run_config(GOOD | {"naflex_max_patches": 256}).naflex_max_patches == "256"


def test_compile_was_once_a_switch():
    assert [make_run_config(GOOD | {"compile": value}).compile for value in (True, False)] == ["default", "no"]
    assert TrainConfig(1, compile=True).compile == "default"


def test_what_people_write_is_taken():
    config = make_run_config(GOOD | {"learning_rate": 1, "weight_decay": 0, "max_grad_norm": None, "epochs": 0})
    assert (config.learning_rate, config.weight_decay, config.max_grad_norm) == (1.0, 0.0, None)
    # the usual warm-up of 20 steps is no mistake of who trains for ten
    assert RunConfig(data="shards", steps=10).warmup_steps == 20
    literals = {name: get_args(kind) for name, kind in HINTS.items() if get_origin(kind) is Literal}
    for name, values in literals.items():
        for value in values:
            assert getattr(RunConfig(**GOOD | {name: value}), name) == value
