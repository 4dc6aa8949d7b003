"""How far a training is: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from stable_baselines3.common.callbacks import BaseCallback

LINES = 20  # plain lines of a whole training


def clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock(3725), clock(59.6), clock(float("inf"))
    ('1:02:05', '0:01:00', '-:--')
    """
    if not np.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class ProgressDisplay(BaseCallback):
    """Shows steps done, reward, speed, time left and the last evaluation while a learner learns.

    Args:
        total: environment steps of the whole training.
        evaluation: what to say of the last evaluation; empty for none yet.
        console: where to write.
    """

    def __init__(self, total: int, evaluation: Callable[[], str], console: Console) -> None:
        super().__init__()
        self.total, self.evaluation, self.console = total, evaluation, console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._begun, self._first, self._next_line = 0.0, 0, 0

    def status(self) -> str:
        """One line: mean return of the last episodes, environment steps per second, time left, last evaluation."""
        elapsed = time.perf_counter() - self._begun
        done = self.num_timesteps - self._first
        speed = done / elapsed if elapsed > 0 else 0.0
        left = (self.total - self.num_timesteps) / speed if speed > 0 else float("inf")
        returns = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        reward = f"{np.mean(returns):+.3f}" if returns else "-"
        parts = [f"reward {reward}", f"{speed:.0f} steps/s", f"{clock(max(left, 0.0))} left", self.evaluation()]
        return "  ".join(part for part in parts if part)

    def _on_training_start(self) -> None:
        self._begun, self._first = time.perf_counter(), self.model.num_timesteps
        self._next_line = self._first
        if self.console.is_terminal:
            columns = BarColumn(10), TextColumn("{task.percentage:.0f}%"), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=self.console, refresh_per_second=4)
            self._task = self._bar.add_task("", total=self.total, completed=self._first)
            self._bar.start()

    def _on_step(self) -> bool:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.num_timesteps, description=self.status())
        elif self.num_timesteps >= self._next_line:
            self._next_line = self.num_timesteps + self.total // LINES
            self._line()
        return True

    def _on_training_end(self) -> None:
        self.close()
        self._line()

    def close(self) -> None:
        """Leaves the terminal as it was; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self) -> None:
        say(self.console, f"{self.num_timesteps}/{self.total}  {self.status()}")


def say(console: Console, line: str) -> None:
    """Prints a line as it is: not wrapped, not coloured."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
