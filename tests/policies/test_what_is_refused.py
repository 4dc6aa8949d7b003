"""What ``attach`` refuses in one sentence, and what odd things it takes: rates, lazy layers, shared parameters, absurd numbers."""

from __future__ import annotations

import json
import logging
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from tests.policies.live import Loop, Scripted, inside, sgd
from torch import nn

from trimtab.errors import MismatchError, RangeError, UserError
from trimtab.inner_training.guard import GuardConfig
from trimtab.policies.attach import attach
from trimtab.policies.attachment import MOST_STEPS
from trimtab.policies.audit import AuditFile
from trimtab.policies.policy import MOST_EVERY

# --- learning rates ----------------------------------------------------------------------------------------------


def loop_at(rate: Any) -> Loop:
    loop = Loop(sgd)
    loop.optimizer.param_groups[0]["lr"] = rate
    return loop


@pytest.mark.parametrize(
    "rate",
    [0.0625, np.float64(0.0625), np.float32(0.0625), 1, np.int64(1), torch.tensor(0.0625), torch.tensor([0.0625]), 0],
    ids=repr,
)
def test_rates_of_these_types_are_steered(rate: Any) -> None:
    loop = loop_at(rate)
    loop.controller = attach(loop.optimizer, policy=Scripted([[0.5]]), guard=False)
    seen = inside(loop.optimizer, lambda group: float(group["lr"]))
    loop.run(3)
    assert seen == [0.5 * float(rate)] * 3
    assert loop.optimizer.param_groups[0]["lr"] is rate
    state = json.loads(json.dumps(loop.controller.state_dict()))
    assert state["effective_lr"] == [0.5 * float(rate)]
    loop.controller.load_state_dict(state)


@pytest.mark.parametrize("key", ["momentum", "weight_decay"])
def test_other_levers_take_numpys_numbers(key: str) -> None:
    loop = Loop(sgd)
    loop.optimizer.param_groups[0][key] = np.float32(0.5)
    attach(loop.optimizer, policy=Scripted([[0.5]], levers={key: "targets"}), guard=False)
    seen = inside(loop.optimizer, lambda group: group[key])
    loop.run(1)
    assert seen == [0.75 if key == "momentum" else 0.25]
    assert loop.optimizer.param_groups[0][key] == np.float32(0.5)


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (torch.tensor(1), "a tensor of torch.int64"),
        (torch.tensor(True), "a tensor of torch.bool"),
        (torch.tensor([0.1, 0.2]), "a tensor of 2 elements"),
        (torch.tensor(0.1, requires_grad=True), "a tensor that requires a gradient"),
        (torch.tensor(math.nan), "no finite number"),
        (torch.empty((), device="meta"), "no finite number"),
        (Decimal("0.1"), "a Decimal"),
        (Fraction(1, 10), "a Fraction"),
        ("0.1", "a str"),
        (True, "a bool"),
        (np.array([0.1]), "a ndarray"),
        (1j, "a complex"),
        (-0.1, "negative"),
        (np.float32(-0.1), "negative"),
        (math.nan, "no finite number"),
        (math.inf, "no finite number"),
        (10**400, "no finite number"),
        (10**5000, "no finite number"),
        (None, "one that it sets itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_rates_are_refused_at_once(rate: Any, words: str) -> None:
    loop = loop_at(0.1)
    loop.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.1})
    loop.optimizer.param_groups[1]["lr"] = rate
    with pytest.raises(UserError, match=f"SGD has the learning rate .* parameter group 1, .*{words}") as caught:
        attach(loop.optimizer, policy="constant")
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 400
    assert "step" not in vars(loop.optimizer) and not loop.optimizer._optimizer_step_pre_hooks


# --- lazy layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
def test_lazy_layers_need_one_forward_pass(given: bool) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="the optimizer has lazy parameters .* run one batch through the model"):
        attach(optimizer, model=model if given else None, policy="constant")
    model(torch.ones(2, 3))
    attach(optimizer, model=model if given else None, policy="constant").detach()


def test_lazy_buffers_of_the_model_are_found_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d(affine=False))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(UserError, match="the model has lazy .* buffers"):
        attach(optimizer, model=model, policy="constant")
    model(torch.ones(2, 3))
    attach(optimizer, model=model, policy="constant").detach()


# --- shared parameters -------------------------------------------------------------------------------------------


class Wrapper(torch.optim.SGD):
    """An optimizer around another, with its groups, as wrappers of third parties are."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], lr=0.1)
        self.inner, self.param_groups = inner, inner.param_groups


def same_groups(first: torch.optim.Optimizer) -> torch.optim.Optimizer:
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    other.param_groups = first.param_groups
    return other


def one_in_common(first: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return torch.optim.Adam([nn.Parameter(torch.zeros(1)), first.param_groups[0]["params"][2]], lr=0.1)


@pytest.mark.parametrize(
    ("make", "words"), [(same_groups, "4 of the .* 4"), (Wrapper, "4 of the .* 4"), (one_in_common, "1 of the .* 2")]
)
def test_two_controllers_do_not_share_parameters(make: Any, words: str) -> None:
    loop = Loop(sgd)
    first = attach(loop.optimizer, policy="constant")
    other = make(loop.optimizer)
    with pytest.raises(UserError, match=rf"{words} parameters are also in another one \(SGD\) .* call detach\(\)"):
        attach(other, policy="constant")
    first.detach()
    second = attach(other, policy="constant")
    with pytest.raises(UserError, match="are also in another one"):
        attach(loop.optimizer, policy="constant")
    second.detach()


def test_two_optimizers_of_one_model_may_both_be_steered() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    controllers = [attach(one, model=model, policy=Scripted([[0.5]])) for one in optimizers]
    seen = [inside(one, lambda group: group["lr"]) for one in optimizers]
    for _ in range(3):
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        for one, controller in zip(optimizers, controllers, strict=True):
            one.step()
            controller.step(loss)
    assert seen == [[0.05] * 3] * 2


# --- absurd numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["total_steps", "decide_every"])
@pytest.mark.parametrize(
    "value",
    [10**400, 10**5000, -(10**5000), 0, -1, 1.5, math.nan, math.inf, True, "10", torch.tensor(3), 1j],
    ids=lambda value: type(value).__name__,
)
def test_absurd_numbers_are_refused(name: str, value: Any) -> None:
    loop = Loop(sgd)
    with pytest.raises(RangeError, match=f"^{name} is .*; it must be") as caught:
        attach(loop.optimizer, policy="constant", **{name: value})
    assert len(str(caught.value)) < 200 and not loop.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("field", ["rollback_budget", "backoff", "rate_scale", "explosion"])
@pytest.mark.parametrize("value", [10**400, 10**5000, math.nan, math.inf], ids=["400", "5000", "nan", "inf"])
def test_absurd_settings_of_the_guard_are_refused(field: str, value: Any) -> None:
    with pytest.raises(RangeError, match=f"^{field} is") as caught:
        GuardConfig(**{field: value})
    assert len(str(caught.value)) < 200


def test_the_largest_numbers_work() -> None:
    for every in (None, MOST_EVERY):
        controller = attach(Loop(sgd).optimizer, policy="cosine", total_steps=MOST_STEPS, decide_every=every)
        assert controller.multipliers == {"lr": 1.0}
    for change in ({"total_steps": MOST_STEPS + 1}, {"decide_every": MOST_EVERY + 1}):
        with pytest.raises(RangeError, match="it must be at most 10"):
            attach(Loop(sgd).optimizer, policy="constant", **change)


def test_absurd_numbers_elsewhere() -> None:
    with pytest.raises(MismatchError, match="decide_every is a whole number of about 400 digits"):
        attach(Loop(sgd).optimizer, policy=Scripted([[1.0]], decide_every=10**400))
    with pytest.raises(RangeError, match="examples of an audit is a whole number of about 5000 digits"):
        AuditFile("run.jsonl", examples=10**5000)
    controller = attach(Loop(sgd).optimizer, policy="constant")
    for name in ("deadline", "time_limit"):
        with pytest.raises(RangeError, match=f"{name} is more than a float can hold"):
            setattr(controller, name, 10**400)
        setattr(controller, name, 10**300)


@pytest.mark.parametrize(("every", "budget", "said"), [(101, 100, 1), (100, 100, 0), (None, 4, 1), (200, None, 0)])
def test_a_run_that_ends_before_its_first_interval_is_warned_of(
    every: int | None, budget: int | None, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="trimtab"):
        attach(Loop(sgd).optimizer, policy=Scripted([[1.0]]), decide_every=every, total_steps=budget)
    found = [one for one in caplog.messages if f"decide_every={every or 5} is more than total_steps={budget}" in one]
    assert len(found) == len(caplog.messages) == said
