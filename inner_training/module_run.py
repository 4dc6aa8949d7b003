"""One large run with the face of a population: any module, optimizer and loader, steered as populations are."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import MismatchError, UserError, check_whole, unknown
from trimtab.inner_training.events import check_event
from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.live_events import LiveEvents
from trimtab.inner_training.live_run import CLIP, LiveRun
from trimtab.inner_training.live_snapshot import LiveSnapshots
from trimtab.inner_training.measurements import PROBE_EVERY
from trimtab.inner_training.module_family import ModuleFamily, ModuleInstance
from trimtab.inner_training.module_parts import Batches, Parts, check_loss, check_parts, evaluating, examples_in
from trimtab.inner_training.own_randomness import OwnRandomness, default_device
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.telemetry import Measured, Telemetry, unmeasured

Snapshots = Literal["device", "cpu", "off"]
MOST_SKIPPED = 32  # steps that a gradient scaler may skip in an interval: from 2**16 it halves 16 times down to 1


@dataclass(frozen=True)
class _Underway:
    """A run between its reset and the next one.

    Attributes:
        parts, live, batches, random: what it is made of, its steps, its data and its random state.
        snapshots: None where none are kept.
        batch_size: examples in its first step, NaN where they cannot be counted.
        device: of its parameters.
        events: what may fire in it.
    """

    parts: Parts
    live: LiveRun
    batches: Batches
    random: OwnRandomness
    snapshots: LiveSnapshots | None
    batch_size: float
    device: torch.device
    events: LiveEvents


class ModuleRun:
    """One run, made anew by each ``reset``, with the face of a ``Population`` of one.

    A run computes under random state of its own (see ``OwnRandomness``), so that it follows from its seed. A snapshot
    holds parameters, buffers, the state of optimizer, scheduler and scaler, the random state, and the position of a
    loader that has one; ``restore`` puts all of them back, bit for bit. The count of steps goes on, as in a population.

    Args:
        family: makes the runs.
        snapshots: where the two copies lie that the guard needs: on the ``device`` of the run, on the ``cpu``, or
            ``off`` for none, where there is no rollback.

    Attributes:
        num_runs: 1.
        instances: the instance of the run (None before the first reset).

    >>> def make(seed):
    ...     module = nn.Linear(4, 1)
    ...     batches = [torch.randn(8, 4) for _ in range(10)]
    ...     return Parts(
    ...         module=module,
    ...         optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
    ...         train=batches,
    ...         loss=lambda module, batch: (module(batch)[:, 0] - batch[:, 0]).square().mean(),
    ...         total_steps=100,
    ...     )
    >>> run = ModuleRun(ModuleFamily(name="line", make=make, loss_cap=10.0))
    >>> run.reset([0], [run.family.draw(0, held_out=False)])
    >>> telemetry = run.advance(20)
    >>> tuple(telemetry.losses.shape), bool(telemetry.losses[-1] < telemetry.losses[0])
    ((20, 1), True)
    """

    num_runs = 1

    def __init__(self, family: ModuleFamily, *, snapshots: Snapshots = "device") -> None:
        if snapshots not in get_args(Snapshots):
            raise unknown("place of snapshots", snapshots, get_args(Snapshots))
        self.family, self._place = family, snapshots
        self.instances: list[ModuleInstance | None] = [None]
        self._underway: _Underway | None = None
        self._last: weakref.ref[nn.Module] | None = None  # the module of the run before, while somebody holds it
        self._measured: tuple[Sequence[str], int] = (), PROBE_EVERY
        self._what = f"run {family.name!r}"

    # --- starting a run ---------------------------------------------------------------------------------------

    def reset(self, runs: Sequence[int], instances: Sequence[ModuleInstance]) -> None:
        """Makes the run of ``instances[0]`` where ``runs`` is ``[0]``; nothing happens where it is empty.

        Raises:
            UserError: what ``make`` returned does not fit together; see ``Parts``.
        """
        for instance in instances[: len(runs)]:
            self._drop()
            self._underway, self.instances = self._started(instance), [instance]
            self._last = weakref.ref(self._underway.parts.module)

    def _drop(self) -> None:
        """Frees the run at once, before another one takes its place in memory."""
        if self._underway is not None:
            self._underway.live.detach()
            vars(self._underway.parts.optimizer).pop("step", None)  # a scheduler's wrapper, which closes a cycle
        self._underway, self.instances = None, [None]

    def _started(self, instance: ModuleInstance) -> _Underway:
        random = OwnRandomness(instance.seed)
        with random.inside(default_device()):
            parts = check_parts(self.family.make(instance.seed), self._what)
        if self._last is not None and parts.module is self._last():
            raise UserError(
                f"make(seed) of {self._what} returned the module of the run before; build a fresh one each time"
            )
        batches, device = Batches(parts.train, self._what), parts.device
        stateful = (parts.scheduler, parts.scaler, batches if batches.stateful else None, random)
        snapshots = None
        if self._place != "off":
            snapshots = LiveSnapshots(
                parts.optimizer,
                parts.module,
                [one for one in stateful if one is not None],
                spacing=0,
                device=torch.device("cpu") if self._place == "cpu" else None,
            )
            snapshots.take(0)
        with random.inside(device):
            batch_size = float(examples_in(batches.peek()) or np.nan) * parts.accumulate
        live = LiveRun(parts.optimizer, 1)
        live.measure(self._measured[0], parts.module, self._measured[1])
        live.deadline = parts.deadline
        events = LiveEvents(parts.optimizer, snapshots, True, live.hooks.safely)
        return _Underway(parts, live, batches, random, snapshots, batch_size, device, events)

    def _now(self) -> _Underway:
        if self._underway is None:
            raise MismatchError(f"{self._what} has not begun; call reset first")
        return self._underway

    @property
    def parts(self) -> Parts:
        """What the run is made of; ``parts.module`` is the module in training."""
        return self._now().parts

    @property
    def device(self) -> torch.device:
        """Where the run is computed."""
        return self._now().device

    # --- hyperparameters --------------------------------------------------------------------------------------

    @property
    def steps_done(self) -> np.ndarray:
        """(1,) int64 optimizer steps since the reset."""
        return np.full(1, 0 if self._underway is None else self._underway.live.steps, dtype=np.int64)

    @property
    def total_steps(self) -> np.ndarray:
        """(1,) int64 budget."""
        return np.full(1, 1 if self._underway is None else self._underway.parts.total_steps, dtype=np.int64)

    @property
    def base(self) -> dict[str, np.ndarray]:
        """Base value (1,) of each hyperparameter now: what the schedule and the parameter groups say."""
        levers = tuple(LEVERS.values())
        if self._underway is not None:
            return self._underway.live.base(levers)
        nothing = {name: np.zeros(1) for name in ("momentum", "weight_decay", *(one.hyperparameter for one in levers))}
        return {**nothing, "lr": np.ones(1), CLIP: np.full(1, np.inf)}

    def set_lr_multiplier(self, values: np.ndarray) -> None:
        """Sets the factor (1,) on the scheduled learning rate of every group, from the next step on."""
        self._now().live.lr_multiplier = float(values[0])

    def set_hyperparameters(self, values: Mapping[str, np.ndarray]) -> None:
        """Sets effective values (1,) of other hyperparameters, ``grad_clip`` as an absolute norm (infinity is off).

        A group whose own value is not the base moves in proportion.
        """
        self._now().live.assign({name: float(value[0]) for name, value in values.items()})

    # --- training ---------------------------------------------------------------------------------------------

    def advance(self, steps: int) -> Telemetry:
        """Trains for ``steps`` >= 1 optimizer steps; nothing synchronises with the device but a gradient scaler.

        Raises:
            UserError: the loss is no scalar tensor with a gradient, or the loader holds no batch.
        """
        check_whole("steps", steps, 1)
        now = self._now()
        live, scheduler = now.live, now.parts.scheduler
        live.begin(steps)
        skipped = 0
        with now.random.inside(now.device), torch.enable_grad():
            while live.position < steps and skipped <= MOST_SKIPPED:
                before = live.steps
                loss = self._step(now.parts, [now.batches.take() for _ in range(now.parts.accumulate)])
                if live.steps == before:
                    skipped += 1
                    continue
                live.record(loss)
                if scheduler is not None and live.steps <= now.parts.total_steps:
                    scheduler.step()
        if live.position < steps:
            return unmeasured(steps, now.device)
        telemetry = live.telemetry()
        now.events.anchor.pull()
        if telemetry is None:
            raise RuntimeError(f"an interval of {self._what} could not be measured; the log says why")
        return telemetry

    def measure(self, names: Sequence[str], every: int = PROBE_EVERY) -> None:
        """Takes further measurements, as ``Population.measure``; those that a live run cannot take stay unknown."""
        self._measured = names, every
        if self._underway is not None:
            self._underway.live.measure(names, self._underway.parts.module, every)

    def _step(self, parts: Parts, batches: Sequence[Any]) -> Tensor:
        """One step on the mean gradient of some batches; gives the mean loss before it."""
        first: list[Tensor] = []

        def backward() -> Tensor:
            parts.optimizer.zero_grad()
            losses = []
            for batch in batches:
                loss = check_loss(parts.loss(parts.module, batch), self._what)
                if not loss.requires_grad:
                    raise UserError(f"the loss of {self._what} has no gradient; compute it from the module's outputs")
                share = loss / len(batches)
                (share if parts.scaler is None else parts.scaler.scale(share)).backward()
                losses.append(loss.detach())
            first.append(torch.stack(losses).mean())
            return first[-1]

        if parts.needs_closure:
            parts.optimizer.step(backward)  # type: ignore[arg-type]  # as its own documentation has it
            return first[0]
        backward()
        if parts.scaler is None:
            parts.optimizer.step()
        else:
            parts.scaler.step(parts.optimizer)
            parts.scaler.update()
        return first[0]

    @torch.no_grad()
    def evaluate(self, split: str, max_examples: int | None = None) -> Tensor:
        """Mean loss (1,) over ``validation`` or ``test`` in evaluation mode, on the device.

        Args:
            split: which.
            max_examples: stop after the batch with which so many examples are reached; None for all.

        Raises:
            UserError: the run has no such data.
        """
        now = self._now()
        parts = now.parts
        if split not in ("validation", "test"):
            raise unknown("split of a module run", split, ("validation", "test"))
        loader = parts.validation if split == "validation" else parts.test
        if loader is None:
            raise UserError(f"{self._what} has no {split} data; give Parts({split}=...)")
        total, count = torch.zeros((), device=now.device), 0
        with now.random.inside(now.device, keep=False), evaluating(parts.module):
            for batch in loader:
                examples = examples_in(batch) or 1
                total = total + examples * check_loss(parts.loss(parts.module, batch), self._what).float()
                count += examples
                if max_examples is not None and count >= max_examples:
                    break
        if count == 0:
            raise UserError(f"{split} of {self._what} holds no batch; give at least one")
        return (total / count).reshape(1)

    def snapshot(self, mask: np.ndarray) -> None:
        """Notes the present as stable where ``mask`` (bool, (1,)) says so."""
        if mask[0] and (snapshots := self._now().snapshots) is not None:
            snapshots.take(self._now().live.steps)

    def restore(self, mask: np.ndarray, keep: np.ndarray | None = None, sound: np.ndarray | None = None) -> None:
        """Puts the run back to its last confirmed moment where ``mask`` (bool, (1,)) says so (see ``Population``)."""
        if mask[0]:
            at = self._now().live.steps if keep is not None and keep[0] else None
            self._kept().restore(at, sound is not None and bool(sound[0]))

    def resume(self, mask: np.ndarray) -> None:
        """Puts the run to what it gave up by ``restore`` where ``mask`` (bool, (1,)) says so."""
        if mask[0]:
            self._kept().resume()

    def _kept(self) -> LiveSnapshots:
        if (snapshots := self._now().snapshots) is None:
            raise MismatchError(f"{self._what} keeps no snapshots; choose another place for them than 'off'")
        return snapshots

    def fire(self, event: str, mask: np.ndarray) -> None:
        """Does what an event (see ``events``) does to the run where ``mask`` (bool, (1,)) says so."""
        check_event(event)
        if mask[0]:
            self._now().events.happen((event,))

    def reading(self, measured: Measured | None, val_loss: np.ndarray) -> Reading:
        """A reading of the run; levers and guard are filled in by ``Steering.assess``."""
        now, levers = self._now(), tuple(LEVERS.values())
        reading = now.live.described(levers, measured, now.parts.total_steps, float(val_loss[0]))
        reading.batch_size = np.full(1, now.batch_size)
        return reading
