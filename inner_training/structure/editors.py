"""Who edits the models of an optimizer."""

from __future__ import annotations

import torch

from trimtab.inner_training.structure.editing import Editor


def editors_of(optimizer: torch.optim.Optimizer) -> list[Editor]:
    """What edits the models of an optimizer: one for each structure that was made with it."""
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values())
    return [owner for owner in owners if isinstance(owner, Editor)]
