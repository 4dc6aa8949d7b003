"""Rules that hold weights: each against a loop over single numbers, and what it promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.maintenance import MAINTENANCE
from trimtab.inner_training.structure.weight_rules import (
    WeightRule,
    clipped,
    initial_bounds,
    shrink_and_perturb,
    towards,
    unworthiness,
)

RUNS, SHAPE = 3, (2, 4)
METHODS = [name for name, method in MAINTENANCE.items() if method.acts_on == "weights"]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entries() -> Iterator[tuple[int, int, int]]:
    return ((n, i, j) for n in range(RUNS) for i in range(SHAPE[0]) for j in range(SHAPE[1]))


def looped(formula: Callable[..., float], *tensors: Tensor) -> Tensor:
    """A formula of the run's number, and of one entry of each tensor, for all entries."""
    found = torch.empty(RUNS, *SHAPE)
    for at in entries():
        found[at] = formula(at[0], *(float(one[at]) for one in tensors))
    return found


def test_formulas_entry_by_entry() -> None:
    w, other, g = draw(0, RUNS, *SHAPE), draw(1, RUNS, *SHAPE), draw(2, RUNS, *SHAPE)
    keep, noise = torch.tensor([0.4, 0.9, 1.0]), torch.tensor([0.1, 0.0, 0.5])
    found = shrink_and_perturb(w, other, keep, noise)
    torch.testing.assert_close(found, looped(lambda n, x, y: keep[n] * x + noise[n] * y, w, other))
    torch.testing.assert_close(towards(w, other, keep), looped(lambda n, x, y: keep[n] * (x - y), w, other))
    found = clipped(w, 0.5, keep)
    torch.testing.assert_close(found, looped(lambda n, x: max(min(x, keep[n] / 2), -keep[n] / 2), w))
    best = torch.tensor([2.0, 0.5, 3.0])

    def upgd(n: int, slope: float, noise: float, worth: float) -> float:
        return 2 * (slope + noise) * (1 - 1 / (1 + math.exp(-worth / best[n])))

    torch.testing.assert_close(unworthiness(w, best) * (g + 0.1 * other), looped(upgd, g, 0.1 * other, w))


def test_the_pull_to_the_start_is_the_gradient_of_the_penalty() -> None:
    w, start = draw(0, 5).requires_grad_(), draw(1, 5)
    (0.3 / 2 * (w - start).square().sum()).backward()
    torch.testing.assert_close(towards(w.detach(), start, 0.3), w.grad)
    w = w.detach()
    for _ in range(300):
        w = w - 0.1 * towards(w, start, 0.5)
    torch.testing.assert_close(w, start)


def test_no_weight_of_use_is_plain_noise() -> None:
    """A largest worth below 0 would turn the order of the weights around."""
    g, worth = draw(0, 4), -draw(1, 4).abs()
    torch.testing.assert_close(unworthiness(worth, worth.max()) * g, g)
    useful = unworthiness(torch.tensor([0.0, 1.0, 2.0, -2.0]), torch.tensor(2.0))
    assert useful.tolist() == pytest.approx([1.0, 2 - 2 / (1 + math.exp(-0.5)), 0.5379, 1.4621], abs=1e-4)


def test_upgd_against_a_loop_over_steps() -> None:
    """The running worth of each weight, and one largest worth for all tensors of a run."""
    rule = MAINTENANCE["upgd"].rule
    assert isinstance(rule, WeightRule)
    w = {"a": draw(0, 2, 3), "b": draw(1, 2)}
    memory, worth = rule.begin(w), {key: [0.0] * one.numel() for key, one in w.items()}
    for step in range(20):
        g = {key: draw(2 + step, *one.shape) for key, one in w.items()}
        draws = Draws(torch.Generator(), (), torch.device("cpu"))
        found, memory = rule.steered(g, w, memory, {"decay": 0.9, "noise": 0.0}, draws)
        for key, values in w.items():
            pairs = zip(worth[key], g[key].flatten().tolist(), values.flatten().tolist(), strict=True)
            worth[key] = [0.9 * old - 0.1 * slope * value for old, slope, value in pairs]
        best = max(max(worth["a"]), max(worth["b"]), 0.0)
        for key in w:
            pairs = zip(worth[key], g[key].flatten().tolist(), strict=False)
            slow = [2 * s * (1 - 1 / (1 + math.exp(-u / best))) if best else s for u, s in pairs]
            torch.testing.assert_close(found[key].flatten(), torch.tensor(slow), rtol=1e-4, atol=1e-6)


def test_bounds_are_those_of_torchs_initial_values() -> None:
    layers: dict[str, nn.Module] = {
        "linear": nn.Linear(9, 5), "conv": nn.Conv2d(4, 6, 3, groups=2), "transposed": nn.ConvTranspose1d(6, 4, 3),
        "norm": nn.BatchNorm1d(3), "embedding": nn.Embedding(5, 4), "attention": nn.MultiheadAttention(8, 2),
    }  # fmt: skip
    bounds = initial_bounds(nn.ModuleDict(layers))
    assert {name.split(".")[0] for name in bounds} == {"linear", "conv", "transposed", "attention"}
    for name in ("linear", "conv", "transposed"):
        for key in ("weight", "bias"):
            layer = layers[name]
            seen = 0.0
            for _ in range(30):
                layer.reset_parameters()  # type: ignore[operator]
                seen = max(seen, float(layer.get_parameter(key).detach().abs().max()))
            assert 0.8 < seen / bounds[f"{name}.{key}"] <= 1.0001
    assert bounds["attention.in_proj_bias"] == bounds["attention.in_proj_weight"] == pytest.approx(8**-0.5)


@pytest.mark.parametrize("name", METHODS)
def test_runs_side_by_side_are_runs_one_by_one(name: str) -> None:
    """With settings and seeds of their own."""
    rule, method = MAINTENANCE[name].rule, MAINTENANCE[name]
    assert isinstance(rule, WeightRule)
    start = {"weight": draw(0, RUNS, *SHAPE), "bias": draw(1, RUNS, 4)}
    now, slopes = {k: one + 0.3 for k, one in start.items()}, {k: draw(3, *one.shape) for k, one in start.items()}
    bounds, seeds = {"weight": 0.5, "bias": 0.5}, torch.tensor([5, 6, 7])
    own = {one.name: torch.linspace(0.3, 0.9, RUNS) if not one.whole else 1.0 for one in method.settings}

    def both(
        values: dict[str, Tensor], gradients: dict[str, Tensor], first: dict[str, Tensor], run: int | None
    ) -> Tensor:
        each = {k: v[run] if isinstance(v, Tensor) and run is not None else v for k, v in own.items()}
        source = Draws(seeds if run is None else seeds[run], (RUNS,) if run is None else (), torch.device("cpu"))
        steered, _ = rule.steered(gradients, values, rule.begin(first), each, source)
        moved = rule.moved(values, bounds, rule.begin(first), each, source)
        flat = [one.flatten(1 if run is None else 0) for one in (*steered.values(), *moved.values())]
        return torch.cat(flat, -1)

    together = both(now, slopes, start, None)
    assert together.dtype == torch.float32
    for run in range(RUNS):
        alone = [{k: one[run] for k, one in part.items()} for part in (now, slopes, start)]
        torch.testing.assert_close(together[run], both(alone[0], alone[1], alone[2], run))


def test_gentle_shrinking_keeps_the_initial_spread() -> None:
    """The defaults hold the variance of a weight that gets no gradient where it began."""
    settings = {one.name: one.default for one in MAINTENANCE["shrink-and-perturb-step"].settings}
    keep, noise = settings["keep"], settings["noise"]
    assert noise**2 / (1 - keep**2) == pytest.approx(1, rel=1e-3)
