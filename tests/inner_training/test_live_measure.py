"""What a live run measures beside its steps, and that its model does not notice."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.inner_training.probed import pictures, wide_tanh
from trimtab.inner_training.activations import EXAMPLES, FEATURE_EXAMPLES
from trimtab.inner_training.live_run import LiveRun
from trimtab.inner_training.measurements import MEASUREMENTS
from trimtab.inner_training.population import Population
from trimtab.inner_training.task import Instance, OptimizerSettings, TaskFamily
from trimtab.inner_training.tasks.arrays import ArrayTask

# Forward mode, and curvlinops, import parts of torch that are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


ALL = tuple(MEASUREMENTS)
SEEN = ("saturation", "dormant", "features")


def live(
    family: TaskFamily, instance: Instance, module: nn.Module, intervals: int, every: int = 1
) -> list[dict[str, np.ndarray]]:
    """What a live run of the same instance measures after each interval of four steps."""
    source = Population(family, 1, mode="eager")
    source.reset([0], [instance])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(instance.parameters[name]))
    optimizer = torch.optim.SGD(module.parameters(), lr=instance.optimizer.lr)
    run, found = LiveRun(optimizer, 4), []
    run.measure(ALL, module, every)
    for step in range(4 * intervals):
        x, y = source.batch(0, step)
        optimizer.zero_grad()
        loss = family.loss(module(x), y).mean()
        loss.backward()
        optimizer.step()
        run.record(loss)
        if run.position == 4:
            telemetry = run.telemetry()
            assert telemetry is not None
            found.append(dict(telemetry.to_host().probed))
            run.next_interval()
    run.detach()
    return found


@pytest.mark.parametrize("make", [pictures, wide_tanh])
def test_a_live_run_measures_what_a_population_does(make: Callable[[], ArrayTask]) -> None:
    family = make()
    plain = OptimizerSettings(rule="sgd", lr=0.05, momentum=0.0)
    drawn = [family.draw(seed, held_out=False) for seed in range(40)]
    few, many = min(drawn, key=lambda one: one.batch_size), max(drawn, key=lambda one: one.batch_size)
    assert few.batch_size < FEATURE_EXAMPLES < EXAMPLES < many.batch_size
    for one in (few, many):
        instance = replace(one, optimizer=plain, schedule=replace(one.schedule, kind="constant"))
        population = Population(family, 1, mode="eager")
        population.reset([0], [instance])
        population.measure(ALL, every=2)
        expected = [population.advance(4).to_host().probed for _ in range(3)]
        seen = live(family, instance, copy.deepcopy(family.module), 3, every=2)
        assert [sorted(probed) for probed in seen] == [
            sorted(("grad_sparsity", *SEEN)),
            [],
            sorted(("grad_sparsity", *SEEN)),
        ]
        for here, there in zip(seen, expected, strict=True):
            for name, value in here.items():
                np.testing.assert_allclose(value, there[name], rtol=1e-4, atol=1e-4, err_msg=name)
        assert seen[0]["saturation"][0] > 0.01


class Awkward(nn.Module):
    """A user's network, which may break off or be told to look inside."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.second, self.activation = nn.Linear(3, 5), nn.Linear(5, 1), activation
        self.trouble: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.first(x))
        if self.trouble is not None:
            raise self.trouble
        return self.second(hidden)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, run: LiveRun) -> None:
    optimizer.zero_grad()
    loss = model(torch.ones(6, 3)).square().mean()
    loss.backward()
    optimizer.step()
    run.record(loss)


def started(model: nn.Module | None = None, interval: int = 1) -> tuple[nn.Module, torch.optim.Optimizer, LiveRun]:
    model = model or Awkward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = LiveRun(optimizer, interval)
    run.measure(SEEN, model, every=1)
    return model, optimizer, run


def taken(run: LiveRun) -> set[str]:
    telemetry = run.telemetry()
    assert telemetry is not None
    return set(telemetry.probed)


def watching() -> bool:
    return torch.overrides._get_current_function_mode() is not None  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("trouble", [ValueError("broken"), KeyboardInterrupt()])
def test_a_forward_pass_that_breaks_off_leaves_nothing_behind(trouble: BaseException) -> None:
    model, optimizer, run = started()
    assert isinstance(model, Awkward)
    model.trouble = trouble
    with pytest.raises(type(trouble)):
        model(torch.ones(6, 3))
    model.trouble = None
    one_step(model, optimizer, run)
    assert not watching()
    assert taken(run) == set(SEEN)
    run.detach()


def test_only_the_last_step_of_an_interval_is_watched_and_only_with_gradients() -> None:
    seen: list[bool] = []

    def activation(x: Tensor) -> Tensor:
        seen.append(watching())
        return torch.tanh(x)

    model, optimizer, run = started(Awkward(activation), interval=3)
    for step in range(3):
        with torch.no_grad():
            model(torch.ones(2, 3))
        one_step(model, optimizer, run)
        assert seen[-2:] == [False, step == 2]
    assert taken(run) == set(SEEN)
    run.detach()


def test_what_is_watched_computes_the_same_bit_for_bit() -> None:
    outputs = []
    for measured in (False, True):
        model = Awkward(nn.ReLU(inplace=True))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = LiveRun(optimizer, 1)
        run.measure(SEEN if measured else (), model, every=1)
        for _ in range(3):
            one_step(model, optimizer, run)
            assert taken(run) == ({"dormant", "features"} if measured else set())
            run.next_interval()
        outputs.append([parameter.detach().clone() for parameter in model.parameters()])
        run.detach()
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


def test_a_model_with_compiled_parts_is_not_watched() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model[1].compile(backend="eager")
    model, optimizer, run = started(model)
    one_step(model, optimizer, run)
    assert taken(run) == set()
    run.detach()


def test_trouble_in_measuring_stays_there(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, run = started(Awkward(lambda x: torch.tanh(x[0, 0]).expand(6, 5)))  # an activation of no axis
    one_step(model, optimizer, run)
    assert taken(run) == set()
    assert "measuring activations failed" in caplog.text
    run.detach()


def test_copies_of_a_watched_model_have_nothing_of_the_run() -> None:
    model, optimizer, run = started(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    average = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    one_step(model, optimizer, run)
    before = run.telemetry()
    for other in (average, loaded):
        other(torch.ones(50, 3))
    after = run.telemetry()
    assert before is not None and after is not None
    assert torch.equal(before.probed["features"], after.probed["features"])
    assert len(file.getvalue()) < 10_000, "the optimizer was not saved along"
    run.detach()
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_live_run_goes_on_counting_after_it_was_saved() -> None:
    model, optimizer, run = started()
    run.measure(SEEN, model, every=2)
    one_step(model, optimizer, run)
    run.next_interval()
    other = LiveRun(optimizer, 1)
    other.load_state_dict(run.state_dict())
    run.detach()
    other.measure(SEEN, model, every=2)
    expected = (set(), set(SEEN), set())
    for names in expected:
        one_step(model, optimizer, other)
        assert taken(other) == names
        other.next_interval()
    other.detach()


def test_a_complex_parameter_counts_as_two_real_ones() -> None:
    def measured(weight: Tensor) -> list[Tensor]:
        live = LiveRun(torch.optim.SGD([weight.requires_grad_()], lr=0.1, momentum=0.9), 3)
        live.measure(["grad_sparsity"], None, every=1)
        for _ in range(3):
            pairs = torch.view_as_real(weight) if weight.is_complex() else weight
            loss = (pairs * torch.tensor([3.0, -2.0])).square().sum()
            live.optimizer.zero_grad()
            loss.backward()
            live.optimizer.step()
            live.record(loss)
        telemetry = live.telemetry()
        assert telemetry is not None
        return [telemetry.grad_norm, telemetry.grad_dot, telemetry.update_norm, telemetry.weight_norm]

    pairs = torch.tensor([[0.5, 1.0], [-2.0, 0.25]])
    for found, wanted in zip(measured(torch.view_as_complex(pairs.clone())), measured(pairs.clone()), strict=True):
        torch.testing.assert_close(found, wanted)
