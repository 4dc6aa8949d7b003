"""Transformers against torch's own attention and against narrower ones, and what stacking needs of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional

from trimtab.errors import UserError
from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.networks import build_module, module_parameters
from trimtab.inner_training.networks.transformer import (
    LanguageModel,
    TransformerBlock,
    VisionTransformer,
    initial_transformer,
)

Network = LanguageModel | VisionTransformer


def small_language() -> LanguageModel:
    return LanguageModel(vocabulary=20, context=9, width=16, depth=2, heads=4, units=12)


def small_tied() -> LanguageModel:
    return LanguageModel(vocabulary=20, context=9, width=16, depth=2, heads=4, units=12, tied=True)


def small_vision() -> VisionTransformer:
    return VisionTransformer((2, 8, 12), patch=4, outputs=5, width=16, depth=2, heads=4, units=12)


each_network = pytest.mark.parametrize("make", [small_language, small_tied, small_vision])


def data_for(network: Network, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs, and labels of the shape of the outputs but for their last axis."""
    source = torch.Generator().manual_seed(seed)
    if isinstance(network, LanguageModel):
        x = torch.randint(0, network.vocabulary, (batch, network.context), generator=source)
        return x, x.roll(-1, 1)
    return torch.randn(batch, *network.image, generator=source), torch.arange(batch) % network.outputs


def mean_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def load(module: nn.Module, *arrays: Mapping[str, np.ndarray]) -> None:
    module.load_state_dict({name: torch.tensor(value) for part in arrays for name, value in part.items()})


def reference_block(block: TransformerBlock, x: Tensor, causal: bool) -> Tensor:
    """The block on sequences (B, T, width), with torch's own attention and without gates."""
    batch, tokens, _ = x.shape
    shape = (batch, tokens, block.heads, block.head_width)
    query, key, value = (part.reshape(shape).transpose(1, 2) for part in block.attend(block.norm0(x)).chunk(3, -1))
    gathered = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    x = x + block.project(gathered.transpose(1, 2).flatten(2))
    return x + block.down(nn.GELU(approximate="tanh")(block.up(block.norm1(x))))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_width", [None, 5])
def test_attention_is_torchs_own(causal: bool, head_width: int | None) -> None:
    block = build_module(lambda: TransformerBlock(12, 3, 10, head_width), seed=0)
    x = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(1))
    expected = reference_block(block, x, causal)
    found = block(x.flatten(0, 1), tokens=7, causal=causal).view(4, 7, 12)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    parameters = list(block.parameters())
    pair = [torch.autograd.grad(value.square().sum(), parameters) for value in (found, expected)]
    for ours, theirs in zip(*pair, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_byte_is_predicted_from_those_before_it(tied: bool) -> None:
    model = build_module(small_tied if tied else small_language, seed=0)
    x, _ = data_for(model, 3, 0)
    before = model(x)
    for place in range(9):
        changed = x.clone()
        changed[:, place] = (changed[:, place] + 1) % 20
        same = torch.isclose(model(changed), before, atol=1e-6).all(-1)
        assert same[:, :place].all()
        assert not same[:, place:].any()
        torch.testing.assert_close(model(x[:, : place + 1]), before[:, : place + 1])


def test_places_and_pixels_count() -> None:
    language, vision = build_module(small_language, seed=0), build_module(small_vision, seed=0)
    outputs = language(torch.full((1, 9), 7))
    assert not torch.allclose(outputs[0, 3], outputs[0, 8])
    image = torch.zeros(1, 2, 8, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(vision(image)[0, 0], image)
    assert (gradient != 0).all()


def test_patches_are_squares_of_the_image() -> None:
    vision = build_module(small_vision, seed=0)
    image = torch.randn(1, 2, 8, 12, generator=torch.Generator().manual_seed(1))
    squares = [image[0, :, row : row + 4, column : column + 4] for row in (0, 4) for column in (0, 4, 8)]
    h = vision.embed(torch.stack([square.flatten() for square in squares])) + vision.place
    for block in vision.blocks:
        assert isinstance(block, TransformerBlock)
        h = reference_block(block, h[None], causal=False)[0]
    torch.testing.assert_close(vision(image)[0], vision.head(vision.norm(h).mean(0)), atol=1e-5, rtol=1e-5)


def narrow_twin(network: Network, heads: int, units: int) -> Network:
    """A network without gates that has the active heads and units alone, with their values."""
    twin = build_module({LanguageModel: small_language, VisionTransformer: small_vision}[type(network)], seed=0)
    if isinstance(network, LanguageModel) and network.tied:
        twin = build_module(small_tied, seed=0)
    wide = dict(network.named_parameters())
    masks = {
        f"blocks.{index}.{name}": mask
        for index, block in enumerate(network.blocks)
        if isinstance(block, TransformerBlock)
        for name, mask in block.active(heads, units).items()
    }
    twin.blocks = nn.ModuleList(TransformerBlock(16, heads, units, head_width=4) for _ in network.blocks)
    with torch.no_grad():
        for name, value in twin.named_parameters():
            mask = torch.tensor(masks.get(name, np.ones(1, dtype=bool))).broadcast_to(wide[name].shape)
            value.copy_(wide[name][mask].view(value.shape))
    return twin


@each_network
@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.AdamW])
def test_inactive_heads_and_units_have_no_effect(
    make: Callable[[], Network], rule: type[torch.optim.Optimizer]
) -> None:
    network = build_module(make, seed=0)
    parameters, buffers = initial_transformer(network, np.random.default_rng(0), heads=3, units=5, scale=1.5)
    load(network, parameters, buffers)
    inactive = {name: value == 0 for name, value in parameters.items() if "blocks" in name and "norm" not in name}
    assert sum(int(mask.sum()) for mask in inactive.values()) == 2 * (4 * (4 * 16) + 3 * 4 + 2 * 7 * 16 + 7)
    # In double precision, because Adam makes steps out of rounding errors: keys have a bias without a gradient.
    network, twin = network.double(), narrow_twin(network, 3, 5).double()
    x, y = data_for(network, 10, 1)
    x = x.double() if x.is_floating_point() else x
    optimizers = [rule(one.parameters(), lr=0.02, weight_decay=0.01) for one in (network, twin)]
    for _ in range(10):
        losses = [mean_loss(one(x), y) for one in (network, twin)]
        torch.testing.assert_close(losses[0], losses[1])
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    norms = [torch.cat([value.flatten() for value in one.parameters()]).norm() for one in (network, twin)]
    torch.testing.assert_close(norms[0], norms[1])
    for name, mask in inactive.items():
        assert (network.get_parameter(name)[torch.tensor(mask)] == 0).all(), name


def test_gates_silence_a_head_and_a_unit() -> None:
    model = build_module(small_language, seed=0)
    x, _ = data_for(model, 3, 0)
    for gate, columns, weight in (
        ("gate0", slice(4, 8), "project.weight"),
        ("gate1", slice(1, 2), "down.weight"),
    ):
        values = torch.ones_like(model.get_buffer(f"blocks.1.{gate}"))
        values[1] = 0
        silent = model.get_parameter(f"blocks.1.{weight}").detach().clone()
        silent[:, columns] = 0
        gated = functional_call(model, {f"blocks.1.{gate}": values}, (x,))
        torch.testing.assert_close(gated, functional_call(model, {f"blocks.1.{weight}": silent}, (x,)))
        assert not torch.allclose(gated, model(x))


def check_stacked(make: Callable[[], Network], *, compiled: bool) -> None:
    """Losses and gradients of three networks stacked against those of each by itself."""
    networks = [build_module(make, seed=seed) for seed in range(3)]
    x, y = (
        torch.stack(part) for part in zip(*(data_for(one, 4, seed) for seed, one in enumerate(networks)), strict=True)
    )
    parameters, buffers = stack_module_state(networks)

    def loss(values: dict[str, Tensor], gates: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mean_loss(functional_call(networks[0], (values, gates), (x,)), y)

    stacked = vmap(grad_and_value(loss))
    if compiled:
        stacked = torch.compile(stacked, fullgraph=True, dynamic=False)
    gradients, losses = stacked(parameters, buffers, x, y)
    for run, network in enumerate(networks):
        expected = mean_loss(network(x[run]), y[run])
        expected.backward()
        torch.testing.assert_close(losses[run], expected.detach(), atol=1e-5, rtol=1e-5)
        for name, value in network.named_parameters():
            torch.testing.assert_close(gradients[name][run], value.grad, atol=1e-5, rtol=1e-4)


@each_network
def test_stacked_networks_are_the_single_ones(make: Callable[[], Network]) -> None:
    check_stacked(make, compiled=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler imports deprecated parts of torch
def test_compiled_networks_are_the_single_ones() -> None:
    check_stacked(lambda: LanguageModel(20, 9, 8, depth=1, heads=2), compiled=True)


@each_network
def test_initial_values_are_those_of_the_modules(make: Callable[[], Network]) -> None:
    large = {
        small_language: lambda: LanguageModel(200, 100, 80, depth=1, heads=4, units=150),
        small_tied: lambda: LanguageModel(200, 100, 80, depth=1, heads=4, units=150, tied=True),
        small_vision: lambda: VisionTransformer((3, 40, 40), 4, 50, 80, depth=1, heads=4, units=150),
    }[make]  # type: ignore[index]
    network = build_module(large, seed=0)
    parameters, buffers = initial_transformer(network, np.random.default_rng(0), heads=4, units=150, scale=1.0)
    reference, gates = module_parameters(large, seed=0)
    assert list(parameters) == list(reference)
    assert list(buffers) == list(gates)
    for name, value in parameters.items():
        assert value.dtype == np.float32
        assert value.shape == reference[name].shape
        assert value.std() == pytest.approx(reference[name].std(), rel=0.15), name
        assert value.mean() == pytest.approx(float(reference[name].mean()), abs=0.3 * float(value.std())), name


@pytest.mark.parametrize(("scale", "bias_scale"), [(0.5, 0.5), (2.0, 1.0)])
def test_scale_of_initial_values(scale: float, bias_scale: float) -> None:
    network = small_vision()
    plain, scaled = (initial_transformer(network, np.random.default_rng(0), 2, 6, factor)[0] for factor in (1.0, scale))
    for name, value in plain.items():
        factor = 1.0 if "norm" in name else scale if value.ndim > 1 else bias_scale
        np.testing.assert_allclose(scaled[name], factor * value, rtol=1e-5, err_msg=name)


def test_fan_in_counts_active_inputs() -> None:
    network = LanguageModel(width=64, depth=1, heads=16, units=400)
    parameters, buffers = initial_transformer(network, np.random.default_rng(0), heads=4, units=25, scale=1.0)
    for name, fan_in in (("attend", 64), ("project", 16), ("up", 64), ("down", 25)):
        for leaf in ("weight", "bias"):
            largest = np.abs(parameters[f"blocks.0.{name}.{leaf}"]).max()
            assert 0.8 / math.sqrt(fan_in) < largest <= 1 / math.sqrt(fan_in)
    assert [int(gate.sum()) for gate in buffers.values()] == [4, 25]


def test_the_initial_loss_is_that_of_guessing_at_any_size() -> None:
    for tied in (False, True):
        model = build_module(lambda tied=tied: LanguageModel(50, 16, 128, depth=4, heads=4, tied=tied), seed=0)
        x = torch.randint(0, 50, (8, 16), generator=torch.Generator().manual_seed(0))
        assert mean_loss(model(x), x.roll(-1, 1)).item() == pytest.approx(math.log(50), abs=0.25)


@each_network
def test_depth_is_in_the_order_of_the_parameters(make: Callable[[], Network]) -> None:
    names = list(FlatLayout(make()).shapes)
    places = [next(i for i, name in enumerate(names) if part in name) for part in ("embed", "blocks.0", "blocks.1")]
    assert places == sorted(places)
    assert names[-1].startswith("norm" if make is small_tied else "head")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LanguageModel(width=30, heads=4), "width is 30 and heads is 4; give a width that is a multiple"),
        (lambda: LanguageModel(depth=0), "depth is 0; it must be at least 1"),
        (lambda: LanguageModel(context=2.5), "context is 2.5; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: LanguageModel(context=4)(torch.zeros(2, 5, dtype=torch.int64)), "tokens is 5; .* between 1 and 4"),
        (lambda: VisionTransformer((1, 16, 18), 4, 10), "images are 16 x 18; give a patch whose edge, now 4,"),
        (lambda: VisionTransformer((1, 2, 2), 4, 10), "images are 2 x 2"),
        (lambda: TransformerBlock(8, 2, 4, head_width=0), "head_width is 0"),
        (lambda: initial_transformer(small_vision(), np.random.default_rng(), 5, 3, 1.0), "heads is 5; .* 1 and 4"),
        (lambda: initial_transformer(small_vision(), np.random.default_rng(), 4, 13, 1.0), "units is 13; .* 1 and 12"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
