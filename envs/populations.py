"""Several populations, one for each task family, that advance as one row of N runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from trimtab.envs.parts import FamilyShare
from trimtab.envs.structures import COUNTS, Structures
from trimtab.errors import check_whole, unknown
from trimtab.inner_training.device import check_device
from trimtab.inner_training.disturbances import DisturbanceSettings, Disturber, Event
from trimtab.inner_training.edits import EditConfig
from trimtab.inner_training.measurements import UNITS
from trimtab.inner_training.module_family import ModuleInstance
from trimtab.inner_training.module_run import ModuleRun
from trimtab.inner_training.population import Population
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.stepping import Mode, choose_mode
from trimtab.inner_training.task import Instance
from trimtab.inner_training.tasks import resolve_family
from trimtab.inner_training.telemetry import Measured, join

Member = Population | ModuleRun
_JOINED = (
    "fresh",
    "step",
    "total_steps",
    "val_loss",
    "parameters",
    "batch_size",
    "depth",
    "adaptive",
    "initial_lr",
    "clock",
    "deadline",
)


def split_runs(num_runs: int, shares: Sequence[float]) -> list[int]:
    """Splits runs by shares (largest remainders), at least one each.

    Raises:
        RangeError: when there are fewer runs than shares.

    >>> split_runs(8, [1, 1, 1])
    [3, 3, 2]
    >>> split_runs(4, [100, 1, 1])
    [2, 1, 1]
    """
    check_whole("num_envs", num_runs, len(shares), "each task family of the scenario takes at least one run")
    wanted = (num_runs - len(shares)) * np.asarray(shares, dtype=np.float64) / sum(shares)
    sizes = 1 + np.floor(wanted).astype(int)
    first = np.argsort(np.floor(wanted) - wanted, kind="stable")
    sizes[first[: num_runs - sizes.sum()]] += 1
    return [int(size) for size in sizes]


class Populations:
    """N runs in contiguous blocks, one block for each family, with the face of one population.

    Args:
        families: names and shares.
        num_runs: N, at least the number of families.
        clip: whether gradients may be clipped (costs a norm at every step).
        score: whether steps record the score of the families that have one.
        disturbances: the faults that may befall every run.
        structure: how their units are edited; None where they are not.
        device: a torch device.
        mode: as for ``Population``; ``"auto"`` is decided on all runs together.

    Attributes:
        members: the populations; module runs are populations of one (see ``of``).
        blocks: the runs of each, as slices of ``range(N)``.
        family_names: (N,) name of each run's family.
        floor, cap: (N,) range of the bounded loss.
        structures: their units; None where nobody edits them.
    """

    structures: Structures | None = None

    def __init__(
        self,
        families: Sequence[FamilyShare],
        num_runs: int,
        *,
        clip: bool,
        score: bool = False,
        disturbances: Sequence[DisturbanceSettings] = (),
        structure: EditConfig | None = None,
        device: str = "cpu",
        mode: Mode = "auto",
    ) -> None:
        sizes = split_runs(num_runs, [family.share for family in families])
        if mode not in get_args(Mode):
            raise unknown("mode", mode, get_args(Mode))
        check_device(device)
        chosen = choose_mode(mode, num_runs)
        resolved = [resolve_family(family.name) for family in families]
        members = [
            Population(
                family,
                size,
                device=device,
                mode=chosen,
                clip=clip,
                score=score and bool(family.score_name),
                disturbances=disturbances,
            )
            for family, size in zip(resolved, sizes, strict=True)
        ]
        self._arrange(members, [family.name for family in families])
        self.structures = None if structure is None else Structures(members, structure)

    @classmethod
    def of(cls, members: Sequence[Member]) -> Populations:
        """Runs that somebody has made already, side by side, each under the name of its own family."""
        made = cls.__new__(cls)
        made._arrange(members, [member.family.name for member in members])
        return made

    def _arrange(self, members: Sequence[Member], names: Sequence[str]) -> None:
        sizes = [member.num_runs for member in members]
        self.num_runs, self.members = sum(sizes), tuple(members)
        ends = np.cumsum(sizes).tolist()
        self.blocks = tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))
        self.family_names = tuple(name for name, size in zip(names, sizes, strict=True) for _ in range(size))
        self.floor = np.repeat([member.family.loss_floor for member in members], sizes)
        self.cap = np.repeat([member.family.loss_cap for member in members], sizes)

    def _pairs(self) -> Iterator[tuple[Member, slice]]:
        return zip(self.members, self.blocks, strict=True)

    def _gather(self, take: Callable[[Member], np.ndarray]) -> np.ndarray:
        return np.concatenate([take(member) for member in self.members])

    @property
    def instances(self) -> list[Instance | ModuleInstance | None]:
        """The instance of each run, None before its first reset."""
        return [instance for member in self.members for instance in member.instances]

    @property
    def disturbances(self) -> tuple[DisturbanceSettings, ...]:
        """The faults that may befall every run; none befall runs of one's own."""
        disturber = self._disturbers()[0]
        return () if disturber is None else disturber.settings

    @property
    def events(self) -> list[tuple[Event, ...]]:
        """The faults of each run."""
        pairs = zip(self._disturbers(), self.members, strict=True)
        return [events for one, member in pairs for events in (one.events if one else [()] * member.num_runs)]

    def _disturbers(self) -> list[Disturber | None]:
        return [member.disturber if isinstance(member, Population) else None for member in self.members]

    def disturbed_steps(self, steps: int) -> dict[str, np.ndarray]:
        """In how many of the last ``steps`` each kind of fault was active, (N,) int64, by name."""
        found = [
            one.active_steps(member.steps_done, steps)
            for one, member in zip(self._disturbers(), self.members, strict=True)
            if one is not None
        ]
        return {kind: np.concatenate([part[kind] for part in found]) for kind in found[0]} if found else {}

    @property
    def device(self) -> torch.device:
        """Where the first runs are computed; of module runs it is known from their first reset on."""
        return self.members[0].device

    @property
    def steps_done(self) -> np.ndarray:
        """(N,) int64 optimizer steps done."""
        return self._gather(lambda member: member.steps_done)

    @property
    def total_steps(self) -> np.ndarray:
        """(N,) int64 budgets in optimizer steps."""
        return self._gather(lambda member: member.total_steps)

    @property
    def base(self) -> dict[str, np.ndarray]:
        """Base value (N,) of each hyperparameter now."""
        return _joined_base([member.base for member in self.members])

    def reset(
        self,
        mask: np.ndarray,
        seeds: np.ndarray,
        *,
        held_out: bool,
        instances: Mapping[int, Instance] | None = None,
    ) -> None:
        """Starts the instances of ``seeds`` (N,) in the runs of ``mask`` (bool, (N,)); the others are untouched.

        ``instances``, if given, are started instead, by run.
        """
        for member, block in self._pairs():
            runs = np.flatnonzero(mask[block])
            if instances is None:
                drawn: list[Any] = [member.family.draw(int(seed), held_out=held_out) for seed in seeds[block][runs]]
            else:
                drawn = [instances[block.start + int(run)] for run in runs]
            member.reset(runs.tolist(), drawn)
        if self.structures is not None:
            self.structures.begin(mask)

    def set_lr_multiplier(self, values: np.ndarray) -> None:
        """Sets the factor (N,) on the scheduled learning rate."""
        for member, block in self._pairs():
            member.set_lr_multiplier(values[block])

    def set_hyperparameters(self, values: Mapping[str, np.ndarray]) -> None:
        """Sets effective values (N,) of the other hyperparameters."""
        for member, block in self._pairs():
            member.set_hyperparameters({name: value[block] for name, value in values.items()})

    def advance(self, steps: int, val_examples: int) -> tuple[Measured, np.ndarray]:
        """Trains every run and evaluates it, with one synchronisation for each population at the very end.

        Returns:
            Telemetry of the interval, and the mean validation loss (N,) after it.
        """
        pending = []
        for number, member in enumerate(self.members):
            telemetry = member.advance(steps)
            validation = member.evaluate("validation", val_examples)
            # The validation loss rides along as one more row of losses, so that it costs no transfer of its own.
            losses = torch.cat([telemetry.losses, validation[None]])
            units = {} if self.structures is None else self.structures.rows(number)
            pending.append(replace(telemetry, losses=losses, probed={**telemetry.probed, **units}))
        joined = join([telemetry.to_host() for telemetry in pending])
        if self.structures is not None:
            self.structures.note(joined.probed[COUNTS])
        return replace(joined, losses=joined.losses[:-1]), joined.losses[-1]

    def measure(self, names: Sequence[str]) -> None:
        """Takes further measurements of every run (see ``Population.measure``), in place of those up to now."""
        for member in self.members:
            member.measure([name for name in names if name != UNITS])
        if self.structures is not None:
            self.structures.measured = UNITS in names

    def validation_loss(self, val_examples: int, mask: np.ndarray) -> np.ndarray:
        """Mean validation loss (N,) now; populations without a run in ``mask`` are spared and give NaN."""
        loss = np.full(self.num_runs, np.nan)
        for member, block in self._pairs():
            if mask[block].any():
                loss[block] = _host(member.evaluate("validation", val_examples))
        return loss

    def test_loss(self) -> np.ndarray:
        """Mean test loss (N,) now; not finite for a diverged run."""
        return self._gather(lambda member: _host(member.evaluate("test")))

    def phase_score(self, phase: int) -> np.ndarray:
        """Mean test score (N,) of a phase; for a family without a score, minus the ln of its bounded loss."""
        parts = []
        for member in self.members:
            assert isinstance(member, Population)  # a run of one's own has no phases
            at = min(phase, member.family.max_phases - 1)
            scored = bool(member.family.score_name)
            value = _host(member.evaluate("test", phase=at, score=scored))
            parts.append(value if scored else -np.log(member.family.bounded(value)))
        return np.concatenate(parts)

    def bounded(self, loss: np.ndarray) -> np.ndarray:
        """Mean losses (N,) inside each family's ``[loss_floor, loss_cap]``."""
        return np.concatenate([member.family.bounded(loss[block]) for member, block in self._pairs()])

    def snapshot(self, mask: np.ndarray) -> None:
        """Notes the present of the runs in ``mask`` as stable."""
        for member, block in self._pairs():
            member.snapshot(mask[block])

    def fire(self, event: str, mask: np.ndarray) -> None:
        """Does what an event does to the runs in ``mask`` (bool, (N,))."""
        for member, block in self._pairs():
            member.fire(event, mask[block])

    def restore(self, mask: np.ndarray, keep: np.ndarray | None = None, sound: np.ndarray | None = None) -> None:
        """Puts the runs in ``mask`` back to their last confirmed moment (see ``Population.restore``)."""
        for member, block in self._pairs():
            member.restore(mask[block], *(None if one is None else one[block] for one in (keep, sound)))

    def resume(self, mask: np.ndarray) -> None:
        """Puts the runs in ``mask`` to what they gave up by ``restore``."""
        for member, block in self._pairs():
            member.resume(mask[block])

    def reading(self, measured: Measured | None, val_loss: np.ndarray) -> Reading:
        """A reading of all runs; levers and guard are filled in by ``Steering.assess``."""
        parts = [member.reading(None, val_loss[block]) for member, block in self._pairs()]
        joined: dict[str, Any] = {
            name: np.concatenate([np.broadcast_to(getattr(part, name), part.num_runs) for part in parts])
            for name in _JOINED
        }
        units = None if self.structures is None else self.structures.units
        return Reading(measured=measured, base=_joined_base([part.base for part in parts]), units=units, **joined)


def _host(loss: Tensor) -> np.ndarray:
    values: np.ndarray = loss.double().cpu().numpy()
    return values


def _joined_base(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
