"""A live run in which a stable moment is being tried: what becomes of it when nobody will judge the trial."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from trimtab.policies.attach import attach
from trimtab.policies.controller import Decision


class Counting:
    """A run whose only weight counts the steps that it has seen; its loss is what a test says."""

    def __init__(self, **options: Any) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.controller = attach(self.optimizer, model=self.model, policy="constant", decide_every=10, **options)

    def go(self, steps: int, loss: float = 1.0) -> list[Decision]:
        """Trains; a decision per step."""
        decisions = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            value = self.model.weight.sum() * 0 + loss
            value.backward()
            self.optimizer.step()
            with torch.no_grad():
                self.model.weight.add_(1.0)
            decisions.append(self.controller.step(value))
        return decisions

    @property
    def seen(self) -> int:
        return round(self.model.weight.item())


def trying() -> Counting:
    """In the midst of a trial: 105 steps done, of which the weights have seen fewer."""
    run = Counting()
    run.go(90)
    assert "rose suddenly" in run.go(10, 2.0)[-1].reason
    run.go(5, 2.0)
    assert run.seen < 100
    return run


def test_what_was_given_up_is_taken_up_again_when_nothing_spoke_for_the_moment() -> None:
    run = trying()
    decision = run.go(5, 2.0)[-1]
    assert "goes on from where it was" in decision.reason and run.seen == 100
    assert not decision.rolled_back, "nothing was lost but the steps of the trial"


def test_a_run_that_ends_in_a_trial_ends_with_what_was_given_up() -> None:
    run = trying()
    run.controller.detach()
    assert run.seen == 100


@pytest.mark.parametrize("kind", ["method", "variable"])
def test_a_run_that_is_switched_off_in_a_trial_goes_on_from_where_it_was(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trying()
    if kind == "method":
        run.controller.switch_off()
    else:
        monkeypatch.setenv("TRIMTAB_OFF", "1")
    run.go(45, 2.0)
    assert run.seen == 140
    if kind == "method":
        run.controller.switch_on()
    else:
        monkeypatch.delenv("TRIMTAB_OFF")
    decisions = run.go(60, 2.0)
    assert run.seen == 200 and not any(one.rolled_back for one in decisions)


def test_a_trial_is_over_when_its_state_is_loaded() -> None:
    run = trying()
    state, weights = json.loads(json.dumps(run.controller.state_dict())), run.model.state_dict()
    later = Counting()
    later.model.load_state_dict(weights)
    later.controller.load_state_dict(state)
    before = later.seen
    reasons = {one.reason for one in later.go(30, 2.0)}
    assert later.seen == before + 30 and not any("goes on from where it was" in one for one in reasons)
