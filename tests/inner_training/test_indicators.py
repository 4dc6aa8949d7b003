"""Signals that judge a run: numbers worked out by hand, made-up runs of a known kind, and real ones with known noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from tests.inner_training.test_signals import look, reading
from trimtab.inner_training.indicators import HORIZON, follow_jump
from trimtab.inner_training.population import Population
from trimtab.inner_training.reading import Memory, Reading
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.signals import all_signals, observe, resolve_signals
from trimtab.inner_training.task import OptimizerSettings
from trimtab.inner_training.tasks import make_family
from trimtab.inner_training.tasks.recipe import noisy_labels
from trimtab.inner_training.telemetry import Measured

INTERVAL = 10


def stream(levels: np.ndarray, seed: int = 0, noise: float = 0.1, **fields: object) -> list[Reading]:
    """One run's readings whose ln loss follows ``levels`` (decisions,) with noise on every step."""
    rng = np.random.default_rng(seed)
    return [
        reading(np.exp(level + rng.normal(0, noise, (INTERVAL, 1))), step=(number + 1) * INTERVAL, **fields)  # type: ignore[arg-type]
        for number, level in enumerate(levels)
    ]


def course(name: str, readings: list[Reading]) -> np.ndarray:
    """The signal (decisions, N) after each reading."""
    memory, seen = Memory(readings[0].num_runs), []
    for one in readings:
        memory.begin()
        seen.append(observe(resolve_signals([name]), one, memory)[:, 0])
    return np.array(seen)


FLAT = np.zeros(30)
FALL = np.linspace(0, -3, 30)
STEP = np.where(np.arange(30) < 15, 0.0, 1.0)
BUMP = np.where((np.arange(30) >= 15) & (np.arange(30) < 17), 1.0, 0.0)


@pytest.mark.parametrize("name", ["shift", "shift_window"])
def test_a_shift_is_a_jump_of_the_loss_and_nothing_else(name: str) -> None:
    assert course(name, stream(STEP))[15:19].max() == 1
    assert course(name, stream(STEP))[:15].max() < 0.5
    for calm in (FLAT, FALL, -STEP):
        assert course(name, stream(calm)).max() < 0.5


def test_a_shift_of_the_validation_loss_is_held_between_validations() -> None:
    values = np.exp(np.where(np.arange(24) < 12, 0.0, 0.8) + 0.02 * np.sin(np.arange(24.0)))
    given = [reading(np.ones((3, 1)), val=value if number % 2 == 0 else np.nan) for number, value in enumerate(values)]
    seen = course("val_shift", given)[:, 0]
    assert seen[:12].max() < 0.2
    assert seen[12:16].max() == 1
    np.testing.assert_array_equal(seen[1::2], seen[::2])
    assert course("val_shift", [reading(np.ones((3, 1)))] * 5).max() == 0


def test_a_change_that_stays_is_told_from_one_that_passes() -> None:
    stays, passes = course("persistence", stream(STEP))[:, 0], course("persistence", stream(BUMP))[:, 0]
    assert stays[19:23].min() > 0.3
    assert passes[20:23].max() < -0.3
    for calm in (FLAT, FALL):
        assert np.abs(course("persistence", stream(calm))).max() == 0
    assert np.abs(stays[15:17]).max() < 0.6, "it is too early to say"


def test_a_jump_is_followed_from_its_top_until_the_horizon() -> None:
    state, levels = np.zeros((1, 3)), [0.0, 1.0, 2.0, 2.1, 1.0, 0.5]
    seen = []
    for level in levels:
        state, value = follow_jump(state, np.array([level]), np.zeros(1), np.array([level > 0.5]))
        seen.append(value[0])
    shares = np.array([1, 1, 1, 1, 0.5, 0.25])  # of the top, 2; a little above it is still the top
    ages = np.array([0, 0, 0, 1, 2, 3])
    np.testing.assert_allclose(seen, (2 * shares - 1) * (1 - 0.5**ages) * 0.9**ages * (ages > 0))
    for _ in range(HORIZON):
        state, value = follow_jump(state, np.zeros(1), np.zeros(1), np.zeros(1))
    assert value[0] == 0
    assert (state == 0).all()


def test_a_jump_waits_while_nothing_is_seen() -> None:
    state = np.array([[0.0, 2.0, 4.0]])
    after, value = follow_jump(state, np.array([np.nan]), np.array([np.nan]), np.zeros(1))
    np.testing.assert_array_equal(after, state)
    assert value[0] == 0


def fit(train: np.ndarray, val: np.ndarray) -> dict[str, float]:
    given = [reading(np.exp(np.full((5, 1), a)), val=float(np.exp(b))) for a, b in zip(train, val, strict=True)]
    return {name: float(course(name, given)[-1, 0]) for name in ("underfitting", "overfitting", "noisy_data")}


def test_fit_is_judged_on_textbook_curves() -> None:
    stuck = fit(FLAT, FLAT)
    learning = fit(FALL, FALL)
    memorising = fit(FALL, np.abs(np.linspace(-2, 1, 30)) - 2)
    diverging = fit(STEP, STEP)
    assert stuck["underfitting"] > 0.95
    assert max(learning["underfitting"], memorising["underfitting"]) < 0.1
    assert memorising["overfitting"] > 0.9
    assert max(one["overfitting"] for one in (stuck, learning, diverging)) < 0.1


def test_noise_shows_as_a_loss_that_stops_half_way_among_noisy_gradients() -> None:
    half_way = np.maximum(FALL, -0.7)

    def seen(levels: np.ndarray, dot: float, val: float = np.nan) -> float:
        return float(course("noisy_data", stream(levels, grad_dot=np.full(1, dot), val=val))[-1, 0])

    assert seen(half_way, 0.0) > 0.8
    assert seen(half_way, 0.9) < 0.2, "the gradients agree: it could still learn"
    assert seen(FLAT, 0.0) < 0.2, "nothing was learned: the rate may be too small"
    assert seen(3 * FALL, 0.0) < 0.2, "nearly everything was learned"
    assert seen(3 * FALL, 0.0, val=float(np.exp(-12))) > 0.8, "validation is better than training: its labels are"


def test_noisy_data_ranks_runs_by_their_label_noise() -> None:
    family, rng = make_family("digits-mlp"), np.random.default_rng(0)
    noise = np.repeat([0.0, 0.15, 0.3, 0.6], 8)
    instances = []
    for number, share in enumerate(noise):
        drawn = next(
            one
            for seed in range(number * 50, number * 50 + 50)
            if (one := family.draw(seed, held_out=False)).traits["label_noise"] == 0 and one.traits["classes"] > 5
        )
        labels = drawn.labels.copy()
        train = drawn.split("train")
        labels[train] = noisy_labels(rng, labels[train], drawn.traits["classes"], share)
        settings = OptimizerSettings(rule="sgd", lr=0.05, momentum=0.9)
        instances.append(
            replace(drawn, labels=labels, optimizer=settings, schedule=BaseSchedule(), batch_size=32, steps=300)
        )
    population = Population(family, len(noise), mode="eager", clip=False)
    population.reset(range(len(noise)), instances)
    memory, signals = Memory(len(noise)), resolve_signals(["noisy_data"])
    for _ in range(15):
        measured = population.advance(INTERVAL).to_host()
        memory.begin()
        seen = observe(signals, population.reading(measured, np.full(len(noise), np.nan)), memory)[:, 0]
    assert spearmanr(seen, noise).statistic > 0.7


def test_the_noise_scale_is_that_of_the_gradients() -> None:
    rng = np.random.default_rng(0)
    size, batch, spread = 400, 16, 3.0
    mean = rng.normal(0, 0.2, size)
    given = []
    for _ in range(80):
        one, two = (mean + rng.normal(0, spread / np.sqrt(batch), size) for _ in range(2))
        norms = np.array([[np.linalg.norm(one)], [np.linalg.norm(two)]])
        given.append(reading(np.ones((3, 1)), grad_norm=norms, grad_dot=np.array([one @ two])))
    true = np.log10(size * spread**2 / (batch * mean @ mean))
    assert 2 * np.arctanh(course("grad_noise_scale", given)[-20:]).mean() == pytest.approx(true, abs=0.15)
    lost = reading(np.ones((3, 1)), grad_norm=np.ones((2, 1)), grad_dot=np.array([-0.1]))
    assert look("grad_noise_scale", lost)[0] == 1
    assert look("grad_noise_scale", reading(np.ones((3, 1)), grad_dot=np.array([np.nan])))[0] == 0


@pytest.mark.parametrize(
    ("curvature", "momentum", "margin"),
    [
        (10.0, 0.0, 1.0),
        (20.0, 0.0, 0.0),
        (28.284271, 0.0, -0.5),
        (38.0, 0.9, 0.0),
        (20 / 2**12, 0.0, 12.0),
        (np.nan, 0.0, 0.0),
    ],
)
def test_the_stability_margin_is_in_octaves_below_the_stable_rate(
    curvature: float, momentum: float, margin: float
) -> None:
    seen = reading(np.ones((3, 1)), probed={"curvature": np.array([curvature])})  # the rate is 0.1
    seen.base = {**seen.base, "momentum": np.full(1, momentum)}
    assert look("stability_margin", seen)[0] == pytest.approx(np.tanh(margin / 8), abs=1e-6)
    seen.adaptive = np.ones(1)
    assert look("stability_margin", seen)[0] == 0


def test_a_loss_that_curves_down_leaves_all_the_margin_there_is() -> None:
    seen = reading(np.ones((3, 1)), probed={"curvature": np.full(1, -5.0)})
    assert look("stability_margin", seen)[0] > 0.99


def test_time_left_is_a_share_of_the_time_allowed() -> None:
    seen = reading(np.ones((3, 2)))
    assert look("deadline_left", seen).tolist() == look("deadline_available", seen).tolist() == [0, 0]
    seen.clock, seen.deadline = np.array([15.0, 90.0]), np.array([60.0, 60.0])
    assert look("deadline_left", seen).tolist() == [0.75, 0]
    assert look("deadline_available", seen).tolist() == [1, 1]


def noisy_readings(runs: int, decisions: int) -> list[Reading]:
    """Readings of every kind of measurement, different in each run, with a shift in the middle."""
    rng = np.random.default_rng(7)
    made = []
    for number in range(decisions):
        losses = np.exp(rng.normal(2.0 * (number > decisions / 2), 0.1, (INTERVAL, runs)))
        one = reading(
            losses,
            val=float(np.exp(rng.normal(number > decisions / 2))),
            total=1000,
            step=number * INTERVAL,
            grad_norm=rng.uniform(1, 2, (2, runs)),
            grad_dot=rng.uniform(-1, 1, runs),
            probed={"curvature": rng.uniform(0, 40, runs)},
        )
        one.clock, one.deadline = np.full(runs, 1.0 * number), np.full(runs, 100.0)
        one.energy = rng.uniform(1, 2, runs)
        made.append(one)
    return made


def test_a_reset_forgets_one_run_and_saving_keeps_all() -> None:
    signals, given = tuple(all_signals().values()), noisy_readings(2, 24)
    first, second, restored = Memory(2), Memory(2), Memory(2)
    seen = {"reset": first, "fresh": second, "kept": Memory(2)}
    for one in given[:14]:
        for memory in (first, seen["kept"]):
            memory.begin()
            observe(signals, one, memory)
    first.reset(np.array([True, False]))
    restored.load_state_dict(first.state_dict())
    seen["restored"] = restored
    for one in given[14:]:
        values = {}
        for name, memory in seen.items():
            memory.begin()
            values[name] = observe(signals, one, memory)
        np.testing.assert_array_equal(values["reset"][0], values["fresh"][0])
        np.testing.assert_array_equal(values["reset"][1], values["kept"][1])
        np.testing.assert_array_equal(values["restored"], values["reset"])
    assert (values["fresh"] != values["kept"]).any(1).all(), "there was something to forget"


def test_a_shift_is_seen_alike_alone_and_among_others() -> None:
    signals, given = tuple(all_signals().values()), noisy_readings(3, 24)
    together, alone = Memory(3), Memory(1)
    for one in given:
        together.begin(), alone.begin()
        narrow = replace(
            reading(one.losses()[:, 1:2]),
            **{
                name: getattr(one, name)[1:2]
                for name in ("step", "total_steps", "val_loss", "clock", "deadline", "energy")
            },
            measured=Measured(
                **{
                    name: getattr(one.measured, name)[..., 1:2]
                    for name in ("losses", "grad_norm", "grad_dot", "update_norm", "weight_norm")
                },
                probed={"curvature": one.probed("curvature")[1:2]},
            ),
        )
        np.testing.assert_allclose(observe(signals, one, together)[1], observe(signals, narrow, alone)[0], atol=1e-6)
