"""Settings of the learning algorithms: every number in one place, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from trimtab.errors import ConfigError, out_of_range, unknown


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class PPOPreset:
    """Proximal policy optimisation (Schulman et al., arXiv 1707.06347) for steering inner runs.

    The numbers that differ from the defaults of Stable-Baselines3 are calibrated on the training scenarios; the
    reason of each is its ``help`` (``describe`` lists them).
    """

    gamma: float = _setting(1.0, "discount; 1 because an early learning rate is paid for at the end of the run")
    gae_lambda: float = _setting(0.95, "decay of the advantage estimator (arXiv 1506.02438)")
    n_steps: int = _setting(64, "decisions of each run in a rollout; long enough to hold a whole short run")
    batch_size: int = _setting(1024, "transitions in a minibatch; the largest divisor of a rollout up to this is taken")
    n_epochs: int = _setting(8, "passes over each rollout, unless the KL limit ends them")
    learning_rate: float = _setting(1e-3, "step size at the start; small networks take a large one")
    final_learning_rate: float = _setting(1e-4, "step size at the end, reached linearly")
    clip_range: float = _setting(0.2, "clip of the probability ratio, as in the paper")
    ent_coef: float = _setting(0.0, "weight of the entropy bonus; the rate limits of the levers keep exploration going")
    target_kl: float = _setting(0.03, "an update ends at 1.5 times this KL; without it returns peak early, then decay")
    vf_coef: float = _setting(0.5, "weight of the value loss, as in the paper")
    max_grad_norm: float = _setting(0.5, "gradient clip of the learner itself")
    policy_layers: tuple[int, ...] = _setting((64, 64), "hidden units of the policy; more did not help")
    value_layers: tuple[int, ...] = _setting((64, 64), "hidden units of the value function")
    activation: str = _setting("tanh", "activation of both networks: tanh or relu")
    log_std_init: float = _setting(-0.5, "log standard deviation of the first moves; 0.6 of a lever's rate limit")
    obs_clip: float = _setting(10.0, "clip of normalised observations")
    obs_epsilon: float = _setting(
        1e-2, "added to variances; a signal that never varies in training may do so later, and is not blown up"
    )
    reward_clip: float = _setting(10.0, "clip of normalised rewards")
    evaluations: int = _setting(10, "evaluations on the selection instances at most, at equal distances")
    evaluation_share: float = _setting(0.15, "environment steps spent on them per step of training, but at least 3")

    def __post_init__(self) -> None:
        if self.activation not in ("tanh", "relu"):
            raise unknown("activation", self.activation, ("tanh", "relu"))
        for name in ("policy_layers", "value_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def schedule(self) -> Callable[[float], float]:
        """Step size as a function of the share of training that remains, in [0, 1]; linear.

        >>> rate = PPOPreset(learning_rate=1e-3, final_learning_rate=1e-4).schedule()
        >>> [round(rate(left), 6) for left in (1.0, 0.5, 0.0)]
        [0.001, 0.00055, 0.0001]
        """
        first, last = self.learning_rate, self.final_learning_rate
        # Training may end a little after its budget, in the middle of a rollout; the rate then stays at its last value.
        return lambda left: last + (first - last) * max(left, 0.0)

    def rollout(self, timesteps: int, num_envs: int) -> tuple[int, int]:
        """Decisions per rollout and transitions per minibatch that fit a training.

        A short training gets shorter rollouts, so that it learns at least four times. The minibatch is the largest
        divisor of the rollout that is not above ``batch_size``, so that none is cut short.

        >>> PPOPreset().rollout(200_000, 64)
        (64, 1024)
        >>> PPOPreset().rollout(2_000, 64)
        (7, 448)
        """
        n_steps = max(2, min(self.n_steps, timesteps // (4 * num_envs)))
        size = n_steps * num_envs
        return n_steps, max(part for part in range(1, min(size, self.batch_size) + 1) if size % part == 0)

    def evaluation_interval(self, timesteps: int, cost: int) -> int:
        """Environment steps of training between evaluations.

        Args:
            timesteps: of the whole training.
            cost: environment steps that one evaluation takes.

        >>> PPOPreset().evaluation_interval(200_000, 7_500)
        50000
        """
        count = max(3, min(self.evaluations, round(self.evaluation_share * timesteps / cost)))
        return -(-timesteps // count)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for YAML."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Restores what ``to_dict`` gave; ``UserError`` for a setting that does not exist or is of another type.

        >>> PPOPreset.from_dict(PPOPreset(n_epochs=3).to_dict()).n_epochs
        3
        """
        names = [entry.name for entry in fields(cls)]
        for name in settings:
            if name not in names:
                raise unknown("setting", name, names)
        usual = cls().to_dict()
        for name, value in settings.items():
            kind = type(usual[name])
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ConfigError(
                    f"setting {name} is {value!r}; it must be of type {kind.__name__}, such as {usual[name]!r}"
                )
        return cls(**settings)


@dataclass(frozen=True, kw_only=True)
class RecurrentPPOPreset(PPOPreset):
    """The same with an LSTM before the layers of policy and value function, each its own (``RecurrentPPO`` of sb3-contrib).

    Its additional numbers are usual ones; they have not been tuned.
    """

    lstm_units: int = _setting(64, "units of each LSTM layer; as wide as the layers after it")
    lstm_layers: int = _setting(1, "LSTM layers, of the policy and of the value function")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("lstm_units", 4096), ("lstm_layers", 4)):
            if not 1 <= getattr(self, name) <= most:
                raise out_of_range(name, getattr(self, name), 1, most)


PRESETS: dict[str, PPOPreset] = {
    "ppo": PPOPreset(),
    "recurrent-ppo": RecurrentPPOPreset(policy_layers=(64,), value_layers=(64,)),
}


def preset(algo: str) -> PPOPreset:
    """The preset of an algorithm; ``UnknownNameError`` names the nearest match.

    >>> preset("ppo").gamma
    1.0
    """
    if algo not in PRESETS:
        raise unknown("algorithm", algo, PRESETS)
    return PRESETS[algo]


def describe(settings: PPOPreset) -> list[tuple[str, str, str]]:
    """Rows (name, value, reason) for tables."""
    return [(entry.name, str(getattr(settings, entry.name)), entry.metadata["help"]) for entry in fields(settings)]
