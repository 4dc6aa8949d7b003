"""Blocks: what all of them owe, the clever ones against slow references, and what each does and does not react to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trimtab.errors import RangeError, UnknownNameError
from trimtab.inner_training.formulas import LEVEL_SCALE, squash
from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.reading import Memory
from trimtab.inner_training.signals import resolve_signals
from trimtab.policies.registry import load_policy
from trimtab.policies.rules.block import SHARED, Block, Fields, Outcome, advance_shared, fresh_shared
from trimtab.policies.rules.blocks import BLOCKS, make_blocks
from trimtab.policies.rules.clip_blocks import AutoClip, ScaledClip, ScaledDecay, SigmaClip, ZClip
from trimtab.policies.rules.rate_blocks import Deceleration, PlateauNudge, ScaleSchedule, Schedule
from trimtab.policies.rules.shift_blocks import Anchor, Explore, ExploreMomentum, Rebalance
from trimtab.policies.rules.shock_blocks import (
    Conservatism,
    MomentReset,
    OptRestart,
    PalmRewind,
    RestartRate,
    SpikeCare,
    WarmReturn,
)
from trimtab.policies.rules.stability_blocks import EdgeCap, Hypergradient, SaturationMomentum, Staged, VarianceCare

Values = Mapping[str, Any]


class Player:
    """Plays blocks in turn for N runs, as a composite does; keeps the outcome of each by name."""

    def __init__(self, *blocks: Block, runs: int = 1) -> None:
        self.blocks, self.runs = blocks, runs
        self.shared = fresh_shared(runs)
        self.memory = {block.name: block.init(runs) for block in blocks}
        self.outcomes: dict[str, Outcome] = {}

    def step(self, **values: Any) -> float:
        """One decision; signals that are not given are 0, but for ``started``. Gives the first block's contribution."""
        names = {name for block in self.blocks for name in block.signals}
        assert set(values) <= names, "a signal that no block reads"
        seen = {name: np.zeros(self.runs) + values.get(name, name == "started") for name in names}
        self.shared = advance_shared(self.shared)
        for block in self.blocks:
            outcome = block.step(seen, self.memory[block.name], self.shared)
            self.memory[block.name], self.outcomes[block.name] = outcome.memory, outcome
            self.shared |= outcome.shared
        return self.of(self.blocks[0].name)

    def of(self, name: str) -> float:
        """The last contribution of a block to the first run."""
        return float(self.outcomes[name].contribution[0])


# --- what every block owes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS.values(), ids=lambda kind: kind.name)
def test_declarations(kind: type[Block]) -> None:
    assert kind.doc and "\n" not in kind.doc and kind.__doc__
    assert len(resolve_signals(kind.signals)) == len(set(kind.signals)) > 0
    assert kind.kind in ("targets", "events")
    assert kind.lever in LEVERS or kind.kind == "events"
    assert kind.because.format(0.5)
    assert set(kind.writes) | set(kind.follows) <= set(SHARED)


@pytest.mark.parametrize("kind", BLOCKS.values(), ids=lambda kind: kind.name)
def test_steps(kind: type[Block]) -> None:
    """Bounded and finite contributions; nothing is read, written or changed but what was declared; runs are apart."""
    block, rng, runs = kind(), np.random.default_rng(0), 6
    memory, shared = block.init(runs), fresh_shared(runs)
    alone, alone_shared = block.init(1), fresh_shared(1)
    for _ in range(40):
        seen = {name: rng.uniform(-1, 1, runs).astype(np.float32).astype(float) for name in block.signals}
        shared, alone_shared = advance_shared(shared), advance_shared(alone_shared)
        kept = {**{k: v.copy() for k, v in memory.items()}}, {k: v.copy() for k, v in shared.items()}
        outcome = block.step(seen, memory, shared)
        assert all(np.array_equal(kept[0][k], memory[k], equal_nan=True) for k in memory)
        assert all(np.array_equal(kept[1][k], shared[k], equal_nan=True) for k in shared)
        assert outcome.contribution.shape == outcome.evidence.shape == (runs,)
        assert np.isfinite(outcome.contribution).all() and np.isfinite(outcome.evidence).all()
        assert outcome.contribution.dtype == (bool if block.kind == "events" else float)
        assert (outcome.contribution >= 0).all()
        assert set(outcome.shared) <= set(block.writes)
        assert {k: (v.shape, v.dtype) for k, v in outcome.memory.items()} == {
            k: (v.shape, v.dtype) for k, v in memory.items()
        }
        last = block.step({name: value[-1:] for name, value in seen.items()}, alone, alone_shared)
        assert last.contribution == pytest.approx(outcome.contribution[-1:], rel=1e-12)
        memory, alone = outcome.memory, last.memory
        shared, alone_shared = shared | outcome.shared, alone_shared | last.shared


def test_shared_state_passes_with_time() -> None:
    later = advance_shared({**fresh_shared(1), "since_shock": np.array([2.0]), "exploring": np.array([0.0])})
    assert (later["since_shock"][0], later["exploring"][0], later["conservatism"][0]) == (3, 0, 1)
    assert np.isinf(later["since_shift"][0])


def test_blocks_by_name() -> None:
    mine = AutoClip(percentile=50)
    assert make_blocks([mine, "zclip"]) == (mine, ZClip())
    with pytest.raises(UnknownNameError, match="unknown block 'autoclp'; did you mean 'autoclip'"):
        make_blocks(["autoclp"])
    with pytest.raises(UnknownNameError, match="unknown schedule 'cosin'; did you mean 'cosine'"):
        Schedule(schedule="cosin")
    for wrong in ({"low": 0}, {"high": 0.5}, {"rate": 2}):
        with pytest.raises(RangeError, match=next(iter(wrong))):
            Hypergradient(**wrong)


def row(kind: type[Block]) -> str:
    """The block's row of docs/rules.md."""
    options = ", ".join(f"`{name}` {value:g}" if not isinstance(value, str) else f"`{name}` {value}"
                        for name, value in vars(kind()).items())  # fmt: skip
    signals = ", ".join(f"`{name}`" for name in kind.signals)
    return f"| `{kind.name}` | `{kind.lever}` | {kind.doc} | {signals} | {options} | {kind.source or 'ours'} |"


@pytest.mark.parametrize("kind", BLOCKS.values(), ids=lambda kind: kind.name)
def test_every_block_has_its_row_in_the_docs(kind: type[Block]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")
    assert row(kind) in page


# --- clipping from history, against slow references -------------------------------------------------------------


def norms_as_seen(norms: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """The signal ``grad_level`` of a run with these mean norms (NaN for an interval without), and the average norm that
    the lever is relative to, after each."""
    memory, levels, averages = Memory(1), [], []
    for norm in norms:
        memory.begin()
        value = np.log(np.array([norm]))
        levels.append(squash(memory.ema("fast", value, 0.5) - memory.first("first", value), 2.0)[0])
        averages.append(memory.ema("average", np.array([norm]), 0.9)[0])
    return np.array(levels, dtype=np.float32), np.array(averages)


def slow_autoclip(norms: list[float], block: AutoClip) -> float:
    return float(np.percentile(norms[-block.window :], block.percentile))


def slow_zclip(norms: list[float], block: ZClip) -> float:
    mean, variance = float(np.mean(norms[: block.warmup])), float(np.var(norms[: block.warmup]))
    for norm in norms[block.warmup :]:
        kept = min(norm, mean + block.z * math.sqrt(variance))
        mean = block.alpha * mean + (1 - block.alpha) * kept
        variance = block.alpha * variance + (1 - block.alpha) * (kept - mean) ** 2
    return mean + block.z * math.sqrt(variance)


def slow_sigma(norms: list[float], block: SigmaClip) -> float:
    logs = np.log(norms)
    weights = block.decay ** np.arange(len(logs))[::-1]
    mean = float((weights * logs).sum() / weights.sum())
    variance = float((weights * (logs - mean) ** 2).sum() / weights.sum())
    return math.exp(mean + block.sigmas * max(math.sqrt(variance), block.least))


@pytest.mark.parametrize(
    ("block", "slow"),
    [
        (AutoClip(percentile=10), slow_autoclip),
        (AutoClip(percentile=73, window=6, warmup=3), slow_autoclip),
        (ZClip(), slow_zclip),
        (ZClip(z=1.0, alpha=0.8, warmup=3), slow_zclip),
        (SigmaClip(), slow_sigma),
        (SigmaClip(sigmas=1.0, decay=0.7, least=0.0), slow_sigma),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), gaps=st.sampled_from([0.0, 0.3]), spread=st.sampled_from([0.05, 1.0]))
def test_clips_equal_their_slow_references(block: Any, slow: Any, seed: int, gaps: float, spread: float) -> None:
    """Only from the signals that a policy sees, the threshold in absolute terms is that of a loop over the norms."""
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(0, spread, 40) - 0.02 * np.arange(40))
    norms = [float(norm) if n == 0 or rng.random() >= gaps else math.nan for n, norm in enumerate(norms)]
    levels, averages = norms_as_seen(norms)
    player, seen = Player(block), []
    for norm, level, average in zip(norms, levels, averages, strict=True):
        factor = player.step(grad_level=float(level))
        if math.isfinite(norm):
            seen.append(norm / norms[0])
        if len(seen) < block.warmup:
            assert factor == 1
            continue
        wanted = slow(seen, block) * norms[0] / average / 10
        assert factor == pytest.approx(np.clip(wanted, 0.03, 1), rel=2e-3)


def test_clips_do_nothing_before_they_have_seen_anything() -> None:
    for block in (AutoClip(warmup=1), ZClip(warmup=1), SigmaClip(warmup=1)):
        player = Player(block)
        assert [player.step(started=0, grad_level=0.0) for _ in range(5)] == [1] * 5


def test_by_size() -> None:
    def at(block: Block, parameters: float) -> float:
        return Player(block).step(log_parameters=math.log10(parameters) / 10)

    assert [round(at(ScaledClip(), 10.0**n), 3) for n in (3, 4, 8, 12)] == [1, 1, 0.1, 0.1]
    assert [round(at(ScaledDecay(), 10.0**n), 3) for n in (4, 8, 12)] == [1, 10, 10]
    assert at(ScaledDecay(), 100) == pytest.approx(0.01**0.25)
    assert Player(ScaledDecay()).step() == 1  # of a size that is not known


# --- pacing -----------------------------------------------------------------------------------------------------


def test_schedule_equals_the_rule() -> None:
    for options in ({"schedule": "cosine", "floor": 0.1}, {"schedule": "step"}, {"schedule": "wsd"}):
        name = options["schedule"]
        rule = load_policy(name, **{k: v for k, v in options.items() if k != "schedule"})
        progress = (np.arange(101) / 100).astype(np.float32)
        wanted = rule.act(np.stack([progress, np.ones_like(progress)], 1), {})[0][:, 0]
        player = Player(Schedule(**options), runs=101)  # type: ignore[arg-type]
        player.step(progress=progress.astype(float), progress_available=1)
        np.testing.assert_array_equal(player.outcomes["schedule"].contribution, wanted)


def test_scale_schedule_is_the_deeper_the_larger() -> None:
    sizes = np.array([10.0, 1e4, 1e6, 1e8, 1e12])
    player = Player(ScaleSchedule(), runs=5)
    for progress in (0.0, 0.5, 1.0):
        player.step(progress=progress, progress_available=1, log_parameters=np.log10(sizes) / 10)
        factors = player.outcomes["scale-schedule"].contribution
        assert (np.diff(factors) <= 0).all()
        assert factors[:2].tolist() == [1, 1]
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2
        assert factors[3:] == pytest.approx([cosine, cosine**2])
    player.step(progress=0.5, progress_available=0, log_parameters=0.6)
    assert player.of("scale-schedule") == 1


def level(log_ratio: float) -> float:
    return float(np.float32(squash(np.array(log_ratio), LEVEL_SCALE)))


def slow_plateau(losses: list[float], shares: list[float], block: PlateauNudge) -> list[float]:
    factor, seen, factors = 1.0, [], []
    for loss, share in zip(losses, shares, strict=True):
        seen.append(loss)
        old, new = seen[-2 * block.window : -block.window], seen[-block.window :]
        if len(old) == block.window and abs(median(new) - median(old)) < block.threshold:
            factor *= block.down if share >= block.noise else block.up
            factor, seen = min(max(factor, block.low), block.high), []
        factors.append(factor)
    return factors


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), window=st.integers(1, 5), threshold=st.sampled_from([0.003, 0.03]))
def test_plateau_nudge_equals_the_loop(seed: int, window: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    losses = np.minimum(np.arange(60), rng.integers(5, 50)) * -0.03 + rng.normal(0, rng.choice([0.001, 0.02]), 60)
    shares = rng.uniform(0, 1, 60)
    block, signals = PlateauNudge(window=window, threshold=threshold, low=0.3, high=3.0), [level(x) for x in losses]
    player = Player(block)
    ours = [
        player.step(val_available=1, val_level=signal, loss_level=rng.uniform(), grad_variance=2 * share - 1)
        for signal, share in zip(signals, shares, strict=True)
    ]
    read = [float(2 * np.arctanh(signal)) for signal in signals]
    assert ours == pytest.approx(slow_plateau(read, shares.tolist(), block))


def test_a_spike_and_its_recovery_are_no_plateau() -> None:
    """Torch compares with the best ever, so it cuts the rate of a run that is recovering as fast as it can."""
    falling = [-0.05 * n for n in range(20)]
    recovering = [0.6 - 0.08 * n for n in range(18)]
    player = Player(PlateauNudge())
    ours = [player.step(val_available=1, val_level=level(x), grad_variance=1) for x in (*falling, *recovering)]
    assert set(ours) == {1.0}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = ReduceLROnPlateau(optimizer, patience=10)
    for x in (*falling, *recovering):
        torchs.step(math.exp(x))
    assert optimizer.param_groups[0]["lr"] < 1


def test_plateau_waits_for_new_validation_losses_and_begins_afresh_with_them() -> None:
    player = Player(PlateauNudge(window=2))
    same = [player.step(val_available=1, val_level=0.25, loss_level=-0.01 * n) for n in range(30)]
    assert set(same) == {1.0}
    player = Player(PlateauNudge(window=2))
    assert [player.step(loss_level=0.5, grad_variance=-1) for _ in range(4)] == [1, 1, 1, 1.4]
    for _ in range(3):
        player.step(loss_level=0.5)
    assert player.step(val_available=1, val_level=0.5) == 1.4  # not the fourth of its kind but the first


def test_deceleration() -> None:
    fast, slow = float(np.tanh(-0.5 / 0.3)), 0.0
    player = Player(Deceleration(span=4))
    assert [player.step(loss_slope=fast) for _ in range(6)][:4] == [0.8] * 4
    later = [player.step(loss_slope=fast) for _ in range(20)]
    assert later[-1] == 1 and (np.diff(later) >= 0).all()
    player = Player(Deceleration())
    assert player.step(loss_slope=slow) == player.step(loss_slope=-fast) == 1


# --- stability --------------------------------------------------------------------------------------------------


def test_variance_care_answers_a_rise_and_not_a_level() -> None:
    for steady in (-1.0, 0.0, 1.0):
        player = Player(VarianceCare())
        assert {player.step(grad_variance=steady) for _ in range(20)} == {1.0}
    player.step(grad_variance=-1.0)
    player = Player(VarianceCare(threshold=0.1, factor=0.8, low=0.5))
    for _ in range(5):
        player.step(grad_variance=-0.6)
    assert [player.step(grad_variance=0.6) for _ in range(4)] == pytest.approx([0.8, 0.64, 0.512, 0.5])
    after = [player.step(grad_variance=-0.6) for _ in range(40)]
    assert after[-1] == 1 and (np.diff(after) >= 0).all()


def test_staged_has_patience_and_hysteresis() -> None:
    block = Staged(drift=0.1, patience=3, calm=4, stages=2)
    high, between, low = (float(np.tanh(x / 0.3)) for x in (0.15, 0.07, 0.0))
    player = Player(block)

    def play(drift: float, times: int) -> list[float]:
        return [player.step(val_available=1, val_drift=drift) for _ in range(times)]

    assert play(high, 7) == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert play(between, 20) == [0.25] * 20
    assert play(low, 9) == [0.25] * 3 + [0.5] * 4 + [1, 1]
    player = Player(block)
    assert [player.step(grad_trend=float(np.tanh(1.5))) for _ in range(3)] == [1, 1, 0.5]
    player = Player(block)
    assert {player.step(val_available=0, val_drift=high) for _ in range(9)} == {1.0}


def test_hypergradient_follows_the_sign() -> None:
    player = Player(Hypergradient(rate=0.1, band=0.05, low=0.5, high=1.5))
    assert player.step(grad_cosine=0.04) == 1
    assert player.step(grad_cosine=0.06) == pytest.approx(math.exp(0.1))
    assert player.step(grad_cosine=-0.9) == pytest.approx(1)
    assert [player.step(grad_cosine=0.5) for _ in range(10)][-1] == 1.5
    assert [player.step(grad_cosine=-0.5) for _ in range(20)][-1] == 0.5


@pytest.mark.parametrize("adaptive", [0, 1])
def test_edge_cap_settles_below_its_share(adaptive: int) -> None:
    """Closed loop: what is measured is the share at the block's own factor; it starts at four times the edge."""
    player, factor, shares = Player(EdgeCap(share=0.5)), 1.0, []
    rng = np.random.default_rng(0)
    for _ in range(30):
        share = 4.0 * factor * math.exp(rng.normal(0, 1e-3))
        shares.append(share)
        margin, overshoot = np.tanh(-math.log2(share) / 8), np.tanh(1 + math.log10(share))
        factor = player.step(
            curvature_available=1, adaptive=adaptive, stability_margin=float(margin), overshoot=float(overshoot)
        )
    assert shares[0] > 3 and all(share == pytest.approx(0.5, rel=0.02) for share in shares[5:])
    held = [player.step(curvature_available=0, stability_margin=-0.9, overshoot=0.9) for _ in range(3)]
    assert set(held) == {factor}


def test_edge_cap_believes_a_measurement_once() -> None:
    player = Player(EdgeCap(share=0.5))
    first = player.step(curvature_available=1, adaptive=1, overshoot=0.9)
    assert first < 1
    assert {player.step(curvature_available=1, adaptive=1, overshoot=0.9) for _ in range(5)} == {first}


def test_saturation_momentum_is_momentary() -> None:
    player = Player(SaturationMomentum(span=4, factor=2))
    assert {player.step(activations_available=1, saturation=0.3) for _ in range(5)} == {1.0}
    answer = [player.step(activations_available=1, saturation=0.6) for _ in range(6)]
    assert answer == pytest.approx([2, 2**0.75, 2**0.5, 2**0.25, 1, 1])
    assert player.step(activations_available=0, saturation=0) == 1


# --- shocks -----------------------------------------------------------------------------------------------------


def spike(z: float) -> float:
    return float(np.tanh(z / 4))


def test_conservatism_lasts_until_the_loss_is_back() -> None:
    player = Player(SpikeCare(), Conservatism(patience=50))
    player.step(loss_level=level(-1.0))
    player.step(spike=spike(9), loss_level=level(0.0))
    assert player.of("conservatism") == 0.5
    assert player.outcomes["spike-care"].acted == [True]
    for _ in range(6):
        player.step(loss_level=level(-0.5))
    assert player.of("conservatism") == 0.5
    player.step(spike=spike(9), loss_level=level(-0.5))
    assert player.of("conservatism") == 0.25
    back = []
    for _ in range(30):
        player.step(loss_level=level(-1.0))
        back.append(player.of("conservatism"))
    assert back[0] > 0.25 and back[-1] == 1 and (np.diff(back) >= 0).all()


def test_conservatism_loses_patience() -> None:
    player = Player(SpikeCare(), Conservatism(patience=3))
    player.step(loss_level=level(-1.0))
    player.step(spike=spike(9))
    held = []
    for _ in range(5):
        player.step(loss_level=level(0.5))
        held.append(player.of("conservatism"))
    assert held[:3] == [0.5] * 3 and held[4] > held[3] > 0.5


def test_spike_care_leaves_what_is_no_spike_and_what_the_guard_undid() -> None:
    player = Player(SpikeCare(z=6), Conservatism())
    for z in (0.0, 3.0, 5.9, -9.0):
        player.step(spike=spike(z))
        assert player.of("conservatism") == 1
    player.step(rolled_back=1)
    assert player.of("conservatism") == 1 and player.shared["since_shock"] == [0]


def test_palm_rewinds_once_and_then_waits() -> None:
    player = Player(PalmRewind(cooldown=3, rise=0.3))
    high = float(np.tanh(2))
    assert not player.step(spike=spike(9), loss_above_best=0.1)  # a single bad batch, which the average does not show
    assert not player.step(spike=spike(9), loss_above_best=high, rolled_back=1)
    assert [bool(player.step(spike=spike(9), loss_above_best=high)) for _ in range(7)] == [1, 0, 0, 1, 0, 0, 1]
    assert player.shared["since_shock"] == [0]


def test_opt_restarts_at_a_lower_rate_each_time() -> None:
    player = Player(OptRestart(rise=0.5, patience=2, cooldown=2, most=2), RestartRate(factor=0.5))
    high, fired, rates = float(np.tanh(0.6 / 0.3)), [], []
    for _ in range(12):
        fired.append(bool(player.step(loss_above_best=high)))
        rates.append(player.of("restart-rate"))
    assert fired == [False, True, False, True] + [False] * 8
    assert rates == [1, 0.5, 0.5] + [0.25] * 9
    player.step(loss_above_best=0)
    assert player.of("restart-rate") == 0.25


def test_moments_are_reset_at_an_interval_and_on_spikes() -> None:
    player = Player(MomentReset(every=4, cooldown=2), WarmReturn(span=3))
    fired, rates = [], []
    for decision in range(1, 11):
        fired.append(bool(player.step(grad_trend=0.9 if decision in (5, 6) else 0.0)))
        rates.append(player.of("warm-return"))
    assert [n for n, yes in enumerate(fired, 1) if yes] == [4, 6, 10]
    warm = [(1 - math.cos(math.pi * n / 4)) / 2 for n in (1, 2, 3, 4)]
    assert rates[:3] == [1, 1, 1]
    assert rates[5:9] == pytest.approx(warm)


# --- shifts -----------------------------------------------------------------------------------------------------


def test_a_lasting_shift_is_answered_for_a_while() -> None:
    player = Player(
        Explore(span=4, factor=2, cooldown=8), Rebalance(span=4, factor=3, cooldown=8), ExploreMomentum(span=4)
    )
    assert player.step(persistence=0.3) == 1
    player.shared["conservatism"] = np.array([0.25])
    rates, decays, momenta = [], [], []
    for _ in range(10):
        rates.append(player.step(persistence=0.6))
        decays.append(player.of("rebalance"))
        momenta.append(player.of("explore-momentum"))
    share = np.array([4, 3, 2, 1, 0, 0, 0, 0, 4, 3]) / 4
    assert rates == pytest.approx(2**share)
    assert decays == pytest.approx(3**share)
    assert momenta == pytest.approx(1.5**share)
    assert player.shared["conservatism"] == [1]


def test_one_answer_can_begin_without_the_other() -> None:
    player = Player(Rebalance(factor=0.5, span=2))
    assert [player.step(persistence=0.9) for _ in range(3)] == pytest.approx([0.5, 0.5**0.5, 1])


def test_anchor_comes_with_the_boundary() -> None:
    player = Player(Anchor(score=0.5, cooldown=3))
    scores = [0.4, 0.6, 0.9, 0.7, 0.5, 0.0]
    assert [bool(player.step(shift=score)) for score in scores] == [False, True, False, False, True, False]
    assert not Player(Anchor()).step(started=0, shift=1.0)


def test_without_a_start_nothing_happens() -> None:
    everything: Fields = {}
    for name, kind in BLOCKS.items():
        if "started" not in kind.signals:
            continue
        extreme = {signal: 0.99 for signal in kind.signals if signal != "started" and not signal.endswith("available")}
        everything[name] = np.array(Player(kind()).step(started=0, **extreme))
    assert len(everything) > 15
    assert {name: float(value) for name, value in everything.items() if value not in (0, 1)} == {}


def test_the_shared_state_has_its_rows_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")
    for name, one in SHARED.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` | {one.doc} |")]
        _, _, _, setters, followers, _ = line.split("|")
        assert set(re.findall(r"`(.*?)`", setters)) == {block.name for block in BLOCKS.values() if name in block.writes}
        needing = {block.name for block in BLOCKS.values() if name in block.follows}
        assert needing <= set(re.findall(r"`(.*?)`", followers))
