"""What a training run of the user's own is made of: verified before it trains, and fed without end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from trimtab.errors import MismatchError, RangeError, UserError, check_whole

Loss = Callable[[nn.Module, Any], Tensor]
_END = object()


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One training run at its beginning.

    Attributes:
        module: any module, on any device; batch norm, dropout and ``torch.compile`` are welcome.
        optimizer: any ``torch.optim.Optimizer`` over parameters of the module, with any number of groups.
        train: an iterable of batches, iterated again when it ends; its position is part of a snapshot if it has
            ``state_dict`` and ``load_state_dict``.
        loss: ``loss(module, batch)`` gives the mean loss of a batch, a scalar with a gradient; it moves the batch to the
            device, and opens ``torch.autocast`` where that is wanted.
        total_steps: the budget in optimizer steps, >= 1.
        validation, test: iterables of batches that can be iterated again and again; None for none.
        scheduler: anything with ``step()``, called after each optimizer step up to the budget; None for none.
        scaler: a ``torch.amp.GradScaler``; steps that it skips do not count. None for none.
        accumulate: batches whose mean gradient makes one step, >= 1.
        deadline: seconds that the run may take from its first step on, > 0; None for no limit.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    train: Iterable[Any]
    loss: Loss
    total_steps: int
    validation: Iterable[Any] | None = None
    test: Iterable[Any] | None = None
    scheduler: Any = None
    scaler: Any = None
    accumulate: int = 1
    deadline: float | None = None

    @property
    def device(self) -> torch.device:
        """Where the first trained parameter lies."""
        first: Tensor = self.optimizer.param_groups[0]["params"][0]
        return first.device

    @cached_property
    def needs_closure(self) -> bool:
        """Whether the optimizer evaluates the loss itself, as LBFGS does."""
        closure = inspect.signature(type(self.optimizer).step).parameters.get("closure")
        return closure is not None and closure.default is inspect.Parameter.empty


def check_parts(made: object, what: str) -> Parts:
    """The same parts, once they are known to fit together.

    Args:
        made: what ``make(seed)`` returned.
        what: how messages call the run.

    Raises:
        UserError: a part is of the wrong kind, or two of them do not fit.
    """
    if not isinstance(made, Parts):
        raise UserError(
            f"make(seed) of {what} returned a {type(made).__name__}; "
            "return Parts(module=..., optimizer=..., train=..., loss=..., total_steps=...)"
        )
    if not isinstance(made.module, nn.Module):
        raise UserError(f"the module of {what} is a {type(made.module).__name__}; it must be a torch.nn.Module")
    _check_optimizer(made, what)
    check_whole(f"total_steps of {what}", made.total_steps, 1)
    check_whole(f"accumulate of {what}", made.accumulate, 1)
    check_deadline(f"deadline of {what}", made.deadline)
    if not callable(made.loss):
        raise UserError(f"the loss of {what} is a {type(made.loss).__name__}; give a function loss(module, batch)")
    for name in ("train", "validation", "test"):
        _check_loader(getattr(made, name), name, what)
    _check_helpers(made, what)
    return made


def check_deadline(name: str, seconds: float | None) -> float | None:
    """Seconds as they are, or None; ``RangeError`` unless they are above 0, and no more than a float can hold."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not seconds > 0:
        raise RangeError(f"{name} is {seconds!r}; give seconds above 0, or None for no limit")
    try:
        float(seconds)
    except OverflowError as error:
        raise RangeError(f"{name} is more than a float can hold; give fewer seconds, or None for no limit") from error
    return seconds


def _check_optimizer(parts: Parts, what: str) -> None:
    optimizer = parts.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"the optimizer of {what} is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
    trained = [one for group in optimizer.param_groups for one in group["params"] if one.requires_grad]
    if any(isinstance(one, UninitializedParameter) for one in trained):
        raise UserError(
            f"the module of {what} has lazy layers that have no shape yet; run a batch through it before its optimizer "
            "is made"
        )
    if not trained:
        raise UserError(
            f"{what} has no parameters that its optimizer could train; give it some that require a gradient"
        )
    owned = {id(parameter) for parameter in parts.module.parameters()}
    foreign = sum(id(parameter) not in owned for parameter in trained)
    if foreign:
        raise MismatchError(
            f"{foreign} of the {len(trained)} parameters of the optimizer of {what} do not belong to its module; "
            "make the optimizer from module.parameters()"
        )


def _check_loader(loader: object, name: str, what: str) -> None:
    if loader is None and name != "train":
        return
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise UserError(f"{name} of {what} is a {type(loader).__name__}; it must be an iterable of batches")
    if hasattr(loader, "__next__"):
        raise UserError(
            f"{name} of {what} is a {type(loader).__name__}, which can be iterated only once; "
            "give a list of batches, a DataLoader, or an object whose __iter__ begins anew"
        )
    if length_hint(loader, 1) == 0:  # a DataLoader may have a length that it refuses to tell
        raise _empty(name, what)


def _empty(name: str, what: str) -> UserError:
    return UserError(
        f"{name} of {what} holds no batch; give at least one (a DataLoader with drop_last drops short ones)"
    )


def _check_helpers(parts: Parts, what: str) -> None:
    scheduler, scaler = parts.scheduler, parts.scaler
    for name, helper in (("scheduler", scheduler), ("scaler", scaler)):
        wanted = ("step", "state_dict", "load_state_dict")
        if isinstance(helper, type):
            raise UserError(f"the {name} of {what} is the class {helper.__name__}; give one that is made")
        if helper is not None and not all(callable(getattr(helper, method, None)) for method in wanted):
            raise UserError(
                f"the {name} of {what} is a {type(helper).__name__}; it must have step, state_dict and load_state_dict"
            )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UserError(f"the scheduler of {what} waits for a metric; leave it out, the rule 'plateau' does the same")
    if getattr(scheduler, "optimizer", parts.optimizer) is not parts.optimizer:
        raise MismatchError(f"the scheduler of {what} belongs to another optimizer; make it from the optimizer given")
    if scaler is not None and parts.needs_closure:
        raise MismatchError(f"{type(parts.optimizer).__name__} evaluates the loss itself, so {what} can have no scaler")


def check_loss(loss: object, what: str) -> Tensor:
    """The mean loss of a batch as it is.

    Raises:
        UserError: it is no scalar tensor.
    """
    if not isinstance(loss, Tensor):
        raise UserError(f"the loss of {what} is a {type(loss).__name__}; return a scalar tensor")
    if loss.numel() != 1:
        raise UserError(f"the loss of {what} has the shape {tuple(loss.shape)}; return a scalar, such as its mean")
    return loss.reshape(())


def examples_in(batch: Any) -> int | None:
    """Number of examples in a batch: the length of the first tensor or array found in it; None where there is none.

    >>> examples_in({"x": torch.zeros(5, 3), "y": torch.zeros(5)}), examples_in("text")
    (5, None)
    """
    shape = getattr(batch, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) > 0 else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return next((count for count in map(examples_in, batch) if count is not None), None)
    return None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module in evaluation mode for a block, and each part of it back to its own mode after it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class Batches:
    """The batches of a loader, without end.

    Attributes:
        stateful: whether the loader can tell its position and be put back to it.
    """

    def __init__(self, loader: Iterable[Any], what: str) -> None:
        self._loader, self._what = loader, what
        self._iterator: Iterator[Any] | None = None
        self._ahead: list[Any] = []
        self._before: dict[str, Any] = {}  # position before what was fetched ahead
        self.stateful = all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))

    def peek(self) -> Any:
        """The next batch, which stays the next one.

        Raises:
            UserError: the loader holds no batch.
        """
        if not self._ahead:
            self._before = self.state_dict() if self.stateful else {}
            self._ahead.append(self._fetch())
        return self._ahead[0]

    def take(self) -> Any:
        """The next batch."""
        return self._ahead.pop() if self._ahead else self._fetch()

    def _fetch(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self._loader)
            batch = next(self._iterator, _END)
            if batch is not _END:
                return batch
            self._iterator = None
        raise _empty("train", self._what)

    def state_dict(self) -> dict[str, Any]:
        """Position of the loader before the batch that is next."""
        loader: Any = self._loader
        return self._before if self._ahead else loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the loader back to a position."""
        loader: Any = self._loader
        loader.load_state_dict(state)
        self._iterator = None
        self._ahead.clear()
