"""A controller that was detached: its loop may go on, and it takes over no state any more."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from tests.policies.live import Loop, Scripted, adamw, inside

from trimtab.errors import UserError
from trimtab.policies.attach import attach
from trimtab.policies.audit import read_audit


def detached(path: Path | None = None) -> Loop:
    loop = Loop(adamw)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=Scripted([[0.5]]), audit=path)
    loop.run(12)
    loop.controller.detach()
    return loop


def test_no_state_is_loaded_any_more(tmp_path: Path) -> None:
    loop = detached(tmp_path / "run.jsonl")
    controller = loop.controller
    assert controller is not None
    state, lines = controller.state_dict(), read_audit(tmp_path / "run.jsonl")
    for given in (state, {}, None):
        with pytest.raises(UserError, match=r"was detached; call trimtab.attach again, and load the state there"):
            controller.load_state_dict(given)  # type: ignore[arg-type]
    assert read_audit(tmp_path / "run.jsonl") == lines and lines[-1]["kind"] == "detached"
    again = attach(loop.optimizer, model=loop.model, policy=Scripted([[0.5]]))
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.steps == 12 and again.multipliers == {"lr": 0.5}


def test_the_loop_goes_on_by_its_own_settings(tmp_path: Path) -> None:
    loop = detached(tmp_path / "run.jsonl")
    controller = loop.controller
    assert controller is not None
    state, summary = copy.deepcopy(controller.state_dict()), controller.summary()
    content = (tmp_path / "run.jsonl").read_bytes()
    seen = inside(loop.optimizer, lambda group: group["lr"])
    loop.run(7)
    assert seen == [0.01] * 7
    assert {(one.acted, one.reason, one.rolled_back) for one in loop.decisions[-7:]} == {(False, "detached", False)}
    assert loop.decisions[-1].applied == controller.multipliers == {"lr": 1.0}
    for odd in (None, "no loss", float("nan"), {}):
        assert controller.step(odd, odd).reason == "detached"  # type: ignore[arg-type]
    controller.switch_off()
    controller.switch_on()
    controller.detach()
    loop.run(1)
    assert seen[-1] == 0.01
    assert controller.summary() == summary and controller.steps == 12
    assert json.dumps(controller.state_dict()) == json.dumps(state)
    assert (tmp_path / "run.jsonl").read_bytes() == content
