"""What a search for placements comes to: candidates measured on samples that no ranking has seen, and the best one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hybridvl.ablation.placement.candidates import Layers
from hybridvl.ablation.placement.hybrids import Placement
from hybridvl.ablation.placement.measures import Measures
from hybridvl.ablation.placement.ranking import LINEAR, Ranking, best_first
from hybridvl.ablation.report.wording import without_nan
from hybridvl.ablation.statistics import Interval, holm, mean_interval, paired_difference
from hybridvl.plan.costs import Plan


@dataclass(frozen=True)
class Candidate:
    """A placement as it was measured.

    Attributes:
        pattern: in its shortest form.
        names: who proposed it.
        kept: the layers that keep attention.
        score: the metric, with an interval over samples.
        behind: how much worse it is than the best one, sample by sample; that of the best one is NaN.
        p: two-sided, of the paired t test of that, corrected by Holm over all candidates; NaN for the best one.
        params, state_bytes: what it costs.
    """

    pattern: str
    names: tuple[str, ...]
    kept: tuple[int, ...]
    score: Interval
    behind: Interval
    p: float
    params: int
    state_bytes: int


@dataclass(frozen=True)
class Outcome:
    """A search for placements.

    Attributes:
        metric: one of `METRICS`.
        rankings: made on `ranked_on` samples.
        chosen: the layers that each ranking, by its name, would keep.
        candidates: compared on `samples` others, the best one first.
        linear, attention: the metric where no layer keeps attention, and where all do.
        ranked_on, samples: numbers of samples.
    """

    metric: str
    rankings: tuple[Ranking, ...]
    chosen: Mapping[str, Placement]
    candidates: tuple[Candidate, ...]
    linear: Interval
    attention: Interval
    ranked_on: int
    samples: int

    @property
    def winner(self) -> Candidate:
        """The best candidate."""
        return self.candidates[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; null stands for what is unknown."""
        rankings = {
            ranking.name: {
                "keeps": sorted(self.chosen[ranking.name]),
                "order": ranking.order,
                "scores": {str(layer): asdict(score) for layer, score in sorted(ranking.scores.items())},
            }
            for ranking in self.rankings
        }
        values = {
            "winner": self.winner.pattern,
            "metric": self.metric,
            "ranked_on_samples": self.ranked_on,
            "validated_on_samples": self.samples,
            "rankings": rankings,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "no_attention": asdict(self.linear),
            "attention_everywhere": asdict(self.attention),
        }
        plain: dict[str, Any] = without_nan(values)
        return plain


def compare(
    measures: Measures,
    rankings: Sequence[Ranking],
    proposed: Mapping[Placement, Sequence[str]],
    layers: Layers,
    plans: Mapping[Placement, Plan],
    ranked_on: int,
) -> Outcome:
    """Measure every candidate and compare it with the best one.

    Args:
        measures: on samples that no ranking has seen.
        rankings: that have proposed some of them.
        proposed: candidates, and who has proposed each.
        layers: how they are written.
        plans: what each costs, at one number of tokens.
        ranked_on: samples that the rankings were made on.
    """
    everything = frozenset(layers.chosen)
    found = measures.scores([*proposed, LINEAR, everything])
    order = best_first(measures, set(proposed))
    best = dict(enumerate(found[order[0]]))
    behind = [
        paired_difference(
            {sample: measures.gain(best[sample], score) for sample, score in enumerate(found[placement])},
            dict.fromkeys(best, 0.0),
        )
        for placement in order[1:]
    ]
    gaps = [mean_interval([]), *(difference.interval for difference in behind)]
    made = [
        Candidate(
            layers.pattern(placement),
            tuple(proposed[placement]),
            tuple(sorted(placement)),
            mean_interval(found[placement]),
            gap,
            p,
            plans[placement].total_params,
            plans[placement].state_bytes(plans[placement].contexts[0]),
        )
        for placement, gap, p in zip(order, gaps, [math.nan, *holm([d.p for d in behind])], strict=True)
    ]
    chosen = {name: placement for placement, names in proposed.items() for name in names}
    linear, attention = (mean_interval(found[placement]) for placement in (LINEAR, everything))
    return Outcome(measures.metric, tuple(rankings), chosen, tuple(made), linear, attention, ranked_on, len(best))
