"""The header of an audit: everything about a run that is needed to read, repeat and compare it, and nothing personal."""

from __future__ import annotations

import platform
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from trimtab.policies.attachment import Attachment
from trimtab.policies.network import LearnedPolicy
from trimtab.policies.policy import Policy

Plain = bool | int | float | str | None


def device_name(device: torch.device) -> str:
    """What kind of device it is, with the name of the card where there is one; never the machine's.

    >>> device_name(torch.device("cpu"))
    'cpu'
    """
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return device.type


def options_of(value: object) -> Any:
    """The settings of a rule as plain values: the fields of a frozen dataclass, also nested; None for what is not plain.

    Texts with a slash or a backslash are left out, since they may be paths.

    >>> from trimtab.policies.registry import load_policy
    >>> options_of(load_policy("plateau", patience=3))["patience"]
    3
    """
    if isinstance(value, Plain) and not (isinstance(value, str) and set(value) & {"/", "\\"}):
        return value if not isinstance(value, float) or np.isfinite(value) else str(value)
    if isinstance(value, tuple):
        return [options_of(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type) and _is_frozen(value):
        found = {one.name: options_of(getattr(value, one.name)) for one in fields(value) if one.repr}
        return {name: option for name, option in found.items() if option is not None}
    return None


def _is_frozen(value: object) -> bool:
    return bool(getattr(type(value), "__dataclass_params__").frozen)  # noqa: B009 - typeshed does not know it


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
        "policy": policy.name,
        "policy_sha256": _sha256(policy),
        "policy_options": None if isinstance(policy, LearnedPolicy) else options_of(policy),
        "levers": dict(policy.levers),
        "total_steps": settings.total_steps,
        "decide_every": settings.decide_every,
        "mode": settings.mode,
        "guard": asdict(settings.guard),
        **({} if settings.audit is None else settings.audit.labels),
    }


def _sha256(policy: Policy) -> str | None:
    """Of the bundle's manifest, which holds the hashes of its other files."""
    return (policy.sha256 or None) if isinstance(policy, LearnedPolicy) else None
