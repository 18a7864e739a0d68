"""Placements to be compared: those that rankings choose and simple ones, as patterns, under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hybridvl.ablation.placement.hybrids import Placement
from hybridvl.ablation.placement.ranking import Ranking
from hybridvl.layers.errors import ConfigError
from hybridvl.models.config import ModelConfig
from hybridvl.pattern import Pattern
from hybridvl.pattern.core import Mixers
from hybridvl.plan.costs import Plan, plan_model


@dataclass(frozen=True)
class Layers:
    """What stands where in a hybrid.

    Attributes:
        linear: every layer as it is without attention, as patterns write it.
        attention: the layer that is kept.
        chosen: the layers among which those that keep attention are chosen.
        mixers: named mixers and overrides.
    """

    linear: tuple[str, ...]
    attention: str
    chosen: tuple[int, ...]
    mixers: Mixers | None = None

    def pattern(self, placement: Placement) -> str:
        """The pattern of a placement, in its shortest form."""
        texts = [self.attention if layer in placement else text for layer, text in enumerate(self.linear)]
        return str(Pattern.from_layers(texts, self.mixers))


@dataclass(frozen=True)
class Budget:
    """What a hybrid may cost.

    Attributes:
        state_bytes: of one row's state after `context` tokens; None: any.
        params: parameters; None: any.
        context: tokens.
        dtype: of the model.
    """

    state_bytes: int | None
    params: int | None
    context: int
    dtype: torch.dtype

    def plan(self, model: ModelConfig) -> Plan:
        """What a model costs."""
        return plan_model(model, (self.context,), self.dtype)

    def allows(self, plan: Plan) -> bool:
        """Whether that is within the budget."""
        used = {"state_bytes": plan.state_bytes(self.context), "params": plan.total_params}
        limits = {"state_bytes": self.state_bytes, "params": self.params}
        return all(limit is None or used[name] <= limit for name, limit in limits.items())


def kept_within(plans: Sequence[Plan], budget: Budget) -> int:
    """The most layers that may keep attention; plans[n] is what a hybrid with n of them costs.

    Raises:
        ConfigError: not even one may, or all may: then there is nothing to be placed. Or attention costs no more than
            what takes its place, so that a budget does not bound it.
    """
    ends = _cost(plans[0], budget), _cost(plans[-1], budget)
    if ends[1] <= ends[0]:
        what = _costs(budget).format(*ends)
        raise ConfigError(f"attention costs no more than what takes its place ({what}); expected --keep instead")
    fitting = [count for count, plan in enumerate(plans) if budget.allows(plan)]
    most = max(fitting, default=0)
    if 0 < most < len(plans) - 1:
        return most
    what = "no layer can" if most == 0 else "every layer can"
    some = _costs(budget).format(*(_cost(plans[count], budget) for count in (1, len(plans) - 2)))
    raise ConfigError(f"{what} keep attention; expected a budget for some of them: {some}")


def simple_placements(layers: Sequence[int], count: int) -> dict[str, Placement]:
    """Where one would put them without looking: first or last of equal blocks, lowest, highest."""
    total = len(layers)
    blocks = [index * total // count for index in range(count + 1)]
    return {
        "uniform": frozenset(layers[start] for start in blocks[:-1]),
        "uniform-last": frozenset(layers[stop - 1] for stop in blocks[1:]),
        "bottom": frozenset(layers[:count]),
        "top": frozenset(layers[total - count :]),
    }


def candidates(
    rankings: Sequence[Ranking], layers: Sequence[int], count: int, also: Mapping[str, Placement]
) -> dict[Placement, list[str]]:
    """Every placement that is to be compared, with the names of all who propose it."""
    proposed = {ranking.name: ranking.chosen(count) for ranking in rankings}
    found: dict[Placement, list[str]] = {}
    for name, placement in (*proposed.items(), *simple_placements(layers, count).items(), *also.items()):
        found.setdefault(placement, []).append(name)
    return found


def placement_of(pattern: Pattern, layers: Layers, count: int) -> Placement:
    """The layers that keep attention in a pattern; ConfigError unless it is one of those that can be chosen."""
    kept = frozenset(layer for layer, text in enumerate(pattern.layers) if text == layers.attention)
    if len(pattern) != len(layers.linear) or layers.pattern(kept) != str(pattern) or not kept <= set(layers.chosen):
        raise ConfigError(
            f"{str(pattern)!r}; expected {len(layers.linear)} layers of {layers.attention} and "
            f"{', '.join(dict.fromkeys(layers.linear))}"
        )
    if len(kept) != count:
        raise ConfigError(f"{str(pattern)!r} keeps attention in {len(kept)} layers; expected {count}")
    return kept


def _cost(plan: Plan, budget: Budget) -> int:
    return plan.total_params if budget.state_bytes is None else plan.state_bytes(budget.context)


def _costs(budget: Budget) -> str:
    return "{:,} to {:,} " + ("parameters" if budget.state_bytes is None else "bytes of state")
