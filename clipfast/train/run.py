"""``clipfast train``: a run from its configuration to a trained model."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor

from clipfast.console import counted, make_console, tell
from clipfast.data.batches import training_batches
from clipfast.data.choose_tokenizer import keep_tokenizer, tokenizer_beside, tokenizer_for
from clipfast.data.pairs import DistinctPictures, PairSource
from clipfast.data.sources import open_pairs
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.models.model_folder import write_model_folder
from clipfast.outputs import check_output_folder
from clipfast.train.checkpoint import Checkpoints
from clipfast.train.config import RunConfig, TrainConfig, compile_mode
from clipfast.train.engine import StepRecord, TrainResult, train_on
from clipfast.train.interrupt import StopRequest, stop_on_interrupt
from clipfast.train.paths import shown, start_from
from clipfast.train.plan import leave_plan
from clipfast.train.progress import TrainingProgress
from clipfast.train.records import JsonLog, SkippedLog, TensorBoardLog, open_logs, step_values
from clipfast.train.run_models import config_of_run, make_model, make_teacher
from clipfast.train.run_pictures import Pictures
from clipfast.train.trainer import Trainer
from clipfast.train.validation import Validation
from clipfast.train.workplace import Workplace, join_workplace

# what may differ between ranks, and between a run and the one that goes on with it
_PLACE = ("device", "workers", "timeout", "output", "resume", "tensorboard", "keep", "save_every", "val_every")


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        training: The records of the steps of this process.
        step: Where the run stands.
        metrics: The last look at the held-out pairs; empty without ``val_data``.
        output: The folder of the run: ``model.json``, ``model.safetensors``, ``checkpoints``, ``log.jsonl``.
    """

    training: TrainResult
    step: int
    metrics: dict[str, float]
    output: Path


def run_training(config: RunConfig, *, console: Console | None = None) -> RunResult:
    """Train a CLIP as ``config`` says, alone or as one of the processes that ``torchrun`` started.

    Every step is a function of the configuration and the step's number, so a run that was ended, at any moment and by
    anything, goes on from its last checkpoint as if nothing had been. What cannot work is found out before training
    begins, and on all ranks at once.

    SIGINT and SIGTERM, whichever processes of a run get them, end it after the step in progress, saved; see
    :func:`clipfast.train.interrupt.stop_on_interrupt`.

    Args:
        config: The configuration, the same on every rank.
        console: Where rank 0 reports; standard output by default.

    Raises:
        ValueError: Settings that do not fit the data, the model, the checkpoint or the other ranks.
        OSError: Files that are missing, a folder that cannot be written to, or a full disk.
        FloatingPointError: The loss is not finite. The last checkpoint is from before.
        RuntimeError: Something went wrong on another rank.
        Stopped: A process without others was told to stop while it prepared the run, of which nothing is lost.
    """
    with stop_on_interrupt() as stop:
        return _run(config, console, stop)


def _run(config: RunConfig, console: Console | None, stop: StopRequest) -> RunResult:
    torch.manual_seed(config.seed)
    place = join_workplace(config.device, timeout=config.timeout)
    try:
        return _prepared(config, place, console or make_console(quiet=not place.leads), stop).go()
    except BaseException as error:
        if place.group is not None:  # the frames hold DDP, which holds the group that `leave` lets go of
            traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if place.group is not None:
            leave_plan()
        place.leave()


def _prepared(config: RunConfig, place: Workplace, console: Console, stop: StopRequest) -> _Run:
    # ranks wait for each other: one of many may not leave before all have agreed to
    with stop.at_once() if place.group is None else contextlib.nullcontext():
        run = _Run(config, place, console, stop)
        run.resume()
    return run


class _Run:
    def __init__(self, config: RunConfig, place: Workplace, console: Console, stop: StopRequest) -> None:
        self.config, self.place, self.console, self.stop = config, place, console, stop
        self.output = Path(config.output)
        place.agree("settings", self._settings())
        self.model_config = place.together("model", lambda: config_of_run(config))
        place.together("output", lambda: check_output_folder(self.output))
        self.source = place.together("data", lambda: self._open(config.data, training=True))
        place.agree("data", {"pairs": len(self.source), "groups": len(self.source.groups)})
        self.pictures = Pictures(config, self.model_config, place)
        self.training: TrainConfig = config.training(len(self.source), self.pictures.pairs_a_step)
        self.tokenizer = place.together("tokenizer", self._find_tokenizer)
        place.agree("tokenizer", self.tokenizer.identity)
        self.validation = place.together("val_data", self._make_validation)
        model = place.together("model", lambda: make_model(config, self.model_config))
        teacher = place.together("distill_model", lambda: make_teacher(config, self.model_config))
        # ranks meet in here: nothing may have gone wrong on one of them before
        self.trainer = Trainer(model, self.training, place, equal_batches=True, teacher=teacher)
        self.checkpoints = Checkpoints(self.output / "checkpoints", place, keep=config.keep)
        self.metrics: dict[str, float] = {}
        # whether there is something that no checkpoint holds
        self._unsaved = True
        # of a step whose look at the held-out pairs was left when the run was told to stop
        self._owed: dict[str, Any] | None = None

    def _open(self, place: str, *, training: bool) -> PairSource:
        size = self.model_config.vision_cfg.image_size
        return open_pairs(place, self.config.data_options(), training=training, image_size=size)

    def _find_tokenizer(self) -> AnyTokenizer:
        config, text = self.config, self.model_config.text_cfg
        return tokenizer_for(text, config.tokenizer or tokenizer_beside(config.model, text))

    def _make_validation(self) -> Validation | None:
        if self.config.val_data is None:
            return None
        try:
            source = self._open(self.config.val_data, training=False)
        except (ValueError, OSError) as error:
            # of an error in JSON or of an encoding no second one is made with a text alone
            kind = type(error) if isinstance(error, OSError) else ValueError
            raise kind(f"val_data: {str(error).removeprefix('data: ')}") from error
        validation = Validation(
            DistinctPictures(source, self.config.val_pairs),
            self.config.val_pairs,
            self.pictures.transform(train=False),
            self.tokenizer,
            self.pictures.pairs_measured,
        )
        validation.check()
        return validation

    # --- the run ------------------------------------------------------------------------------------------

    def go(self) -> RunResult:
        config, place, trainer = self.config, self.place, self.trainer
        self.checkpoints.check_room(trainer.state())
        batches = training_batches(
            self.source,
            self.pictures.transform(train=True),
            self.tokenizer,
            self.pictures.shares,
            seed=config.seed,
            first_step=trainer.step,
            last_step=self.training.steps,
            workers=config.workers,
            pin_memory=place.device.type == "cuda",
            pool=config.shuffle_pool,
            stop=self.stop.asked,
        )
        self._announce()
        # what is owed has no line yet, or one of a run that paid and was killed before it saved
        logged = trainer.step - (self._owed is not None)
        logs = place.together("output", lambda: open_logs(self.output, config, logged) if place.leads else [])
        skipped = SkippedLog(self.output / f"skipped-{place.rank}.jsonl")
        with (
            contextlib.closing(batches),
            TrainingProgress(self.training.steps, self.console, first=trainer.step) as progress,
        ):

            def keep_books(record: StepRecord) -> None:
                self._unsaved = True
                values = step_values(record)
                if self._due(config.val_every) or record.step == self.training.steps:
                    self._measure(values, logs)
                else:
                    self._log(values, logs)
                progress.update(record)
                if self._due(config.save_every):
                    self._save(last=False)

            if self._owed is not None:
                self._unsaved = True
                self._measure(self._owed, logs)
            result = train_on(trainer, skipped.watch(batches), [keep_books])
        if self._unsaved and (trainer.step or result.interrupted):
            self._save(last=True)
        for log in logs:
            log.close()
        if result.interrupted or self._owed is not None:
            result.interrupted = True
            self._say(f"stopped after step {trainer.step} of {self.training.steps}, saved")
        if trainer.step:
            self._write_model()
        self._report(result, skipped)
        return RunResult(result, trainer.step, self.metrics, self.output)

    def _measure(self, values: dict[str, Any], logs: Sequence[JsonLog | TensorBoardLog]) -> None:
        """Look at the held-out pairs after a step; a look that is left because of a stop is owed to the next run."""
        found = self.validation.measure(self.trainer, self.stop.asked) if self.validation else {}
        self._owed = values if found is None else None
        if found is not None:
            self.metrics = found or self.metrics
            self._log(values | found, logs)

    def _log(self, values: dict[str, Any], logs: Sequence[JsonLog | TensorBoardLog]) -> None:
        for log in logs:
            log.write(values | {"plan": self.trainer.plan})

    def _due(self, every: int) -> bool:
        return self.trainer.step % every == 0

    def resume(self) -> None:
        """Go on from a checkpoint, where the settings want it and there is one."""
        resume, state = self.config.resume, self.trainer.state()
        if resume == "never":
            if self.place.any(bool(self.checkpoints.list())):
                raise ValueError(
                    f"resume: got 'never' and checkpoints in {self.checkpoints.folder}, expected another output folder"
                )
            return
        if resume == "auto":
            facts = self.checkpoints.load_last(state)
        else:
            facts = self.checkpoints.load(Path(resume), state)
        if facts is None:
            return
        self._compare(facts["settings"])
        plan = facts.get("plan", self.trainer.plan)
        if plan != self.trainer.plan and self.place.leads:
            warnings.warn(
                f"the run goes on with the plan {self.trainer.plan} of kernels and not with {plan}: results may differ "
                f"in their last bits",
                stacklevel=2,
            )
        self.trainer.loaded(facts["numbers"])
        self.metrics, self._owed = facts["metrics"], facts.get("owed")
        self._unsaved = False

    def _compare(self, before: dict[str, Any]) -> None:
        """Warn of settings that make the rest of the run another one; a run may be made longer, for instance."""
        # of one place, whichever folder a command runs in
        here = Path.cwd()
        before, now = start_from(before, here), start_from(self._settings(), here)
        # a bool in checkpoints from before it named a mode
        before = before | ({"compile": compile_mode(before["compile"])} if "compile" in before else {})
        changed = [f"{k} = {now.get(k)!r} and not {v!r}" for k, v in before.items() if now.get(k) != v]
        if changed and self.place.leads:
            warnings.warn(f"the run goes on with other settings: {', '.join(changed)}", stacklevel=2)

    def _settings(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self.config).items() if k not in _PLACE}

    def _save(self, *, last: bool) -> None:
        """Save; a disk that is full in the middle of a run ends it only if it still is at the end."""
        facts = {
            "step": self.trainer.step,
            "numbers": self.trainer.numbers(),
            "settings": start_from(self._settings(), Path.cwd()),
            "metrics": self.metrics,
            "owed": self._owed,
            "plan": self.trainer.plan,
            "model": self.model_config.to_dict(),
        }
        try:
            self.checkpoints.save(self.trainer.state(), facts, score=self.metrics.get("val_loss"))
            self._unsaved = False
        except (OSError, RuntimeError) as error:
            if last:
                raise
            if self.place.leads:
                warnings.warn(f"step {self.trainer.step} was not saved, training goes on: {error}", stacklevel=2)

    def _write_model(self) -> None:
        """Write the weights, or their moving averages, where `clipfast eval` and others find them."""
        chosen = self.trainer.frozen | (self.trainer.ema or self.trainer.weights)
        weights = {name: _whole(chosen.get(name, value)) for name, value in self._model_state()}

        def write() -> None:
            keep_tokenizer(self.tokenizer, self.output)
            write_model_folder(self.output, self.model_config, weights)

        self.place.together("output", lambda: write() if self.place.leads else None)

    def _model_state(self) -> list[tuple[str, Tensor]]:
        return list(self.trainer.model.state_dict().items())

    # --- what a person sees -------------------------------------------------------------------------------

    def _announce(self) -> None:
        place, say = self.place, self._say
        parameters = sum(p.numel() for p in self.trainer.model.parameters())
        how = self.training.precision + (", sigmoid loss" if self.trainer.loss == "siglip" else "")
        say(f"model {shown(self.config.model)}: {parameters / 1e6:.1f} M parameters, {how}")
        where = f"cpu, {counted(torch.get_num_threads(), 'thread')}" if place.device.type == "cpu" else "cuda"
        workers = counted(self.config.workers, "worker")
        say(f"ranks: {place.world_size} ({self.training.strategy}), {where}, {workers} each")
        say(f"data: {shown(self.config.data)}; output: {shown(self.output)}")
        say(f"pairs: {len(self.source)}, {self.pictures}, {self.training.steps} steps")
        if self.trainer.step:
            say(f"going on from step {self.trainer.step}")

    def _report(self, result: TrainResult, skipped: SkippedLog) -> None:
        count = int(self.place.sum(torch.tensor(skipped.count, device=self.place.device)))
        if count:
            self._say(f"skipped {count} pairs, which {shown(self.output)}/skipped-*.jsonl names")
        for name, value in self.metrics.items():
            self._say(f"{name}: {value:.4g}")
        if self.trainer.step:
            self._say(f"model: {shown(self.output / 'model.safetensors')}")

    @property
    def _say(self) -> Callable[[str], None]:
        return lambda words: tell(self.console, words)


def _whole(value: Tensor) -> Tensor:
    """Return a weight as one tensor on the CPU; every rank must ask for it."""
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
