"""When the structure of a run may be edited, and how far: the guard's part for structural levers, for N runs at once."""

from __future__ import annotations

import numpy as np

from trimtab.inner_training.edits import EditConfig, UnitCounts
from trimtab.inner_training.guard_config import Reason


class EditLimits:
    """The memory of edits that the guard needs to permit the next ones.

    Attributes:
        config: the settings.
        rest: (N,) int64, decisions until a run may be edited again.
        done: (N,) int64, edits so far; those that a rollback took back count too.
        settling: (N,) int64, decisions for which a rise of the loss is taken for what the last edit does: those of the rest,
            one at least.
    """

    ARRAYS = ("rest", "done", "settling")

    def __init__(self, config: EditConfig, num_runs: int) -> None:
        self.config = config
        self.rest, self.done, self.settling = (np.zeros(num_runs, dtype=np.int64) for _ in range(3))

    def reset(self, mask: np.ndarray) -> None:
        """Forgets the runs in ``mask`` (bool, (N,))."""
        self.rest[mask] = self.done[mask] = self.settling[mask] = 0

    def pass_on(self, rolled_back: np.ndarray) -> None:
        """Another decision begins; in the runs ``rolled_back`` (bool, (N,)) nothing settles any more."""
        self.rest = np.maximum(self.rest - 1, 0)
        self.settling = np.where(rolled_back, 0, np.maximum(self.settling - 1, 0))

    @property
    def left(self) -> np.ndarray:
        """(N,) share of the budget left, in [0, 1]; 0 without one."""
        return 1 - self.done / self.config.budget if self.config.budget else np.zeros(len(self.done))

    @property
    def resting(self) -> np.ndarray:
        """(N,) share of the rest that is left, in [0, 1]."""
        return self.rest / max(self.config.rest, 1)

    def permit(
        self, name: str, action: np.ndarray, aimed: bool, units: UnitCounts, refused: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Turns an action of one lever into an edit.

        Args:
            name: of ``EDITS``.
            action: (N,) moves in [-1, 1], or targets.
            aimed: they are targets.
            units: of the runs now.
            refused: (N,) ``Reason`` codes for which a run may not be edited at this decision; 0 for none.

        Returns:
            Shares (N,), exactly 0 where nothing is edited: of ``width``, of all units, negative for those that go; of ``reset``, of
            the active units. And the reasons (N,) as ``Reason`` codes.
        """
        share, reasons = self._weighed(name, action, aimed, units, refused)
        permitted = share != 0
        self.rest[permitted] = self.config.rest
        self.settling[permitted] = max(self.config.rest, 1)
        self.done[permitted] += 1
        return share, reasons

    def legal(self, name: str, units: UnitCounts, refused: np.ndarray) -> np.ndarray:
        """(N, 2) bool: whether a whole move down and a whole move up would edit a run now; nothing is noted."""
        moves = (np.full(len(refused), sign) for sign in (-1.0, 1.0))
        return np.stack([self._weighed(name, move, False, units, refused)[0] != 0 for move in moves], axis=1)

    def _weighed(
        self, name: str, action: np.ndarray, aimed: bool, units: UnitCounts, refused: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What ``permit`` gives, without noting it."""
        proposed = np.isfinite(action)
        reasons = np.where(proposed, 0, Reason.NOT_FINITE)
        known = proposed & units.known
        given = np.where(known, action, 0.0)
        null = 1.0 if aimed else 0.0
        reasons |= np.where(proposed & ~units.known & (action != null), Reason.UNAVAILABLE, 0)
        if aimed:
            asked = np.where(known, given - units.share, 0.0)
        else:
            reasons |= np.where(np.abs(given) > 1, Reason.RATE, 0)
            small = (given != 0) & (np.abs(given) < self.config.dead_band)
            reasons |= np.where(small, Reason.SMALL, 0)
            asked = np.where(small, 0.0, np.clip(given, -1.0, 1.0) * self.config.most)
        if name == "reset":
            share = asked = np.maximum(asked, 0.0)
            touched = np.round(share * units.active.sum(1))
        else:
            share, clipped = self._within(asked, units)
            reasons |= clipped
            touched = np.where(share > 0, units.grown(share), units.pruned(-share, self.config.scope))
        if not aimed:  # a target that is met as nearly as whole units allow is met
            reasons |= np.where((asked != 0) & (touched < 1) & (reasons == 0), Reason.NO_UNIT, 0)
        wanted = (share != 0) & (touched >= 1)
        refused = refused | np.where(self.rest > 0, Reason.RESTING, 0)
        refused = refused | np.where(self.done >= self.config.budget, Reason.EDITS_SPENT, 0)
        reasons |= np.where(wanted, refused, 0)
        return np.where(wanted & (refused == 0), share, 0.0), reasons

    def _within(self, asked: np.ndarray, units: UnitCounts) -> tuple[np.ndarray, np.ndarray]:
        """Shares (N,) of all units that may go or be born, of those that are asked for, and the reasons (N,)."""
        share, total = np.nan_to_num(units.share), np.maximum(units.units.sum(1), 1)
        spare = np.maximum(units.active - units.minimum, 0).sum(1)
        room = (units.units - units.active).sum(1)
        # Whole units, so that rounding does not pass a limit.
        down = np.clip(np.floor((share - self.config.least) * total + 1e-6), 0, spare) / total
        up = np.clip(np.floor((self.config.most_active - share) * total + 1e-6), 0, room) / total
        narrow, wide = asked < -down - 1e-9, asked > up + 1e-9
        reasons = np.where(narrow, Reason.NARROWEST, 0) | np.where(wide, Reason.WIDEST, 0)
        within = np.clip(asked, -down, up)
        # Groups round each by itself: half a unit of the smallest one less, and all of them together stay below.
        smallest = np.where(units.units > 0, units.units, np.inf).min(1)
        over = (within > 0) & (units.grown(within) > np.round(up * total))
        return np.where(over, np.maximum(within - 0.5 / smallest, 0.0), within), reasons
