"""Tasks that change while a run trains: which examples a step takes, what an evaluation is of, what starts afresh."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call

from tests.inner_training.problems import family as plain_family
from trimtab.errors import RangeError, UserError
from trimtab.inner_training.population import Population
from trimtab.inner_training.task import Instance, Phase
from trimtab.inner_training.tasks import make_family

NAMES = ("class-pairs", "class-incremental-digits", "changing-regression")


def started(name: str, seeds: tuple[int, ...] = (3, 4)) -> tuple[Population, list[Instance]]:
    family = make_family(name)
    instances = [family.draw(seed, held_out=False) for seed in seeds]
    made = Population(family, len(seeds), mode="eager", score=bool(family.score_name))
    made.reset(range(len(seeds)), instances)
    return made, instances


def phase_at(instance: Instance, step: int) -> int:
    return sum(step >= phase.first_step for phase in instance.all_phases) - 1


@pytest.mark.parametrize("name", NAMES)
def test_a_step_takes_its_batch_from_its_phase(name: str) -> None:
    made, instances = started(name)
    for run, instance in enumerate(instances):
        for step in (0, instance.phases[1].first_step - 1, instance.phases[1].first_step, instance.steps - 1):
            rows = instance.rows[instance.split("train", phase_at(instance, step))]
            inputs = make_family(name).inputs[rows]
            scale = instance.input_scale if inputs.is_floating_point() else 1
            batch, _ = made.batch(run, step)
            assert all((example == inputs * scale).flatten(1).all(1).any() for example in batch)


def test_a_phase_is_walked_through_before_an_example_comes_again() -> None:
    made, (instance, _) = started("permuted-digits")
    size, batch, first = instance.phases[2].sizes[0], instance.batch_size, instance.phases[2].first_step
    steps = min(size // batch, 50)
    taken = torch.cat([made.batch(0, first + step)[0] for step in range(steps)])
    assert len(torch.unique(taken, dim=0)) == steps * batch


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_is_of_the_phase_of_the_last_step(name: str) -> None:
    made, instances = started(name)
    family, length = make_family(name), instances[0].phases[1].first_step

    def expected(run: int, phase: int, of: str) -> float:
        instance = instances[run]
        where = instance.split("test", phase)
        x = family.inputs[instance.rows[where]]
        x = x * instance.input_scale if x.is_floating_point() else x
        buffers = {name: torch.from_numpy(np.asarray(value)) for name, value in instance.buffers.items()}
        outputs = functional_call(family.module, (made.parameters_of(run), buffers), (x,))
        return float(getattr(family, of)(outputs, torch.from_numpy(instance.labels[where])).mean())

    for steps, phase in ((length, 0), (1, 1)):
        made.advance(steps)
        assert made.evaluate("test")[0] == pytest.approx(expected(0, phase, "loss"), rel=1e-4)
        assert made.evaluate("test", phase=2)[1] == pytest.approx(expected(1, 2, "loss"), rel=1e-4)
        if family.score_name:
            assert made.evaluate("test", score=True)[0] == pytest.approx(expected(0, phase, "score"), abs=1e-6)


def test_scores_are_those_of_the_batches() -> None:
    made, _ = started("class-incremental-digits")
    family = made.family
    before = made.parameters_of(1)
    x, y = made.batch(1, 0)
    buffers = {name: torch.from_numpy(np.asarray(v)) for name, v in made.instances[1].buffers.items()}  # type: ignore[union-attr]
    accuracy = (functional_call(family.module, (before, buffers), (x,)).argmax(1) == y).float().mean()
    scores = made.advance(3).to_host().scores
    assert scores is not None and scores.shape == (3, 2)
    assert scores[0, 1] == pytest.approx(float(accuracy), abs=1e-6)


def test_named_parameters_start_every_later_phase_at_zero() -> None:
    made, instances = started("class-pairs")
    length = instances[0].phases[1].first_step
    made.advance(length)
    trained = made.parameters_of(0)
    assert trained["layers.2.weight"].abs().max() > 0
    made.set_lr_multiplier(np.zeros(2))
    made.advance(1)
    fresh = made.parameters_of(0)
    assert fresh["layers.2.weight"].abs().max() == 0 and fresh["layers.2.bias"].abs().max() == 0
    torch.testing.assert_close(fresh["layers.0.weight"], trained["layers.0.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 5])
def test_a_rollback_across_phases_does_not_bring_the_old_layer_back(steps: int) -> None:
    made, instances = started("class-pairs")
    made.advance(instances[0].phases[1].first_step)
    for _ in range(2):
        made.snapshot(np.ones(2, dtype=bool))  # the second confirms the first
    before = made.parameters_of(0)
    made.advance(steps)
    made.restore(np.array([True, True]))
    restored = made.parameters_of(0)
    assert before["layers.2.weight"].abs().max() > 0 == restored["layers.2.weight"].abs().max()
    torch.testing.assert_close(restored["layers.0.weight"], before["layers.0.weight"], rtol=0, atol=0)


def test_a_run_of_phases_does_not_depend_on_its_neighbours() -> None:
    together, instances = started("drifting-digits", (1, 2, 3))
    alone, _ = started("drifting-digits", (2,))
    for made in (together, alone):
        made.advance(instances[1].phases[1].first_step + 7)
    torch.testing.assert_close(
        together.parameters_of(1)["layers.0.weight"], alone.parameters_of(0)["layers.0.weight"], rtol=1e-4, atol=1e-5
    )


def phased(instance: Instance, *phases: Phase) -> Instance:
    return replace(instance, phases=phases)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((Phase(0, (200, 40, 59)),), "must sum to the examples"),
        ((Phase(0, (200, 40, 60)), Phase(5, (1, 1, 1))), "must sum to the examples"),
        ((Phase(3, (200, 40, 60)),), "must begin at 0"),
        ((Phase(0, (100, 20, 30)), Phase(50, (100, 20, 30))), "be at most 1"),
        ((Phase(0, (200, 0, 100)),), "every split needs an example"),
    ],
)
def test_phases_that_do_not_fit_are_refused(phases: tuple[Phase, ...], message: str) -> None:
    made = Population(plain_family(), 1, mode="eager")
    with pytest.raises(UserError, match=message):
        made.reset([0], [phased(plain_family().instance(0), *phases)])


def test_what_a_family_does_not_have_is_refused() -> None:
    made = Population(plain_family(), 1, mode="eager")
    with pytest.raises(RangeError, match="phase"):
        made.evaluate("test", phase=1)
    with pytest.raises(UserError, match="has no score"):
        made.evaluate("test", score=True)
    with pytest.raises(UserError, match="has no score"):
        Population(plain_family(), 1, mode="eager", score=True)


def test_phases_count_in_the_fingerprint() -> None:
    instance = make_family("class-pairs").draw(0, held_out=False)
    moved = replace(instance, phases=tuple(replace(one, first_step=2 * one.first_step) for one in instance.phases))
    assert instance.fingerprint() != moved.fingerprint()
