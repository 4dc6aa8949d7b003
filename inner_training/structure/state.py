"""What an optimizer holds for each entry of a parameter: read, cleared, copied between units, sliced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError

# Their state has one tensor for all parameters, or factors of tensors: no entry of it belongs to a unit.
UNSLICEABLE = ("LBFGS", "Adafactor", "SparseAdam")
# State that is a copy of the weight: a newborn's begins at its own value. (part of the class name, key)
WEIGHTS_AGAIN = (("schedulefree", "z"), ("prodigy", "p0"), ("asgd", "ax"))


def class_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of an optimizer's class and of those that it inherits from."""
    return {base.__name__ for base in type(optimizer).__mro__}


def group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """The parameter group that holds a parameter, or None."""
    for group in optimizer.param_groups:
        if any(one is parameter for one in group["params"]):
            return group
    return None


def check_kind(optimizer: torch.optim.Optimizer) -> None:
    """Refuses optimizers whose state is known not to fall into units."""
    found = class_names(optimizer).intersection(UNSLICEABLE)
    if found:
        raise UserError(
            f"the state of {min(found)} does not fall into units; use an optimizer whose state has one number per "
            "weight, such as SGD or AdamW"
        )


def check_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Refuses state that is neither one number nor of the shape of its parameter.

    Raises:
        UserError: naming the optimizer, the parameter, and the state.
    """
    for name, parameter in parameters.items():
        held = optimizer.state.get(parameter, {})
        for key, value in held.items() if isinstance(held, dict) else [("all", held)]:
            if value is None or isinstance(value, Number | str):
                continue
            plain = type(value) in (Tensor, torch.nn.Parameter)
            if not plain or (value.shape != parameter.shape and value.numel() != 1):
                shape = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise UserError(
                    f"the state {key!r} of {type(optimizer).__name__} for {name} is {shape}; an edit knows state that is one "
                    f"number or has the shape {tuple(parameter.shape)} of its parameter"
                )


def entries(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """State by name that has one number for each entry of the parameter; empty before the first step."""
    held = optimizer.state.get(parameter, {})
    return {key: value for key, value in held.items() if isinstance(value, Tensor) and value.shape == parameter.shape}


def neutral(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str) -> float:
    """What a state begins at: zero but for Adagrad's sum and Rprop's step size."""
    names, group = class_names(optimizer), group_of(optimizer, parameter) or {}
    if "Adagrad" in names and key == "sum":
        return float(group.get("initial_accumulator_value", 0.0))
    if "Rprop" in names and key == "step_size":
        return float(group.get("lr", 0.0))
    return 0.0


def repeats_weight(optimizer: torch.optim.Optimizer, key: str) -> bool:
    """Whether a state is a copy of the weights."""
    names = [name.lower() for name in class_names(optimizer)]
    return any(key == known and any(part in name for name in names) for part, known in WEIGHTS_AGAIN)


@torch.no_grad()
def clear(optimizer: torch.optim.Optimizer, parameter: Tensor, where: Tensor) -> None:
    """Puts the state of some entries (bool of the parameter's shape) to what it begins at."""
    for key, value in entries(optimizer, parameter).items():
        if repeats_weight(optimizer, key):
            value[where] = parameter[where].to(value.dtype)
        else:
            value.masked_fill_(where, neutral(optimizer, parameter, key))


def reseat(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, state: dict[str, Any]) -> None:
    """Puts a parameter, with its state, in the place of another one."""
    for group in optimizer.param_groups:
        for place, one in enumerate(group["params"]):
            if one is old:
                group["params"][place] = new
    if old in optimizer.state:
        del optimizer.state[old]
        optimizer.state[new] = state


def owned(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    """All parameters of an optimizer."""
    return (one for group in optimizer.param_groups for one in group["params"])
