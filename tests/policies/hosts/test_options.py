"""Options that every host passes on: the audit with its labels, the ranks, and what happens when a run is lost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.policies.hosts.machines import QUIET_LIGHTNING, Case, Loader, Recorder, groups, lightning_module
from tests.policies.hosts.test_composer import Stub
from tests.policies.live import Loop, Scripted, sgd

from trimtab.errors import UserError
from trimtab.inner_training.guard import GuardConfig
from trimtab.policies.attach import attach
from trimtab.policies.audit import AuditFile
from trimtab.policies.hosts.composer import TrimtabAlgorithm


class Broken(Recorder):
    """Its weights are no numbers after every step from the tenth on."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if len(self.effective) >= 10:
            self.param_groups[0]["params"][0].data.fill_(torch.nan)
        return loss


def broken(steps: int = 30) -> Case:
    return Case(steps=steps, make=lambda model: Broken(groups(model)))


def options(stop: bool = True) -> dict[str, Any]:
    policy = Scripted([[1.0]], decide_every=2)
    return {"policy": policy, "guard": GuardConfig(rollback_budget=1), "stop_when_lost": stop}


def lightning_steps(**given: Any) -> int:
    library = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from trimtab.policies.hosts.lightning import TrimtabCallback

    case, callback = broken(), TrimtabCallback(**given)
    trainer = library.Trainer(**QUIET_LIGHTNING, max_steps=30, callbacks=[callback])
    trainer.fit(lightning_module(case), Loader(case.batches()))
    return int(callback.controller.steps)


def huggingface_steps(**given: Any) -> int:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.policies.hosts.test_huggingface import huggingface_trainer

    from trimtab.policies.hosts.huggingface import TrimtabCallback

    callback = TrimtabCallback(**given)
    trainer = huggingface_trainer(broken(), "unused", callback, 30, [])
    trainer.train()
    return int(callback.controller.steps)


def composer_steps(**given: Any) -> int:
    algorithm, asked = TrimtabAlgorithm(**given), []
    stub = Stub(broken(), algorithm)
    stub.state.stop_training = lambda: asked.append(stub.done)
    for _ in range(30):
        stub.fit(1)
        if asked:
            break
    assert algorithm.controller is not None
    return algorithm.controller.steps


STEPS = {"lightning": lightning_steps, "huggingface": huggingface_steps, "composer": composer_steps}


@pytest.mark.parametrize("host", STEPS)
def test_a_lost_run_is_ended_where_that_is_asked_for(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert STEPS[host](**options()) == 12, "rolled back after 10 steps, lost after 12"
    assert STEPS[host](**options(stop=False)) == 30


def test_a_run_is_lost_when_it_diverges_after_its_rollbacks_were_spent() -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=Scripted([[1.0]]), guard=GuardConfig(rollback_budget=1))
    for step in range(20):
        assert loop.controller.lost == (step >= 15)
        loop.step(spoil=math.nan if step in (6, 12) else None)
    state = loop.controller.state_dict()
    again = attach(Loop(sgd).optimizer, policy=Scripted([[1.0]]))
    again.load_state_dict(state)
    assert again.lost, "it is part of the state"


def test_composer_without_a_way_to_stop_goes_on() -> None:
    algorithm = TrimtabAlgorithm(**options())
    Stub(broken(), algorithm).fit(14)
    assert algorithm.controller is not None and algorithm.controller.lost


def test_the_trainers_audit_keeps_its_labels_through_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from trimtab.policies.hosts.huggingface import TrimtabCallback

    audit = AuditFile(tmp_path / "run.jsonl", data="digits", examples=1797)
    callback = TrimtabCallback("constant", audit=audit, stop_when_lost=True)
    again = TrimtabCallback(**json.loads(json.dumps(callback.state()))["args"])._hosted.options
    assert again.audit == AuditFile(str(tmp_path / "run.jsonl"), data="digits", examples=1797) and again.stop_when_lost


def test_what_a_trainers_callback_cannot_have_is_refused() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from trimtab.policies.hosts.huggingface import TrimtabCallback

    with pytest.raises(UserError, match="stateful is a function, but a Trainer does not show itself"):
        TrimtabCallback("constant", stateful=lambda trainer: [])
    with pytest.raises(UserError, match="structure is a function, but a Trainer does not show itself"):
        TrimtabCallback("constant", structure=lambda trainer: None)
    rebuilt = TrimtabCallback("constant", process_group=object()).state()["args"]
    with pytest.raises(
        UserError, match="cannot hold a policy object, stateful objects, a structure or a process group"
    ):
        TrimtabCallback(**rebuilt)


@pytest.mark.parametrize("host", ["lightning", "huggingface", "composer", "accelerate"])
def test_the_ranks_are_passed_on(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"policy": "constant", "process_group": "no group"}
    with pytest.raises(UserError, match="process_group is 'no group'|a process group"):
        if host == "accelerate":
            accelerate_attached(**given)
        else:
            STEPS[host](**given)


def accelerate_attached(**given: Any) -> None:
    library = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from trimtab.policies.hosts.accelerate import attach as attach_here

    loop = Loop(sgd)
    attach_here(library.Accelerator(cpu=True), loop.optimizer, **given)


def test_a_loop_of_ones_own_is_not_ended_by_an_option() -> None:
    with pytest.raises(UserError, match=r"leave it when controller.lost is True"):
        accelerate_attached(policy="constant", stop_when_lost=True)
