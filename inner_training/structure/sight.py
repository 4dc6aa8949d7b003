"""What units put out, and what gradient they get, seen in passing while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.inner_training.structure.groups import Group, Member
from trimtab.inner_training.structure.layer_inputs import Layers, unit_values
from trimtab.inner_training.structure.watching import watching


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
