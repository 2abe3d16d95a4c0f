"""From rounds of several sides to a decision, without a clock: the rule stands unless a candidate is clearly faster.

Sides that ran in the same round met the same machine, so what counts is the ratio of their times, round by round. A
candidate wins if both hold:

- It leads by 5% in so many rounds that a lead which is really smaller would rarely (below 5%) give as many.
- Its lead is more than noise. If it were none, each round's ratio would be as likely above 1 as below it; Wilcoxon's
  signed-rank test says how unlikely the rounds then are, and it takes 1 in 100,000. Nothing is supposed of the noise
  but that it strikes both sides alike: it may be as large and as wild as it likes.

At least 17 rounds are needed, because fewer heads in a row come up more often. The test is asked once, when all rounds
are there: who looks after every round, and stops when he likes what he sees, finds something sooner or later. Stopping
early to leave things as they are does no harm, and saves most of the time (:func:`is_hopeless`).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEAD = 0.05
"""The least lead that is worth a change."""
CHANCE = 1e-5
"""How often equal sides may give a winner."""
_DOUBT = 0.05
LEAST_ROUNDS = 17
"""2 to the power of minus 17 is below :data:`CHANCE`, of minus 16 above it."""


@dataclass(frozen=True)
class Times:
    """One side's figures, a round each.

    Attributes:
        device_s: Seconds of a call on the device; on the CPU, wall time.
        host_s: Seconds until a call returned to Python.
    """

    device_s: Sequence[float]
    host_s: Sequence[float]

    @property
    def cost(self) -> list[float]:
        """What a call costs in a chain of calls: the device waits for the host, or the host for the device."""
        return [max(pair) for pair in zip(self.device_s, self.host_s, strict=True)]

    @property
    def seconds(self) -> float:
        """The median cost."""
        return statistics.median(self.cost)


@dataclass(frozen=True)
class Comparison:
    """What a candidate is beside the rule.

    Attributes:
        lead: The rule's time over the candidate's, the median of the rounds.
        wins: Whether the candidate is faster beyond doubt.
        slower: Whether it is slower by 2% or more, beyond doubt.
        why: What is missing to a win, or the figures of one.
    """

    lead: float
    wins: bool
    slower: bool
    why: str


def compare(rule: Times, candidate: Times) -> Comparison:
    """Compare a candidate with the rule over rounds that both ran in: the first, where one was given up."""
    leads = _leads(rule.cost, candidate.cost)
    lead = math.exp(statistics.median(leads))
    if lead < 1 + LEAD:
        how = "slower" if lead < 1 else f"faster, which is less than {LEAD:.0%}"
        return Comparison(lead, False, _is_slower(leads), f"{_percent(lead)} {how}")
    device = math.exp(statistics.median(_leads(rule.device_s, candidate.device_s)))
    if device < 1 / (1 + LEAD):
        # under a CUDA graph or a compiler nobody waits for the host
        return Comparison(lead, False, True, f"the host waits less, but the device takes {_percent(device)} longer")
    if chance(leads) > CHANCE or _sure_lead(leads) < math.log1p(LEAD) - 1e-12:
        return Comparison(lead, False, False, f"{_percent(lead)} faster, which {len(leads)} rounds do not make sure")
    return Comparison(lead, True, False, f"{_percent(lead)} faster in {len(leads)} rounds")


def is_hopeless(rule: Times, candidate: Times) -> bool:
    """Return whether more rounds would hardly make a winner of a candidate."""
    leads = sorted(_leads(rule.cost, candidate.cost))
    # not even the better half of the rounds shows the lead that is asked for
    return leads[len(leads) // 2] < math.log1p(LEAD) / 2 and leads[3 * len(leads) // 4] < math.log1p(2 * LEAD)


def is_slower(before: Times, after: Times) -> bool:
    """Return whether a whole block is slower with its changes than without them: by 2% and beyond doubt."""
    return _is_slower(_leads(before.cost, after.cost))


def _leads(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """Return how much less one side takes than the other, as logarithms, round by round."""
    return [math.log(max(a, 1e-12) / max(b, 1e-12)) for a, b in zip(before, after, strict=False)]


def _is_slower(leads: Sequence[float]) -> bool:
    # who was given up after a round or two was slower in each
    sure = max(leads) < 0 if _doubtful(len(leads)) == 0 else -_sure_lead([-lead for lead in leads]) < 0
    return sure and statistics.median(leads) < -math.log(1.02)


def chance(differences: Sequence[float]) -> float:
    """Return how often signs that a coin gives make a signed-rank sum as large as these: Wilcoxon (1945), one-sided.

    Args:
        differences: Of each round; above 0 where the candidate was faster. Zeros count against it.
    """
    n = len(differences)
    if n == 0:
        return 1.0
    # where sizes are the same, those that speak against the candidate get the higher ranks
    by_size = sorted(differences, key=lambda d: (abs(d), d <= 0))
    return _tail(n)[sum(rank for rank, d in enumerate(by_size, 1) if d > 0)]


@functools.cache
def _tail(n: int) -> list[float]:
    """Return how likely the ranks 1 to n, each taken or left by a coin, add up to 0 or more, 1 or more, ..."""
    ways = [1] + [0] * (n * (n + 1) // 2)
    for rank in range(1, n + 1):
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    above, tail = 0, []
    for count in reversed(ways):
        above += count
        tail.append(above / 2**n)
    return tail[::-1]


@functools.cache
def _doubtful(n: int) -> int:
    """Return how many of n rounds may lie below a median by chance, but for :data:`_DOUBT` of all cases."""
    below, k = 0.0, 0
    while (below := below + math.comb(n, k) / 2**n) <= _DOUBT:
        k += 1
    return k


def _sure_lead(leads: Sequence[float]) -> float:
    """Return a bound that the true median lies above, but for 1 in 20 cases."""
    k = _doubtful(len(leads))
    return sorted(leads)[k - 1] if k else -math.inf


@dataclass(frozen=True)
class Verdict:
    """The decision for one shape class.

    Attributes:
        backend: Who serves.
        rule: Who would by the rule.
        lead: As :class:`Comparison` has it; 1 where the rule stands.
        rounds: Of the call with the fewest.
        why: In a few words.
    """

    backend: str
    rule: str
    lead: float
    rounds: int
    why: str


def decide(rule: str, cases: Sequence[Mapping[str, Times | str]]) -> Verdict:
    """Decide who serves a shape class.

    Args:
        rule: The backend that serves by the rule.
        cases: Calls of that class: each backend's times, or in words why it is out of the question there. A candidate
            wins the class if it wins a call of it, and is slower or out of the question at none.

    Returns:
        The decision. Where the rule's own backend is out of the question (it computes wrong results), the fastest that
        is not takes its place, whatever its lead.
    """
    broken = next((case[rule] for case in cases if isinstance(case.get(rule), str)), None)
    candidates = [name for name in dict.fromkeys(name for case in cases for name in case) if name != rule]
    right = [name for name in candidates if all(isinstance(case.get(name), Times) for case in cases)]
    sides = [[len(t.device_s) for t in case.values() if isinstance(t, Times)] for case in cases]
    rounds = min((max(lengths, default=0) for lengths in sides), default=0)
    if broken is not None:
        if not right:
            return Verdict(rule, rule, 1.0, rounds, f"{rule}: {broken}; nothing else serves")
        fastest = min(right, key=lambda name: sum(case[name].seconds for case in cases)) if len(right) > 1 else right[0]
        return Verdict(fastest, rule, 1.0, rounds, f"{rule}: {broken}")
    best, words = None, []
    for name in candidates:
        if name not in right:
            reason = next((case[name] for case in cases if isinstance(case.get(name), str)), "cannot serve every call")
            words.append(f"{name}: {reason}")
            continue
        found = [compare(case[rule], case[name]) for case in cases]
        lead = math.exp(statistics.fmean(math.log(c.lead) for c in found))
        if any(c.wins for c in found) and not any(c.slower for c in found):
            if best is None or lead > best.lead:
                why = next(c.why for c in found if c.wins)
                best = Verdict(name, rule, lead, rounds, why)
        else:
            words.append(f"{name}: {next((c.why for c in found if c.slower), found[0].why)}")
    return best or Verdict(rule, rule, 1.0, rounds, "; ".join(words) or "nothing else serves")


def _percent(lead: float) -> str:
    return f"{abs(lead - 1):.0%}" if lead >= 1 else f"{1 / lead - 1:.0%}"
