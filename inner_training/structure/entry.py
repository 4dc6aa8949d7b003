"""The entry to structural edits of a user's own model."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.attached import ATTACHED
from trimtab.inner_training.structure import state
from trimtab.inner_training.structure.discovery import check_module, discover
from trimtab.inner_training.structure.editing import Editor
from trimtab.inner_training.structure.editors import editors_of
from trimtab.inner_training.structure.gating import GATES, Gates
from trimtab.inner_training.structure.running import unwrapped
from trimtab.inner_training.structure.structure import Structure


def gates(model: nn.Module, optimizer: torch.optim.Optimizer, example_input: Any) -> Structure:
    """Finds the units of a model and puts gates on them, for structural edits while it trains.

    Args:
        model: any module of linear layers, convolutions, norms, embeddings and attention; compiled modules and those in
            ``DistributedDataParallel`` can be edited, but not compacted.
        optimizer: of the model's parameters, before or after its first steps. Each entry of its state belongs to one
            weight, as in SGD, Adam, RMSprop, Lion or Muon.
        example_input: what the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments. It is
            kept, for checks when the model is compacted.

    Returns:
        The structure. The model is as it was, and not wrapped. Where units of it are held at zero already, under the same
        optimizer, the structure goes on with them.

    Raises:
        MissingExtraError: Torch-Pruning is not installed.
        MismatchError: a structure of another optimizer holds units of this model at zero; the optimizer has a controller, or no
            parameter of the model; another optimizer trains the rest of it.
        UserError: the model does not run on the example, or is scripted or sharded; the optimizer's state is unknown.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> structure = gates(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.zeros(1, 4))
    >>> structure.groups
    {'0': 8}
    >>> edit = structure.prune(0.25, criterion="magnitude")
    >>> int(structure.active["0"].sum())
    6
    >>> edit.undo()
    >>> int(structure.active["0"].sum())
    8
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"the optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
    inner = check_module(unwrapped(check_module(model)))
    trained = {id(one) for one in state.owned(optimizer)}
    if not any(id(one) in trained for one in inner.parameters()):
        raise MismatchError("no parameter of the model is in the optimizer; make the optimizer from model.parameters()")
    state.check_kind(optimizer)
    state.check_state(optimizer, {name: one for name, one in inner.named_parameters() if id(one) in trained})
    known = next((one for one in editors_of(optimizer) if one.gates.model is inner and one.gates.closed), None)
    if known is not None:
        return Structure(model, known, example_input)
    _check_open(inner, optimizer)
    _check_alone(inner, optimizer)
    groups, refused = discover(inner, example_input)
    return Structure(model, Editor(Gates(inner, optimizer, groups), refused), example_input)


def _check_alone(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises ``MismatchError`` where another optimizer trains what this one does not: its state would move units that are held
    at zero, and it would be left with tensors that compaction replaces."""
    trained = {id(one) for one in state.owned(optimizer)}
    rest = {id(one): name for name, one in model.named_parameters() if one.requires_grad and id(one) not in trained}
    if not rest:
        return
    # Optimizers are listed nowhere; this looks through all objects, those that were deleted not among them.
    gc.collect()
    for other in [one for one in gc.get_objects() if issubclass(type(one), torch.optim.Optimizer)]:
        for one in state.owned(other) if hasattr(other, "param_groups") else ():
            if id(one) in rest:
                raise MismatchError(
                    f"{rest[id(one)]} is in another optimizer ({type(other).__name__}), and an edit knows the state of one only; make "
                    "one optimizer with several parameter groups, delete the other one, or freeze what this one does not train"
                )


def _check_open(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if optimizer in ATTACHED:
        raise MismatchError(
            "the optimizer has a controller already, whose rollbacks would not know of the units; call trimtab.gates before attach"
        )
    own = {id(one) for one in model.parameters()}
    for held in GATES:
        name = next((name for name, one in held.closed.items() if id(one) in own), None)
        if name is not None:
            raise MismatchError(
                f"an earlier structure of this model holds entries of {name} at zero, and a second one would take them for "
                "active ones that never learn; go on with the earlier one, or call its compact() first"
            )
