"""The header of an audit: everything about a run that is needed to read, repeat and compare it, and nothing personal."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from trimtab.policies.attachment import Attachment
from trimtab.policies.identity import identity_of


def device_name(device: torch.device) -> str:
    """What kind of device it is, with the name of the card where there is one; never the machine's.

    >>> device_name(torch.device("cpu"))
    'cpu'
    """
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return device.type


def header(optimizer: torch.optim.Optimizer, settings: Attachment) -> dict[str, Any]:
    """What the first line of an audit says; docs/audit.md explains each field."""
    trained = [one for group in optimizer.param_groups for one in group["params"] if one.requires_grad]
    model, policy = settings.model, settings.policy
    return {
        "trimtab": version("trimtab"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device_name(trained[0].device),
        "optimizer": type(optimizer).__name__,
        "parameter_groups": len(optimizer.param_groups),
        "parameters": sum(parameter.numel() for parameter in trained),
        "model": None if model is None else type(model).__name__,
        "model_parameters": None if model is None else sum(parameter.numel() for parameter in model.parameters()),
        **identity_of(policy),
        "levers": dict(policy.levers),
        "total_steps": settings.total_steps,
        "decide_every": settings.decide_every,
        "mode": settings.mode,
        "guard": settings.guard.plain(),
        **({} if settings.editing is None else {"structure": settings.editing.plain()}),
        **({} if settings.audit is None else settings.audit.labels),
    }
