"""Every disturbance: seeded, limited to its run and its window, and doing what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inner_training.problems import family, plain_module, plain_optimizer
from trimtab.errors import UserError
from trimtab.inner_training.disturbances import DISTURBANCES, DisturbanceSettings, Disturber, Event, draw_events
from trimtab.inner_training.faults import FaultRows, Faults, disturb_examples
from trimtab.inner_training.population import Population
from trimtab.inner_training.task import Instance, OptimizerSettings

Settings = DisturbanceSettings
ADAM = OptimizerSettings(rule="adam", lr=3e-3, weight_decay=1e-3)
OF_DATA = ("label-noise", "corrupted-batches", "data-shift")
ALL = [Settings(kind=kind, rate=1.0) for kind in DISTURBANCES]


def population(instances: Sequence[Instance], *settings: DisturbanceSettings, **options: Any) -> Population:
    made = Population(family(), len(instances), mode="eager", disturbances=settings, **options)
    made.reset(range(len(instances)), instances)
    return made


def parameters(runs: Population, run: int = 0) -> torch.Tensor:
    return torch.cat([value.flatten() for value in runs.parameters_of(run).values()])


def event(kind: str, **changes: Any) -> DisturbanceSettings:
    """Ten steps from step 20 on."""
    return Settings(**{"kind": kind, "at": 20, "steps": 10, **changes})


# --- schedules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTURBANCES)
@given(seed=st.integers(0, 2**31 - 1), budget=st.integers(10, 5000), rate=st.floats(0.1, 5))
def test_random_events_are_seeded_and_within_their_ranges(kind: str, seed: int, budget: int, rate: float) -> None:
    settings = [Settings(kind=kind, rate=rate)]
    events = draw_events(settings, seed, budget)
    assert events == draw_events(settings, seed, budget)
    table = DISTURBANCES[kind]
    for one in events:
        assert one.kind == kind
        assert 0 <= one.first < budget
        assert table.steps[0] <= one.steps <= table.steps[1]
        assert table.severity[0] <= one.severity <= table.severity[1]
    assert [one.first for one in events] == sorted(one.first for one in events)


@pytest.mark.parametrize("kind", DISTURBANCES)
def test_the_rate_is_the_expected_number_and_seeds_differ(kind: str) -> None:
    drawn = [draw_events([Settings(kind=kind, rate=2.0)], seed, 1000) for seed in range(400)]
    assert np.mean([len(events) for events in drawn]) == pytest.approx(2.0, abs=0.3)
    assert len(set(drawn)) > 300
    assert np.mean([one.first for events in drawn for one in events]) == pytest.approx(500, abs=50)


@pytest.mark.parametrize("kind", DISTURBANCES)
def test_an_entry_changes_none_of_the_others(kind: str) -> None:
    alone = draw_events([Settings(kind=kind, rate=3.0)], 7, 500)
    among = draw_events([Settings(kind=kind, rate=3.0), *ALL], 7, 500)
    assert set(alone) <= set(among)


def test_scheduled_events_begin_where_they_are_told_to() -> None:
    settings = [event("lost-steps"), event("lr-spike", at=0.25, steps=3, severity=7.0)]
    assert draw_events(settings, 1, 50) == (Event("lr-spike", 12, 3, 7.0), Event("lost-steps", 20, 10, 1.0))


@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=4), cut=st.integers(1, 29), seed=st.integers(0, 1000))
def test_faults_of_an_interval_are_those_of_its_parts_and_of_each_run_alone(
    counts: list[int], cut: int, seed: int
) -> None:
    instances = [family().instance(seed + run, steps=60) for run in range(len(counts))]
    disturber = Disturber(ALL, len(counts))
    disturber.write(range(len(counts)), instances)
    done = np.array(counts)
    whole, first, second = disturber(done, 30), disturber(done, cut), disturber(done + cut, 30 - cut)
    for one, parts in zip(whole, zip(first, second, strict=True), strict=True):
        np.testing.assert_array_equal(one, np.concatenate(parts))
    for run, instance in enumerate(instances):
        alone = Disturber(ALL, 1)
        alone.write([0], [instance])
        for one, other in zip(whole, alone(done[run : run + 1], 30), strict=True):
            np.testing.assert_array_equal(one[:, run], other[:, 0])
    active = disturber.active_steps(done + 30, 30)
    for run in range(len(counts)):
        for kind, steps in active.items():
            inside = {
                step
                for one in disturber.events[run]
                if one.kind == kind
                for step in range(max(one.first, counts[run]), min(one.first + one.steps, counts[run] + 30))
            }
            assert steps[run] == len(inside), kind


def test_an_event_without_severity_is_never_active() -> None:
    disturber = Disturber([event("label-noise", severity=0.0), event("data-shift", severity=0.5)], 1)
    disturber.write([0], [family().instance(0, steps=60)])
    active = disturber.active_steps(np.array([60]), 60)
    assert {kind: steps.tolist() for kind, steps in active.items()} == {"label-noise": [0], "data-shift": [10]}


@given(share=st.integers(0, 99))
def test_a_share_of_the_budget_is_that_many_steps(share: int) -> None:
    assert draw_events([event("lost-steps", at=share / 100)], 0, 100)[0].first == share


def test_the_worst_of_overlapping_events_acts() -> None:
    disturber = Disturber([event("lr-spike", severity=3.0), event("lr-spike", at=25, severity=2.0)], 1)
    disturber.write([0], [family().instance(0)])
    assert (
        disturber(np.zeros(1, dtype=np.int64), 40).lr[:, 0].tolist() == [1.0] * 20 + [3.0] * 10 + [2.0] * 5 + [1.0] * 5
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "lr-spik", "at": 0}, "unknown disturbance 'lr-spik'; did you mean 'lr-spike'"),
        ({"kind": "lr-spike"}, "has neither of at and rate"),
        ({"kind": "lr-spike", "at": 3, "rate": 1.0}, "has both of at and rate"),
        ({"kind": "lr-spike", "at": 1.5}, "at is 1.5; give a share of the budget, from 0 to below 1"),
        ({"kind": "lr-spike", "at": -1}, "at is -1; give a share of the budget"),
        ({"kind": "lr-spike", "rate": 0.0}, "rate of disturbance 'lr-spike' is 0; it must be above 0 and at most 1000"),
        ({"kind": "lr-spike", "at": 0, "steps": 0}, "steps of disturbance 'lr-spike' is 0"),
        ({"kind": "lr-spike", "at": 2**63}, "at is 9.22337e\\+18; .* at most 1000000000"),
        ({"kind": "lr-spike", "at": 0, "steps": 10**30}, "steps of disturbance 'lr-spike' .* between 1 and 1000000000"),
        ({"kind": "lr-spike", "at": 0, "steps": 2.5}, "steps .* is 2.5; it must be a whole number"),
        ({"kind": "label-noise", "at": 0, "severity": 1.5}, "severity of disturbance 'label-noise' is 1.5"),
        ({"kind": "nan-gradient", "at": 0, "severity": 2.0}, "'nan-gradient' has no severity, but it is 2"),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**values)


# --- in a population ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTURBANCES)
def test_a_disturbed_run_differs_in_its_window_and_leaves_its_neighbours_bit_for_bit(kind: str) -> None:
    # Random events hit some runs and spare others; the spared ones must be those of a population without disturbances.
    instances = [family().instance(seed, ADAM, steps=40) for seed in range(10)]
    runs, calm = population(instances, Settings(kind=kind, rate=0.7)), population(instances)
    assert runs.disturber is not None
    events = runs.disturber.events
    assert any(events) and not all(events)
    losses, expected = runs.advance(40).losses, calm.advance(40).losses
    for run, own in enumerate(events):
        begin = min((one.first for one in own), default=40)
        same = begin if kind in OF_DATA else begin + 1  # the loss of a step is that before its update
        assert torch.equal(losses[:same, run], expected[:same, run])
        if kind in OF_DATA and own:
            assert losses[begin, run] != expected[begin, run]
        changed = not torch.equal(parameters(runs, run), parameters(calm, run))
        assert changed == (bool(own) and kind != "slow-steps"), run
        assert (runs.clock[run] > 40) == (bool(own) and kind == "slow-steps")


def test_the_same_seed_meets_the_same_faults_wherever_it_runs() -> None:
    instances = [family().instance(seed, ADAM) for seed in range(3)]
    together = population(instances, *ALL)
    losses = together.advance(60).losses
    together.reset([1], [instances[1]])
    again = torch.cat([together.advance(25).losses, together.advance(35).losses])
    assert torch.equal(again[:, 1].nan_to_num(-1), losses[:, 1].nan_to_num(-1))
    alone = population([replace(instances[1])], *ALL).advance(60).losses
    torch.testing.assert_close(alone[:, 0], losses[:, 1], equal_nan=True, atol=1e-4, rtol=1e-4)


def test_a_learning_rate_spike_is_a_multiplied_rate() -> None:
    instance = family().instance(3, ADAM)
    runs, by_hand = population([instance], event("lr-spike", severity=5.0)), population([instance])
    losses = runs.advance(40).losses
    parts = [by_hand.advance(20).losses]
    by_hand.set_lr_multiplier(np.array([5.0]))
    parts.append(by_hand.advance(10).losses)
    by_hand.set_lr_multiplier(np.ones(1))
    parts.append(by_hand.advance(10).losses)
    assert torch.equal(losses, torch.cat(parts))


@pytest.mark.parametrize(("kind", "value"), [("nan-gradient", np.nan), ("inf-gradient", np.inf)])
def test_a_gradient_that_is_no_number_is_seen_and_can_be_taken_back(kind: str, value: float) -> None:
    runs = population([family().instance(1, ADAM)], event(kind, at=29, steps=1))
    for _ in range(2):
        runs.advance(10)
        runs.snapshot(np.ones(1, dtype=bool))
    kept = parameters(runs)
    measured = runs.advance(10).to_host()
    np.testing.assert_array_equal(measured.grad_norm[-1], [value])
    assert np.isfinite(measured.grad_norm[0]).all() and np.isfinite(measured.losses).all()
    assert not parameters(runs).isfinite().any()
    runs.restore(np.ones(1, dtype=bool))
    assert not torch.equal(parameters(runs), kept), "the moment before the last stable one"
    assert np.isfinite(runs.advance(20).to_host().losses).all()


@pytest.mark.parametrize(("severity", "held"), [(1.0, ["first"]), (2.0, ["first"]), (3.0, ["first", "second"])])
def test_frozen_layers_do_not_move_and_the_others_do(severity: float, held: list[str]) -> None:
    runs = population([family().instance(1, ADAM)], event("frozen-layers", severity=severity))
    runs.advance(20)
    before = runs.parameters_of(0)
    runs.advance(10)
    after = runs.parameters_of(0)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (name.split(".")[0] in held), name
    runs.advance(1)
    assert not torch.equal(runs.parameters_of(0)["first.weight"], before["first.weight"])


def test_lost_steps_leave_parameters_moments_and_count() -> None:
    instance = family().instance(4, ADAM)
    runs = population([instance], event("lost-steps"))
    runs.advance(20)
    before = runs._learner
    runs.advance(10)
    for old, new in zip(before, runs._learner, strict=True):
        assert torch.equal(old, new)
    assert runs.steps_done.tolist() == [30] and runs.clock.tolist() == [30.0]
    runs.advance(30)
    assert runs._learner.updates.tolist() == [50]
    # The same run as a plain loop that skips those batches.
    module = plain_module(instance)
    optimizer = plain_optimizer(module, ADAM)
    for step in (*range(20), *range(30, 60)):
        x, y = runs.batch(0, step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(runs.parameters_of(0)[name], parameter.detach(), atol=1e-4, rtol=1e-3)


def test_slow_steps_move_the_clock_and_nothing_else() -> None:
    instance = family().instance(1)
    runs, calm = population([instance], event("slow-steps", severity=2.5)), population([instance])
    assert torch.equal(runs.advance(25).losses, calm.advance(25).losses)
    assert runs.clock.tolist() == [20 + 5 * 2.5] and calm.clock.tolist() == [25.0]
    runs.advance(25), runs.reset([0], [instance])
    assert runs.clock.tolist() == [0.0]


def faults(**values: float) -> Faults:
    rows = FaultRows.calm(1, 1)
    for name, value in values.items():
        rows.column(name)[...] = value
    return Faults(*torch.from_numpy(rows.faults[0]).unbind(1))


def disturbed(x: torch.Tensor, y: torch.Tensor, **values: float) -> tuple[torch.Tensor, torch.Tensor]:
    seed, step = torch.tensor([5]), torch.tensor([9])
    return disturb_examples(x[None], y[None], faults(**values), seed, step)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_label_noise_takes_labels_of_the_same_batch(share: float) -> None:
    x, y = torch.zeros(2000, 2), torch.arange(2000)
    _, labels = disturbed(x, y, label_share=share)
    wrong = labels[0] != y
    assert wrong.float().mean().item() == pytest.approx(share, abs=0.05)
    assert set(labels[0].tolist()) <= set(y.tolist())


def test_corrupted_batches_have_noise_of_the_given_deviation() -> None:
    x, y = torch.linspace(0, 1, 3000).view(1000, 3), torch.zeros(1000, dtype=torch.int64)
    noise = disturbed(x, y, input_noise=0.5)[0][0] - x
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.abs().max() <= 0.5 * 3**0.5 + 1e-6


def test_corrupted_whole_numbers_are_exchanged_within_the_batch() -> None:
    x, y = torch.arange(3000).view(1000, 3), torch.zeros(1000, dtype=torch.int64)
    found = disturbed(x, y, input_noise=0.4, input_shift=3.0, input_gain=2.0)[0][0]
    assert found.dtype == torch.int64
    assert (found != x).float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert set(found.flatten().tolist()) <= set(range(3000))
    padded = torch.tensor([[0], [1], [2], [3], [3], [3], [3], [3]])  # a batch of four in eight slots
    found = disturbed(padded, padded[:, 0], input_noise=1.0, label_share=1.0)
    assert found[0][0, :4, 0].tolist() == [3, 3, 0, 1]
    assert found[1][0, :4].tolist() == [3, 0, 1, 2]


def test_a_data_shift_is_a_gain_and_an_offset() -> None:
    x, y = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(10, dtype=torch.int64)
    disturber = Disturber([event("data-shift", severity=0.5)], 1)
    disturber.write([0], [family().instance(0)])
    row = disturber(np.array([25]), 1).faults[0]
    found, labels = disturb_examples(x[None], y[None], Faults(*torch.from_numpy(row).unbind(1)), y[:1], y[:1])
    torch.testing.assert_close(found[0], 1.5 * x + 0.5)
    assert torch.equal(labels[0], y)


@pytest.mark.slow
def test_disturbed_and_compiled_equals_eager() -> None:
    calm = [one for one in ALL if one.kind not in ("nan-gradient", "inf-gradient")]
    instances = [family().instance(seed, ADAM) for seed in range(4)]
    fast = Population(family(), 4, mode="compile", disturbances=calm)
    assert fast.mode == "compile"
    fast.reset(range(4), instances)
    slow = population(instances, *calm)
    np.testing.assert_allclose(fast.advance(50).to_host().losses, slow.advance(50).to_host().losses, atol=1e-3)
