"""Evidence about the units of a user's own module, gathered from batches without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.inner_training.module_parts import check_loss, examples_in
from trimtab.inner_training.structure.coupling import all_trainable
from trimtab.inner_training.structure.evidence import Evidence, averaged
from trimtab.inner_training.structure.gating import Gates
from trimtab.inner_training.structure.groups import Group
from trimtab.inner_training.structure.layer_inputs import (
    FIELDS,
    Layers,
    growth_fields,
    incoming_like,
    input_fields,
    split_field,
    unit_values,
)
from trimtab.inner_training.structure.reads import (
    AJAR,
    Read,
    Reads,
    activity,
    by_example,
    outputs_and_gradients,
    units_of,
)
from trimtab.inner_training.structure.running import without_trace
from trimtab.inner_training.structure.second_order import Loss, flows, hessian_fields, squares
from trimtab.inner_training.structure.watching import watchable, watching

WEIGHTS = frozenset(("alive", "weights_in", "bias", "weights_out"))
FLOWS = frozenset(("flow_in", "flow_out"))
ACTIVITY = frozenset(("mean_abs", "mean", "square", "active", "agf", "agf_first", "taylor", "signed", "output_cov"))
OPTIONAL = frozenset(("bias", "grad_bias", "square_bias", "hv_bias", "next_grad"))  # there may be none


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be gathered.

    Attributes:
        needs: fields of ``Evidence``.
        names: of the groups.
        example: the example input, for SynFlow.
        why: who needs it, for messages.
        draws: for Hutchinson's estimate.
    """

    needs: frozenset[str]
    names: tuple[str, ...]
    example: Any
    why: str
    draws: torch.Generator


def gather(gates: Gates, request: Request, batches: Iterable[Any] | None, loss_fn: Loss | None) -> dict[str, Evidence]:
    """Evidence by group: weights as they are, all else in evaluation mode, averaged over batches.

    Inactive units are opened by a crack of 2**-20, with their parked weights, and what is found of them is divided by it.
    Modes, buffers, gradients, weights and random states are as before, also after an error.

    Raises:
        UserError: batches or a loss are missing, the loss is no scalar, or a group lacks a field that is needed.
        MismatchError: see ``Gates.check_same``.
    """
    gates.check_same()
    groups = [gates.groups[name] for name in request.names]
    moving = request.needs - WEIGHTS - FLOWS
    if moving and (batches is None or loss_fn is None):
        raise UserError(f"{request.why} reads {', '.join(sorted(moving))}; give batches and loss_fn")
    check_batches(batches)
    if moving and not (callable(loss_fn) and isinstance(batches, Iterable)):
        kinds = type(batches).__name__, type(loss_fn).__name__
        raise UserError(
            f"batches is a {kinds[0]} and loss_fn a {kinds[1]}; give an iterable of batches, and a function of model and batch"
        )
    fixed = {group.name: weights_of(gates, group) for group in groups}
    seen = {group.name for group in groups if watchable(gates.model, group)}
    blind = sorted(set(request.names) - seen)
    if blind and moving & (ACTIVITY | FIELDS):
        raise UserError(f"{request.why} reads activations, which cannot be seen in {blind[0]}; choose other groups")
    with _ready(gates, set(gates.groups)):
        if request.needs & FLOWS:
            _add_flows(gates, groups, request, fixed)
        if not moving or batches is None or loss_fn is None:
            return {name: made(fields) for name, fields in fixed.items()}
        parts = [_Batch(gates, groups, request, moving, loss_fn).gathered(batch) for batch in batches]
    if not parts:
        raise UserError(f"{request.why} needs batches, and there is none; give at least one")
    return {name: averaged(made(fixed[name] | part[name]) for part in parts) for name in request.names}


def check_batches(batches: object) -> None:
    """Refuses one batch in place of several.

    Raises:
        UserError: a tensor or a mapping, of which each row or key would be taken for a batch.
    """
    if isinstance(batches, Tensor | Mapping):
        raise UserError(
            f"batches is a {type(batches).__name__}, whose rows or keys would be taken for batches; give a list of batches, "
            "such as [batch]"
        )


def listed(batches: Iterable[Any] | None) -> Iterable[Any] | None:
    """Batches that can be read more than once.

    Raises:
        UserError: see ``check_batches``.
    """
    check_batches(batches)
    return list(batches) if isinstance(batches, Iterable) else batches


def made(fields: Mapping[str, Tensor]) -> Evidence:
    """Evidence of one batch from its fields."""
    values: dict[str, Any] = dict(fields)
    return Evidence(**values)


@contextmanager
def _ready(gates: Gates, names: set[str]) -> Iterator[None]:
    model = gates.model
    opened = {name for name in names if watchable(model, gates.groups[name])}
    with without_trace(model), gates.opened(opened), all_trainable(model), torch.enable_grad():
        yield


def weights_of(gates: Gates, group: Group) -> dict[str, Tensor]:
    """The fields of a group's weights as they are now; inactive units have their parked ones."""
    names = {member.parameter for member in group.members}
    values = incoming_like(group, {name: gates.virtual(name, {group.name}) for name in names})
    fields = {
        "weights_in": values["in"],
        "weights_out": values["out"],
        "alive": gates.active[group.name].to(values["in"].device),
    }
    return {**fields, "bias": values["bias"]} if "bias" in values else fields


def _scale(gates: Gates, group: Group, device: torch.device) -> Tensor:
    """(units, 1) what findings about each unit are multiplied with."""
    return torch.where(gates.active[group.name], 1.0, 1 / AJAR).to(device)[:, None]


def _add_flows(gates: Gates, groups: list[Group], request: Request, fixed: dict[str, dict[str, Tensor]]) -> None:
    with watching(gates.model, gates.groups.values(), Reads(gates, keep=False)):
        found = flows(gates.model, request.example)
    for group in groups:
        values = incoming_like(group, found)
        for side in ("in", "out"):
            fixed[group.name][f"flow_{side}"] = values[side] * _scale(gates, group, values[side].device)


class _Batch:
    """Gathers the fields of one batch."""

    def __init__(
        self, gates: Gates, groups: list[Group], request: Request, needs: frozenset[str], loss_fn: Loss
    ) -> None:
        self._gates, self._groups, self._request, self._needs = gates, groups, request, needs
        self._loss, self._model = loss_fn, gates.model

    def gathered(self, batch: Any) -> dict[str, dict[str, Tensor]]:
        """The fields by group."""
        examples = examples_in(batch) or 1
        fields: dict[str, dict[str, Tensor]] = {group.name: {} for group in self._groups}
        kinds = {need.rpartition("_")[0] for need in self._needs if need.endswith(("_in", "_bias", "_out"))}
        if self._needs & (ACTIVITY | FIELDS) or "grad" in kinds:
            self._first_order(batch, examples, "grad" in kinds, fields)
        everyone = self._gates.groups.values()
        with watching(self._model, everyone, Reads(self._gates, keep=False)):
            if "square" in kinds:
                names = sorted({member.parameter for group in self._groups for member in group.members})
                names = [name for name in names if isinstance(self._gates.tensor(name), torch.nn.Parameter)]
                self._add(fields, "square", squares(self._model, self._loss, batch, examples, names), power=2)
            if kinds & {"hv", "hess"}:
                found = hessian_fields(
                    self._model, lambda: self._value(batch), kinds & {"hv", "hess"}, self._request.draws
                )
                for kind, values in found.items():
                    self._add(fields, kind, values, power=2 if kind == "hess" else 1)
        for name, own in fields.items():
            missing = sorted(self._needs - own.keys() - OPTIONAL)
            if missing:
                raise UserError(
                    f"{self._request.why} reads {missing[0]}, which cannot be had of {name}; choose other groups"
                )
        return {name: {key: own[key] for key in own.keys() & self._needs} for name, own in fields.items()}

    def _value(self, batch: Any) -> Tensor:
        loss = check_loss(self._loss(self._model, batch), type(self._model).__name__)
        if not loss.requires_grad:
            raise UserError(
                f"the loss of {type(self._model).__name__} has no gradient; return what follows from model(...), not detached"
            )
        return loss

    def _first_order(self, batch: Any, examples: int, weights: bool, fields: dict[str, dict[str, Tensor]]) -> None:
        reads, layers = Reads(self._gates, keep=True), Layers()
        with ExitStack() as stack:
            stack.enter_context(watching(self._model, self._gates.groups.values(), reads))
            for hook in layers.watch(self._model, self._groups) if self._needs & FIELDS else ():
                stack.callback(hook.remove)
            loss = self._value(batch)
        parameters = {name: one for name, one in self._model.named_parameters() if weights and one.requires_grad}
        wanted = [read.after for read in reads.seen] + list(layers.outputs.values()) + list(parameters.values())
        found = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph="split" in self._needs)
        slopes = {id(one): slope for one, slope in zip(wanted, found, strict=True) if slope is not None}
        for group in self._groups:
            own = [read for read in reads.seen if read.group is group]
            if own:
                fields[group.name] |= self._of_reads(group, own, layers, slopes, examples)
        if weights:
            zeros = {name: slopes.get(id(one), torch.zeros_like(one)) for name, one in parameters.items()}
            self._add(fields, "grad", zeros)

    def _of_reads(
        self, group: Group, own: list[Read], layers: Layers, slopes: Mapping[int, Tensor], examples: int
    ) -> dict[str, Tensor]:
        h, g = outputs_and_gradients(own, slopes, examples, self._model)
        fields = activity(h, g, examples)
        if "pre_grad" in self._needs:
            fields["pre_grad"] = self._before_activation(group, g, layers, slopes, examples)
        if self._needs & {"input_norm", "input_cov"}:
            fields |= input_fields(self._model, group, layers, examples)
        if self._needs & {"bypass", "next_grad"}:
            fields |= growth_fields(self._model, group, layers, slopes, examples)
        if "split" in self._needs and len(own) == 1:
            graph = units_of(by_example(own[0].before.float(), own[0].axis, examples), own[0].member)
            fields |= split_field(self._model, group, layers, (graph, h, g), examples)
        return fields

    def _before_activation(
        self, group: Group, g: Tensor, layers: Layers, slopes: Mapping[int, Tensor], examples: int
    ) -> Tensor:
        """(units,) E|dL/dz|, or E|dL/dh| where z is not to be had."""
        place = unit_values(self._model, group, layers)
        if place is None or id(layers.outputs[place[0]]) not in slopes:
            return g.abs().mean((0, 2))
        slope = by_example(slopes[id(layers.outputs[place[0]])].float() * examples, place[1], examples)
        chosen = slope[:, place[2].flatten().to(slope.device)].abs().view(len(slope), group.units, -1)
        return chosen.mean((0, 2)) * _scale(self._gates, group, slope.device)[:, 0]

    def _add(
        self, fields: dict[str, dict[str, Tensor]], kind: str, values: Mapping[str, Tensor], power: int = 1
    ) -> None:
        """Adds what has the shapes of parameters, of the groups' units."""
        for group in self._groups:
            for side, found in incoming_like(group, values).items():
                scale = _scale(self._gates, group, found.device) ** power
                fields[group.name][f"{kind}_{side}"] = found * (scale[:, 0] if side == "bias" else scale)
