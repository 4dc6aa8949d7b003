"""The hooks: effective values inside a step, scheduled values outside it, with any scheduler, optimizer and failure."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.inner_training.problems import PlainLion
from tests.policies.live import ALL, Loop, Scripted, adamw, holding, inside, sgd
from torch.optim import lr_scheduler as schedulers
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.live_probe import inner_product, total_norm
from trimtab.inner_training.signals import SIGNALS
from trimtab.policies.attach import attach

MAKE: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: schedulers.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [5, 12]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.3, 9),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=15),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.93),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 40, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 40),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 8, 2),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.97**step),
    "LambdaLR-warmup": lambda o: schedulers.LambdaLR(o, lambda step: min(1.0, step / 10)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.95),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=60),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.001, 0.1, step_size_up=6),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=5), schedulers.ExponentialLR(o, 0.9)], [5]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 4), schedulers.ExponentialLR(o, 0.95)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: Plateau(o),
}
TARGETS = [[1.0], [0.5], [0.37], [2.5], [1.0], [0.0], [0.81]]


class Plateau(schedulers.ReduceLROnPlateau):
    """Fed a loss that does not fall, without the argument, so that it fits the loop of the tests."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, factor=0.7, patience=2)

    def step(self, metrics: Any = 1.0, epoch: Any = None) -> None:
        super().step(metrics)


@pytest.mark.parametrize("rate", ["float", "tensor"])
@pytest.mark.parametrize("first", ["scheduler", "controller"])
@pytest.mark.parametrize("name", MAKE)
def test_any_scheduler_composes(name: str, first: str, rate: str) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=torch.tensor(0.05) if rate == "tensor" else 0.05, foreach=False)

    with warnings.catch_warnings():
        # A schedule over a tensor rate makes torch's own schedulers warn or fail here and there; those are skipped.
        warnings.simplefilter("ignore" if rate == "tensor" else "error")
        alone, loop = Loop(make), Loop(make)
        alone.scheduler = MAKE[name](alone.optimizer)
        if first == "scheduler":
            loop.scheduler = MAKE[name](loop.optimizer)
        loop.controller = attach(loop.optimizer, policy=Scripted(TARGETS, decide_every=3))
        seen = inside(loop.optimizer, lambda group: copy.copy(group["lr"]) if rate == "float" else group["lr"].clone())
        if first == "controller":
            loop.scheduler = MAKE[name](loop.optimizer)
        held = loop.optimizer.param_groups[0]["lr"]
        for step in range(20):
            multiplier = loop.controller.multipliers["lr"]
            assert multiplier == TARGETS[min(step // 3, len(TARGETS) - 1)][0]
            scheduled = float(loop.optimizer.param_groups[0]["lr"])
            alone.step()
            loop.step()
            if rate == "float":
                assert seen[-1] == scheduled * multiplier
            else:
                assert float(seen[-1]) == float(torch.tensor(scheduled) * multiplier)
            now, expected = loop.optimizer.param_groups[0]["lr"], alone.optimizer.param_groups[0]["lr"]
            assert type(now) is type(expected)
            assert float(now) == float(expected), f"after step {step}"
            if rate == "tensor" and isinstance(expected, torch.Tensor):
                assert now is held, "the tensor that a compiled step would hold"
    assert len({float(rate) for rate in seen}) > 5, "the schedule moves"


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": adamw,
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "rmsprop-momentum": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.8, weight_decay=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=1e-3),
    "lion": lambda p: PlainLion(p, lr=0.003, betas=(0.9, 0.99), weight_decay=0.1),
    "muon": lambda p: torch.optim.Muon([one for one in p if one.ndim == 2], lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


@pytest.mark.parametrize("levers", [("lr",), tuple(ALL)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_null_policy_is_no_controller_bit_for_bit(name: str, levers: tuple[str, ...]) -> None:
    alone, steered = Loop(OPTIMIZERS[name]), Loop(OPTIMIZERS[name])
    policy = Scripted([[0.0] * len(levers)], levers=dict.fromkeys(levers, "moves"))
    steered.controller = attach(steered.optimizer, model=steered.model, policy=policy)
    alone.run(37)
    steered.run(37)
    assert torch.equal(alone.weights(), steered.weights())
    assert not any(decision.acted for decision in steered.decisions)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("rmsprop", "adagrad")])
def test_effective_values_are_those_of_an_optimizer_made_with_them(name: str) -> None:
    steered, alone = Loop(OPTIMIZERS[name]), Loop(OPTIMIZERS[name])
    policy = Scripted([[0.5, 0.7, 3.0]], levers=dict.fromkeys(("lr", "momentum", "weight_decay"), "targets"))
    steered.controller = attach(steered.optimizer, policy=policy)
    group = alone.optimizer.param_groups[0]
    momentum = LEVERS["momentum"].value(np.array([group.get("momentum", group.get("betas", [0])[0])]), np.array([0.7]))
    group["lr"] *= 0.5
    group["weight_decay"] *= 3.0
    if "betas" in group:
        group["betas"] = (float(momentum[0]), group["betas"][1])
    else:
        group["momentum"] = float(momentum[0])
    if name == "sgd":
        assert momentum[0] == pytest.approx(0.3)  # momentum that was off has a floor from which it can move
    before = copy.deepcopy({key: value for key, value in steered.optimizer.param_groups[0].items() if key != "params"})
    alone.run(25)
    steered.run(25)
    assert torch.equal(alone.weights(), steered.weights())
    after = steered.optimizer.param_groups[0]
    assert all(after[key] == value for key, value in before.items())


@pytest.mark.parametrize("name", ["rmsprop", "adagrad"])
def test_momentum_that_an_optimizer_has_no_room_for_is_unavailable(name: str) -> None:
    loop, alone = Loop(OPTIMIZERS[name]), Loop(OPTIMIZERS[name])
    policy = Scripted([[0.5]], levers={"momentum": "targets"}, signals=("momentum_available", "adaptive"))
    loop.controller = attach(loop.optimizer, policy=policy)
    del policy.seen[:-1]  # the trial that every policy is put to
    alone.run(20)
    loop.run(20)
    assert torch.equal(alone.weights(), loop.weights())
    assert {tuple(seen[0]) for seen in policy.seen} == {(0.0, 1.0)}
    assert not any(decision.acted for decision in loop.decisions)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_but_sgd_is_adaptive(name: str) -> None:
    loop = Loop(OPTIMIZERS[name])
    policy = Scripted([[1.0]], signals=("adaptive",))
    loop.controller = attach(loop.optimizer, policy=policy)
    del policy.seen[:-1]
    loop.run(6)
    assert {float(seen[0, 0]) for seen in policy.seen} == {float(name not in ("sgd", "nesterov"))}


def test_each_group_keeps_its_own_base() -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        return torch.optim.AdamW(
            [
                {"params": [first], "lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.0},
                {"params": rest, "lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1},
            ]
        )

    loop = Loop(make)
    table = [[2.0, 0.5, 10.0]]
    policy = Scripted(table, levers=dict.fromkeys(("lr", "momentum", "weight_decay"), "targets"))
    loop.controller = attach(loop.optimizer, policy=policy)
    found: list[Any] = []
    loop.optimizer.register_step_pre_hook(
        lambda one, a, k: found.append([(g["lr"], g["betas"], g["weight_decay"]) for g in one.param_groups])
    )
    loop.step()
    (lr, betas, decay), (other_lr, other_betas, other_decay) = found[0]
    assert (lr, other_lr, decay, other_decay) == (0.2, 0.02, 0.0, 1.0)
    assert betas == (pytest.approx(0.75), 0.9) and other_betas == (pytest.approx(0.95), 0.99)
    assert loop.controller.multipliers == {"lr": 2.0, "momentum": 0.5, "weight_decay": 10.0}


def test_the_clip_limits_the_gradient_and_the_measurement_is_taken_before_it() -> None:
    loop, alone = Loop(sgd), Loop(sgd)
    # At the first decision the average gradient norm is unknown, so the clip is off until the second.
    loop.controller = attach(loop.optimizer, policy=Scripted([[0.04]], levers={"grad_clip": "targets"}))
    norms = inside(
        loop.optimizer, lambda group: float(torch.nn.utils.get_total_norm([p.grad for p in group["params"]]))
    )
    for _ in range(5):
        assert loop.step() == alone.step()
    measured = float(np.mean(norms[3:5]))  # the two sampled steps
    loop.run(3)
    assert norms[5:] == pytest.approx([10 * 0.04 * measured] * 3, rel=1e-4)
    loop.run(2)
    assert loop.controller._steering._grad_average[0] > 2 * norms[-1], "unclipped norms are what is remembered"


class Breaking(torch.optim.SGD):
    """Raises after it has read its values, when told to."""

    broken = False

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self.broken:
            raise RuntimeError("the step broke")
        return loss


def breaking(parameters: Any) -> Breaking:
    return Breaking(parameters, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("way", ["step", "closure", "later hook"])
@pytest.mark.parametrize("order", ["no scheduler", "scheduler first", "controller first"])
def test_a_step_that_raises_leaves_the_scheduled_values(order: str, way: str) -> None:
    loop = Loop(breaking)
    if order == "scheduler first":
        loop.scheduler = schedulers.ExponentialLR(loop.optimizer, 0.9)
    table = [[0.5, 0.5]]
    loop.controller = attach(loop.optimizer, policy=Scripted(table, levers={"lr": "targets", "momentum": "targets"}))
    if order == "controller first":
        loop.scheduler = schedulers.ExponentialLR(loop.optimizer, 0.9)
    seen = inside(loop.optimizer, lambda group: (group["lr"], group["momentum"]))
    loop.run(3)
    group = loop.optimizer.param_groups[0]
    scheduled = (group["lr"], group["momentum"])

    def fail(*ignored: Any) -> Any:
        raise RuntimeError("the step broke")

    handle = loop.optimizer.register_step_pre_hook(fail) if way == "later hook" else None
    loop.optimizer.broken = way == "step"
    with pytest.raises(RuntimeError, match="the step broke"):
        loop.optimizer.step(fail) if way == "closure" else loop.optimizer.step()
    assert (group["lr"], group["momentum"]) == scheduled
    loop.optimizer.broken = False
    if handle is not None:
        handle.remove()
    seen.clear()
    loop.run(3)
    assert seen[0][0] == scheduled[0] * 0.5
    assert group["momentum"] == 0.9
    assert loop.controller._run.steps == 6, "a step that raised does not count"


def test_a_step_that_raised_behind_the_wrapper_is_made_good_at_the_next_call() -> None:
    loop = Loop(breaking)
    captured = loop.optimizer.step
    loop.controller = attach(loop.optimizer, policy=Scripted([[0.5]]))
    loop.step()
    loop.optimizer.broken = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the step broke"):
            captured()
        loop.controller.step(0.1)
        assert loop.optimizer.param_groups[0]["lr"] == 0.05
    loop.optimizer.broken = False
    seen = inside(loop.optimizer, lambda group: group["lr"])
    captured()
    assert seen[-1] == 0.025 and loop.optimizer.param_groups[0]["lr"] == 0.05


def test_a_step_that_calls_its_parents_step_counts_once_and_is_measured_before_the_clip() -> None:
    loop, plain = Loop(breaking), Loop(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    for one in (loop, plain):
        policy = Scripted([[0.5, 0.04]], levers={"lr": "targets", "grad_clip": "targets"})
        one.controller = attach(one.optimizer, policy=policy)
        one.run(20)
    assert torch.equal(loop.weights(), plain.weights())
    states = [{**one.controller.state_dict(), "optimizer": ""} for one in (loop, plain)]
    assert json.dumps(states[0]) == json.dumps(states[1])  # equal where NaN, too
    assert loop.controller._run.steps == 20


def test_groups_that_share_one_tensor_are_scaled_once() -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        return torch.optim.AdamW([{"params": [first]}, {"params": rest}], lr=torch.tensor(0.5), foreach=False)

    loop = Loop(make)
    shared = loop.optimizer.param_groups[0]["lr"]
    loop.optimizer.param_groups[1]["lr"] = shared
    loop.controller = attach(loop.optimizer, policy=Scripted([[0.25]]))
    seen = inside(loop.optimizer, lambda group: float(group["lr"]))
    loop.run(2)
    assert seen == [0.125, 0.125] and float(shared) == 0.5


def test_a_rate_set_during_a_failed_step_is_kept() -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=Scripted([[0.5]]))

    def set_by_hand(optimizer: Any, args: Any, kwargs: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.77

    loop.optimizer.register_step_pre_hook(set_by_hand)
    loop.step()
    assert loop.optimizer.param_groups[0]["lr"] == 0.77


def test_closures_are_measured_and_clipped_after_their_gradients_exist() -> None:
    plain, closed = Loop(sgd), Loop(sgd)
    for loop in (plain, closed):
        policy = Scripted([[0.5, 0.05]], levers={"lr": "targets", "grad_clip": "targets"}, signals=("grad_level",))
        loop.controller = attach(loop.optimizer, policy=policy)
    for step in range(30):
        plain.step()

        def closure() -> torch.Tensor:
            closed.optimizer.zero_grad()
            loss = closed.loss()
            loss.backward()
            return loss

        loss = closed.optimizer.step(closure) if step % 2 else closed.optimizer.step(closure=closure)
        closed.done += 1
        closed.controller.step(loss)
    assert torch.equal(plain.weights(), closed.weights())
    assert np.array_equal(plain.controller._policy.seen[-1], closed.controller._policy.seen[-1])


def test_lbfgs_trains_under_a_controller() -> None:
    loop = Loop(lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4))
    loop.controller = attach(loop.optimizer, policy=Scripted([[0.8]], decide_every=3))

    def closure() -> torch.Tensor:
        loop.optimizer.zero_grad()
        loss = (loop.model(loop.inputs) - loop.targets).square().mean()
        loss.backward()
        return loss

    losses = [loop.optimizer.step(closure) for _ in range(9) if loop.controller.step(1.0) or True]
    assert loop.controller._run.steps == 9
    assert losses[-1] < 0.5 * losses[0]


def test_steps_that_a_gradient_scaler_skips_do_not_count() -> None:
    for fused in (False, True):
        loop = Loop(lambda p, fused=fused: torch.optim.AdamW(p, lr=0.01, fused=fused))
        twin = Loop(lambda p, fused=fused: torch.optim.AdamW(p, lr=0.01, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        policy = Scripted([[0.0]], levers={"lr": "moves"}, signals=("grad_level", "grad_cosine", "update_ratio"))
        loop.controller = attach(loop.optimizer, model=loop.model, policy=policy, decide_every=3)
        twin_policy = Scripted([[0.0]], levers={"lr": "moves"}, signals=policy.signals)
        twin.controller = attach(twin.optimizer, model=twin.model, policy=twin_policy, decide_every=3)
        skipped = {0, 4, 5, 9}
        for step in range(16):
            loop.optimizer.zero_grad()
            loss = loop.loss()
            scaler.scale(loss).backward()
            if step in skipped:
                next(loop.model.parameters()).grad[0, 0] = torch.inf
            scaler.step(loop.optimizer)
            scaler.update(2.0**10)
            loop.controller.step(loss)
            if step not in skipped:
                loop.done += 1
                twin.step()
        assert loop.controller._run.steps == twin.controller._run.steps == 12
        np.testing.assert_allclose(np.concatenate(policy.seen), np.concatenate(twin_policy.seen), atol=1e-5)
        norms = [one.controller._steering._grad_average[0] for one in (loop, twin)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5), "in units of the loss, not of the scaler"
        assert "rollbacks: 0" in loop.controller.summary()


class Checkpoints:
    """Saves optimizer and controller wherever it is called from, as the handler of a signal would."""

    def __init__(self) -> None:
        self.taken: list[tuple[Any, Any]] = []
        self.controller: Any = None

    @torch.compiler.disable
    def __call__(self, optimizer: torch.optim.Optimizer, *ignored: Any) -> None:
        controller = None if self.controller is None else json.loads(json.dumps(self.controller.state_dict()))
        self.taken.append((copy.deepcopy(optimizer.state_dict()), controller))


def in_three(kind: str, rate: Any) -> torch.optim.Optimizer:
    shapes: list[Any] = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": shapes[:1]}, {"params": shapes[1:], "weight_decay": 0.3}]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.8, 0.99), weight_decay=0.1)


@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")  # torch's own, on its first compilation
@pytest.mark.parametrize(
    ("kind", "tensor", "compiled"),
    [
        ("sgd", False, False),
        ("sgd", True, False),
        ("adamw", False, False),
        ("adamw", True, False),
        ("adamw", True, True),
    ],
)
def test_a_checkpoint_taken_inside_a_step_holds_the_scheduled_values(kind: str, tensor: bool, compiled: bool) -> None:
    torch.compiler.reset()
    optimizer = in_three(kind, torch.tensor(0.05) if tensor else 0.05)
    save = Checkpoints()
    optimizer.register_step_post_hook(save)  # before the controller's own, so that its values are still in force
    levers = dict.fromkeys(("lr", "momentum", "weight_decay"), "targets")
    policy = Scripted([[0.5, 0.7, 3.0]], levers=levers, decide_every=2)
    controller = save.controller = attach(optimizer, policy=policy)
    own = copy.deepcopy(optimizer.state_dict()["param_groups"])
    optimizer.register_step_pre_hook(save)  # after it, when they are in force
    seen = inside(optimizer, lambda group: float(group["lr"]))
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for _ in range(3):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(3)
        step()
        controller.step(1.0)
    assert seen == pytest.approx([0.025] * 3) and len(save.taken) == 6
    for state, told in save.taken:
        assert state["param_groups"] == own
        assert told["effective_lr"] == pytest.approx([0.025, 0.025])
    base = controller._run.base(controller._steering.levers)
    found: list[Any] = []
    optimizer.register_step_pre_hook(lambda *ignored: found.append(controller._run.base(controller._steering.levers)))
    optimizer.step()
    assert found == [base]
    again = in_three(kind, 0.05)
    again.load_state_dict(save.taken[-1][0])
    attach(again, policy=Scripted([[0.5, 0.7, 3.0]], levers=levers, decide_every=2)).load_state_dict(save.taken[-1][1])


def test_detaching_leaves_the_optimizer_as_it_was() -> None:
    for early in (False, True):
        loop, alone = Loop(sgd), Loop(sgd)
        if early:
            loop.scheduler, alone.scheduler = (schedulers.ExponentialLR(one.optimizer, 0.9) for one in (loop, alone))
        own = vars(loop.optimizer).get("step")
        controller = attach(loop.optimizer, policy=Scripted([[0.5]]))
        controller.detach()
        controller.detach()
        assert vars(loop.optimizer).get("step") is own
        assert not loop.optimizer._optimizer_step_pre_hooks and not loop.optimizer._optimizer_step_post_hooks
        assert not loop.optimizer._optimizer_state_dict_post_hooks
        loop.controller = controller
        loop.run(12)
        alone.run(12)
        assert torch.equal(loop.weights(), alone.weights())
        assert loop.decisions[-1].reason == "detached" and controller.multipliers == {"lr": 1.0}
        attach(loop.optimizer, policy=holding())


def test_detaching_below_a_scheduler_made_later() -> None:
    loop = Loop(sgd)
    controller = attach(loop.optimizer, policy=Scripted([[0.5]]))
    loop.scheduler = schedulers.ExponentialLR(loop.optimizer, 0.9)
    controller.detach()
    seen = inside(loop.optimizer, lambda group: group["lr"])
    loop.run(2)
    assert seen == [0.05, 0.05 * 0.9]


def test_the_optimizer_can_still_be_copied_saved_and_inspected() -> None:
    loop = Loop(sgd)
    loop.controller = attach(loop.optimizer, policy=Scripted([[0.5]]))
    loop.run(3)
    assert list(inspect.signature(loop.optimizer.step).parameters) == ["closure"]
    copied = copy.deepcopy(loop.optimizer)
    assert "step" not in vars(copied) and not copied._optimizer_step_pre_hooks
    assert copied.param_groups[0]["lr"] == 0.05
    saved = copy.deepcopy(loop.optimizer.state_dict())
    loop.optimizer.load_state_dict(saved)  # replaces the groups
    seen = inside(loop.optimizer, lambda group: group["lr"])
    loop.run(1)
    assert seen == [0.025] and loop.optimizer.param_groups[0]["lr"] == 0.05


def test_forgotten_or_early_calls_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    loop = Loop(sgd)
    controller = attach(loop.optimizer, policy=Scripted([[0.5]], decide_every=3))
    for _ in range(3):
        assert controller.step(1.0).acted is False
    assert len(caplog.records) == 1 and "called before the first optimizer.step(); call it after" in caplog.text
    caplog.clear()
    loop.run(40)
    assert len(caplog.records) == 1 and "was not called in the last 6 steps" in caplog.text
    loop.controller = controller
    loop.run(7)
    assert loop.decisions[0].reason != "between decisions", "the next call decides"
    assert len(caplog.records) == 1


def test_trouble_in_a_measurement_never_reaches_the_training_loop(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, alone = Loop(sgd), Loop(sgd)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=holding())

    def fail(*ignored: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(loop.controller._run.probe, "before", fail)
    loop.run(22)
    alone.run(22)
    assert torch.equal(loop.weights(), alone.weights())
    assert "every lever holds" in loop.decisions[4].reason
    assert len(caplog.records) == 2, "one for the measurement, one for the decision"


@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")  # torch's own, on its first compilation
@pytest.mark.parametrize("first", ["controller", "compiler"])
@pytest.mark.parametrize("rate", [0.05, torch.tensor(0.05)], ids=["float", "tensor"])
def test_a_compiled_step_sees_every_value_and_is_compiled_at_most_twice(rate: Any, first: str) -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    loops = [Loop(lambda p: torch.optim.SGD(p, lr=copy.copy(rate), momentum=0.9)) for _ in range(2)]
    alone, compiled = loops
    if first == "compiler":
        step = torch.compile(compiled.optimizer.step, backend=count)
    for loop in loops:
        loop.controller = attach(loop.optimizer, policy=Scripted(TARGETS, decide_every=1))
    if first == "controller":
        step = torch.compile(compiled.optimizer.step, backend=count)
    alone.run(9)
    for _ in range(9):
        compiled.optimizer.zero_grad()
        loss = compiled.loss()
        loss.backward()
        step()
        compiled.done += 1
        compiled.controller.step(loss)
        assert float(compiled.optimizer.param_groups[0]["lr"]) == float(rate)
    np.testing.assert_allclose(compiled.weights(), alone.weights(), rtol=1e-5)
    assert 1 <= len(graphs) <= 2


class Transfers(TorchDispatchMode):
    """Counts the values that are fetched from the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_synchronises_between_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.inner_training.live_run.may_exceed", lambda norm, clip: True)  # as off the CPU
    loop = Loop(sgd)
    policy = Scripted([[0.9, 0.9, 0.9, 0.05]], levers=dict.fromkeys(ALL, "targets"), signals=tuple(SIGNALS))
    controller = attach(loop.optimizer, model=loop.model, policy=policy, decide_every=5)
    for step in range(30):
        loop.optimizer.zero_grad()
        loss = loop.loss()
        loss.backward()
        with Transfers() as transfers:
            loop.optimizer.step()
            if step % 5 < 4:
                controller.step(loss, val_loss=loss)
        assert transfers.count == 0
        if step % 5 == 4:
            controller.step(loss)


@pytest.mark.parametrize("clip", [1e-3, 0.3, 1e3])
def test_a_look_at_the_norm_changes_nothing_about_a_clip(clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> torch.Tensor:
        loop = Loop(sgd)
        loop.controller = attach(loop.optimizer, policy="constant")
        loop.controller._run.clip = clip
        loop.run(8)
        return torch.cat([one.detach().reshape(-1) for one in loop.model.parameters()])

    looked = trained()
    monkeypatch.setattr("trimtab.inner_training.live_run.may_exceed", lambda norm, clip: True)
    assert torch.equal(looked, trained())


def test_norms_of_half_precision_and_sparse_tensors() -> None:
    big = torch.full((4,), 6e4, dtype=torch.float16)
    assert float(total_norm([big, big])) == pytest.approx(6e4 * 8**0.5, rel=1e-3)
    sparse = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0]).to_sparse()
    assert float(total_norm([sparse])) == 5.0
    dot = inner_product([sparse, None, torch.ones(2)], [torch.ones(5), torch.ones(1), None])
    assert dot is not None and float(dot) == 7.0


def test_sparse_gradients_train_under_a_controller() -> None:
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.5)
    controller = attach(optimizer, policy=Scripted([[0.5]], signals=("grad_level", "update_ratio")))
    for step in range(12):
        optimizer.zero_grad()
        loss = embedding(torch.tensor([step % 10, 3])).square().mean()
        loss.backward()
        optimizer.step()
        decision = controller.step(loss)
        assert "failed" not in decision.reason
    assert abs(controller._policy.seen[-1]).min() > 0
