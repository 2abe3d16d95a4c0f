"""How a model is trained, and with what: settings from code, a TOML file, or flags."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from clipfast.data.options import DataOptions
from clipfast.settings import check_settings
from clipfast.train.limits import MOST_STEPS, RULES, RUN_RULES, check_together
from clipfast.train.paths import start_from

Precision = Literal["fp32", "bf16", "pure_bf16", "fp16"]
Schedule = Literal["cosine", "constant"]
Strategy = Literal["ddp", "fsdp"]
Loss = Literal["auto", "clip", "siglip"]
Compile = Literal["no", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


def compile_mode(value: Any) -> Any:
    """Return the mode that True and False stand for, which is what ``compile`` once was; others as they are."""
    return {True: "default", False: "no"}[value] if isinstance(value, bool) else value


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        learning_rate: At the end of the warm-up.
        schedule: ``"cosine"``, which takes the learning rate to 0 from there, or ``"constant"``.
        warmup_steps: Steps of linear warm-up; no more than ``steps`` are taken.
        weight_decay: Of matrices; biases, norms, scalars and position embeddings do not decay.
        max_grad_norm: Gradients are scaled down to this norm; None leaves them.
        precision: ``"fp32"``; ``"bf16"`` or ``"fp16"`` for autocast around the towers, the latter with a loss scale;
            ``"pure_bf16"`` for weights in bfloat16 beside a copy in float32 that the optimizer works on. The loss is
            computed in float32.
        micro_batch_size: Pairs a rank encodes at once (see :func:`clipfast.train.gradients.compute_gradients`); None
            takes the whole batch.
        ema_decay: Of an exponential moving average of the weights; 0 keeps none.
        grad_checkpointing: Whether blocks' activations are computed again in the backward pass.
        compile: The mode in which ``torch.compile`` compiles the blocks, or ``"no"``. Of those that capture CUDA graphs
            the image tower's blocks alone get graphs: packed captions are of another length in every batch. True and
            False are ``"default"`` and ``"no"``.
        strategy: How ranks share the model: ``"ddp"``, or ``"fsdp"`` (FSDP2).
        seed: Of all random numbers in the towers.
        loss: ``"clip"``, the softmax over a batch (:func:`clipfast.ops.contrastive_loss`), or ``"siglip"``, the sigmoid
            of every pair (:func:`clipfast.ops.siglip_loss`); ``"auto"`` takes the latter for models with a
            ``logit_bias``. Under it neither scale nor bias decays, and the scale is not clamped.
        decay_positions: Whether position embeddings and the probe of attention pooling decay too, as in open_clip's
            script.
        label_smoothing: The share of every target that is spread evenly over its row; see
            :func:`clipfast.ops.contrastive_loss`.
        lock_image: Whether the image tower is frozen, but for its last ``lock_image_unlocked_groups`` groups of layers;
            see :meth:`clipfast.CLIP.lock_image_tower`. The names of all five are open_clip's.
        lock_image_unlocked_groups: How many of them still learn.
        lock_image_freeze_bn_stats: Whether a frozen ResNet's BatchNorms use their running statistics.
        lock_text: Whether the text tower is frozen, but for its last ``lock_text_unlocked_layers`` groups.
        lock_text_unlocked_layers: How many of them still learn.
    """

    steps: Annotated[int, "Optimizer steps."]
    learning_rate: Annotated[float, "At the end of the warm-up."] = 1e-3
    schedule: Annotated[Schedule, "cosine, which ends at 0, or constant."] = "cosine"
    warmup_steps: Annotated[int, "Steps of linear warm-up."] = 20
    weight_decay: Annotated[float, "Of matrices; biases, norms, scalars and position embeddings do not decay."] = 0.1
    max_grad_norm: Annotated[float | None, "Gradients are scaled down to this norm."] = 1.0
    precision: Annotated[Precision, "fp32, bf16 (autocast), pure_bf16 (with fp32 copies of weights), or fp16."] = "fp32"
    micro_batch_size: Annotated[int | None, "Pairs a rank encodes at once: same gradients, less memory."] = None
    ema_decay: Annotated[float, "Of a moving average of the weights; 0 keeps none."] = 0.0
    grad_checkpointing: Annotated[bool, "Compute activations again in the backward pass."] = False
    compile: Annotated[Compile, "The blocks, by torch.compile: no, default, reduce-overhead, max-autotune, ..."] = "no"
    strategy: Annotated[Strategy, "How ranks share the model: ddp, or fsdp."] = "ddp"
    seed: Annotated[int, "Of the data's order, crops and dropout."] = 0
    loss: Annotated[Loss, "clip (softmax), siglip (sigmoid), or auto: siglip for models with a logit_bias."] = "auto"
    decay_positions: Annotated[bool, "Position embeddings decay too, as in open_clip's script."] = False
    label_smoothing: Annotated[float, "The share of every target that is spread over its row."] = 0.0
    lock_image: Annotated[bool, "Freeze the image tower (LiT)."] = False
    lock_image_unlocked_groups: Annotated[int, "Its last groups of layers that still learn."] = 0
    lock_image_freeze_bn_stats: Annotated[bool, "A frozen ResNet keeps BatchNorm's statistics."] = False
    lock_text: Annotated[bool, "Freeze the text tower."] = False
    lock_text_unlocked_layers: Annotated[int, "Its last groups of layers that still learn."] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "compile", compile_mode(self.compile))
        values = {name: getattr(self, name) for name in TrainConfig.__dataclass_fields__}
        check_settings(values, get_type_hints(TrainConfig), RULES)
        check_together(values, TrainConfig.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainConfig, DataOptions):
    """A whole run of ``clipfast train``: :class:`TrainConfig` and what is around it.

    The fields of :class:`clipfast.data.options.DataOptions` are about ``data`` and ``val_data`` alike.

    Attributes:
        data: The pairs; see :func:`clipfast.data.sources.open_pairs`. Of ``emoji``, those that are not held out.
        epochs: Times that every pair is seen, where ``steps`` is 0.
        batch_size: Pairs a step, over all ranks.
        model: A name of :func:`clipfast.list_models`, a JSON file, or a folder: a run's, open_clip's or transformers'.
            Of a folder, its configuration and its tokenizer; weights are begun anew without ``weights``.
        weights: A file or folder of weights to begin with; often ``model``'s own.
        tokenizer: A ``tokenizer.json``, a SentencePiece ``.model``, or a folder with one; for models with another
            vocabulary than CLIP's, by default what lies in ``model``. The run's folder keeps it.
        patch_dropout: The share of patches that the image tower leaves out in training.
        naflex_max_patches: Of a model that takes pictures of any aspect: the most patches of one; None is as many as it
            has positions. Of several, such as ``"128,256,576"``, each step draws one.
        naflex_tokens_per_batch: Of such a model: the patches of a step, over all ranks. A step holds as many pairs as
            they have room for, in the place of ``batch_size``.
        distill_model: A teacher, as ``model``: the loss is the contrastive one and the cross-entropy with the teacher's
            logits, added up as in open_clip. It reads the model's pictures and captions: sizes must be the same.
        distill_weights: The teacher's weights.
        val_data: Held-out pairs; of ``emoji``, those that are.
        val_every: Steps between two looks at them, and at the end.
        val_pairs: The first of them that are looked at.
        output: The folder of the run.
        save_every: Steps between two checkpoints.
        keep: The last checkpoints that are kept, beside the best.
        resume: ``"auto"`` goes on from the last checkpoint of ``output``, if there is one; ``"never"`` wants a folder
            without; else the folder of a checkpoint.
        workers: Processes a rank that read and decode.
        shuffle_pool: Pairs shuffled together.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``.
        timeout: Seconds after which waiting for another rank is an error.
        tensorboard: Whether to write TensorBoard's logs too.
    """

    data: Annotated[str, "Pairs: shards 'train-{000..123}.tar', a .csv or .tsv table, Parquet, a folder, or emoji."]
    steps: Annotated[int, "Optimizer steps; 0 counts them from epochs."] = 0
    learning_rate: Annotated[float, "At the end of the warm-up."] = 5e-4
    epochs: Annotated[float, "Times that every pair is seen, where steps is 0."] = 0.0
    batch_size: Annotated[int, "Pairs a step, over all ranks."] = 256
    model: Annotated[str, "A name of clipfast.list_models(), a JSON file, or a model's folder."] = "ViT-B-32"
    weights: Annotated[str | None, "A file or folder of weights to begin with, such as the model's."] = None
    tokenizer: Annotated[str | None, "A tokenizer.json, a .model, or a folder: for another vocabulary than CLIP's."] = (
        None
    )
    patch_dropout: Annotated[float, "The share of patches that the image tower leaves out."] = 0.0
    naflex_max_patches: Annotated[
        str | None, "Of NaFlex: patches of a picture at most; of several, a step draws one."
    ] = None
    naflex_tokens_per_batch: Annotated[int | None, "Of NaFlex: patches a step, in the place of batch_size."] = None
    distill_model: Annotated[str | None, "A teacher to learn from too, as model."] = None
    distill_weights: Annotated[str | None, "The teacher's weights."] = None
    val_data: Annotated[str | None, "Held-out pairs, as data."] = None
    val_every: Annotated[int, "Steps between two looks at them."] = 1000
    val_pairs: Annotated[int, "The first of them that are looked at."] = 5000
    output: Annotated[str, "The folder of the run."] = "runs/train"
    save_every: Annotated[int, "Steps between two checkpoints."] = 1000
    keep: Annotated[int, "The last checkpoints that are kept, beside the best."] = 3
    resume: Annotated[str, "auto: go on where the folder's run stopped; never; or a checkpoint."] = "auto"
    workers: Annotated[int, "Processes a rank that read and decode."] = 4
    shuffle_pool: Annotated[int, "Pairs shuffled together."] = 200_000
    device: Annotated[str, "cpu, cuda, or auto: CUDA where there is one."] = "auto"
    timeout: Annotated[float, "Seconds after which waiting for another rank is an error."] = 600.0
    tensorboard: Annotated[bool, "Write TensorBoard's logs too."] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "compile", compile_mode(self.compile))
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        check_settings(values, get_type_hints(RunConfig), RUN_RULES)
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(f"steps, epochs: got {self.steps} and {self.epochs:g}, expected one of them above 0")
        check_together(values, RunConfig.warmup_steps)
        self.data_options()

    def data_options(self) -> DataOptions:
        """Return what of the data is the picture and what the caption.

        Raises:
            ValueError: A name is empty, or the separator is no character.
        """
        return DataOptions(**{field.name: getattr(self, field.name) for field in fields(DataOptions)})

    def training(self, pairs: int, pairs_a_step: float | None = None) -> TrainConfig:
        """Return how to train on so many pairs: epochs become steps, of ``batch_size`` pairs if not of others."""
        pairs_a_step = pairs_a_step or self.batch_size
        values = {field.name: getattr(self, field.name) for field in fields(TrainConfig)}
        values["steps"] = self.steps or math.ceil(self.epochs * pairs / pairs_a_step)
        if values["steps"] > MOST_STEPS:
            raise ValueError(
                f"epochs: got {self.epochs:g}, which are {values['steps']:,} steps, expected {MOST_STEPS:,}"
            )
        return TrainConfig(**values)


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of a TOML file, by the names of :class:`RunConfig`.

    Relative paths in it start from the file's folder; see :func:`clipfast.train.paths.start_from`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not TOML, or holds a setting of no known name.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        settings = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:  # TOML is UTF-8, whatever is around it
        raise ValueError(f"{path}: not TOML: {error}") from error
    known = [field.name for field in fields(RunConfig)]
    for name in settings:
        if name not in known:
            raise ValueError(f"{path}: got {name!r}{_near(name, known)}")
    return start_from(settings, path.parent)


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else f", expected settings among {', '.join(sorted(known))}"


def make_run_config(settings: Mapping[str, Any]) -> RunConfig:
    """Make the configuration of a run from settings by name.

    Raises:
        ValueError: ``data`` is missing, or a setting is of no known name, of the wrong type or out of range.
    """
    known = [field.name for field in fields(RunConfig)]
    for name in settings:
        if name not in known:
            raise ValueError(f"settings: got {name!r}{_near(name, known)}")
    if "data" not in settings:
        raise ValueError("data: got none, expected where the pairs are: --data, or data in the TOML file")
    hints = get_type_hints(RunConfig)
    # TOML and people write 1 where 1.0 is meant
    values = {
        name: float(value) if type(value) is int and float in (hints[name], *get_args(hints[name])) else value
        for name, value in settings.items()
    }
    if type(most := values.get("naflex_max_patches")) is int:
        values["naflex_max_patches"] = str(most)
    return RunConfig(**values)
