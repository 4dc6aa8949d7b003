"""Rules that hold weights near where learning is easy: pure functions of tensors with any leading axes of runs.

Tensors are (*runs, *shape); a setting is a number, or a tensor (*runs). What belongs in the gradient is a term or a factor of
it, to be applied before the optimizer's step; the rest are new values after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from trimtab.inner_training.structure.arithmetic import ratio
from trimtab.inner_training.structure.draws import Draws

Number = float | Tensor
Tensors = dict[str, Tensor]


def along(setting: Number, values: Tensor) -> Number:
    """A setting of each run beside values (*runs, *shape)."""
    if not isinstance(setting, Tensor) or not setting.ndim:
        return setting
    return setting.to(values).view(*setting.shape, *[1] * (values.ndim - setting.ndim))


def shrink_and_perturb(values: Tensor, fresh: Tensor, keep: Number, noise: Number) -> Tensor:
    """``keep`` times the values plus ``noise`` times a fresh draw of initial values.

    >>> shrink_and_perturb(torch.tensor([1.0]), torch.tensor([0.5]), keep=0.4, noise=0.1)
    tensor([0.4500])
    """
    return along(keep, values) * values + along(noise, values) * fresh


def towards(values: Tensor, initial: Tensor | float, strength: Number) -> Tensor:
    """Gradient of strength / 2 times the squared distance to ``initial``, which may be 0.

    >>> towards(torch.tensor([1.0]), torch.tensor([0.5]), 0.1)
    tensor([0.0500])
    """
    return along(strength, values) * (values - initial)


def clipped(values: Tensor, bound: float, kappa: Number) -> Tensor:
    """Values within +-kappa times ``bound``.

    >>> clipped(torch.tensor([-3.0, 0.2]), bound=0.5, kappa=1.0)
    tensor([-0.5000,  0.2000])
    """
    limit = torch.as_tensor(along(kappa, values)).to(values) * bound
    return torch.minimum(torch.maximum(values, -limit), limit)


def unworthiness(worth: Tensor, best: Tensor) -> Tensor:
    """UPGD's factor of gradient and noise: 2 (1 - sigmoid(worth / best)); useful weights move less.

    Args:
        worth: (*runs, *shape), the running average of -g w.
        best: (*runs) the largest worth of the run's weights. Where it is not above 0 no weight is useful, and the factor
            is 1.

    >>> unworthiness(torch.tensor([0.0, 2.0]), torch.tensor(2.0))
    tensor([1.0000, 0.5379])
    """
    best = torch.as_tensor(along(best.clamp(min=0), worth))
    return 2 * (1 - torch.sigmoid(ratio(worth, best.expand_as(worth))))


def initial_bounds(model: nn.Module) -> dict[str, float]:
    """1/sqrt(fan_in) by name of each weight of two or more axes, and of its bias: how large initial values are.

    The fan-in of a bias is that of its layer. Embeddings, norms, and what else is no product have none.

    >>> initial_bounds(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)))
    {'0.weight': 0.5, '0.bias': 0.5}
    """
    found: dict[str, float] = {}
    for prefix, part in model.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            continue
        for key, weight in part._parameters.items():
            if weight is None or weight.ndim < 2 or "weight" not in key:
                continue
            # Torch takes the second axis for the inputs of a transposed convolution too.
            bound = 1 / math.sqrt(weight.shape[1] * math.prod(weight.shape[2:]))
            for name in (key, key.replace("weight", "bias")):
                if part._parameters.get(name) is not None:
                    found[f"{prefix}.{name}" if prefix else name] = bound
    return found


class WeightRule:
    """One way to maintain weights; tensors go by the names of their parameters.

    Attributes:
        steers: whether it changes gradients before the optimizer's step.
        moves: whether it changes values after it.
        draws: whether it needs random numbers.
    """

    steers = moves = draws = False

    def begin(self, values: Mapping[str, Tensor]) -> Tensors:
        """What it remembers, from the values at the start."""
        del values
        return {}

    def seen(self, gradients: Tensors, values: Tensors, memory: Tensors, settings: Mapping[str, Number]) -> Tensors:
        """The memory after gradients at some values."""
        del gradients, values, settings
        return memory

    def ahead(
        self, values: Tensors, memory: Tensors, settings: Mapping[str, Number], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """What the next gradients are multiplied with, and what is added to that; of all weights, or of none."""
        del values, memory, settings, draws
        return {}, {}

    def steered(
        self, gradients: Tensors, values: Tensors, memory: Tensors, settings: Mapping[str, Number], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """Gradients for the optimizer, and the memory after it."""
        memory = self.seen(gradients, values, memory, settings)
        factors, terms = self.ahead(values, memory, settings, draws)
        found = {k: factors[k] * g if k in factors else g for k, g in gradients.items()}
        return {k: g + terms[k] if k in terms else g for k, g in found.items()}, memory

    def moved(
        self,
        values: Tensors,
        bounds: Mapping[str, float],
        memory: Tensors,
        settings: Mapping[str, Number],
        draws: Draws,
    ) -> Tensors:
        """Values after the optimizer's step, where ``every`` lets it (see ``maintenance.Method``)."""
        del bounds, memory, settings, draws
        return values


class ShrinkAndPerturb(WeightRule):
    """Values shrink, and a fresh draw, uniform in +-1/sqrt(fan_in), is added."""

    moves = draws = True

    def moved(
        self,
        values: Tensors,
        bounds: Mapping[str, float],
        memory: Tensors,
        settings: Mapping[str, Number],
        draws: Draws,
    ) -> Tensors:
        """As ``WeightRule.moved`` says."""
        fresh = {name: bounds[name] * (2 * uniform - 1) for name, uniform in _drawn(values, draws, normal=False)}
        keep, noise = settings["keep"], settings["noise"]
        return {name: shrink_and_perturb(one, fresh[name], keep, noise) for name, one in values.items()}


class TowardsInitial(WeightRule):
    """A pull to the values that the run began with."""

    steers = True

    def begin(self, values: Mapping[str, Tensor]) -> Tensors:
        """As ``WeightRule.begin`` says."""
        return {name: one.detach().clone() for name, one in values.items()}

    def ahead(
        self, values: Tensors, memory: Tensors, settings: Mapping[str, Number], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """As ``WeightRule.ahead`` says."""
        del draws
        return {}, {k: towards(value, memory[k], settings["strength"]) for k, value in values.items()}


class DecayAndNoise(WeightRule):
    """A pull to 0, and noise after each step."""

    steers = moves = draws = True

    def ahead(
        self, values: Tensors, memory: Tensors, settings: Mapping[str, Number], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """As ``WeightRule.ahead`` says."""
        del memory, draws
        return {}, {k: towards(value, 0.0, settings["strength"]) for k, value in values.items()}

    def moved(
        self,
        values: Tensors,
        bounds: Mapping[str, float],
        memory: Tensors,
        settings: Mapping[str, Number],
        draws: Draws,
    ) -> Tensors:
        """As ``WeightRule.moved`` says."""
        noise = settings["noise"]
        return {k: values[k] + along(noise, values[k]) * drawn for k, drawn in _drawn(values, draws, normal=True)}


class Clipping(WeightRule):
    """Values stay within a multiple of the bound of their initial values."""

    moves = True

    def moved(
        self,
        values: Tensors,
        bounds: Mapping[str, float],
        memory: Tensors,
        settings: Mapping[str, Number],
        draws: Draws,
    ) -> Tensors:
        """As ``WeightRule.moved`` says."""
        return {name: clipped(one, bounds[name], settings["kappa"]) for name, one in values.items()}


class UtilityPerturbed(WeightRule):
    """UPGD: the less a weight is worth, the more it moves, noise included."""

    steers = draws = True

    def begin(self, values: Mapping[str, Tensor]) -> Tensors:
        """As ``WeightRule.begin`` says."""
        return {name: torch.zeros_like(one) for name, one in values.items()}

    def seen(self, gradients: Tensors, values: Tensors, memory: Tensors, settings: Mapping[str, Number]) -> Tensors:
        """As ``WeightRule.seen`` says."""
        share = {k: along(1 - settings["decay"], g) for k, g in gradients.items()}
        return {**memory, **{k: memory[k] + share[k] * (-g * values[k] - memory[k]) for k, g in gradients.items()}}

    def ahead(
        self, values: Tensors, memory: Tensors, settings: Mapping[str, Number], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """As ``WeightRule.ahead`` says."""
        worth = {k: memory[k] for k in values}
        # Its start does not need a correction, as it is the same in all of them.
        best = torch.stack([one.reshape(*draws.batch, -1).amax(-1) for one in worth.values()]).amax(0)
        factors = {k: unworthiness(one, best) for k, one in worth.items()}
        noise = _drawn(values, draws, normal=True)
        return factors, {k: factors[k] * along(settings["noise"], drawn) * drawn for k, drawn in noise}


def _drawn(tensors: Mapping[str, Tensor], draws: Draws, normal: bool) -> Iterator[tuple[str, Tensor]]:
    """A draw of each tensor's shape: standard normal, or uniform in (0, 1)."""
    for name, one in tensors.items():
        shape = one.shape[len(draws.batch) :]
        yield name, (draws.normal(*shape) if normal else draws.uniform(*shape)).to(one.dtype)
