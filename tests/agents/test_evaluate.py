"""Evaluation: against a plain PyTorch loop, and what may not matter: batches, company, order, the policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.agents.tiny import TINY, TWO
from trimtab.agents.conditions import Conditions
from trimtab.agents.evaluate import Evaluator, evaluate
from trimtab.agents.evaluation import Evaluation
from trimtab.envs.catalogue import SCENARIOS
from trimtab.errors import ConfigError, MismatchError, RangeError, UnknownNameError, UserError
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule, factor
from trimtab.inner_training.task import OptimizerSettings
from trimtab.inner_training.tasks import make_family
from trimtab.policies.network import LearnedPolicy
from trimtab.policies.policy import Kind
from trimtab.policies.registry import load_policy

UNGUARDED = GuardConfig(rollback=False)
FLAT = {"sgd": 0.01, "adaptive": 0.01}


@dataclass
class Spy:
    """Moves ``lr`` by a fixed list of targets and remembers what it saw."""

    targets: tuple[float, ...] = ()
    signals: tuple[str, ...] = ("started", "val_available", "progress_available", "progress", "lr_position")
    levers: Mapping[str, Kind] = field(default_factory=lambda: {"lr": "targets"})
    name: str = "spy"
    decide_every: int | None = None
    seen: list[np.ndarray] = field(default_factory=list)

    def init(self, num_runs: int) -> dict[str, Any]:
        return {"decision": np.zeros(num_runs, dtype=np.int64)}

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        self.seen.append(observations.copy())
        targets = np.array((*self.targets, 1.0))[np.minimum(state["decision"], len(self.targets))]
        actions = np.repeat(targets[:, None], len(self.levers), axis=1)
        return actions, {"decision": state["decision"] + 1}


def play(policy: Any = "constant", scenario: Any = TINY, *, runs: int = 6, **options: Any) -> Evaluation:
    names = Conditions.__dataclass_fields__
    conditions = Conditions(**{name: options.pop(name) for name in list(options) if name in names})
    return evaluate(policy, scenario, runs=runs, conditions=conditions, **{"mode": "eager", **options})


def assert_same_runs(one: Evaluation, two: Evaluation, **tolerance: float) -> None:
    assert one.keys == two.keys and one.families == two.families
    for name, values in one.columns().items():
        np.testing.assert_allclose(values, two.columns()[name], err_msg=name, **tolerance)


# --- against a plain loop ---------------------------------------------------------------------------------------


def plain_losses(evaluator: Evaluator, run: int, multipliers: tuple[float, ...]) -> tuple[list[float], list[float]]:
    """ln validation and test losses after each interval of one run, by torch.optim on an ordinary module."""
    instance, family = evaluator.instances()[run], make_family("tiny-regression")
    population = Population(family, 1, mode="eager")
    population.reset([0], [instance])
    module = torch.nn.Linear(3, 1)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in instance.parameters.items()})
    settings = instance.optimizer
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    optimizer: torch.optim.Optimizer
    if settings.rule == "sgd":
        optimizer = torch.optim.SGD(
            module.parameters(), momentum=settings.momentum, nesterov=settings.nesterov, **common
        )
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.rule]
        optimizer = kind(module.parameters(), betas=(settings.momentum, settings.beta2), eps=settings.eps, **common)

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        return family.loss(module(inputs), labels).mean()

    def measured(split: str) -> float:
        part = instance.split(split)
        with torch.no_grad():
            value = loss(family.inputs[instance.rows[part]], torch.from_numpy(instance.labels[part]))
        return math.log(family.bounded(np.array(value.item())))

    validation, test = [], []
    for step in range(instance.steps):
        scheduled = settings.lr * float(factor(instance.schedule, np.array(step), instance.steps))
        optimizer.param_groups[0]["lr"] = scheduled * multipliers[step // TINY.interval]
        optimizer.zero_grad()
        loss(*population.batch(0, step)).backward()
        optimizer.step()
        if (step + 1) % TINY.interval == 0:
            validation.append(measured("validation"))
            test.append(measured("test"))
    return validation, test


def test_every_number_is_that_of_a_plain_loop() -> None:
    evaluator = Evaluator(TINY, runs=8, seed=3, mode="eager")
    # A high rate in the middle, so that the best checkpoint is not always the last.
    multipliers = (1.0, 3.0, 1.0, 6.0, 1.0, 0.3, 1.0, 0.1)
    found = evaluator.play(Spy(multipliers), Conditions(guard=replace(UNGUARDED, explosion=1e6)))
    for run in range(8):
        validation, test = plain_losses(evaluator, run, multipliers)
        budget = found.budgets[run]
        assert found.decisions[run] == len(validation) == budget // 5 and found.inner_steps[run] == budget
        np.testing.assert_allclose(found.curve[run, : len(validation)], validation, atol=1e-4)
        assert (found.curve[run, len(validation) :] == found.curve[run, len(validation) - 1]).all()
        assert found.final_loss[run] == pytest.approx(test[-1], abs=1e-4)
        assert found.best_loss[run] == pytest.approx(test[int(np.argmin(validation))], abs=1e-4)
        assert found.trajectory[run] == pytest.approx(np.mean(validation), abs=1e-4)
    ends = found.curve[np.arange(8), found.decisions - 1]
    assert (found.final_validation_loss == ends).all()
    assert (found.best_loss != found.final_loss).any()


def test_steps_to_target_count_until_the_curve_is_low_enough() -> None:
    found = play(runs=8)
    for target in (-1.0, 0.0, found.final_validation_loss):
        goals = np.broadcast_to(target, 8)
        for run, steps in enumerate(found.steps_to_target(target)):
            below = [i for i, value in enumerate(found.curve[run]) if value <= goals[run]]
            assert steps == ((below[0] + 1) * 5 if below else math.inf)


# --- what may not matter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["greedy", "random"])
def test_a_run_ends_at_its_own_budget_whatever_its_company(policy: str) -> None:
    together = play(policy, runs=7)
    assert len(set(together.budgets)) > 2
    for batch in (1, 3):
        assert_same_runs(together, play(policy, runs=7, batch_of_runs=batch), atol=1e-5)


def test_the_same_seed_gives_every_policy_the_same_instances() -> None:
    evaluator = Evaluator(TINY, runs=5, seed=1, mode="eager")
    one, two = evaluator.play(load_policy("cosine")), evaluator.play(load_policy("random", levers=["lr"]))
    assert one.keys == two.keys and (one.final_loss != two.final_loss).any()
    assert (one.learning_rates == two.learning_rates).all()
    assert_same_runs(one, evaluator.play(load_policy("cosine")), rtol=0)  # nothing is left over from another play
    assert_same_runs(one, play("cosine", runs=5, seed=1), rtol=0)
    assert set(one.keys).isdisjoint(play("cosine", runs=5, seed=2).keys)


def test_held_out_instances_are_not_those_of_training() -> None:
    held_out, training = play(), play(held_out=False)
    assert all("/held-out/" in key for key in held_out.keys) and all("/train/" in key for key in training.keys)


def test_families_take_their_shares_and_results_keep_their_order() -> None:
    evaluator = Evaluator(TWO, runs=8, mode="eager", batch_of_runs=4)
    found = evaluator.play(load_policy("constant"))
    assert found.families == ("tiny-regression",) * 6 + ("tiny-classes",) * 2
    assert [key.split("/")[0] for key in found.keys] == list(found.families)
    assert found.budgets.tolist() == [instance.steps for instance in evaluator.instances()]
    assert found.curve.shape == (8, max(found.decisions)) and found.decisions[6:].max() < found.curve.shape[1]
    for curve, decisions in zip(found.curve, found.decisions, strict=True):
        assert (curve[decisions:] == curve[decisions - 1]).all()
    alone = [Evaluator(TWO, runs=8, mode="eager", batch_of_runs=1).play(load_policy("constant"))]
    assert_same_runs(found, alone[0], atol=1e-5)


def test_a_grid_is_so_many_plays() -> None:
    evaluator = Evaluator(TWO, runs=6, mode="eager", batch_of_runs=3)
    policy, grid = load_policy("constant"), [None, FLAT, np.geomspace(1e-3, 1e-1, 6)]
    together = evaluator.play_grid(policy, Conditions(base_schedule="constant"), grid)
    for found, rates in zip(together, grid, strict=True):
        alone = evaluator.play(policy, Conditions(learning_rates=rates, base_schedule="constant"))
        assert_same_runs(found, alone, atol=1e-5)
        np.testing.assert_allclose(found.curve, alone.curve, atol=1e-5)
    assert all(found.wall_seconds > 0 for found in together)


def test_an_interval_that_begins_within_the_budget_is_finished() -> None:
    found = play(scenario=TINY.replace(interval=7))
    assert (found.inner_steps == -(-found.budgets // 7) * 7).all()


# --- divergence -------------------------------------------------------------------------------------------------


def cap() -> float:
    return math.log(make_family("tiny-regression").loss_cap)


def test_a_run_lost_in_the_first_interval_is_counted_apart() -> None:
    rates = np.array([0.01, 1e30, 1e3, 0.01])
    evaluator = Evaluator(TINY, runs=4, seed=5, mode="eager")
    sgd = [replace(one, optimizer=replace(one.optimizer, rule="sgd", momentum=0.0)) for one in evaluator.instances()]
    evaluator.instances()[:] = sgd
    found = evaluator.play(
        load_policy("constant"), Conditions(guard=UNGUARDED, learning_rates=rates, base_schedule="constant")
    )
    assert found.diverged.tolist() == [False, True, True, False]
    assert found.lost_early.tolist() == [False, True, False, False]
    assert found.inner_steps[1] == 5 < found.inner_steps[2]
    assert (found.final_loss[1:3] == cap()).all() and (found.curve[1] == cap()).all()
    assert found.best_loss[1] == cap()
    assert found.rollbacks.tolist() == [0, 0, 0, 0]
    assert (found.learning_rates == rates).all()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_ruined_by_its_very_last_step_has_diverged(steps: int) -> None:
    """Loss, gradient, update and weights are finite numbers; only the square of a prediction is not."""
    evaluator = Evaluator(TINY.replace(interval=1), runs=1, mode="eager")
    adam = OptimizerSettings(rule="adam", lr=8e18)
    evaluator.instances()[:] = [
        replace(one, steps=steps, optimizer=adam, schedule=BaseSchedule()) for one in evaluator.instances()
    ]
    found = evaluator.play(Spy((1e-22, 1.0)[-steps:]), Conditions(guard=UNGUARDED))
    assert found.diverged.all() and found.lost_early.all() == (steps == 1) and found.inner_steps[0] == steps
    assert found.final_loss[0] == found.final_validation_loss[0] == cap()
    assert (found.best_loss[0] < cap()) == (steps == 2)


def test_the_guard_rescues_and_is_counted() -> None:
    rates = {"sgd": 1e3, "adaptive": 0.01}
    lost, saved = (play(guard=guard, learning_rates=rates, runs=8) for guard in (UNGUARDED, None))
    assert lost.diverged.any() and not saved.diverged.any()
    assert (saved.rollbacks[lost.diverged] > 0).all() and (lost.rollbacks == 0).all()
    assert (saved.final_loss <= cap()).all()


@pytest.mark.parametrize("policy", ["constant", "greedy", "random"])
def test_results_are_never_nan(policy: str) -> None:
    rates = np.geomspace(1e-4, 1e35, 12)
    found = play(policy, runs=12, learning_rates=rates, guard=UNGUARDED)
    for name, values in {**found.columns(), "curve": found.curve}.items():
        assert name in found.measures or np.isfinite(values).all(), name
    assert found.diverged.any() and (found.final_loss[found.diverged] == cap()).all()
    assert (found.curve <= cap()).all() and (found.decisions >= 1).all()
    assert not (found.lost_early & ~found.diverged).any()


# --- what a policy sees -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "validation", "progress"),
    [("none", 1, 1), ("validation", 0, 1), ("progress", 1, 0), ("both", 0, 0)],
)
def test_nothing_is_hidden_unless_asked_for(missing: str, validation: int, progress: int) -> None:
    spy = Spy()
    found = play(spy, runs=4, missing=missing)
    assert len(spy.seen) == found.curve.shape[1]
    first, later = spy.seen[0], np.stack(spy.seen[1:])
    assert (first[:, :2] == 0).all()  # nothing has been measured before the first step
    assert (later[:, :, 0] == 1).all() and (later[:, :, 1] == validation).all()
    assert (np.stack(spy.seen)[:, :, 2] == progress).all()
    assert (later[:, :, 3].max() > 0) == bool(progress)
    assert np.isfinite(found.final_validation_loss).all()  # hidden from the policy, not from us


def test_columns_come_by_name() -> None:
    names = ("val_level", "log_lr", "progress", "loss_level")
    forth, back = Spy(signals=names), Spy(signals=names[::-1])
    play(forth), play(back)
    np.testing.assert_array_equal(np.stack(forth.seen), np.stack(back.seen)[:, :, ::-1])


def test_a_policy_may_govern_some_levers_only() -> None:
    momentum = Spy((0.5,) * 8, levers={"momentum": "targets"}, signals=("momentum_position", "lr_position"))
    play(momentum)
    assert (np.stack(momentum.seen)[1:, :, 0] < 0).all() and (np.stack(momentum.seen)[:, :, 1] == 0).all()


# --- conditions -------------------------------------------------------------------------------------------------


def test_learning_rates_of_each_kind_replace_the_drawn_ones() -> None:
    evaluator = Evaluator(TINY, runs=10, mode="eager")
    adaptive = evaluator.adaptive()
    assert adaptive.any() and not adaptive.all()
    found = evaluator.play(load_policy("constant"), Conditions(learning_rates={"sgd": 0.02, "adaptive": 0.03}))
    assert found.learning_rates.tolist() == np.where(adaptive, 0.03, 0.02).tolist()
    drawn = evaluator.play(load_policy("constant"))
    assert drawn.learning_rates.tolist() == [one.optimizer.lr for one in evaluator.instances()]


def test_a_constant_base_leaves_the_schedule_to_the_policy() -> None:
    own, flat = (play(learning_rates=FLAT, base_schedule=kind, runs=10) for kind in ("own", "constant"))
    scheduled = np.array(
        [one.schedule.kind != "constant" for one in Evaluator(TINY, runs=10, mode="eager").instances()]
    )
    assert ((own.final_loss != flat.final_loss) == scheduled).all() and 0 < scheduled.sum() < 10


def test_a_scenario_may_be_a_file(tmp_path: Any) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.to_yaml())
    assert_same_runs(play(scenario=path), play(), rtol=0)


def test_random_moves_the_levers_that_there_are() -> None:
    assert np.isfinite(play("random").final_loss).all()
    with pytest.raises(MismatchError, match="moves weight_decay, grad_clip"):
        play(load_policy("random"))


@dataclass
class Failing(Spy):
    """Fails in its second decision."""

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        if state["decision"].max() > 0:
            raise KeyError("inside")
        return super().act(observations, state)


def test_a_policy_that_fails_is_named_and_its_error_is_kept() -> None:
    with pytest.raises(UserError, match="policy 'spy' failed in a decision: KeyError: 'inside'") as caught:
        play(Failing())
    assert isinstance(caught.value.__cause__, KeyError)


# --- bad input --------------------------------------------------------------------------------------------------

BAD = {
    "policy": ({"policy": "cosin"}, UnknownNameError, "did you mean 'cosine'"),
    "scenario": ({"scenario": "digits-mpl"}, UnknownNameError, "did you mean 'digits-mlp'"),
    "file": ({"scenario": "none.yaml"}, ConfigError, "none.yaml"),
    "runs": ({"runs": 0}, RangeError, "runs is 0"),
    "half a run": ({"runs": 1.5}, RangeError, "runs is 1.5; it must be a whole number"),
    "no policy": ({"policy": 7}, MismatchError, "the policy is not a policy: it has no name"),
    "class": ({"policy": Spy}, MismatchError, "is not a policy"),
    "mode": ({"mode": "fast"}, UnknownNameError, "unknown mode 'fast'.*allowed: auto, compile, eager"),
    "device": ({"device": "tpu"}, UnknownNameError, "unknown device 'tpu'; did you mean 'cpu'"),
    "seed": ({"seed": -1}, RangeError, "seed is -1"),
    "batch": ({"batch_of_runs": 0}, RangeError, "batch_of_runs is 0"),
    "missing": ({"missing": "all"}, UnknownNameError, "'all'.*allowed: none, validation, progress, both"),
    "base": ({"base_schedule": "cosine"}, UnknownNameError, "'cosine'.*allowed: own, constant"),
    "kinds": ({"learning_rates": {"sgd": 1.0}}, MismatchError, "'sgd' and 'adaptive'"),
    "shape": ({"learning_rates": np.ones(3)}, MismatchError, "one for each of 6 runs"),
    "sign": ({"learning_rates": {"sgd": 1.0, "adaptive": -2.0}}, RangeError, "-2.0"),
    "NaN": ({"learning_rates": np.full(6, np.nan)}, RangeError, "nan"),
    "lever": ({"policy": Spy(levers={"weight_decay": "moves"})}, MismatchError, "weight_decay.*lr, momentum"),
    "signal": ({"policy": Spy(signals=("grad_clip_position",))}, MismatchError, "grad_clip_position"),
    "no such signal": ({"policy": Spy(signals=("astrology",))}, MismatchError, "astrology"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case: str) -> None:
    options, error, words = BAD[case]
    with pytest.raises(error, match=words):
        play(**options)


def test_a_learned_policy_is_judged_within_its_ranges_as_it_is_deployed() -> None:
    evaluator = Evaluator(SCENARIOS["digits-mlp"], runs=4, mode="eager")
    policy = load_policy("default")
    assert isinstance(policy, LearnedPolicy)
    elsewhere = replace(policy, obs_low=policy.obs_low * 0 + 5, obs_high=policy.obs_high * 0 + 6)
    still, moving, mute = (evaluator.play(one) for one in (load_policy("constant"), policy, elsewhere))
    np.testing.assert_allclose(mute.final_loss, still.final_loss, atol=1e-4)
    assert (np.abs(moving.final_loss - still.final_loss) > 0.01).any()
