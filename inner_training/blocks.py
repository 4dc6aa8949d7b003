"""Blocks of runs: those that fit a cache together train through a whole interval before the next ones do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimtab.inner_training.feeding import Feed, feed_of, first_examples
from trimtab.inner_training.programs import EVALUATION_SLOTS
from trimtab.inner_training.stepping import EvaluateFunction, StepFunction
from trimtab.inner_training.task import TaskFamily
from trimtab.inner_training.telemetry import Telemetry, gathered

CACHE_BYTES = 2**23  # what the runs of a block should work on; measured, and flat around this
FEWEST_RUNS = 4  # a block of fewer spends its time on calls
STATES = 5  # tensors as large as the parameters that an update reads or writes


class Block(NamedTuple):
    """Some runs of a population: which, as a slice, and views of their data."""

    runs: slice
    feed: Feed


class State(NamedTuple):
    """What an interval changes, each (N, P): parameters, moments, and the gradient sampled last."""

    parameters: Tensor
    first: Tensor
    second: Tensor
    gradient: Tensor


class Outcome(NamedTuple):
    """What an interval leaves: the state, parameters (N, P) before the last step, and telemetry."""

    state: State
    before: Tensor
    telemetry: Telemetry


def cut(feed: Feed, num_runs: int, size: int) -> tuple[Block, ...]:
    """Blocks of equal length, ``size`` at the most, that cover all runs.

    One length means one compilation. Where it does not divide N the last block begins early and repeats runs of the
    block before it, with the same outcome; they are fewer than there are blocks.

    Args:
        feed: of all runs.
        num_runs: N.
        size: 1 to N.
    """
    count = -(-num_runs // size)
    length = -(-num_runs // count)
    starts = (min(begin, num_runs - length) for begin in range(0, num_runs, length))
    return tuple(Block(runs, feed_of(feed, runs)) for runs in (slice(start, start + length) for start in starts))


class _Results(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operations make."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(one.nbytes for one in tree_leaves(result) if isinstance(one, Tensor))
        return result


@torch.no_grad()
def working_bytes(family: TaskFamily) -> int:
    """Bytes that a step of one run works on, by their shapes: its state, and the results of its forward pass."""
    x, y = first_examples(family, family.max_batch)
    with _Results() as results:  # type: ignore[no-untyped-call]
        family.loss(family.module(x), y)
    return results.bytes + STATES * sum(parameter.nbytes for parameter in family.module.parameters())


def choose_size(family: TaskFamily, num_runs: int, mode: str, device: torch.device) -> int:
    """Runs per block of a population that nobody gave one: about as many as fit a cache.

    A GPU takes all runs at once, and so does a population that is not compiled, whose time goes into calls. Nothing is
    timed, so that the same population has the same blocks everywhere.
    """
    if mode == "eager" or device.type != "cpu":
        return num_runs
    wanted = num_runs / max(CACHE_BYTES / working_bytes(family), FEWEST_RUNS)
    counts = range(math.ceil(0.8 * wanted), math.ceil(1.5 * wanted) + 1)
    # Of the counts near the wanted one, that which repeats the fewest runs (see ``cut``).
    count = min(counts, key=lambda count: (-num_runs % count, abs(count - wanted)))
    return -(-num_runs // count)


def joined(parts: Sequence[Tensor], blocks: Sequence[Block]) -> Tensor:
    """Tensors (..., b) of each block as one of all runs (..., N)."""
    whole = parts[0].new_empty(*parts[0].shape[:-1], blocks[-1].runs.stop)
    for part, block in zip(parts, blocks, strict=True):
        whole[..., block.runs] = part
    return whole


def train(
    blocks: Sequence[Block], steps: Sequence[StepFunction], state: State, inputs: Tensor, rows: Tensor, clip: Tensor
) -> Outcome:
    """Takes one step after another with one block after another; nothing given is written to.

    Args:
        blocks: that cover all runs.
        steps: K functions of ``make_step``.
        state: of all runs.
        inputs: of the family.
        rows: (K, N, C), what each step takes.
        clip: (N,) thresholds.
    """
    if len(blocks) == 1:
        return train_block(blocks[0], steps, state, inputs, rows, clip)
    whole, before = State(*map(torch.empty_like, state)), torch.empty_like(state.parameters)
    parts = []
    for block in blocks:
        outcome = train_block(block, steps, state, inputs, rows, clip)
        for into, part in zip((*whole, before), (*outcome.state, outcome.before), strict=True):
            into[block.runs] = part
        parts.append(outcome.telemetry)
    return Outcome(whole, before, _joined_telemetry(parts, blocks))


def train_block(
    block: Block, steps: Sequence[StepFunction], state: State, inputs: Tensor, rows: Tensor, clip: Tensor
) -> Outcome:
    """The same with one block only; the outcome is that of its runs."""
    parameters, first, second, gradient = (tensor[block.runs] for tensor in state)
    feed, clip = replace(block.feed), clip[block.runs]
    taken, before = [], parameters
    for step, by in zip(steps, rows[:, block.runs], strict=True):
        before = parameters
        result = step((parameters, first, second), feed, inputs, gradient, by, clip)
        # Taken out, so that the memory of one step, still in the cache, serves the next.
        parameters, first, second = (result.pop(name) for name in ("parameters", "first", "second"))
        gradient = result.pop("gradient", gradient)
        feed.step = feed.step + 1
        taken.append(result)
    return Outcome(State(parameters, first, second, gradient), before, gathered(taken))


def sums(
    blocks: Sequence[Block],
    function: EvaluateFunction,
    views: Mapping[str, Tensor],
    inputs: Tensor,
    spans: tuple[np.ndarray, np.ndarray],
) -> Tensor:
    """Sums (N,) of what ``function``, of ``make_evaluate``, gives over a span of each run's maps.

    Args:
        blocks: that cover all runs.
        function: of ``EVALUATION_SLOTS`` slots.
        views: parameters by name, (N, *shape).
        inputs: of the family.
        spans: begin and size (N,) int64, on the host.
    """
    return joined([_sum(block, function, views, inputs, spans) for block in blocks], blocks)


def _sum(
    block: Block,
    function: EvaluateFunction,
    views: Mapping[str, Tensor],
    inputs: Tensor,
    spans: tuple[np.ndarray, np.ndarray],
) -> Tensor:
    device = block.feed.step.device
    start, size = (torch.from_numpy(np.ascontiguousarray(one[block.runs])).to(device) for one in spans)
    own = {name: view[block.runs] for name, view in views.items()}
    total = torch.zeros(len(size), dtype=torch.float32, device=device)
    for offset in range(0, int(spans[1][block.runs].max()), EVALUATION_SLOTS):
        total = total + function(own, block.feed, inputs, start, size, torch.tensor(offset, device=device))
    return total


def _joined_telemetry(parts: Sequence[Telemetry], blocks: Sequence[Block]) -> Telemetry:
    def along(name: str) -> Tensor:
        return joined([getattr(part, name) for part in parts], blocks)

    return Telemetry(
        losses=along("losses"),
        grad_norm=along("grad_norm"),
        grad_dot=along("grad_dot"),
        update_norm=along("update_norm"),
        weight_norm=along("weight_norm"),
        scores=None if parts[0].scores is None else along("scores"),
    )
