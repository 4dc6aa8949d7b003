"""Sparse training the slow way: one run and one layer at a time, in plain Python, as the codes of the sources have it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def densities(shapes: Sequence[tuple[int, ...]], density: float, kind: str) -> list[float]:
    """Of each layer, as google-research/rigl finds them: the layer that exceeds most is made dense, and all begins again."""
    sizes = [math.prod(shape) for shape in shapes]
    if kind == "uniform":
        raw = [1.0] * len(shapes)
    elif kind == "er":
        raw = [(shape[0] + shape[1]) / (shape[0] * shape[1]) for shape in shapes]
    else:
        raw = [sum(shape) / math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        rest = [place for place in range(len(shapes)) if place not in dense]
        left = density * sum(sizes) - sum(sizes[place] for place in dense)
        scale = left / sum(raw[place] * sizes[place] for place in rest)
        highest = max(raw[place] for place in rest)
        if scale * highest <= 1 + 1e-12:
            break
        dense |= {place for place in rest if raw[place] == highest}
    return [1.0 if place in dense else scale * raw[place] for place in range(len(shapes))]


def smallest(values: list[float], places: list[int], count: int) -> list[int]:
    """The places of the smallest values; of equal ones the first."""
    return sorted(places, key=lambda place: (values[place], place))[:count]


def exchanged(live: Tensor, weights: Tensor, gain: Tensor, share: float, exists: Tensor) -> Tensor:
    """One layer (M,) of one run."""
    there, sizes, gains = live.tolist(), weights.abs().tolist(), gain.tolist()
    alive = [place for place, one in enumerate(there) if one]
    count = math.floor(float(torch.tensor(share) * len(alive)))
    for place in smallest(sizes, alive, count):
        there[place] = False
    able = [place for place, one in enumerate(there) if not one and exists[place]]
    for place in smallest([-one for one in gains], able, count):
        there[place] = True
    return torch.tensor(there)


def without_units(live: Tensor, weights: Tensor, gain: Tensor, share: float, gamma: float) -> Tensor:
    """One layer (U, I) of one run, in which all weights exist, of which too little salient units are emptied."""
    total, (units, inputs) = int(live.sum()), live.shape
    used = [unit for unit in range(units) if live[unit].any()]
    places = [(unit, place) for unit in range(units) for place in range(inputs)]
    count = math.floor(float(torch.tensor(share) * total))
    kept = {one for one in places if live[one]}
    kept -= set(sorted(sorted(kept), key=lambda one: abs(float(weights[one])))[:count])
    able = [one for one in places if one not in kept and one[0] in used]
    salient = kept | set(sorted(able, key=lambda one: -float(gain[one]))[:count])
    found = {unit: sum(one[0] == unit for one in salient) for unit in used}
    stay = sorted(used, key=lambda unit: (-found[unit], unit))
    while len(stay) > 1 and (len(stay) - 1) * inputs >= total and found[stay[-1]] < gamma * total / len(used):
        stay.pop()
    kept = {one for one in kept if one[0] in stay}
    able = [one for one in places if one not in kept and one[0] in stay]
    kept |= set(sorted(able, key=lambda one: -float(gain[one]))[: total - len(kept)])
    after = torch.zeros_like(live)
    for one in kept:
        after[one] = True
    return after
