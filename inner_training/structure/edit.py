"""Reversible edits: a record of what an edit may touch is taken before it, and put back to undo it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.inner_training.structure import state
from trimtab.inner_training.structure.gating import Gates


@dataclass(frozen=True)
class Entries:
    """The entries of one tensor that an edit may touch, as they were before it."""

    where: Tensor  # flat positions
    values: Tensor
    gradient: Tensor | None
    parked: Tensor | None
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Record:
    """What an edit found."""

    step: int
    entries: dict[str, Entries]
    active: dict[str, Tensor]
    born: dict[str, Tensor]
    live: dict[str, Tensor]


def _flat(tensor: Tensor | None, where: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.detach().reshape(-1)[where].clone()


def take_record(gates: Gates, touched: Mapping[str, Tensor]) -> Record:
    """Notes everything that an edit of the marked entries can change.

    Args:
        gates: the gates before the edit.
        touched: bool by tensor name, of the tensor's shape.
    """
    entries = {}
    for name, mask in touched.items():
        tensor = gates.tensor(name)
        where = mask.reshape(-1).nonzero()[:, 0].to(tensor.device)
        values = _flat(tensor, where)
        assert values is not None
        held = state.entries(gates.optimizer, tensor) if isinstance(tensor, nn.Parameter) else {}
        kept = {key: saved for key, value in held.items() if (saved := _flat(value, where)) is not None}
        gradient = tensor.grad if isinstance(tensor, nn.Parameter) else None
        entries[name] = Entries(where, values, _flat(gradient, where), _flat(gates.parked.get(name), where), kept)
    return Record(
        step=gates.steps,
        entries=entries,
        active={name: mask.clone() for name, mask in gates.active.items()},
        born={name: steps.clone() for name, steps in gates.born.items()},
        live={name: mask.clone() for name, mask in gates.live.items()},
    )


def put_flat(tensor: Tensor, where: Tensor, values: Tensor | float) -> None:
    """Writes values at flat positions of a tensor, in place, whatever its layout in memory."""
    if isinstance(values, Tensor):
        values = values.to(tensor.device, tensor.dtype)
    if tensor.is_contiguous():
        tensor.view(-1)[where.to(tensor.device)] = values
    else:
        flat = tensor.reshape(-1).clone()
        flat[where.to(tensor.device)] = values
        tensor.copy_(flat.view(tensor.shape))


@torch.no_grad()
def put_back(gates: Gates, record: Record) -> None:
    """Puts touched entries back to what they were; all others stay as they are now.

    Optimizer state that came into being after the record begins anew at the touched entries. A gradient that was there
    comes back if no step has been made since; otherwise it is zero there.
    """
    gates.active = {name: mask.clone() for name, mask in record.active.items()}
    gates.born = {name: steps.clone() for name, steps in record.born.items()}
    for name, saved in record.entries.items():
        tensor = gates.tensor(name)
        _put_mask_back(gates, name, saved.where, record.live.get(name))
        gates.set_held(name)
        put_flat(tensor, saved.where, saved.values)
        if name in gates.parked:
            put_flat(gates.parked[name], saved.where, 0.0 if saved.parked is None else saved.parked)
        if not isinstance(tensor, nn.Parameter):
            continue
        for key, value in state.entries(gates.optimizer, tensor).items():
            fresh: Tensor | float = state.neutral(gates.optimizer, tensor, key)
            if state.repeats_weight(gates.optimizer, key):
                fresh = saved.values
            put_flat(value, saved.where, saved.state.get(key, fresh))
        if tensor.grad is not None:
            same = saved.gradient if gates.steps == record.step and saved.gradient is not None else 0.0
            put_flat(tensor.grad, saved.where, same)


def _put_mask_back(gates: Gates, name: str, where: Tensor, before: Tensor | None) -> None:
    """Puts the touched entries of a weight-level mask back; None is no mask. Those that changed elsewhere since stay."""
    now = gates.live.pop(name, None)
    if now is None and before is None:
        return
    mask = torch.ones(gates.tensor(name).shape, dtype=torch.bool) if now is None else now.clone()
    put_flat(mask, where, True if before is None else before.reshape(-1)[where.to(before.device)])
    if not mask.all():
        gates.live[name] = mask


class Edit:
    """One reversible change of a structure: what was done, and its undoing.

    Attributes:
        kind: ``prune``, ``grow``, ``reset`` or ``mask``.
        units: int64 numbers of the units by group that were removed, born or reset; empty for ``mask``.
    """

    def __init__(self, kind: str, units: Mapping[str, Tensor], undo: Callable[[Edit], None]) -> None:
        self.kind, self.units = kind, dict(units)
        self._undo, self._undone = undo, False

    def undo(self) -> None:
        """Takes the edit back, exactly: its entries return to their values and optimizer state from before the edit.

        Right after the edit everything is then as it was, bit for bit. After training steps, what the edit touched returns
        and everything else goes on from where it is. Touched are the weights of its units and, where growth rescaled the
        weights that read an incumbent, those.

        Raises:
            UserError: the edit is undone already, or a later one is not, or the structure has been compacted or loaded.
        """
        if self._undone:
            raise UserError(f"this {self.kind} edit is already undone; each edit is undone once")
        self._undo(self)
        self._undone = True

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}: {len(units)}" for name, units in self.units.items())
        return f"Edit({self.kind}; {counts})"
