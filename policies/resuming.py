"""The state of a live run under a controller: as it is saved, and taken over by another controller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.policies import saving
from trimtab.policies.deciding import Decider
from trimtab.policies.plain import from_plain, to_plain
from trimtab.policies.summary import Journal


def state_of(decider: Decider, journal: Journal, decided_at: int) -> dict[str, Any]:
    """Everything that a controller remembers, in plain values; ``decided_at`` is the step of its last decision."""
    settings, run = decider.settings, decider.run
    rate = 1.0 if settings.mode == "advise" else float(decider.steering.lr_multiplier[0])
    return {
        **settings.identity(run.optimizer),
        "mode": settings.mode,
        "total_steps": settings.total_steps,
        "lr_multiplier": rate,
        "effective_lr": [scheduled * rate for scheduled in run.scheduled_lr],
        "decided_at": decided_at,
        "val_loss": float(decider.val_loss),
        "anchor": decider.anchored,
        "steering": decider.steering.state_dict(),
        "policy_state": to_plain(decider.listener.state),
        "run": run.state_dict(),
        "journal": journal.state_dict(),
        **decider.units.state_dict(),
    }


def take_over(state: Mapping[str, Any], decider: Decider, journal: Journal) -> int:
    """Makes a state the controller's own, and gives the step of its last decision.

    Raises:
        MismatchError: the state does not fit, or is damaged; nothing has been changed then, but for edits of a first decision,
            which are taken back.
    """
    settings, steering, run = decider.settings, decider.steering, decider.run
    decider.units.check_kind(state)
    saving.check_state(state, saving.expected(settings, steering, run))
    decider.units.take_back()
    decider.units.check(state)
    steering.load_state_dict(state["steering"])
    decider.units.load_state_dict(state)
    decider.listener.state = from_plain(state["policy_state"])
    run.load_state_dict(state["run"])
    journal.load_state_dict(state["journal"])
    if state["mode"] != settings.mode:
        journal.ledger.turn()
    if settings.mode == "advise":
        steering.multipliers[:] = 1.0
    decider.val_loss = float(state["val_loss"])
    decider.resume()
    for what, said in saving.remarks(state, settings.total_steps).items():
        run.hooks.say(what, said)
    return int(state["decided_at"])
