"""Populations that advance in blocks of runs: the same runs, whatever the block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inner_training.problems import family
from trimtab.errors import RangeError
from trimtab.inner_training.blocks import CACHE_BYTES, choose_size, cut, joined, working_bytes
from trimtab.inner_training.disturbances import DisturbanceSettings
from trimtab.inner_training.feeding import allocate_feed
from trimtab.inner_training.population import Population
from trimtab.inner_training.task import Instance, OptimizerSettings
from trimtab.inner_training.tasks import make_family

CPU = torch.device("cpu")
ADAM = OptimizerSettings(rule="adam", lr=3e-3)


def instances(count: int) -> list[Instance]:
    return [family().instance(seed, ADAM if seed % 2 else None) for seed in range(count)]


def population(given: list[Instance], block: int | None, **options: object) -> Population:
    made = Population(family(), len(given), mode="eager", block=block, **options)  # type: ignore[arg-type]
    made.reset(range(len(given)), given)
    return made


@given(st.integers(1, 70), st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_blocks_of_one_length_cover_all_runs(num_runs: int, size: int) -> None:
    blocks = cut(allocate_feed(family(), num_runs, CPU), num_runs, min(size, num_runs))
    lengths = {block.runs.stop - block.runs.start for block in blocks}
    assert len(lengths) == 1
    assert lengths.pop() <= size
    times = np.zeros(num_runs, dtype=int)
    for block in blocks:
        times[block.runs] += 1
    assert times.min() == 1
    assert times.sum() - num_runs < len(blocks)
    assert all(len(value) == len(block.feed.step) for block in blocks for value in (block.feed.rows, block.feed.seed))
    parts = [torch.arange(num_runs)[None, block.runs] for block in blocks]
    assert joined(parts, blocks).tolist() == [list(range(num_runs))]


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_a_block_changes_nothing_in_an_interval(block: int) -> None:
    given = instances(5)
    disturbances = (DisturbanceSettings(kind="label-noise", at=3, steps=4),)
    whole = population(given, None, disturbances=disturbances)
    blocks = population(given, block, disturbances=disturbances)
    assert (whole.block, blocks.block) == (5, {1: 1, 2: 2, 3: 3, 4: 3}[block])
    for one in (whole, blocks):
        one.measure(["curvature", "grad_sparsity"])
        one.set_hyperparameters({"grad_clip": np.array([0.1, 0.2, np.inf, 0.3, 0.4])})
    for _ in range(2):
        wanted, found = (one.advance(7).to_host() for one in (whole, blocks))
        for name in ("losses", "grad_norm", "grad_dot", "update_norm", "weight_norm"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-3, atol=1e-6)
        for name, value in wanted.probed.items():
            np.testing.assert_allclose(found.probed[name], value, rtol=1e-2, atol=1e-4)
        for split in ("train", "validation"):
            assert torch.allclose(blocks.evaluate(split, 30), whole.evaluate(split, 30), atol=1e-5)
    for run in range(5):
        for name, value in whole.parameters_of(run).items():
            assert torch.allclose(blocks.parameters_of(run)[name], value, atol=1e-5)


def test_the_same_blocks_give_the_same_runs_bit_for_bit() -> None:
    given = instances(5)
    one, other = population(given, 2), population(given, 2)
    one.advance(20)
    one.reset(range(5), given)
    assert torch.equal(one.advance(20).losses, other.advance(20).losses)
    assert torch.equal(one.evaluate("test"), other.evaluate("test"))


def test_neighbours_in_a_block_do_not_matter() -> None:
    given = instances(5)
    wild = [given[0], family().instance(9, OptimizerSettings(rule="sgd", lr=1e30)), *given[2:]]
    calm, spoiled = population(given, 2), population(wild, 2)
    losses, others = calm.advance(20).losses, spoiled.advance(20).losses
    assert not others[:, 1].isfinite().all()
    assert torch.equal(losses[:, [0, 2, 3, 4]], others[:, [0, 2, 3, 4]])


def test_reset_and_restore_of_a_run_in_a_block_leave_the_others() -> None:
    given = instances(5)
    runs, untouched = population(given, 2), population(given, 2)
    everyone, third = np.ones(5, dtype=bool), np.arange(5) == 3
    for one in (runs, untouched):
        one.advance(5)
        one.snapshot(everyone)
    wanted = runs.parameters_of(3)
    for one in (runs, untouched):
        one.advance(5)
        one.snapshot(everyone)
        one.advance(5)
    runs.restore(third)
    assert all(torch.equal(value, wanted[name]) for name, value in runs.parameters_of(3).items())
    runs.reset([1], [family().instance(9)])
    losses, others = runs.advance(5).losses, untouched.advance(5).losses
    assert torch.equal(losses[:, [0, 2, 4]], others[:, [0, 2, 4]])
    assert not torch.equal(losses[:, 1], others[:, 1])
    assert not torch.equal(losses[:, 3], others[:, 3])


def test_an_interval_keeps_no_step_alive() -> None:
    runs = population(instances(4), 2)
    state = sum(tensor.nbytes for tensor in runs._state())
    with torch.profiler.profile(profile_memory=True) as profile:
        runs.advance(40)
    # Forty steps of which each were kept would hold eighteen times the state.
    held, most = 0, 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 0 < most < 6 * state


def test_the_size_follows_from_shapes() -> None:
    small, large = make_family("digits-mlp"), make_family("sprites-conv")
    assert working_bytes(large) > 3 * working_bytes(small) > 0
    assert choose_size(large, 64, "compile", CPU) < choose_size(small, 64, "compile", CPU) == 64
    assert choose_size(small, 3, "compile", CPU) == 3
    assert choose_size(large, 64, "eager", CPU) == 64
    assert choose_size(large, 64, "compile", torch.device("cuda")) == 64
    for num_runs in (1000, 1009):  # some divisor is near; a prime has none
        size = choose_size(small, num_runs, "compile", CPU)
        assert 0.6 < size * working_bytes(small) / CACHE_BYTES < 1.3
        assert sum(block.feed.step.numel() for block in cut(allocate_feed(small, num_runs, CPU), num_runs, size)) < (
            1.02 * num_runs
        )


def test_a_block_of_no_runs_is_refused() -> None:
    with pytest.raises(RangeError, match="block"):
        Population(family(), 2, block=0)


@pytest.mark.slow
def test_compiled_blocks_equal_eager_runs() -> None:
    given = instances(5)
    fast = Population(family(), 5, mode="compile", block=2)
    assert (fast.mode, fast.block) == ("compile", 2)
    fast.reset(range(5), given)
    slow = population(given, None)
    np.testing.assert_allclose(fast.advance(50).to_host().losses, slow.advance(50).to_host().losses, atol=1e-4)
    np.testing.assert_allclose(fast.evaluate("test").numpy(), slow.evaluate("test").numpy(), atol=1e-4)
