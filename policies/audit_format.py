"""The lines of an audit: every kind with its fields, and whether a line is one of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Field(NamedTuple):
    """One field of a line: a type (a name of ``TYPES``, with ``?`` where it may be null), and what it says."""

    type: str
    doc: str


def _number(value: object) -> bool:
    if isinstance(value, str):
        return value in ("nan", "inf", "-inf")
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e308


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_number(one) for one in value)


TYPES: Mapping[str, Callable[[object], bool]] = {
    "text": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "whole": _whole,
    "number": _number,
    "names": _names,
    "numbers": lambda value: isinstance(value, dict) and all(map(_number, value.values())),
    "pairs": lambda value: isinstance(value, dict) and all(map(_pair, value.values())),
    "object": lambda value: isinstance(value, dict),
}

_STEP = Field("whole", "optimizer steps done")
_TIME = Field("text", "when, in UTC")

LINES: Mapping[str, Mapping[str, Field]] = {
    "header": {
        "format": Field("whole", "format version of the audit, 1"),
        "trimtab": Field("text", "version"),
        "python": Field("text", "version"),
        "torch": Field("text", "version"),
        "numpy": Field("text", "version"),
        "platform": Field("text", "operating system and processor architecture"),
        "device": Field("text", "kind of the device, with the name of the card"),
        "optimizer": Field("text", "class"),
        "parameter_groups": Field("whole", "how many the optimizer has"),
        "parameters": Field("whole", "numbers that the optimizer trains"),
        "model": Field("text?", "class; null where `attach` was given none"),
        "model_parameters": Field("whole?", "all numbers in the model's parameters, frozen ones too"),
        "policy": Field("text", "name"),
        "policy_sha256": Field("text?", "of the bundle's manifest, which holds the hashes of its files"),
        "policy_options": Field("object?", "settings of a rule"),
        "levers": Field("object", "that the policy governs, with the kind of its actions"),
        "total_steps": Field("whole?", "budget in optimizer steps"),
        "decide_every": Field("whole", "optimizer steps between decisions"),
        "mode": Field("text", "`act` or `advise`, to begin with"),
        "guard": Field("object", "every setting of the guard"),
        "structure": Field("object", "with a structure only: its units by group, and every setting of its edits"),
        "project": Field("text?", "as the user called it"),
        "data": Field("text?", "as the user called it"),
        "examples": Field("whole?", "training examples, as the user said"),
        "time": _TIME,
    },
    "decision": {
        "step": _STEP,
        "ln_loss": Field("number?", "natural log of the mean loss of the interval that ended; null where none did"),
        "signals": Field("numbers", "what the policy saw; empty where it was not asked"),
        "loudest": Field("names", "up to three signals farthest from 0, of those that can be a reason"),
        "proposed": Field("numbers", "the policy's action for each lever; empty where it gave none"),
        "changed": Field(
            "pairs",
            "multiplier before and after, of each lever that changed; of `width` the share of the units that is active",
        ),
        "fired": Field("names", "event levers that fired; `reset`, where units were reset"),
        "applied": Field("numbers", "multiplier in force for each lever"),
        "advised": Field("numbers", "mode `advise` only: the multipliers that would be in force"),
        "reason": Field("text", "why, in words"),
        "guard": Field("text", "what the guard did, in words"),
        "why": Field("text", "which part of the policy moved what, on what evidence, in its own words"),
        "rolled_back": Field(
            "bool",
            "the last stable snapshot was restored; false where the run took up again what it had given up for one",
        ),
        "undone": Field("names", "levers whose last change the guard took back"),
        "edited": Field(
            "object",
            "with a structure only: structural edits by lever, each with its kind (`prune`, `grow`, `reset`) and its units by "
            "group; in mode `advise` those that would be made",
        ),
        "active": Field("numbers", "with a structure only: active units by group, after the decision"),
    },
    "outcome": {
        "step": _STEP,
        "decided_at": Field("whole", "step of the decision that made the change (the first, where several did)"),
        "changed": Field("pairs", "multiplier before and after, of each lever"),
        "fired": Field("names", "event levers that fired"),
        "cause": Field("text", "blocks of the policy by name, `policy`, or `guard`"),
        "ln_loss_change": Field("number", "ln mean loss of the interval after, minus that of the last one before"),
        "ln_loss_usual": Field("number", "mean of that change over up to ten intervals before"),
        "undone": Field("bool", "the interval was rolled back, and the change with it"),
    },
    "validation": {
        "step": _STEP,
        "since": Field("whole?", "step of the validation before; changes from there on are judged by this one"),
        "ln_val_loss": Field("number", "natural log of the validation loss"),
        "ln_val_loss_change": Field("number", "minus that of the validation before"),
    },
    "resumed": {
        "step": Field("whole", "that the run went on from; 0 where no state was loaded"),
        "time": _TIME,
        "torn": Field("whole", "bytes of an unfinished line that were cut off the end"),
        "differs": Field("object", "fields of the header that are others now"),
    },
    "mode": {
        "step": Field("whole", "that the run went on from"),
        "time": _TIME,
        "before": Field("text", "`act` or `advise`, up to here"),
        "mode": Field("text", "the other one, from here on"),
    },
    "lost": {"lines": Field("whole", "lines that could not be written here, as when the disk was full")},
    "detached": {"step": _STEP, "time": _TIME},
}

OPTIONAL = {
    ("decision", "advised"),
    ("decision", "edited"),
    ("decision", "active"),
    ("header", "structure"),
    ("resumed", "torn"),
    ("resumed", "differs"),
}


def fits(line: Mapping[str, Any]) -> bool:
    """Whether a line is of a known kind and has its fields, each of the right type.

    >>> fits({"kind": "lost", "lines": 2}), fits({"kind": "lost", "lines": "two"})
    (True, False)
    """
    kind = line.get("kind")
    if not isinstance(kind, str) or kind not in LINES:
        return False
    for name, (type_, _) in LINES[kind].items():
        if name not in line:
            if (kind, name) not in OPTIONAL:
                return False
        elif not (type_.endswith("?") and line[name] is None) and not TYPES[type_.rstrip("?")](line[name]):
            return False
    return True
