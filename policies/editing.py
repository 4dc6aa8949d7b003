"""What a user gives to ``attach`` so that a policy may edit the units of the model: verified before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.edits import EDITS, EditConfig
from trimtab.inner_training.structure.collect import check_batches
from trimtab.inner_training.structure.criteria import resolve_criterion
from trimtab.inner_training.structure.growth import resolve_growth
from trimtab.inner_training.structure.live_edits import FREE, LiveEdits, Source
from trimtab.inner_training.structure.normalisations import resolve_normalisation
from trimtab.inner_training.structure.running import unwrapped
from trimtab.inner_training.structure.second_order import Loss
from trimtab.inner_training.structure.structure import Structure
from trimtab.policies.policy import Policy
from trimtab.policies.ranks import Ranks

REMEDY = "give attach(..., structure=Editing(structure, batches, loss_fn))"


@dataclass(frozen=True)
class Editing:
    """A structure that a policy may edit, with what its edits are judged by; ``attach`` takes it as ``structure=``.

    Attributes:
        structure: what ``trimtab.gates`` gave for the model and its optimizer.
        batches: calibration batches that units are scored and measured on: a list, a loader, or a function without
            arguments that gives such. It is read anew, from its beginning, at each edit (``config.batches`` of them) and at
            every fifth decision (one of them). None for criteria that look at weights alone.
        loss_fn: ``loss_fn(model, batch)`` gives the mean loss of a batch, a scalar tensor.
        config: the same settings as ``structure:`` of a scenario. Its ``start`` stays None.

    Raises:
        UserError: a value cannot be used.
    """

    structure: Structure
    batches: Source | None = None
    loss_fn: Loss | None = None
    config: EditConfig = field(default_factory=EditConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.structure, Structure):
            raise UserError(
                f"structure is a {type(self.structure).__name__}; it must be what trimtab.gates(model, optimizer, "
                "example_input) gave"
            )
        if not isinstance(self.config, EditConfig):
            raise UserError(f"config is a {type(self.config).__name__}; it must be an EditConfig")
        if self.config.start is not None:
            raise UserError(
                f"start is {self.config.start:g}, but a run of your own begins with the units that it has; leave it None, "
                'and take units out before attaching: structure.prune(0.5, "random", "layer")'
            )
        if (self.batches is None) != (self.loss_fn is None):
            raise UserError("batches and loss_fn are needed together, to score units; give both or none of them")
        if self.loss_fn is not None and not callable(self.loss_fn):
            raise UserError(f"loss_fn is a {type(self.loss_fn).__name__}; it must be a function of model and batch")
        check_batches(self.batches)
        usable = self.batches is None or callable(self.batches) or isinstance(self.batches, Iterable)
        if not usable or isinstance(self.batches, Iterator):
            raise UserError(
                f"batches is a {type(self.batches).__name__}, which cannot be read again and again; it must be a list of "
                "batches, a loader, or a function that gives one"
            )

    def edits(self) -> LiveEdits:
        """What makes the edits."""
        return LiveEdits(self.structure, self.config, self.batches, self.loss_fn)

    def plain(self) -> dict[str, Any]:
        """What an audit says of it: units by group, and the settings that differ between runs."""
        config = {name: getattr(self.config, name) for name in EditConfig.__dataclass_fields__ if name != "start"}
        return {"units": self.structure.groups, **config, "measured": self.batches is not None}


def check_editing(
    given: object, policy: Policy, optimizer: torch.optim.Optimizer, model: nn.Module | None, ranks: Ranks | None
) -> Editing | None:
    """The structure that a policy may edit; None where none is given, and none is needed.

    Raises:
        MismatchError: the policy edits, and there is no structure; or it is of another model or optimizer.
        UserError: it cannot be edited as the settings say.
    """
    wanted = [name for name in policy.levers if name in EDITS]
    if given is None:
        for name in wanted:
            raise MismatchError(
                f"policy {policy.name!r} moves {name!r}, which edits the structure of a network; give attach(..., "
                "structure=trimtab.gates(model, optimizer, example_input)), or attach a policy without it"
            )
        return None
    editing = given if isinstance(given, Editing) else Editing(given)  # type: ignore[arg-type]
    if ranks is not None:
        raise UserError(
            f"a structure was given on {ranks.size} ranks, each of which would score units by data of its own and edit others; "
            "leave structure=... out where several processes train one model"
        )
    _check_same(editing.structure, optimizer, model)
    if not editing.structure.groups:
        raise UserError("no units of this model can be edited, and structure.refused says why; leave structure=... out")
    for why, needs in _needed(editing.config, wanted).items():
        if editing.batches is None and needs - FREE:
            raise UserError(
                f"{why} reads {', '.join(sorted(needs - FREE))}, which only data tell; {REMEDY}, or settings without it, such as "
                'Editing(structure, config=EditConfig(criterion="magnitude"))'
            )
    editing.edits().check(wanted)
    return editing


def _needed(config: EditConfig, levers: list[str]) -> dict[str, frozenset[str]]:
    """Fields of the evidence by what reads them."""
    found = {}
    if "width" in levers:
        found[f"criterion {config.criterion!r}"] = resolve_criterion(config.criterion).needs
        found[f"normalisation {config.normalisation!r}"] = resolve_normalisation(config.normalisation).needs
        found[f"growth method {config.growth!r}"] = resolve_growth(config.growth).needs
    if "reset" in levers:
        found[f"criterion {config.reset_criterion!r} of resets"] = resolve_criterion(config.reset_criterion).needs
    return found


def _check_same(structure: Structure, optimizer: torch.optim.Optimizer, model: nn.Module | None) -> None:
    gates = structure.editor.gates
    if gates.optimizer is not optimizer:
        raise MismatchError(
            "the structure was made for another optimizer, so this one's state would not follow its edits; give "
            "trimtab.gates(model, optimizer, example_input) the optimizer that is attached to"
        )
    if model is not None and all(part is not gates.model for part in unwrapped(model).modules()):
        raise MismatchError(
            f"the structure is of a {type(gates.model).__name__} that is no part of the model that was given "
            f"({type(unwrapped(model)).__name__}); give trimtab.gates and attach the same model"
        )
