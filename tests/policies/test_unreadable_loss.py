"""A loss without a logarithm: policies that read it are not asked, schedules go on, and nobody is rolled back."""

from __future__ import annotations

import pytest
import torch
from tests.policies.live import Scripted, sgd

from trimtab.policies.attach import attach
from trimtab.policies.controller import Controller


def falling(policy: object, losses: list[float]) -> Controller:
    """A controller that decides after each of these losses."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = sgd([weight])
    controller = attach(optimizer, policy=policy, total_steps=100, decide_every=1)  # type: ignore[arg-type]
    for loss in losses:
        optimizer.zero_grad()
        (1e-3 * weight.square().sum()).backward()
        optimizer.step()
        controller.step(loss)
    return controller


@pytest.mark.parametrize("signal", ["loss_slope", "gap", "shift_window", "noisy_data"])
@pytest.mark.parametrize(("loss", "asked"), [(-3.0, 2), (0.0, 2), (1e-6, 4), (float("nan"), 4)])
def test_a_policy_that_reads_the_loss_is_asked_only_where_it_can(
    loss: float, asked: int, signal: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Scripted([[1.0], [0.5], [0.25], [0.125]], decide_every=1, signals=("started", signal))
    controller = falling(policy, [0.5, loss, loss])
    seen = len(policy.seen) - 1  # but for the trial that every policy is put to
    assert seen == asked
    if asked == 2:
        assert controller.multipliers == {"lr": 0.5}, "the lever holds"
        assert [one.message for one in caplog.records if "the logarithm of the loss" in one.message] != []
        assert "rollbacks: 0" in controller.summary()


def test_a_schedule_goes_on() -> None:
    assert falling("cosine", [0.5, *[-3.0] * 49]).multipliers["lr"] == pytest.approx(0.5)
