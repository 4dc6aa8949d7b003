"""A saved structure, verified before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import MismatchError
from trimtab.inner_training.structure.gating import Gates

VERSION = 1


def check_saved(gates: Gates, saved: Any) -> None:
    """Refuses what ``Editor.state_dict`` has not given for the same model.

    Raises:
        MismatchError: it is of another version, of other groups or shapes, or damaged; the message names the entry. Or see ``Gates.check_same``.
    """
    gates.check_same()
    if not isinstance(saved, Mapping):
        raise MismatchError(f"the state is a {type(saved).__name__}; give what structure.state_dict() gave")
    if saved.get("version") != VERSION:
        raise MismatchError(f"the state has version {saved.get('version')!r}; this trimtab reads version {VERSION}")
    steps = saved.get("steps")
    _demand("steps", isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0)
    for entry, kind in (("active", torch.bool), ("born", torch.int64), ("live", torch.bool), ("parked", None)):
        _demand(entry, isinstance(saved.get(entry), Mapping))
        for name, one in saved[entry].items():
            _demand(f"{entry}[{name!r}]", isinstance(one, Tensor) and (kind is None or one.dtype == kind))
    own, given = ({name: len(one) for name, one in part.items()} for part in (gates.active, saved["active"]))
    if own != given:
        raise MismatchError(f"the state is of a structure with the groups {given}; this one has {own}")
    _demand("born", {name: len(one) for name, one in saved["born"].items()} == own)
    tensors = {**dict(gates.model.named_parameters()), **dict(gates.model.named_buffers())}
    for entry in ("live", "parked"):
        for name, values in saved[entry].items():
            _demand(f"{entry}[{name!r}]", name in tensors)
            if tensors[name].shape != values.shape:
                shapes = tuple(values.shape), tuple(tensors[name].shape)
                raise MismatchError(f"the state has {name} of shape {shapes[0]}; the model's is {shapes[1]}")
    _demand("cohorts", isinstance(saved.get("cohorts"), list | tuple))
    for cohort in saved["cohorts"]:
        _demand("cohorts", isinstance(cohort, list | tuple) and len(cohort) == 3 and cohort[0] in tensors)
        name, where, begun = cohort
        _demand(f"cohorts of {name}", isinstance(where, Tensor) and where.dtype == torch.int64 and where.ndim == 1)
        _demand(f"cohorts of {name}", isinstance(begun, Tensor) and begun.shape == where.shape)
        inside = not len(where) or (int(where.min()) >= 0 and int(where.max()) < tensors[name].numel())
        _demand(f"cohorts of {name}", inside)


def _demand(entry: str, fits: bool) -> None:
    if not fits:
        raise MismatchError(
            f"the state is damaged: {entry} is not what structure.state_dict() gives; load it as it was saved"
        )
