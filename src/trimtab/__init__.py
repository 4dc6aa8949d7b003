"""A learned controller for neural-network training.

`import trimtab` is cheap: each public name imports its module on first use, so that asking for the version or for
the names of the rules needs neither torch nor gymnasium.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.agents.evaluate import evaluate
    from trimtab.agents.evaluation import Evaluation
    from trimtab.envs.names import scenarios
    from trimtab.envs.sb3_vec_env import make_vec
    from trimtab.inner_training.levers import register_lever
    from trimtab.inner_training.signals import register_signal
    from trimtab.inner_training.structure.entry import gates
    from trimtab.inner_training.structure.keeping import maintain
    from trimtab.inner_training.structure.structure import Structure
    from trimtab.inner_training.tasks import register_task
    from trimtab.policies.attach import attach
    from trimtab.policies.bundle import save_policy
    from trimtab.policies.controller import Controller
    from trimtab.policies.names import rules
    from trimtab.policies.registry import load_policy, register_rule

    __version__: str

# Public name -> the module that defines it.
_HOMES = {
    "Controller": "trimtab.policies.controller",
    "Evaluation": "trimtab.agents.evaluation",
    "Structure": "trimtab.inner_training.structure.structure",
    "attach": "trimtab.policies.attach",
    "evaluate": "trimtab.agents.evaluate",
    "gates": "trimtab.inner_training.structure.entry",
    "load_policy": "trimtab.policies.registry",
    "maintain": "trimtab.inner_training.structure.keeping",
    "make_vec": "trimtab.envs.sb3_vec_env",
    "register_lever": "trimtab.inner_training.levers",
    "register_rule": "trimtab.policies.registry",
    "register_signal": "trimtab.inner_training.signals",
    "register_task": "trimtab.inner_training.tasks",
    "rules": "trimtab.policies.names",
    "save_policy": "trimtab.policies.bundle",
    "scenarios": "trimtab.envs.names",
}

__all__ = [
    "Controller",
    "Evaluation",
    "Structure",
    "__version__",
    "attach",
    "evaluate",
    "gates",
    "load_policy",
    "maintain",
    "make_vec",
    "register_lever",
    "register_rule",
    "register_signal",
    "register_task",
    "rules",
    "save_policy",
    "scenarios",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("trimtab")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names besides what is loaded."""
    return sorted({*globals(), *__all__})
