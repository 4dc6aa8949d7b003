"""Lightning's own ways: validation losses, loggers, repeated fits, several optimizers, averaged weights, rollback."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.policies.hosts.machines import QUIET_LIGHTNING, Case, Loader, Net, lightning_module
from tests.policies.live import Scripted

from trimtab.errors import UserError
from trimtab.policies.hosts import lightning as module

library = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from trimtab.policies.hosts.lightning import TrimtabCallback


def fit(callback: Any, case: Case, module: Any = None, more: tuple[Any, ...] = (), **options: Any) -> Any:
    trainer = library.Trainer(
        **{**QUIET_LIGHTNING, "max_steps": case.ticks, "callbacks": [callback, *more], **options},
    )
    trainer.fit(module or lightning_module(case), Loader(case.batches()))
    return trainer


def test_it_is_a_callback_of_lightning_that_can_be_copied_and_sent() -> None:
    callback = TrimtabCallback("cosine", decide_every=3)
    assert isinstance(callback, library.Callback) and callback.state_key == "TrimtabCallback"
    assert TrimtabCallback.__doc__ and "several optimizers" in TrimtabCallback.__doc__
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(other) is TrimtabCallback and other.controller is None
    assert callback.state_dict() == {"controller": None}


def test_the_budget_is_that_of_the_trainer() -> None:
    callback = TrimtabCallback("cosine")
    fit(callback, Case(steps=6))
    assert callback.controller is not None and callback.controller._settings.total_steps == 6
    assert callback.controller.steps == 6


def test_validation_losses_arrive_with_the_next_step(caplog: pytest.LogCaptureFixture) -> None:
    policy = Scripted([[1.0]], signals=("val_available",), decide_every=1)
    case = Case(policy=policy, steps=6)

    def module() -> Any:
        made = lightning_module(case)
        made.validation_step = lambda batch, batch_idx: made.log("val_loss", made.net(**batch)["loss"])
        return made

    def validated(callback: Any) -> None:
        trainer = library.Trainer(
            **{**QUIET_LIGHTNING, "max_steps": 6, "callbacks": [callback], "val_check_interval": 3},
        )
        trainer.fit(module(), Loader(case.batches()), Loader(case.batches()[:1]))

    del policy.seen[:]
    validated(TrimtabCallback(policy, monitor="val_loss"))
    seen = [float(one[0, 0]) for one in policy.seen[-7:]]
    assert seen == [0, 0, 0, 0, 1, 1, 1]
    caplog.set_level(logging.WARNING, "trimtab")
    validated(TrimtabCallback(policy, monitor="val_los"))
    assert "monitor 'val_los' was not logged in the validation; logged: flat, val_loss" in caplog.text
    assert sum(record.name == "trimtab" for record in caplog.records) == 1


class Notes(library.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step or 0, metrics))


def test_multipliers_and_the_effective_rate_go_to_the_loggers() -> None:
    notes = Notes()
    callback = TrimtabCallback(Scripted([[1.0], [0.5], [0.5], [2.0]], decide_every=2))
    fit(callback, Case(steps=8), logger=notes, log_every_n_steps=1)
    told = {step: line for step, line in notes.lines if "trimtab/lr_multiplier" in line}
    assert told == {
        2: {"trimtab/lr_multiplier": 0.5, "trimtab/effective_lr": 0.025},
        6: {"trimtab/lr_multiplier": 2.0, "trimtab/effective_lr": 0.1},
    }


def test_a_second_fit_starts_a_new_controller_and_an_exception_lets_go() -> None:
    callback = TrimtabCallback(Scripted([[0.5]]))
    case = Case(steps=4)
    trainer = fit(callback, case)
    first = callback.controller
    assert first is not None and "step" not in vars(trainer.optimizers[0])
    assert callback.state_dict()["controller"]["lr_multiplier"] == 0.5
    module = lightning_module(case)
    module.training_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(callback, case, module)
    assert callback.controller is not first and callback.controller is not None
    optimizer = callback.controller._optimizer
    assert "step" not in vars(optimizer)
    fit(callback, case)
    assert callback.controller.steps == 4


def test_several_optimizers_are_refused() -> None:
    module = lightning_module(Case())
    module.automatic_optimization = False
    module.configure_optimizers = lambda: [
        torch.optim.SGD(one.parameters(), lr=0.1) for one in (module.net.first, module.net.last)
    ]
    with pytest.raises(UserError, match="this LightningModule has 2 optimizers, but a controller steers exactly one"):
        fit(TrimtabCallback("constant"), Case(), module)


def test_two_callbacks_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `TrimtabCallback`"):
        fit(TrimtabCallback("constant"), Case(), more=(TrimtabCallback("greedy"),))


@pytest.mark.parametrize("returns", [True, False])
def test_manual_optimization(returns: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    case = Case(steps=6)
    module = lightning_module(case)
    module.automatic_optimization = False

    def training_step(batch: Any, batch_idx: int) -> Any:
        loss = module.net(**batch)["loss"]
        module.optimizers().zero_grad()
        module.manual_backward(loss)
        module.optimizers().step()
        return loss if returns else None

    module.training_step = training_step
    callback = TrimtabCallback(Scripted([[1.0], [0.5]], decide_every=2))
    trainer = fit(callback, case, module)
    assert [one[0] for one in trainer.optimizers[0].effective] == [0.05] * 2 + [0.025 if returns else 0.05] * 4
    assert ("training_step returned no loss" in caplog.text) is not returns


def spoiled(case: Case, at: int) -> Any:
    """A module whose loss is not a number at one batch."""
    module = lightning_module(case)
    inner = module.training_step
    module.training_step = lambda batch, batch_idx: inner(batch, batch_idx) * (float("nan") if batch_idx == at else 1.0)
    return module


def test_a_rollback_takes_averaged_weights_along() -> None:
    class Average(library.callbacks.EMAWeightAveraging):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.finite = all(torch.isfinite(one).all() for one in self._average_model.parameters())

    found = []
    for together in (True, False):
        average = Average(decay=0.5)
        callback = TrimtabCallback(
            Scripted([[1.0]], decide_every=2),
            stateful=(lambda trainer, average=average: [average._average_model]) if together else (),
        )
        case = Case(steps=12)
        fit(callback, case, spoiled(case, 6), more=(average,))
        assert "rollbacks: 1" in callback.controller.summary()
        found.append(average.finite)
    assert found == [True, False]


def test_a_state_saved_before_the_training_began_again_is_not_lost(tmp_path: Path) -> None:
    case = Case(steps=4)
    callback = TrimtabCallback(Scripted([[0.5]]))
    trainer = fit(callback, case)
    path = tmp_path / "four.ckpt"
    trainer.save_checkpoint(path)
    fresh = TrimtabCallback(Scripted([[0.5]]))
    fresh.load_state_dict(callback.state_dict())
    assert fresh.controller is None
    assert json.dumps(fresh.state_dict()) == json.dumps(callback.state_dict())
    stored = torch.load(path, weights_only=True)["callbacks"]["TrimtabCallback"]
    assert stored["controller"]["lr_multiplier"] == 0.5


def test_clipping_by_lightning_comes_before_the_measurement() -> None:
    policy = Scripted([[1.0]], signals=("grad_level",), decide_every=4)
    callback = TrimtabCallback(policy)
    fit(callback, Case(steps=4), gradient_clip_val=1e-3)
    average = callback.controller._steering._grad_average[0]
    assert average == pytest.approx(1e-3, rel=1e-3)


def test_the_older_package_of_lightning_is_a_host_too(monkeypatch: pytest.MonkeyPatch) -> None:
    older = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    case = Case(steps=4)

    class Module(older.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            return case.make(self.net)

    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    monkeypatch.delitem(vars(module), "TrimtabCallback")
    own = module.TrimtabCallback
    assert issubclass(own, older.Callback) and not issubclass(own, library.Callback)
    for made in (own, TrimtabCallback):
        trainer = older.Trainer(**{**QUIET_LIGHTNING, "max_steps": 4, "callbacks": [made(Scripted([[0.5]]))]})
        trainer.fit(Module(), Loader(case.batches()))
        assert trainer.optimizers[0].effective == [(0.025, 0.01)] * 4
