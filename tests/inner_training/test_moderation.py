"""What the guard makes of proposed moves, against a slow reference of one run at a time, and what it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.inner_training.guard_config import GuardConfig, Reason
from trimtab.inner_training.levers import LEVERS, Lever, resolve_levers
from trimtab.inner_training.moderation import MEMORY, Moderation
from trimtab.inner_training.trials import Trials

OFF: dict[str, Any] = {"dead_band": 0.0, "hysteresis": 0.0, "damping": 0.0, "joint": False, "aftermath": 0}
TABLE = tuple(LEVERS[name] for name in ("lr", "momentum", "weight_decay", "grad_clip"))
configs = st.fixed_dictionaries(
    {
        "smoothing": st.sampled_from([0.0, 0.3, 0.9]),
        "dead_band": st.sampled_from([0.0, 0.1, 0.5]),
        "hysteresis": st.sampled_from([0.0, 0.3]),
        "rest": st.integers(0, 3),
        "damping": st.sampled_from([0.0, 0.5, 1.0]),
        "joint": st.booleans(),
        "aftermath": st.integers(0, 4),
    }
)
moves = st.one_of(st.just(0.0), st.floats(-2, 2), st.sampled_from([np.nan, np.inf, -1.0, 1.0]))


def course(config: GuardConfig, actions: np.ndarray, shocks: np.ndarray, levers: tuple[Lever, ...]) -> np.ndarray:
    """Permitted moves (T, N, L) of actions (T, N, L), with rollbacks (T, N)."""
    made = Moderation(config, levers, actions.shape[1])
    everything = np.ones(actions.shape[1:], dtype=bool)
    out = []
    for wanted, shaken in zip(actions, shocks, strict=True):
        made.pass_on(shaken)
        out.append(made.moderate(wanted, everything)[0])
    return np.array(out)


def slowly(config: GuardConfig, actions: np.ndarray, shocks: np.ndarray, levers: tuple[Lever, ...]) -> np.ndarray:
    """The same for one run, (T, L), number by number."""
    last, wavering, resting, shaken = [0.0] * len(levers), [0.0] * len(levers), [0] * len(levers), 0
    rate = next(lever.rate for lever in levers if lever.name == "lr")
    out = []
    for wanted, shock in zip(actions, shocks, strict=True):
        resting = [max(one - 1, 0) for one in resting]
        shaken = config.aftermath if shock else max(shaken - 1, 0)
        allowed = []
        for place, lever in enumerate(levers):
            move = float(wanted[place])
            if move == 0 or not np.isfinite(move):
                allowed.append(0.0)
                continue
            move = (1 - config.smoothing) * move + config.smoothing * last[place] if config.smoothing else move
            edge = config.dead_band + (config.hysteresis if np.sign(move) * np.sign(last[place]) < 0 else 0)
            if abs(move) < edge or resting[place] > 0:
                allowed.append(0.0)
                continue
            move = min(max(move, -1.0), 1.0)
            factor = 1 - config.damping * wavering[place]
            move *= factor if factor < 0.99 else 1.0
            if shaken and move * lever.step > 0:
                move *= 1 - shaken / (config.aftermath + 1)
            allowed.append(move)
        if config.joint:
            growth = [move * lever.step * lever.rate for move, lever in zip(allowed, levers, strict=True)]
            up, down = sum(one for one in growth if one > 0), sum(one for one in growth if one < 0)
            if up + down > rate * (1 + 1e-12):
                share = (rate - down) / up
                allowed = [m * share if g > 0 else m for m, g in zip(allowed, growth, strict=True)]
        for place, move in enumerate(allowed):
            back = 0.0
            if np.sign(move) * np.sign(last[place]) < 0:
                back = min(abs(move), abs(last[place])) / abs(last[place])
            wavering[place] = MEMORY * wavering[place] + (1 - MEMORY) * back
            if move != 0:
                last[place] = move
                resting[place] = config.rest + 1 if config.rest else 0
        out.append(allowed)
    return np.array(out)


@given(config=configs, data=st.data())
@settings(max_examples=150, deadline=None)
def test_it_is_the_reference_for_every_run(config: dict[str, Any], data: st.DataObject) -> None:
    steps, runs, levers = (
        data.draw(st.integers(1, 8)),
        data.draw(st.integers(1, 3)),
        TABLE[: data.draw(st.integers(1, 4))],
    )
    flat = data.draw(st.lists(moves, min_size=steps * runs * len(levers), max_size=steps * runs * len(levers)))
    actions = np.array(flat).reshape(steps, runs, len(levers))
    shocks = np.array(data.draw(st.lists(st.booleans(), min_size=steps * runs, max_size=steps * runs))).reshape(
        steps, runs
    )
    made = GuardConfig(**config)
    found = course(made, actions, shocks, levers)
    for run in range(runs):
        np.testing.assert_allclose(found[:, run], slowly(made, actions[:, run], shocks[:, run], levers), atol=1e-12)
    assert (found[(actions == 0) | ~np.isfinite(actions)] == 0).all()
    assert (np.abs(found) <= 1).all()


def one_lever(actions: list[float], shocks: tuple[int, ...] = (), **config: Any) -> tuple[list[float], list[int]]:
    """Permitted moves of the learning rate of one run, and the reasons."""
    made = Moderation(GuardConfig(**{**OFF, **config}), TABLE[:1], 1)
    found, reasons = [], []
    for decision, action in enumerate(actions):
        made.pass_on(np.array([decision in shocks]))
        move, reason = made.moderate(np.array([[action]]), np.ones((1, 1), dtype=bool))
        found.append(float(move[0, 0]))
        reasons.append(int(reason[0, 0]))
    return found, reasons


def test_each_part_does_what_it_says() -> None:
    assert one_lever([0.05, 0.2, -0.05], dead_band=0.1) == ([0.0, 0.2, 0.0], [Reason.SMALL, 0, Reason.SMALL])
    turned = one_lever([0.5, -0.2, -0.4, -0.2], dead_band=0.1, hysteresis=0.2)
    assert turned == ([0.5, 0.0, -0.4, -0.2], [0, Reason.REVERSAL, 0, 0])
    assert one_lever([1.0] * 5, rest=2) == ([1.0, 0, 0, 1.0, 0], [0, Reason.RESTING, Reason.RESTING, 0, Reason.RESTING])
    assert one_lever([1.0, 0.0, -1.0], smoothing=0.5)[0] == [0.5, 0.0, -0.25]
    assert one_lever([3.0]) == ([1.0], [Reason.RATE])
    found, reasons = one_lever([1.0, 1.0, 1.0, 1.0], shocks=(1,), aftermath=2)
    assert found == [1.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert reasons == [0, Reason.AFTERMATH, Reason.AFTERMATH, 0]
    assert one_lever([-1.0], shocks=(0,), aftermath=5)[0] == [-1.0]  # a smaller step is never held back


def test_a_lever_that_goes_to_and_fro_is_damped_until_it_makes_up_its_mind() -> None:
    found, reasons = one_lever([1.0, -1.0] * 6 + [1.0] * 16, damping=0.8)
    swings = np.abs(found[:12])
    assert (np.diff(swings) <= 1e-12).all() and swings[-1] < 0.5
    assert found[-1] == 1.0 and reasons[-1] == 0


def test_levers_share_the_rate_of_the_step() -> None:
    levers = resolve_levers(["lr", "momentum"])
    made = Moderation(GuardConfig(**{**OFF, "joint": True}), levers, 3)
    # Up and more momentum; up and less momentum, which makes room; and down.
    found, reasons = made.moderate(np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]), np.ones((3, 2), dtype=bool))
    growth = found @ np.array([levers[0].rate, -levers[1].rate])
    assert growth[0] == pytest.approx(levers[0].rate) and found[0, 0] == -found[0, 1] < 1
    assert found[1].tolist() == [1.0, 1.0] and found[2].tolist() == [-1.0, 1.0]
    assert (reasons[0] == Reason.JOINT).all() and not reasons[1:].any()


def test_what_cannot_move_takes_nobodys_share() -> None:
    made = Moderation(GuardConfig(**{**OFF, "joint": True}), resolve_levers(["lr", "momentum"]), 1)
    found, reasons = made.moderate(np.array([[1.0, -1.0]]), np.array([[True, False]]))
    assert found.tolist() == [[1.0, 0.0]] and not reasons.any()


# --- trials ---------------------------------------------------------------------------------------------------------


def test_moves_are_kept_or_taken_back_together() -> None:
    made, everyone = Trials(2, 0.5, 3, 1), np.ones(3, dtype=bool)
    nobody = ~everyone
    verdicts, before, now = [], np.full((3, 1), 1.0), np.full((3, 1), 2.0)
    for decision, losses in enumerate([[1.0, 1.0, 1.0], [1.0, 9.0, 9.0], [1.0, 9.0, 9.0], [1.0, 9.0, 9.0]]):
        made.note(np.array(losses), everyone, np.array([False, False, decision == 2]))
        failed = made.verdict()
        verdicts.append(failed.tolist())
        made.begin(before if decision == 0 else now, everyone if decision == 0 else nobody)
    # The second run has risen for two decisions; the third was rolled back meanwhile.
    assert verdicts == [[False] * 3, [False] * 3, [False, True, False], [False] * 3]
    assert made.kept[1, 0] == 1.0


def test_without_a_window_nothing_is_on_trial() -> None:
    made = Trials(None, 0.5, 1, 1)
    for _ in range(3):
        made.note(np.array([9.0]), np.array([True]), np.array([False]))
        assert not made.verdict().any()
        made.begin(np.ones((1, 1)), np.array([True]))
    assert made.left[0] == 0


def test_a_run_that_was_shaken_under_a_longer_aftermath_moves_as_just_after_a_shock() -> None:
    config = GuardConfig(**{**OFF, "aftermath": 4})
    resumed, shocked = (Moderation(config, TABLE, 1) for _ in range(2))
    resumed.shaken[:], shocked.shaken[:] = 900, 4
    upwards = np.array([[lever.step for lever in TABLE]], dtype=np.float64)
    every = np.ones(upwards.shape, dtype=bool)
    found, wanted = (one.moderate(upwards, every)[0] for one in (resumed, shocked))
    assert np.array_equal(found, wanted) and (found * upwards >= 0).all() and (found * upwards < 1).any()
