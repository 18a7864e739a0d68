"""A picture of a search for placements: the layers' scores by each ranking, and the candidates compared."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from hybridvl.ablation.placement.outcome import Outcome
from hybridvl.ablation.report.style import COLOURS, tidy, title
from hybridvl.ablation.statistics import Interval
from hybridvl.pictures import FAINT, INK, default_style, figure, plain, png

_UNITS = {"divergence": "KL to the teacher, nats", "cross_entropy": "cross-entropy, nats", "exact": "answers right"}
_SHOWS = {
    "loss": "loss of stage I a",
    "probe": "gain from attention put back",
    "removal": "loss from attention taken away",
}
_OTHER = "#b9c3cf"


@default_style()
def draw_outcome(outcome: Outcome) -> bytes:
    """A PNG file: a panel for each ranking of layers, and one for the candidates."""
    ranked = [ranking for ranking in outcome.rankings if ranking.scores]
    heights = [2.2] * len(ranked) + [0.9 + 0.44 * len(outcome.candidates)]
    made = figure(8.2, 1.0 + sum(heights))
    panels: list[Axes] = list(made.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    for axes, ranking in zip(panels[:-1], ranked, strict=True):
        layers, kept = sorted(ranking.scores), outcome.chosen[ranking.name]
        scores = [ranking.scores[layer] for layer in layers]
        colours = [COLOURS[1] if layer in kept else _OTHER for layer in layers]
        axes.bar(range(len(layers)), [score.mean for score in scores], color=colours, width=0.7)
        middle = [score.mean for score in scores]
        axes.errorbar(range(len(layers)), middle, yerr=_errors(scores), fmt="none", ecolor=INK, capsize=2.5, lw=1)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_xlabel("layer", fontsize=9, color=INK)
        unit = "" if ranking.name == "loss" else f"\n({_UNITS[outcome.metric]})"
        axes.set_ylabel(_SHOWS[ranking.name] + unit, fontsize=8, color=INK)
        axes.set_title(f"by {ranking.name}: kept are those in red", fontsize=9.5, color=INK, loc="left")
        tidy(axes, grid="y")
    _draw_candidates(panels[-1], outcome)
    title(
        made,
        f"Which layers keep attention: {outcome.winner.pattern}",
        f"Rankings over {outcome.ranked_on} samples, candidates over {outcome.samples} others; bars: means, lines: "
        "95 % intervals over samples.",
    )
    return png(made)


def _draw_candidates(axes: Axes, outcome: Outcome) -> None:
    candidates = outcome.candidates[::-1]
    rows = range(len(candidates))
    scores = [candidate.score for candidate in candidates]
    for row, (candidate, error) in enumerate(zip(candidates, zip(*_errors(scores), strict=True), strict=True)):
        colour = COLOURS[1] if candidate is outcome.winner else COLOURS[0]
        sides = [[error[0]], [error[1]]]
        axes.errorbar(candidate.score.mean, row, xerr=sides, fmt="o", color=colour, capsize=2.5, markersize=5)
    ends = ((outcome.linear, "no attention", "--"), (outcome.attention, "attention everywhere", ":"))
    for end, label, line in ends:
        axes.axvline(end.mean, color=FAINT, linestyle=line, linewidth=1.2, label=label)
    axes.set_yticks(rows, [plain(f"{c.pattern}\n({'; '.join(c.names)})") for c in candidates], fontsize=8)
    axes.set_ylim(-0.6, len(candidates) - 0.4)
    axes.set_xlabel(_UNITS[outcome.metric], fontsize=9, color=INK)
    axes.set_title("candidates on other samples", fontsize=9.5, color=INK, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="best")
    tidy(axes, grid="x")


def _errors(scores: Sequence[Interval]) -> list[list[float]]:
    """What reaches below and above each mean."""
    return [[score.mean - score.low for score in scores], [score.high - score.mean for score in scores]]
