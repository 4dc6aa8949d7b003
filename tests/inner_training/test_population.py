"""The engine against plain PyTorch, and its promises: exactness, independence of runs, reset, snapshots."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tests.inner_training.problems import family, plain_module, plain_optimizer
from trimtab.errors import MismatchError, RangeError, UnknownNameError, UserError
from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.schedules import factor as schedule_factor
from trimtab.inner_training.task import Instance, OptimizerSettings
from trimtab.inner_training.tasks.arrays import ArrayTask

SETTINGS = {
    "sgd": OptimizerSettings(rule="sgd", lr=0.05, momentum=0.0),
    "sgd-momentum-decay": OptimizerSettings(rule="sgd", lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": OptimizerSettings(rule="sgd", lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": OptimizerSettings(rule="adam", lr=3e-3),
    "adam-decay": OptimizerSettings(rule="adam", lr=3e-3, momentum=0.8, beta2=0.99, weight_decay=1e-2),
    "adamw": OptimizerSettings(rule="adamw", lr=3e-3, weight_decay=0.1),
}


def norm_of(tensors: list[torch.Tensor]) -> float:
    """L2 norm of all tensors together."""
    return float(torch.cat([one.flatten() for one in tensors]).norm())


def population(instances: list[Instance], **options: object) -> Population:
    made = Population(family(), len(instances), mode="eager", **options)  # type: ignore[arg-type]
    made.reset(range(len(instances)), instances)
    return made


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of two sets of parameters."""
    square = sum((one[name] - other[name]).detach().square().sum().item() for name in one)
    return float(square / sum(value.detach().square().sum().item() for value in other.values())) ** 0.5


@pytest.mark.parametrize("name", SETTINGS)
def test_one_run_equals_torch_optim_over_100_steps(name: str) -> None:
    instance = family().instance(3, SETTINGS[name])
    runs = population([instance], clip=False)
    module = plain_module(instance)
    optimizer = plain_optimizer(module, SETTINGS[name])
    for step in range(100):
        x, y = runs.batch(0, step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    start = runs.parameters_of(0)
    runs.advance(100)
    after = dict(module.named_parameters())
    assert distance(start, after) > 1e-2
    assert distance(runs.parameters_of(0), after) < 1e-5


def test_runs_of_different_rules_do_not_disturb_each_other() -> None:
    instances = [family().instance(seed, settings) for seed, settings in enumerate(SETTINGS.values())]
    together = population(instances)
    together.advance(50)
    for run, instance in enumerate(instances):
        alone = population([instance])
        alone.advance(50)
        assert distance(together.parameters_of(run), alone.parameters_of(0)) < 1e-4


def test_a_diverged_run_does_not_disturb_the_others() -> None:
    calm = family().instance(1)
    wild = family().instance(2, OptimizerSettings(rule="sgd", lr=1e30))
    pair, twins = population([calm, wild]), population([calm, calm])
    spoiled = pair.advance(20).to_host()
    healthy = twins.advance(20).to_host()
    assert not np.isfinite(spoiled.losses[:, 1]).all()
    np.testing.assert_array_equal(spoiled.losses[:, 0], healthy.losses[:, 0])


@pytest.mark.parametrize("split", [1, 7, 10])
def test_cutting_an_interval_changes_nothing(split: int) -> None:
    instances = [family().instance(seed) for seed in range(3)]
    whole, cut = population(instances), population(instances)
    losses = whole.advance(20).losses
    parts = torch.cat([cut.advance(split).losses, cut.advance(20 - split).losses])
    assert torch.equal(losses, parts)


def test_the_same_instance_is_the_same_run_whatever_else_happened() -> None:
    instances = [family().instance(seed, SETTINGS["adam"]) for seed in range(4)]
    first = population(instances)
    losses = first.advance(30).losses
    torch.rand(1000), np.random.default_rng(0).normal(size=100)
    first.reset([0, 1, 2, 3], instances)
    assert torch.equal(first.advance(30).losses, losses)
    assert torch.equal(population(instances).advance(30).losses, losses)


def test_reset_of_one_run_leaves_the_others_bit_for_bit() -> None:
    instances = [family().instance(seed) for seed in range(3)]
    runs, untouched = population(instances), population(instances)
    runs.advance(10), untouched.advance(10)
    runs.reset([1], [family().instance(9)])
    losses, others = runs.advance(10).losses, untouched.advance(10).losses
    assert torch.equal(losses[:, [0, 2]], others[:, [0, 2]])
    assert torch.equal(losses[:, 1], population([instances[0], family().instance(9)]).advance(10).losses[:, 1])


def test_base_schedule_and_multiplier_act_at_every_step() -> None:
    schedule = BaseSchedule(kind="cosine")
    settings = OptimizerSettings(rule="sgd", lr=0.1, momentum=0.0)
    instance = family().instance(5, settings, schedule=schedule, steps=40)
    runs, module = population([instance]), plain_module(instance)
    runs.set_lr_multiplier(np.array([0.3]))
    optimizer = plain_optimizer(module, settings)
    for step in range(40):
        x, y = runs.batch(0, step)
        optimizer.param_groups[0]["lr"] = 0.1 * float(schedule_factor(schedule, np.array(step), 40)) * 0.3
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    runs.advance(15), runs.advance(25)
    assert distance(runs.parameters_of(0), dict(module.named_parameters())) < 1e-5


def test_hyperparameters_and_clip_equal_torch() -> None:
    instance = family().instance(6, SETTINGS["sgd-momentum-decay"])
    runs, module = population([instance]), plain_module(instance)
    runs.set_hyperparameters(
        {"momentum": np.array([0.5]), "weight_decay": np.array([0.2]), "grad_clip": np.array([0.1])}
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.5, weight_decay=0.2)
    for step in range(30):
        x, y = runs.batch(0, step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()
    runs.advance(30)
    assert distance(runs.parameters_of(0), dict(module.named_parameters())) < 1e-5


def test_an_infinite_clip_is_bit_for_bit_no_clip() -> None:
    instances = [family().instance(seed) for seed in range(2)]
    with_clip, without = population(instances, clip=True), population(instances, clip=False)
    assert torch.equal(with_clip.advance(40).losses, without.advance(40).losses)


def test_telemetry_is_what_its_docstring_says() -> None:
    instance = family().instance(7)
    runs, module = population([instance]), plain_module(instance)
    optimizer = plain_optimizer(module, instance.optimizer)
    gradients, losses = [], []
    for step in range(10):
        x, y = runs.batch(0, step)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(x), y)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.step()
        after = [p.detach().clone() for p in module.parameters()]
        losses.append(loss.item())
    measured = runs.advance(10).to_host()
    np.testing.assert_allclose(measured.losses[:, 0], losses, rtol=1e-4)
    np.testing.assert_allclose(measured.grad_norm[:, 0], [g.norm() for g in gradients[-2:]], rtol=1e-4)
    np.testing.assert_allclose(measured.grad_dot, gradients[-1] @ gradients[-2], rtol=1e-3)
    # Two weight matrices: the first with its bias is early, the second late, and nothing lies between.
    moved = [new - old for new, old in zip(after, before, strict=True)]
    for taken, of in ((measured.update_norm, moved), (measured.weight_norm, before)):
        wanted = [norm_of(of[:2]), 0.0, norm_of(of[2:])]
        np.testing.assert_allclose(taken[:, 0], wanted, rtol=1e-4)


def test_evaluate_is_the_mean_loss_of_the_split() -> None:
    instance = family().instance(8)
    runs, module = population([instance]), plain_module(instance)
    for split, limit in (("train", None), ("validation", None), ("validation", 25), ("test", None)):
        place = instance.split(split)
        rows, labels = instance.rows[place][:limit], instance.labels[place][:limit]
        x = family().inputs[rows] * instance.input_scale
        with torch.no_grad():
            wanted = torch.nn.functional.cross_entropy(module(x), torch.from_numpy(labels)).item()
        assert runs.evaluate(split, limit).item() == pytest.approx(wanted, rel=1e-5)


def test_batches_visit_every_example_once_per_epoch_in_a_new_order() -> None:
    runs = population([family().instance(4, batch_size=8)])
    epochs = [
        [tuple(row.tolist()) for step in range(start, start + 25) for row in runs.batch(0, step)[0]]
        for start in (0, 25)
    ]
    inputs = family().inputs[family().instance(4).rows[:200]] * 1.5
    wanted = sorted(tuple(row.tolist()) for row in inputs)
    assert sorted(epochs[0]) == wanted
    assert sorted(epochs[1]) == wanted
    assert epochs[0] != epochs[1]


def test_restore_goes_back_to_the_moment_before_the_last_stable_one() -> None:
    runs = population([family().instance(seed, SETTINGS["adam"]) for seed in range(2)])
    yes, only_first = np.array([True, True]), np.array([True, False])
    runs.advance(10)
    runs.snapshot(yes)
    wanted = runs.parameters_of(0)
    runs.advance(10)
    runs.snapshot(yes)
    runs.advance(10)
    kept = runs.parameters_of(1)
    runs.restore(only_first)
    assert distance(runs.parameters_of(0), wanted) == 0
    assert distance(runs.parameters_of(1), kept) == 0


def test_a_run_that_dies_at_once_is_restored_to_its_start() -> None:
    instance = family().instance(2, OptimizerSettings(rule="sgd", lr=1e30))
    runs = population([instance])
    start = runs.parameters_of(0)
    runs.advance(10)
    runs.restore(np.array([True]))
    assert distance(runs.parameters_of(0), start) == 0


@pytest.mark.slow
def test_compiled_equals_eager_within_1e4_over_50_steps() -> None:
    instances = [family().instance(seed, settings) for seed, settings in enumerate(SETTINGS.values())]
    fast = Population(family(), len(instances), mode="compile")
    assert fast.mode == "compile"
    fast.reset(range(len(instances)), instances)
    slow = population(instances)
    np.testing.assert_allclose(fast.advance(50).to_host().losses, slow.advance(50).to_host().losses, atol=1e-4)
    np.testing.assert_allclose(fast.evaluate("test").numpy(), slow.evaluate("test").numpy(), atol=1e-4)
    again = Population(family(), len(instances), mode="compile")
    again.reset(range(len(instances)), instances)
    again.advance(50)
    for run in range(len(instances)):
        assert distance(fast.parameters_of(run), again.parameters_of(run)) == 0


def test_a_compiler_that_fails_leaves_an_eager_population(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    runs = Population(family(), 2, mode="compile")
    assert runs.mode == "eager"
    assert [record.message for record in caplog.records if "no compiler found" in record.message]
    runs.reset([0, 1], [family().instance(0), family().instance(1)])
    assert torch.equal(
        runs.advance(5).losses, population([family().instance(0), family().instance(1)]).advance(5).losses
    )


@pytest.fixture
def double_precision() -> Iterator[None]:
    """What another part of the process may have set."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def advanced(instances: list[Instance]) -> list[np.ndarray]:
    runs = population(instances)
    losses = runs.advance(5).losses.numpy()
    return [losses, runs.evaluate("validation").numpy(), runs.parameters_of(1)["first.weight"].numpy()]


def test_settings_of_the_process_change_nothing(request: pytest.FixtureRequest) -> None:
    instances = [family().instance(seed, SETTINGS["adam"], batch_size=5) for seed in range(2)]
    before = advanced(instances)
    request.getfixturevalue("double_precision")
    with torch.inference_mode():
        for one, other in zip(before, advanced(instances), strict=True):
            assert one.dtype == other.dtype == np.float32
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [(torch.nn.BatchNorm1d(64), "changes its buffer"), (torch.nn.Dropout(0.5), "cannot be stacked")],
)
def test_a_module_that_cannot_be_stacked_is_refused_before_training(layer: torch.nn.Module, complaint: str) -> None:
    images, classes = load_digits(return_X_y=True)
    task = ArrayTask("odd", lambda: torch.nn.Sequential(layer, torch.nn.Linear(64, 10)), images, classes)
    with pytest.raises(MismatchError, match=complaint):
        Population(task, 2)


def test_bad_input_is_named() -> None:
    with pytest.raises(RangeError, match="num_runs"):
        Population(family(), 0)
    with pytest.raises(UnknownNameError, match="adamw"):
        Population(family(), 1, rules=("adamv",))
    runs = population([family().instance(0)])
    with pytest.raises(UnknownNameError, match="validation"):
        runs.evaluate("valid")
    with pytest.raises(RangeError, match="steps"):
        runs.advance(0)
    with pytest.raises(UserError, match="batch_size"):
        runs.reset([0], [family().instance(0, batch_size=17)])
