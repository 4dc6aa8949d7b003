"""What a controller's saved state looks like: the kind, range and length of every entry."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from trimtab.errors import MismatchError
from trimtab.inner_training.events import REST
from trimtab.inner_training.guard_config import LIMITS as SETTINGS
from trimtab.inner_training.setbacks import MOST_DOUBT, OPEN
from trimtab.inner_training.steering import Steering
from trimtab.inner_training.telemetry import DEPTHS, SAMPLED_STEPS
from trimtab.policies import forms
from trimtab.policies.attachment import MOST_STEPS, Mode
from trimtab.policies.forms import (
    LARGEST,
    VAST,
    Anything,
    Entries,
    Flag,
    Form,
    Listed,
    Maybe,
    Named,
    Nested,
    Number,
    Row,
    Text,
    Whole,
)
from trimtab.policies.outcomes import USUAL
from trimtab.policies.plain import ARRAY, from_plain, to_plain
from trimtab.policies.policy import Policy
from trimtab.policies.summary import RECENT

ENDLESS = (math.inf, -math.inf)
LN = 2000.0  # beyond the natural log of any loss, and the change of one
COUNT = Whole(MOST_STEPS)
MULTIPLIER = Number(0.0)
MEASURED = Number(-LARGEST, LARGEST, unknown=True, endless=ENDLESS)  # of a run that need not be finite
SIZE = Number(0.0, LARGEST, unknown=True, endless=(math.inf,))
LN_LOSS = Number(-LN, LN, unknown=True)
PAIR = Row((MULTIPLIER, MULTIPLIER))

# Where the range of a number in the steering is narrower than that of its kind.
STEERING: forms.Limits = {
    "moves": (-100.0, 100.0),  # of the natural log of a multiplier
    "grad_average": (0.0, LARGEST),
    "guard.ceiling": (0.0, VAST),
    "guard.curvature": (0.0, LARGEST),
    "guard.divergence.caution": (0.0, 1.0),
    "guard.divergence.cap": (0.0, 1.0),
    "guard.divergence.size": (0.0, LARGEST),
    "guard.setbacks.phase": (0, OPEN),
    "guard.setbacks.doubt": (0, MOST_DOUBT),
    "guard.setbacks.peak": (-LN, LN),
    **{f"guard.{one}_loss.{name}": (-LN, LN) for one in ("train", "val") for name in ("level", "last", "before")},
    **{f"guard.{one}_loss.spread": (0.0, LN) for one in ("train", "val")},
    "guard.moderation.last": (-1.0, 1.0),
    "guard.moderation.wavering": (0.0, 1.0),
    "guard.moderation.resting": (0, SETTINGS["rest"][1] + 1),
    "guard.moderation.shaken": (0, SETTINGS["aftermath"][1]),
    "guard.trials.kept": (0.0, VAST),
    "guard.trials.left": (0, SETTINGS["trial"][1]),
    "guard.trials.before": (-LN, LN),
    "guard.trials.level": (-LN, LN),
}

# What becomes of a statistic of ``Memory``, by the end of its name.
STATISTICS: Mapping[str, Number] = {
    "mean": Number(),
    "weight": Number(0.0, 1 + 1e-9),
    "since": Number(0.0, MOST_STEPS),
    "first": Number(unknown=True),
    "latest": Number(unknown=True),
    "previous": Number(unknown=True),
    "best": Number(unknown=True, endless=ENDLESS),
    "fold": Number(unknown=True, endless=ENDLESS),
}

# What rules of ours remember, where it is never negative: counts, and what a root is taken of.
OURS = (
    "count", "age", "stage", "drifting", "quiet", "high", "fired", "left", "factor", "multiplier", "conservatism", "restarts",
    "exploring", "unit", "square", "variance",
)  # fmt: skip

# Numbers of an array, by the kind of its type.
KINDS: Mapping[str, Form] = {
    "b": Flag(),
    "i": Whole(2**63 - 1, -(2**63)),
    "u": Whole(2**64 - 1),
    "f": Number(-sys.float_info.max, sys.float_info.max, unknown=True, endless=ENDLESS),
}

TALLY = Entries({"lower": COUNT, "known": COUNT}, alone=True)
CHANGE = Entries(
    {
        "step": COUNT,
        "moved": Named(PAIR),
        "why": Text(),
        "fired": Listed(Text(), 0, None),
        "outcome": LN_LOSS,
        "undone": Flag(),
    },
    alone=True,
)
CHANGED = Entries(
    {
        "first": COUNT,
        "changes": Named(PAIR),
        "fired": Listed(Text(), 0, None),
        "causes": Listed(Text(), 0, None),
    },
    alone=True,
)
JOURNAL = Entries(
    {
        "counts": Listed(COUNT, 3, 3),
        "guarded": Named(COUNT),
        "ranges": Named(PAIR),
        "tallies": Listed(TALLY, 2, 2),
        "recent": Listed(CHANGE, 0, RECENT),
        "ledger": Entries(
            {
                "loss": LN_LOSS,
                "trend": Listed(Number(-LN, LN), 0, USUAL),
                "open": Maybe(CHANGED),
                "validation": Maybe(Row((COUNT, Number(-LN, LN)))),
            }
        ),
    }
)


def state_form(fresh: Steering, memory: Mapping[str, Any], groups: int, interval: int, events: Sequence[str]) -> Form:
    """The form of a state, but for what must be equal, and for the policy's own state.

    Args:
        fresh: a steering of the same kind that has not decided yet.
        memory: what the memory of the controller's own steering holds, as far as it has been used.
        groups: parameter groups of the optimizer.
        interval: steps that are measured together.
        events: that the policy may fire.
    """
    return Entries(
        {
            "mode": Text(get_args(Mode)),
            "total_steps": Maybe(Whole(MOST_STEPS, 1)),
            "lr_multiplier": MULTIPLIER,
            "effective_lr": Listed(Number(), groups, groups),
            "decided_at": COUNT,
            "val_loss": Number(unknown=True, endless=ENDLESS),
            "anchor": Flag(),
            "steering": _steering(fresh, memory, events),
            "run": _run(interval),
            "journal": JOURNAL,
        }
    )


def _steering(fresh: Steering, memory: Mapping[str, Any], events: Sequence[str]) -> Form:
    standing = fresh.standing()
    guard = {name: held for name, held in standing.pop("guard").items() if name != "events"}
    levers = standing.pop("levers")
    inside = {name: forms.form_of(held, COUNT, LARGEST, STEERING, f"guard.{name}") for name, held in guard.items()}
    outside = {name: forms.form_of(held, COUNT, LARGEST, STEERING, name) for name, held in standing.items()}
    rests = Named(Listed(Whole(REST), 1, 1), events)
    return Entries(
        {
            "levers": Listed(Text(levers), len(levers), len(levers)),
            **outside,
            "guard": Entries({**inside, "events": rests}, alone=True),
            "memory": _Memory(memory),
        },
        alone=True,
    )


@dataclass(frozen=True)
class _Memory:
    """Statistics by name, each of the shape that it has in ``own``, where that has it."""

    own: Mapping[str, Any]

    def check(self, value: Any, path: str) -> None:
        """See ``Form``."""
        Named(Anything()).check(value, path)
        for name, held in value.items():
            kind = name.rpartition("/")[2]
            if kind not in STATISTICS:
                raise forms.wrong(path, name, f"a mapping of names that end in {', '.join(STATISTICS)}")
            one: Form = STATISTICS[kind]
            if kind == "fold":
                width = len(self.own[name][0]) if name in self.own else None
                one = Listed(one, width or 0, width)
            Listed(one, 1, 1).check(held, f"{path}.{name}")


def _run(interval: int) -> Form:
    sampled = [str(position) for position in range(max(interval - SAMPLED_STEPS, 0), interval)]
    depths = Listed(SIZE, DEPTHS, DEPTHS)
    probe: dict[str, Form] = {
        "grad_norms": Named(SIZE, sampled),
        "grad_dot": Maybe(MEASURED),
        "update_norm": Maybe(depths),
        "weight_norm": Maybe(depths),
    }
    return Entries(
        {
            "steps": COUNT,
            "position": COUNT,
            "recorded": COUNT,
            "initial_lr": MULTIPLIER,
            "losses": Listed(MEASURED, 0, None),
            "unknown": Flag(),
            "probe": Entries(probe, alone=True),
            "intervals": COUNT,
        },
        alone=True,
    )


def check_policy_state(state: Any, policy: Policy, path: str) -> None:
    """Raises ``MismatchError`` unless a policy can have that state, as ``to_plain`` gave it.

    It has the entries of one that has not started: of ours the same shapes and kinds, finite where those are; of
    somebody else's arrays of numbers for as many runs.
    """
    fresh = policy.init(1)
    if type(policy).__module__.partition(".")[0] == "trimtab":
        limits = {f"{path}.{key}.{ARRAY}": (0.0, LARGEST) for key in fresh if key.rpartition(".")[2] in OURS}
        forms.form_of(to_plain(fresh), Whole(2**63 - 1), LARGEST, limits, path).check(state, path)
    else:
        _check_entries(state, fresh, path)
    try:
        from_plain(state)
    except Exception as error:  # whatever it holds
        raise MismatchError(f"{path} of the state cannot be read ({error!r}): {forms.REMEDY}") from error


def _check_entries(held: Any, fresh: Any, path: str) -> None:
    if isinstance(fresh, Mapping):
        Named(Anything()).check(held, path)
        for key, one in fresh.items():
            _check_entries(forms.entry(held, key, path), one, f"{path}.{key}")
    elif isinstance(fresh, np.ndarray) and fresh.dtype.kind in KINDS:
        plain = {key: forms.entry(held, key, path) for key in (ARRAY, "dtype")}
        try:
            kind = np.dtype(str(plain["dtype"])).kind
            Nested(KINDS[kind]).check(plain[ARRAY], path)
            found = from_plain(plain)
            fits = found.ndim == fresh.ndim and found.shape[:1] == fresh.shape[:1]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, MismatchError):
                raise
            fits = False
        if not fits:
            raise forms.wrong(path, plain, f"an array of numbers of shape {fresh.shape}")
