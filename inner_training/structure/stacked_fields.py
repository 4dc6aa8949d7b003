"""Fields of evidence of all runs at once, from one batch: each computed for one run, inside ``vmap``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from trimtab.errors import UserError
from trimtab.inner_training.curvature import hessian_times
from trimtab.inner_training.stateless import stateless
from trimtab.inner_training.streams import draw_words
from trimtab.inner_training.structure.collect import ACTIVITY, WEIGHTS
from trimtab.inner_training.structure.evidence import FREQUENT
from trimtab.inner_training.structure.groups import Group, Member
from trimtab.inner_training.structure.layer_inputs import (
    FIELDS,
    Layers,
    growth_fields,
    incoming_like,
    input_fields,
    unit_values,
)
from trimtab.inner_training.structure.reads import AJAR, by_example, units_of
from trimtab.inner_training.structure.second_order import PROBES
from trimtab.inner_training.structure.taps import Seen, Site, Taps, read_name, shapes_of, tapped
from trimtab.inner_training.structure.watching import examples_apart, watchable
from trimtab.inner_training.task import TaskFamily

CHUNK = 2**25  # numbers that gradients of single examples may take at a time
UNBATCHED = {
    "split": "matrices of the size of a row for each unit, whose activation function is found by comparing values"
}
Fields = dict[str, dict[str, Tensor]]


class Batch(NamedTuple):
    """Examples of all runs: x (N, B, *shape), y (N, B, ...), and weight (N, B), which sums to 1 or is 0."""

    x: Tensor
    y: Tensor
    weight: Tensor


class State(NamedTuple):
    """Runs to be looked at.

    Attributes:
        parameters: (N, *shape) by name, with parked values for inactive units.
        buffers: (N, *shape) by name, with the gates of inactive units open.
        active: (N, U) bool by group.
        seeds: (N,) int64, of Hutchinson's signs.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    active: dict[str, Tensor]
    seeds: Tensor


@dataclass(frozen=True)
class Gathering:
    """What is gathered of which groups of a family's module.

    Attributes:
        family: of the population.
        groups: all groups of the module.
        names: those that are looked at.
        needs: fields of ``Evidence``.
        why: who needs them, for messages.
    """

    family: TaskFamily
    groups: tuple[Group, ...]
    names: tuple[str, ...]
    needs: frozenset[str]
    why: str

    @property
    def moving(self) -> frozenset[str]:
        """Needs that are not known from weights alone."""
        return self.needs - WEIGHTS

    def check(self) -> None:
        """Refuses what cannot be had.

        Raises:
            UserError: a field that is not to be had of many runs at once, or of a group.
        """
        for need in sorted(self.needs & UNBATCHED.keys()):
            raise UserError(
                f"{self.why} reads {need!r}, which populations do not gather ({UNBATCHED[need]}); choose another"
            )
        blind = [one.name for one in self.chosen if not watchable(self.family.module, one)]
        if blind and self.moving & (ACTIVITY | FIELDS):
            raise UserError(f"{self.why} reads activations, which cannot be seen in {blind[0]}; choose other groups")

    @property
    def chosen(self) -> list[Group]:
        """The groups that are looked at."""
        return [group for group in self.groups if group.name in self.names]

    @property
    def kinds(self) -> set[str]:
        """Of gradients of weights: ``grad``, ``square``, ``hess``, ``hv``, ``flow``."""
        return {need.rpartition("_")[0] for need in self.needs if need.endswith(("_in", "_bias", "_out"))} - {"weights"}


class RunFields:
    """Gathers the fields of one batch; methods with one underscore see a single run inside ``vmap``."""

    def __init__(self, gathering: Gathering, batch: Batch) -> None:
        self._of, self._module = gathering, gathering.family.module
        self._call, self._kinds = stateless(self._module), gathering.kinds
        self._first = bool(gathering.needs & (ACTIVITY | FIELDS)) or "grad" in self._kinds
        owners = {one.owner for group in gathering.chosen for one in group.members if one.role != "statistic"}
        looked = bool(gathering.needs & FIELDS)
        self._layers = sorted(owners) if looked else []
        for member in (member for group in gathering.groups for member in group.members):
            _ = member.in_order, member.last  # known before a compiler looks on
        self._shapes: dict[str, torch.Size] = {}
        self._sites: list[Site] = []
        if gathering.needs & (ACTIVITY | FIELDS):
            device = next(self._module.parameters()).device
            found = shapes_of(self._module, gathering.groups, self._layers, batch.x[0].to(device))
            self._shapes, self._sites = found

    def fields(self, state: State, batch: Batch) -> Fields:
        """The fields by group, each with the runs first."""
        fields: Fields = {name: {} for name in self._of.names}
        for kind, work, chunk in self._work(batch):
            for name, own in vmap(work, chunk_size=chunk)(state, batch).items():
                scale = torch.where(state.active[name], 1.0, 1 / AJAR)
                fields[name] |= own if kind == "" else _rescaled(kind, own, scale)
        return fields

    def _work(self, batch: Batch) -> Iterator[tuple[str, Callable[..., Fields], int | None]]:
        if self._first:
            yield "", self._first_order, None
        if "square" in self._kinds:
            size = sum(parameter.numel() for parameter in self._module.parameters()) * batch.x.shape[1]
            yield "square", self._squares, max(1, CHUNK // size)
        for kind in ("hv", "hess", "flow"):
            if kind in self._kinds:
                yield kind, getattr(self, f"_{kind}"), None

    def _loss(self, parameters: Any, state: State, batch: Batch, zeros: Mapping[str, Tensor], seen: Seen) -> Tensor:
        with tapped(self._module, self._of.groups, self._layers if zeros else (), Taps(state.active, zeros, seen)):
            outputs = self._call(parameters, state.buffers, batch.x)
        loss: Tensor = (self._of.family.loss(outputs, batch.y) * batch.weight).sum()
        return loss

    def _first_order(self, state: State, batch: Batch) -> Fields:
        zeros = {name: torch.zeros(shape, device=batch.x.device) for name, shape in self._shapes.items()}

        def loss(zeros: Any, parameters: Any) -> tuple[Tensor, Any]:
            seen = Seen()
            value = self._loss(parameters, state, batch, zeros, seen)
            return value, (seen.reads, seen.inputs)

        wanted = (0, 1) if "grad" in self._kinds else (0,)
        slopes, (reads, inputs) = grad(loss, argnums=wanted, has_aux=True)(zeros, state.parameters)
        fields: Fields = {}
        for group in self._of.chosen:
            own: dict[str, Tensor] = {}
            if self._shapes:
                own |= self._of_reads(group, reads, slopes[0], batch.weight)
                if self._layers:
                    own |= self._of_layers(group, own, (inputs, zeros, slopes[0]), state, batch.weight)
            if "grad" in self._kinds:
                scale = torch.where(state.active[group.name], 1.0, 1 / AJAR)
                like = incoming_like(group, slopes[1])
                own |= {
                    f"grad_{side}": value * (scale if side == "bias" else scale[:, None])
                    for side, value in like.items()
                }
            fields[group.name] = {key: own[key] for key in own.keys() & self._of.needs}
        return fields

    def _of_reads(
        self, group: Group, reads: list[Tensor], slopes: Mapping[str, Tensor], weight: Tensor
    ) -> dict[str, Tensor]:
        """The fields of activity, and E|dL_b/dh| under ``pre_grad``; a slope is the example's gradient times its weight."""
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        share = torch.ones_like(weight[:1])
        for place, site in enumerate(self._sites):
            if site.group is group:
                share = weight if examples_apart(self._module, site.member) else share
                for kept, values in ((outputs, reads[place]), (gradients, slopes[read_name(place)])):
                    kept.append(_units(by_example(values, site.axis, len(share)), site.member))
        h, g = (one[0] if len(one) == 1 else torch.cat(one, 2) for one in (outputs, gradients))
        formulas: dict[str, Callable[[], Tensor]] = {
            "mean_abs": lambda: share @ h.abs().mean(2),
            "mean": lambda: share @ h.mean(2),
            "square": lambda: share @ h.square().mean(2),
            "active": lambda: share @ (h > FREQUENT).to(h.dtype).mean(2),
            "agf": lambda: (h * g).abs().sum((0, 2)),
            "agf_first": lambda: (h * g).abs().sum((0, 2)),
            "taylor": lambda: (h * g).sum(2).abs().sum(0),
            "signed": lambda: (h * g).sum((0, 2)),
            "pre_grad": lambda: g.abs().sum(0).mean(1),
            "output_cov": lambda: torch.einsum("bus,bvs->uv", share[:, None, None] * h, h) / h.shape[2],
        }
        return {name: formula() for name, formula in formulas.items() if name in self._of.needs}

    def _of_layers(
        self, group: Group, own: Mapping[str, Tensor], passed: tuple[Any, ...], state: State, weight: Tensor
    ) -> dict[str, Tensor]:
        inputs, zeros, slopes = passed
        examples, found = len(weight), {}
        outputs = {name: zeros[name] for name in zeros if name in self._layers}  # in the order of their calls
        known = {id(zeros[name]): slopes[name] for name in outputs}
        if "pre_grad" in self._of.needs:
            place = unit_values(self._module, group, Layers(outputs=outputs))
            if place is not None:
                slope = by_example(slopes[place[0]], place[1], examples)
                chosen = slope[:, place[2].flatten().to(slope.device)].abs().view(len(slope), group.units, -1)
                found["pre_grad"] = chosen.sum(0).mean(1) * torch.where(state.active[group.name], 1.0, 1 / AJAR)
        if self._of.needs & {"input_norm", "input_cov"}:
            scaled = {
                name: values * _root(weight, len(values)).view(-1, *[1] * (values.ndim - 1))
                for name, values in inputs.items()
            }
            found |= input_fields(self._module, group, Layers(inputs=scaled), examples)
        if self._of.needs & {"bypass", "next_grad"}:
            found |= growth_fields(self._module, group, Layers(inputs, outputs), known, examples)
        return found

    def _like(self, values: Mapping[str, Tensor]) -> Fields:
        return {group.name: incoming_like(group, values) for group in self._of.chosen}

    def _squares(self, state: State, batch: Batch) -> Fields:
        def of_one(parameters: Any, x: Tensor, y: Tensor) -> Tensor:
            return self._loss(parameters, state, Batch(x[None], y[None], torch.ones_like(batch.weight[:1])), {}, Seen())

        slopes = vmap(grad(of_one), in_dims=(None, 0, 0))(state.parameters, batch.x, batch.y)
        return self._like({name: torch.tensordot(batch.weight, slope.square(), 1) for name, slope in slopes.items()})

    def _of_weights(self, state: State, batch: Batch) -> Callable[[Any], Tensor]:
        return lambda parameters: self._loss(parameters, state, batch, {}, Seen())

    def _hv(self, state: State, batch: Batch) -> Fields:
        loss = self._of_weights(state, batch)
        return self._like(hessian_times(loss, state.parameters, grad(loss)(state.parameters)))

    def _hess(self, state: State, batch: Batch) -> Fields:
        loss = self._of_weights(state, batch)
        total = {name: torch.zeros_like(value) for name, value in state.parameters.items()}
        for number in range(PROBES):
            signs = _signs(state, number)
            turned = hessian_times(loss, state.parameters, signs)
            total = {name: value + signs[name] * turned[name] / PROBES for name, value in total.items()}
        return self._like(total)

    def _flow(self, state: State, batch: Batch) -> Fields:
        x = torch.ones_like(batch.x) if batch.x.is_floating_point() else batch.x
        buffers = {name: one.abs() if one.is_floating_point() else one for name, one in state.buffers.items()}

        def total(parameters: Any) -> Tensor:
            with tapped(self._module, self._of.groups, (), Taps(state.active, {}, Seen())):
                outputs: Tensor = self._call(parameters, buffers, x)
            return torch.tensordot(batch.weight, outputs.flatten(1), 1).sum()

        return self._like(grad(total)({name: one.abs() for name, one in state.parameters.items()}))


def _signs(state: State, number: int) -> dict[str, Tensor]:
    """Random signs by name, of one run's seed."""
    found = {}
    for place, (name, value) in enumerate(state.parameters.items()):
        counter = torch.arange(value.numel(), device=value.device)
        word = draw_words(state.seeds ^ (number * 4096 + place), counter)
        found[name] = (((word >> 16) & 1) * 2 - 1).to(value.dtype).view(value.shape)
    return found


def _units(values: Tensor, member: Member) -> Tensor:
    """(B, U, k S) of features (B, F, S), see ``units_of``; without a copy where all lie in order."""
    if values.shape[1] == member.index.numel() and member.in_order:
        return values.reshape(len(values), len(member.index), -1)
    return units_of(values, member)


def _root(weight: Tensor, rows: int) -> Tensor:
    """(rows,) factors under which plain means of squares become weighted ones; rows are examples, or tokens of each."""
    return (weight * len(weight)).sqrt().repeat_interleave(rows // len(weight))


def _rescaled(kind: str, own: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
    """Fields of gradients (N, U, ...), of units opened by a crack as of open ones."""
    power = 2 if kind in ("square", "hess") else 1
    factor = scale**power
    return {f"{kind}_{side}": value * (factor if side == "bias" else factor[..., None]) for side, value in own.items()}
