"""Networks of the task families, with unit gates, and initial values that depend on an explicit seed alone."""

from trimtab.inner_training.networks.mlp import ACTIVATIONS, MLP, initial_parameters
from trimtab.inner_training.networks.seeding import Arrays, build_module, module_parameters, seeded_rng

__all__ = ["ACTIVATIONS", "MLP", "Arrays", "build_module", "initial_parameters", "module_parameters", "seeded_rng"]
