"""What a live run measures of large models: a sample whose norms and inner products are close to those of the whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from trimtab.inner_training.live_probe import LiveProbe, inner_product, total_norm
from trimtab.inner_training.live_sample import ELEMENTS, WHOLE, Sample
from trimtab.inner_training.networks.transformer import LanguageModel


def perceptron() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Linear(256, 700), nn.ReLU(), nn.Linear(700, 400), nn.ReLU(), nn.Linear(400, 10))
    x, y = torch.randn(32, 256), torch.randint(10, (32,))
    return model, lambda: functional.cross_entropy(model(x), y)


def convolution() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(
        nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 320, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5120, 5)
    )
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
    return model, lambda: functional.cross_entropy(model(x), y)


def text() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = LanguageModel(context=32, width=128, depth=3, heads=4, tied=True)
    tokens = torch.randint(256, (4, 33))
    return model, lambda: functional.cross_entropy(model(tokens[:, :-1]).flatten(0, -2), tokens[:, 1:].flatten())


MODELS = {"perceptron": perceptron, "convolution, channels last": convolution, "transformer": text}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_sampled_interval_is_close_to_a_whole_one(make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]) -> None:
    torch.manual_seed(0)
    model, loss = make()
    parameters = list(model.parameters())
    assert sum(one.numel() for one in parameters) > WHOLE
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    sampled, whole = LiveProbe(4), LiveProbe(4)
    whole._sample_of = lambda parameters: whole._sample  # type: ignore[method-assign, misc]
    whole._sample = Sample(())
    whole._sample.shapes = tuple(one.shape for one in parameters)
    whole._sample._blocks = [0] * len(parameters)
    for position in range(4):
        optimizer.zero_grad()
        loss().backward()
        with torch.no_grad():
            norms = [probe.before(parameters, position, None) for probe in (sampled, whole)]
            assert norms[0] is None and (norms[1] is not None) == (position >= 2)
            optimizer.step()
            sampled.after(parameters)
            whole.after(parameters)
    for position in (2, 3):
        torch.testing.assert_close(sampled.grad_norms[position], whole.grad_norms[position], rtol=0.1, atol=0)
    for name in ("update_norm", "weight_norm"):
        torch.testing.assert_close(getattr(sampled, name), getattr(whole, name), rtol=0.05, atol=1e-6)
    first, second = whole.grad_norms[2], whole.grad_norms[3]
    assert sampled.grad_dot is not None and whole.grad_dot is not None
    assert abs(sampled.grad_dot - whole.grad_dot) < 0.1 * first * second


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 900), columns=st.integers(1, 900), seed=st.integers(0, 9))
def test_a_sample_never_reads_outside_and_estimates_without_bias(rows: int, columns: int, seed: int) -> None:
    big = torch.Size([600, 600])
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, columns, generator=generator), torch.randn(big, generator=generator)]
    sample = Sample([one.shape for one in tensors])
    read = sample.read([tensors[0].t().contiguous().t(), tensors[1]])  # one that lies column by column
    for part, one in zip(read, tensors, strict=True):
        assert total_norm([part]) == pytest.approx(float(total_norm([one])), rel=0.15)
    product = inner_product(sample.read(tensors), sample.read(tensors))
    assert product is not None and float(product) == pytest.approx(float(total_norm(read)) ** 2, rel=0.1)


@pytest.mark.parametrize("parameters", [10, WHOLE, WHOLE + 1, 10**6, 10**8])
def test_small_models_whole_and_of_large_ones_enough(parameters: int) -> None:
    sample = Sample([torch.Size([parameters])])
    assert (sample.stride == 1) == (parameters <= WHOLE)
    if sample.stride > 1:
        assert parameters / sample.stride >= ELEMENTS * 0.66


def test_the_slice_of_a_larger_tensor_is_read_where_it_lies() -> None:
    base = torch.arange(2_000_000, dtype=torch.float32)
    part = base[500_000:1_500_000].view(1000, 1000)
    sample = Sample([part.shape])
    (read,) = sample.read([part])
    scale = (1_000_000 / read.numel()) ** 0.5
    places = (read / scale - 500_000).round().long().reshape(-1)
    assert int(places.min()) >= 0 and int(places.max()) < 1_000_000
    assert len(set(places.tolist())) == read.numel()


def test_small_tensors_in_half_precision_and_missing_gradients() -> None:
    tensors: list[Tensor | None] = [torch.ones(5, dtype=torch.float16), None, torch.ones(400_000, dtype=torch.bfloat16)]
    sample = Sample([torch.Size([5]), torch.Size([9]), torch.Size([400_000])])
    first, missing, last = sample.read(tensors)
    assert first is not None and last is not None and missing is None
    assert first.dtype == last.dtype == torch.float32 and first.numel() == 5
    assert float(total_norm([last])) == pytest.approx(400_000**0.5, rel=1e-3)
