"""Figures of the study: means with intervals over seeds, differences by seed, and rank correlations over runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from experiments.growth_stability.arena import Played
from scipy.special import stdtrit

from trimtab.inner_training.structure.selections import rank_correlation

REPETITIONS = 5000


def interval(values: Sequence[float]) -> list[float]:
    """Mean and its 95 % interval by Student's t; one value is its own interval.

    >>> interval([1.0, 2.0, 3.0])
    [2.0, -0.4841, 4.4841]
    """
    given = np.asarray(values, dtype=np.float64)
    middle, half = given.mean(), 0.0
    if len(given) > 1:
        half = float(stdtrit(len(given) - 1, 0.975)) * given.std(ddof=1) / math.sqrt(len(given))
    return [round(float(one), 4) for one in (middle, middle - half, middle + half)]


def average(played: Played) -> float:
    """Trajectory average accuracy."""
    return float(np.mean(played.curve))


def parity(played: Played, moment: str, which: int = 0) -> float:
    """Mean log parity over the edits of a run: ``post`` or ``exit``, of gradients (0) or activations (1)."""
    return float(np.mean([pair[which] for pair in getattr(played, moment)]))


def figures(runs: Sequence[Played], retrained: Sequence[Played] | None) -> dict[str, Any]:
    """What is published of a cell, from its runs in the order of their seeds."""
    found: dict[str, Any] = {
        "final": interval([run.curve[-1] for run in runs]),
        "average": interval([average(run) for run in runs]),
        "units": runs[0].units,
        "by_seed": [[run.curve[-1], round(average(run), 5)] for run in runs],
        "curve": [round(float(one), 4) for one in np.mean([run.curve for run in runs], 0)],
    }
    if retrained:
        found["retrained"] = interval([run.curve[-1] for run in retrained])
        found["retrained_average"] = interval([average(run) for run in retrained])
        gaps = [again.curve[-1] - run.curve[-1] for run, again in zip(runs, retrained, strict=True)]
        found["retrained_minus_final"] = interval(gaps)
    if runs[0].post:
        for moment in ("post", "exit"):
            found[moment] = interval([parity(run, moment) for run in runs])
            found[f"{moment}_activation"] = interval([parity(run, moment, 1) for run in runs])
        found["end"] = interval([run.exit[-1][0] for run in runs])
        found["by_edit"] = [
            round(float(one), 3) for one in np.mean([[pair[0] for pair in run.post] for run in runs], 0)
        ]
    if runs[0].shock:
        found["shock"] = interval([float(np.mean(run.shock)) for run in runs])
    return found


def difference(runs: Sequence[Played], others: Sequence[Played]) -> dict[str, list[float]]:
    """Runs minus others of the same seeds: final and average accuracy."""
    pairs = list(zip(runs, others, strict=True))
    return {
        "final": interval([one.curve[-1] - other.curve[-1] for one, other in pairs]),
        "average": interval([average(one) - average(other) for one, other in pairs]),
    }


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two (n,) arrays."""
    return float(rank_correlation(torch.from_numpy(first).float(), torch.from_numpy(second).float()))


def correlation(first: Sequence[float], second: Sequence[float], seed: int = 0) -> list[float]:
    """Spearman's correlation with the 95 % interval of a bootstrap over pairs."""
    one, other = np.asarray(first), np.asarray(second)
    drawn = np.random.default_rng(seed).integers(0, len(one), (REPETITIONS, len(one)))
    many = rank_correlation(torch.from_numpy(one[drawn]).float(), torch.from_numpy(other[drawn]).float()).numpy()
    return [round(value, 3) for value in (spearman(one, other), *np.quantile(many, (0.025, 0.975)).tolist())]


def correlations(groups: Mapping[str, Mapping[str, Sequence[Played]]]) -> dict[str, Any]:
    """How log gradient parity goes with the trajectory average, by group of cells of grown networks.

    Of each group: over all its runs; and, where it has many cells, over the means of its cells, and over runs inside their
    cells, each minus its cell's mean, so that nothing is left of what the cells have in common.
    """
    found: dict[str, Any] = {}
    for name, cells in groups.items():
        for moment in ("post", "exit"):
            parts = [
                np.array([(parity(run, moment), average(run)) for run in runs if run.post]) for runs in cells.values()
            ]
            means = np.array([part.mean(0) for part in parts])
            inside = np.concatenate([part - part.mean(0) for part in parts])
            row = {"runs": correlation(*np.concatenate(parts).T), "inside": correlation(*inside.T)}
            if len(means) > 2:
                row["cells"] = correlation(*means.T)
            found.setdefault(name, {"count": int(sum(map(len, parts)))})[moment] = row
    return found
