"""What scores say of dense networks: how far they spread, agree with each other, and stay the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from experiments.criteria.dense import Choice, Scores, agreement, compared
from torch import Tensor

from trimtab.inner_training.structure.selections import dynamic_range, jaccard, kept, rank_correlation

MANY = "agf-100"
CALIBRATED = ("none", "mean", "rank", "fisher")
Shares = tuple[float, ...]


def names() -> list[str]:
    """What is looked at."""
    return [*compared(), MANY]


def listed(values: np.ndarray | Tensor) -> Any:
    """Numbers as JSON has them."""
    return np.asarray(values, dtype=np.float64).round(5).tolist()


def twins(scores: Scores, seeds: int, shares: Shares) -> dict[str, Any]:
    """Jaccard indices (S,) of what a criterion keeps, by name and sparsity.

    ``order``: of dense runs with the same initial values and other batches. ``initial``: of different ones.
    """
    found: dict[str, Any] = {"order": {}, "initial": {}}
    for name in names():
        every = scores.of(Choice(name))
        own = {group: values[:seeds] for group, values in every.items()}
        twin = {group: values[seeds:] for group, values in every.items()}
        stranger = {group: values[:seeds].roll(1, 0) for group, values in every.items()}
        for kind, other in (("order", twin), ("initial", stranger)):
            found[kind][name] = {f"{share:g}": listed(agreement(own, other, share)) for share in shares}
    return found


def redrawn(first: Scores, second: Scores, seeds: int, shares: Shares) -> dict[str, Any]:
    """The same of two calibration draws of the same networks."""
    found = {}
    for name in names():
        one = {group: values[:seeds] for group, values in first.of(Choice(name)).items()}
        two = second.of(Choice(name, draw=9 * (name == "random")))
        found[name] = {f"{share:g}": listed(agreement(one, two, share)) for share in shares}
    return found


def ranges(scores: Scores, seeds: int) -> dict[str, Any]:
    """Dynamic range (S,) of every criterion over all units of the network."""
    found = {}
    for name in names():
        joined = torch.cat(list(scores.of(Choice(name)).values()), 1)
        found[name] = listed(dynamic_range(joined)[:seeds])
    return found


def of_agf(scores: Scores, seeds: int, shares: Shares) -> dict[str, Any]:
    """How AGF relates to other criteria and to its own calibrations, and what of it each group has."""
    own = scores.of(Choice("agf"))
    others = {}
    for name in names():
        two = scores.of(Choice(name))
        pairs = [rank_correlation(own[group], two[group])[:seeds] for group in own]
        overlaps = {f"{share:g}": listed(agreement(own, two, share)[:seeds]) for share in shares}
        others[name] = {"correlation": listed(torch.stack(pairs).mean(0)), "jaccard": overlaps}
    return {
        "others": others,
        "calibrations": _calibrations(scores, own, seeds, shares),
        "means": {name: listed(one.mean(1)[:seeds]) for name, one in own.items()},
        "left": {name: _left(scores, name, seeds, shares) for name in CALIBRATED},
    }


def _calibrations(scores: Scores, own: dict[str, Tensor], seeds: int, shares: Shares) -> dict[str, Any]:
    """Jaccard indices (S,) of what stays of all units under each calibration and under none."""
    joined, found = torch.cat(list(own.values()), 1), {}
    for normalisation in ("none", "log", "mean", "max", "rank", "fisher"):
        two = torch.cat(list(scores.of(Choice("agf", normalisation)).values()), 1)
        found[normalisation] = {}
        for share in shares:
            stay = joined.shape[1] - round(share * joined.shape[1])
            found[normalisation][f"{share:g}"] = listed(jaccard(kept(joined, stay), kept(two, stay))[:seeds])
    return found


def _left(scores: Scores, normalisation: str, seeds: int, shares: Shares) -> dict[str, Any]:
    """Units (S,) that a global selection by AGF leaves, by group and sparsity."""
    found: dict[str, Any] = {}
    for share in shares:
        for group, gone in scores.chosen(Choice("agf", normalisation), share)[0].items():
            found.setdefault(group, {})[f"{share:g}"] = listed((~gone).sum(1)[:seeds])
    return found
