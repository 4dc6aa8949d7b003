"""The further measurements of a live run (see ``measurements``), the same as those of a population."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from trimtab.errors import check_whole, unknown
from trimtab.inner_training.activations import EXAMPLES, SEEN, Watch
from trimtab.inner_training.measurements import MEASUREMENTS, PROBE_EVERY, TINY_SHARE
from trimtab.inner_training.module_parts import examples_in


def live_sparsity(parameters: Sequence[Tensor]) -> Tensor | None:
    """What ``probe.sparsity`` measures, from the gradients of parameters; None where there is none.

    >>> weight = torch.ones(4, requires_grad=True)
    >>> (weight * torch.tensor([3.0, 0.1, 0.0, 2.0])).sum().backward()
    >>> float(live_sparsity([weight]))
    0.5
    """
    pairs = [(one.detach(), one.grad) for one in parameters if one.grad is not None]
    if not pairs:
        return None
    device = pairs[0][0].device
    dense = [(one, grad.to_dense() if grad.is_sparse else grad) for one, grad in pairs]

    def total(parts: list[Tensor]) -> Tensor:
        return torch.stack([part.to(device) for part in parts]).sum()

    square = total([grad.abs().float().square().sum() for _, grad in dense])
    count = total([((grad != 0) | (one != 0)).sum() for one, grad in dense])
    edge = TINY_SHARE * (square / count).sqrt()
    tiny = total(
        [((grad.abs().float() < edge.to(grad.device)) & ((grad != 0) | (one != 0))).sum() for one, grad in dense]
    )
    return torch.where(square.isfinite(), tiny / count, torch.nan)


class LiveMeasurements:
    """Takes what a live run can measure: on its gradients, and by watching its model's own forward pass.

    The forward pass before the last step of an interval is watched, or its last part where a step has several. A model
    with compiled parts is not watched, as that would compile them anew.

    Args:
        safely: does something that may fail without harm (see ``StepHooks.safely``).

    Attributes:
        taken: what was measured in this interval, by name, on the device.
        last_step: whether the next step is the last one of its interval.
        intervals: number of intervals finished.
    """

    def __init__(self, safely: Callable[[str, Callable[[], None]], None]) -> None:
        self._safely = safely
        self._names: frozenset[str] = frozenset()
        self._every = PROBE_EVERY
        self._handles: list[RemovableHandle] = []
        self._root = 0
        self._watch: Watch | None = None
        self.taken: dict[str, Tensor] = {}
        self.last_step, self.intervals = False, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveMeasurements:
        """A copy of the model (an average of weights, say) does not take the optimizer along."""
        return self

    def __reduce__(self) -> tuple[Callable[[], LiveMeasurements], tuple[()]]:
        """A model that is saved whole, with its hooks, has idle ones."""
        return _idle, ()

    def choose(self, names: Sequence[str], model: nn.Module | None, every: int) -> None:
        """Takes ``names`` from now on, every so many intervals; those that a live run cannot take stay unknown."""
        for name in names:
            if name not in MEASUREMENTS:
                raise unknown("measurement", name, MEASUREMENTS)
        self.detach()
        self._names, self._every = frozenset(names), check_whole("every", every, 1)
        if model is not None and self._names & SEEN:
            self._safely("watching the model", lambda: self._hook(model))

    def _hook(self, model: nn.Module) -> None:
        self._root = id(model)
        self._handles.append(model.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._leave, always_call=True))

    def detach(self) -> None:
        """Leaves the model as it was."""
        self.close()
        for handle in self._handles:
            handle.remove()
        self._handles, self._names = [], frozenset()

    @property
    def due(self) -> bool:
        """Whether something is to be measured around the next step."""
        return bool(self._names) and self.last_step and self.intervals % self._every == 0

    def gradients(self, parameters: Sequence[Tensor]) -> None:
        """Measures the gradients before a step."""
        self.close()
        if self.due and "grad_sparsity" in self._names:
            sparsity = live_sparsity(parameters)
            self.taken |= {} if sparsity is None else {"grad_sparsity": sparsity}

    def next_interval(self) -> None:
        """Forgets what was measured; an interval is over."""
        self.taken = {}
        self.intervals += 1

    # --- around a forward pass ----------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or id(module) != self._root:  # traced, or a replica on another device
            return
        if self.due and torch.is_grad_enabled() and self._watch is None and not _compiled(module):
            self._safely(
                "watching activations", lambda: self._open(examples_in([*args, *kwargs.values()]) or 1, module)
            )

    def _open(self, examples: int, module: nn.Module) -> None:
        few = min(examples, EXAMPLES)
        device = next(module.parameters()).device
        self._watch = Watch(self._names & SEEN, examples, torch.full((few,), 1 / few, device=device))
        self._watch.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del args, output
        watch = self._watch
        if torch.compiler.is_compiling() or id(module) != self._root or watch is None:
            return
        self.close()
        self._safely("measuring activations", lambda: self.taken.update(watch.results()))

    def close(self) -> None:
        """Stops watching, also a forward pass that was broken off without a word."""
        if self._watch is not None and _innermost() is self._watch:
            self._watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._watch = None


def _innermost() -> TorchFunctionMode | None:
    mode: TorchFunctionMode | None = torch.overrides._get_current_function_mode()  # type: ignore[no-untyped-call]
    return mode


def _compiled(model: nn.Module) -> bool:
    """Whether some part is compiled, in place or by a wrapper."""
    return any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in model.modules())


def _idle() -> LiveMeasurements:
    return LiveMeasurements(lambda what, act: act())
