"""`hybridvl place`: which layers of a teacher should keep attention, under a budget, and the pattern that says so."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from hybridvl.ablation.report.wording import UNKNOWN, probability, with_interval
from hybridvl.checkpoints.files import text_writer, write_files
from hybridvl.cli.arguments import Arguments, take_flags
from hybridvl.cli.output import out_folder, table_console
from hybridvl.pipeline.runner import StageFailed

if TYPE_CHECKING:  # Lightning takes seconds to import
    from hybridvl.ablation.placement.outcome import Outcome

_FLAG = re.compile(
    r"--(?P<key>seed_everything|(?:model|data|trainer|run|checkpoints|examples)\.[^=]+)(?:=(?P<value>.*))?", re.DOTALL
)


def main(argv: Sequence[str]) -> int:
    """Rank, compare, write and print; returns 0, or the exit status of a failed fit. Mistakes are ConfigErrors."""
    rest, flags = take_flags(argv, _FLAG)
    options = _parser().parse_args(rest)
    folder = out_folder(options.out)
    from hybridvl.cli.place_search import Search  # which imports it
    from hybridvl.cli.place_stage import train_student

    search = Search(options, {match["key"]: value for match, value in flags})
    student = options.student
    if student is not None:
        search.check_student(student)
    else:
        try:
            student = str(train_student(search.recipe, folder))
        except StageFailed as failed:
            print(f"error: {failed}", file=sys.stderr)
            return failed.status
    outcome = search.run(student, folder / "model")
    facts = search.facts(student)
    _write(folder, outcome, facts)
    _show(outcome, facts)
    for name in ("place.json", "place.png"):
        print(f"written      {folder / name}")
    print(f"model        {folder / 'model'}")
    print(f"pattern      {outcome.winner.pattern}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(
        prog="hybridvl place",
        description="Choose the layers that keep attention when a teacher becomes a hybrid. A student of linear layers "
        "is distilled from the teacher layer by layer (stage I a: a run folder in OUT/layers, skipped when done); "
        "layers are ranked on one half of the validation samples; the placements that the rankings choose and simple "
        "ones are compared on the other half, as assembled, without further training. Writes place.json, place.png and "
        "the best one as a model folder, and ends with its pattern.",
        epilog="example: hybridvl place runs/tiny/teacher/version_0/model --config recipes/tiny/data.yaml --config "
        "recipes/tiny/layers.yaml --keep 2",
    )
    parser.add_argument("teacher", metavar="TEACHER", help="folder or hub id of the teacher")
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="FILE",
        help="recipe of data and stage I a, as of hybridvl fit; of several the later wins. Single values of it are "
        "flags too: --data.batch_size 8",
    )
    _add_kept(parser)
    parser.add_argument("--student", metavar="DIR", help="a distilled model of linear layers, instead of training one")
    parser.add_argument(
        "--rank",
        nargs="+",
        default=["loss", "probe", "removal"],
        metavar="HOW",
        help="loss: of stage I a, by layer; probe: what the linear model gains when one layer gets its attention back; "
        "removal: what the teacher loses when one layer gives it up; beam: sets of layers, grown one by one. Default: "
        "loss probe removal",
    )
    parser.add_argument("--beam", type=int, default=4, metavar="N", help="sets that a beam goes on from; default: 4")
    parser.add_argument(
        "--metric",
        default="divergence",
        metavar="NAME",
        help="of the answers' tokens: divergence (KL to the teacher, the default), cross_entropy, or exact (whole "
        "answers right, teacher-forced)",
    )
    parser.add_argument(
        "--batches",
        type=int,
        metavar="N",
        help="validation batches to rank on, and as many to compare on; default: 8, or half of what there is",
    )
    parser.add_argument("--also", nargs="+", metavar="PATTERN", help="placements to compare besides")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="for state bytes; default: data.max_tokens")
    parser.add_argument("--out", default="runs/place", metavar="DIR", help="default: runs/place")
    return parser


def _add_kept(parser: argparse.ArgumentParser) -> None:
    """How many layers keep attention, which attention, and what the others become."""
    kept = parser.add_mutually_exclusive_group(required=True)
    kept.add_argument("--keep", type=int, metavar="N", help="layers that keep attention")
    kept.add_argument(
        "--budget.state_bytes",
        dest="state_bytes",
        type=int,
        metavar="BYTES",
        help="as many as leave the state of one row at --context within this",
    )
    kept.add_argument(
        "--budget.params", dest="params", type=int, metavar="N", help="as many as leave the parameters within this"
    )
    parser.add_argument("--attention", default="full", metavar="LAYER", help="full (default), or swa(window=64)")
    parser.add_argument("--linear", default="gdn", metavar="LAYER", help="what all others become; default: gdn")


def _write(folder: Path, outcome: Outcome, facts: Mapping[str, Any]) -> None:
    from hybridvl.ablation.placement.drawing import draw_outcome  # matplotlib takes a second to import

    text = json.dumps({**outcome.to_dict(), "inputs": facts}, indent=2) + "\n"
    picture = partial(Path.write_bytes, data=draw_outcome(outcome))
    write_files(folder, {"place.json": text_writer(text), "place.png": picture})


def _show(outcome: Outcome, facts: Mapping[str, Any]) -> None:
    console = table_console()
    ranked = [ranking for ranking in outcome.rankings if ranking.scores]
    if ranked:
        table = Table(title=f"layers, ranked on {outcome.ranked_on} samples", title_justify="left")
        table.add_column("layer", justify="right")
        for ranking in ranked:
            table.add_column(f"by {ranking.name}")
            table.add_column("place", justify="right")
        for layer in sorted(ranked[0].scores):
            row = [str(layer)]
            for ranking in ranked:
                kept = " keeps" if layer in outcome.chosen[ranking.name] else ""
                row += [with_interval(ranking.scores[layer]), f"{ranking.order.index(layer) + 1}{kept}"]
            table.add_row(*row)
        console.print(table)
    table = Table(title=f"candidates, compared on {outcome.samples} other samples", title_justify="left")
    worse = "behind the best"
    for column in ("pattern", "proposed by", "keep", outcome.metric, worse, "p"):
        table.add_column(column, overflow="fold")
    for found in outcome.candidates:
        behind = UNKNOWN if found is outcome.winner else with_interval(found.behind)
        layers = " ".join(map(str, found.kept))
        names = escape(", ".join(found.names))
        table.add_row(escape(found.pattern), names, layers, with_interval(found.score), behind, probability(found.p))
    table.add_section()
    for name, end in (("no attention", outcome.linear), ("attention everywhere", outcome.attention)):
        table.add_row(name, "", "", with_interval(end))
    console.print(table)
    console.print("Means with 95 % intervals over samples; p of the paired t test, corrected by Holm.")
    best = outcome.winner
    state = f"{best.state_bytes:,} bytes at {facts['context']:,} tokens"
    console.print(f"Each has {best.params:,} parameters, and a state of {state}.")
    tied = [found.pattern for found in outcome.candidates[1:] if not found.p < 0.05]
    if tied:
        print(f"note         not told apart from the best on these samples: {'; '.join(tied)}")
