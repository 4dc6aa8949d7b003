"""What a policy is, beyond its name: the hash of a learned one, the settings of a rule."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from trimtab.policies.network import LearnedPolicy
from trimtab.policies.policy import Policy

Plain = bool | int | float | str | None


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


def identity_of(policy: Policy) -> dict[str, Any]:
    """What must be equal for two policies to be the same one.

    >>> from trimtab.policies.registry import load_policy
    >>> identity_of(load_policy("plateau"))["policy_sha256"] is None
    True
    """
    learned = isinstance(policy, LearnedPolicy)
    return {
        "policy": policy.name,
        "policy_sha256": (policy.sha256 or None) if isinstance(policy, LearnedPolicy) else None,  # of its manifest
        "policy_options": None if learned else options_of(policy),
    }
