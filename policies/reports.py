"""What ranks tell each other before a decision: where each stands and what it has measured; and what speaks against one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trimtab.inner_training.guard import Reason, in_words
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.telemetry import DEPTHS, SAMPLED_STEPS, Measured
from trimtab.policies.ranks import named
from trimtab.policies.rows import Form

SAME = 1e-5  # relative difference of weight norms up to which they may be rounded differently
STANDING = ("code", "step", "taken", "in_force", "scheduled", "moment", "moments")
MEASURED = ("losses", "grad_norm", "grad_dot", "update_norm", "weight_norm")
Say = Callable[[str, str], None]


def each(values: Sequence[float] | np.ndarray) -> str:
    """Numbers of all ranks in words.

    >>> each([3.0, 4.0])
    '(3, 4)'
    """
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


class Reports:
    """Rows of this kind, and what all ranks conclude from them alike.

    Args:
        window: losses in an interval.
        say: logs a warning, once for each of its first arguments.
    """

    def __init__(self, window: int, say: Say) -> None:
        self._say = say
        self._form = Form(
            dict.fromkeys((*STANDING, "val_loss", "clock", "deadline", "grad_dot"), 1)
            | {"losses": window, "grad_norm": min(SAMPLED_STEPS, window), "update_norm": DEPTHS, "weight_norm": DEPTHS}
        )

    def row(self, reading: Reading | None, **standing: float) -> np.ndarray:
        """This rank's; ``standing`` holds all of ``STANDING`` but ``taken``, the number of losses."""
        said: dict[str, Any] = {**standing, "taken": 0}
        if reading is not None:
            said |= {"val_loss": reading.val_loss, "clock": reading.clock, "deadline": reading.deadline}
            if (measured := reading.measured) is not None:
                said |= {name: getattr(measured, name) for name in MEASURED} | {"taken": len(measured.losses)}
        return self._form.row(said)

    def moments(self, rows: np.ndarray) -> np.ndarray:
        """The step (W,) of the moment that each rank can go back to, -1 for none."""
        return self._form.read(rows, "moment")[:, 0]

    def restorable(self, rows: np.ndarray) -> bool:
        """Whether all ranks can go back, and hold snapshots of the same steps."""
        moments, all_of_them = self.moments(rows), self._form.read(rows, "moments")[:, 0]
        return bool(moments[0] >= 0 and (moments == moments[0]).all() and (all_of_them == all_of_them[0]).all())

    def common(self, codes: np.ndarray, step: int) -> int:
        """The reasons (W,) of all ranks together, and that some have abstained where they differ."""
        found = codes.astype(np.int64)
        code = int(np.bitwise_or.reduce(found))
        if (found == found[0]).all():
            return code
        who = f"{named(np.flatnonzero(found))} abstained at step {step}"
        self._say(f"abstained {code}", f"{who} ({in_words(code)}), so every rank holds")
        return code | Reason.ABSTAINED

    def judge(self, rows: np.ndarray) -> int:
        """Why no rank may decide now, the same on all of them; 0 where nothing speaks against it."""
        steps, taken, codes, in_force, scheduled = (
            self._form.read(rows, name)[:, 0] for name in ("step", "taken", "code", "in_force", "scheduled")
        )
        step = int(steps[0])
        code = self.common(codes, step)
        if len(set(steps)) > 1 or (not code and len(set(taken)) > 1):
            self._say("apart in steps", f"ranks are at different steps {each(steps)}, with {each(taken)} losses noted; call "
                      "controller.step(loss) on every rank, once after each optimizer.step()")  # fmt: skip
            code |= Reason.APART
        if len(set(in_force)) > 1:
            self._say("apart in levers", f"ranks had different levers in force before step {step}, and take those of rank 0 "
                      "from now on; was a state loaded on some of them only?")  # fmt: skip
            code |= Reason.APART
        if len(set(scheduled)) > 1:
            self._say("apart in schedules", f"the scheduled learning rate differs between ranks at step {step}, so their "
                      "weights will; give the scheduler the same numbers on every rank")  # fmt: skip
        return code if code or taken[0] == 0 else self._unlike(rows, step, int(taken[0]))

    def _unlike(self, rows: np.ndarray, step: int, taken: int) -> int:
        """Whether ranks have measured what cannot be of one run."""
        read = self._form.read
        weights = np.abs(read(rows, "weight_norm"))
        with np.errstate(invalid="ignore"):
            apart = np.abs(weights - weights[:1]) > SAME * np.maximum(weights, weights[:1])
        if apart.any():  # what is not finite is the guard's to judge: going back makes ranks equal again
            self._say("apart in weights", f"ranks hold different weights since step {step} or earlier, so every lever "
                      "holds; are the gradients reduced on every rank?")  # fmt: skip
            return int(Reason.APART)
        sound = all(np.isfinite(read(rows, name)).all() for name in ("grad_norm", "update_norm", "weight_norm"))
        finite = np.isfinite(read(rows, "losses")[:, :taken]).all(1)
        if sound and finite.any() and not finite.all():
            self._say("loss", f"{named(np.flatnonzero(~finite))} abstained at step {step} (a loss is not finite, although "
                      "gradients and weights are), so every rank holds")  # fmt: skip
            return int(Reason.ABSTAINED)
        return 0

    def shared(self, reading: Reading, rows: np.ndarray) -> Reading:
        """The reading that all ranks share: means over ranks; of validation losses, those known; the slowest clock."""
        taken = int(self._form.read(rows, "taken")[0, 0])

        def mean(name: str, known: bool = False) -> np.ndarray:
            column = self._form.read(rows, name)
            held = column[~np.isnan(column).any(1)] if known else column
            with np.errstate(invalid="ignore", over="ignore"):
                return held.mean(0) if len(held) else np.full(column.shape[1], np.nan)

        reading.val_loss = mean("val_loss", known=True)
        reading.clock = self._form.read(rows, "clock").max(0)
        reading.deadline = np.fmin.reduce(self._form.read(rows, "deadline"))
        if reading.measured is not None:
            reading.measured = Measured(
                losses=mean("losses")[:taken, None],
                grad_norm=mean("grad_norm")[:, None],
                grad_dot=mean("grad_dot"),
                update_norm=mean("update_norm")[:, None],
                weight_norm=mean("weight_norm")[:, None],
                probed=reading.measured.probed,
            )
        return reading
