"""Obligations of every signal, and the numbers of some on cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import ConfigError, UnknownNameError
from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.reading import Memory, Reading
from trimtab.inner_training.signals import Signal, all_signals, observe, register_signal, resolve_signals
from trimtab.inner_training.telemetry import Measured


def reading(
    losses: np.ndarray, *, step: float = 10, val: float = np.nan, total: float = np.nan, **sampled: object
) -> Reading:
    """A reading of as many runs as ``losses`` (K, N) has columns."""
    runs = losses.shape[1]
    ones = np.ones(runs)
    statistics = {
        "grad_norm": np.ones((2, runs)),
        "grad_dot": 0.5 * ones,
        "update_norm": 1e-3 * ones,
        "weight_norm": ones,
        **sampled,
    }
    return Reading(
        measured=Measured(losses=losses, **statistics),  # type: ignore[arg-type]
        fresh=np.zeros(runs, dtype=bool),
        step=step * ones,
        total_steps=total * ones,
        val_loss=val * ones,
        parameters=5000 * ones,
        batch_size=32 * ones,
        depth=2 * ones,
        adaptive=0 * ones,
        base={"lr": 0.1 * ones, "momentum": 0.9 * ones, "weight_decay": 0 * ones, "grad_clip": np.inf * ones},
        initial_lr=0.1 * ones,
        multipliers=dict.fromkeys(LEVERS, ones),
        moves=dict.fromkeys(LEVERS, 0 * ones),
        available={name: ones.astype(bool) for name in LEVERS},
        caution=ones,
        rollbacks_left=ones,
        rolled_back=np.zeros(runs, dtype=bool),
    )


def look(name: str, *readings: Reading) -> np.ndarray:
    """The signal's values after a sequence of readings."""
    memory = Memory(readings[0].num_runs)
    for one in readings:
        memory.begin()
        seen = observe(resolve_signals([name]), one, memory)
    return seen[:, 0]


ANY = st.one_of(st.floats(allow_nan=True, allow_infinity=True, width=64), st.floats(1e-6, 1e6))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), decisions=st.integers(1, 4), steps=st.integers(1, 5))
def test_every_signal_is_bounded_and_never_nan_whatever_it_sees(
    data: st.DataObject, decisions: int, steps: int
) -> None:
    signals = tuple(all_signals().values())
    memory = Memory(2)
    for _ in range(decisions):
        draw = data.draw
        losses = np.array(draw(st.lists(ANY, min_size=2 * steps, max_size=2 * steps))).reshape(steps, 2)
        seen = reading(
            losses,
            val=draw(ANY),
            total=draw(ANY),
            step=draw(st.floats(0, 1e9)),
            grad_norm=np.full((min(2, steps), 2), draw(ANY)),
            grad_dot=np.full(2, draw(ANY)),
            update_norm=np.full(2, draw(ANY)),
            weight_norm=np.full(2, draw(ANY)),
            probed={"curvature": np.full(2, draw(ANY))},
        )
        seen.clock, seen.deadline, seen.energy = (np.full(2, draw(ANY)) for _ in range(3))
        memory.begin()
        values = observe(signals, seen, memory)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
        assert (np.abs(values) <= 1).all()


@pytest.mark.parametrize("name", all_signals())
def test_a_run_sees_the_same_alone_and_among_others(name: str) -> None:
    rng = np.random.default_rng(0)
    together, alone = Memory(3), Memory(1)
    for decision in range(5):
        losses = np.exp(rng.normal(size=(10, 3)))
        sampled = {"grad_norm": rng.uniform(1, 2, (2, 3)), "grad_dot": rng.uniform(-1, 1, 3)}
        one = {key: value[..., 1:2] for key, value in sampled.items()}
        together.begin(), alone.begin()
        wide = observe(resolve_signals([name]), reading(losses, val=2.0 + decision, total=100, **sampled), together)
        narrow = observe(resolve_signals([name]), reading(losses[:, 1:2], val=2.0 + decision, total=100, **one), alone)
        np.testing.assert_allclose(wide[1], narrow[0], rtol=1e-5, atol=1e-6)


def test_before_the_first_interval_only_static_signals_speak() -> None:
    blank = reading(np.ones((1, 2)))
    blank.measured, blank.fresh = None, np.ones(2, dtype=bool)
    seen = {name: look(name, blank)[0] for name in all_signals()}
    assert seen["started"] == 0
    for name in ("loss_level", "grad_cosine", "update_ratio", "val_level", "spike", "oscillation", "gap"):
        assert seen[name] == 0
    assert seen["log_parameters"] == pytest.approx(np.log10(5000) / 10)


def test_progress_says_when_it_is_unknown() -> None:
    assert look("progress", reading(np.ones((5, 1)), step=30, total=120))[0] == pytest.approx(0.25)
    assert look("progress", reading(np.ones((5, 1)), step=30))[0] == 0
    assert look("progress_available", reading(np.ones((5, 1)), step=30))[0] == 0


def test_loss_level_is_the_log_ratio_to_the_first_loss() -> None:
    start = reading(np.array([[2.0], [2.0]]))
    later = reading(np.array([[1.0], [1.0]]))
    average = (0.5 * 0.5 * np.log(2.0) + 0.5 * np.log(1.0)) / 0.75
    assert look("loss_level", start, later)[0] == pytest.approx(np.tanh((average - np.log(2)) / 2), rel=1e-5)


def test_spike_rises_with_one_bad_step_and_trend_follows_the_interval() -> None:
    calm = [reading(np.full((5, 1), 1.0) * scale) for scale in (1.0, 0.99, 0.98)]
    jump = reading(np.array([[1.0], [1.0], [30.0], [1.0], [1.0]]))
    assert look("spike", *calm, jump)[0] > 0.9
    assert look("spike", *calm)[0] < 0.2
    rising = reading(np.linspace(1, 2, 6)[:, None])
    assert look("interval_trend", rising)[0] == pytest.approx(1, abs=1e-6)


def test_oscillation_separates_zigzag_from_descent() -> None:
    zigzag = [reading(np.full((3, 1), value)) for value in (1.0, 2.0, 1.0, 2.0, 1.0)]
    descent = [reading(np.full((3, 1), value)) for value in (5.0, 4.0, 3.0, 2.0, 1.0)]
    assert look("oscillation", *zigzag)[0] == pytest.approx(1)
    assert look("oscillation", *descent)[0] == pytest.approx(-1)


@pytest.mark.parametrize("prefix", ["", "val_"])
def test_plateau_counts_decisions_without_improvement(prefix: str) -> None:
    def at(value: float) -> Reading:
        return reading(np.full((3, 1), value), val=value)

    falling = [at(2.0**-k) for k in range(4)]
    flat = [at(2.0**-3) for _ in range(30)]
    assert look(f"{prefix}plateau", *falling)[0] == 0
    assert look(f"{prefix}plateau", *falling, *flat)[0] > 0.9


def test_gradient_statistics_on_known_pairs() -> None:
    def pair(dot: float) -> Reading:
        return reading(np.ones((3, 1)), grad_norm=np.array([[1.0], [1.0]]), grad_dot=np.array([dot]))

    assert look("grad_cosine", pair(1.0))[0] == pytest.approx(1)
    assert look("grad_variance", pair(1.0))[0] == pytest.approx(-1)  # no noise at all
    assert look("grad_variance", pair(0.0))[0] == pytest.approx(1)  # nothing but noise
    assert look("update_ratio", reading(np.ones((3, 1))))[0] == pytest.approx(0, abs=1e-6)


def test_gap_compares_validation_with_training() -> None:
    assert look("gap", reading(np.ones((3, 1)), val=np.e))[0] == pytest.approx(np.tanh(1))


def test_a_rolled_back_interval_is_not_seen() -> None:
    calm, wild = reading(np.ones((3, 1))), reading(np.full((3, 1), 1e9))
    wild.rolled_back = np.ones(1, dtype=bool)
    assert look("loss_level", calm, wild)[0] == look("loss_level", calm)[0]
    assert look("rolled_back", calm, wild)[0] == 1


def test_memory_forgets_only_what_is_reset_and_survives_saving() -> None:
    memory = Memory(2)
    for value in (4.0, 2.0):
        memory.begin()
        memory.ema("x", np.full(2, value), 0.5), memory.best("x", np.full(2, value))
    memory.reset(np.array([True, False]))
    copy = Memory(2)
    copy.load_state_dict(memory.state_dict())
    for one in (memory, copy):
        one.begin()
        np.testing.assert_allclose(one.ema("x", np.full(2, np.nan), 0.5), [np.nan, (0.25 * 4 + 0.5 * 2) / 0.75])
        np.testing.assert_allclose(one.best("x", np.full(2, 3.0)), [3, 2])


def test_unknown_and_repeated_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="loss_level"):
        resolve_signals(["loss_levle"])
    with pytest.raises(ConfigError, match="already"):
        register_signal(Signal(name="progress", group="x", doc="x", missing="", compute=lambda r, m: r.step))
