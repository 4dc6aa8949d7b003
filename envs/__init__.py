"""Runs as reinforcement-learning environments; importing this registers them with Gymnasium."""

from __future__ import annotations

import gymnasium

from trimtab.envs.names import gymnasium_id, scenarios


def register_environments() -> None:
    """Registers ``trimtab/<Scenario>-v0`` for every built-in scenario; what is registered already stays.

    >>> gymnasium.spec("trimtab/DigitsMlp-v0").kwargs
    {'scenario': 'digits-mlp'}
    """
    for scenario in scenarios():
        if gymnasium_id(scenario) not in gymnasium.registry:
            gymnasium.register(
                gymnasium_id(scenario),
                entry_point="trimtab.envs.gymnasium_env:TrimtabEnv",
                vector_entry_point="trimtab.envs.vector_env:TrimtabVectorEnv",
                kwargs={"scenario": scenario},
            )


register_environments()
