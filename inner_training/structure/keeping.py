"""Keepers: maintenance of a user's own model, beside its training loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trimtab.errors import UserError
from trimtab.inner_training.structure.choosing import named
from trimtab.inner_training.structure.maintenance import resolve_maintenance
from trimtab.inner_training.structure.structure import Structure
from trimtab.inner_training.structure.unit_keeping import UnitKeeper
from trimtab.inner_training.structure.weight_keeping import WeightKeeper

Keeper = UnitKeeper | WeightKeeper


def maintain(
    structure: Structure,
    name: str,
    *,
    groups: Iterable[str] | None = None,
    newborn_state: str | None = None,
    compensate: bool | None = None,
    seed: int = 0,
    **settings: Any,
) -> Keeper:
    """Keeps a model able to learn, by a method of the table of maintenance.

    Call ``keeper.step()`` after each step of the optimizer. Methods that look at activations or gradients see them in a block
    ``with keeper.watch():`` around the forward and backward passes, or on a batch given to ``step``.

    Args:
        structure: of the model, from ``trimtab.gates``.
        name: of the method.
        groups: whose units are reset; None for all. For methods that act on units.
        newborn_state: how the optimizer state of units that begin anew begins; None is ``fresh-step`` for Adam and AdamW, else
            ``zero``. For methods that act on units.
        compensate: whether biases make up for what units gave; None is what the method does. For methods that act on units.
        seed: of all random numbers, in [0, 2**31).
        settings: of the method, by name, instead of their defaults.

    Raises:
        UserError: a name is unknown, a setting is out of its range, or the method does not work on this model.

    >>> import torch
    >>> from torch import nn
    >>> from trimtab.inner_training.structure.entry import gates
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> keeper = maintain(gates(model, optimizer, torch.zeros(1, 4)), "continual-backprop", rate=0.1, maturity=5)
    >>> for _ in range(9):
    ...     with keeper.watch():
    ...         model(torch.randn(16, 4)).square().mean().backward()
    ...     optimizer.step()
    ...     units = keeper.step()
    >>> keeper.resets
    {'0': 2}
    """
    if not isinstance(structure, Structure):
        raise UserError(
            f"maintain needs a Structure and was given a {type(structure).__name__}; make it by trimtab.gates"
        )
    method = resolve_maintenance(name)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise UserError(f"seed is {seed!r}; it must be a whole number between 0 and 2**31 - 1")
    if method.acts_on == "weights":
        if groups is not None or newborn_state is not None or compensate is not None:
            raise UserError(f"{name} acts on weights; leave groups, newborn_state and compensate out")
        return WeightKeeper(structure, method, seed, settings)
    options = {"newborn_state": newborn_state, "compensate": compensate, "seed": seed, "settings": settings}
    chosen = [groups] if isinstance(groups, str) else groups
    return UnitKeeper(structure, method, named(structure.editor.gates.groups, chosen), options)
