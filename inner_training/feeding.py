"""Where the examples of each run come from: shared inputs, and per-run maps, phases, splits and streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError, out_of_range
from trimtab.inner_training.streams import MULTIPLIERS, batch_positions, walk_multipliers
from trimtab.inner_training.task import SPLITS, Instance, Phase, TaskFamily

NEVER = 2**62  # first step of a phase that an instance does not have


@dataclass
class Feed:
    """Data of N runs as device tensors; P is the most phases of the family.

    Attributes:
        rows, labels: (N, M) maps into the shared inputs, phase after phase, each ordered train, validation, test.
        first_steps: (P, N) int64 step that each phase begins with.
        starts, sizes: (P, N) int64: where the train split of each phase begins in the maps, and its examples.
        walks: (P, N, MULTIPLIERS) int64, see ``streams.batch_positions``.
        scale: (N,) input scale.
        seed, batch: (N,) int64: stream seed, examples per step.
        step: (N,) int64 steps done.
        buffers: the module's buffers by name, (N, *shape).
        live: (N, W) float, 0 for weights that a mask holds at zero; None in populations without masks of weights.
        fast_until: (N, W) int64, the step before which a weight of a newborn is fast; None in populations without Two-Speed.
        speed: (N,) float, factor on the steps of fast weights; None with it.
        factor, term: (N, W) what gradients are multiplied with after clipping, and what is added then; None in populations
            whose gradients nobody steers.
    """

    rows: Tensor
    labels: Tensor
    first_steps: Tensor
    starts: Tensor
    sizes: Tensor
    walks: Tensor
    scale: Tensor
    seed: Tensor
    batch: Tensor
    step: Tensor
    buffers: dict[str, Tensor]
    live: Tensor | None = None
    fast_until: Tensor | None = None
    speed: Tensor | None = None
    factor: Tensor | None = None
    term: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Everything that it holds."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)] + list(self.buffers.values())


class Place(NamedTuple):
    """Where N runs are at a step: all (N,) int64 but ``walks``.

    Attributes:
        phase: number of the phase.
        since: steps done in it.
        start, size: its train split in the maps.
        walks: (N, MULTIPLIERS).
    """

    phase: Tensor
    since: Tensor
    start: Tensor
    size: Tensor
    walks: Tensor


def allocate_feed(family: TaskFamily, num_runs: int, device: torch.device) -> Feed:
    """Room for ``num_runs`` runs; until one is written, it holds a single example."""
    phases = family.max_phases

    def whole(*shape: int, fill: int = 0) -> Tensor:
        return torch.full(shape, fill, dtype=torch.int64, device=device)

    return Feed(
        rows=whole(num_runs, family.max_examples),
        labels=torch.zeros(num_runs, family.max_examples, dtype=family.label_dtype, device=device),
        first_steps=whole(phases, num_runs),
        starts=whole(phases, num_runs),
        sizes=whole(phases, num_runs, fill=1),
        walks=whole(phases, num_runs, MULTIPLIERS, fill=1),
        scale=torch.ones(num_runs, dtype=torch.float32, device=device),
        seed=whole(num_runs),
        batch=whole(num_runs, fill=1),
        step=whole(num_runs),
        buffers={
            name: torch.zeros(num_runs, *buffer.shape, dtype=buffer.dtype, device=device)
            for name, buffer in family.module.named_buffers()
        },
    )


def split_table(instances: Sequence[Instance], max_phases: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First step of each phase (P, n), and begin and size of each split in the maps (P, 3, n), all int64.

    Phases that an instance does not have never begin, and repeat its last one.
    """
    first = np.full((max_phases, len(instances)), NEVER, dtype=np.int64)
    begins = np.zeros((max_phases, len(SPLITS), len(instances)), dtype=np.int64)
    sizes = np.ones_like(begins)
    for column, instance in enumerate(instances):
        given: Sequence[Phase] = instance.all_phases
        first[: len(given), column] = [phase.first_step for phase in given]
        table = np.array([phase.sizes for phase in given], dtype=np.int64)
        ends = np.cumsum(table.reshape(-1)).reshape(table.shape)
        padded = np.minimum(np.arange(max_phases), len(given) - 1)
        begins[:, :, column], sizes[:, :, column] = (ends - table)[padded], table[padded]
    return first, begins, sizes


class SplitTable:
    """Where each split of each phase lies in the maps of N runs, on the host; before its start a run has one example.

    Args:
        max_phases: of the family.
        num_runs: N.
    """

    def __init__(self, max_phases: int, num_runs: int) -> None:
        shape = (max_phases, len(SPLITS), num_runs)
        first = np.full((max_phases, num_runs), NEVER, dtype=np.int64)
        self._tables = first, np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=np.int64)

    def write(self, runs: Sequence[int], instances: Sequence[Instance]) -> None:
        """Notes the splits of ``instances`` in ``runs``."""
        for table, part in zip(self._tables, split_table(instances, len(self._tables[0])), strict=True):
            table[..., list(runs)] = part

    def spans(self, split: str, phase: int | None, steps_done: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Begin and size (N,) of a split, of one phase or (None) of that of the last step done."""
        _, begins, sizes = self._tables
        now = self._phase(steps_done) if phase is None else np.full(len(steps_done), phase)
        where = now, SPLITS.index(split), np.arange(len(steps_done))
        return begins[where], sizes[where]

    def crossed(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Whether (N,) bool a later phase began between two counts of steps done."""
        crossed: np.ndarray = self._phase(after) > self._phase(before)
        return crossed

    def _phase(self, steps_done: np.ndarray) -> np.ndarray:
        """The phase (N,) of the last step done."""
        first = self._tables[0]
        phase: np.ndarray = (np.maximum(steps_done - 1, 0) >= first[1:]).sum(0)
        return phase


def check_instance(instance: Instance, family: TaskFamily) -> None:
    """Refuses an instance whose phases, splits, maps and batch do not fit each other or the family.

    Raises:
        UserError: naming what does not fit.
    """
    phases = instance.all_phases
    total = sum(sum(phase.sizes) for phase in phases)
    if not total == len(instance.rows) == len(instance.labels) or total > family.max_examples:
        raise UserError(
            f"instance {instance.key}: {len(instance.rows)} examples and {len(instance.labels)} labels in splits "
            f"{[phase.sizes for phase in phases]}, but the splits must sum to the examples and those to at most "
            f"{family.max_examples}"
        )
    if any(min(phase.sizes) < 1 for phase in phases):
        raise UserError(f"instance {instance.key}: every split needs an example; there are {[p.sizes for p in phases]}")
    first = [phase.first_step for phase in phases]
    if (
        len(phases) > family.max_phases
        or first[0] != 0
        or sorted(set(first)) != first
        or phases[0].sizes != instance.sizes
    ):
        raise UserError(
            f"instance {instance.key}: phases begin at steps {first}; they must begin at 0, rise, be at most "
            f"{family.max_phases}, and the first must have the instance's sizes"
        )
    limit = min(family.max_batch, *(phase.sizes[0] for phase in phases))
    if not 1 <= instance.batch_size <= limit:
        raise out_of_range("batch_size", instance.batch_size, 1, limit)


def write_feed(feed: Feed, index: Tensor, instances: Sequence[Instance]) -> None:
    """Writes the data of ``instances`` to the runs ``index`` (len(instances),), and starts their streams at step 0."""
    device, width = index.device, feed.rows.shape[1]
    rows = np.zeros((len(instances), width), dtype=np.int64)
    labels = np.zeros((len(instances), width), dtype=np.float64 if feed.labels.is_floating_point() else np.int64)
    for place, instance in enumerate(instances):
        rows[place, : len(instance.rows)] = instance.rows
        labels[place, : len(instance.labels)] = instance.labels
    feed.rows[index] = torch.from_numpy(rows).to(device)
    feed.labels[index] = torch.from_numpy(labels).to(device, feed.labels.dtype)
    first, begins, sizes = split_table(instances, len(feed.starts))
    walks = np.stack([_walks(sizes[:, 0, column], one.seed) for column, one in enumerate(instances)], 1)
    for target, value in (
        (feed.first_steps, first),
        (feed.starts, np.ascontiguousarray(begins[:, 0])),
        (feed.sizes, np.ascontiguousarray(sizes[:, 0])),
        (feed.walks, walks),
    ):
        target[:, index] = torch.from_numpy(value).to(device)
    for name, values in (
        ("scale", [instance.input_scale for instance in instances]),
        ("seed", [instance.seed for instance in instances]),
        ("batch", [instance.batch_size for instance in instances]),
    ):
        column_of: Tensor = getattr(feed, name)
        column_of[index] = torch.tensor(values, dtype=column_of.dtype, device=device)
    for name, buffer in feed.buffers.items():
        stacked = np.stack([np.asarray(instance.buffers[name]) for instance in instances])
        buffer[index] = torch.from_numpy(stacked).to(device, buffer.dtype)
    feed.step[index] = 0


def _walks(sizes: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([walk_multipliers(int(size), rng) for size in sizes])


def feed_of(feed: Feed, runs: Tensor | slice) -> Feed:
    """A copy of the data of some runs (indices), or views of it (a slice)."""
    behind = ("first_steps", "starts", "sizes", "walks")  # these have the runs on their second axis
    parts: dict[str, Tensor] = {name: value for name, value in vars(feed).items() if isinstance(value, Tensor)}
    taken = {name: value[:, runs] if name in behind else value[runs] for name, value in parts.items()}
    return Feed(**taken, buffers={name: buffer[runs] for name, buffer in feed.buffers.items()})


def place_of(feed: Feed) -> Place:
    """Where each run is at its next step."""
    if len(feed.starts) == 1:
        phase = torch.zeros_like(feed.step)
        return Place(phase, feed.step, feed.starts[0], feed.sizes[0], feed.walks[0])
    phase = (feed.step >= feed.first_steps[1:]).sum(0)

    def now(table: Tensor) -> Tensor:
        return table.gather(0, phase[None])[0]

    walks = feed.walks.gather(0, phase[None, :, None].expand(1, -1, MULTIPLIERS))[0]
    return Place(phase, feed.step - now(feed.first_steps), now(feed.starts), now(feed.sizes), walks)


def batch_of(feed: Feed, place: Place, slots: int) -> Tensor:
    """Positions (N, slots) in the maps of the examples of the next step."""
    # The multiplier of a phase's word is arbitrary and odd: each phase walks through its examples in its own order.
    seed = feed.seed if len(feed.starts) == 1 else (feed.seed + place.phase * 0x9E3779B1) & 0x7FFFFFFF
    inside = batch_positions(seed, place.since, feed.batch, place.size, place.walks, slots)
    return inside if len(feed.starts) == 1 else place.start[:, None] + inside


def first_examples(family: TaskFamily, count: int) -> tuple[Tensor, Tensor]:
    """The first inputs (count, *shape) of a family's table, around it again where it is shorter, and labels of zero.

    Both are as the module takes them.
    """
    rows = family.inputs[torch.arange(count, device=family.inputs.device) % len(family.inputs)]
    labels = torch.zeros(count, dtype=family.label_dtype, device=rows.device)
    return family.present(rows if rows.is_floating_point() else rows.long(), labels)


def examples(feed: Feed, inputs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (N, B, *shape) and labels (N, B) at ``positions`` (N, B) of each run's maps."""
    taken = inputs[feed.rows.gather(1, positions)]
    if not taken.is_floating_point():
        return taken.long(), feed.labels.gather(1, positions)
    scale = feed.scale.view(-1, *([1] * (taken.ndim - 1)))
    return taken * scale, feed.labels.gather(1, positions)
