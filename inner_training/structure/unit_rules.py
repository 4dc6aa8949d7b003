"""Rules that say which units are due to begin anew: pure functions of a memory and of what units did at one step.

A memory is a dict of tensors with any leading axes of runs; a step is one observation. Time is counted in steps of each run,
so runs may begin at different times. Settings are tensors of the runs' shape, or of none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.inner_training.streams import draw_words
from trimtab.inner_training.structure.arithmetic import live_mean, ratio
from trimtab.inner_training.structure.evidence import Evidence

Memory = dict[str, Tensor]
Settings = Mapping[str, Tensor]
STREAM = 0x5EED  # of a run's random words, apart from those that its seed gives elsewhere
POINT = 40  # binary places of the credit for replacements: whole numbers add up without rounding, on every device


class UnitRule:
    """What all rules have: the memory's ``steps`` (...), ``age``, ``alive`` and ``due`` (..., U) are kept by ``Resetter``.

    Attributes:
        needs: fields of ``Evidence`` that ``judge`` reads beside ``alive``.
        sees_outputs: whether it reads what units put out.
    """

    needs: frozenset[str] = frozenset()
    sees_outputs = False

    def prepare(self, settings: Settings, device: torch.device) -> dict[str, Tensor]:
        """Settings, given in int64 or float64 on the CPU, as ``judge`` reads them.

        Raises:
            UserError: two settings do not go together.
        """
        return {
            name: value.to(device) if value.dtype == torch.int64 else value.float().to(device)
            for name, value in settings.items()
        }

    def begin(self, shape: tuple[int, ...], positions: int, settings: Settings) -> Memory:
        """What the rule itself remembers at the start.

        Args:
            shape: (..., U).
            positions: K, see ``Resetter``.
            settings: as prepared.
        """
        del shape, positions, settings
        return {}

    def looks(self, steps: Tensor, settings: Settings) -> bool:
        """Whether the next step of any run matters, of which ``steps`` (...) have been made."""
        del steps, settings
        return bool(self.needs) or self.sees_outputs

    def judge(self, memory: Memory, evidence: Evidence, outputs: Sequence[Tensor], settings: Settings) -> Memory:
        """What changes in the memory at a step, ``due`` included.

        Args:
            memory: with the step counted already.
            evidence: of ``needs`` where the rule looks.
            outputs: (..., P, U, k) each, see ``Resetter.observe``.
            settings: as prepared.
        """
        del memory, evidence, outputs, settings
        return {}

    def forget(self, memory: Memory, units: Tensor, settings: Settings) -> Memory:
        """What changes in the memory when units (..., U) begin anew; ``due`` still says which of them were due."""
        del memory, units, settings
        return {}

    def means(self, memory: Memory, settings: Settings) -> Tensor | None:
        """(..., U, K) what each unit gave on average, where the rule knows it."""
        del memory, settings
        return None


class Dormant(UnitRule):
    """Units whose share of the layer's mean is low, over the last steps before each check."""

    def __init__(self, field: str, spares_silence: bool) -> None:
        """Makes the rule.

        Args:
            field: of the evidence, (..., U), >= 0.
            spares_silence: whether nothing is due in a layer where the field is 0 everywhere. No gradient at all may mean
                that there is nothing left to learn; no output at all means that the layer is dead.
        """
        self.needs, self._field, self._spares = frozenset((field,)), field, spares_silence

    def prepare(self, settings: Settings, device: torch.device) -> dict[str, Tensor]:
        """As ``UnitRule.prepare`` says."""
        if bool((settings["window"] > settings["every"]).any()):
            raise UserError(
                f"window is {int(settings['window'].max())}, more than the steps between checks (every); make it smaller"
            )
        return super().prepare(settings, device)

    def begin(self, shape: tuple[int, ...], positions: int, settings: Settings) -> Memory:
        """As ``UnitRule.begin`` says."""
        return {"total": torch.zeros(shape, device=settings["every"].device)}

    def looks(self, steps: Tensor, settings: Settings) -> bool:
        """As ``UnitRule.looks`` says."""
        return bool((steps % settings["every"] >= settings["every"] - settings["window"]).any())

    def judge(self, memory: Memory, evidence: Evidence, outputs: Sequence[Tensor], settings: Settings) -> Memory:
        """As ``UnitRule.judge`` says."""
        every, window = settings["every"], settings["window"]
        steps, live = memory["steps"], memory["alive"]
        phase = (steps - 1) % every
        inside, check = phase >= every - window, phase == every - 1
        if not bool(inside.any()):
            return {"due": torch.zeros_like(live)}
        values = evidence.read(self._field)
        total = torch.where((phase == every - window)[..., None], 0.0, memory["total"])
        total = torch.where(inside[..., None], total + values, total)
        known = live & (memory["age"] >= window[..., None])
        mean = live_mean(total, known)
        due = check[..., None] & known & (ratio(total, mean) <= settings["threshold"][..., None])
        return {"total": total, "due": due & (mean > 0) if self._spares else due}


class Replacement(UnitRule):
    """A fixed share of the mature units at each step, those of the lowest utility.

    Each mature unit earns its run a credit of ``rate`` per step; a credit of one takes one unit. The best mature unit
    always stays.
    """

    def prepare(self, settings: Settings, device: torch.device) -> dict[str, Tensor]:
        """As ``UnitRule.prepare`` says."""
        rest = {name: value for name, value in settings.items() if name != "rate"}
        credit = (settings["rate"] * 2**POINT).ceil().to(torch.int64)
        return {"rate": credit.to(device), **super().prepare(rest, device)}

    def begin(self, shape: tuple[int, ...], positions: int, settings: Settings) -> Memory:
        """As ``UnitRule.begin`` says."""
        return {"credit": torch.zeros(shape[:-1], dtype=torch.int64, device=settings["rate"].device)}

    def utility(self, memory: Memory, evidence: Evidence, outputs: Sequence[Tensor], settings: Settings) -> Memory:
        """``utility`` (..., U) and what else changes: here, random numbers that depend on run, step and unit."""
        del evidence, outputs, settings
        seed, units = memory["seed"][..., None], memory["age"].shape[-1]
        place = memory["steps"][..., None] * units + torch.arange(units, device=seed.device)
        words = draw_words(draw_words(seed, STREAM + (place >> 31)) >> 1, place & 0x7FFFFFFF)
        return {"utility": (words >> 8).float()}

    def judge(self, memory: Memory, evidence: Evidence, outputs: Sequence[Tensor], settings: Settings) -> Memory:
        """As ``UnitRule.judge`` says."""
        changed = self.utility(memory, evidence, outputs, settings)
        utility = changed.pop("utility")
        mature = memory["alive"] & (memory["age"] > settings["maturity"][..., None])
        count = mature.sum(-1)
        credit = memory["credit"] + settings["rate"] * count
        taken = torch.minimum(credit >> POINT, (count - 1).clamp(min=0))
        order = torch.where(mature, utility, torch.inf).argsort(dim=-1, stable=True)
        due = mature & (order.argsort(dim=-1) < taken[..., None])
        return {**changed, "credit": credit, "due": due}

    def forget(self, memory: Memory, units: Tensor, settings: Settings) -> Memory:
        """As ``UnitRule.forget`` says."""
        spent = (units & memory["due"]).sum(-1)
        return {"credit": memory["credit"] - (spent << POINT)}


class Contribution(Replacement):
    """Continual backprop: the utility is how far outputs stray from their mean, times the columns over the row.

    Running averages are corrected for their start, so that a unit that has just matured is not taken for a useless one.
    """

    needs = frozenset(("weights_in", "weights_out"))
    sees_outputs = True

    def prepare(self, settings: Settings, device: torch.device) -> dict[str, Tensor]:
        """As ``UnitRule.prepare`` says."""
        decay = settings["decay"].clamp(min=1e-30)
        exact = {"share": (1 - decay).float().to(device), "log": decay.log().float().to(device)}
        return {**super().prepare(settings, device), **exact}

    def begin(self, shape: tuple[int, ...], positions: int, settings: Settings) -> Memory:
        """As ``UnitRule.begin`` says."""
        device = settings["rate"].device
        averages = {"worth": torch.zeros(shape, device=device), "mean": torch.zeros((*shape, positions), device=device)}
        return {**super().begin(shape, positions, settings), **averages}

    def utility(self, memory: Memory, evidence: Evidence, outputs: Sequence[Tensor], settings: Settings) -> Memory:
        """``utility`` (..., U) and the running averages."""
        share = settings["share"][..., None]
        live = memory["alive"]
        now = torch.cat([one.mean(-3) for one in outputs], -1)
        mean = memory["mean"] + share[..., None] * (now - memory["mean"])
        mean = torch.where(live[..., None], mean, 0.0)
        centres = torch.split(self.means({**memory, "mean": mean}, settings), [one.shape[-1] for one in outputs], -1)
        strays = [(one - at[..., None, :, :]).abs().mean(-3) for one, at in zip(outputs, centres, strict=True)]
        leaving = evidence.read("weights_out").abs().mean(-1)
        found = ratio(torch.cat(strays, -1).mean(-1) * leaving, evidence.read("weights_in").abs().mean(-1))
        worth = torch.where(live, memory["worth"] + share * (found - memory["worth"]), 0.0)
        return {"worth": worth, "mean": mean, "utility": ratio(worth, self._seen(memory, settings))}

    def means(self, memory: Memory, settings: Settings) -> Tensor:
        """As ``UnitRule.means`` says."""
        return ratio(memory["mean"], self._seen(memory, settings)[..., None])

    def _seen(self, memory: Memory, settings: Settings) -> Tensor:
        """(..., U) 1 - decay^age: the share of a running average that is no longer its start."""
        return -torch.expm1(memory["age"] * settings["log"][..., None])

    def forget(self, memory: Memory, units: Tensor, settings: Settings) -> Memory:
        """As ``UnitRule.forget`` says."""
        return {
            **super().forget(memory, units, settings),
            "worth": torch.where(units, 0.0, memory["worth"]),
            "mean": torch.where(units[..., None], 0.0, memory["mean"]),
        }


class SelfNormalised(UnitRule):
    """Units that have been silent for longer than they ever are, each by its own record of silences.

    A unit fires at a step when any of its outputs is above 0. Lengths of silences of at least one step are counted; where
    the chosen percentile of them is known, the threshold is one step more than it, else it grows by a factor.
    """

    sees_outputs = True

    def prepare(self, settings: Settings, device: torch.device) -> dict[str, Tensor]:
        """As ``UnitRule.prepare`` says."""
        if bool((settings["first"] > settings["longest"]).any()):
            raise UserError(
                f"first is {int(settings['first'].max())}, more than the longest silence that is counted (longest); "
                "make it smaller"
            )
        return super().prepare(settings, device)

    def begin(self, shape: tuple[int, ...], positions: int, settings: Settings) -> Memory:
        """As ``UnitRule.begin`` says."""
        device, length = settings["longest"].device, int(settings["longest"].max()) + 1
        return {
            "silent": torch.zeros(shape, dtype=torch.int64, device=device),
            "threshold": settings["first"][..., None].expand(shape).clone(),
            "silences": torch.zeros((*shape, length), dtype=torch.int32, device=device),
        }

    def judge(self, memory: Memory, evidence: Evidence, outputs: Sequence[Tensor], settings: Settings) -> Memory:
        """As ``UnitRule.judge`` says."""
        live = memory["alive"]
        memory = {**memory, **self._renewed_thresholds(memory, settings)}
        fired = torch.stack([(one > 0).any(-1).any(-2) for one in outputs]).any(0)
        silences = _counted(memory["silences"], memory["silent"], live & fired & (memory["silent"] > 0))
        silent = torch.where(live & ~fired, memory["silent"] + 1, 0)
        threshold = memory["threshold"]
        return {"silences": silences, "silent": silent, "threshold": threshold, "due": live & (silent >= threshold)}

    def _renewed_thresholds(self, memory: Memory, settings: Settings) -> Memory:
        before = memory["steps"] - 1
        when = (before > 0) & (before % settings["window"] == 0)
        if not bool(when.any()):
            return {}
        total = memory["silences"].sum(-1)
        up_to = memory["silences"].cumsum(-1)
        wanted = settings["percentile"][..., None] * total
        place = (up_to < wanted[..., None]).sum(-1)
        old, longest = memory["threshold"], settings["longest"][..., None]
        wider = torch.minimum((old * settings["factor"][..., None]).ceil().to(old.dtype), longest)
        new = torch.where(place < old, place + 1, wider)
        new = torch.where(when[..., None] & (total > 0), new, old)
        return {"threshold": new, "silences": torch.where(when[..., None, None], 0, memory["silences"])}

    def forget(self, memory: Memory, units: Tensor, settings: Settings) -> Memory:
        """As ``UnitRule.forget`` says."""
        due = units & memory["due"]
        silences = _counted(memory["silences"], memory["silent"], due)
        others = units & ~due  # born or reset by somebody else: nothing is known of them
        first = settings["first"][..., None].expand_as(memory["threshold"])
        return {
            "silent": torch.where(units, 0, memory["silent"]),
            "silences": torch.where(others[..., None], 0, silences),
            "threshold": torch.where(others, first, memory["threshold"]),
        }


def _counted(counts: Tensor, lengths: Tensor, where: Tensor) -> Tensor:
    """Counts (..., U, L + 1) with one more at each length (..., U), where it is said so; longer ones count as L."""
    place = lengths.clamp(max=counts.shape[-1] - 1)[..., None]
    return counts.scatter_add(-1, place, where[..., None].to(counts.dtype))
