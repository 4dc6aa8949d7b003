"""Squared gradients of single examples, Hessians, and the flow of SynFlow, of a user's own module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from trimtab.errors import UserError
from trimtab.inner_training.structure.running import call_on, tensors_in

Loss = Callable[[nn.Module, Any], Tensor]
PROBES = 8  # of Hutchinson's estimate of the Hessian's diagonal, per batch
CHUNK = 16  # examples whose gradients are held at a time


class _WithLoss(nn.Module):
    """A module and its loss as one module, whose parameters ``functional_call`` replaces."""

    def __init__(self, model: nn.Module, loss_fn: Loss) -> None:
        super().__init__()
        self.model, self._loss = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self._loss(self.model, batch)


def _slice(batch: Any, examples: int, begin: int, end: int) -> Any:
    def cut(leaf: Any) -> Any:
        return leaf[begin:end] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == examples else leaf

    return pytree.tree_map(cut, batch)


def squares(model: nn.Module, loss_fn: Loss, batch: Any, examples: int, names: list[str]) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of each example's loss, by parameter name.

    By ``torch.func`` where every tensor of the batch has the examples first and the module allows it, else example by
    example.
    """
    parameters = dict(model.named_parameters())
    wanted = {name: parameters[name].detach() for name in names}
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    if all(leaf.ndim and len(leaf) == examples for leaf in leaves):
        joint = _WithLoss(model, loss_fn)

        def loss(values: dict[str, Tensor], one: Any) -> Tensor:
            held = {f"model.{name}": value for name, value in values.items()}
            single = pytree.tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, one)
            return functional_call(joint, held, (single,))

        try:
            return _by_vmap(loss, wanted, batch, examples)
        except RuntimeError:  # torch.func cannot follow some operations; one by one everything can be followed
            pass
    total = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in wanted.items()}
    for index in range(examples):
        value = loss_fn(model, _slice(batch, examples, index, index + 1))
        slopes = torch.autograd.grad(value, [parameters[name] for name in names], allow_unused=True)
        for name, slope in zip(names, slopes, strict=True):
            if slope is not None:
                total[name] += slope.float().square()
    return {name: value / examples for name, value in total.items()}


def _by_vmap(loss: Callable[..., Tensor], wanted: dict[str, Tensor], batch: Any, examples: int) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in wanted.items()}
    for begin in range(0, examples, CHUNK):
        part = _slice(batch, examples, begin, min(begin + CHUNK, examples))
        with sdpa_kernel(SDPBackend.MATH):  # the others have no batching rule
            slopes = vmap(grad(loss), in_dims=(None, 0), randomness="different")(wanted, part)
        for name, slope in slopes.items():
            total[name] += slope.detach().float().square().sum(0)
    return {name: value / examples for name, value in total.items()}


def hessian_fields(
    model: nn.Module, loss: Callable[[], Tensor], needs: set[str], draws: torch.Generator
) -> dict[str, dict[str, Tensor]]:
    """H g under ``hv`` and Hutchinson's estimate of the diagonal of H under ``hess``, each by parameter name.

    The estimate is the mean of v * (H v) over vectors v of random signs (Bekas et al., Applied Numerical Mathematics 57,
    2007).

    Args:
        model: the module.
        loss: computes the mean loss of a batch.
        needs: ``hv``, ``hess``, or both.
        draws: for the signs.

    Raises:
        UserError: an operation of the module has no second derivative.
    """
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        slopes = torch.autograd.grad(
            loss(), list(parameters.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )

    def times(vectors: list[Tensor]) -> list[Tensor]:
        product = sum((slope * vector).sum() for slope, vector in zip(slopes, vectors, strict=True))
        if not isinstance(product, Tensor) or not product.requires_grad:
            return [torch.zeros_like(one) for one in slopes]
        try:
            found = torch.autograd.grad(product, list(parameters.values()), retain_graph=True, allow_unused=True)
        except NotImplementedError as error:
            raise UserError(
                f"{type(model).__name__} cannot be differentiated twice ({error}); choose a criterion of first derivatives, such as agf"
            ) from error
        return [torch.zeros_like(one) if value is None else value for one, value in zip(slopes, found, strict=True)]

    fields: dict[str, dict[str, Tensor]] = {}
    if "hv" in needs:
        fields["hv"] = dict(zip(parameters, times([slope.detach() for slope in slopes]), strict=True))
    if "hess" in needs:
        total = [torch.zeros_like(one) for one in slopes]
        for _ in range(PROBES):
            signs = [(torch.rand(one.shape, generator=draws) < 0.5).to(one) * 2 - 1 for one in slopes]
            total = [sum_ + sign * value / PROBES for sum_, sign, value in zip(total, signs, times(signs), strict=True)]
        fields["hess"] = dict(zip(parameters, total, strict=True))
    return fields


@contextmanager
def _magnitudes(model: nn.Module) -> Iterator[None]:
    tensors = [one for one in (*model.parameters(), *model.buffers()) if one.is_floating_point()]
    saved = [one.detach().clone() for one in tensors]
    with torch.no_grad():
        for one in tensors:
            one.abs_()
    try:
        yield
    finally:
        with torch.no_grad():
            for one, values in zip(tensors, saved, strict=True):
                one.copy_(values)


def flows(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """Gradient of SynFlow's R by parameter name: the sum of the outputs for ones, with all parameters' magnitudes.

    Tanaka et al., arXiv 2006.05467. Tokens, which have no ones, stay those of the example.
    """

    def one(leaf: Any) -> Any:
        return torch.ones_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    with _magnitudes(model):
        total = sum(output.float().sum() for output in tensors_in(call_on(model, pytree.tree_map(one, example))()))
        assert isinstance(total, Tensor)
        slopes = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, slopes, strict=True))
