"""Hooks around an optimizer's steps that hold whatever happens in a step."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger("trimtab")


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What to do when; an exception in one of the first three is logged, and the step goes on.

    Attributes:
        before: before a step.
        gradients: when the step's gradients exist: at once, or after each call of its closure.
        after: after a step that was done, when ``outside`` has been called.
        outside: no step is under way (any more); also after one that raised.
    """

    before: Callable[[], None]
    gradients: Callable[[], None]
    after: Callable[[], None]
    outside: Callable[[], None]


def _nothing() -> None:
    pass


def untraced(act: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, at which the graph of a compiled step breaks; uncompiled steps do without the wrapper for that."""
    breaking = torch.compiler.disable(act)  # type: ignore[no-untyped-call]

    def either(*args: Any, **kwargs: Any) -> Any:
        return breaking(*args, **kwargs) if torch.compiler.is_compiling() else act(*args, **kwargs)

    return either


class StepHooks:
    """Calls ``moments`` around each real step of an optimizer.

    Hooks are not called when a step raises, so the optimizer's ``step`` is wrapped too, only for ``outside``. A step
    inside a step (an optimizer that calls its parent's) and steps that a gradient scaler skips are passed over.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, moments: Moments) -> None:
        self.optimizer, self.moments = optimizer, moments
        self._depth, self._skip, self._inside = 0, False, False
        self._said: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._step: types.MethodType | None = None

    def attach(self) -> None:
        """Puts the hooks and the wrapper on; where that fails, ``detach`` takes off what is there."""
        self._handles.append(self.optimizer.register_step_pre_hook(untraced(self._pre_hook)))
        self._handles.append(self.optimizer.register_step_post_hook(untraced(self._post_hook)))
        self._wrap()

    def _wrap(self) -> None:
        optimizer = self.optimizer
        self._own_step = vars(optimizer).get("step")
        original, outside = optimizer.step, untraced(self.outside)

        @functools.wraps(type(optimizer).step)
        def step(this: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            del this
            try:
                return original(*args, **kwargs)
            finally:
                outside()

        vars(step).update(getattr(original, "__dict__", {}))  # marks that schedulers left there, and look for
        self._step = types.MethodType(step, optimizer)
        optimizer.step = self._step  # type: ignore[method-assign]

    def outside(self) -> None:
        """No step is under way, whatever it may have looked like."""
        if self._inside:
            self._depth = 0
            self.moments.outside()
            self._inside = False  # now: broken off, it is done again

    def detach(self) -> None:
        """Removes the hooks and the wrapper, and lets go of the run, which may be large."""
        for handle in self._handles:
            handle.remove()
        self.outside()
        ours, self._step = self._step, None
        if ours is not None and vars(self.optimizer).get("step") is ours:  # else somebody wrapped ours, now idle
            if self._own_step is None:
                del self.optimizer.step
            else:
                self.optimizer.step = self._own_step  # type: ignore[method-assign]
        self.moments = Moments(before=_nothing, gradients=_nothing, after=_nothing, outside=_nothing)

    def _pre_hook(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._depth += 1
        if self._depth > 1:  # an optimizer whose step calls that of its parent class, which has hooks too
            return None
        if self._inside:
            self.moments.outside()
        self._inside = True
        found = getattr(optimizer, "found_inf", None)  # set by a gradient scaler whose fused kernel will skip
        self._skip = found is not None and bool(found.item())
        if self._skip:
            return None
        self.safely("preparing a step", self.moments.before)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.safely("measuring gradients", self.moments.gradients)
            return None

        def measured_closure() -> Any:
            loss = closure()
            self.safely("measuring gradients", self.moments.gradients)
            return loss

        if len(args) > 1:
            return (args[0], measured_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": measured_closure}

    def _post_hook(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del optimizer, args, kwargs
        self._depth -= 1
        if self._depth > 0:
            return
        self.outside()
        if self._skip:
            return
        self.safely("measuring an update", self.moments.after)

    def safely(self, what: str, act: Callable[[], None]) -> None:
        """Does something that the training goes on without, whatever happens in there; said once."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever it is, the training must not stop for it
            self.say(what, f"{what} failed, and the training goes on without it: {error!r}")

    def say(self, what: str, message: str) -> None:
        """Logs a warning, once for each ``what``."""
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s", message)
