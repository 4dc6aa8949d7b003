"""Snapshots of a live run for the guard: two slots, as in a population, so that a moment is trusted only after the
interval that follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.inner_training.divergence import Health
from trimtab.inner_training.own_step import own_step
from trimtab.inner_training.tensor_copies import Copy, again, copied, put_back

SPACING = (10, 100)  # steps between snapshots at least, in small and in large models
PER_STEP = 10_000  # parameters for which snapshots come a step later


def usual_spacing(parameters: int) -> int:
    """Steps between the snapshots of a model, so that copying it is a small part of the time of those steps.

    Copying a parameter with its optimizer state takes about as long as a few hundred of a step's operations on it, and a
    step has 6 per example.

    >>> usual_spacing(50_000), usual_spacing(400_000), usual_spacing(10**8)
    (10, 40, 100)
    """
    return min(max(SPACING[0], parameters // PER_STEP), SPACING[1])


def _entry(held: Any, key: Any) -> Any:
    return held.get(key) if isinstance(held, dict) else None


def schedules(other: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an object is a scheduler of an optimizer, wrapped or not, as those of Accelerate are.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> schedules(torch.optim.lr_scheduler.StepLR(optimizer, 5), optimizer), schedules(torch.nn.Linear(1, 1), optimizer)
    (True, False)
    """
    holders = (other, getattr(other, "scheduler", None))
    held = [getattr(one, "optimizer", None) for one in holders]
    for one in holders:
        several = getattr(one, "optimizers", ())
        held += several if isinstance(several, list | tuple) else [several]
    return any(one is optimizer or getattr(one, "optimizer", None) is optimizer for one in held)


@dataclass(frozen=True)
class Moment:
    """Copies of everything that a rollback puts back.

    Attributes:
        step: optimizer steps done.
        parameters: pairs (live tensor, copy).
        buffers: copies by name; a module may have put a new tensor in a buffer's place.
        state: optimizer state per parameter.
        groups: hyperparameters of each parameter group, without its parameters.
        others: ``state_dict`` of each stateful object.
    """

    step: int
    parameters: list[tuple[Tensor, Copy]]
    buffers: dict[str, Copy]
    state: dict[Any, Any]
    groups: list[dict[str, Any]]
    others: list[Any]


class LiveSnapshots:
    """Keeps a candidate (the newest stable moment) and the confirmed moment before it; ``restore`` takes the latter.

    Args:
        optimizer: its parameters and its state are kept.
        model: its buffers (batch statistics) are kept too; None for none.
        stateful: objects with ``state_dict`` and ``load_state_dict``. A scheduler among them is rolled back together
            with the learning rates of the groups; otherwise the schedule goes on.
        spacing: steps between snapshots at least, >= 0; None for ``usual_spacing``.
        device: where the copies lie; None for where the originals are.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None,
        stateful: Sequence[Any],
        *,
        spacing: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._optimizer, self._model, self._stateful = optimizer, model, tuple(stateful)
        parameters = sum(one.numel() for group in optimizer.param_groups for one in group["params"])
        self._spacing = usual_spacing(parameters) if spacing is None else spacing
        self._device = device
        self._schedules = any(schedules(other, optimizer) for other in self._stateful)
        self._candidate: Moment | None = None
        self._confirmed: Moment | None = None
        self._given_up = False  # the candidate is what was given up

    @property
    def empty(self) -> bool:
        """Whether there is nothing to go back to yet."""
        return self._confirmed is None

    @property
    def steps(self) -> tuple[int, int, bool]:
        """Steps done at the confirmed moment and at the candidate, -1 without one, and whether that was given up."""
        return self.confirmed_step, -1 if self._candidate is None else self._candidate.step, self._given_up

    @property
    def confirmed_step(self) -> int:
        """Optimizer steps done at the moment to go back to; -1 without one."""
        return -1 if self._confirmed is None else self._confirmed.step

    def clear(self) -> None:
        """Forgets both moments."""
        self._candidate = self._confirmed = None
        self._given_up = False

    def confirmed_weights(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a live parameter and what it was at the confirmed moment, on its own device; none without one."""
        pairs = [] if self._confirmed is None else self._confirmed.parameters
        return [(live, saved.again()) for live, saved in pairs]

    def take(self, step: int) -> None:
        """Notes the present as stable: confirms the candidate, and makes the present the next candidate.

        Where the candidate is what was given up, it is forgotten instead.
        """
        if self._given_up:
            self._keep(step)
            self._given_up = False
            return
        if self._candidate is not None and not self._has_all(self._candidate):
            self.clear()  # parameters have come since, which it could not put back
        if self._candidate is not None and step - self._candidate.step < self._spacing:
            return
        oldest, self._confirmed = self._confirmed, self._candidate
        self._candidate = self._present(step, None if oldest is self._confirmed else oldest)
        if self._confirmed is None:
            self._confirmed = self._candidate

    def _copy(self, value: Any, room: Any = None) -> Any:
        return copied(value, self._device, room)

    def _present(self, step: int, room: Moment | None = None) -> Moment:
        """The present; a ``room`` that is given is used up."""
        spare = {} if room is None else {id(owner): saved for owner, saved in room.parameters}
        old_state = {} if room is None else room.state
        old_buffers = {} if room is None else room.buffers
        groups = self._optimizer.param_groups
        buffers = {} if self._model is None else dict(self._model.named_buffers())
        state = {
            owner: {key: self._copy(value, _entry(old_state.get(owner), key)) for key, value in held.items()}
            if isinstance(held, dict)
            else self._copy(held)
            for owner, held in self._optimizer.state.items()
        }
        return Moment(
            step=step,
            parameters=[(one, self._copy(one, spare.get(id(one)))) for group in groups for one in group["params"]],
            buffers={name: self._copy(buffer, old_buffers.get(name)) for name, buffer in buffers.items()},
            state=state,
            groups=[{key: self._copy(value) for key, value in group.items() if key != "params"} for group in groups],
            others=[self._copy(other.state_dict()) for other in self._stateful],
        )

    def _has_all(self, moment: Moment) -> bool:
        held = {id(owner) for owner, _ in moment.parameters}
        return all(id(one) in held for group in self._optimizer.param_groups for one in group["params"])

    def _keep(self, step: int) -> None:
        """Makes the present the candidate, in the memory of the one before."""
        room = None if self._candidate is self._confirmed else self._candidate
        self._candidate = self._confirmed  # what is broken off in the midst of copying is no moment
        self._candidate = self._present(step, room)

    def restore(self, keep: int | None = None, sound: bool = False) -> int:
        """Puts the run back to its confirmed moment, in place, and returns the step of that moment.

        Args:
            keep: steps done now, to keep the present for ``resume``; None keeps what was given up before, if anything.
            sound: the newest snapshot counts as confirmed, unless it is what was given up.
        """
        if self._confirmed is None:
            raise RuntimeError("no snapshot has been taken yet")
        if sound and self._candidate is not None and not self._given_up:
            self._confirmed = self._candidate
        if keep is not None:
            self._keep(keep)
            self._given_up = True
        elif not self._given_up:
            self._candidate = self._confirmed
        return self._put(self._confirmed)

    def resume(self) -> None:
        """Puts the run to what it gave up by ``restore``, if that was kept."""
        if self._given_up and self._candidate is not None:
            self._put(self._candidate)
            self._candidate, self._given_up = self._confirmed, False

    def follow(self, health: Health, step: int, take: bool) -> bool:
        """Does what the guard concluded, and says whether the run was put back.

        Args:
            health: of one run.
            step: steps done now.
            take: whether a stable moment may be noted.
        """
        if health.resumed[0]:
            self.resume()
        elif health.rollback[0]:
            self.restore(step if health.kept[0] else None, bool(health.sound[0]))
        elif health.lost[0] and not self.empty:  # a safe stop: what the user is left with is sound
            self.restore()
            self.clear()
            return True
        elif health.stable[0] and take:
            self.take(step)
        return bool(health.rollback[0])

    @torch.no_grad()
    def _put(self, moment: Moment) -> int:
        """Makes the run what it was, in place, and returns the step of that moment."""
        for parameter, saved in moment.parameters:
            parameter.copy_(saved.values)
        for name, buffer in [] if self._model is None else self._model.named_buffers():
            if name in moment.buffers:
                buffer.copy_(moment.buffers[name].values)
        state = self._optimizer.state
        for owner in [owner for owner in state if owner not in moment.state]:
            del state[owner]
        for owner, held in moment.state.items():
            if isinstance(held, dict):
                put_back(state[owner], held)
            else:
                state[owner] = again(held)
        try:
            failed = self._load_others(moment)
        finally:
            self._put_groups(moment)
        if failed:
            raise RuntimeError(f"the model and its optimizer went back, but not {'; '.join(failed)}")
        return moment.step

    def _put_groups(self, moment: Moment) -> None:
        kind = own_step(self._optimizer)
        for group, values in zip(self._optimizer.param_groups, moment.groups, strict=False):
            if self._schedules:
                put_back(group, values, keep="params")
            elif kind is not None:  # what it counts and estimates lies among the hyperparameters
                group.update({key: again(values[key]) for key in kind.kept if key in values})

    def _load_others(self, moment: Moment) -> list[str]:
        """Puts the stateful objects back, each for itself, and says of which that failed; Ctrl-C comes after the last."""
        failed, broken = [], list[BaseException]()
        for other, saved in zip(self._stateful, moment.others, strict=True):
            try:
                other.load_state_dict(again(saved))
            except Exception as error:  # noqa: BLE001 - of somebody else's code; the others must go back all the same
                failed.append(f"{type(other).__name__}, which is stateful: {error!r}")
            except BaseException as error:  # noqa: BLE001 - raised below
                broken.append(error)
        if broken:
            raise broken[0]
        return failed
