"""The table of blocks, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from trimtab.errors import unknown
from trimtab.policies.rules import clip_blocks, rate_blocks, shift_blocks, shock_blocks, stability_blocks
from trimtab.policies.rules.block import Block

# In the order in which blocks of a composite take their turns: those that set the shared state before those that follow it.
_ORDER: tuple[type[Block], ...] = (
    rate_blocks.Schedule,
    rate_blocks.ScaleSchedule,
    rate_blocks.PlateauNudge,
    rate_blocks.Deceleration,
    stability_blocks.VarianceCare,
    stability_blocks.Staged,
    stability_blocks.Hypergradient,
    stability_blocks.EdgeCap,
    shock_blocks.SpikeCare,
    shock_blocks.PalmRewind,
    shock_blocks.OptRestart,
    shock_blocks.MomentReset,
    shift_blocks.Explore,
    shift_blocks.Rebalance,
    shift_blocks.Anchor,
    shock_blocks.Conservatism,
    shock_blocks.RestartRate,
    shock_blocks.WarmReturn,
    stability_blocks.SaturationMomentum,
    shift_blocks.ExploreMomentum,
    clip_blocks.ScaledDecay,
    clip_blocks.ScaledClip,
    clip_blocks.AutoClip,
    clip_blocks.ZClip,
    clip_blocks.SigmaClip,
)

BLOCKS: Mapping[str, type[Block]] = MappingProxyType({block.name: block for block in _ORDER})


def make_blocks(given: Iterable[str | Block]) -> tuple[Block, ...]:
    """Blocks by name, with their defaults, or as they are; ``UnknownNameError`` names the nearest match.

    >>> [block.name for block in make_blocks(["autoclip", "schedule"])]
    ['autoclip', 'schedule']
    """
    made = []
    for one in given:
        if isinstance(one, str) and one not in BLOCKS:
            raise unknown("block", one, BLOCKS)
        made.append(BLOCKS[one]() if isinstance(one, str) else one)
    return tuple(made)
