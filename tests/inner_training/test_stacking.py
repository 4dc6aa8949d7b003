"""Modules of a user's own: what cannot be stacked is refused before any training, what can be trains as it would alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trimtab.errors import MismatchError
from trimtab.inner_training.population import Population
from trimtab.inner_training.stepping import Mode
from trimtab.inner_training.tasks.arrays import ArrayTask

INPUTS = np.random.default_rng(0).normal(size=(60, 4))
LABELS = (INPUTS[:, 0] > 0).astype(int)


class Odd(nn.Module):
    """A linear layer after something that depends on a buffer ``held`` of ones."""

    def __init__(self, act: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        self.last, self._act = nn.Linear(4, 2), act
        self.register_buffer("held", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self._act(self, x))


def scaling(module: Odd, x: Tensor) -> Tensor:
    return x * module.held.mul_(0.5)


def averaging(module: Odd, x: Tensor) -> Tensor:
    module.held = 0.9 * module.held + 0.1 * x.mean(0)
    return x - module.held


def counting(module: Odd, x: Tensor) -> Tensor:
    module.total = getattr(module, "total", 0.0) + x.mean()
    return x - module.total


def centring(module: Odd, x: Tensor) -> Tensor:
    return x - x.mean(0)


def branching(module: Odd, x: Tensor) -> Tensor:
    return x if module.last.weight.sum() > 0 else -x


class Recurrent(nn.Module):
    """What has a gradient under ``vmap`` but no evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x[:, None])[0][:, 0])


def task(make: Callable[[], nn.Module]) -> ArrayTask:
    return ArrayTask("own", make, INPUTS, LABELS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nn.Flatten, "has no parameters"),
        (lambda: nn.LazyLinear(2), "'weight' .* has no shape before its first batch"),
        (lambda: nn.Linear(4, 2, device="meta"), "'weight' .* has no values"),
        (lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)), "'0.weight' .* no gradient"),
        (lambda: Odd(scaling), "changes its buffer 'held'"),
        (lambda: Odd(averaging), "changes its buffer 'held'"),
        (lambda: Odd(counting), "cannot be stacked"),
        (lambda: Odd(centring), "computes an example differently beside other examples"),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False)), "beside other examples"),
        (lambda: Odd(branching), "data-dependent control flow"),
        pytest.param(Recurrent, "cannot be stacked", marks=pytest.mark.filterwarnings("ignore:There is a performance")),
    ],
)
def test_what_cannot_be_stacked_is_refused_before_training(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        Population(task(make), 3, mode="eager")


def test_buffers_of_any_value_and_type_are_welcome() -> None:
    class Held(Odd):
        def __init__(self) -> None:
            super().__init__(lambda module, x: x[:, module.order] + module.small.float())
            self.register_buffer("order", torch.tensor([3, 2, 1, 0]))
            self.register_buffer("small", torch.zeros(4, dtype=torch.bfloat16))
            self.held.fill_(torch.nan)

    runs = Population(task(Held), 2, mode="eager")
    runs.reset([0, 1], [runs.family.draw(seed, held_out=False) for seed in (0, 1)])
    assert runs.advance(3).losses.isfinite().all()


class Shared(nn.Module):
    """One part twice, a parameter in two parts, and a parameter without axes."""

    def __init__(self) -> None:
        super().__init__()
        twice, other = nn.Linear(4, 4), nn.Linear(4, 4)
        other.weight = twice.weight
        self.body = nn.Sequential(twice, nn.Tanh(), twice, nn.Tanh(), other)
        self.last, self.factor = nn.Linear(4, 2), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.last(self.body(x))


@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_shared_parts_and_parameters_train_as_alone(mode: Mode) -> None:
    family = task(Shared)
    runs = Population(family, 2, rules=("sgd", "adam", "adamw"), mode=mode)
    instances = [family.draw(seed, held_out=False) for seed in (3, 4)]
    runs.reset([0, 1], instances)
    assert runs.mode == mode
    alone = Shared()
    alone.load_state_dict(
        {name: torch.from_numpy(value) for name, value in instances[1].parameters.items()}, strict=False
    )
    alone.body[4].weight = alone.body[0].weight
    x, y = runs.batch(1, 0)
    loss = family.loss(alone(x), y).mean()
    loss.backward()
    telemetry = runs.advance(1)
    torch.testing.assert_close(telemetry.losses[0, 1], loss.detach())
    squares = torch.stack([one.grad.square().sum() for one in alone.parameters() if one.grad is not None])
    torch.testing.assert_close(telemetry.grad_norm[0, 1], squares.sum().sqrt())
    assert all(isinstance(one, nn.Parameter) for one in family.module.parameters())  # the template is as it was


@pytest.mark.filterwarnings("ignore:There is a performance", "ignore:.*torch.jit:DeprecationWarning")
def test_a_measurement_that_the_module_does_not_allow_is_refused_when_it_is_asked_for() -> None:
    layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True)
    make = lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), layer, nn.Flatten(), nn.Linear(4, 2))
    runs = Population(task(make), 2, mode="eager")
    runs.measure(("grad_sparsity",))
    with pytest.raises(MismatchError, match=r"curvature_max cannot be measured of the module of 'own': .* leave out"):
        runs.measure(("grad_sparsity", "curvature_max"))
    assert not runs.advance(2).probed


def test_a_module_that_writes_to_its_input_leaves_the_table_alone() -> None:
    family = task(lambda: Odd(lambda module, x: x.mul_(2)))
    np.testing.assert_array_equal(family.inputs.numpy(), INPUTS.astype(np.float32))
