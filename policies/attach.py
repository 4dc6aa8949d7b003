"""The two lines that users write begin here: a controller on an ordinary training loop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trimtab.inner_training.guard import GuardConfig
from trimtab.policies import attachment
from trimtab.policies.attachment import Attachment
from trimtab.policies.audit import AuditFile
from trimtab.policies.controller import Controller
from trimtab.policies.optimizers import check_optimizer
from trimtab.policies.policy import MOST_EVERY, Policy
from trimtab.policies.ranks import ranks_of

TOTAL, EVERY = "optimizer steps of the whole run", "optimizer steps between decisions"


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
    process_group: dist.ProcessGroup | None = None,
) -> Controller:
    """Attaches a controller to an ordinary training loop; then call ``controller.step(loss)`` after each step.

    The controller multiplies whatever the optimizer's parameter groups hold: ``scheduled x multiplier`` before each step,
    ``scheduled`` again after it (or when the step raises). So any scheduler works on, before or after this call.

    Args:
        optimizer: the innermost ``torch.optim.Optimizer``.
        model: the module it trains; needed for rolling back buffers such as batch statistics.
        policy: a rule's name, ``"default"``, the path of a bundle, or a policy object.
        total_steps: optimizer steps of the whole run; None when unknown (rules that follow the budget need it).
        decide_every: optimizer steps between decisions; None for the policy's own, else 10 (a learned policy takes at
            most about 100 decisions when ``total_steps`` is known, and so does a schedule in a run of 1,000 steps or more).
        mode: ``"act"``, or ``"advise"`` to decide and audit without touching anything.
        guard: None for the default guard, its settings, or False to keep its bounds and rate limits alone (no snapshots).
        stateful: scheduler, scaler, averaged weights, ...: objects to roll back with the model.
        audit: a new file for the audit (JSON lines), or that of the run that is resumed; an ``audit.AuditFile`` adds labels.
        process_group: the ranks that train this model, which must all call this; None for all; alone in a group of one.

    Returns:
        The controller, which has taken its first decision.

    Raises:
        UserError: an argument cannot be used. Whatever is raised, Ctrl-C too, no hook or new audit is left behind.
    """
    ranks = ranks_of(process_group)

    def make() -> Controller:
        check_optimizer(optimizer, model)
        chosen_mode = attachment.check_mode(mode)
        budget = attachment.check_count("total_steps", total_steps, attachment.MOST_STEPS, TOTAL)
        every = attachment.check_count("decide_every", decide_every, MOST_EVERY, EVERY)
        chosen = attachment.choose_policy(policy, budget)
        settings = Attachment(
            model=model,
            policy=chosen,
            total_steps=budget,
            decide_every=every or attachment.decision_period(chosen, budget),
            mode=chosen_mode,
            guard=attachment.check_guard(guard, chosen_mode),
            stateful=attachment.check_stateful(stateful, (model, optimizer)),
            audit=attachment.check_audit(audit) if ranks is None or ranks.rank == 0 else None,
        )
        return Controller(optimizer, settings, ranks)

    controller = make() if ranks is None else ranks.together(make, Controller.withdraw, Controller.common)
    controller.begin()
    return controller
