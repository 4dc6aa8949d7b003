"""Rules that are made of blocks: single ones after their papers, and composites from careful to everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from trimtab.policies.rules.blocks import BLOCKS
from trimtab.policies.rules.clip_blocks import AutoClip, SigmaClip, ZClip
from trimtab.policies.rules.composite import Composite, several, single
from trimtab.policies.rules.rate_blocks import PlateauNudge
from trimtab.policies.rules.shift_blocks import Anchor
from trimtab.policies.rules.shock_blocks import MomentReset, OptRestart, PalmRewind, RestartRate, WarmReturn
from trimtab.policies.rules.stability_blocks import Hypergradient

STEADY = ("spike-care", "conservatism", "zclip")
CAREFUL = (*STEADY, "staged", "deceleration")
RECOVERING = (*STEADY, "palm-rewind")
RESPONSIVE = (*STEADY, "plateau-nudge", "hypergradient")
SHIFTING = (*STEADY, "explore", "explore-momentum", "anchor")
# One block for clipping from history, and no schedule: a run has its own.
FULL = tuple(name for name in BLOCKS if name not in ("schedule", "autoclip", "sigma-clip"))


def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in BLOCKS if name in names)


SINGLE: Mapping[str, tuple[Callable[..., Composite], str, str]] = MappingProxyType(
    {
        kind.name: (single(kind, *partners), kind.doc, kind.source)
        for kind, *partners in (
            (PlateauNudge,),
            (Hypergradient,),
            (AutoClip,),
            (ZClip,),
            (SigmaClip,),
            (PalmRewind,),
            (OptRestart, RestartRate),
            (MomentReset, WarmReturn),
            (Anchor,),
        )
    }
)

COMPOSITES: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        "steady": (_in_order(STEADY), "the careful one: a clip from history, and smaller steps after a spike"),
        "careful": (_in_order(CAREFUL), "steady, and smaller steps on drift and on a fast start"),
        "recovering": (_in_order(RECOVERING), "steady, and rewinding before a spike"),
        "responsive": (_in_order(RESPONSIVE), "steady, and nudges of the rate on plateaus and by hypergradient"),
        "shifting": (_in_order(SHIFTING), "steady, and answers to a lasting shift, with an anchor"),
        "full": (_in_order(FULL), "every block but the schedules and all but one clip from history"),
    }
)


def composite_factory(name: str) -> Callable[..., Composite]:
    """The factory of one of ``COMPOSITES``."""
    blocks, doc = COMPOSITES[name]
    return several(name, doc, blocks)
