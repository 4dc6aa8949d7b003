"""The duck-typed Composer algorithm against a stub of Composer's loop, because Composer itself asks for an older torch.

The stub follows composer/trainer/trainer.py: the order of steps and events, ``state.total_loss_dict``, what a checkpoint
holds of the algorithms, and that the losses of a batch whose scaled gradients overflowed are not told.
"""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.policies.hosts.machines import Case, Net, Recorder, follow, groups, pytorch
from tests.policies.live import Scripted
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, OneCycleLR

from trimtab.errors import UserError
from trimtab.policies.hosts.composer import TrimtabAlgorithm


class Event(enum.Enum):
    """Some of Composer's events; most of them are of no interest to the algorithm."""

    FIT_START = "fit_start"
    BATCH_START = "batch_start"
    AFTER_BACKWARD = "after_backward"
    BATCH_END = "batch_end"
    EVAL_END = "eval_end"
    FIT_END = "fit_end"


class Metric:
    """A metric of an evaluator."""

    def compute(self) -> torch.Tensor:
        return torch.tensor(0.7)


class Stub:
    """Composer's Trainer, as far as algorithms can see it."""

    def __init__(self, case: Case, algorithm: Any = None, unit: str = "ba") -> None:
        self.case, self.algorithm, self.done = case, algorithm, 0
        model = Net()
        optimizer = case.make(model)
        self.scheduler = None if case.schedule is None else case.schedule(optimizer)
        self.traces: list[int] = []
        self.state = SimpleNamespace(
            model=model,
            optimizers=(optimizer,),
            schedulers=[self.scheduler],
            scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) if case.amp else None,
            total_loss_dict={},
            eval_metrics={"eval": {"CrossEntropy": Metric()}},
            max_duration=SimpleNamespace(value=case.ticks if unit == "ba" else 2, unit=SimpleNamespace(value=unit)),
            dataloader_len=SimpleNamespace(value=case.ticks // 2),
        )

    def event(self, event: Event) -> None:
        if self.algorithm is not None and self.algorithm.match(event, self.state):
            self.traces.append(self.algorithm.apply(event, self.state, None))

    def fit(self, ticks: int, evaluate_after: int = 0) -> Stub:
        state, optimizer = self.state, self.optimizer()
        self.event(Event.FIT_START)
        for batch in range(self.done, self.done + ticks):
            self.event(Event.BATCH_START)
            optimizer.zero_grad()
            total = torch.zeros(())
            for rows in self.case.batches()[batch * self.case.accumulate : (batch + 1) * self.case.accumulate]:
                loss = state.model(**rows)["loss"] / self.case.accumulate
                (loss if state.scaler is None else state.scaler.scale(loss)).backward()
                total += loss.detach()
                state.loss = loss.detach()
                self.event(Event.AFTER_BACKWARD)
            if state.scaler is None:
                optimizer.step()
            else:
                state.scaler.step(optimizer)
                state.scaler.update()
            if torch.isfinite(total):
                state.total_loss_dict = {"loss/train/total": total.item()}
                follow(self.scheduler)
            self.event(Event.BATCH_END)
            if batch + 1 == evaluate_after:
                self.event(Event.EVAL_END)
        self.done += ticks
        self.event(Event.FIT_END)
        return self

    def save(self) -> dict[str, Any]:
        algorithms = (
            [] if self.algorithm is None else [(type(self.algorithm).__qualname__, self.algorithm.state_dict())]
        )
        parts = (self.state.model, self.state.optimizers[0], self.scheduler, self.state.scaler)
        return {
            "done": self.done,
            "parts": [None if one is None else one.state_dict() for one in parts],
            "algorithms": algorithms,
        }

    def load(self, saved: dict[str, Any]) -> Stub:
        self.done = saved["done"]
        parts = (self.state.model, self.state.optimizers[0], self.scheduler, self.state.scaler)
        for one, state in zip(parts, saved["parts"], strict=True):
            if one is not None:
                one.load_state_dict(state)
        stored = dict(saved["algorithms"])
        if self.algorithm is not None:
            self.algorithm.load_state_dict(stored[type(self.algorithm).__qualname__])
        return self

    def optimizer(self) -> Any:
        return self.state.optimizers[0]

    def weights(self) -> torch.Tensor:
        return torch.cat([one.detach().reshape(-1) for one in self.state.model.parameters()])


TABLE = [[1.0], [0.5], [0.37], [2.5], [1.0], [0.0], [0.81], [3.0], [0.2]]
SCHEDULES = {
    "OneCycleLR": lambda o: OneCycleLR(o, [0.1, 0.05], total_steps=20),
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 0.9**step),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 3, 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("mode", ["plain", "amp", "accumulation", "resume"])
def test_the_rate_inside_a_step_is_scheduled_times_multiplier(mode: str, name: str) -> None:
    case = Case(schedule=SCHEDULES[name], amp=mode == "amp", accumulate=3 if mode == "accumulation" else 1)
    stub = Stub(case, TrimtabAlgorithm(Scripted(TABLE, decide_every=1)))
    if mode == "resume":
        first = stub.fit(4)
        stub = Stub(case, TrimtabAlgorithm(Scripted(TABLE, decide_every=1))).load(first.save()).fit(4)
        effective = first.optimizer().effective + stub.optimizer().effective
    else:
        effective = stub.fit(case.ticks).optimizer().effective
    alone = pytorch(Case(schedule=SCHEDULES[name])).effective
    assert effective == [tuple(rate * TABLE[step][0] for rate in rates) for step, rates in enumerate(alone)]
    assert stub.algorithm.controller.steps == 8


def test_the_null_policy_is_no_controller_bit_for_bit() -> None:
    case = Case(schedule=SCHEDULES["OneCycleLR"])
    alone, null = Stub(case).fit(8), Stub(case, TrimtabAlgorithm("constant")).fit(8)
    assert torch.equal(alone.weights(), null.weights())
    assert null.traces == [0] * 9


def test_a_run_whose_steps_are_all_skipped_is_rolled_back() -> None:
    algorithm = TrimtabAlgorithm(Scripted([[1.0]], decide_every=2))
    stub = Stub(Case(amp=True, steps=60), algorithm).fit(8)
    next(stub.state.model.parameters()).data.fill_(torch.nan)
    stub.fit(19)
    assert not torch.isfinite(stub.weights()).all()
    stub.fit(6)
    assert torch.isfinite(stub.weights()).all() and algorithm.controller.steps == 7 + 5


def test_the_budget_and_the_validation_loss_come_from_the_state() -> None:
    for unit in ("ba", "ep"):
        policy = Scripted([[1.0], [0.5]], signals=("val_available",), decide_every=1)
        algorithm = TrimtabAlgorithm(policy, monitor="CrossEntropy")
        stub = Stub(Case(policy=policy), algorithm, unit).fit(8, evaluate_after=5)
        assert algorithm.controller is not None and algorithm.controller._settings.total_steps == 8
        assert [float(one[0, 0]) for one in policy.seen[-9:]] == [0, 0, 0, 0, 0, 0, 1, 1, 1]
        assert stub.traces == [0, 1, *[0] * 8], "only the first decision changed something"


def test_a_second_fit_goes_on_with_the_same_controller() -> None:
    algorithm = TrimtabAlgorithm(Scripted([[0.5]]))
    stub = Stub(Case(), algorithm).fit(4)
    first = algorithm.controller
    stub.fit(4)
    assert algorithm.controller is first and first is not None and first.steps == 8
    algorithm.detach()
    assert "step" not in vars(stub.optimizer())


def test_what_cannot_be_steered_is_refused() -> None:
    stub = Stub(Case(), TrimtabAlgorithm("constant"))
    stub.state.optimizers = (stub.optimizer(), Recorder(groups(Net())))
    with pytest.raises(UserError, match="this Composer training has 2 optimizers"):
        stub.fit(1)
    stub = Stub(Case(), TrimtabAlgorithm("constant")).fit(1)
    with pytest.raises(UserError, match="has a controller already"):
        TrimtabAlgorithm("constant").apply(Event.FIT_START, stub.state, None)
    other = Stub(Case(make=lambda model: torch.optim.SGD(groups(model), lr=0.05)), TrimtabAlgorithm("constant"))
    saved = stub.save()
    other.algorithm.load_state_dict(dict(saved["algorithms"])["TrimtabAlgorithm"])
    with pytest.raises(UserError, match="saved with optimizer 'Recorder', but this controller has 'SGD'"):
        other.fit(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: Recorder(groups(Net())), "4 of the optimizer's 4 parameters do not belong to the model"),
        (lambda model: Recorder([torch.zeros(2)]), "no parameters that require a gradient"),
    ],
)
def test_foreign_and_frozen_parameters_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Stub(Case(make=make), TrimtabAlgorithm("constant")).fit(1)


def test_it_has_what_composer_asks_of_an_algorithm() -> None:
    algorithm = TrimtabAlgorithm("constant")
    assert not algorithm.find_unused_parameters and not algorithm.backwards_create_graph
    assert not algorithm.required_on_load()
    assert algorithm.state_dict()["repr"] == repr(algorithm) == "TrimtabAlgorithm()"
    matched = [event for event in Event if algorithm.match(event, None)]
    assert matched == [Event.FIT_START, Event.BATCH_END, Event.EVAL_END]
