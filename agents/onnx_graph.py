"""A learned policy as an ONNX graph: normalisation, clipping and the choice of the action inside, the state outside."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import MismatchError, require_extra
from trimtab.policies.lstm import LSTMLayer
from trimtab.policies.network import LearnedPolicy

INPUT, OUTPUT, NEXT = "observations", "moves", "next_"  # NEXT begins the name of a state that comes out
TOLERANCE = 1e-6


class _Graph(nn.Module):
    """The forward pass of ``LearnedPolicy.act`` in torch; (N, S) float32 to (N, L) float32, and states to states."""

    def __init__(self, policy: LearnedPolicy) -> None:
        super().__init__()
        self.clip, self.box, self.levers = policy.obs_clip, policy.action_kind == "box", len(policy.levers)
        self.mean, self.std = torch.tensor(policy.obs_mean), torch.tensor(np.sqrt(policy.obs_var + policy.obs_eps))
        self.activation = nn.Tanh() if policy.activation == "tanh" else nn.ReLU()
        self.layers = nn.ModuleList(_linear(weight, bias) for weight, bias in policy.layers)
        self.lstm = nn.ModuleList(_Cell(layer) for layer in policy.lstm)

    def forward(self, observations: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        # Normalised in float64 and then rounded, as in training.
        hidden = torch.clamp((observations.double() - self.mean) / self.std, -self.clip, self.clip).float()
        following: list[Tensor] = []
        for number, cell in enumerate(self.lstm):
            hidden, memory = cell(hidden, states[2 * number], states[2 * number + 1])
            following += [hidden, memory]
        for layer in self.layers[:-1]:
            hidden = self.activation(layer(hidden))
        outputs: Tensor = self.layers[-1](hidden)
        if self.box:
            return torch.clamp(outputs, -1.0, 1.0), *following
        return (outputs.reshape(-1, self.levers, 3).argmax(2) - 1).float(), *following


class _Cell(nn.Module):
    """One step of an LSTM layer, in operations that every ONNX runtime has."""

    def __init__(self, layer: LSTMLayer) -> None:
        super().__init__()
        self.inputs = _linear(layer.input_weight, layer.bias)
        self.states = _linear(layer.state_weight, None)

    def forward(self, inputs: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        admit, keep, new, show = (self.inputs(inputs) + self.states(hidden)).chunk(4, dim=1)
        memory = torch.sigmoid(keep) * memory + torch.sigmoid(admit) * torch.tanh(new)
        return torch.sigmoid(show) * torch.tanh(memory), memory


def _linear(weight: np.ndarray, bias: np.ndarray | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(torch.tensor(weight), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(torch.tensor(bias), requires_grad=False)
    return layer


def to_onnx(policy: LearnedPolicy) -> bytes:
    """Converts a learned policy, and compares the result with it where onnxruntime is installed.

    The graph maps ``observations`` (runs, S) float32 to ``moves`` (runs, L) float32; ``runs`` is free. All weights
    are inside. The state of a recurrent policy is explicit: each of its arrays, such as ``hidden_0`` (runs, H) float32,
    goes in under its name and comes out as ``next_hidden_0``; zeros start a run.

    Args:
        policy: what to convert.

    Returns:
        The content of an ``.onnx`` file.

    Raises:
        MissingExtraError: when onnxscript is not installed.
        MismatchError: when the graph's moves differ from the policy's by more than 1e-6.
    """
    require_extra("onnxscript", "onnx")
    states = {name: torch.tensor(value) for name, value in policy.init(2).items()}
    example = (torch.zeros(2, len(policy.signals)), *states.values())
    runs = {0: torch.export.Dim("runs")}
    with _quiet():
        program = torch.onnx.export(
            _Graph(policy).eval(),
            example,
            dynamo=True,
            verbose=False,
            input_names=[INPUT, *states],
            output_names=[OUTPUT, *(NEXT + name for name in states)],
            dynamic_shapes=(runs, (runs,) * len(states)) if states else (runs,),
        )
    if program is None:
        raise MismatchError("torch made no ONNX program; use the versions of constraints.txt")
    content: bytes = program.model_proto.SerializeToString()
    _compare(policy, content)
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's exporter from warning of itself: of a deprecated call, that torchvision is not
    installed, and that all inputs have the same number of runs."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec.. is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: runs will not be used", UserWarning)
            yield
    finally:
        logger.setLevel(before)


def _compare(policy: LearnedPolicy, content: bytes) -> None:
    """Plays eight successive decisions of 32 runs in both."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    size = (8, 32, len(policy.signals))
    draws = np.random.default_rng(0).uniform(policy.obs_low, policy.obs_high, size).astype(np.float32)
    state = policy.init(size[1])
    theirs = dict(state)
    for observations in draws:
        moves, *following = session.run(None, {INPUT: observations, **theirs})
        theirs = dict(zip(theirs, following, strict=True))
        wanted, state = policy.act(observations, state)
        pairs = [(moves, wanted), *((theirs[name], state[name]) for name in state)]
        off = max(float(np.abs(got - expected).max()) for got, expected in pairs)
        if not off <= TOLERANCE:
            raise MismatchError(f"the ONNX graph differs from the policy by {off:.1e}; at most {TOLERANCE} is allowed")
