"""The demo: a small CLIP learns the emoji pairs on whatever machine there is, and shows how well."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from clipfast.console import counted, make_console, tell
from clipfast.data.choose_tokenizer import tokenizer_for
from clipfast.data.emoji_classes import zero_shot_questions
from clipfast.data.emoji_pairs import EmojiPairs, load_emoji_pairs, write_emoji_folder
from clipfast.data.tokenizer import Tokenizer
from clipfast.evaluate.retrieval import retrieval_recall
from clipfast.evaluate.zero_shot import zero_shot_accuracy, zero_shot_classifier
from clipfast.models.clip import CLIP
from clipfast.models.config import CLIPConfig, TextConfig, VisionConfig
from clipfast.models.create import create_model
from clipfast.models.foreign_config import config_of
from clipfast.models.model_folder import write_model_folder
from clipfast.models.open_model import find_device
from clipfast.outputs import check_output_folder
from clipfast.settings import at_least, check_setting
from clipfast.train.config import Precision, TrainConfig
from clipfast.train.demo_report import HeldOutPairs, metrics_table, write_demo_report
from clipfast.train.emoji_batches import encode_all, normalized_pixels, training_batches, whole_tokens
from clipfast.train.engine import TrainResult, train
from clipfast.train.interrupt import Stopped, stop_on_interrupt
from clipfast.train.limits import RULES
from clipfast.train.progress import TrainingProgress

# 13.7 M parameters, 9.5 M of them CLIP's vocabulary; two cores take a step of 256 pairs in 0.65 s
SMALL = CLIPConfig(
    embed_dim=192,
    vision_cfg=VisionConfig(image_size=64, patch_size=16, width=192, layers=6),
    text_cfg=TextConfig(context_length=24, width=192, heads=3, layers=3),
)


@dataclass(frozen=True)
class DemoResult:
    """What a run of the demo came to.

    Attributes:
        metrics: Recall and accuracy on the held-out pairs by name, with chance beside each.
        training: The records of its steps, and whether Ctrl-C ended it.
        output: The folder with ``report.html``, ``model.safetensors``, ``model.json``, ``metrics.json``, ``log.jsonl``,
            and ``held_out``: the held-out pictures, each with its caption beside it.
    """

    metrics: dict[str, float]
    training: TrainResult
    output: Path


def run_demo(
    *,
    model: str | os.PathLike[str] = "small",
    steps: int = 200,
    batch_size: int = 256,
    image_size: int | None = None,
    learning_rate: float = 1e-3,
    precision: Precision = "fp32",
    device: str = "auto",
    seed: int = 0,
    output: str | os.PathLike[str] = "runs/demo",
    console: Console | None = None,
) -> DemoResult:
    """Draw the emoji pairs, train a CLIP on them, measure it on held-out compositions and write a report.

    Ctrl-C and SIGTERM end training early; what was learned until then is saved, measured and reported.

    Args:
        model: ``"small"``, or what :func:`clipfast.models.foreign_config.config_of` takes: a name of
            :func:`clipfast.list_models`, a JSON file, or a model's folder, of which the sizes are taken. Its vocabulary
            is CLIP's.
        steps: Optimizer steps.
        batch_size: Pairs a step; at most as many as there are to train on.
        image_size: Pixels a side; the model's own by default.
        learning_rate: After the warm-up.
        precision: ``"fp32"``, or ``"bf16"`` (autocast).
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: CUDA where there is one.
        seed: Of the first weights and the order of batches. What is held out is always the same: ``--data emoji`` of
            other commands measures what no demo has seen.
        output: The folder for what is written; files of an earlier run are replaced.
        console: Where to report; standard output by default.

    Raises:
        ImportError: A package of the extra ``clipfast[demo]`` is missing.
        ValueError: An argument is out of range, or captions are longer than the model's context.
        FloatingPointError: The loss is not finite.
        Stopped: The end was asked for before the first step.
    """
    started = time.perf_counter()
    console = console or make_console()
    output = Path(output)
    check_setting("batch_size", batch_size, int, at_least(2))
    check_setting("image_size", image_size, int | None, at_least(1))
    check_setting("seed", seed, int, RULES["seed"])
    check_output_folder(output)
    with stop_on_interrupt() as stop:
        with stop.at_once():
            training = TrainConfig(steps, learning_rate, warmup_steps=max(1, min(20, steps // 5)), precision=precision)
            config = _with_image_size(SMALL if model == "small" else config_of(model), image_size)
            if config.text_cfg.vocab_size != Tokenizer.vocab_size:
                raise ValueError(
                    f"model: got a vocabulary of {config.text_cfg.vocab_size}, expected CLIP's {Tokenizer.vocab_size}, "
                    f"by which the demo reads its captions; clipfast train --data emoji takes other tokenizers"
                )
            tokenizer_for(config.text_cfg)
            torch_device = find_device(device)
            torch.manual_seed(seed)
            clip = create_model(config, device=torch_device)
            parameters = sum(parameter.numel() for parameter in clip.parameters())
            threads = f"{torch_device}, {counted(torch.get_num_threads(), 'thread')}"
            tell(console, f"model {os.fspath(model)}: {parameters / 1e6:.1f} M parameters, {threads}")

            size = config.vision_cfg.image_size
            console.print(f"pictures: OpenMoji at {size}×{size} pixels (drawn once, then kept)", highlight=False)
            pairs = load_emoji_pairs(size)
            tokens = whole_tokens(pairs.captions, config.text_cfg.context_length)
            train_count, held_out_count = len(pairs.train_indices), len(pairs.held_out_indices)
            if not 2 <= batch_size <= train_count:
                raise ValueError(f"batch_size: got {batch_size}, expected 2 to {train_count}, the pairs to train on")
            console.print(f"pairs: {train_count} to train on, {held_out_count} held out", highlight=False)

            output.mkdir(parents=True, exist_ok=True)
        batches = training_batches(pairs, tokens, batch_size, seed)
        with TrainingProgress(steps, console) as progress:
            result = train(clip, batches, training, log_path=output / "log.jsonl", on_step=progress.update)
        taken = len(result.history)
        if not taken:
            raise Stopped
        write_model_folder(output, config, {name: value.cpu() for name, value in clip.state_dict().items()})
        if result.interrupted:
            console.print(f"stopped after step {taken} of {steps}; what was learned is kept", highlight=False)

        clip.eval()
        held_out = pairs.held_out_indices
        images = encode_all(clip.encode_image, normalized_pixels(pairs.pictures[held_out]), batch_size, torch_device)
        texts = encode_all(clip.encode_text, tokens[held_out], batch_size, torch_device)
        metrics = retrieval_recall(images, texts) | _zero_shot_metrics(clip, pairs, images)
        _write_json(output / "metrics.json", metrics)
        write_emoji_folder(pairs, output / "held_out")
        console.print(metrics_table(metrics))

        settings = {
            "model": f"{os.fspath(model)}, {parameters:,} parameters",
            "pictures": f"{size}×{size} pixels",
            "pairs": f"{train_count} to train on, {held_out_count} held out",
            "steps": f"{taken} (stopped by hand; {steps} were planned)" if result.interrupted else str(steps),
            "batch size": str(batch_size),
            "learning rate": f"{learning_rate:g} after {training.warmup_steps} steps, then a cosine",
            "weight decay": f"{training.weight_decay:g}",
            "gradient norm": f"at most {training.max_grad_norm:g}",
            "precision": precision,
            "seed": str(seed),
            "device": f"{threads}, PyTorch {torch.__version__}",
            "training time": f"{result.history[-1].seconds:.0f} s",
        }
        report = output / "report.html"
        shown = HeldOutPairs(pairs.pictures[held_out], [pairs.captions[i] for i in held_out], images, texts)
        write_demo_report(report, clip, shown, metrics, result, batch_size, settings)
        tell(console, f"report: {report} · {time.perf_counter() - started:.0f} s in all")
        return DemoResult(metrics, result, output)


def _with_image_size(config: CLIPConfig, image_size: int | None) -> CLIPConfig:
    if image_size is not None:
        config = replace(config, vision_cfg=replace(config.vision_cfg, image_size=image_size))
    if not isinstance(config.vision_cfg.image_size, int):
        raise ValueError(f"model: got images of {config.vision_cfg.image_size} pixels, expected square ones")
    return config


def _zero_shot_metrics(clip: CLIP, pairs: EmojiPairs, image_features: Tensor) -> dict[str, float]:
    """Ask :func:`clipfast.data.emoji_classes.zero_shot_questions`, given the held-out pictures' features."""
    tokenizer = tokenizer_for(clip.config.text_cfg)
    row_of = {index: row for row, index in enumerate(pairs.held_out_indices.tolist())}
    metrics = {}
    for question in zero_shot_questions(pairs):
        classifier = zero_shot_classifier(
            clip.encode_text, tokenizer, question.class_names, question.templates, device=clip.logit_scale.device
        )
        name = question.name.replace(" ", "_")
        rows = [row_of[index] for index in question.indices.tolist()]
        accuracy = zero_shot_accuracy(image_features[rows], classifier, torch.from_numpy(question.labels), ks=(1,))
        metrics[f"zero_shot_{name}_accuracy"] = accuracy["top1"]
        metrics[f"zero_shot_{name}_chance"] = accuracy["chance1"]
        metrics[f"zero_shot_{name}_classes"] = len(question.class_names)
    return metrics


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
