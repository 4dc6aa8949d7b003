"""Rows of the table of signals that are arithmetic on the host; scenarios observe them only when they name them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from trimtab.inner_training import indicators as i
from trimtab.inner_training.signal import Signal, row

_row = partial(row, default=False)
_START, _TWO, _VAL = "before the first interval", "before the second interval", "no validation loss was given yet"

HOST_ROWS: tuple[Signal, ...] = (
    _row("gradient", "grad_noise_scale", i.grad_noise_scale,
         "tanh(log10(E||g1 - g2||^2 / 2 / E[g1 . g2]) / 2), the simple noise scale over the batch size", _START,
         "McCandlish et al., arXiv 1812.06162, equation 2.9"),
    _row("shift", "shift",  i.shift,
         "Page-Hinkley score of the steps' ln loss above its long-term average, in its usual deviations", _TWO,
         "Page, Biometrika 41, 1954"),
    _row("shift", "shift_window", i.shift_window,
         "largest increase of the mean ln loss between two parts of an adaptive window / its bound", _START,
         "ADWIN, Bifet & Gavalda, SDM 2007"),
    _row("shift", "val_shift", i.val_shift, "as shift, of the validation losses", "before the second validation loss",
         "Page, Biometrika 41, 1954"),
    _row("shift", "persistence", i.persistence,
         "(2 share - 1) (1 - 2^-age) 0.9^age, share of the last jump of the loss that is left, age of its top in decisions",
         "no shift of 0.5 or more in the last 20 decisions"),
    _row("fit", "underfitting", i.underfitting,
         "loss / first loss x (1 - its fall) x exp(-gap), short-term; no gap where there is no validation", _START),
    _row("fit", "overfitting", i.overfitting,
         "tanh((short-term ln validation loss - its best) / 0.1) x tanh((gap - its smallest) / 0.5)", _VAL,
         "generalisation loss, Prechelt, Early stopping - but when?, 1998"),
    _row("fit", "noisy_data", i.noisy_data,
         "1 - (1 - 4 r (1 - r) flat n) (1 - n tanh(-gap)), r = best / first loss, n = noise in the squared gradient", _START),
    _row("stability", "stability_margin", i.stability_margin,
         "tanh(log2(2 (1 + momentum) / (effective learning rate x curvature along the step)) / 8)",
         "curvature not measured, or an adaptive rule", "edge of stability, Cohen et al., arXiv 2103.00065", "curvature"),
    _row("resources", "deadline_available", i.deadline_available, "1 if there is a deadline"),
    _row("resources", "deadline_left", i.deadline_left, "1 - time since the start / time allowed", "no deadline"),
    replace(_row("resources", "energy", i.energy, "tanh(short-term ln joules per step - its first)", "no meter"),
            cost="two reads of a meter", metered=True),
)  # fmt: skip
