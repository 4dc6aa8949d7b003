"""The units of several populations side by side, as structural levers see them: one row of N runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab.inner_training.edits import EditConfig, UnitCounts
from trimtab.inner_training.measurements import UNITS
from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.population_edits import PopulationEdits

COUNTS = "unit_counts"  # what rides along in the one transfer of a decision


class Structures:
    """Units of N runs, edited and counted.

    Args:
        members: populations in order.
        config: settings of the edits.

    Attributes:
        config: those.
        units: of all runs, as they were at the last count.
        work: (N,) share of the widest network's multiplications that active units did then.
        measured: whether intervals end with the diagnostics of the units.
    """

    def __init__(self, members: Sequence[Population], config: EditConfig) -> None:
        self.config, self.measured = config, False
        self._parts = [PopulationEdits(member, config) for member in members]
        ends = np.cumsum([member.num_runs for member in members]).tolist()
        self._blocks = [slice(end - member.num_runs, end) for end, member in zip(ends, members, strict=True)]
        self._groups = max(len(part.sizes) for part in self._parts)
        self._units, self._minimum = (
            np.concatenate([self._padded(getattr(part, name), part) for part in self._parts])
            for name in ("sizes", "minimum")
        )
        self.note(self._counted())

    def _padded(self, per_group: np.ndarray, part: PopulationEdits) -> np.ndarray:
        wide = np.pad(per_group, (0, self._groups - len(per_group)))
        return np.tile(wide, (part.population.num_runs, 1))

    def begin(self, mask: np.ndarray) -> None:
        """The runs in ``mask`` (bool, (N,)) have just been reset."""
        for part, block in zip(self._parts, self._blocks, strict=True):
            part.begin(mask[block])
        self.note(self._counted())

    def edit(self, edits: Mapping[str, np.ndarray]) -> None:
        """Does what was permitted: shares (N,) by lever (see ``EditLimits.permit``), one call for each kind of edit."""
        width, reset = (edits.get(name, np.zeros(len(self._units))) for name in ("width", "reset"))
        gone = self.units.of_active(np.maximum(-width, 0.0))
        for part, block in zip(self._parts, self._blocks, strict=True):
            for function, shares in ((part.prune, gone), (part.grow, np.maximum(width, 0.0)), (part.reset, reset)):
                if shares[block].any():
                    function(shares[block])

    def rows(self, number: int) -> dict[str, Tensor]:
        """What an interval of one member ends with, by name, for its telemetry."""
        part = self._parts[number]
        found = {COUNTS: self._wide(part.counts())}
        taken = part.measure() if self.measured else None
        return found if taken is None else {**found, UNITS: taken}

    def _wide(self, counts: Tensor) -> Tensor:
        return torch.nn.functional.pad(counts, (0, 0, 0, 1 + self._groups - len(counts)))

    def _counted(self) -> np.ndarray:
        """(1 + G, N) counted now, which waits for the device."""
        counts = [self._wide(part.counts()).double().cpu().numpy() for part in self._parts]
        return np.concatenate(counts, axis=1)

    def recount(self) -> None:
        """Counts again, where runs were put back after their interval."""
        self.note(self._counted())

    def note(self, counts: np.ndarray) -> None:
        """Notes counts (1 + G, N), as ``rows`` gave them."""
        self.work = counts[0]
        self.units = UnitCounts(counts[1:].T.astype(np.int64), self._units, self._minimum)
