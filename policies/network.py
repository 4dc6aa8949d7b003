"""Learned policies: an exported network, in pure numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from trimtab.errors import MismatchError
from trimtab.inner_training.edits import movable
from trimtab.policies.lstm import LSTMLayer, fresh_state, run_layers
from trimtab.policies.policy import Kind

Activation = Literal["tanh", "relu"]
ActionKind = Literal["box", "multi-discrete"]
Layer = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class LeverLimits:
    """What a lever was when the policy was trained (the fields of ``Lever`` that give a move its meaning)."""

    low: float
    high: float
    rate: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedPolicy:
    """A network, feed-forward or recurrent, with its normalisation and squashing baked in.

    The forward pass is that of Stable-Baselines3: ``VecNormalize`` in float64, cast to float32, the LSTM if there is
    one, the policy's MLP, then the mean action clipped to [-1, 1] (``"box"``) or the likeliest of {down, hold, up} for
    each lever (``"multi-discrete"``). Arrays are copied and read-only. The state of a recurrent policy is explicit:
    ``hidden_0`` and ``cell_0`` (N, H) float32 for the first layer, and so on.

    Attributes:
        name: for tables and audits.
        signals: what it reads, in order; S of them.
        levers: what it moves, in order; L of them, all of kind ``"moves"``.
        decide_every: optimizer steps between decisions, as in training.
        layers: (weight (out, in), bias (out,)) float32, the last one giving L actions or 3 L logits.
        lstm: layers before them; none, for a feed-forward network.
        activation: between layers.
        obs_mean, obs_var: (S,) float64 statistics of the observations in training.
        obs_clip, obs_eps: ``clip_obs`` and ``epsilon`` of ``VecNormalize``.
        action_kind: what the outputs mean.
        obs_low, obs_high: (S,) float64, the range of each signal in training.
        provenance: how it was trained; the keys are those of ``manifest.Provenance``.
        results: held-out results, name to number or text.
        limits: the levers as they were in training; those of the lever table when left out.
        sha256: of the manifest of the bundle that it was loaded from; empty for none.
    """

    name: str
    signals: tuple[str, ...]
    levers: Mapping[str, Kind]
    decide_every: int
    layers: Sequence[Layer]
    activation: Activation
    obs_mean: np.ndarray
    obs_var: np.ndarray
    obs_clip: float
    obs_eps: float
    action_kind: ActionKind
    obs_low: np.ndarray
    obs_high: np.ndarray
    provenance: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, float | str] = field(default_factory=dict)
    limits: Mapping[str, LeverLimits] = field(default_factory=dict)
    sha256: str = ""
    lstm: Sequence[LSTMLayer] = ()
    _std: np.ndarray = field(init=False, repr=False)
    _steps: tuple[Layer, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Copies the arrays and verifies that all parts fit (``MismatchError``)."""

        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("obs_mean", "obs_var", "obs_low", "obs_high"):
            put(name, _frozen(getattr(self, name), np.float64))
        put("signals", tuple(self.signals))
        for name in ("levers", "provenance", "results", "limits"):
            put(name, dict(getattr(self, name)))
        put("layers", tuple((_frozen(weight, np.float32), _frozen(bias, np.float32)) for weight, bias in self.layers))
        put("lstm", tuple(self.lstm))
        self._check_names()
        self._check_arrays()
        if not self.limits:
            table = movable(self.levers)
            put("limits", {lever.name: LeverLimits(lever.low, lever.high, lever.rate) for lever in table})
        # The quotient by the deviation is what VecNormalize computes; a product by its inverse differs in the last bit.
        put("_std", _frozen(np.sqrt(self.obs_var + self.obs_eps), np.float64))
        put("_steps", tuple((_frozen(weight.T, np.float32), bias) for weight, bias in self.layers))

    @property
    def sizes(self) -> list[int]:
        """Widths of the MLP, from the observation or the last LSTM layer to the action."""
        first = self.lstm[-1].units if self.lstm else len(self.signals)
        return [first, *(len(bias) for _, bias in self.layers)]

    @property
    def parameters(self) -> int:
        """How many weights and biases there are."""
        gates = sum(layer.input_weight.size + layer.state_weight.size + layer.bias.size for layer in self.lstm)
        return gates + sum(weight.size + bias.size for weight, bias in self.layers)

    def init(self, num_runs: int) -> dict[str, Any]:
        """Zeros for an LSTM; a feed-forward network has no state."""
        return fresh_state(self.lstm, num_runs)

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Moves (N, L) float32 in [-1, 1]; see ``Policy.act``."""
        outputs, state = self._forward(observations, state)
        if self.action_kind == "box":
            return np.minimum(np.maximum(outputs, -1.0), 1.0), state
        logits = outputs.reshape(len(outputs), len(self.levers), 3)
        return (logits.argmax(axis=2) - 1).astype(np.float32), state

    def outputs(self, observations: np.ndarray) -> np.ndarray:
        """Outputs of the network for runs that have not started, before clipping or choosing.

        Args:
            observations: (N, S) float32.

        Returns:
            (N, L) mean actions, or (N, 3 L) logits; float32.
        """
        return self._forward(observations, self.init(len(observations)))[0]

    def _forward(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        if observations.ndim != 2 or observations.shape[1] != len(self.signals):
            raise MismatchError(
                f"policy {self.name!r} reads {len(self.signals)} signals; the observations are of shape "
                f"{observations.shape}"
            )
        scaled = (observations - self.obs_mean) / self._std
        hidden = np.minimum(np.maximum(scaled, -self.obs_clip), self.obs_clip).astype(np.float32)
        if self.lstm:
            hidden, state = run_layers(self.lstm, hidden, state)
        last = len(self._steps) - 1
        for number, (weight, bias) in enumerate(self._steps):
            hidden = hidden @ weight
            hidden += bias
            if number == last:
                break
            if self.activation == "tanh":
                np.tanh(hidden, out=hidden)
            else:
                np.maximum(hidden, 0.0, out=hidden)
        return hidden, state

    def _check_names(self) -> None:
        for what, names in (("signals", self.signals), ("levers", tuple(self.levers))):
            if not names or len(set(names)) < len(names):
                raise MismatchError(f"policy {self.name!r}: {what} is {list(names)}; it must hold different names")
        for lever, kind in self.levers.items():
            if kind != "moves":
                raise MismatchError(
                    f"policy {self.name!r}: lever {lever!r} is of kind {kind!r}; a network gives 'moves'"
                )
        for what, value, allowed in (
            ("activation", self.activation, ("tanh", "relu")),
            ("action_kind", self.action_kind, ("box", "multi-discrete")),
        ):
            if value not in allowed:
                raise MismatchError(f"policy {self.name!r}: {what} is {value!r}; allowed: {', '.join(allowed)}")
        if self.limits and set(self.limits) != set(self.levers):
            raise MismatchError(f"policy {self.name!r}: limits are of {sorted(self.limits)}, not of its levers")

    def _check_arrays(self) -> None:
        width = len(self.signals)
        for name in ("obs_mean", "obs_var", "obs_low", "obs_high"):
            self._check_array(name, getattr(self, name), (width,))
        positive = (("obs_clip", self.obs_clip), ("obs_eps", self.obs_eps), ("decide_every", self.decide_every))
        for name, value in positive:
            if not 0 < value < np.inf:
                raise MismatchError(f"policy {self.name!r}: {name} is {value}; it must be a positive number")
        if (self.obs_var < 0).any() or (self.obs_low > self.obs_high).any():
            raise MismatchError(f"policy {self.name!r}: obs_var must be at least 0, and obs_low at most obs_high")
        if not self.layers:
            raise MismatchError(f"policy {self.name!r}: layers is empty")
        for number, layer in enumerate(self.lstm):
            self._check_array(f"input_weight of LSTM layer {number}", layer.input_weight, (4 * layer.units, width))
            width = layer.units
        for number, (weight, bias) in enumerate(self.layers):
            out = len(self.levers) * (3 if self.action_kind == "multi-discrete" else 1)
            if number < len(self.layers) - 1:
                out = bias.shape[0] if bias.ndim == 1 else 0
            self._check_array(f"weight of layer {number}", weight, (out, width))
            self._check_array(f"bias of layer {number}", bias, (out,))
            width = out

    def _check_array(self, what: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
        if value.shape != shape:
            raise MismatchError(f"policy {self.name!r}: {what} has shape {value.shape}; it must be {shape}")
        if not np.isfinite(value).all():
            raise MismatchError(f"policy {self.name!r}: {what} holds a number that is not finite")


def ranges_of(policy: object) -> tuple[np.ndarray, np.ndarray] | None:
    """Lowest and highest value (S,) of each signal that a learned policy met in training; None for any other policy."""
    return (policy.obs_low, policy.obs_high) if isinstance(policy, LearnedPolicy) else None


def _frozen(value: object, dtype: type[np.floating[Any]]) -> np.ndarray:
    copy: np.ndarray = np.array(value, dtype=dtype, order="C")
    copy.setflags(write=False)
    return copy
