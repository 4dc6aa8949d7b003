"""What holds in every host: the null policy changes nothing, a resumed training goes on as if it had not stopped."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.policies.hosts.machines import HOSTS, MODES, Case, Recorder, groups, pytorch
from tests.policies.live import Scripted
from torch.optim.lr_scheduler import ExponentialLR

from trimtab.errors import MissingExtraError

every_host = pytest.mark.parametrize("host", HOSTS)
every_mode = pytest.mark.parametrize("mode", MODES)


def schedule(optimizer: Any) -> Any:
    return ExponentialLR(optimizer, 0.9)


@every_mode
@every_host
def test_the_null_policy_is_no_controller_bit_for_bit(host: str, mode: str) -> None:
    case = MODES[mode](Case(schedule=schedule))
    alone = HOSTS[host](case)
    null = HOSTS[host](replace(case, policy="constant"))
    assert null.controller is not None and null.controller.steps == case.steps
    assert torch.equal(null.weights, alone.weights)
    assert null.effective == alone.effective
    halved = HOSTS[host](replace(case, policy=Scripted([[0.5]])))
    assert not torch.equal(halved.weights, alone.weights)


@every_mode
@every_host
def test_each_step_is_told_once_with_the_mean_loss_of_its_batches(host: str, mode: str) -> None:
    case = MODES[mode](Case(policy=Scripted([[0.5]], decide_every=100)))
    reference, seen = pytorch(case), HOSTS[host](case)
    assert reference.controller is not None and seen.controller is not None
    losses, expected = (one.controller.state_dict()["run"]["losses"] for one in (seen, reference))
    assert len(losses) == case.steps == seen.controller.steps
    np.testing.assert_allclose(losses, expected, rtol=2e-2 if case.amp else 1e-5)


class Reacting(Scripted):
    """Its moves follow from what it sees."""

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        return 0.3 + 0.2 * np.tanh(observations.sum(1, keepdims=True)), {"count": state["count"] + 1}


@pytest.mark.parametrize("mode", ["plain", "accumulation"])
@every_host
def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(host: str, mode: str) -> None:
    signals = ("loss_slope", "grad_level", "update_ratio", "lr_position", "loss_noise")
    policy = Reacting([[0.0]], levers={"lr": "moves"}, signals=signals, decide_every=3)
    case = MODES[mode](Case(schedule=schedule, policy=policy, steps=11))
    straight, resumed = HOSTS[host](case), HOSTS[host](replace(case, pause=7))
    assert straight.controller is not None and resumed.controller is not None
    first, last = resumed.multipliers
    assert 1.0 != first != last == straight.multipliers[-1]
    assert resumed.effective == straight.effective
    assert torch.equal(resumed.weights, straight.weights)
    one, other = (json.dumps(seen.controller.state_dict(), sort_keys=True) for seen in (straight, resumed))
    assert one == other


class Dies(Recorder):
    """Its weights are no numbers after seven steps, in the middle of an interval, once."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if len(self.effective) == 7:
            self.param_groups[0]["params"][0].data.fill_(torch.nan)
        return loss


@pytest.mark.parametrize("host", ["lightning", "huggingface", "accelerate"])
def test_a_run_whose_steps_are_all_skipped_is_rolled_back(host: str) -> None:
    policy = Scripted([[1.0]], decide_every=2)
    seen = HOSTS[host](Case(policy=policy, amp=True, steps=35, make=lambda model: Dies(groups(model))))
    assert seen.controller is not None and "rollbacks: 1" in seen.controller.summary()
    assert torch.isfinite(seen.weights).all() and len(seen.effective) == seen.controller.steps == 36 - 1 - 20


# --- refusals -----------------------------------------------------------------------------------------------------


class Other(Recorder):
    """Another optimizer with the same groups."""


@every_host
def test_another_optimizer_is_refused_when_a_training_is_resumed(host: str) -> None:
    made = iter([Recorder, Other])
    case = Case(policy="constant", pause=4, make=lambda model: next(made)(groups(model)))
    with pytest.raises(ValueError, match="saved with optimizer 'Recorder', but this controller has 'Other'"):
        HOSTS[host](case)


@every_host
def test_other_groups_are_refused_when_a_training_is_resumed(host: str) -> None:
    def make(model: Any) -> Any:
        made.append(model)
        return Recorder(groups(model) if len(made) == 1 else list(model.parameters()))

    made: list[Any] = []
    with pytest.raises(ValueError, match="parameter groups"):
        HOSTS[host](Case(policy="constant", pause=4, make=make))


@every_host
def test_a_second_controller_is_refused(host: str) -> None:
    from trimtab.policies.attach import attach

    def make(model: Any) -> Any:
        optimizer = Recorder(groups(model))
        attach(optimizer, policy="constant")
        return optimizer

    with pytest.raises(ValueError, match=r"has a controller already; call detach\(\)"):
        HOSTS[host](Case(policy="constant", make=make))


@every_host
def test_parameters_that_are_not_of_the_model_are_refused(host: str) -> None:
    def make(model: Any) -> Any:
        return Recorder([*groups(model), {"params": [torch.nn.Parameter(torch.zeros(2))]}])

    with pytest.raises(ValueError, match="1 of the optimizer's 5 parameters do not belong to the model"):
        HOSTS[host](Case(policy="constant", make=make))


@every_host
def test_an_optimizer_without_trained_parameters_is_refused(host: str) -> None:
    def make(model: Any) -> Any:
        return Recorder([torch.zeros(2)])

    with pytest.raises(ValueError, match="no parameters that require a gradient"):
        HOSTS[host](Case(policy="constant", make=make))


@pytest.mark.parametrize(
    ("module", "name", "package", "extra"),
    [
        ("lightning", "TrimtabCallback", "lightning", "lightning"),
        ("huggingface", "TrimtabCallback", "transformers", "huggingface"),
        ("accelerate", "attach", "accelerate", "huggingface"),
    ],
)
def test_an_absent_framework_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, package: str, extra: str
) -> None:
    found = importlib.import_module(f"trimtab.policies.hosts.{module}")
    if name == "TrimtabCallback":
        monkeypatch.delitem(vars(found), name, raising=False)
    for loaded in [one for one in sys.modules if one.partition(".")[0] in (package, "pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed; run: pip install 'trimtab\[{extra}\]'"):
        getattr(found, name)(None, None)
    with pytest.raises(AttributeError, match="no attribute 'TrimtabCalback'"):
        found.TrimtabCalback  # noqa: B018


def test_no_framework_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys; from trimtab.policies.hosts import accelerate, composer, huggingface, lightning\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "trimtab"} <= set(done.stdout.split())
    assert {"accelerate", "lightning", "pytorch_lightning", "transformers", "gymnasium"}.isdisjoint(done.stdout.split())
