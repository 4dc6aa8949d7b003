"""What a user should know of a live run, and would not find out: each is said once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from trimtab.inner_training.activations import SEEN
from trimtab.inner_training.measurements import MEASUREMENTS, UNITS
from trimtab.inner_training.own_step import own_step
from trimtab.inner_training.signals import Signal
from trimtab.policies.attachment import Attachment
from trimtab.policies.editing import REMEDY, Editing
from trimtab.policies.network import LearnedPolicy
from trimtab.policies.summary import Journal

WAIT = 20  # decisions after which a validation loss should have come
BUDGET = ("progress", "progress_available")  # signals that tell how much of a run is left


def remarks(settings: Attachment, signals: Sequence[Signal], optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """What can be said before a run begins, by what it is about."""
    found = {
        "unknown signals": unknown_here(signals, settings.model, settings.editing),
        "budget": no_budget(settings),
        "no decision": no_decision(settings),
    }
    if (kind := own_step(optimizer)) is not None:
        found["own step"] = kind.warning(type(optimizer).__name__)
    return {what: said for what, said in found.items() if said}


def unknown_here(signals: Sequence[Signal], model: nn.Module | None, editing: Editing | None = None) -> str:
    """What to say of signals whose measurements this run cannot take; empty where there are none."""
    measured = editing is not None and editing.batches is not None
    units = [] if measured else [signal.name for signal in signals if UNITS in signal.needs]
    dead = {name for name, one in MEASUREMENTS.items() if not one.live}
    blind = [signal.name for signal in signals if dead.intersection(signal.needs)]
    watched = [signal.name for signal in signals if SEEN.intersection(signal.needs)] if model is None else []
    only = f"only a population can measure {', '.join(blind)}" if blind else ""
    ask = f"give attach(..., model=...) for {', '.join(watched)}" if watched else ""
    data = f"{REMEDY} for {', '.join(units)}" if units else ""
    said = "; ".join(part for part in (only, ask, data) if part)
    cost = "what they would tell is not acted on: such blocks of a rule rest, and a learned policy may do worse than it was judged to"
    return f"the policy reads signals that stay 0 here: {said}; {cost}" if said else ""


def no_budget(settings: Attachment) -> str:
    """What to say of a learned policy that is not told how long the run is; empty where it is, or does not ask."""
    policy = settings.policy
    if settings.total_steps is not None or not isinstance(policy, LearnedPolicy):
        return ""
    if not any(name in policy.signals for name in BUDGET):
        return ""
    return (
        f"policy {policy.name!r} reads how much of the run is left, and is not told: it does not know when the end is near, "
        f"decides every {settings.decide_every} steps however long the run is, and may do worse than it was judged to; give "
        "attach(..., total_steps=...)"
    )


def no_decision(settings: Attachment) -> str:
    """What to say of a run that ends before its first interval does; empty of others."""
    every, budget = settings.decide_every, settings.total_steps
    if budget is None or every <= budget:
        return ""
    return (
        f"decide_every={every} is more than total_steps={budget}: after the decision before the first step there would be no "
        f"other, and nothing that the run does would be judged; give attach(..., decide_every=...) of {budget} or less"
    )


def no_validation(name: str, signals: Sequence[Signal], journal: Journal) -> str:
    """What to say when no validation loss has come in ``WAIT`` decisions; empty at others, and where the policy reads none."""
    if journal.decisions != WAIT or journal.ledger.was_validated:
        return ""
    read = [signal.name for signal in signals if signal.group == "validation"]
    if not read:
        return ""
    return (
        f"policy {name!r} reads {', '.join(read)}, but no validation loss has come in its first {WAIT} decisions; until one does "
        "they stay 0, so overfitting is not acted on, and a learned policy may do worse than it was judged to; give "
        "controller.step(loss, val_loss=...) whenever one was measured (monitor=... in a host)"
    )


def not_resumed(done: int | None, settings: Attachment) -> str:
    """What to say of a host's checkpoint that was saved without a controller.

    Args:
        done: optimizer steps that the host had made; None where it does not say.
        settings: of the controller that begins now.
    """
    budget, at = settings.total_steps, "" if done is None else f" of step {done}"
    left = ""
    if budget is not None and done is not None and done < budget:
        left = f"; give total_steps={budget - done} for what is left"
    counts = "0" if budget is None else f"0 of total_steps={budget}"
    return (
        f"the checkpoint{at} holds no state of a controller, as it was saved without one: this controller begins at null "
        f"multipliers and counts from {counts}, so that a policy which follows the budget begins anew and does not come to its "
        f"end, and what is usual in this run is unknown to it at first{left}; checkpoints saved from now on hold its state"
    )


def under_way(optimizer: torch.optim.Optimizer, total_steps: int | None) -> str:
    """What to say of an optimizer that has made steps before a controller's first; empty where it has not."""
    states = [held for held in optimizer.state.values() if isinstance(held, dict) and held]
    counts = [float(held["step"]) for held in states if isinstance(held.get("step"), int | float | torch.Tensor)]
    done = max(counts, default=math.nan if states else 0.0)
    if done == 0:
        return ""
    made = "steps" if math.isnan(done) else f"{done:.0f} steps"
    budget = "" if total_steps is None else f" of total_steps={total_steps}"
    left = ""
    if total_steps is not None and done < total_steps:
        left = f", or total_steps={total_steps - int(done)} for what is left"
    return (
        f"the optimizer has made {made} without this controller, which counts from 0{budget}: a policy that follows the budget "
        "begins anew, and what is usual in this run is unknown to it; where a controller has steered those steps, load its "
        f"state before the next one (controller.load_state_dict){left}"
    )
