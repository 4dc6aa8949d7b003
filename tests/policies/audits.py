"""Made-up audits: sealed as real ones are, with outcomes that are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.policies.audit_chain import seal

HEADER: dict[str, Any] = {
    "kind": "header",
    "format": 1,
    "trimtab": "0.1.0",
    "python": "3.12.1",
    "torch": "2.8.0",
    "numpy": "2.1.0",
    "platform": "Linux x86_64",
    "device": "cpu",
    "optimizer": "AdamW",
    "parameter_groups": 2,
    "parameters": 2_500_000,
    "model": "Net",
    "model_parameters": 2_500_000,
    "policy": "plateau",
    "policy_sha256": None,
    "policy_options": {"factor": 0.5},
    "levers": {"lr": "targets"},
    "total_steps": 1000,
    "decide_every": 10,
    "mode": "act",
    "guard": {"rollback": True, "backoff": 0.3},
    "project": None,
    "data": "digits",
    "examples": 1797,
    "time": "2025-01-01T00:00:00Z",
}


def decision(step: int, ln_loss: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "decision",
        "step": step,
        "ln_loss": ln_loss,
        "signals": {"loss_slope": -0.25, "plateau": 0.5},
        "loudest": ["plateau", "loss_slope"],
        "proposed": {"lr": 1.0},
        "changed": {},
        "fired": [],
        "applied": {"lr": 1.0},
        "reason": "the policy holds",
        "guard": "",
        "why": "",
        "rolled_back": False,
        "undone": [],
        **changes,
    }


def outcome(step: int, change: float | str, before: float = 1.0, after: float = 0.5, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "outcome",
        "step": step,
        "decided_at": step - 10,
        "changed": {"lr": [before, after]},
        "fired": [],
        "cause": "plateau",
        "ln_loss_change": change,
        "ln_loss_usual": 0.0,
        "undone": False,
        **changes,
    }


def validation(step: int, since: int | None, change: float | str) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "since": since, "ln_val_loss": 0.5, "ln_val_loss_change": change}


def write(path: Path, lines: Sequence[Mapping[str, Any]], **header: Any) -> Path:
    """A whole audit with those lines after the header."""
    last, sealed = "", []
    for content in ({**HEADER, **header}, *lines):
        line, last = seal(last, content)
        sealed.append(line)
    path.write_bytes(b"".join(sealed))
    return path


SHORT: tuple[dict[str, Any], ...] = (
    decision(0, None),
    decision(
        10,
        -0.5,
        changed={"lr": [1.0, 0.5]},
        applied={"lr": 0.5},
        reason="moved by the policy (plateau: \u03b2 <no> better for 5)",
        why="plateau: \u03b2 <no> better for 5",
    ),
    outcome(20, -0.1),
    validation(20, None, "nan"),
    decision(20, -0.6),
    decision(30, "nan", rolled_back=True, guard="the run diverged", reason="the run diverged", applied={"lr": 0.15}),
    {"kind": "resumed", "step": 20, "time": "2025-01-01T00:01:00Z", "torn": 0, "differs": {"torch": "2.9.0"}},
    {"kind": "lost", "lines": 2},
    decision(30, -0.65),
    {"kind": "detached", "step": 35, "time": "2025-01-01T00:02:00Z"},
)
