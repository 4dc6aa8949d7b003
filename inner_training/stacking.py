"""Whether runs of a module can be stacked, told before any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trimtab.errors import MismatchError

REMEDY = "use layer or group norm in place of batch norm, and leave dropout out"


def check_stackable(name: str, buffers: Mapping[str, Tensor], attempt: Callable[[], object]) -> None:
    """Refuses a module that fails when stacked, or writes to its buffers.

    Args:
        name: of the family.
        buffers: of its module, stacked.
        attempt: takes a step with them.

    Raises:
        MismatchError: saying why, and what to do.
    """
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise MismatchError(f"the module of {name!r} cannot be stacked: {reason}; {REMEDY}") from error
    changed = [name for name, buffer in buffers.items() if not torch.equal(buffer, before[name])]
    if changed:
        raise MismatchError(
            f"the module of {name!r} changes its buffer {changed[0]!r} in the forward pass, which runs stacked "
            f"together cannot do; {REMEDY}"
        )
