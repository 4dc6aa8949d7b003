"""What a multiplier on the learning rate does to the steps of every optimizer of torch, by measurement, and what is said of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.policies.live import Loop, Scripted
from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.live_run import LiveRun
from trimtab.inner_training.own_step import OWN_STEPS, own_step
from trimtab.policies.attach import attach

OPTIMIZERS = [
    one
    for one in vars(torch.optim).values()
    if isinstance(one, type) and issubclass(one, torch.optim.Optimizer) and one is not torch.optim.Optimizer
]
# Settings in which what a multiplier does is not hidden: a rate that Adafactor cuts, decays, momentum.
SETTINGS: dict[str, dict[str, Any]] = {
    "Adafactor": {"lr": 1.0},
    "Adagrad": {"lr_decay": 0.1},
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "RMSprop": {"momentum": 0.9, "centered": True, "weight_decay": 0.01},
    "AdamW": {"amsgrad": True},
}
SAID = {"Rprop": "very first step alone", "ASGD": "one step late", "Adafactor": "does nothing", "LBFGS": "iterations"}
STEPS, FROM = 8, 4


def updates(kind: Any, multiplier: float, since: int, **settings: Any) -> Tensor:
    """What each step does to the same weights, (STEPS, 12); ``multiplier`` is in force from step ``since`` on."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    start, targets = weight.detach().clone(), torch.randn(STEPS, 4, 3, generator=generator)
    optimizer = kind([weight], **{"lr": 0.1, **settings})
    run, found = LiveRun(optimizer, 1000), []
    for step, target in enumerate(targets):
        run.lr_multiplier = multiplier if step >= since else 1.0

        def closure(target: Tensor = target) -> Tensor:
            optimizer.zero_grad()
            loss = ((weight - target).square() * torch.arange(1.0, 4.0)).sum()
            loss.backward()
            if kind is torch.optim.SparseAdam:
                weight.grad = weight.grad.to_sparse()
            return loss

        with torch.no_grad():
            weight.copy_(start)
        if kind is torch.optim.LBFGS:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        found.append((weight.detach() - start).flatten())
    run.detach()
    return torch.stack(found)


def is_scaled(kind: Any, **settings: Any) -> bool:
    """Whether half the rate is half the step: from the first one on, and from a later one on at once."""
    free = updates(kind, 1.0, 0, **settings)
    factors = torch.ones(STEPS, 1, dtype=torch.float64)
    factors[FROM:] = 0.5
    first, later = updates(kind, 0.5, 0, **settings), updates(kind, 0.5, FROM, **settings)
    assert free.abs().min(1).values.max() > 0, "it steps"
    return all(torch.allclose(one, free * by, rtol=1e-5, atol=0) for one, by in ((first, 0.5), (later, factors)))


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_half_the_rate_is_half_the_step_or_it_is_said(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    scaled = is_scaled(kind, **SETTINGS.get(kind.__name__, {}))
    if kind is not torch.optim.SparseAdam:  # whose gradients this model does not give
        weight = nn.Parameter(torch.ones(4, 3))
        attach(kind([weight], lr=0.1), policy=Scripted([[0.5]]))
    assert scaled == (kind.__name__ not in SAID) == (own_step(kind([torch.ones(4, 3)], lr=0.1)) is None)
    told = [one.message for one in caplog.records]
    assert len(told) == (not scaled)
    assert scaled or (f"{kind.__name__} sets its own step" in told[0] and SAID[kind.__name__] in told[0])


def test_what_the_warnings_claim_is_so() -> None:
    half = {name: updates(getattr(torch.optim, name), 0.5, FROM, lr=1.0) for name in ("Adafactor", "ASGD", "Rprop")}
    free = {name: updates(getattr(torch.optim, name), 1.0, 0, lr=1.0) for name in half}
    assert torch.equal(half["Adafactor"], free["Adafactor"]), "one over the root of 5 is less than 0.5"
    assert is_scaled(torch.optim.Adafactor, lr=0.01)
    assert torch.equal(half["Rprop"], free["Rprop"])
    late = half["ASGD"] / free["ASGD"]
    torch.testing.assert_close(late[FROM], torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(
        late[FROM + 1 :], torch.full((STEPS - FROM - 1, 12), 0.5, dtype=torch.float64), rtol=1e-2, atol=0
    )
    once = [updates(torch.optim.LBFGS, by, FROM, lr=0.1, max_iter=1)[FROM] for by in (1.0, 0.5)]
    torch.testing.assert_close(once[1], 0.5 * once[0])


def test_levers_that_would_do_nothing_are_not_available() -> None:
    loop = Loop(lambda ps: torch.optim.Rprop(ps, lr=0.01))
    policy = Scripted([[0.1, 0.1]], levers={"lr": "targets", "grad_clip": "targets"}, signals=("lr_available",))
    loop.controller = attach(loop.optimizer, policy=policy)
    free = Loop(lambda ps: torch.optim.Rprop(ps, lr=0.01)).run(12)
    loop.run(12)
    assert torch.equal(loop.weights(), free.weights()), "not even the first step's size is changed"
    assert loop.controller.multipliers == {"lr": 1.0, "grad_clip": 1.0} and policy.seen[-1][0, 0] == 0
    assert "does not exist for this run" in loop.decisions[4].reason
    run = LiveRun(torch.optim.Adadelta([nn.Parameter(torch.ones(2))]), 10)
    assert run.available(LEVERS["lr"]) and run.available(LEVERS["grad_clip"])


def test_the_page_has_a_row_for_every_kind() -> None:
    page = (Path(__file__).parents[2] / "docs/hosts.md").read_text(encoding="utf-8")
    assert [kind.kind for kind in OWN_STEPS if f"| {kind.kind} |" not in page] == []
    assert all(f"`{name}`" in page for name in SAID)
