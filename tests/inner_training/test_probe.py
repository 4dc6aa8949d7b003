"""When a population takes further measurements, on what, and what signals make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.inner_training.probed import pictures, wide_tanh
from tests.inner_training.problems import family as small_family
from trimtab.errors import ConfigError, RangeError, UnknownNameError
from trimtab.inner_training.activations import EXAMPLES, FEATURE_EXAMPLES, effective_rank
from trimtab.inner_training.disturbances import DisturbanceSettings
from trimtab.inner_training.measurements import MEASUREMENTS, UNITS, needs_of
from trimtab.inner_training.population import Population
from trimtab.inner_training.reading import Memory
from trimtab.inner_training.signal import Signal
from trimtab.inner_training.signals import SIGNALS, observe, register_signal, resolve_signals
from trimtab.inner_training.task import Instance, OptimizerSettings
from trimtab.inner_training.tasks import make_family

# Forward mode, and curvlinops, import parts of torch that are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


ALL = tuple(name for name in MEASUREMENTS if name != UNITS)  # that one is taken by what edits units
SEEN = ("saturation", "dormant", "features")


def of_run(probed: Any, run: int) -> dict[str, np.ndarray]:
    return {name: value[..., run] for name, value in probed.items()}


def test_runs_are_measured_by_their_own_clock_and_alike_whatever_others_do() -> None:
    family = pictures()
    early, late = (family.draw(seed, held_out=False) for seed in (1, 2))
    together, alone = Population(family, 2, mode="eager"), Population(family, 1, mode="eager")
    together.reset([0, 1], [early, early])
    alone.reset([0], [late])
    for one in (together, alone):
        one.measure(ALL, every=3)
    seen = []
    for interval in range(7):
        if interval == 2:
            together.reset([1], [late])
        seen.append(together.advance(4).to_host().probed)
    expected = [alone.advance(4).to_host().probed for _ in range(5)]
    assert [sorted(found) for found in expected] == [sorted(ALL), [], [], sorted(ALL), []]
    due = [[bool(found) and not np.isnan(found["dormant"][run]) for found in seen] for run in (0, 1)]
    assert due == [
        [True, False, False, True, False, False, True],
        [True, False, True, False, False, True, False],
    ]
    for interval, when in ((2, 0), (5, 3)):
        for name, value in of_run(seen[interval], 1).items():
            np.testing.assert_allclose(value, expected[when][name][..., 0], rtol=1e-3, atol=1e-5, err_msg=name)


def test_nothing_is_measured_unless_it_is_wanted_and_wrong_names_are_refused() -> None:
    population = Population(small_family(), 1, mode="eager")
    population.reset([0], [small_family().instance(0)])
    assert population.advance(3).probed == {}
    with pytest.raises(UnknownNameError, match="did you mean 'dormant'"):
        population.measure(["dormnat"])
    with pytest.raises(RangeError, match="every"):
        population.measure(["dormant"], every=0)
    population.measure(["dormant"], every=1)
    assert set(population.advance(3).probed) == {"dormant"}
    population.measure([])
    assert population.advance(3).probed == {}


def test_measuring_changes_nothing() -> None:
    family = pictures()
    made, twin = (Population(family, 3, mode="eager") for _ in range(2))
    for one in (made, twin):
        one.reset(range(3), [family.draw(seed, held_out=True) for seed in range(3)])
    made.measure(ALL, every=1)
    for _ in range(3):
        made.advance(4), twin.advance(4)
    for run in range(3):
        for name, value in made.parameters_of(run).items():
            assert torch.equal(value, twin.parameters_of(run)[name])


def test_units_that_a_gate_switched_off_do_not_count() -> None:
    family = make_family("digits-mlp")
    instance = next(one for one in (family.draw(s, held_out=False) for s in range(99)) if one.traits["width"] < 30)
    width = instance.traits["width"]
    population = Population(family, 1, mode="eager")
    population.reset([0], [instance])
    population.measure(SEEN, every=1)
    probed = population.advance(1).to_host().probed
    x = population.batch(0, 0)[0][:EXAMPLES].numpy()
    weight, bias = instance.parameters["layers.0.weight"], instance.parameters["layers.0.bias"]
    hidden = np.maximum(x @ weight[:width].T + bias[:width], 0)
    size = hidden.mean(0)
    assert probed["dormant"][0] == pytest.approx((size <= 0.025 * size.mean()).mean(), abs=1e-6)
    assert probed["features"][0, 0] == min(len(x), FEATURE_EXAMPLES, width)
    assert "saturation" not in probed, "relu has no ends"


def test_a_disturbed_step_is_measured_on_what_it_was_fed() -> None:
    family = small_family()
    noisy = DisturbanceSettings(kind="label-noise", at=1, steps=50, severity=1.0)
    instance = family.instance(4, OptimizerSettings(rule="sgd", lr=0.01, momentum=0.0))
    made = Population(family, 1, mode="eager", disturbances=[noisy])
    made.reset([0], [instance])
    made.measure(("curvature", "overshoot"), every=1)
    probed = made.advance(6).to_host().probed
    # Plain gradient descent: both are the same quantity, but only if both gradients are of the same batch.
    assert probed["overshoot"][0] == pytest.approx(0.01 * probed["curvature"][0] / 2, rel=1e-3)


def test_a_step_that_changes_nothing_has_no_curvature() -> None:
    family = small_family()
    made = Population(family, 1, mode="eager", disturbances=[DisturbanceSettings(kind="lost-steps", at=1, steps=50)])
    made.reset([0], [family.instance(4)])
    made.measure(("curvature", "overshoot"), every=1)
    probed = made.advance(6).to_host().probed
    assert np.isnan(probed["curvature"][0])
    assert np.isnan(probed["overshoot"][0])


def test_a_step_that_begins_a_phase_is_measured_from_the_renewed_parameters() -> None:
    family = make_family("class-pairs")
    drawn = family.draw(1, held_out=False)
    settings_ = OptimizerSettings(rule="sgd", lr=0.01, momentum=0.0)
    instance: Instance = replace(drawn, optimizer=settings_, schedule=replace(drawn.schedule, kind="constant"))
    made = Population(family, 1, mode="eager")
    made.reset([0], [instance])
    made.measure(("overshoot", "curvature"), every=1)
    made.advance(instance.phases[1].first_step)
    probed = made.advance(1).to_host().probed
    assert probed["overshoot"][0] == pytest.approx(0.01 * probed["curvature"][0] / 2, rel=1e-3)


def test_a_signal_is_held_from_one_measurement_to_the_next() -> None:
    signals = resolve_signals(["saturation", "effective_rank", "sharpness", "stability_margin", "overshoot"])
    family = wide_tanh()
    population = Population(family, 2, mode="eager")
    population.reset([0, 1], [family.draw(seed, held_out=False) for seed in (0, 1)])
    population.measure(needs_of(signals), every=3)
    memory, rows = Memory(2), []
    for _ in range(4):
        measured = population.advance(4).to_host()
        reading = population.reading(measured, np.full(2, np.nan))
        reading.rolled_back, reading.caution = np.zeros(2, dtype=bool), np.ones(2)
        memory.begin()
        rows.append(observe(signals, reading, memory))
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[1], rows[2])
    assert (rows[3] != rows[2]).any(0)[:3].all()
    assert (rows[0] != 0).all()
    curvature, rate = measured.probed["curvature"], population.base["lr"]
    np.testing.assert_allclose(rows[3][:, 2], np.tanh(1 + np.log10(rate * curvature / 2)), atol=1e-5)
    np.testing.assert_allclose(rows[3][:, 1], 2 * effective_rank(measured.probed["features"]) - 1, atol=1e-6)


def test_needs_are_known_measurements() -> None:
    for signal in SIGNALS.values():
        assert set(signal.needs) <= set(MEASUREMENTS), signal.name
    assert set(needs_of(SIGNALS.values())) == set(MEASUREMENTS), "a measurement that no signal reads"
    odd = Signal(name="odd", group="x", doc="x", missing="", compute=lambda r, m: r.step, needs=("curvatur",))
    with pytest.raises((ConfigError, UnknownNameError), match="curvature"):
        register_signal(odd)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_has_a_row_on_the_page(name: str) -> None:
    one = MEASUREMENTS[name]
    row = f"| `{name}` | {one.doc.replace('|', chr(92) + '|')} | {one.cost} | {'yes' if one.live else 'no'} |"
    assert row in (Path(__file__).parents[2] / "docs" / "signals.md").read_text()
