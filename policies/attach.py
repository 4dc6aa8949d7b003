"""The two lines that users write begin here: a controller on an ordinary training loop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.structure.structure import Structure
from trimtab.policies import attachment
from trimtab.policies.attachment import Attachment
from trimtab.policies.audit import AuditFile
from trimtab.policies.controller import Controller
from trimtab.policies.editing import Editing, check_editing
from trimtab.policies.optimizers import check_optimizer
from trimtab.policies.policy import Policy
from trimtab.policies.ranks import ranks_of


def attach(
    optimizer: torch.optim.Optimizer,
    *,
    model: nn.Module | None = None,
    policy: str | os.PathLike[str] | Policy = "default",
    total_steps: int | None = None,
    decide_every: int | None = None,
    mode: str = "act",
    guard: GuardConfig | bool | None = None,
    stateful: Sequence[Any] = (),
    audit: str | os.PathLike[str] | AuditFile | None = None,
    structure: Structure | Editing | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Controller:
    """Attaches a controller to an ordinary training loop; then call ``controller.step(loss)`` after each step.

    It multiplies what the parameter groups hold, and puts that back after each step. Its first decision is taken here.

    Args:
        optimizer: the innermost ``torch.optim.Optimizer``.
        model: the module it trains; needed for rolling back buffers such as batch statistics.
        policy: a rule's name, ``"default"``, the path of a bundle, or a policy object.
        total_steps: optimizer steps of the whole run; None when unknown (rules that follow the budget need it).
        decide_every: optimizer steps between decisions; None for as many as ``attachment.decision_period`` says.
        mode: ``"act"``, or ``"advise"`` to decide and audit without touching anything.
        guard: None for the default guard, its settings, or False to keep its bounds and rate limits alone (no snapshots).
        stateful: scheduler, scaler, averaged weights, ...: objects to roll back with the model.
        audit: a new file for the audit (JSON lines), or that of the run that is resumed; an ``audit.AuditFile`` adds labels.
        structure: of the model, as ``trimtab.gates`` gave it, for policies that edit units; with what they need, ``Editing``.
        process_group: the ranks that train this model and all call this; None for all; alone in a group of one.

    Raises:
        UserError: an argument cannot be used. Whatever is raised, Ctrl-C too, no hook or new audit is left behind.
    """
    ranks = ranks_of(process_group)

    def make() -> Controller:
        check_optimizer(optimizer, model)
        chosen = attachment.choose_policy(policy, budget := attachment.check_budget(total_steps))
        editing = check_editing(structure, chosen, optimizer, model, ranks)
        settings = Attachment(
            model=attachment.model_of(model, editing),
            policy=chosen,
            total_steps=budget,
            decide_every=attachment.check_period(decide_every, chosen, budget),
            mode=attachment.check_mode(mode),
            guard=attachment.check_guard(guard, mode),
            stateful=attachment.check_stateful(stateful, model, optimizer, editing),
            audit=attachment.check_audit(audit) if ranks is None or ranks.rank == 0 else None,
            editing=editing,
        )
        return Controller(optimizer, settings, ranks)

    controller = make() if ranks is None else ranks.together(make, Controller.withdraw, Controller.common)
    try:  # here, as Ctrl-C may come before the first call in it
        controller.begin()
    except BaseException:
        controller.withdraw()
        raise
    return controller
