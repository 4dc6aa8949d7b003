"""A learned policy as an ONNX graph, with normalisation, clipping and the choice of the action baked in."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import MismatchError, require_extra
from trimtab.policies.network import LearnedPolicy

INPUT, OUTPUT = "observations", "moves"
TOLERANCE = 1e-6


class _Graph(nn.Module):
    """The forward pass of ``LearnedPolicy.act`` in torch; (N, S) float32 to (N, L) float32."""

    def __init__(self, policy: LearnedPolicy) -> None:
        super().__init__()
        self.clip, self.box, self.levers = policy.obs_clip, policy.action_kind == "box", len(policy.levers)
        self.mean, self.std = torch.tensor(policy.obs_mean), torch.tensor(np.sqrt(policy.obs_var + policy.obs_eps))
        self.activation = nn.Tanh() if policy.activation == "tanh" else nn.ReLU()
        self.layers = nn.ModuleList()
        for weight, bias in policy.layers:
            layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            layer.weight = nn.Parameter(torch.tensor(weight), requires_grad=False)
            layer.bias = nn.Parameter(torch.tensor(bias), requires_grad=False)
            self.layers.append(layer)

    def forward(self, observations: Tensor) -> Tensor:
        # Normalised in float64 and then rounded, as in training.
        hidden = torch.clamp((observations.double() - self.mean) / self.std, -self.clip, self.clip).float()
        for layer in self.layers[:-1]:
            hidden = self.activation(layer(hidden))
        outputs: Tensor = self.layers[-1](hidden)
        if self.box:
            return torch.clamp(outputs, -1.0, 1.0)
        return (outputs.reshape(-1, self.levers, 3).argmax(2) - 1).float()


def to_onnx(policy: LearnedPolicy) -> bytes:
    """Converts a learned policy, and compares the result with it where onnxruntime is installed.

    The graph maps ``observations`` (runs, S) float32 to ``moves`` (runs, L) float32; ``runs`` is free. All weights
    are inside.

    Args:
        policy: what to convert.

    Returns:
        The content of an ``.onnx`` file.

    Raises:
        MissingExtraError: when onnxscript is not installed.
        MismatchError: when the graph's moves differ from the policy's by more than 1e-6.
    """
    require_extra("onnxscript", "onnx")
    example = torch.zeros(2, len(policy.signals))
    with _quiet():
        program = torch.onnx.export(
            _Graph(policy).eval(),
            (example,),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={"observations": {0: torch.export.Dim("runs")}},
        )
    if program is None:
        raise MismatchError("torch made no ONNX program; use the versions of constraints.txt")
    content: bytes = program.model_proto.SerializeToString()
    _compare(policy, content)
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's exporter from warning of itself: of a deprecated call, and that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec.. is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(before)


def _compare(policy: LearnedPolicy, content: bytes) -> None:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return
    draws = np.random.default_rng(0).uniform(policy.obs_low, policy.obs_high, (256, len(policy.signals)))
    observations = draws.astype(np.float32)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (moves,) = session.run([OUTPUT], {INPUT: observations})
    wanted, _ = policy.act(observations, policy.init(len(observations)))
    off = float(np.abs(moves - wanted).max())
    if not off <= TOLERANCE:
        raise MismatchError(f"the ONNX graph differs from the policy by {off:.1e}; at most {TOLERANCE} is allowed")
