"""Ctrl-C waits while a decision is put into effect, so that nothing is left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class Interrupts:
    """Keeps the handler of Ctrl-C (SIGINT) waiting, and lets it through where something may take long.

    Only the main thread is ever interrupted, and only by a handler of Python's; elsewhere there is nothing to keep.

    >>> interrupts, done = Interrupts(), []
    >>> try:
    ...     with interrupts.held():
    ...         signal.raise_signal(signal.SIGINT)
    ...         done.append("all of it")
    ... except KeyboardInterrupt:
    ...     done.append("then Ctrl-C")
    >>> done
    ['all of it', 'then Ctrl-C']
    """

    def __init__(self) -> None:
        self._handler: Handler | None = None  # the one that waits
        self._came: list[tuple[int, FrameType | None]] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Ctrl-C comes after this block."""
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(handler) or self._handler:
            yield
            return
        try:  # one that comes before it can wait finds everything as it was
            signal.signal(signal.SIGINT, self._note)
            self._handler = handler
            yield
        finally:
            self._handler = None
            signal.signal(signal.SIGINT, handler)
            self._pass_on(handler)

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Inside ``held``: Ctrl-C comes at once in this block, also one that has waited."""
        handler = self._handler
        if handler is None:
            yield
            return
        try:
            signal.signal(signal.SIGINT, handler)
            self._pass_on(handler)
            yield
        finally:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append((number, frame))

    def _pass_on(self, handler: Handler) -> None:
        came, self._came = self._came, []
        if came:
            handler(*came[0])
