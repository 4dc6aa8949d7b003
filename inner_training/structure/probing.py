"""Groups checked on the module itself: that their members are all that computes their units and all that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trimtab.inner_training.structure.groups import Group, Member, find_tensor
from trimtab.inner_training.structure.running import call_on, outputs_of
from trimtab.inner_training.structure.watching import watching

TOLERANCE = 1e-5  # of the largest output: what rounding may change
SEED = 20260515

Inputs = list[tuple[Group, Member, Tensor]]  # what each column reads, units' axis first


class Probe:
    """Changes weights of units at random, and looks at what else changes.

    Of each group half of the units are probed. Their columns are zero throughout, so that nothing should depend on them.

    1. Their rows and vectors change: the outputs must not, and neither must what columns read of other units. Else
       somebody reads them whom the group does not know, or they influence each other, as in attention or a softmax.
    2. Their rows and vectors are zero, and the example changes: what columns read of them must not. Else something else
       feeds them, such as the model's input through a residual connection.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self._model, self._example = model, example
        self._draws = torch.Generator().manual_seed(SEED)

    def failing(self, groups: Sequence[Group]) -> dict[str, str]:
        """Why groups do not hold what they promise, by name; at first all are probed at once, then each that is left."""
        if not groups or self._verdict(groups) is None:
            return {}
        reasons = {group.name: self._verdict([group]) for group in groups}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def _verdict(self, groups: Sequence[Group]) -> str | None:
        chosen = {
            group.name: torch.randperm(group.units, generator=self._draws)[: group.units // 2] for group in groups
        }
        with self._restored(groups), torch.no_grad():
            self._fill(groups, chosen, ("column",), None)
            before, inputs_before = self._run(groups, self._example)
            self._fill(groups, chosen, ("row", "vector"), self._draws)
            self._fill(groups, chosen, ("column",), None)  # a row's entry may be the column's of another group
            after, inputs_after = self._run(groups, self._example)
            for one, other in zip(inputs_before, inputs_after, strict=True):
                rest = _positions(one, chosen, others=True)
                if not _same([one[2][rest]], [other[2][rest]]):
                    return "its units influence each other, so they cannot move one by one"
            if not _same(before, after):
                return "what its units compute reaches the outputs by other ways than the weights that read them"
            self._fill(groups, chosen, ("row", "vector"), None)
            _, inputs_before = self._run(groups, self._example)
            _, inputs_after = self._run(groups, self._another())
            for one, other in zip(inputs_before, inputs_after, strict=True):
                own = _positions(one, chosen, others=False)
                if one[2].shape != other[2].shape or not _same([one[2][own]], [other[2][own]]):
                    return (
                        "something beside its own weights feeds its units, such as a connection from the model's input"
                    )
        return None

    @contextmanager
    def _restored(self, groups: Sequence[Group]) -> Iterator[None]:
        names = {member.parameter for group in groups for member in group.members}
        saved = [(tensor, tensor.detach().clone()) for tensor in (find_tensor(self._model, name) for name in names)]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, values in saved:
                    tensor.copy_(values)

    def _fill(
        self, groups: Sequence[Group], chosen: dict[str, Tensor], roles: tuple[str, ...], draws: torch.Generator | None
    ) -> None:
        """Puts entries of the chosen units to zero, or to normal numbers if ``draws`` are given."""
        for group in groups:
            units = chosen[group.name]
            for member in group.members:
                if member.role in roles:
                    tensor = find_tensor(self._model, member.parameter)
                    values = torch.zeros(len(units), member.of(tensor).shape[1])
                    member.put(tensor, units, values if draws is None else values.normal_(generator=draws))

    def _run(self, groups: Sequence[Group], example: Any) -> tuple[list[Tensor], Inputs]:
        """Outputs, and what columns read, in the order of the calls."""
        seen: Inputs = []

        def see(group: Group, member: Member, values: Tensor, axis: int) -> Tensor:
            seen.append((group, member, values.detach().movedim(axis, 0).clone()))
            return values

        with watching(self._model, groups, see):
            return outputs_of(call_on(self._model, example), self._model), seen

    def _another(self) -> Any:
        """The example with other values: noise on floats, and whole numbers in another order."""

        def other(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.is_floating_point():
                return leaf + torch.randn(leaf.shape, generator=self._draws).to(leaf.device, leaf.dtype)
            return leaf if leaf.dtype == torch.bool else leaf.flip(tuple(range(leaf.ndim)))

        return pytree.tree_map(other, self._example)


def _positions(read: tuple[Group, Member, Tensor], chosen: dict[str, Tensor], others: bool) -> Tensor:
    """Bool over the first axis of what a column reads: positions of the chosen units, or all others."""
    group, member, values = read
    own = torch.zeros(len(values), dtype=torch.bool)
    own[member.index[chosen[group.name]].flatten()] = True
    return ~own if others else own


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(
        a.shape == b.shape
        and torch.allclose(
            a, b, rtol=0, atol=TOLERANCE * float(a.abs().nan_to_num(0, 0, 0).max().clamp(min=1e-3)), equal_nan=True
        )
        for a, b in zip(one, other, strict=True)
        if a.numel()
    )
