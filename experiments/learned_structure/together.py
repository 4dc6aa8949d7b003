"""Policies put together and taken apart: a rule of structure beside whoever moves the hyperparameters, or a policy without a lever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.errors import MismatchError
from trimtab.policies.policy import Kind, Policy


class Together:
    """Asks several policies, each for its own levers; none knows of the others.

    Args:
        name: of all of them.
        policies: no two with the same lever.

    Raises:
        MismatchError: two of them move the same lever.
    """

    decide_every: int | None = None

    def __init__(self, name: str, policies: Sequence[Policy]) -> None:
        self.name, self._policies = name, tuple(policies)
        levers: dict[str, Kind] = {}
        for policy in self._policies:
            if shared := sorted(set(levers) & set(policy.levers)):
                raise MismatchError(f"{name}: more than one of the policies moves {', '.join(shared)}")
            levers |= policy.levers
        self.levers: Mapping[str, Kind] = levers
        self.signals = tuple(dict.fromkeys(signal for policy in self._policies for signal in policy.signals))
        self._columns = [[self.signals.index(signal) for signal in policy.signals] for policy in self._policies]

    def init(self, num_runs: int) -> dict[str, Any]:
        """States of all, by their place."""
        return {str(place): policy.init(num_runs) for place, policy in enumerate(self._policies)}

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """See ``Policy.act``."""
        actions, after = [], {}
        for place, (policy, columns) in enumerate(zip(self._policies, self._columns, strict=True)):
            action, after[str(place)] = policy.act(observations[:, columns], state[str(place)])
            actions.append(np.asarray(action, dtype=np.float64))
        return np.concatenate(actions, 1), after


class Without:
    """A policy one of whose levers is held back: what it says of that one is not heard.

    Args:
        policy: the policy.
        lever: one of its levers.
    """

    def __init__(self, policy: Policy, lever: str) -> None:
        self.name, self.signals, self.decide_every = (
            f"{policy.name} without {lever}",
            policy.signals,
            policy.decide_every,
        )
        self._policy = policy
        self.levers: Mapping[str, Kind] = {name: kind for name, kind in policy.levers.items() if name != lever}
        self._columns = [place for place, name in enumerate(policy.levers) if name != lever]

    def init(self, num_runs: int) -> dict[str, Any]:
        """As of the policy."""
        return self._policy.init(num_runs)

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """See ``Policy.act``."""
        actions, state = self._policy.act(observations, state)
        return np.asarray(actions)[:, self._columns], state
