"""Reversible edits: a record of what an edit may touch is taken before it, and put back to undo it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

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
    held: Tensor


@dataclass(frozen=True)
class Record:
    """What an edit found. Of ``active`` and ``born`` only what it changed is given back: other units may have gone since, or
    been born, by edits that count as training."""

    step: int
    entries: dict[str, Entries]
    active: dict[str, Tensor]
    born: dict[str, Tensor]
    live: dict[str, Tensor]
    switched: dict[str, Tensor] = field(default_factory=dict)  # bool (units,) by group
    renewed: dict[str, Tensor] = field(default_factory=dict)

    def changed(self, gates: Gates) -> Record:
        """The record with the units that are active or were born otherwise than before the edit."""
        return replace(
            self,
            switched={name: mask != gates.active[name] for name, mask in self.active.items()},
            renewed={name: steps != gates.born[name] for name, steps in self.born.items()},
        )


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
        idle = gates.held(name).reshape(-1)[where]
        entries[name] = Entries(where, values, _flat(gradient, where), _flat(gates.parked.get(name), where), kept, idle)
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
    comes back if no step has been made since; otherwise it is zero there. Entries that belong to units of others too, which
    have gone since or been born, stay as these have them.
    """
    gates.check_same()
    for name, mask in record.switched.items():
        gates.active[name] = torch.where(mask, record.active[name], gates.active[name])
        gates.born[name] = torch.where(record.renewed[name], record.born[name], gates.born[name])
    for name, saved in record.entries.items():
        _put_entries(gates, record, name, saved)


def _put_entries(gates: Gates, record: Record, name: str, saved: Entries) -> None:
    tensor, where = gates.tensor(name), saved.where
    before = gates.held(name).reshape(-1)[where]
    _put_mask_back(gates, name, where, record.live.get(name))
    gates.set_held(name)
    held = gates.held(name).reshape(-1)[where]
    same, gone, woken = held == saved.held, held & ~saved.held, before & ~held & saved.held

    def chosen(target: Tensor, was: Tensor | float, anew: Tensor | float) -> None:
        """Where an entry is held as before the edit ``was``, where it is held no more ``anew``, else what is there."""
        now = target.detach().reshape(-1)[where]
        was, anew = (torch.as_tensor(one, device=now.device, dtype=now.dtype) for one in (was, anew))
        put_flat(target, where, torch.where(same, was, torch.where(woken, anew, now)))

    parked = gates.parked.get(name)
    chosen(tensor, saved.values, 0.0 if parked is None else parked.reshape(-1)[where])
    if parked is not None:
        now = torch.where(gone, saved.values.to(parked), parked.reshape(-1)[where])
        put_flat(parked, where, now)
        chosen(parked, 0.0 if saved.parked is None else saved.parked, now)
    if not isinstance(tensor, nn.Parameter):
        return
    for key, value in state.entries(gates.optimizer, tensor).items():
        fresh: Tensor | float = state.neutral(gates.optimizer, tensor, key)
        if state.repeats_weight(gates.optimizer, key):
            fresh = tensor.detach().reshape(-1)[where]
        chosen(value, saved.state.get(key, fresh), fresh)
    if tensor.grad is not None:
        chosen(tensor.grad, saved.gradient if gates.steps == record.step and saved.gradient is not None else 0.0, 0.0)


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
