"""Which optimizers have a controller: it holds on to the tensors of its run, so these must stay what they are."""

from __future__ import annotations

from weakref import WeakSet

import torch

ATTACHED: WeakSet[torch.optim.Optimizer] = WeakSet()
