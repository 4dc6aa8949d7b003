"""Rules: the obligations of every policy, each rule against a reference, names, options, and loading by name."""

from __future__ import annotations

import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policies.obligations import OBLIGATIONS, play
from torch.optim import lr_scheduler

from trimtab.errors import BundleError, ConfigError, MismatchError, RangeError, UnknownNameError, UserError
from trimtab.inner_training.formulas import LEVEL_SCALE, squash, unsquash
from trimtab.inner_training.levers import LEVERS
from trimtab.policies import names, registry
from trimtab.policies.policy import Policy
from trimtab.policies.registry import check_policy, load_policy, register_rule
from trimtab.policies.rules import RULES, RuleEntry

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in names.BUILT_IN),
    ("cosine", {"floor": 0.2}),
    ("warmup-cosine", {"warmup": 0.0}),
    ("wsd", {"warmup": 0.8, "floor": 0.5}),
    ("plateau", {"factor": 0.3, "patience": 0, "cooldown": 2, "min_lr": 0.01}),
    ("greedy", {"patience": 1, "cooldown": 2, "warmup": 1, "window": 4, "max_lr": 2.0, "min_lr": 0.5}),
    ("random", {"seed": 7, "levers": ["momentum"]}),
    ("plateau-nudge", {"window": 1, "threshold": 1.0}),
    ("autoclip", {"percentile": 50, "window": 3, "warmup": 1}),
    ("opt-restart", {"rise": 0.01, "patience": 1, "cooldown": 1}),
    ("full", {"levers": ["lr", "grad_clip"], "without": ["staged"]}),
]


@pytest.fixture
def registered() -> Any:
    """Forgets what a test registers."""
    before, listed = dict(RULES), list(names.REGISTERED)
    yield
    RULES.clear()
    RULES.update(before)
    names.REGISTERED[:] = listed


@pytest.mark.parametrize("obligation", OBLIGATIONS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_obligations(name: str, options: dict[str, Any], obligation: Callable[[Policy], None]) -> None:
    obligation(load_policy(name, **options))


# --- schedules --------------------------------------------------------------------------------------------------


def schedule_of(name: str, steps: int, **options: Any) -> np.ndarray:
    """(steps + 1,) targets of a schedule rule at every step, from progress as the float32 that the signal is."""
    progress = (np.arange(steps + 1) / steps).astype(np.float32)
    seen = np.stack([progress, np.ones_like(progress)], axis=1)[:, None]
    return play(load_policy(name, **options), seen)[0][:, 0, 0]


def scheduled(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], steps: int) -> np.ndarray:
    """(steps + 1,) learning rates of a torch scheduler, from a rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return np.array(rates)


def torch_warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warm: int) -> lr_scheduler.LRScheduler:
    def factor(step: int) -> float:
        if step < warm:
            return step / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    return lr_scheduler.LambdaLR(optimizer, factor)


def torch_wsd(optimizer: torch.optim.Optimizer, steps: int, warm: int, floor: float) -> lr_scheduler.LRScheduler:
    def factor(step: int) -> float:
        if step < warm:
            return step / warm
        decay = steps - steps // 5
        return 1.0 if step < decay else floor + (1 - floor) * (steps - step) / (steps // 5)

    return lr_scheduler.LambdaLR(optimizer, factor)


REFERENCES: dict[str, tuple[dict[str, Any], Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]]] = {
    "constant": ({}, lambda o, t: lr_scheduler.LambdaLR(o, lambda step: 1.0)),
    "step": ({}, lambda o, t: lr_scheduler.MultiStepLR(o, [t // 2, 3 * t // 4])),
    "exponential": ({}, lambda o, t: lr_scheduler.ExponentialLR(o, 0.01 ** (1 / t))),
    "cosine": ({}, lambda o, t: lr_scheduler.CosineAnnealingLR(o, t)),
    "cosine, floor": ({"floor": 0.1}, lambda o, t: lr_scheduler.CosineAnnealingLR(o, t, eta_min=0.1)),
    "warmup-cosine": ({}, lambda o, t: torch_warmup_cosine(o, t, t // 10)),
    "warmup-cosine, short": ({"warmup": 0.01}, lambda o, t: torch_warmup_cosine(o, t, t // 100)),
    "wsd": ({"floor": 0.2}, lambda o, t: torch_wsd(o, t, t // 10, 0.2)),
    # Torch counts one-cycle's last step as total_steps - 1, and the peak from there.
    "one-cycle": ({}, lambda o, t: lr_scheduler.OneCycleLR(
        o, 1.0, total_steps=t + 1, pct_start=(0.3 * t + 1) / (t + 1), cycle_momentum=False)),
}  # fmt: skip


@pytest.mark.parametrize("steps", [100, 900, 5000])
@pytest.mark.parametrize("case", REFERENCES)
def test_schedules_equal_torch(case: str, steps: int) -> None:
    options, make = REFERENCES[case]
    ours = schedule_of(case.partition(",")[0], steps, **options)
    theirs = scheduled(lambda optimizer: make(optimizer, steps), steps)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [7, 70, 707, 4998])
def test_cosine_restarts_equals_torch(steps: int) -> None:
    ours = schedule_of("cosine-restarts", steps)
    theirs = scheduled(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, steps // 7, T_mult=2), steps)
    # At the end of the budget torch begins a fourth period; ours is done.
    np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=0, atol=1e-6)
    assert ours[-1] == 0


@given(st.integers(1, 200_000))
def test_jumps_come_at_their_step(sevenths: int) -> None:
    """Progress is rounded to float32; a jump must still come at its own step and not one later."""
    steps = 28 * sevenths
    edges = np.array([steps // 7, 3 * steps // 7])
    progress = np.concatenate([edges / steps, (edges - 1) / steps]).astype(np.float32)
    restarts = load_policy("cosine-restarts").act(np.stack([progress, np.ones(4, np.float32)], axis=1), {})[0][:, 0]
    assert (restarts[:2] == 1).all()
    assert (restarts[2:] < 0.9).all()
    halves = (np.array([steps // 2, 3 * steps // 4, steps // 2 - 1, 3 * steps // 4 - 1]) / steps).astype(np.float32)
    decay = load_policy("step").act(np.stack([halves, np.ones(4, np.float32)], axis=1), {})[0][:, 0]
    assert decay.tolist() == [0.1, 0.01, 1.0, 0.1]


def test_constant_is_the_identity() -> None:
    assert (schedule_of("constant", 1000) == 1).all()


# --- plateau and greedy -----------------------------------------------------------------------------------------


def level(log_ratio: np.ndarray) -> np.ndarray:
    """The level signal of ln(loss / first loss)."""
    return squash(log_ratio, LEVEL_SCALE).astype(np.float32)


def walk(seed: int, decisions: int = 150) -> np.ndarray:
    """A noisy loss that falls for a while and then stalls, as a level signal."""
    rng = np.random.default_rng(seed)
    trend = np.minimum(np.arange(decisions), rng.integers(10, 100)) * -0.02
    return level(trend + rng.normal(0, rng.choice([0.003, 0.05]), decisions))


OPTIONS = st.fixed_dictionaries(
    {
        "factor": st.sampled_from([0.1, 0.5, 0.9]),
        "patience": st.integers(0, 6),
        "threshold": st.sampled_from([0.0, 1e-4, 0.03]),
        "cooldown": st.integers(0, 4),
        "min_lr": st.sampled_from([0.0, 0.02]),
    }
)


@pytest.mark.parametrize("validation", [False, True])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), options=OPTIONS)
def test_plateau_equals_torch(validation: bool, seed: int, options: dict[str, Any]) -> None:
    signal = walk(seed)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = lr_scheduler.ReduceLROnPlateau(optimizer, eps=0, **options)
    wanted = []
    for value in np.exp(unsquash(signal.astype(np.float64), LEVEL_SCALE)):
        reference.step(float(value))
        wanted.append(optimizer.param_groups[0]["lr"])
    on = np.full_like(signal, validation)
    noise = np.random.default_rng(seed).uniform(-1, 1, len(signal)).astype(np.float32)
    seen = np.stack([np.ones_like(signal), noise if validation else signal, on, signal if validation else noise], 1)
    actions, _ = play(load_policy("plateau", **options), seen[:, None])
    np.testing.assert_allclose(actions[:, 0, 0], wanted, rtol=1e-12)
    assert len(set(wanted)) > 1 or options["patience"] > 0


def plateau_row(loss: float = 0.0, validation: float | None = None, started: bool = True) -> np.ndarray:
    known = validation is not None
    return np.array([[started, level(np.array(loss)), known, level(np.array(validation or 0.0))]], dtype=np.float32)


def test_plateau_waits_for_a_new_validation_loss() -> None:
    policy = load_policy("plateau", patience=2)
    held = [plateau_row(loss=0.1 * step, validation=-0.5) for step in range(40)]
    actions, state = play(policy, np.stack(held))
    assert (actions == 1).all()
    assert state["bad"].tolist() == [0]
    fresh = [plateau_row(validation=-0.4 + 0.01 * step) for step in range(3)]
    actions, _ = play(policy, np.stack(fresh), state)
    assert actions[:, 0, 0].tolist() == [1, 1, 0.5]


def test_plateau_compares_afresh_when_validation_begins() -> None:
    policy = load_policy("plateau", patience=1)
    _, state = play(policy, np.stack([plateau_row(loss=-2.0), plateau_row(loss=-1.9)]))
    assert state["bad"].tolist() == [1]
    _, state = policy.act(plateau_row(loss=-1.9, validation=1.0), state)
    assert state["bad"].tolist() == [0]
    assert state["best"] == pytest.approx([1.0], abs=1e-6)


def test_plateau_ignores_what_has_not_started() -> None:
    rows = [plateau_row(started=False)] * 20
    actions, state = play(load_policy("plateau", patience=0), np.stack(rows))
    assert (actions == 1).all()
    assert np.isinf(state["best"]).all()


def slow_greedy(levels: np.ndarray, factor: float, patience: int, threshold: float, cooldown: int, warmup: int,
                min_lr: float, max_lr: float, window: int) -> list[float]:  # fmt: skip
    """GreedyLR for one run, as a loop over decisions."""
    rate, best, good, bad, cooling, warming = 1.0, math.inf, 0, 0, 0, 0
    rates = []
    for now in range(len(levels)):
        recent = levels[max(0, now + 1 - window) : now + 1]
        current = float(np.mean(recent))
        if cooling > 0:
            cooling, good, bad = cooling - 1, 0, 0
        elif warming > 0:
            warming, good, bad = warming - 1, 0, 0
        else:
            if current < best - threshold:
                best, good, bad = current, good + 1, 0
            else:
                good, bad = 0, bad + 1
            if good > patience:
                rate, warming, good = min(rate / factor, max_lr), warmup, 0
            elif bad > patience:
                rate, cooling, bad = max(rate * factor, min_lr), cooldown, 0
        rates.append(rate)
    return rates


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    factor=st.sampled_from([0.5, 0.8, 0.95]),
    patience=st.integers(0, 4),
    threshold=st.sampled_from([0.0, 1e-6, 0.02]),
    cooldown=st.integers(0, 3),
    warmup=st.integers(0, 3),
    bounds=st.sampled_from([(1e-4, 1e4), (0.5, 2.0)]),
    window=st.integers(1, 6),
)
def test_greedy_equals_the_loop(
    seed: int, factor: float, patience: int, threshold: float, cooldown: int, warmup: int, bounds: tuple[float, float],
    window: int,
) -> None:  # fmt: skip
    options = {"factor": factor, "patience": patience, "threshold": threshold, "cooldown": cooldown, "warmup": warmup,
               "min_lr": bounds[0], "max_lr": bounds[1], "window": window}  # fmt: skip
    signals = np.stack([walk(seed), walk(seed + 1)], axis=1)
    seen = np.stack([np.ones_like(signals), signals], axis=2)
    actions, _ = play(load_policy("greedy", **options), seen)
    for run in range(2):
        levels = unsquash(signals[:, run].astype(np.float64), LEVEL_SCALE)
        np.testing.assert_allclose(actions[:, run, 0], slow_greedy(levels, **options), rtol=1e-9)


def test_greedy_rises_and_falls() -> None:
    falling = level(np.linspace(0, -2, 11))
    seen = np.stack([np.ones(11, np.float32), falling], axis=1)[:, None]
    actions, state = play(load_policy("greedy"), seen)
    np.testing.assert_allclose(actions[:, 0, 0], 0.8 ** -np.arange(1.0, 12.0))
    actions, _ = play(load_policy("greedy"), np.repeat(seen[-1:], 5, axis=0), state)
    np.testing.assert_allclose(actions[:, 0, 0], 0.8 ** -(11 - np.arange(1.0, 6.0)))


def test_greedy_does_not_count_what_has_not_started() -> None:
    policy = load_policy("greedy", window=3)
    blank = np.zeros((4, 1, 2), dtype=np.float32)
    actions, state = play(policy, blank)
    assert (actions == 1).all()
    begun = policy.init(1)
    assert all(np.array_equal(state[name], begun[name], equal_nan=True) for name in ("recent", "best", "bad"))


# --- random -----------------------------------------------------------------------------------------------------


def test_random_is_uniform_and_keyed() -> None:
    policy = load_policy("random", seed=3)
    assert list(policy.levers) == list(LEVERS)
    blank = np.zeros((500, 20, 1), dtype=np.float32)
    moves, state = play(policy, blank)
    assert len(np.unique(moves)) == moves.size
    assert state["count"].tolist() == [500] * 20
    mean, deciles = moves.mean(), np.histogram(moves, bins=10, range=(-1, 1))[0] / moves.size
    assert abs(mean) < 0.01
    np.testing.assert_allclose(deciles, 0.1, atol=0.01)
    np.testing.assert_array_equal(moves, play(load_policy("random", seed=3), blank)[0])
    assert not np.isin(play(load_policy("random", seed=4), blank)[0], moves).any()


# --- names, options, loading ------------------------------------------------------------------------------------


def test_names_are_those_of_the_table() -> None:
    assert names.rules() == tuple(RULES)
    assert all(name == entry.name for name, entry in RULES.items())
    assert all(entry.doc and "\n" not in entry.doc and isinstance(entry, RuleEntry) for entry in RULES.values())


@pytest.mark.parametrize("name", RULES)
def test_needs_are_read(name: str) -> None:
    signals = load_policy(name).signals
    # A rule that adapts makes do without a budget, too.
    assert ("progress" in RULES[name].needs) == (
        "progress" in signals and name != "constant" and not RULES[name].adapts
    )
    assert set(RULES[name].needs) <= {"progress", "val"}


def test_names_import_nothing() -> None:
    code = "import sys; import trimtab.policies.names; print('numpy' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_every_rule_has_a_row_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")
    for name in names.BUILT_IN:
        assert f"| `{name}` |" in page


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("plateau", {"factor": 1.0}, "factor is 1.0; it must be between 0.001 and 0.999"),
        ("plateau", {"patience": -1}, "patience is -1"),
        ("plateau", {"patience": 1.5}, "patience is 1.5.*whole number"),
        ("plateau", {"patience": True}, "patience is True"),
        ("plateau", {"threshold": math.nan}, "threshold is nan"),
        ("plateau", {"min_lr": "small"}, "min_lr is small"),
        ("greedy", {"max_lr": 0.5}, "max_lr is 0.5; it must be at least 1"),
        ("greedy", {"max_lr": math.inf}, "max_lr is inf"),
        ("greedy", {"window": 0}, "window is 0"),
        ("cosine", {"floor": -0.1}, "floor is -0.1"),
        ("warmup-cosine", {"warmup": 1.0}, "warmup is 1.0"),
        ("wsd", {"warmup": 0.9}, "warmup is 0.9"),
        ("random", {"seed": -1}, "seed is -1"),
        ("autoclip", {"percentile": 101}, "percentile is 101; it must be between 0 and 100"),
        ("autoclip", {"window": 0}, "window is 0"),
        ("zclip", {"z": 0}, "z is 0"),
        ("sigma-clip", {"warmup": 0}, "warmup is 0"),
        ("hypergradient", {"rate": math.nan}, "rate is nan"),
        ("palm-rewind", {"cooldown": 1.5}, "cooldown is 1.5.*whole number"),
        ("anchor", {"score": 2}, "score is 2"),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RangeError, match=words):
        load_policy(name, **options)


def test_unknown_options() -> None:
    with pytest.raises(UserError, match="rule 'plateau': unknown option 'patiense'; did you mean 'patience'.*cooldown"):
        load_policy("plateau", patiense=3)
    with pytest.raises(UserError, match="rule 'constant': unknown option 'floor'; allowed: none"):
        load_policy("constant", floor=0.1)
    with pytest.raises(UnknownNameError, match="unknown lever 'momentun'; did you mean 'momentum'"):
        load_policy("random", levers=["momentun"])
    for levers in ([], ["lr", "lr"]):
        with pytest.raises(UserError, match="name each lever once"):
            load_policy("random", levers=levers)


def test_unknown_policies(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown policy 'cosin'; did you mean 'cosine'.*default"):
        load_policy("cosin")
    with pytest.raises(UnknownNameError, match="did you mean 'default'"):
        load_policy("defualt")
    with pytest.raises(BundleError, match="no file .*nowhere"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="no file"):
        load_policy(str(tmp_path))
    with pytest.raises(UserError, match="takes no options, but got: factor"):
        load_policy(tmp_path, factor=0.1)
    with pytest.raises(UserError, match="not as int"):
        load_policy(3)  # type: ignore[arg-type]


def test_default_that_is_not_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "DEFAULT_BUNDLE", tmp_path / "none")
    with pytest.raises(BundleError, match="ships no default policy; give the name of a rule"):
        load_policy("default")


def test_a_rule_wins_over_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cosine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_policy("cosine").name == "cosine"
    with pytest.raises(BundleError, match="no file"):
        load_policy("./cosine")


def test_register_rule(registered: None) -> None:
    def slow(*, factor: float = 0.5) -> Policy:
        """Half speed.

        More."""
        return load_policy("cosine", floor=factor)

    register_rule("my-rule", slow)
    assert names.rules() == tuple(RULES)
    assert names.rules()[-1] == "my-rule"
    assert RULES["my-rule"].doc == "Half speed."
    assert load_policy("my-rule", factor=0.25).floor == 0.25  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="rule 'my-rule': unknown option 'floor'; did you mean 'factor'"):
        load_policy("my-rule", floor=0.25)
    for name, factory, words in [
        ("my-rule", slow, "registered already"),
        ("default", slow, "registered already"),
        ("cosine", slow, "registered already"),
        ("My Rule", slow, "lower-case"),
        ("a:b", slow, "lower-case"),
        ("other", 3, "must be a callable"),
    ]:
        with pytest.raises(ConfigError, match=words):
            register_rule(name, factory)  # type: ignore[arg-type]


class Hold:
    """The smallest policy; subclasses break it in one way each."""

    name = "hold"
    signals = ("started",)
    levers = {"lr": "moves"}  # noqa: RUF012
    decide_every: Any = None

    def init(self, num_runs: int) -> dict[str, Any]:
        return {}

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> Any:
        return np.zeros((len(observations), 1)), state


def broken(**changes: Any) -> Any:
    return type("Broken", (Hold,), changes)()


def fails(self: Any, observations: np.ndarray, state: Any) -> Any:
    raise RuntimeError("boom")


BROKEN: list[tuple[Any, str]] = [
    (3, "'x' is not a policy: it has no name, signals"),
    (Hold, "it is a class; give an instance"),
    (broken(signals=("loss_levle",)), "unknown signal 'loss_levle'; did you mean 'loss_level'"),
    (broken(signals=["started"]), "must be a tuple of different"),
    (broken(signals=("started", "started")), "must be a tuple of different"),
    (broken(levers={"rl": "moves"}), "unknown lever 'rl'; did you mean 'lr'"),
    (broken(levers={"lr": "moves up"}), "kind 'moves up'; allowed: moves, targets"),
    (broken(levers={}), "must map lever names"),
    (broken(levers=("lr",)), "must map lever names"),
    (broken(decide_every=0), "decide_every is 0"),
    (broken(decide_every=1.5), "decide_every is 1.5"),
    (broken(act=fails), "a trial decision raised RuntimeError: boom"),
    (broken(act=lambda self, o, s: (np.zeros(2), s)), r"actions of shape \(2,\).*must be \(2, 1\)"),
    (broken(act=lambda self, o, s: (np.zeros((2, 1)), None)), "a state of type NoneType"),
    (broken(act=lambda self, o, s: None), "act gave a NoneType; it must be a tuple"),
]


@pytest.mark.parametrize(("policy", "words"), BROKEN, ids=[words[:30] for _, words in BROKEN])
def test_what_does_not_fit_is_named(policy: Any, words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        check_policy(policy, "'x'")


def test_module_and_object(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*, speed: float, factor: float = 1.0) -> Hold:
        if speed < 0:
            raise ZeroDivisionError("speed")
        return broken(name=f"{speed} {factor}")

    module = types.ModuleType("their_module")
    parts = {
        "policy": Hold(),
        "Hold": Hold,
        "make": make,
        "number": 3,
        "open": lambda **anything: Hold(),
        "wrong": dict,
    }
    vars(module).update(parts, inner=types.SimpleNamespace(policy=Hold()))
    monkeypatch.setitem(sys.modules, "their_module", module)
    assert load_policy("their_module:policy") is parts["policy"]
    assert isinstance(load_policy("their_module:Hold"), Hold)
    assert load_policy("their_module:inner.policy").name == "hold"
    assert load_policy("their_module:make", speed=2).name == "2 1.0"
    assert load_policy("their_module:open", anything=1).name == "hold"
    for name, options, error, words in [
        ("their_module:make", {}, UserError, "needs the options: speed"),
        ("their_module:make", {"speeed": 1}, UserError, "unknown option 'speeed'; did you mean 'speed'"),
        ("their_module:make", {"speed": -1}, UserError, "could not be made: ZeroDivisionError: speed"),
        ("their_module:policy", {"speed": 1}, UserError, "takes no options, but got: speed"),
        ("their_module:polcy", {}, UnknownNameError, "unknown name 'polcy'; did you mean 'policy'"),
        ("their_module:number", {}, MismatchError, "is a int; it must be a policy or a callable"),
        ("their_module:wrong", {}, MismatchError, "'their_module:wrong' is not a policy: it has no name"),
        ("no_such_module:policy", {}, UserError, "cannot import 'no_such_module'.*No module named"),
        ("no_such_module.py:policy", {}, UserError, "names a file.* give 'no_such_module:policy', with its folder as"),
        ("their_module.py:policy", {}, UserError, "names a file.* give 'their_module:policy', with its folder as"),
        ("../in/mine.py:make", {"a": 1}, UserError, "names a file.* give 'mine:make', with the folder '../in' as"),
        ("not-a-name.py:make", {}, UserError, "names a file.* give 'module:object', with its folder as"),
    ]:
        with pytest.raises(error, match=words):
            load_policy(name, **options)
