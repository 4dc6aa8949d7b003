"""Ordinary loops: compiled steps, fused kernels under a scaler, averaged weights, optimizers that set their own step."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.policies.live import Loop, Scripted, sgd
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trimtab.errors import UserError
from trimtab.inner_training.own_step import own_step
from trimtab.policies.attach import attach

MOVING = [[0.5 + 0.07 * step] for step in range(40)]


class Frames:
    """A compiler that counts what it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


# --- compiled steps -----------------------------------------------------------------------------------------------

MAKE: dict[str, Callable[[Any, Any], torch.optim.Optimizer]] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=False),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
    "NAdam": lambda p, lr: torch.optim.NAdam(p, lr=lr),
}


def compiled(name: str, rate: Any, levers: Sequence[str]) -> tuple[Loop, list[int]]:
    """A loop whose step is compiled, with a controller that moves each lever at each step; and the compiled frames."""
    torch.compiler.reset()
    loop, frames, counts = Loop(lambda p: MAKE[name](p, rate)), Frames(), []
    if levers:
        table = [row * len(levers) for row in MOVING]
        policy = Scripted(table, levers=dict.fromkeys(levers, "targets"), decide_every=1)
        loop.controller = attach(loop.optimizer, policy=policy)
    step = torch.compile(loop.optimizer.step, backend=frames)
    for _ in range(24):
        loop.optimizer.zero_grad()
        loss = loop.loss()
        loss.backward()
        step()
        loop.done += 1
        if loop.controller is not None:
            loop.controller.step(loss)
        counts.append(frames.count)
    return loop, counts


@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")  # torch's own, on its first compilation
@pytest.mark.parametrize("rate", [torch.tensor(0.01), 0.01], ids=["tensor", "float"])
@pytest.mark.parametrize("name", MAKE)
def test_a_compiled_step_is_not_compiled_again_for_another_multiplier(name: str, rate: Any) -> None:
    _, alone = compiled(name, copy.copy(rate), ())
    loop, counts = compiled(name, rate, ("lr",))
    assert 1 <= alone[-1] <= 2, "once more where the first step makes the state that the second one reads"
    if isinstance(rate, torch.Tensor):
        assert counts == alone
        assert loop.optimizer.param_groups[0]["lr"] is rate
    else:
        assert counts[-1] == counts[2] <= alone[-1] + 1, "torch makes the float a variable when it first changes"
        assert type(loop.optimizer.param_groups[0]["lr"]) is float
    assert float(loop.optimizer.param_groups[0]["lr"]) == float(rate)
    eager = Loop(lambda p: MAKE[name](p, copy.copy(rate)))
    eager.controller = attach(eager.optimizer, policy=Scripted(MOVING, decide_every=1))
    eager.run(24)
    torch.testing.assert_close(loop.weights(), eager.weights(), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")
def test_a_compiled_model_is_compiled_once_whatever_the_controller_does() -> None:
    torch.compiler.reset()
    loop, frames = Loop(sgd), Frames()
    model = torch.compile(loop.model, backend=frames)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=Scripted(MOVING, decide_every=1))
    for step in range(12):
        loop.optimizer.zero_grad()
        first = step * 16
        loss = (model(loop.inputs[first : first + 16]) - loop.targets[first : first + 16]).square().mean()
        loss.backward()
        loop.optimizer.step()
        loop.controller.step(loss)
    assert frames.count == 1


# --- mixed precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(fused: bool, clipped: bool) -> None:
    loop = Loop(lambda p: torch.optim.AdamW(p, lr=0.01, fused=fused))
    policy = Scripted([[0.5]], signals=("grad_level", "update_ratio"), decide_every=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    controller = attach(loop.optimizer, model=loop.model, policy=policy, stateful=(scaler,))
    skipped = 0
    for step in range(14):
        loop.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loop.loss()
        scaler.scale(loss * (math.inf if step in (2, 7) else 1.0)).backward()
        if clipped:
            scaler.unscale_(loop.optimizer)
            torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-2)
        before = scaler.get_scale()
        scaler.step(loop.optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        controller.step(loss)
        loop.done += 1
        assert loop.optimizer.param_groups[0]["lr"] == 0.01
    assert skipped == 2 and controller.steps == 12
    average = controller._steering._grad_average[0]
    assert average == pytest.approx(1e-2, rel=1e-2) if clipped else 0.01 < average < 100


# --- averaged weights ---------------------------------------------------------------------------------------------


def test_averaged_weights_follow_the_steered_ones_and_are_refused_as_the_model() -> None:
    loop = Loop(sgd)
    average = AveragedModel(loop.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    with pytest.raises(UserError, match="4 of the optimizer's 4 parameters do not belong to the model"):
        attach(loop.optimizer, model=average, policy="constant")
    loop.controller = attach(loop.optimizer, model=loop.model, policy=Scripted([[0.0]]), stateful=(average,))
    for _ in range(6):
        loop.step()
        average.update_parameters(loop.model)
    for one, other in zip(average.module.parameters(), loop.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


# --- optimizers that set their own step ---------------------------------------------------------------------------


class ProdigyLike(torch.optim.Optimizer):
    """Sets its step by a distance that it estimates, and keeps the estimate in its groups, as Prodigy does."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        d0 = 1e-2
        super().__init__(params, {"lr": lr, "d": d0, "d0": d0, "d_max": d0, "d_numerator": 0.0, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        for one in group["params"]:
            state = self.state[one]
            start = state.setdefault("p0", one.clone())
            group["d_numerator"] += group["lr"] * group["d"] * float((one.grad * (start - one)).sum())
        group["d"] = group["d_max"] = max(group["d_max"], 0.1 * group["d_numerator"])
        if math.isnan(group["d_numerator"]):
            group["d"] = math.nan
        for one in group["params"]:
            one.sub_(group["d"] * group["lr"] * one.grad)
        group["k"] += 1


class AdamWScheduleFree(torch.optim.SGD):
    """Only the name matters."""


class Averaging(torch.optim.SGD):
    """Another name, with the keys of Schedule-Free in its groups."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.01)
        self.param_groups[0].update(weight_sum=0.0, lr_max=-1.0, k=0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (ProdigyLike, "ProdigyLike sets its own step (a distance that it estimates): the multiplier scales the step"),
        (lambda p: AdamWScheduleFree(p, lr=0.01), "AdamWScheduleFree sets its own step (an average over its steps)"),
        (Averaging, "Averaging sets its own step (an average over its steps)"),
        (sgd, ""),
    ],
)
def test_what_a_nudge_means_is_said_once(make: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    loop = Loop(make)
    loop.controller = attach(loop.optimizer, policy=Scripted([[0.9]]))
    loop.run(12)
    assert len(caplog.records) == bool(said) and said in caplog.text


def test_a_rollback_takes_what_such_an_optimizer_keeps_in_its_groups_along() -> None:
    loop = Loop(ProdigyLike)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=Scripted([[1.0]], decide_every=10))
    assert own_step(loop.optimizer) is not None
    loop.run(10)
    kept = {key: loop.optimizer.param_groups[0][key] for key in ("d", "d_max", "d_numerator", "k")}
    loop.run(15)
    loop.step(spoil=math.nan)
    group = loop.optimizer.param_groups[0]
    assert math.isnan(group["d"])
    loop.run(4)
    assert loop.decisions[-1].rolled_back
    assert {key: group[key] for key in kept} == kept and kept["k"] == 10
    assert group["lr"] == 1.0
    loop.run(30)
    assert torch.isfinite(loop.weights()).all()


def test_an_optimizer_without_a_learning_rate_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(
        UserError, match=r"SGD has the learning rate None .* one that it sets itself; .* give the optimizer such a rate"
    ):
        attach(optimizer, policy="constant")
