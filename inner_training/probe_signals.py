"""Rows of the table of signals that read update norms by depth or further measurements; see ``measurements``."""

from __future__ import annotations

from functools import partial

import numpy as np

from trimtab.inner_training import formulas as f
from trimtab.inner_training.activations import effective_rank
from trimtab.inner_training.reading import Memory, Reading
from trimtab.inner_training.signal import Compute, Signal, row

_row = partial(row, default=False)
_START = "before the first interval"
_EDGE = "the edge of stability of gradient descent, Cohen et al., arXiv 2103.00065"


def held(reading: Reading, memory: Memory, name: str) -> np.ndarray:
    """The newest value (N,) of a measurement, held until the next one."""
    return memory.latest(name, reading.probed(name))


def ratio_at(depth: int) -> Compute:
    """``tanh((3 + log10 |update| / |weights|) / 2)`` of one third of the depth, NaN where it has no weights."""

    def compute(reading: Reading, memory: Memory) -> np.ndarray:
        del memory
        update, weight = reading.sampled("update_norm"), reading.sampled("weight_norm")
        if update.ndim == 1:
            return np.full(reading.num_runs, np.nan)
        ratio = np.log10(update[depth] / (weight[depth] + f.TINY) + 1e-9)
        return np.where((weight[depth] > 0) | (update[depth] > 0), f.squash(ratio + 3.0, 2.0), np.nan)

    return compute


def share(name: str) -> Compute:
    """A measured share as it is."""
    return lambda reading, memory: held(reading, memory, name)


def centred_share(name: str) -> Compute:
    """A measured share from -1 (none) to 1 (all)."""
    return lambda reading, memory: 2 * held(reading, memory, name) - 1


def below_edge(share: np.ndarray) -> np.ndarray:
    """``tanh(1 + log10 share)``: 0 at a tenth of the edge of stability, 0.76 at it; what curves down is far from it."""
    return f.squash(1 + np.log10(np.maximum(share, f.TINY)), 1.0)


def against_edge(name: str) -> Compute:
    """``tanh(1 + log10(effective learning rate x curvature / 2))``."""
    return lambda reading, memory: below_edge(f.effective_lr(reading) * held(reading, memory, name) / 2)


def overshoot(reading: Reading, memory: Memory) -> np.ndarray:
    """As ``sharpness``, of which it is the same for gradient descent, with the step that any optimizer took."""
    return below_edge(held(reading, memory, "overshoot"))


def taken(*names: str) -> Compute:
    """1 once one of some measurements was taken of a run."""

    def compute(reading: Reading, memory: Memory) -> np.ndarray:
        known = [np.isfinite(reading.probed(name)) for name in names]
        now = np.logical_or.reduce([one if one.ndim == 1 else one.any(0) for one in known])
        return np.asarray(memory.latest("/".join(names), np.where(now, 1.0, np.nan)) == 1, dtype=np.float64)

    return compute


def feature_rank(reading: Reading, memory: Memory) -> np.ndarray:
    """2 x effective rank of the features - 1."""
    measured = reading.probed("features")
    fresh = np.full(reading.num_runs, np.nan) if measured.ndim == 1 else effective_rank(measured)
    return 2 * memory.latest("effective_rank", fresh) - 1


_KARPATHY = "the 1e-3 rule of thumb, Karpathy, CS231n notes"

PROBE_ROWS: tuple[Signal, ...] = (
    *(
        _row("update", f"update_ratio_{depth}", ratio_at(number),
             f"tanh((3 + log10 |update| / |weights|) / 2) of the {depth} third of the weight matrices",
             f"{_START}, or no matrix there", _KARPATHY)
        for number, depth in enumerate(("early", "middle", "late"))
    ),
    _row("gradient", "grad_sparsity", centred_share("grad_sparsity"),
         "2 x share of the gradient's elements below a tenth of their root mean square - 1", _START, need="grad_sparsity"),
    _row("activation", "activations_available", taken("saturation", "dormant", "features"),
         "1 once saturation, dormant or features were measured"),
    _row("activation", "saturation", share("saturation"),
         "share of tanh and sigmoid outputs in the outer 1.5% of their range", "none seen",
         "Glorot & Bengio, AISTATS 2010", "saturation"),
    _row("activation", "dormant", share("dormant"),
         "share of units whose mean |output| is at most 0.025 of their layer's", "no activation seen",
         "Sokar et al., arXiv 2302.12902", "dormant"),
    _row("activation", "effective_rank", feature_rank,
         "2 x exp(entropy of the features' singular values over their sum) / min(examples, units) - 1",
         "no activation seen", "Roy & Vetterli, EUSIPCO 2007", "features"),
    _row("curvature", "curvature_available", taken("curvature", "overshoot", "curvature_max", "curvature_trace"),
         "1 once a measurement of curvature was taken"),
    _row("curvature", "sharpness", against_edge("curvature"),
         "tanh(1 + log10(effective learning rate x curvature along the step / 2))", "curvature not measured",
         _EDGE, "curvature"),
    _row("curvature", "overshoot", overshoot,
         "tanh(1 + log10(share of the step's first-order descent that curvature takes back)), sharpness for any optimizer",
         "curvature not measured, or a step uphill", need="overshoot"),
    _row("curvature", "curvature_max", against_edge("curvature_max"),
         "tanh(1 + log10(effective learning rate x largest eigenvalue of the Hessian / 2))", "curvature not measured",
         _EDGE, "curvature_max"),
    _row("curvature", "curvature_trace", against_edge("curvature_trace"),
         "tanh(1 + log10(effective learning rate x trace of the Hessian / 2))", "curvature not measured",
         "Hutchinson, Communications in Statistics 19, 1990", "curvature_trace"),
)  # fmt: skip
