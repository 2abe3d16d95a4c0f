"""Tuning from models to a file: what is measured in which order, what is kept of it, and what a user is told."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from clipfast.benchmark.timing import Clock, Interleaved
from clipfast.ops import dispatch, plan, tuned
from clipfast.tuning import cases, decide
from clipfast.tuning.cases import DEFAULT_MODELS, DEFAULT_PRECISIONS, PRECISIONS, Call, Pass
from clipfast.tuning.decide import Times, Verdict
from clipfast.tuning.measure import Measured, backends_of, measure

SECONDS = 75.0
"""What a model may take, once it has run."""
# what of it single calls may take; the rest is for whole towers
_FOR_CALLS = 0.6
_PASS_ROUNDS = 7
# of what is left, what a call's rounds may take at most: later ones want time too
_SHARE = 0.15

Key = tuple[str, str]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Line:
    """What was found for one shape class of one op.

    Attributes:
        op: The op.
        key: The shape class.
        verdict: Who serves it, and why.
        seconds: The median of a call by each backend that was timed, of the call that decided.
        sources: What was running.
    """

    op: str
    key: str
    verdict: Verdict
    seconds: dict[str, float]
    sources: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Whether another backend than the rule's serves."""
        return self.verdict.backend != self.verdict.rule


@dataclass
class Report:
    """What became of tuning.

    Attributes:
        device: What was tuned.
        models: What for: names with precisions.
        lines: What was found, by op and shape class; those where only one implementation can serve are left out.
        wrong: Backends that compute wrong results, each with the call and the error.
        left_out: How many calls there was no time for: the rule stands for them.
        path: The file that was written, or None.
        not_written: Why none was, or None.
        interrupted: Whether Ctrl-C ended it; what was done by then is in the file.
        seconds: How long it took.
    """

    device: torch.device
    models: tuple[str, ...] = ()
    lines: list[Line] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: int = 0
    path: Path | None = None
    not_written: str | None = None
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def changes(self) -> list[Line]:
        """The lines in which another backend than the rule's serves."""
        return [line for line in self.lines if line.changed]

    def choices(self) -> dict[str, dict[str, tuned.Choice]]:
        """Return what the tuned file holds of it."""
        found: dict[str, dict[str, tuned.Choice]] = {}
        for line in self.lines:
            v = line.verdict
            # one line, whatever an error said
            why = "".join(letter if letter.isprintable() else " " for letter in v.why)[:200]
            choice = tuned.Choice(v.backend, v.rule, round(v.lead, 4), v.rounds, why)
            found.setdefault(line.op, {})[line.key] = choice
        return found


def tune(
    models: Sequence[str] | None = None,
    *,
    device: torch.device | str | None = None,
    precisions: Sequence[str] | None = None,
    output: Path | str | None = None,
    seconds: float = SECONDS,
    progress: Progress | None = None,
    new_clock: Callable[[str], Clock] = Clock,
) -> Report:
    """Measure which implementation of every op is the fastest on a device, and write its tuned file.

    Each implementation that can serve a call of the models is checked against float64 and then timed beside the others.
    It takes the place of the rule's only if it leads by 5% and by more than noise, and if the towers with it are no
    slower than without (docs/tuning.md). Running processes go on as they are; this one goes by the new file.

    Args:
        models: Names of :func:`clipfast.list_models`, JSON files, or folders of models, of which the sizes count; the
            four most used by default.
        device: Where; CUDA where there is a card, else the CPU.
        precisions: Of ``"fp32"``, ``"bf16"`` and ``"fp16"`` (autocast), ``"pure_bf16"`` and ``"pure_fp16"``; by default
            all on a card, and on the CPU those without fp16.
        output: A file in the place of the one in the cache folder; ``CLIPFAST_TUNED`` then names it to a process.
        seconds: About how long a model may take. What does not fit stays as the rule has it.
        progress: Called with calls done, calls in all and what is being measured.
        new_clock: Makes the clock of a kind of device.

    Returns:
        A :class:`Report`. A file that cannot be written is told of there, and so is Ctrl-C, which ends the measurements
        and keeps what is done.

    Raises:
        FileNotFoundError: A folder holds no model.
        ValueError: There is no such model, precision or device, or ``output`` is a file of another kind.
    """
    where = _device(device)
    names = tuple(dict.fromkeys(models or DEFAULT_MODELS))
    kinds = tuple(dict.fromkeys(precisions or DEFAULT_PRECISIONS[where.type]))
    for name in names:
        cases.small_copy(name)
    for kind in kinds:
        if kind not in PRECISIONS:
            raise ValueError(f"tune(precisions): got {kind!r}, expected some of {', '.join(PRECISIONS)}")
    if not seconds > 0:
        raise ValueError(f"tune(seconds): got {seconds}, expected a positive number")
    target = None if output is None else Path(output)
    if target is not None:
        tuned.check_target(target)
    began = time.monotonic()
    work = _Work(where, seconds, progress or (lambda done, total, what: None), new_clock)
    report = Report(where)
    with _trying({}), warnings.catch_warnings():
        warnings.simplefilter("ignore", dispatch.FallbackWarning)
        try:
            for i, name in enumerate(names):
                work.tune_model(name, kinds, i, len(names))
                # whatever becomes of the next model
                _keep(report, work, target)
        except KeyboardInterrupt:
            report.interrupted = True
            _keep(report, work, target)
    plan.reset()
    report.seconds = time.monotonic() - began
    return report


def _keep(report: Report, work: _Work, target: Path | None) -> None:
    """Put what is known so far into the report and the file."""
    report.models, report.lines = tuple(work.models), work.lines()
    report.wrong, report.left_out = work.wrong, work.left_out
    try:
        report.path = tuned.write(report.device, report.choices(), report.models, target)
    except OSError as error:
        report.not_written = f"{error.filename or target or 'the cache folder'}: {error.strerror or error}"


def _device(device: torch.device | str | None) -> torch.device:
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:  # of a name that PyTorch does not know
        where = None
    if where is None or where.type not in DEFAULT_PRECISIONS:
        raise ValueError(f"tune(device): got {str(device)!r}, expected 'cpu', 'cuda' or 'cuda:1'")
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"tune(device): got {str(where)!r}, but PyTorch finds no card that it can use")
        where = torch.device("cuda", torch.cuda.current_device() if where.index is None else where.index)
        torch.cuda.set_device(where)
    return where


@contextmanager
def _trying(choices: dict[str, dict[str, tuned.Choice]]) -> Iterator[None]:
    """Let these choices be all that was ever tuned."""
    with tuned.instead(choices, "what clipfast tune tries"):
        plan.reset()
        yield


class _Work:
    """What is known so far, and how long there is to know more."""

    def __init__(
        self, device: torch.device, seconds: float, progress: Progress, new_clock: Callable[[str], Clock]
    ) -> None:
        self.device, self.seconds, self.progress, self.new_clock = device, seconds, progress, new_clock
        self.found: dict[Key, list[Measured]] = {}
        self.refused: dict[Key, str] = {}
        self.of_towers: set[Key] = set()
        self.confirmed: set[Key] = set()
        self.wrong: list[str] = []
        self.models: list[str] = []
        self.left_out = 0
        self._forms: set[object] = set()

    def tune_model(self, name: str, precisions: Sequence[str], place: int, of: int) -> None:
        """Measure what a model asks of every op, and then the towers with and without what that changes."""
        self.progress(1000 * place, 1000 * of, f"{name}: looking at what it does")
        made: dict[torch.dtype, object] = {}
        keys: list[tuple[Pass, set[Key]]] = []
        calls: list[Call] = []
        for precision in precisions:
            for one in cases.passes(name, precision, self.device, made):
                asked = cases.calls_of(one)
                keys.append((one, {(c.op, c.key) for c in asked}))
                if one.is_tower:
                    self.of_towers |= keys[-1][1]
                calls += asked
        new = []
        for call in calls:
            if call.form not in self._forms and len(backends_of(call)[1]) > 1:
                self._forms.add(call.form)
                new.append(call)
        # whole encoders take the most: what is cheap comes first, should the time not suffice for all
        new.sort(key=lambda call: call.op == "encoder")
        # a card's kernels have been compiled and checked by now, which takes what it takes
        began = time.monotonic()
        self.models += [f"{cases.label_of(name)} {precision}" for precision in precisions]
        for i, call in enumerate(new):
            self.progress(1000 * place + 900 * i // len(new), 1000 * of, f"{call.op} · {call.source}")
            self._measure(call, began + _FOR_CALLS * self.seconds, len(new) - i)
        for i, (one, asked) in enumerate(keys):
            self.progress(1000 * place + 900 + 100 * i // len(keys), 1000 * of, one.name)
            if one.is_tower:
                self._confirm(one, asked, began + self.seconds)
        self.progress(1000 * (place + 1), 1000 * of, name)

    def _measure(self, call: Call, until: float, calls_left: int) -> None:
        left = until - time.monotonic()
        if left <= 0:
            self.left_out += 1
            return
        measured = measure(call, max(left / calls_left, _SHARE * left), self.new_clock)
        self.found.setdefault((call.op, call.key), []).append(measured)
        for name in measured.wrong:
            self.wrong.append(f"{call.op} ({name}) {measured.sides[name]}: {call.key}, {call.source}")

    def verdict(self, key: Key) -> Verdict:
        """Return who serves a shape class, by what is known of it so far."""
        measured = self.found[key]
        verdict = decide.decide(measured[0].rule, [m.sides for m in measured])
        if key in self.refused and verdict.backend != verdict.rule:
            return Verdict(verdict.rule, verdict.rule, 1.0, verdict.rounds, self.refused[key])
        return verdict

    def _changes(self, keys: Iterable[Key]) -> dict[Key, Verdict]:
        verdicts = {key: self.verdict(key) for key in keys if key in self.found}
        return {key: v for key, v in verdicts.items() if v.backend != v.rule}

    def _confirm(self, one: Pass, keys: set[Key], until: float) -> None:
        """Take changes back that make a tower slower, each by itself or all of them, and those without time to try."""
        changes = self._changes(sorted(keys))
        if changes and time.monotonic() > until:
            self.left_out += len(changes)
            self.refused |= {key: f"{v.backend}: {v.why}, but not tried in a tower" for key, v in changes.items()}
        elif changes and self._is_slower(one, changes):
            blamed = [k for k in changes if len(changes) == 1 or self._is_slower(one, {k: changes[k]})]
            for key in blamed or changes:
                v = changes[key]
                self.refused[key] = f"{v.backend}: {v.why}, but the {one.name} is slower with it"
        self.confirmed |= keys

    def _is_slower(self, one: Pass, changes: dict[Key, Verdict]) -> bool:
        choices: dict[str, dict[str, tuned.Choice]] = {}
        for (op, key), v in changes.items():
            choices.setdefault(op, {})[key] = tuned.Choice(v.backend, v.rule)

        def side(choices: dict[str, dict[str, tuned.Choice]]) -> Callable[[], None]:
            def run() -> None:
                with _trying(choices):
                    one.run()

            return run

        sides = {"before": side({}), "after": side(choices)}
        for run in sides.values():
            run()
        timed = Interleaved(self.new_clock(self.device.type), sides, [()])
        for _ in range(_PASS_ROUNDS):
            timed.round()
        before, after = (Times(timed.device_s[n], timed.host_s[n]) for n in ("before", "after"))
        return decide.is_slower(before, after)

    def lines(self) -> list[Line]:
        """Return what was found; but changes that no tower has confirmed yet are not."""
        lines = []
        for key in sorted(self.found):
            verdict = self.verdict(key)
            unconfirmed = key in self.of_towers and key not in self.confirmed
            if verdict.backend != verdict.rule and unconfirmed:
                continue
            measured = self.found[key]
            seconds = _telling(measured, verdict)
            lines.append(Line(*key, verdict, seconds, tuple(dict.fromkeys(m.call.source for m in measured))))
        return lines


def _telling(measured: Sequence[Measured], verdict: Verdict) -> dict[str, float]:
    """Return the backends' times: of the call that the winner leads at by the most, or of the largest."""
    times = [{n: t.seconds for n, t in m.sides.items() if isinstance(t, Times) and t.device_s} for m in measured]
    if verdict.backend == verdict.rule:
        return max(zip(times, measured, strict=True), key=lambda pair: pair[1].call.elements)[0]
    return max(times, key=lambda t: t.get(verdict.rule, 0) / t.get(verdict.backend, float("inf")))


def about(seconds: float) -> str:
    """Return a time for a reader."""
    power = min(2, max(0, -math.floor(math.log10(max(seconds, 1e-9)) / 3)))
    return f"{seconds * 1000**power:.3g} {('s', 'ms', 'µs')[power]}"
