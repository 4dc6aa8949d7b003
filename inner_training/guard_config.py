"""What the guard may be asked to do, and why it did what it did, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import IntFlag
from typing import Any, Literal, get_args

from trimtab.errors import RangeError, check_whole, out_of_range, unknown
from trimtab.inner_training.lever_bounds import Bounds, check_bounds


class Reason(IntFlag):
    """Why the guard changed what a policy proposed; several may hold at once."""

    NONE = 0
    NOT_FINITE = 1
    UNAVAILABLE = 2
    RATE = 4
    BOUND = 8
    ROLLED_BACK = 16
    LOST = 32
    FAULT = 64
    ENVELOPE = 128
    SMALL = 256
    REVERSAL = 512
    RESTING = 1024
    DAMPED = 2048
    AFTERMATH = 4096
    JOINT = 8192
    SMOOTHED = 16384
    UNDONE = 32768
    OUT_OF_RANGE = 65536
    LATE = 131072
    SWITCHED_OFF = 262144
    SPENT = 524288
    ABSTAINED = 1048576
    APART = 2097152
    PARTED = 4194304
    TRYING = 8388608
    SETBACK = 16777216
    RESUMED = 33554432
    RETURNING = 67108864
    UNREAD = 134217728
    BROKEN_OFF = 268435456
    SETBACK_VALIDATION = 536870912
    EDITS_SPENT = 1073741824
    EDIT_AFTERMATH = 2147483648
    NARROWEST = 4294967296
    WIDEST = 8589934592
    NO_UNIT = 17179869184


REASON_WORDS: dict[Reason, str] = {
    Reason.NOT_FINITE: "the proposed action was not a finite number, so the lever holds",
    Reason.UNAVAILABLE: "the lever does not exist for this run, so it stays at null",
    Reason.RATE: "the proposed move was larger than the rate limit allows",
    Reason.BOUND: "the proposed multiplier was outside its absolute bounds",
    Reason.ROLLED_BACK: "the run diverged, so the last stable snapshot was restored",
    Reason.LOST: "the run diverged and the rollback budget is spent, so the controller stands back",
    Reason.ENVELOPE: "the learning rate is held below the ceiling of the guard's envelope",
    Reason.FAULT: "the policy raised an error or gave an answer of another shape, so every lever holds",
    Reason.UNREAD: "the run could not be measured or judged, which is no fault of the policy, so every lever holds",
    Reason.BROKEN_OFF: "the decision was broken off, as by Ctrl-C, so every lever holds",
    Reason.SMALL: "the proposed move was within the dead band, so the lever holds",
    Reason.REVERSAL: "the proposed move would turn the lever round for little, so it holds",
    Reason.RESTING: "the lever rests after it last acted",
    Reason.DAMPED: "the lever has been going to and fro, so its move was damped",
    Reason.AFTERMATH: "the run was rolled back a short while ago, so larger steps return only gradually",
    Reason.JOINT: "levers together would have raised the step faster than the learning rate alone may rise",
    Reason.SMOOTHED: "the proposed move was averaged with the last one",
    Reason.UNDONE: "the loss rose in the window after the last moves, so they were taken back",
    Reason.OUT_OF_RANGE: "the signals lie outside what the policy met in training, so every lever holds",
    Reason.LATE: "the policy took longer than its time limit, so every lever holds",
    Reason.SPENT: "the rollback that was asked for is not in the budget",
    Reason.TRYING: "a stable snapshot is being tried, so the lever holds",
    Reason.SETBACK: "the loss rose suddenly, so the last stable snapshot was restored",
    Reason.SETBACK_VALIDATION: "the validation loss rose suddenly, so the last stable snapshot was restored",
    Reason.EDITS_SPENT: "the budget of structural edits is spent, so the structure stays as it is",
    Reason.EDIT_AFTERMATH: "the run was rolled back a short while ago, so its structure stays as it is for now",
    Reason.NARROWEST: "the network may not become that narrow, so fewer units go, or none",
    Reason.WIDEST: "the network may not become that wide, so fewer units are born, or none",
    Reason.NO_UNIT: "the proposed edit amounts to less than one unit, so there is none",
    Reason.RESUMED: "the restored snapshot did no better, as far as can be told, so the run goes on from where it was",
    Reason.RETURNING: "no answer of the policy could be used for too many decisions in a row, so the lever returns towards null",
    Reason.SWITCHED_OFF: "the controller is switched off, so the run goes on by its own settings",
    Reason.ABSTAINED: "a rank abstained, so every rank holds",
    Reason.APART: "the ranks differ in steps, levers, weights or snapshots, so every rank holds",
    Reason.PARTED: "the ranks cannot decide together any more, so the controller has left the run to its own settings",
}


def in_words(code: int) -> str:
    """The reasons in ``code`` as one sentence; empty for none.

    >>> in_words(Reason.BOUND)
    'the proposed multiplier was outside its absolute bounds'
    """
    return "; ".join(words for reason, words in REASON_WORDS.items() if code & reason)


# Of numbers, ends included; what is to lie below 1 or above 0 stops just short of it.
LIMITS: dict[str, tuple[float, float]] = {
    "rate_scale": (1e-9, 10),
    "smoothing": (0, 1 - 1e-9),
    "dead_band": (0, 1 - 1e-9),
    "hysteresis": (0, 1 - 1e-9),
    "rest": (0, 1000),
    "damping": (0, 1),
    "aftermath": (0, 1000),
    "trial": (1, 1000),
    "trial_rise": (1e-9, 100),
    "range_margin": (1e-9, 2),
    "range_share": (1e-9, 1),
    "abstentions": (1, 10**6),
    "rollback_budget": (0, 1000),
    "renewal": (1, 10**9),
    "backoff": (1e-9, 1),
    "recovery": (1, 100),
    "explosion": (1 + 1e-9, 1e6),
    "setback": (1e-9, 100),
    "patience": (1, 10**6),
    "curvature_share": (1e-300, 1),
    "decay_power": (0.5 + 1e-9, 1),
    "decay_factor": (1e-9, 1e4),
    "decay_after": (1, 10**9),
}


Place = Literal["device", "cpu"]


def _check(name: str, value: object, kinds: set[str]) -> None:
    """Raises ``RangeError`` unless a setting is of its kind and in its range."""
    if value is None and "None" in kinds:
        return
    if "bool" in kinds:
        if not isinstance(value, bool):
            raise RangeError(f"{name} is {value!r}; it must be True or False")
        return
    low, high = LIMITS[name]
    if "int" in kinds:
        check_whole(name, value, int(low))
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise out_of_range(name, value, low, high)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Settings of the guard; defaults are ours, calibrated on the training scenarios (docs/decisions.md).

    What a policy proposes as a *move* passes, in this order, through smoothing, dead band, rate limit, rest, damping,
    aftermath and the joint limit. A *target* is held to its bounds alone, so that a schedule is exact.

    Attributes:
        bounds: lowest and highest multiplier by lever, such as ``{"lr": (0.1, 3.0)}``, within the lever's own and around 1,
            of moves and targets alike; kept as a tuple of pairs. The guard's own ``caution`` on the rate may go below.
        rate_scale: factor on every lever's rate limit, in (0, 10].
        smoothing: share of a lever's last move in its next one, in [0, 1).
        dead_band: moves smaller than this, in units of the rate, are none; in [0, 1).
        hysteresis: how much larger than the dead band a move must be that turns a lever round; in [0, 1).
        rest: decisions that a lever rests after a move, >= 0.
        damping: share by which a lever's rate shrinks while it only goes to and fro, in [0, 1].
        joint: whether levers that make the step larger share the rate limit of the learning rate.
        aftermath: decisions after a rollback in which moves that make the step larger return to their full rate, >= 0.
        trial: decisions for which moves are watched before they are kept, >= 1; None keeps them at once.
        trial_rise: rise of the short-term ln loss over a trial at which its moves are taken back, > 0.
        range_margin: how far beyond its range in training a signal counts as unknown to a learned policy, > 0, in units of
            the signal; None never does.
        range_share: share of its signals beyond their ranges from which a policy is not listened to, in (0, 1].
        abstentions: decisions in a row for which levers hold when no answer of the policy can be used (it fails, is late,
            is not finite, or its signals are out of range), >= 1; from the next one on they return towards null by at most
            their rate, until it answers; None lets them hold for ever.
        rollback: restore the last stable snapshot when a run diverges.
        snapshots: where a live run's two snapshots lie: on the ``"device"`` of the originals, or in host memory, ``"cpu"``.
            A population keeps its own where it is.
        rollback_budget: rollbacks allowed per run, >= 0; half of them for setbacks.
        renewal: calm intervals after which one of them is given back, >= 1; None never does.
        backoff: factor on the learning rate after each rollback, in (0, 1].
        recovery: factor on that factor at each decision, after ``aftermath`` calm ones, until it is 1 again, or the rate
            at which the run has diverged once more; >= 1, 1 never gives it back.
        explosion: a run has diverged when the mean loss of an interval exceeds this factor times the larger of
            its first loss and its long-term average (of its magnitude, where that is negative); > 1.
        setback: sudden rise of the ln loss, over an interval, at which the last stable snapshot is tried
            (``setbacks.Setbacks``), > 0; None is never.
        patience: decisions for which the moment before a setback is kept, >= 1.
        curvature_share: holds the learning rate of SGD below this share, in (0, 1], of what the measured curvature
            allows (``envelope.curvature_ceiling``); None is no such ceiling.
        decay_power: holds the learning rate below a ceiling that decays with this power, in (0.5, 1]
            (``envelope.decay_ceiling``); None is no such ceiling.
        decay_factor: where that ceiling begins, in initial learning rates; > 0.
        decay_after: steps until that ceiling has begun to fall, >= 1.

    Raises:
        RangeError: a number out of its range.
        UnknownNameError: bounds of a lever, or a place of snapshots, that there is not.
    """

    bounds: Mapping[str, tuple[float, float]] | Bounds = ()
    rate_scale: float = 1.0
    smoothing: float = 0.0
    dead_band: float = 0.02
    hysteresis: float = 0.05
    rest: int = 0
    damping: float = 0.5
    joint: bool = True
    aftermath: int = 5
    trial: int | None = None
    trial_rise: float = 0.5
    range_margin: float | None = 0.25
    range_share: float = 0.3
    abstentions: int | None = 3
    rollback: bool = True
    snapshots: Place = "device"
    rollback_budget: int = 4
    renewal: int | None = 50
    backoff: float = 0.3
    recovery: float = 1.2
    explosion: float = 10.0
    setback: float | None = 0.4
    patience: int = 15
    curvature_share: float | None = None
    decay_power: float | None = None
    decay_factor: float = 10.0
    decay_after: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", check_bounds(self.bounds))
        if not isinstance(self.snapshots, str):
            raise RangeError(f"snapshots is {self.snapshots!r}; it must be the text 'device' or 'cpu'")
        if self.snapshots not in get_args(Place):
            raise unknown("place of snapshots", self.snapshots, get_args(Place))
        for one in fields(self):
            if one.name not in ("bounds", "snapshots"):
                _check(one.name, getattr(self, one.name), set(str(one.type).split(" | ")))

    @classmethod
    def bare(cls) -> GuardConfig:
        """Bounds and rate limits alone, and the return of levers whose policy gives no answer."""
        return cls(
            dead_band=0.0,
            hysteresis=0.0,
            damping=0.0,
            joint=False,
            aftermath=0,
            range_margin=None,
            rollback=False,
            recovery=1.0,
        )

    def plain(self) -> dict[str, Any]:
        """The settings as JSON holds them; ``GuardConfig(**plain)`` is equal."""
        return asdict(self) | {"bounds": {name: list(pair) for name, pair in check_bounds(self.bounds)}}

    @property
    def needs(self) -> tuple[str, ...]:
        """The measurements that the guard reads beside those of every interval."""
        return () if self.curvature_share is None else ("curvature_max",)
