"""A run of any module, optimizer and loader: the face of a population, exact snapshots, its own randomness."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.inner_training.problems import family, plain_module, plain_optimizer
from tests.policies.test_live_run import Transfers
from tests.policies.test_parity import INTERVAL, SEEN, SETTINGS, STEPS, Wiggle, in_a_plain_loop, in_population
from trimtab.errors import MismatchError, RangeError, UnknownNameError, UserError
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.levers import LEVERS, resolve_levers
from trimtab.inner_training.live_values import in_proportion
from trimtab.inner_training.measurements import needs_of
from trimtab.inner_training.module_family import ModuleFamily
from trimtab.inner_training.module_parts import Batches, Parts, examples_in
from trimtab.inner_training.module_run import MOST_SKIPPED, ModuleRun, Snapshots
from trimtab.inner_training.own_randomness import OwnRandomness
from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule, factor
from trimtab.inner_training.signals import resolve_signals
from trimtab.inner_training.steering import Steering
from trimtab.inner_training.task import OptimizerSettings

NOW = np.ones(1, dtype=bool)
CPU = torch.device("cpu")


class Positioned:
    """Batches in order, with a position that can be saved, as stateful loaders have it."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.position = batches, 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def data(examples: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(examples, 4).to(device)
    targets = torch.sin(inputs.sum(1, keepdim=True))
    return list(zip(inputs.split(16), targets.split(16), strict=True))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def squared(module: nn.Module, batch: Any) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


def parts(module: nn.Module | None = None, **changes: Any) -> Parts:
    module = module or network()
    values: dict[str, Any] = {
        "module": module,
        "optimizer": changes.get("optimizer") or torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9),
        "train": data(160),
        "loss": squared,
        "total_steps": 40,
        "validation": data(48),
        "test": data(32),
    }
    return Parts(**{**values, **changes})


def scheduled(seed: int, device: str = "cpu") -> Parts:
    """Everything that a snapshot must hold: batch norm, dropout, moments, a schedule, a scaler, a data position."""
    del seed
    module = network().to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    return parts(
        module,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=40),
        scaler=torch.amp.GradScaler(device, init_scale=64.0, growth_interval=3),
        train=Positioned(data(160, device)),
    )


def started(make: Callable[[int], Parts], *, seed: int = 3, snapshots: Snapshots = "device") -> ModuleRun:
    run = ModuleRun(ModuleFamily(name="tried", make=make, loss_cap=20.0), snapshots=snapshots)
    run.reset([0], [run.family.draw(seed, held_out=False)])
    return run


def everything(run: ModuleRun) -> dict[str, Any]:
    """All that a run's future depends on, as copies."""
    made = run.parts
    state = {
        "module": made.module.state_dict(),
        "optimizer": made.optimizer.state_dict(),
        "scheduler": made.scheduler and made.scheduler.state_dict(),
        "scaler": made.scaler and made.scaler.state_dict(),
        "random": run._now().random.state_dict()["torch"],
    }
    return {name: _copied(value) for name, value in state.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list | tuple) else value


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# --- the same as a population and as a controller -------------------------------------------------------------------


def in_a_module_run(policy: Any, settings: OptimizerSettings, schedule: BaseSchedule) -> np.ndarray:
    instance = family().instance(3, settings, schedule=schedule)
    source = Population(family(), 1, mode="eager")
    source.reset([0], [instance])
    part = instance.split("validation")
    inputs = family().inputs[torch.from_numpy(instance.rows[part])] * instance.input_scale
    validation = [(inputs, torch.from_numpy(instance.labels[part]))]

    def make(seed: int) -> Parts:
        module = plain_module(instance)
        optimizer = plain_optimizer(module, settings)
        return Parts(
            module=module,
            optimizer=optimizer,
            train=[source.batch(0, step) for step in range(STEPS)],
            loss=lambda module, batch: family().loss(module(batch[0]), batch[1]).mean(),
            total_steps=instance.steps,
            validation=validation,
            scheduler=torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: float(factor(schedule, np.array([step]), instance.steps)[0])
            ),
        )

    run = started(make)
    steering = Steering(resolve_levers(tuple(LEVERS)), resolve_signals(policy.signals), GuardConfig(), 1)
    steering.reset(NOW, run.base)
    run.measure(needs_of(steering.signals))
    state, measured, val_loss, applied = policy.init(1), None, np.full(1, np.nan), []
    for _ in range(STEPS // INTERVAL + 1):
        reading = run.reading(measured, val_loss)
        assert reading.batch_size.tolist() == [16.0]
        health = steering.assess(reading)
        run.snapshot(health.stable)
        run.restore(health.rollback)
        actions, state = policy.act(steering.observe(reading), state)
        steering.decide(actions, policy.levers)
        run.set_lr_multiplier(steering.lr_multiplier)
        run.set_hyperparameters(steering.hyperparameters(run.base))
        applied.append(np.append(steering.lr_multiplier, steering.multipliers[0, 1:]))
        measured = run.advance(INTERVAL).to_host()
        val_loss = run.evaluate("validation").numpy().astype(np.float64)
    return np.array(applied)


@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw"])
def test_a_population_a_module_run_and_a_controller_see_and_do_the_same(name: str) -> None:
    policies, applied = [], []
    for play in (in_population, in_a_plain_loop, in_a_module_run):
        policies.append(Wiggle())
        applied.append(play(policies[-1], SETTINGS[name], BaseSchedule(kind="cosine")))
    seen = [np.concatenate(policy.seen) for policy in policies]
    for other, where in ((0, "population"), (1, "controller")):
        difference = np.abs(seen[2] - seen[other])
        worst = np.unravel_index(difference.argmax(), difference.shape)
        assert difference.max() < 1e-4, f"{SEEN[worst[1]]} at decision {worst[0]} differs from the {where}"
        np.testing.assert_allclose(applied[2], applied[other], rtol=1e-4)
    assert (applied[2].max(0) > 1.2 * applied[2].min(0)).all(), "every lever moved"


# --- snapshots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("place", ["device", "cpu"])
def test_a_restored_run_takes_the_same_steps_again_bit_for_bit(place: Snapshots, device: str) -> None:
    run = started(lambda seed: scheduled(seed, device), snapshots=place)
    run.advance(7)
    for _ in range(2):  # the first makes the present the candidate, the second confirms it
        run.snapshot(NOW)
    moment = everything(run)
    losses = run.advance(9).losses
    end = everything(run)
    assert not same(moment["module"], end["module"]) and not same(moment["scaler"], end["scaler"])
    run.restore(NOW)
    assert all(same(moment[name], value) for name, value in everything(run).items())
    assert torch.equal(run.advance(9).losses, losses)
    assert all(same(end[name], value) for name, value in everything(run).items())
    assert run.steps_done.tolist() == [7 + 9 + 9], "the budget is spent all the same"


def test_a_moment_is_trusted_only_after_the_next_one() -> None:
    run = started(scheduled)
    moments = [everything(run)["module"]]
    for _ in range(3):
        run.advance(3)
        run.snapshot(NOW)
        moments.append(everything(run)["module"])
    run.restore(NOW)
    assert same(everything(run)["module"], moments[2])
    run.advance(3)
    run.restore(NOW)
    assert same(everything(run)["module"], moments[2])
    run.snapshot(~NOW), run.restore(~NOW)
    assert same(everything(run)["module"], moments[2])


def test_the_first_steps_can_be_undone() -> None:
    run = started(scheduled)
    first = everything(run)
    losses = run.advance(4).losses
    run.restore(NOW)
    assert not run.parts.optimizer.state, "an optimizer that has not stepped has no state"
    assert all(same(first[name], value) for name, value in everything(run).items() if name != "random")
    assert torch.equal(run.advance(4).losses, losses)


class Replacing(nn.Module):
    """Counts its calls in a buffer that it replaces rather than overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.layer(x)


def test_buffers_that_a_module_replaces_are_restored_too() -> None:
    run = started(lambda seed: parts(Replacing()))
    run.advance(5)
    run.restore(NOW)
    assert float(run.parts.module.calls) == 0


def test_no_snapshots_no_restore() -> None:
    run = started(scheduled, snapshots="off")
    run.advance(2)
    run.snapshot(NOW), run.restore(~NOW)
    with pytest.raises(MismatchError, match="run 'tried' keeps no snapshots"):
        run.restore(NOW)
    with pytest.raises(UnknownNameError, match="place of snapshots 'gpu'"):
        ModuleRun(run.family, snapshots="gpu")  # type: ignore[arg-type]


# --- randomness -------------------------------------------------------------------------------------------------------


def loaded(seed: int) -> Parts:
    """Shuffled by a loader that draws from the process's generator, as users have them."""
    del seed
    inputs = torch.randn(64, 4)
    pairs = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    return parts(train=torch.utils.data.DataLoader(pairs, batch_size=8, shuffle=True))


def test_a_run_follows_from_its_seed_and_leaves_the_process_alone() -> None:
    def outside() -> tuple[Any, ...]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    expected_outside = outside()
    torch.set_rng_state(state[0]), np.random.set_state(state[1]), random.setstate(state[2])
    runs = [started(loaded, seed=5), started(loaded, seed=6)]
    losses = [run.advance(20).losses for run in runs]
    assert outside() == expected_outside
    again = started(loaded, seed=5)
    first = again.advance(11).losses
    torch.rand(3), np.random.rand(3), random.random()
    assert torch.isfinite(again.evaluate("validation")).all()  # and this must not matter either
    assert torch.equal(torch.cat([first, again.advance(9).losses]), losses[0])
    assert not torch.equal(losses[0], losses[1])
    assert runs[0].family.draw(5, held_out=True).seed != runs[0].family.draw(5, held_out=False).seed


def test_own_randomness_survives_errors_and_covers_every_generator() -> None:
    own, before = OwnRandomness(7), torch.get_rng_state()
    draws: list[tuple[float, ...]] = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), own.inside(CPU):
            draws.append((float(torch.rand(())), float(np.random.rand()), random.random()))
            raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)
    assert all(a != b for a, b in zip(*draws, strict=True))
    expected = (torch.rand((), generator=torch.Generator().manual_seed(7)), np.random.RandomState(7).rand(),
                random.Random(7).random())  # fmt: skip
    assert draws[0] == tuple(map(float, expected))
    with own.inside(CPU, keep=False):
        assert float(torch.rand(())) == draws[0][0]


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_loader_that_ends_begins_anew() -> None:
    fed: list[float] = []

    def noting(module: nn.Module, batch: Any) -> Tensor:
        fed.append(float(batch[1]))
        return (module(batch[0]) - batch[1]).square().mean()

    batches = [(torch.ones(2, 4), torch.full((1,), float(number))) for number in range(3)]
    run = started(lambda seed: parts(nn.Linear(4, 1), train=batches, loss=noting))
    run.advance(2), run.advance(5)
    assert fed == [0, 1, 2, 0, 1, 2, 0]
    assert run.reading(None, np.zeros(1)).batch_size.tolist() == [2.0]


def test_a_loader_may_refuse_to_tell_its_length() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(data(64))

    run = started(lambda seed: parts(train=torch.utils.data.DataLoader(Stream(), batch_size=None)))
    assert run.advance(6).losses.isfinite().all()


def test_a_position_counts_what_was_looked_at_ahead() -> None:
    batches = Batches(Positioned([10, 11, 12]), "a run")
    assert batches.stateful and not Batches([1], "a run").stateful
    state = (batches.peek(), batches.peek(), batches.state_dict())[-1]
    assert [batches.take() for _ in range(4)] == [10, 11, 12, 10]
    batches.load_state_dict(state)
    assert [batches.take() for _ in range(2)] == [10, 11]


def test_batch_norm_learns_in_training_and_rests_in_evaluation() -> None:
    run = started(lambda seed: parts())
    norm = run.parts.module[1]
    run.parts.module[3].eval()  # a part that the user keeps in evaluation mode
    run.advance(3)
    trained = norm.running_mean.clone()
    assert trained.abs().sum() > 0
    loss = run.evaluate("validation")
    assert loss.shape == (1,) and not loss.requires_grad and torch.equal(norm.running_mean, trained)
    assert norm.training and not run.parts.module[3].training
    run.restore(NOW)
    assert not norm.running_mean.any() and not norm.num_batches_tracked.any()


def test_evaluation_is_the_mean_over_examples() -> None:
    run = started(lambda seed: parts(validation=data(40)))  # batches of 16, 16 and 8
    run.parts.module.eval()
    with torch.no_grad():
        losses = [float(squared(run.parts.module, batch)) for batch in run.parts.validation or ()]
    assert float(run.evaluate("validation")) == pytest.approx(np.average(losses, weights=[16, 16, 8]))
    assert float(run.evaluate("validation", 17)) == pytest.approx(np.mean(losses[:2]))
    assert float(run.evaluate("validation", 16)) == pytest.approx(losses[0])


def test_several_batches_make_one_step() -> None:
    pairs = data(64)
    wide = [tuple(map(torch.cat, zip(*pairs[at : at + 2], strict=True))) for at in (0, 2)]
    runs = []
    for train, accumulate in ((pairs, 2), (wide, 1)):
        module = nn.Linear(4, 1)
        nn.init.ones_(module.weight), nn.init.zeros_(module.bias)
        runs.append(started(lambda seed: parts(module, train=train, accumulate=accumulate)))  # noqa: B023 - called at once
    losses = [run.advance(4).losses for run in runs]
    assert torch.allclose(*losses, rtol=1e-5)
    assert torch.allclose(runs[0].parts.module.weight, runs[1].parts.module.weight, rtol=1e-5)
    assert [run.reading(None, np.zeros(1)).batch_size.item() for run in runs] == [32, 32]


def test_an_optimizer_that_evaluates_the_loss_itself() -> None:
    batches = data(64)

    def linear() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.Linear(4, 1)
        nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
        return module, torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)

    def make(seed: int) -> Parts:
        module, optimizer = linear()
        return parts(module, optimizer=optimizer, train=batches)

    run = started(make)
    losses, (module, optimizer) = run.advance(4).losses, linear()
    for step, batch in enumerate(batches):

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = squared(module, batch)
            loss.backward()
            return loss

        assert torch.equal(optimizer.step(closure).detach(), losses[step, 0])
    assert torch.equal(module.weight, run.parts.module.weight) and run.steps_done.tolist() == [4]


def test_nothing_synchronises_inside_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.inner_training.live_run.may_exceed", lambda norm, clip: True)  # as off the CPU
    run = started(lambda seed: parts())
    run.set_lr_multiplier(np.full(1, 0.5))
    run.set_hyperparameters({"momentum": np.full(1, 0.8), "grad_clip": np.full(1, 0.1)})
    with Transfers() as transfers:
        run.advance(10)
        run.evaluate("validation")
    assert transfers.count == 0


def test_a_schedule_is_followed_to_the_end_of_the_budget_and_no_further() -> None:
    run = started(scheduled)
    run.advance(37), run.advance(10)  # a schedule of 40 steps raises at the 41st
    assert run.steps_done.tolist() == [47] and run.parts.scheduler.last_epoch == 40


# --- hyperparameters --------------------------------------------------------------------------------------------------


def grouped(seed: int) -> Parts:
    del seed
    module = nn.Linear(4, 1)
    groups = [
        {"params": [module.bias], "lr": 0.1, "weight_decay": 0.0},
        {"params": [module.weight], "lr": 0.01, "weight_decay": 0.2, "betas": (0.8, 0.99)},
    ]
    return parts(module, optimizer=torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1))


def test_levers_act_on_every_group_from_its_own_value() -> None:
    run = started(grouped)
    seen: list[list[tuple[float, ...]]] = []
    run.parts.optimizer.register_step_pre_hook(
        lambda one, *_: seen.append([(g["lr"], g["betas"][0], g["weight_decay"]) for g in one.param_groups])
    )
    base = {name: float(value[0]) for name, value in run.base.items()}
    assert (base["lr"], base["momentum"], base["weight_decay"]) == (0.1, 0.9, 0.2)
    run.set_lr_multiplier(np.full(1, 0.5))
    run.set_hyperparameters({"momentum": np.full(1, 0.95), "weight_decay": np.full(1, 0.1)})
    run.advance(1)
    assert np.allclose(seen[-1], [(0.05, 0.95, 0.0), (0.005, 0.9, 0.1)])
    assert [group["lr"] for group in run.parts.optimizer.param_groups] == [0.1, 0.01]
    run.set_lr_multiplier(np.ones(1))
    run.set_hyperparameters({name: run.base[name] for name in ("momentum", "weight_decay")})
    run.advance(1)
    assert seen[-1] == [(0.1, 0.9, 0.0), (0.01, 0.8, 0.2)], "null positions touch nothing"


@given(
    lever=st.sampled_from([LEVERS["momentum"], LEVERS["weight_decay"]]),
    own=st.floats(0.5, 0.9),
    base=st.floats(0.5, 0.9),
    multiplier=st.floats(0.2, 1.9),
)
def test_proportion_is_what_the_lever_itself_would_do(lever: Any, own: float, base: float, multiplier: float) -> None:
    value = [float(lever.value(np.array([one]), np.array([multiplier]))[0]) for one in (own, base)]
    assert in_proportion(lever.hyperparameter, own, value[1], base) == pytest.approx(value[0])


# --- mixed precision --------------------------------------------------------------------------------------------------


def scaled(loss: Callable[[nn.Module, Any], Tensor]) -> Callable[[int], Parts]:
    return lambda seed: parts(loss=loss, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))


def test_steps_that_the_scaler_skips_do_not_count() -> None:
    calls: list[int] = []

    def sometimes(module: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return squared(module, batch) * (torch.inf if len(calls) in (1, 4) else 1.0)

    run = started(scaled(sometimes))
    telemetry = run.advance(6)
    assert len(calls) == 8 and run.steps_done.tolist() == [6]
    assert telemetry.losses.shape == (6, 1) and torch.isfinite(telemetry.losses).all()
    assert run.parts.scaler.get_scale() == 1.0


def test_a_run_whose_gradients_are_never_finite_has_diverged() -> None:
    run = started(scaled(lambda module, batch: squared(module, batch) * torch.nan))
    telemetry, whole = run.advance(5), started(scheduled).advance(5)
    assert run.steps_done.tolist() == [0] and not np.isfinite(telemetry.to_host().losses).any()
    for name in ("losses", "grad_norm", "grad_dot", "update_norm", "weight_norm"):
        assert getattr(telemetry, name).shape == getattr(whole, name).shape
    assert MOST_SKIPPED > 16


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_stays_flat_over_many_resets() -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def make(seed: int) -> Parts:
        made = scheduled(seed)
        alive.append(weakref.ref(made.module))
        alive.append(weakref.ref(made.optimizer))  # type: ignore[arg-type]
        return made

    run = started(make)
    gc.collect()
    gc.disable()  # a run that waits for the garbage collector keeps its memory on the device
    try:
        for seed in range(200):
            run.reset([0], [run.family.draw(seed, held_out=False)])
            if seed % 20 == 0:
                run.advance(2), run.snapshot(NOW)
        assert sum(one() is not None for one in alive[2:]) == 2
    finally:
        gc.enable()


# --- bad input --------------------------------------------------------------------------------------------------------


def frozen() -> nn.Module:
    return nn.Linear(4, 1).requires_grad_(False)


class Stray:
    def __init__(self, module: nn.Module) -> None:
        self.module = module


def bad_parts() -> dict[str, tuple[Callable[[], Any], str]]:
    module, other = nn.Linear(4, 1), nn.Linear(4, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    return {
        "no parts": (lambda: {"module": module}, r"make\(seed\) of run 'tried' returned a dict; return Parts"),
        "no module": (lambda: parts(Stray(module), optimizer=optimizer), "the module of run 'tried' is a Stray"),
        "no optimizer": (lambda: parts(optimizer=0.1), "the optimizer of run 'tried' is a float"),
        "no parameters": (
            lambda: parts(frozen(), optimizer=torch.optim.SGD(frozen().parameters(), lr=0.1)),
            "has no parameters that its optimizer could train",
        ),
        "no shapes": (
            lambda: parts(lazy := nn.LazyLinear(1), optimizer=torch.optim.SGD(lazy.parameters(), lr=0.1)),
            "the module of run 'tried' has lazy layers that have no shape yet; run a batch through it before",
        ),
        "others' parameters": (
            lambda: parts(module, optimizer=optimizer),
            "2 of the 2 parameters of the optimizer of run 'tried' do not belong to its module; make the optimizer from",
        ),
        "no budget": (lambda: parts(total_steps=0), "total_steps of run 'tried' is 0; it must be at least 1"),
        "no batch per step": (lambda: parts(accumulate=0), "accumulate of run 'tried' is 0; it must be at least 1"),
        "no time": (lambda: parts(deadline=0), "deadline of run 'tried' is 0; give seconds above 0"),
        "time in words": (lambda: parts(deadline="5"), "deadline of run 'tried' is '5'; give seconds above 0"),
        "no number": (lambda: parts(deadline=True), "deadline of run 'tried' is True; give seconds above 0"),
        "no loss": (lambda: parts(loss=3.0), "the loss of run 'tried' is a float; give a function"),
        "no loader": (lambda: parts(train=None), "train of run 'tried' is a NoneType; it must be an iterable"),
        "empty": (lambda: parts(train=[]), "train of run 'tried' holds no batch"),
        "empty in the end": (lambda: parts(train=Positioned([])), "train of run 'tried' holds no batch"),
        "once": (lambda: parts(train=iter(data(32))), "train of run 'tried' is a list_iterator, which can be iterated"),
        "validated once": (lambda: parts(validation=(one for one in data(32))), "validation of run 'tried' is a gener"),
        "no test": (lambda: parts(test=[]), "test of run 'tried' holds no batch"),
        "scheduler": (lambda: parts(scheduler=0.1), "the scheduler of run 'tried' is a float; it must have step"),
        "class": (
            lambda: parts(scheduler=torch.optim.lr_scheduler.StepLR),
            "the scheduler of run 'tried' is the class StepLR; give one that is made",
        ),
        "scaler": (lambda: parts(scaler=True), "the scaler of run 'tried' is a bool; it must have step"),
        "plateau": (
            lambda: parts(module, optimizer=(own := torch.optim.SGD(module.parameters(), lr=0.1)),
                          scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(own)),
            "waits for a metric; leave it out",
        ),
        "another's schedule": (
            lambda: parts(scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer)),
            "the scheduler of run 'tried' belongs to another optimizer",
        ),
        "closure": (
            lambda: parts(module, optimizer=torch.optim.LBFGS(module.parameters()), scaler=torch.amp.GradScaler("cpu")),
            "LBFGS evaluates the loss itself, so run 'tried' can have no scaler",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_parts())
def test_parts_that_do_not_fit_are_refused_before_any_training(name: str) -> None:
    make, message = bad_parts()[name]
    with warnings.catch_warnings(), pytest.raises(UserError, match=message):
        warnings.simplefilter("ignore", FutureWarning)
        started(lambda seed: make())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda module, batch: (module(batch[0]) - batch[1]).square(), r"has the shape \(16, 1\); return a scalar"),
        (lambda module, batch: 0.5, "is a float; return a scalar tensor"),
        (lambda module, batch: squared(module, batch).detach(), "has no gradient; compute it from the module's"),
    ],
)
def test_losses_that_cannot_be_descended(loss: Any, message: str) -> None:
    with pytest.raises(UserError, match="the loss of run 'tried' " + message):
        started(lambda seed: parts(loss=loss)).advance(1)


def test_a_run_that_goes_on_where_the_last_one_ended_is_no_fresh_one() -> None:
    module = network()
    run = started(lambda seed: parts(module))
    with pytest.raises(UserError, match=r"make\(seed\) of run 'tried' returned the module of the run before"):
        run.reset([0], [run.family.draw(1, held_out=False)])


def test_what_cannot_be_asked() -> None:
    run = ModuleRun(
        ModuleFamily(name="tried", make=lambda seed: parts(validation=None, test=Positioned([])), loss_cap=2)
    )
    assert run.steps_done.tolist() == [0] and run.base["lr"].tolist() == [1.0]
    for ask in (lambda: run.advance(1), lambda: run.evaluate("test"), lambda: run.reading(None, np.zeros(1))):
        with pytest.raises(MismatchError, match="run 'tried' has not begun; call reset first"):
            ask()
    run.reset([], [])
    run.reset([0], [run.family.draw(0, held_out=False)])
    with pytest.raises(UserError, match=r"run 'tried' has no validation data; give Parts\(validation=...\)"):
        run.evaluate("validation")
    with pytest.raises(UserError, match="test of run 'tried' holds no batch"):
        run.evaluate("test")
    with pytest.raises(UnknownNameError, match="split of a module run 'train'"):
        run.evaluate("train")
    with pytest.raises(RangeError, match="steps is 0; it must be at least 1"):
        run.advance(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"make": 3}, r"make is a int; give a function make\(seed\)"),
        ({"loss_cap": 1e-5}, "loss_cap is 1e-05; it must be at least 0.0001"),
        ({"loss_cap": float("inf")}, "loss_cap is inf"),
        ({"loss_cap": 2.0, "loss_floor": 0.0}, "loss_cap is 2.0"),
    ],
)
def test_families_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModuleFamily(**{"name": "tried", "make": parts, "loss_cap": 3.0, **change})


def test_counting_examples() -> None:
    assert examples_in({"ids": torch.zeros(5, 3), "kind": "text"}) == 5
    assert examples_in(["text", (np.zeros((7, 2)), torch.zeros(3))]) == 7
    assert examples_in(torch.zeros(())) is None and examples_in({}) is None
