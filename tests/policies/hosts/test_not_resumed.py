"""Checkpoints that were saved without a controller: resumed with one, with one warning that says what it costs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.policies.hosts.machines import QUIET_LIGHTNING, Case, Loader, Net, huggingface_trainer, lightning_module
from tests.policies.hosts.test_composer import Stub
from tests.policies.live import Scripted

from trimtab.policies.hosts.composer import TrimtabAlgorithm

CASE = Case(steps=8, policy=None, make=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01))
COST = "begins at null multipliers and counts from 0 of total_steps=8, so that a policy which follows the budget begins anew"


def policy() -> Any:
    return Scripted([[0.5]], decide_every=2)


def check(caplog: pytest.LogCaptureFixture, words: str, cost: str = COST) -> None:
    found = [record.getMessage() for record in caplog.records if record.name == "trimtab"]
    assert len(found) == 1, found
    assert words in found[0] and "holds no state of a controller" in found[0] and cost in found[0]
    caplog.clear()


def fit_lightning(path: Path, end: int, callback: Any = None, resume: bool = False) -> Any:
    library = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    trainer = library.Trainer(**QUIET_LIGHTNING, max_steps=end, callbacks=[callback] if callback else [])
    trainer.fit(lightning_module(CASE), Loader(CASE.batches()), ckpt_path=path if resume else None)
    trainer.save_checkpoint(path)
    return trainer


@pytest.mark.parametrize("callbacks", [True, False])
def test_lightning(callbacks: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "training.ckpt"
    fit_lightning(path, 3)
    if not callbacks:  # as where checkpoints are made by hand
        content = torch.load(path, weights_only=False)
        del content["callbacks"]
        torch.save(content, path)
    from trimtab.policies.hosts.lightning import TrimtabCallback

    callback = TrimtabCallback(policy(), total_steps=8)
    fit_lightning(path, 6, callback, resume=True)
    check(caplog, "the checkpoint of step 3 holds no state")
    assert callback.controller is not None and callback.controller.steps == 3
    again = TrimtabCallback(policy(), total_steps=8)
    fit_lightning(path, 8, again, resume=True)
    assert again.controller is not None and again.controller.steps == 5
    assert not [record for record in caplog.records if record.name == "trimtab"]


def test_huggingface(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from trimtab.policies.hosts.huggingface import TrimtabCallback

    def train(end: int, resume: int, callback: Any = None) -> None:
        trainer = huggingface_trainer(CASE, tmp_path, callback, end, [], save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{resume}") if resume else None)

    train(3, 0)
    callback = TrimtabCallback(policy(), total_steps=8)
    train(6, 3, callback)
    check(caplog, "the checkpoint of step 3 holds no state")
    assert callback.controller is not None and callback.controller.steps == 3
    train(8, 6, TrimtabCallback(policy(), total_steps=8))
    assert not [record for record in caplog.records if record.name == "trimtab"]


class Counter:
    """Another object in an accelerator's checkpoints."""

    def __init__(self) -> None:
        self.state = 0

    def state_dict(self) -> dict[str, int]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = state["state"]


@pytest.mark.parametrize("others", [0, 1])
def test_accelerate(others: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState

    from trimtab.policies.hosts import accelerate as host

    def train(begin: int, end: int, steered: bool) -> tuple[Any, list[Counter]]:
        AcceleratorState._reset_state(True)
        accelerator = library.Accelerator(cpu=True)
        own = Net()
        model, optimizer = accelerator.prepare(own, torch.optim.AdamW(own.parameters(), lr=0.01))
        counters = [Counter() for _ in range(others)]
        accelerator.register_for_checkpointing(*counters)
        options = {"model": model, "policy": policy(), "total_steps": 8}
        controller = host.attach(accelerator, optimizer, **options) if steered else None
        if begin:
            accelerator.load_state(str(tmp_path / str(begin)))
            if begin == 4:  # saved at once, before any step
                accelerator.save_state(str(tmp_path / "4 again"))
        for batch in CASE.batches()[begin:end]:
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if controller is not None:
                controller.step(loss)
        for counter in counters:
            counter.state += end - begin
        accelerator.save_state(str(tmp_path / str(end)))
        return controller, counters

    train(0, 4, False)
    controller, counters = train(4, 6, True)
    check(caplog, "the checkpoint holds no state")
    assert controller.controller.steps == 2 and [one.state for one in counters] == [6] * others
    assert len(list((tmp_path / "4 again").glob("custom_checkpoint_*.pkl"))) == others + 1
    controller, counters = train(6, 8, True)
    assert controller.controller.steps == 4 and [one.state for one in counters] == [8] * others
    assert not [record for record in caplog.records if record.name == "trimtab"]


def test_accelerate_still_refuses_what_lacks_another_object(tmp_path: Path) -> None:
    library = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState

    from trimtab.policies.hosts import accelerate as host

    AcceleratorState._reset_state(True)
    accelerator = library.Accelerator(cpu=True)
    own = Net()
    model, optimizer = accelerator.prepare(own, torch.optim.AdamW(own.parameters(), lr=0.01))
    accelerator.save_state(str(tmp_path))
    host.attach(accelerator, optimizer, model=model, policy="constant")
    accelerator.register_for_checkpointing(Counter())
    with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
        accelerator.load_state(str(tmp_path))


def test_composer(caplog: pytest.LogCaptureFixture) -> None:
    first = Stub(CASE).fit(3)
    algorithm = TrimtabAlgorithm(policy(), total_steps=8)
    second = Stub(CASE, algorithm)
    saved = first.save()
    second.state.timestamp = SimpleNamespace(batch=SimpleNamespace(value=3))
    second.algorithm = None
    second.load(saved).algorithm = algorithm
    second.fit(3)
    check(caplog, "the checkpoint of step 3 holds no state")
    assert algorithm.controller is not None and algorithm.controller.steps == 3
    third = Stub(CASE, TrimtabAlgorithm(policy(), total_steps=8))
    third.state.timestamp = SimpleNamespace(batch=SimpleNamespace(value=6))
    third.load(second.save()).fit(2)
    assert not [record for record in caplog.records if record.name == "trimtab"]
