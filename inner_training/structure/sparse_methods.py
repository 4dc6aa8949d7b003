"""Sparse training: named methods that say which weights live while a network trains, and when that changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import MismatchError, UserError, unknown
from trimtab.inner_training.structure.densities import live_counts
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.maintenance import TINY, Setting, checked_settings
from trimtab.inner_training.structure.sparse_rules import (
    cubic_sparsity,
    drop_fraction,
    exchanged,
    exchanged_between_units,
    thinned,
)
from trimtab.inner_training.structure.weight_rules import initial_bounds

Masks = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SparseMethod:
    """One way to choose which weights live.

    Attributes:
        name: lower-case words with hyphens.
        doc: what it does, in one line.
        source: where it comes from.
        settings: the numbers that it takes.
        grows: what an update makes live in the place of the smallest weights: those of the largest ``gradient``, ``random``
            ones, or nothing.
        thins: whether it begins dense and removes weights step by step, instead of beginning sparse.
    """

    name: str
    doc: str
    source: str
    settings: tuple[Setting, ...]
    grows: Literal["", "gradient", "random"] = ""
    thins: bool = False


def _table() -> tuple[SparseMethod, ...]:
    rigl, lasby, zhu = (
        "Evci et al., arXiv 1911.11134",
        "Lasby et al., arXiv 2305.02299",
        "Zhu & Gupta, arXiv 1710.01878",
    )
    density = Setting(name="density", default=0.1, low=TINY, high=1, source="ours")
    every = Setting(name="every", default=100, low=1, high=10**9, source=rigl, whole=True)
    end = Setting(name="end", default=0.75, low=TINY, high=1, source=f"about that of {rigl}")
    exchange = (density, every, end, Setting(name="alpha", default=0.3, low=0, high=1, source=rigl))
    gamma = Setting(name="gamma", default=0.3, low=0, high=1, source=lasby)
    thin = (density, every, Setting(name="begin", default=0, low=0, high=1, source="ours"), end)
    return (
        SparseMethod(name="rigl", doc="exchanges the smallest live weights for those of the largest gradient", source=rigl,
                     settings=exchange, grows="gradient"),
        SparseMethod(name="srigl", doc="rigl, which also empties units with too few salient weights", source=f"after {lasby}",
                     settings=(*exchange, gamma), grows="gradient"),
        SparseMethod(name="set", doc="exchanges the smallest live weights for random ones", source="Mocanu et al., arXiv 1707.04780",
                     settings=exchange, grows="random"),
        SparseMethod(name="static", doc="random weights that stay: the control of the others", source="", settings=(density,)),
        SparseMethod(name="prune-magnitude", doc="begins dense and removes the smallest weights, fewer and fewer (cubic)", source=zhu,
                     settings=thin, thins=True),
    )  # fmt: skip


SPARSE_TRAINING: dict[str, SparseMethod] = {method.name: method for method in _table()}


def resolve_sparse(name: str) -> SparseMethod:
    """The method of a name.

    Raises:
        UnknownNameError: there is none; the message names the nearest.

    >>> resolve_sparse("rigl").grows
    'gradient'
    """
    if name not in SPARSE_TRAINING:
        raise unknown("method of sparse training", name, SPARSE_TRAINING)
    return SPARSE_TRAINING[name]


class Plan(NamedTuple):
    """What an update does to N runs; all (N,).

    Attributes:
        due: bool, the runs that it is for.
        share: of the live weights that is exchanged.
        density: what is left of all weights at most.
        gradient: bool, exchanged by gradients and not at random.
        gamma: see ``sparse_rules.ablated``.
    """

    due: np.ndarray
    share: np.ndarray
    density: np.ndarray
    gradient: np.ndarray
    gamma: np.ndarray


class Timetable:
    """When N runs change which weights live, and how much; on the host.

    Args:
        methods: name of each run's.
        given: settings by name, one value or (N,); a setting concerns the runs whose method has it.

    Attributes:
        methods: of the runs.
        settings: (N,) float64 by name; 0 for runs whose method has it not.

    Raises:
        UserError: an unknown method or setting, a value out of its range, or values of another number of runs.
    """

    def __init__(self, methods: Sequence[str], given: Mapping[str, Any]) -> None:
        self.methods = tuple(resolve_sparse(name) for name in methods)
        kinds = dict.fromkeys(self.methods)
        known = [setting.name for kind in kinds for setting in kind.settings]
        for name in given:
            if name not in known:
                raise unknown(f"setting of {', '.join(kind.name for kind in kinds)}", name, known)
        self.settings = {
            name: np.zeros(len(methods)) for name in ("density", "every", "begin", "end", "alpha", "gamma")
        }
        for kind in kinds:
            own = [setting.name for setting in kind.settings]
            mine = np.array([one is kind for one in self.methods])
            for name, value in checked_settings(kind, {key: given[key] for key in given if key in own}).items():
                if value.ndim and tuple(value.shape) != (len(methods),):
                    raise MismatchError(
                        f"{name} has the shape {tuple(value.shape)}; give one number, or one for each of {len(methods)} runs"
                    )
                self.settings[name] = np.where(mine, value.double().numpy(), self.settings[name])
        self.thins = np.array([one.thins for one in self.methods])
        self.begin_density = np.where(self.thins, 1.0, self.settings["density"])
        self._moves = np.array([bool(one.grows) or one.thins for one in self.methods])
        self._gradient = np.array([one.grows == "gradient" for one in self.methods])

    def plan(self, before: np.ndarray, now: np.ndarray, total: np.ndarray) -> Plan | None:
        """What is due at steps ``now`` (N,) of ``total`` (N,), where the last look was at ``before`` (N,); None for nothing.

        An update is due when a multiple of ``every`` was passed, before the end; of gradual pruning, also at the end.
        """
        by, every = self.settings, np.maximum(self.settings["every"], 1)
        end = np.ceil(by["end"] * total)
        passed = (now // every > before // every) & np.where(self.thins, before < end, now < end)
        due = self._moves & (passed | (self.thins & (before < end) & (end <= now)))
        if not due.any():
            return None
        exchange = due & ~self.thins
        share = np.where(exchange, drop_fraction(now, np.maximum(end, 1), by["alpha"]), 0.0)
        gone = cubic_sparsity(now, by["begin"] * total, end, 1 - by["density"])
        density = np.where(due & self.thins, 1 - gone, 1.0)
        return Plan(due, share, density, exchange & self._gradient, np.where(exchange, by["gamma"], 0.0))


def sparse_layers(module: nn.Module, able: Iterable[str], wanted: Iterable[str] | None) -> tuple[str, ...]:
    """Names of the weights that sparse training is about: of linear layers and convolutions, or those that are wanted.

    Raises:
        UserError: there is none, one is unknown, or one has fewer than two axes.
    """
    shapes, able = {name: one.shape for name, one in module.named_parameters()}, set(able)
    plain = [name for name in initial_bounds(module) if name in able and len(shapes[name]) > 1]
    chosen = plain if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
    for name in chosen:
        if name not in able:
            raise unknown("parameter", name, able)
        if len(shapes[name]) < 2:
            raise UserError(f"{name} has the shape {tuple(shapes[name])}; masks are for weights of two or more axes")
    if not chosen:
        raise UserError("there is no weight of a linear layer or a convolution; give the names of layers")
    return tuple(chosen)


class Layers(NamedTuple):
    """Weights of a network, each (N, *shape) by name.

    Attributes:
        live: bool, those that live, among those that exist.
        exists: bool, those that are not of inactive units.
        weights: float.
    """

    live: Masks
    exists: Masks
    weights: Masks


def first_masks(exists: Masks, density: Tensor, distribution: str, draws: Draws) -> Masks:
    """Random live weights (N, *shape) by layer, as many as ``densities.live_counts`` says of a density (N,)."""
    found = {}
    for name, count in live_counts(exists, density, distribution).items():
        one = exists[name]
        scores = draws.uniform(one[0].numel())
        found[name] = thinned(one.flatten(1), scores, count).view(one.shape)
    return found


def updated_masks(
    layers: Layers, plan: Plan, slopes: Masks | None, distribution: str, draws: Draws, outputs: frozenset[str]
) -> Masks:
    """Which weights live after an update, (N, *shape) bool by layer.

    Args:
        layers: before it.
        plan: what it does.
        slopes: dense gradients (N, *shape) by layer; None where no run is exchanged by gradients.
        distribution: of what is left by pruning, among the layers.
        draws: for random exchanges.
        outputs: layers whose first axis is of units that can do without weights.
    """
    device = next(iter(layers.live.values())).device
    share, density, gamma = (torch.from_numpy(one.astype(np.float32)).to(device) for one in plan[1:3] + plan[4:])
    gradient = torch.from_numpy(plan.gradient).to(device)[:, None]
    random = bool((plan.share[~plan.gradient] > 0).any())
    most = live_counts(layers.exists, density, distribution) if (plan.density < 1).any() else {}
    found = {}
    for name, shape in ((name, one.shape) for name, one in layers.live.items()):
        live, exists, weights = (part[name].flatten(1) for part in layers)
        if plan.share.any():
            gain = draws.uniform(live.shape[1]) if random else torch.zeros_like(weights)
            if slopes is not None:
                gain = torch.where(gradient, slopes[name].flatten(1).abs(), gain)
            changed = exchanged(live, weights, gain, share, exists)
            if name in outputs and plan.gamma.any():
                by_unit = (len(live), shape[1], -1)
                of_units = exchanged_between_units(
                    live.view(by_unit), weights.reshape(by_unit), gain.view(by_unit), share, exists.view(by_unit), gamma
                )
                changed = torch.where(gamma[:, None] > 0, of_units.flatten(1), changed)
            live = changed
        if most:
            live = torch.where((density < 1)[:, None], thinned(live, weights, most[name]), live)
        found[name] = live.view(shape)
    return found
