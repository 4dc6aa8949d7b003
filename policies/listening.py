"""Asking a policy in a live run: its answer must have the right shape and come in time."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from trimtab.errors import MismatchError, TrimtabError
from trimtab.policies.policy import Policy

SECONDS = 1.0  # that a policy may take for an answer, unless ``Controller.time_limit`` says otherwise
LATE_ANSWERS = 3  # after which a policy is not asked any more


class PolicyFault(TrimtabError):
    """Raised when a policy fails to answer, and nothing else does; its cause is what the policy raised."""


class Listener:
    """Asks a policy, and keeps its state.

    A decision is taken in the training's own thread, so an answer that never comes cannot be waited out; one that comes
    late is not used, and a policy that is late too often is not asked any more.

    Attributes:
        state: of the policy.
        time_limit: seconds for an answer, None for no limit. The first answer may take longer, for a warm-up.
        late: answers that came too late.
        finite: every number of the last answer was.
        say: logs a warning, once for each of its first arguments.

    Raises:
        MismatchError: the policy cannot begin.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        try:
            self.state = policy.init(1)
        except Exception as error:  # of a user's code
            raise MismatchError(
                f"policy {policy.name!r} cannot begin: init raised {type(error).__name__}: {error}"
            ) from error
        self.time_limit: float | None = SECONDS
        self.late, self._asked = 0, False
        self.say: Callable[[str, str], None] = lambda what, message: None
        self.finite = True

    def ask(self, observation: np.ndarray) -> np.ndarray | None:
        """The policy's action (1, L) float64; None when it came too late.

        Raises:
            PolicyFault: it raised, or its answer is not of that shape.
        """
        self.finite = True
        if self.late >= LATE_ANSWERS:
            return None
        began = time.monotonic()
        try:
            proposed, state = self.policy.act(
                observation.copy(), self.state
            )  # which it may change, but not the audit's
            actions = np.asarray(proposed, dtype=np.float64)
        except Exception as error:
            raise PolicyFault(repr(error)) from error
        seconds, first, self._asked = time.monotonic() - began, not self._asked, True
        if not first and self.time_limit is not None and seconds > self.time_limit:
            self.late += 1
            self.say(
                "late",
                f"policy {self.policy.name!r} took {seconds:.3g} s for a decision, more than the {self.time_limit:g} s of "
                f"controller.time_limit, so every lever held; after {LATE_ANSWERS} such it is not asked any more",
            )
            return None
        if actions.shape != (1, len(self.policy.levers)):
            raise PolicyFault(f"actions of shape {actions.shape} for 1 run and {len(self.policy.levers)} levers")
        self.finite = bool(np.isfinite(actions).all())
        if self.finite:  # else what a recurrent policy remembers may never be a number again
            self.state = state
        return actions

    def why(self) -> str:
        """What the policy says of its last decision; empty where it says nothing, or fails to."""
        say = getattr(self.policy, "why", None)
        try:
            return str(say(self.state)[0]) if callable(say) else ""
        except Exception as error:  # noqa: BLE001 - whatever it is, the training must not stop for it
            self.say("why", f"policy {self.policy.name!r} could not say why: {error!r}")
            return ""
