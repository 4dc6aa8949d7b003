"""The changes that an audit tells of, by kind, and what came of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

from trimtab.agents.statistics import Interval

SIZES: Mapping[str, float] = {"slight": 0.1, "moderate": 0.5, "large": math.inf}  # below that |ln(after / before)|
ANY = "any"  # the cause of a row that holds all of them
FEWEST = 8  # outcomes without which there is no verdict
MOST_UNDONE = 0.5  # share of undone changes from which on a kind hurts

Judgement = Literal["helped", "hurt", "unclear", "too few"]


@dataclass(frozen=True, order=True)
class Kind:
    """What was changed, in which direction, by how much (a name of ``SIZES``, empty for events), and who did it."""

    lever: str
    direction: str
    size: str
    cause: str

    def text(self) -> str:
        """In words.

        >>> Kind("lr", "down", "large", "plateau").text()
        'lr down, large, by plateau'
        """
        size = f", {self.size}" if self.size else ""
        return f"{self.lever} {self.direction}{size}, by {self.cause}"


@dataclass(kw_only=True)
class Made:
    """One change of one lever.

    Attributes:
        step: when it was decided.
        kind: what kind of change it is.
        ln_loss_change: change of the ln mean loss over the interval after it, NaN when unknown.
        against_usual: the same minus what was usual over the intervals before, NaN when unknown.
        undone: it was rolled back, or taken back by the guard.
        span: step and change of the ln validation loss of the first validation after it, where there was one before.
    """

    step: int
    kind: Kind
    ln_loss_change: float
    against_usual: float
    undone: bool
    span: tuple[int, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What came of the changes of one kind; changes of natural logs of losses, below 0 is better.

    Attributes:
        count: changes.
        undone: how many of them were undone.
        known: how many have an outcome to judge by, the change against what was usual.
        loss: mean change over the interval after it, with its 95 % interval.
        against_usual: mean of that minus what was usual before, with its 95 % interval.
        validation: mean change of the validation loss over the spans that hold such a change, with its 95 % interval.
        verdict: ``helped`` or ``hurt`` where the interval of ``against_usual`` excludes 0 (or most were undone).
    """

    count: int
    undone: int
    known: int
    loss: Interval
    against_usual: Interval
    validation: Interval
    verdict: Judgement


@dataclass
class Found:
    """Everything that an audit tells of changes: those that were made, and the intervals for which nothing changed."""

    made: list[Made] = field(default_factory=list)
    held: list[float] = field(default_factory=list)


def number(value: Any) -> float:
    """A number of an audit, of which ``"nan"``, ``"inf"`` and ``"-inf"`` are texts; NaN for what is none.

    >>> number("-inf"), number(None)
    (-inf, nan)
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def size_of(before: float, after: float) -> str:
    """Name of the size of a change of a multiplier.

    >>> size_of(1.0, 0.5)
    'large'
    """
    size = abs(math.log(max(after, 1e-30) / max(before, 1e-30)))
    return next(name for name, below in SIZES.items() if size < below)


def kinds_of(line: Mapping[str, Any]) -> list[Kind]:
    """The kinds of change that an ``outcome`` line tells of."""
    cause = line["cause"] or "policy"
    both = {name: (number(one), number(other)) for name, (one, other) in line["changed"].items()}
    kinds = [
        Kind(name, "up" if after > before else "down", size_of(before, after), cause)
        for name, (before, after) in both.items()
    ]
    return kinds + [Kind(name, "fires", "", cause) for name in line["fired"]]


def changes_of(lines: Sequence[Mapping[str, Any]]) -> Found:
    """Follows the lines of an audit, header left out, in their order; each has the fields of its kind."""
    found, settled = Found(), -1
    waiting: list[Made] = []
    known: list[tuple[int, float]] = []
    for line in lines:
        kind, step = line["kind"], line.get("step", 0)
        if kind == "resumed":  # what came after the saved state is void; its changes are not validated any more
            waiting = [made for made in waiting if made.step < step]
            known, settled = [(at, loss) for at, loss in known if at <= step], -1
        elif kind == "outcome":
            settled = step
            new = _made(line)
            found.made += new
            waiting += new
        elif kind == "validation":
            _validate(waiting, line)
            waiting = []
        elif kind == "decision":
            _take_back(found.made, line)
            loss = number(line["ln_loss"])
            if math.isfinite(loss):
                if known and settled != step:
                    found.held.append(loss - known[-1][1])
                known.append((step, loss))
    return found


def _made(line: Mapping[str, Any]) -> list[Made]:
    change, usual = number(line["ln_loss_change"]), number(line["ln_loss_usual"])
    at, undone = line["decided_at"], line["undone"]
    return [
        Made(step=at, kind=kind, ln_loss_change=change, against_usual=change - usual, undone=undone)
        for kind in kinds_of(line)
    ]


def _validate(waiting: Sequence[Made], line: Mapping[str, Any]) -> None:
    change, since = number(line["ln_val_loss_change"]), line["since"]
    if since is not None and math.isfinite(change):
        for made in waiting:
            if made.step >= since:
                made.span = (line["step"], change)


def _take_back(made: Sequence[Made], line: Mapping[str, Any]) -> None:
    for lever in line["undone"]:
        last = next((one for one in reversed(made) if one.kind.lever == lever), None)
        if last is not None:
            last.undone = True


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of what is finite, and its 95 % interval by Student's t; the interval of a single value is without bounds.

    >>> mean_interval([1.0, 1.0, 1.0])
    Interval(estimate=1.0, low=1.0, high=1.0)
    """
    known = np.array([value for value in values if math.isfinite(value)])
    if known.size == 0:
        return Interval(math.nan, -math.inf, math.inf)
    mean = float(known.mean())
    if known.size == 1:
        return Interval(mean, -math.inf, math.inf)
    half = float(stdtrit(known.size - 1, 0.975) * known.std(ddof=1) / math.sqrt(known.size))
    return Interval(mean, mean - half, mean + half)


def effect_of(made: Sequence[Made]) -> Effect:
    """What came of changes, all of one kind."""
    against = mean_interval([one.against_usual for one in made])
    known = sum(math.isfinite(one.against_usual) for one in made)
    undone = sum(one.undone for one in made)
    spans = dict(one.span for one in made if one.span is not None)
    return Effect(
        count=len(made),
        undone=undone,
        known=known,
        loss=mean_interval([one.ln_loss_change for one in made]),
        against_usual=against,
        validation=mean_interval(list(spans.values())),
        verdict=_verdict(len(made), undone, known, against),
    )


def _verdict(count: int, undone: int, known: int, against: Interval) -> Judgement:
    if count >= FEWEST and undone >= MOST_UNDONE * count:
        return "hurt"
    if known < FEWEST:
        return "too few"
    if against.high < 0:
        return "helped"
    return "hurt" if against.low > 0 else "unclear"


def by_kind(made: Sequence[Made]) -> dict[Kind, list[Made]]:
    """Changes by kind, in alphabetical order."""
    groups: dict[Kind, list[Made]] = {}
    for one in made:
        groups.setdefault(one.kind, []).append(one)
    return dict(sorted(groups.items()))


def of_any_cause(kind: Kind) -> Kind:
    """The same change whoever made it."""
    return replace(kind, cause=ANY)


def with_any_cause(groups: Mapping[Kind, list[Made]], causes: Collection[Kind]) -> dict[Kind, list[Made]]:
    """Adds a group of all causes for each change that has several of them among ``causes``, in alphabetical order."""
    several = {whole for whole, count in Counter(map(of_any_cause, set(causes))).items() if count > 1}
    whole: dict[Kind, list[Made]] = {}
    for kind, made in groups.items():
        if of_any_cause(kind) in several:
            whole.setdefault(of_any_cause(kind), []).extend(made)
    return dict(sorted({**groups, **whole}.items()))
