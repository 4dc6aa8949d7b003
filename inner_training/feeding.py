"""Where the examples of each run come from: shared inputs, and per-run maps, splits and streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab.inner_training.streams import MULTIPLIERS, walk_multipliers
from trimtab.inner_training.task import SPLITS, Instance, TaskFamily


@dataclass
class Feed:
    """Data of N runs as device tensors with a leading axis of runs.

    Attributes:
        rows, labels: (N, M) maps into the shared inputs, ordered train, validation, test.
        starts, sizes: (3, N) int64: where each split begins in the maps, and its examples.
        scale: (N,) input scale.
        seed, batch: (N,) int64: stream seed, examples per step.
        walks: (N, MULTIPLIERS) int64, see ``streams.batch_positions``.
        step: (N,) int64 steps done.
        buffers: the module's buffers by name, (N, *shape).
    """

    rows: Tensor
    labels: Tensor
    starts: Tensor
    sizes: Tensor
    scale: Tensor
    seed: Tensor
    batch: Tensor
    walks: Tensor
    step: Tensor
    buffers: dict[str, Tensor]


def allocate_feed(family: TaskFamily, num_runs: int, device: torch.device) -> Feed:
    """Room for ``num_runs`` runs; until one is written, it holds a single example."""

    def whole(*shape: int, fill: int = 0) -> Tensor:
        return torch.full(shape, fill, dtype=torch.int64, device=device)

    return Feed(
        rows=whole(num_runs, family.max_examples),
        labels=torch.zeros(num_runs, family.max_examples, dtype=family.label_dtype, device=device),
        starts=whole(len(SPLITS), num_runs),
        sizes=whole(len(SPLITS), num_runs, fill=1),
        scale=torch.ones(num_runs, dtype=torch.float32, device=device),
        seed=whole(num_runs),
        batch=whole(num_runs, fill=1),
        walks=whole(num_runs, MULTIPLIERS, fill=1),
        step=whole(num_runs),
        buffers={
            name: torch.zeros(num_runs, *buffer.shape, dtype=buffer.dtype, device=device)
            for name, buffer in family.module.named_buffers()
        },
    )


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
    sizes = np.array([instance.sizes for instance in instances], dtype=np.int64).T
    feed.starts[:, index] = torch.from_numpy(np.cumsum(sizes, 0) - sizes).to(device)
    feed.sizes[:, index] = torch.from_numpy(np.ascontiguousarray(sizes)).to(device)
    walks = np.stack([walk_multipliers(one.sizes[0], np.random.default_rng(one.seed)) for one in instances])
    feed.walks[index] = torch.from_numpy(walks).to(device)
    for name, values in (
        ("scale", [instance.input_scale for instance in instances]),
        ("seed", [instance.seed for instance in instances]),
        ("batch", [instance.batch_size for instance in instances]),
    ):
        target: Tensor = getattr(feed, name)
        target[index] = torch.tensor(values, dtype=target.dtype, device=device)
    for name, buffer in feed.buffers.items():
        stacked = np.stack([np.asarray(instance.buffers[name]) for instance in instances])
        buffer[index] = torch.from_numpy(stacked).to(device, buffer.dtype)
    feed.step[index] = 0


def examples(feed: Feed, inputs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (N, B, *shape) and labels (N, B) at ``positions`` (N, B) of each run's maps."""
    taken = inputs[feed.rows.gather(1, positions)]
    scale = feed.scale.view(-1, *([1] * (taken.ndim - 1)))
    return taken * scale, feed.labels.gather(1, positions)
