"""Composites: products of factors, events, what is traced, the shared state, and levers that are not there."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from tests.policies.live import Loop
from tests.policies.obligations import observations, play

from trimtab.errors import ConfigError, UnknownNameError, UserError
from trimtab.inner_training.events import EVENTS
from trimtab.inner_training.levers import LEVERS
from trimtab.policies.attach import attach
from trimtab.policies.plain import from_plain, to_plain
from trimtab.policies.registry import load_policy
from trimtab.policies.rules import RULES
from trimtab.policies.rules.blocks import BLOCKS
from trimtab.policies.rules.clip_blocks import AutoClip, ScaledClip
from trimtab.policies.rules.composite import Composite, compose
from trimtab.policies.rules.composites import COMPOSITES, SINGLE
from trimtab.policies.rules.rate_blocks import Schedule

HYPER = ("lr", "momentum", "weight_decay", "grad_clip")


def loaded(name: str, **options: Any) -> Composite:
    policy = load_policy(name, **options)
    assert isinstance(policy, Composite)
    return policy


def seen(policy: Composite, **values: float) -> np.ndarray:
    """One observation of one run; what is not given is 0, but for ``started``."""
    assert set(values) <= set(policy.signals)
    return np.array([[values.get(name, float(name == "started")) for name in policy.signals]], dtype=np.float32)


@pytest.mark.parametrize("name", COMPOSITES)
def test_every_target_is_the_product_of_its_blocks(name: str) -> None:
    policy = loaded(name)
    state = policy.init(7)
    for row in observations(policy, decisions=40):
        actions, state = policy.act(row, state)
        for column, (lever, kind) in enumerate(policy.levers.items()):
            parts = [state[f"{block.name}.now"] for block in policy.blocks if block.lever == lever]
            if kind == "events":
                wanted = np.max(parts, axis=0)
            else:
                wanted = np.clip(np.prod(parts, axis=0), LEVERS[lever].target_low, LEVERS[lever].high)
            np.testing.assert_allclose(actions[:, column], wanted, rtol=1e-12)


def test_bounds_hold_the_product() -> None:
    policy = compose("tight", [ScaledClip(low=0.05, power=2), AutoClip(percentile=0, warmup=1)])
    _, state = play(policy, np.stack([seen(policy, log_parameters=0.9, grad_level=0.9)]))
    rng = np.random.default_rng(0)
    rows = [seen(policy, log_parameters=0.9, grad_level=float(rng.uniform(-0.9, 0.9))) for _ in range(20)]
    actions, _ = play(policy, np.stack(rows), state)
    assert actions.min() == LEVERS["grad_clip"].target_low


def test_composites_are_in_order_and_grow() -> None:
    order = list(BLOCKS)
    for blocks, doc in COMPOSITES.values():
        assert [order.index(name) for name in blocks] == sorted(order.index(name) for name in blocks)
        assert doc
    full = set(COMPOSITES["full"][0])
    for blocks, _ in COMPOSITES.values():
        assert set(COMPOSITES["steady"][0]) <= set(blocks) <= full
    assert set(SINGLE) <= set(BLOCKS)
    assert {name for name, rule in RULES.items() if rule.adapts} == {"random", *SINGLE, *COMPOSITES}


# --- why --------------------------------------------------------------------------------------------------------


def test_why_names_block_lever_and_evidence() -> None:
    policy = compose("mine", ["spike-care", "palm-rewind", "conservatism", "sigma-clip"])
    _, state = policy.act(seen(policy, loss_level=-0.5), policy.init(1))
    assert policy.why(policy.init(1)) == policy.why(state) == ("",)
    _, state = policy.act(seen(policy, spike=float(np.tanh(2)), loss_above_best=0.99, loss_level=0.5), state)
    (said,) = policy.why(state)
    assert said == (
        "spike-care asks for caution: the worst loss is 8.0 usual distances above its average; "
        "rollback by palm-rewind: the worst loss is 8.0 usual distances above its average; "
        "lr factor 1 to 0.5 by conservatism: other blocks asked for a step size of 0.50"
    )
    _, state = policy.act(seen(policy, loss_level=-0.6), state)
    (said,) = policy.why(state)
    assert said == "lr factor 0.5 to 0.574 by conservatism: going back"


def test_why_is_of_each_run_alone_and_complete() -> None:
    """A run has a text exactly where a factor of it changed or a block of it acted."""
    policy = loaded("full")
    state = policy.init(7)
    for row in observations(policy, decisions=30):
        before = {block.name: state[f"{block.name}.now"] for block in policy.blocks}
        _, state = policy.act(row, state)
        texts = policy.why(state)
        assert len(texts) == 7
        for run, text in enumerate(texts):
            for block in policy.blocks:
                now = state[f"{block.name}.now"][run]
                moved = now > 0 if block.kind == "events" else now != before[block.name][run]
                assert not moved or f"by {block.name}" in text
            assert bool(text) == any(state[f"{block.name}.acted"][run] for block in policy.blocks)


# --- the shared state -------------------------------------------------------------------------------------------


def test_blocks_see_what_earlier_ones_set_at_the_same_decision() -> None:
    policy = compose("mine", ["moment-reset", "warm-return"])
    rows = [seen(policy)] * 50
    actions, state = play(policy, np.stack(rows))
    columns = list(policy.levers)
    assert actions[-1, 0, columns.index("reset_moments")] == 1
    assert actions[-1, 0, columns.index("lr")] < 0.02
    assert (actions[:-1, 0, columns.index("lr")] == 1).all()
    assert state["shared.since_reset"] == [0]


def test_the_state_survives_json() -> None:
    policy = loaded("full")
    rows = observations(policy, decisions=20)
    reference, _ = play(policy, rows)
    _, state = play(policy, rows[:10])
    again = from_plain(json.loads(json.dumps(to_plain(state))))
    rest, _ = play(policy, rows[10:], again)
    np.testing.assert_array_equal(rest, reference[10:])


# --- levers that are not there ----------------------------------------------------------------------------------


def test_blocks_of_levers_that_are_not_there_are_left_out() -> None:
    policy = loaded("full", levers=["momentum", "grad_clip"])
    names = [block.name for block in policy.blocks]
    assert set(policy.levers) == {"momentum", "grad_clip", *EVENTS}
    assert {"spike-care", "staged", "plateau-nudge", "rebalance"}.isdisjoint(names)
    # Those that follow what nobody sets any more are left out, too.
    assert "explore-momentum" not in names
    assert set(load_policy("full").levers) == {*HYPER, *EVENTS}
    assert set(load_policy("shifting", levers="lr").levers) <= {"lr", *EVENTS}


@pytest.mark.parametrize("name", ["palm-rewind", "moment-reset", "anchor"])
def test_a_rule_of_an_event_acts_on_any_run(name: str) -> None:
    policy = loaded(name, levers=["grad_clip"])
    assert "events" in policy.levers.values() and set(policy.levers) <= {*EVENTS, "grad_clip"}


def test_what_cannot_be_composed() -> None:
    for blocks, error, words in [
        (["conservatism"], ConfigError, "'conservatism' follows 'conservatism' of the shared state"),
        (["conservatism", "spike-care"], ConfigError, "put a block that does in front of it"),
        (["zclip", "zclip"], ConfigError, "block 'zclip' is given twice"),
        (["zclop"], UnknownNameError, "did you mean 'zclip'"),
        ([], UserError, "governs nothing"),
    ]:
        with pytest.raises(error, match=words):
            compose("mine", blocks)
    with pytest.raises(UnknownNameError, match="unknown block 'autoclip'.*allowed: spike-care, conservatism, zclip"):
        load_policy("steady", without=["autoclip"])
    with pytest.raises(ConfigError, match="'conservatism' follows"):
        load_policy("steady", without="spike-care")
    assert list(load_policy("steady", without=["zclip"]).levers) == ["lr"]


# --- in runs ----------------------------------------------------------------------------------------------------


def test_a_schedule_block_multiplies() -> None:
    policy = compose("mine", [Schedule(schedule="cosine"), "hypergradient"])
    row = seen(policy, progress=0.5, progress_available=1, grad_cosine=0.5)
    actions, _ = policy.act(row, policy.init(1))
    assert actions[0, 0] == pytest.approx(0.5 * np.exp(0.1))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)


@pytest.mark.parametrize("name", ["steady", "full"])
def test_in_a_live_run(name: str, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(adamw)
    policy = load_policy(name, levers=HYPER)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=policy, total_steps=120)
    loop.run(120)
    assert "failed" not in caplog.text
    multipliers = loop.controller.multipliers
    assert set(multipliers) == {lever for lever, kind in policy.levers.items() if kind != "events"}
    assert all(np.isfinite(value) and value > 0 for value in multipliers.values())
    assert name == "steady" or multipliers["lr"] != 1
