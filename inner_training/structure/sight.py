"""What units put out, and what gradient they get, seen in passing while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.inner_training.structure.collect import weights_of
from trimtab.inner_training.structure.coupling import all_trainable
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.gating import Gates
from trimtab.inner_training.structure.groups import Group, Member, split
from trimtab.inner_training.structure.layer_inputs import Layers, unit_values
from trimtab.inner_training.structure.running import without_trace
from trimtab.inner_training.structure.second_order import Loss
from trimtab.inner_training.structure.watching import watchable, watching


class Sight:
    """Collects, from the forward and backward passes of one step, what is read of the units of groups.

    Args:
        model: the module.
        groups: that are watched.
        outputs: whether outputs are kept.
        gradients: whether gradients before the activation function are kept; behind it where the other cannot be had.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], *, outputs: bool, gradients: bool) -> None:
        self._model, self._groups = model, list(groups)
        self._outputs, self._gradients = outputs, gradients
        self._read: dict[int, list[Tensor]] = {}  # by the column
        self._slopes: dict[str, list[Tensor]] = {group.name: [] for group in groups}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, forward passes are seen, and backward passes of these."""
        layers, slopes = Layers(), dict[str, list[Tensor]]()
        pulls: dict[str, list[Tensor]] = {group.name: [] for group in self._groups}

        def see(group: Group, member: Member, values: Tensor, axis: int) -> Tensor:
            index = member.index.to(values.device)
            if self._outputs:
                flat = values.detach().movedim(axis, -1).flatten(0, -2).index_select(1, index.flatten())
                self._read.setdefault(id(member), []).append(flat.float().view(-1, *index.shape))
            if self._gradients and values.requires_grad:
                values = values.view_as(values)
                _on_gradient(values, lambda slope: pulls[group.name].append(_sizes(slope, axis, index)))
            return values

        with ExitStack() as stack:
            stack.enter_context(watching(self._model, self._groups, see))
            owners = {member.owner for group in self._groups for member in group.members if member.role != "statistic"}
            for name in sorted(owners) if self._gradients else ():
                hook = self._model.get_submodule(name).register_forward_hook(_slope_hook(name, layers, slopes))
                stack.callback(hook.remove)
            yield
        for group in self._groups if self._gradients else ():
            place = unit_values(self._model, group, layers)
            if place is not None and place[0] in slopes:
                pulls[group.name] = [_sizes(slope, place[1], place[2]) for slope in slopes[place[0]]]
            self._slopes[group.name] += pulls[group.name]

    def outputs(self, group: Group) -> tuple[Tensor, ...]:
        """(P, units, k) for each column; zeros where a column read nothing. Empty where no column did."""
        found = [self._read.get(id(column), []) for column in group.of_role("column")]
        if not any(found):
            return ()
        device = next(one[0].device for one in found if one)
        none = [torch.zeros(1, group.units, column.each, device=device) for column in group.of_role("column")]
        return tuple(torch.cat(one) if one else zeros for one, zeros in zip(found, none, strict=True))

    def gradient(self, group: Group) -> Tensor | None:
        """(units,) mean |dL/dz|, or |dL/dh|, up to one factor for all units; None where no backward pass was seen."""
        found = self._slopes[group.name]
        return torch.stack(found).mean(0) if found else None


def _slope_hook(name: str, layers: Layers, slopes: dict[str, list[Tensor]]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            layers.outputs[name] = output
            # Told to now, torch gives the gradient from before an activation in place.
            _on_gradient(output, lambda slope: slopes.setdefault(name, []).append(slope))

    return hook


def _on_gradient(values: Tensor, tell: Callable[[Tensor], None]) -> None:
    def hook(slope: Tensor) -> None:
        tell(slope.detach())

    values.register_hook(hook)  # type: ignore[no-untyped-call]


def _sizes(slope: Tensor, axis: int, index: Tensor) -> Tensor:
    """(units,) mean size of a gradient over everything that belongs to a unit: (units, k) positions along an axis."""
    index = index.to(slope.device)
    chosen = slope.movedim(axis, 0).index_select(0, index.flatten())
    return chosen.abs().float().reshape(len(index), -1).mean(1)


def mean_abs(outputs: Sequence[Tensor]) -> Tensor:
    """(..., U) E|h| over everything that is read of the units.

    Args:
        outputs: (..., P, U, k) for each reader.

    >>> mean_abs([torch.tensor([[[1.0], [-2.0]], [[3.0], [0.0]]])])
    tensor([2., 1.])
    """
    sizes = [one.abs().mean(-1) for one in outputs]
    return torch.cat(sizes, -2).mean(-2)


def looked_at(model: nn.Module, batch: Any, loss_fn: Loss, sight: Sight) -> None:
    """Shows a batch to a sight of outputs; the model stays as it was, and is in evaluation mode meanwhile."""
    # With gradients, as torch computes attention by a way of its own without them, which cannot be seen.
    with without_trace(model), all_trainable(model), torch.enable_grad(), sight.open():
        loss_fn(model, batch)


def passed_on(gates: Gates, group: Group, means: Tensor) -> Evidence:
    """What each weight of the columns passes on of mean outputs, which differ from position to position, for ``compensated``.

    Args:
        gates: with the weights.
        group: of units.
        means: (units, K) for the k positions of each column, one column after the other.
    """
    found = weights_of(gates, group)["weights_out"]
    columns = group.of_role("column")
    shapes = {column.parameter: gates.tensor(column.parameter).shape for column in columns}
    each = torch.split(means.to(found.device), [column.each for column in columns], 1)
    parts = [
        (values.reshape(*mean.shape, -1) * mean[..., None]).flatten(1)
        for (_, values), mean in zip(split(columns, shapes, found), each, strict=True)
    ]
    return Evidence(weights_out=torch.cat(parts, 1), mean=torch.ones_like(found[:, 0]))


def passed_on_average(
    gates: Gates, names: Iterable[str], batches: Iterable[Any] | None, loss_fn: Loss | None
) -> dict[str, Evidence]:
    """``passed_on`` by group, of the mean outputs on batches.

    Raises:
        UserError: there is no batch or no loss, or what a group puts out cannot be seen.
    """
    groups = {name: gates.groups[name] for name in names}
    blind = [name for name, group in groups.items() if not watchable(gates.model, group)]
    if blind:
        raise UserError(f"compensation reads activations, which cannot be seen in {blind[0]}; choose other groups")
    if batches is None or loss_fn is None:
        raise UserError("compensation reads what units put out; give batches and loss_fn")
    means: dict[str, list[Tensor]] = {name: [] for name in groups}
    for batch in batches:
        sight = Sight(gates.model, list(groups.values()), outputs=True, gradients=False)
        looked_at(gates.model, batch, loss_fn, sight)
        for name, group in groups.items():
            outputs = sight.outputs(group)
            means[name] += [torch.cat([one.mean(0) for one in outputs], 1)] if outputs else []
    if not all(means.values()):
        raise UserError("compensation has seen nothing of the units; give at least one batch, and a loss of the model")
    return {name: passed_on(gates, group, torch.stack(means[name]).mean(0)) for name, group in groups.items()}
