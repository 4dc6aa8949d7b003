"""LSTM layers in numpy, with a state that the caller keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.errors import MismatchError

State = dict[str, Any]


@dataclass(frozen=True, eq=False)
class LSTMLayer:
    """One layer of H units (Hochreiter and Schmidhuber, Neural Computation 9, 1997), as in ``torch.nn.LSTM``.

    Its four gates lie one below the other in the order of torch: input, forget, cell, output.

    Attributes:
        input_weight: (4 H, in) float32.
        state_weight: (4 H, H) float32.
        bias: (4 H,) float32, the sum of torch's two.
    """

    input_weight: np.ndarray
    state_weight: np.ndarray
    bias: np.ndarray
    _weight: np.ndarray = field(init=False, repr=False)
    _bias: np.ndarray = field(init=False, repr=False)
    _scale: np.ndarray = field(init=False, repr=False)
    _shift: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Copies the arrays, verifies them (``MismatchError``), and arranges them for one product per step."""
        for name in ("input_weight", "state_weight", "bias"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        shapes = self.input_weight.shape, self.state_weight.shape, self.bias.shape
        gates, inputs = 4 * self.units, self.input_weight.shape[-1]
        if not self.units or shapes != ((gates, inputs), (gates, self.units), (gates,)):
            raise MismatchError(
                f"an LSTM layer has arrays of shapes {shapes}; they must be (4 H, in), (4 H, H), (4 H,)"
            )
        if not all(np.isfinite(array).all() for array in (self.input_weight, self.state_weight, self.bias)):
            raise MismatchError("an LSTM layer holds a number that is not finite")
        # sigmoid(x) = 0.5 + 0.5 tanh(x / 2), which never overflows; halving a float is exact.
        scale = np.full(len(self.bias), 0.5, dtype=np.float32)
        scale[2 * self.units : 3 * self.units] = 1.0
        both = np.concatenate([self.input_weight, self.state_weight], axis=1)
        object.__setattr__(self, "_weight", _frozen((both * scale[:, None]).T))
        object.__setattr__(self, "_bias", _frozen(self.bias * scale))
        object.__setattr__(self, "_scale", _frozen(scale))
        object.__setattr__(self, "_shift", _frozen(1.0 - scale))

    @property
    def units(self) -> int:
        """H."""
        return self.bias.size // 4

    def step(self, inputs: np.ndarray, hidden: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next hidden and cell state (N, H) of N runs, from inputs (N, in)."""
        gates = np.concatenate((inputs, hidden), axis=1) @ self._weight
        gates += self._bias
        np.tanh(gates, out=gates)
        gates *= self._scale
        gates += self._shift
        units = self.units
        cell = gates[:, units : 2 * units] * cell
        cell += gates[:, :units] * gates[:, 2 * units : 3 * units]
        return gates[:, 3 * units :] * np.tanh(cell), cell


def state_names(layers: int) -> list[tuple[str, str]]:
    """Names of the hidden and the cell state of each layer.

    >>> state_names(1)
    [('hidden_0', 'cell_0')]
    """
    return [(f"hidden_{number}", f"cell_{number}") for number in range(layers)]


def fresh_state(layers: Sequence[LSTMLayer], num_runs: int) -> State:
    """Zeros (num_runs, H) float32 by name: runs that have not started."""
    return {
        name: np.zeros((num_runs, layer.units), dtype=np.float32)
        for layer, names in zip(layers, state_names(len(layers)), strict=True)
        for name in names
    }


def run_layers(
    layers: Sequence[LSTMLayer], inputs: np.ndarray, state: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, State]:
    """The output (N, H) of the last layer, and the next state; the given one is not modified.

    Raises:
        MismatchError: when the state is not of as many runs or units as it must be.
    """
    following: State = {}
    for layer, (hidden_name, cell_name) in zip(layers, state_names(len(layers)), strict=True):
        wanted = (len(inputs), layer.units)
        hidden, cell = state.get(hidden_name), state.get(cell_name)
        if hidden is None or cell is None or hidden.shape != wanted or cell.shape != wanted:
            held = {name: np.shape(value) for name, value in state.items()}
            raise MismatchError(f"{hidden_name} and {cell_name} of the state must be of shape {wanted}, but got {held}")
        inputs, next_cell = layer.step(inputs, hidden, cell)
        following[hidden_name], following[cell_name] = inputs, next_cell
    return inputs, following


def _frozen(value: np.ndarray) -> np.ndarray:
    copy: np.ndarray = np.array(value, dtype=np.float32, order="C")
    copy.setflags(write=False)
    return copy
