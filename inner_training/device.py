"""Where inner runs are computed: the name of a device, verified before anything is put there."""

from __future__ import annotations

import re

import torch

from trimtab.errors import UserError, unknown


def check_device(device: object) -> torch.device:
    """Verifies that inner runs can be computed on a device of this machine.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, ``"mps"``, or a ``torch.device`` of such a name.

    Raises:
        UnknownNameError: when it is none of these.
        UserError: when this machine does not have it.

    >>> check_device("cpu")
    device(type='cpu')
    """
    name = str(device)
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise unknown("device", device, ["cpu", "cuda", "cuda:0", "mps"])
    kind, _, index = name.partition(":")
    if kind == "mps":
        present = torch.backends.mps.is_available()
    else:
        present = kind == "cpu" or (torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count())
    if not present:
        raise UserError(f"device {name!r} is not present on this machine; use 'cpu'")
    return torch.device(name)
