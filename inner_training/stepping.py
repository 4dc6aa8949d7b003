"""The step of a population as pure tensor code, compiled where a compiler is present."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from trimtab.inner_training.feeding import Feed, examples
from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.streams import batch_positions
from trimtab.inner_training.task import TaskFamily
from trimtab.inner_training.update_rules import Coefficients, update

logger = logging.getLogger("trimtab")

Mode = Literal["auto", "compile", "eager"]
AUTO_COMPILE_RUNS = 32  # below this, compiling costs more than it saves


class Learner(NamedTuple):
    """What an optimizer step changes: flat tensors (N, P) and the count of updates (N,) int64.

    A learner is never written to: a step makes a new one. So keeping a moment costs nothing but its memory.
    """

    parameters: Tensor
    first: Tensor
    second: Tensor
    updates: Tensor

    def overwritten(self, runs: Tensor, parameters: Tensor) -> Learner:
        """A learner with fresh ``parameters`` (len(runs), P) and empty moments in ``runs`` (indices)."""
        rows = (parameters, 0.0, 0.0, 0)
        return Learner(
            *(
                old.index_put((runs,), torch.as_tensor(row, dtype=old.dtype, device=old.device))
                for old, row in zip(self, rows, strict=True)
            )
        )

    def merged(self, other: Learner, runs: Tensor) -> Learner:
        """``other`` where ``runs`` (bool, (N,)) is True, and this learner elsewhere."""
        pairs = zip(self, other, strict=True)
        return Learner(*(torch.where(runs.view(-1, *([1] * (old.ndim - 1))), new, old) for old, new in pairs))


def allocate_learner(num_runs: int, width: int, device: torch.device) -> Learner:
    """A learner of ``num_runs`` runs at zero."""
    return Learner(
        parameters=torch.zeros(num_runs, width, dtype=torch.float32, device=device),
        first=torch.zeros(num_runs, width, dtype=torch.float32, device=device),
        second=torch.zeros(num_runs, width, dtype=torch.float32, device=device),
        updates=torch.zeros(num_runs, dtype=torch.int64, device=device),
    )


class StepOptions(NamedTuple):
    """What a step leaves out because nothing needs it, decided when it is built.

    Attributes:
        clip: compute the gradient norm and clip.
        adaptive: keep second moments.
        sample: measure gradient and update statistics.
    """

    clip: bool
    adaptive: bool
    sample: bool


StepFunction = Callable[..., tuple[Tensor, ...]]
EvaluateFunction = Callable[..., Tensor]


def norms(by_name: dict[str, Tensor]) -> Tensor:
    """L2 norm (N,) over all tensors (N, *shape) of a dict."""
    return torch.stack([tensor.flatten(1).square().sum(1) for tensor in by_name.values()]).sum(0).sqrt()


def make_step(family: TaskFamily, layout: FlatLayout, options: StepOptions) -> StepFunction:
    """Builds ``step(moving, feed, inputs, last_gradient, by, threshold)``, a pure function.

    ``moving`` is the three (N, P) tensors of a learner, ``by`` (N, 10) one step of ``interval_coefficients``, and
    ``threshold`` (N,) the clip. It returns the new three tensors and the loss (N,) before the step, and when it
    samples, also the gradient (N, P) and the statistics (4, N): gradient norm, inner product with ``last_gradient``,
    update norm, weight norm.
    """
    slots = family.max_batch

    def run_loss(parameters: Any, buffers: Any, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        outputs = functional_call(family.module, (parameters, buffers), (x,))
        return (family.loss(outputs, y) * weight).sum()

    gradients_and_loss = vmap(grad_and_value(run_loss))

    def step(
        moving: tuple[Tensor, Tensor, Tensor],
        feed: Feed,
        inputs: Tensor,
        last_gradient: Tensor,
        by: Tensor,
        threshold: Tensor,
    ) -> tuple[Tensor, ...]:
        parameters, first, second = moving
        positions = batch_positions(feed.seed, feed.step, feed.batch, feed.sizes[0], feed.walks, slots)
        x, y = examples(feed, inputs, positions)
        slot = torch.arange(slots, device=by.device)
        weight = (slot[None] < feed.batch[:, None]).float() / feed.batch[:, None]
        by_name, loss = gradients_and_loss(layout.views(parameters), feed.buffers, x, y, weight)
        gradient = layout.flatten(by_name)
        norm = norms(by_name) if options.clip or options.sample else None
        used = gradient
        if options.clip and norm is not None:
            # As torch.nn.utils.clip_grad_norm_, which adds 1e-6; an infinite threshold gives exactly 1.
            used = gradient * (threshold[:, None] / (norm[:, None] + 1e-6)).clamp(max=1.0)
        coefficients = Coefficients(*by[:, :, None].unbind(1))
        after, first, second = update(parameters, used, first, second, coefficients, adaptive=options.adaptive)
        if norm is None or not options.sample:
            return after, first, second, loss
        dot = (gradient * last_gradient).sum(1)
        moved = (after - parameters).square().sum(1).sqrt()
        statistics = torch.stack([norm, dot, moved, parameters.square().sum(1).sqrt()])
        return after, first, second, loss, gradient, statistics

    return step


def make_evaluate(family: TaskFamily, slots: int) -> EvaluateFunction:
    """Builds ``evaluate(views, feed, inputs, start, size, offset) -> (N,)``, a sum of losses over ``slots`` examples.

    ``start`` and ``size`` (N,) int64 delimit a split in the maps; slots beyond it count nothing.
    """

    def run_losses(parameters: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
        return family.loss(functional_call(family.module, (parameters, buffers), (x,)), y)

    losses = vmap(run_losses)

    def evaluate(
        views: dict[str, Tensor], feed: Feed, inputs: Tensor, start: Tensor, size: Tensor, offset: Tensor
    ) -> Tensor:
        place = offset + torch.arange(slots, device=start.device)[None]
        inside = place < size[:, None]
        positions = start[:, None] + torch.minimum(place, size[:, None] - 1)
        x, y = examples(feed, inputs, positions)
        return torch.where(inside, losses(views, feed.buffers, x, y), 0.0).sum(1)

    return evaluate


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a closure with a code object of its own.

    The compiler counts recompilations per code object; without this, the ninth population of a process would
    silently run uncompiled.
    """
    code = function.__code__.replace()
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` with static shapes, one graph and no guards.

    A population calls each of its functions with tensors of one shape, type and device for life, so there is nothing
    to guard, and checking would cost several percent of a step.
    """
    options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    return torch.compile(own_code(function), dynamic=False, fullgraph=True, options=options)


def choose_mode(mode: Mode, num_runs: int) -> Literal["compile", "eager"]:
    """Resolves ``auto``: compile from ``AUTO_COMPILE_RUNS`` runs on."""
    if mode == "auto":
        return "compile" if num_runs >= AUTO_COMPILE_RUNS else "eager"
    return mode
