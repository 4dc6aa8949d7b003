"""The ranks of torch.distributed that train one model together: they exchange rows of numbers at every decision."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypedDict, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
import torch.distributed as dist

from trimtab.errors import MismatchError, TrimtabError, UserError

Made = TypeVar("Made")
OWN: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()  # ours, of the user's groups
LOST: WeakSet[dist.ProcessGroup] = WeakSet()  # groups whose ranks have lost each other
MOST_SAID = 16  # things that must be equal on all ranks


class Together(TypedDict, total=False):
    """Arguments of ``attach`` for several processes."""

    process_group: dist.ProcessGroup | None


def group_of(given: Mapping[str, Any]) -> dist.ProcessGroup | None:
    """The group among these arguments; ``TypeError``, as Python's own, where there is another one."""
    for name in given:
        if name not in Together.__annotations__:
            raise TypeError(f"attach() got an unexpected keyword argument {name!r}")
    return given.get("process_group")


class PartedError(TrimtabError):
    """Raised when ranks cannot reach each other any more, or have become so different that they should not decide."""


def digest(value: bytes | str) -> float:
    """A hash of 48 bits, which a float64 holds exactly.

    >>> digest("lr") == digest(b"lr") != digest("lR")
    True
    """
    content = value.encode() if isinstance(value, str) else value
    return float(int.from_bytes(hashlib.sha256(content).digest()[:6]))


def named(ranks: Sequence[int] | np.ndarray) -> str:
    """Ranks in words.

    >>> named([1]), named([0, 3])
    ('rank 1', 'ranks 0, 3')
    """
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(int(rank)) for rank in ranks)}"


def initialized() -> bool:
    """Whether torch.distributed runs here, with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def ranks_of(process_group: dist.ProcessGroup | None) -> Ranks | None:
    """The ranks that decide together: those of a group, or all of them; None where there is one alone.

    The first time it makes a group of its own with the same members, so every member must call it.

    Raises:
        UserError: it is no process group, this process does not belong to it, or its ranks have lost each other.
    """
    if process_group is None:
        group = dist.group.WORLD if initialized() else None
        return None if group is None else Ranks(group)
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        what = "one that this process does not belong to" if isinstance(process_group, int) else repr(process_group)
        raise UserError(
            f"process_group is {what}; it must be the torch.distributed group of the ranks that train this model, or "
            "None for all of them"
        )
    return Ranks(process_group) if process_group.size() > 1 else None


def _own(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group with the same members for decisions alone.

    In the user's own group a rank that missed a decision would answer with a part of its gradients. This one works on
    the host, so that nothing waits for a device, and can be given up when a rank is gone.
    """
    if not dist.is_gloo_available():
        return group
    if group not in OWN:
        OWN[group] = dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=_timeout(group),
            backend="gloo",
            use_local_synchronization=True,
        )
    return OWN[group]


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must lie that the group exchanges."""
    on_host = "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """How long the group's collectives wait; None where it does not say."""
    try:
        found = group._get_backend(_device(group)).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(found, timedelta) else None


class Ranks:
    """Ranks that decide together.

    Args:
        group: of the ranks; its members all make this object at the same time.

    Attributes:
        rank: of this process in the group.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        if group in LOST:
            raise UserError(
                "the ranks of this process group have lost each other; initialise torch.distributed anew, then attach"
            )
        self.rank, self.size, self._user = dist.get_rank(group), group.size(), group
        self._group: dist.ProcessGroup | None = _own(group)
        self._device = _device(self._group)

    def exchange(self, row: np.ndarray | Sequence[float]) -> np.ndarray:
        """The rows (W, n) of all ranks, float64; each must give as many numbers. Slow ranks are waited for.

        Raises:
            PartedError: a rank is gone, or has not come before the group's timeout.
        """
        if self._group is None:
            raise PartedError("a rank was lost before")
        mine = torch.as_tensor(np.asarray(row, dtype=np.float64)).to(self._device)
        rows = torch.empty((self.size, len(mine)), dtype=torch.float64, device=self._device)
        trouble = ""
        try:
            dist.all_gather(list(rows.unbind(0)), mine, group=self._group)
        except Exception as error:  # noqa: BLE001 - of every backend its own
            trouble = f"{type(error).__name__}: {error}"
        if trouble:  # seen to here, because a traceback would keep the group alive, and with it whoever waits for it
            self.lose()
            raise PartedError(trouble)
        return rows.cpu().numpy()

    def lose(self) -> None:
        """Gives our group up after a failure, so that no other rank waits for this one.

        There cannot be another for the same ranks: its members would find the addresses of this one.
        """
        group, self._group = self._group, None
        LOST.add(self._user)
        OWN.pop(self._user, None)
        if group is not None and group is not self._user:
            with contextlib.suppress(ValueError):  # all groups have been destroyed already
                dist.destroy_process_group(group)

    def together(
        self, make: Callable[[], Made], undo: Callable[[Made], None], said: Callable[[Made], Mapping[str, object]]
    ) -> Made:
        """Makes something on every rank, or on none.

        Args:
            make: may raise.
            undo: takes back what was made.
            said: what must be equal on all ranks, by name; ``MOST_SAID`` entries at most.

        Raises:
            UserError: another rank could not make it, or ranks differ; what this rank raised itself, if it did.
            PartedError: the ranks cannot reach each other.
        """
        made, entries, trouble = list[Made](), dict[str, float](), list[Exception]()
        try:
            made.append(make())
            entries = {name: digest(repr(value)) for name, value in said(made[0]).items()}
        except Exception as error:  # noqa: BLE001 - raised below, when the other ranks know
            trouble.append(error)
        row = np.zeros(1 + MOST_SAID)
        row[0], row[1 : 1 + len(entries)] = len(trouble), list(entries.values())
        try:
            rows = self.exchange(row)
            if trouble:
                raise trouble[0]
            if (failed := np.flatnonzero(rows[:, 0])).size:
                raise UserError(f"{named(failed)} could not attach a controller and raised why, so no rank has one")
            differs = [name for name, *column in zip(entries, *rows[:, 1:], strict=False) if len(set(column)) > 1]
            if differs:
                raise MismatchError(
                    f"ranks attach controllers that differ in {', '.join(differs)}; give the same arguments on every rank, "
                    "or process_group=... with the ranks that train one model"
                )
        except BaseException:
            for one in made:
                undo(one)
            raise
        return made[0]
