"""The step of a population as pure tensor code, compiled where a compiler is present."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from trimtab.inner_training.faults import Faults, disturb_examples, disturb_step
from trimtab.inner_training.feeding import Feed, Place, batch_of, examples, place_of
from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.stateless import stateless
from trimtab.inner_training.structure.newborn_state import two_speed
from trimtab.inner_training.task import TaskFamily
from trimtab.inner_training.update_rules import Coefficients, Needs
from trimtab.inner_training.updating import update

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
        needs: what the update rules present need.
        sample: measure gradient and update statistics.
        score: compute the family's score.
        disturbed: take faults.
        masked: hold the weights that ``feed.live`` leaves out at zero.
        hastened: lengthen the steps of weights that are fast, by ``feed.fast_until`` and ``feed.speed``.
        steered: change gradients by ``feed.factor`` and ``feed.term`` after clipping.
    """

    clip: bool
    needs: Needs
    sample: bool
    score: bool = False
    disturbed: bool = False
    masked: bool = False
    hastened: bool = False
    steered: bool = False


StepFunction = Callable[..., dict[str, Tensor]]
EvaluateFunction = Callable[..., Tensor]


def norms(by_name: dict[str, Tensor]) -> Tensor:
    """L2 norm (N,) over all tensors (N, *shape) of a dict."""
    return torch.stack([tensor.reshape(len(tensor), -1).square().sum(1) for tensor in by_name.values()]).sum(0).sqrt()


def run_loss_of(family: TaskFamily, score: bool = False) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
    """``(parameters, buffers, x, y, weight) -> (loss, (loss, score))`` of one run; no score unless asked for."""

    call = stateless(family.module)

    def run_loss(
        parameters: Any, buffers: Any, x: Tensor, y: Tensor, weight: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        outputs = call(parameters, buffers, x)
        loss = (family.loss(outputs, y) * weight).sum()
        return loss, (loss, (family.score(outputs, y) * weight).sum()) if score else (loss,)

    return run_loss


def stacked_gradients(family: TaskFamily, score: bool = False) -> Callable[..., Any]:
    """``(parameters, buffers, x, y, weight) -> (gradients, (loss, score))``, everything stacked over runs."""
    run_loss = run_loss_of(family, score)

    def gradients(*arguments: Any) -> Any:
        by_name, (_, measured) = vmap(grad_and_value(run_loss, has_aux=True))(*arguments)
        return by_name, measured

    return gradients


def served(
    family: TaskFamily, feed: Feed, place: Place, inputs: Tensor, faults: Faults | None, slots: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the next step is fed: x (N, B, *shape) and y (N, B, ...) as the module takes them, and weight (N, B).

    B is the family's ``max_batch``, or fewer ``slots``, which are the first of the same only without faults.
    """
    slots = family.max_batch if slots is None else slots
    x, y = family.present(*examples(feed, inputs, batch_of(feed, place, slots)))
    if faults is not None:
        x, y = disturb_examples(x, y, faults, feed.seed, feed.step)
    slot = torch.arange(slots, device=feed.batch.device)
    return x, y, (slot[None] < feed.batch[:, None]).float() / feed.batch[:, None]


def renewal(family: TaskFamily, layout: FlatLayout) -> Callable[[Tensor, Place], Tensor]:
    """Puts parameters (N, P) that start each later phase at zero there, where one begins."""
    if family.max_phases == 1 or not family.reset_each_phase:
        return lambda parameters, place: parameters
    mask = layout.mask(family.reset_each_phase)

    def renewed(parameters: Tensor, place: Place) -> Tensor:
        begins = (place.since == 0) & (place.phase > 0)
        return torch.where(begins[:, None] & mask.to(parameters.device)[None], 0.0, parameters)

    return renewed


def make_step(family: TaskFamily, layout: FlatLayout, options: StepOptions) -> StepFunction:
    """Builds ``step(moving, feed, inputs, last_gradient, by, threshold)``, a pure function.

    ``moving`` is the three (N, P) tensors of a learner, ``by`` (N, 14) one step of ``interval_coefficients`` (followed
    by the columns of ``Faults`` when disturbed), and ``threshold`` (N,) the clip. It returns ``parameters``, ``first``
    and ``second`` (N, P), and ``loss`` (N,) before the step; with ``score`` also ``score`` (N,). When it samples, also
    ``gradient`` (N, P), and ``statistics`` (8, N): gradient norm, inner product with ``last_gradient``, update norms
    and weight norms by depth.
    """
    width = len(Coefficients._fields)
    gradients, renewed = stacked_gradients(family, options.score), renewal(family, layout)

    def step(
        moving: tuple[Tensor, Tensor, Tensor],
        feed: Feed,
        inputs: Tensor,
        last_gradient: Tensor,
        by: Tensor,
        threshold: Tensor,
    ) -> dict[str, Tensor]:
        parameters, first, second = moving
        place = place_of(feed)
        faults = Faults(*by[:, width:].unbind(1)) if options.disturbed else None
        parameters = renewed(parameters, place)
        x, y, weight = served(family, feed, place, inputs, faults)
        by_name, measured = gradients(layout.views(parameters), feed.buffers, x, y, weight)
        dense = gradient = layout.flatten(by_name)
        if faults is not None:
            gradient = gradient + faults.gradient[:, None]
        if options.masked and feed.live is not None:
            gradient = gradient * feed.live
        norm = None
        if options.clip or options.sample:
            norm = norms(by_name) if gradient is dense else norms(layout.views(gradient))
        used = gradient
        if options.clip and norm is not None:
            # As torch.nn.utils.clip_grad_norm_, which adds 1e-6; an infinite threshold gives exactly 1.
            used = gradient * (threshold[:, None] / (norm[:, None] + 1e-6)).clamp(max=1.0)
        if options.steered and feed.factor is not None and feed.term is not None:
            used = used * feed.factor + feed.term
        coefficients = Coefficients(*by[:, :width, None].unbind(1))
        after = update(parameters, used, (first, second), coefficients, layout, options.needs)
        if options.hastened and feed.fast_until is not None and feed.speed is not None:
            fast = feed.step[:, None] < feed.fast_until
            after = (two_speed(parameters, after[0], torch.where(fast, feed.speed[:, None], 1.0)), *after[1:])
        if options.masked and feed.live is not None:  # orthogonalised matrices are dense
            after = (after[0] * feed.live, *after[1:])
        if faults is not None:
            after = disturb_step((parameters, first, second), after, faults, layout)
        result = dict(zip(("parameters", "first", "second", "loss", "score"), (*after, *measured), strict=False))
        if norm is None or not options.sample:
            return result
        dot = (gradient * last_gradient).sum(1)
        rows = [norm[None], dot[None], layout.norms(after[0] - parameters), layout.norms(parameters)]
        return {**result, "gradient": gradient, "statistics": torch.cat(rows)}

    return step


def make_evaluate(family: TaskFamily, slots: int, score: bool = False) -> EvaluateFunction:
    """Builds ``evaluate(views, feed, inputs, start, size, offset) -> (N,)``, a sum of losses over ``slots`` examples.

    ``start`` and ``size`` (N,) int64 delimit a split in the maps; slots beyond it count nothing. With ``score`` it
    sums scores instead.
    """
    of, call = family.score if score else family.loss, stateless(family.module)

    def run_values(parameters: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
        return of(call(parameters, buffers, x), y)

    values = vmap(run_values)

    def evaluate(
        views: dict[str, Tensor], feed: Feed, inputs: Tensor, start: Tensor, size: Tensor, offset: Tensor
    ) -> Tensor:
        place = offset + torch.arange(slots, device=start.device)[None]
        inside = place < size[:, None]
        positions = start[:, None] + torch.minimum(place, size[:, None] - 1)
        x, y = family.present(*examples(feed, inputs, positions))
        return torch.where(inside, values(views, feed.buffers, x, y), 0.0).sum(1)

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
    # With the usual 4 a batch is gathered anew for every shift of a convolution, not once.
    options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards), "realize_reads_threshold": 3}
    return torch.compile(own_code(function), dynamic=False, fullgraph=True, options=options)


def choose_mode(mode: Mode, num_runs: int) -> Literal["compile", "eager"]:
    """Resolves ``auto``: compile from ``AUTO_COMPILE_RUNS`` runs on."""
    if mode == "auto":
        return "compile" if num_runs >= AUTO_COMPILE_RUNS else "eager"
    return mode
