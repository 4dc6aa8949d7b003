"""What the activation functions of a network put out on some examples: saturation, dormant units, and features."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

EXAMPLES = 32  # examples that are looked at
FEATURE_EXAMPLES = 16  # those of them whose features are compared: eigenvalues cost the cube of their number
EDGE = 0.015  # share of an activation's range at either end that counts as saturated: |tanh| > 0.97
DORMANT = 0.025  # tau of Sokar et al., arXiv 2302.12902
SEEN = frozenset(("saturation", "dormant", "features"))  # the measurements that are taken here
ENDS = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0), "hardsigmoid": (0.0, 1.0)}  # activations that saturate, and where
ACTIVATIONS = frozenset(
    (*ENDS, "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish",
     "softplus", "hardswish")
)  # fmt: skip
# After these the units are known to lie on the last axis, or not known from the operation.
LINEAR = {"linear": -1, "matmul": None, "bmm": None, "baddbmm": None, "addmm": None, "einsum": None}


class Watch(TorchFunctionMode):
    """Inside ``with Watch(...) as watch:`` every call of an activation function is measured, however it is written.

    ``torch.relu(x)``, ``x.relu()``, ``functional.relu(x)`` and ``nn.ReLU()(x)`` are all seen, also under ``vmap``; what
    runs inside compiled or scripted code is not. Units lie on the last axis, or on axis 1 behind a convolution and in
    tensors of four axes and more. The first axis holds examples, or examples one after another in equal parts (tokens,
    say). A unit counts if its input is not exactly 0 everywhere: one that a gate has switched off, with zero weights,
    does not.

    Args:
        names: what is wanted of ``saturation``, ``dormant`` and ``features``.
        examples: in the batch.
        weight: (E,) of the first E examples, summing to 1; those of weight 0 are passed over.
    """

    def __init__(self, names: Collection[str], examples: int, weight: Tensor) -> None:
        super().__init__()
        self._names, self._examples, self._weight = frozenset(names), examples, weight
        self._axis: int | None = None
        self._saturated: list[tuple[Tensor, Tensor]] = []
        self._dormant: list[tuple[Tensor, Tensor]] = []
        self._last: tuple[Tensor, Tensor] | None = None
        self._failure: Exception | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").rstrip("_")
        if name.startswith("conv"):
            self._axis = 1
        elif name in LINEAR:
            self._axis = LINEAR[name]
        if name not in ACTIVATIONS:
            return func(*args, **kwargs)
        used: list[Tensor] = []
        self._aside(lambda: used.append(self._rows(args[0] if args else kwargs["input"]).abs().amax((0, 1)) > 0))
        output = func(*args, **kwargs)  # in between, as it may happen in place
        self._aside(lambda: self._see(name, self._rows(output).float(), used[0].float()))
        return output

    def _aside(self, act: Callable[[], None]) -> None:
        """Does what must not disturb the network."""
        if self._failure is not None:
            return
        try:
            with torch.no_grad():
                act()
        except Exception as error:  # noqa: BLE001 - the network goes on; ``results`` raises it
            self._failure = error

    def _rows(self, values: Tensor) -> Tensor:
        """(E, places, units) of the examples that are looked at."""
        axis = self._axis if self._axis is not None else 1 if values.ndim >= 4 else -1
        rows = values.detach().movedim(axis, -1)
        examples = self._examples if len(rows) % self._examples == 0 else len(rows)
        return rows.reshape(examples, -1, rows.shape[-1])[: len(self._weight)]

    def _see(self, name: str, rows: Tensor, used: Tensor) -> None:
        weight = self._weight[: len(rows)]
        if "saturation" in self._names and name in ENDS:
            low, high = ENDS[name]
            edge = EDGE * (high - low)
            outer = ((rows < low + edge) | (rows > high - edge)).float().mean(1)
            self._saturated.append(((weight @ outer / weight.sum() * used).sum(), used.sum()))
        if "dormant" in self._names:
            size = weight @ rows.abs().mean(1)
            mean = (size * used).sum() / used.sum()
            self._dormant.append((((size <= DORMANT * mean) * used).sum(), used.sum()))
        if "features" in self._names:
            kept = weight[:FEATURE_EXAMPLES] > 0
            features = rows[:FEATURE_EXAMPLES].mean(1) * kept[:, None]
            self._last = features, torch.minimum(kept.sum(), used.sum())

    def results(self) -> dict[str, Tensor]:
        """What was seen: ``saturation`` and ``dormant``, shares of the units, and ``features`` (see ``packed``).

        Raises:
            Exception: what went wrong in measuring.
        """
        if self._failure is not None:
            raise self._failure
        found = {
            name: torch.stack([part for part, _ in parts]).sum() / torch.stack([whole for _, whole in parts]).sum()
            for name, parts in (("saturation", self._saturated), ("dormant", self._dormant))
            if parts
        }
        return found if self._last is None else {**found, "features": packed(*self._last)}


def packed(features: Tensor, limit: Tensor) -> Tensor:
    """The inner products of features (B <= 16, H) with each other as (137,): ``limit``, then an upper triangle."""
    gram = functional.pad(features @ features.mT, (0, FEATURE_EXAMPLES - len(features)) * 2)
    rows, columns = torch.triu_indices(FEATURE_EXAMPLES, FEATURE_EXAMPLES, device=features.device)
    return torch.cat([limit.to(gram.dtype)[None], gram[rows, columns]])


def effective_rank(measured: np.ndarray) -> np.ndarray:
    """exp of the entropy of the singular values over their sum, over the largest that it could be: in (0, 1].

    Roy & Vetterli, *The effective rank*, EUSIPCO 2007, over min(examples, units). Singular values below a thousandth of
    the largest, which float32 cannot tell from 0, are left out.

    Args:
        measured: (137, N) of ``packed``; runs of NaN give NaN.

    >>> features = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0]])
    >>> spectrum = np.array([1.0, 2**0.5]) / (1 + 2**0.5)
    >>> found = effective_rank(packed(features, torch.tensor(3)).double().numpy()[:, None])
    >>> bool(np.isclose(3 * found[0], np.exp(-(spectrum * np.log(spectrum)).sum())))
    True
    """
    known = np.isfinite(measured).all(0)
    grams = np.zeros((int(known.sum()), FEATURE_EXAMPLES, FEATURE_EXAMPLES))
    grams[:, *np.triu_indices(FEATURE_EXAMPLES)] = measured[1:, known].T
    squares = np.linalg.eigvalsh(grams, UPLO="U")
    singular = np.sqrt(np.where(squares > 1e-6 * squares[:, -1:], squares, 0.0))
    share = singular / singular.sum(1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(1)
    ranks = np.full(measured.shape[1], np.nan)
    ranks[known] = np.exp(entropy) / measured[0, known]
    return ranks
