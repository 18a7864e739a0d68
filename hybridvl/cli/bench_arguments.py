"""The arguments of `hybridvl bench`: what all its parts share, and those of each."""

from __future__ import annotations

import argparse

_EXAMPLES = """examples:
  hybridvl bench ops --case gated-delta-rule --shape B1 T2048 H16 K128 V128 --direction both
  hybridvl bench ops --case window-attention --shape W512 --lengths 1K 4K 16K --png window.png
  hybridvl bench train "(gdn*3 full)*2" --untied --decays qwen3-next --batch 4 --tokens 1024
  hybridvl bench decode "(swa gdn*3)*2" --peer "full*8" qwen2.5-vl --contexts 1K 4K 16K 64K
  hybridvl bench stream "(swa gdn*3)*2" --peer "full*8" qwen2.5-vl --contexts 0 1K 16K --side 16 --png stream.png
  hybridvl bench suite cpu --out results"""


def parser(kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The parser, made of parsers of a kind."""
    main = kind(
        prog="hybridvl bench",
        description="Our operators and models beside named peers: first their results are compared, and unequal ones "
        "end the run with status 1; then they take turns. Told are medians with quartiles, ratios within rounds with "
        "an interval, rates against the limits of the machine measured in the same run, and peak memory.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = main.add_subparsers(dest="what", required=True, metavar="ops|train|prefill|decode|stream|suite")
    _ops(parts.add_parser("ops", help="operators and mixers, by case"))
    train = parts.add_parser("train", help="a training step of a model")
    _model(train, "(gdn*3 full)*2", ("qwen3-next",), width=256, mlp_width=768, vocab=8192)
    train.add_argument("--batch", type=int, default=4, help="rows (default: 4)")
    train.add_argument("--tokens", type=int, default=1024, help="tokens a row (default: 1024)")
    train.add_argument("--untied", action="store_true", help="an output head of its own")
    train.add_argument(
        "--decays", choices=("ours", "qwen3-next"), default="ours", help="those that Gated DeltaNet layers start with"
    )
    for name, text, contexts in (
        ("prefill", "reading prompts", ["1K", "4K"]),
        ("decode", "one more token after a context", ["1K", "4K", "16K", "64K"]),
        ("stream", "one more frame after a context", ["0", "1K", "4K", "16K", "64K"]),
    ):
        part = parts.add_parser(name, help=f"{text}, by length")
        _model(part, "(swa gdn*3)*2", ("full*8", "qwen2.5-vl"), width=1024, mlp_width=2816, vocab=32768)
        part.add_argument("--contexts", nargs="+", default=contexts, metavar="TOKENS", help=" ".join(contexts))
    _stream(parts.choices["stream"])
    suite = parts.add_parser("suite", help="a named set of measurements with goals: cpu")
    suite.add_argument("name", help="cpu")
    suite.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these; others in the folder stay")
    suite.add_argument("--list", action="store_true", help="list the rows and end")
    suite.add_argument("--out", default="results", metavar="FOLDER", help="where NAME.json, .csv, .md and .png go")
    for part in parts.choices.values():
        _shared(part)
    for part in (parts.choices[name] for name in ("ops", "train", "prefill", "decode", "stream")):
        _output(part)
    return main


def _ops(part: argparse.ArgumentParser) -> None:
    part.add_argument("--case", default="gated-delta-rule", metavar="NAME", help="see --list")
    part.add_argument("--list", action="store_true", help="list the cases with their default sizes and end")
    part.add_argument(
        "--shape", nargs="+", default=[], metavar="SIZE", help="sizes by letter, such as B1 T2048; others as listed"
    )
    part.add_argument("--lengths", nargs="+", default=[], metavar="TOKENS", help="several values of T: 1K 4K 16K")
    part.add_argument(
        "--direction", choices=("forward", "backward", "both"), default="forward", help="backward has forward in it"
    )
    part.add_argument("--peer", nargs="+", metavar="NAME", help="default: the device's; none: ours alone")
    part.add_argument("--errors", action="store_true", help="also errors against the float64 reference (slow)")
    part.add_argument("--backend", default="auto", help="of our side")
    part.add_argument("--decay", choices=("mild", "strong"), default="mild", help="strong: near 0 to -60 a step")


def _model(
    part: argparse.ArgumentParser, pattern: str, peers: tuple[str, ...], width: int, mlp_width: int, vocab: int
) -> None:
    part.add_argument("pattern", nargs="?", default=pattern, metavar="PATTERN", help=f"default: {pattern}")
    part.add_argument(
        "--peer",
        nargs="+",
        default=list(peers),
        metavar="PEER",
        help=f"{peers[-1]}, which must compute the same, or patterns of other models; none: ours alone",
    )
    part.add_argument("--width", type=int, default=width, help=f"default: {width}")
    part.add_argument("--mlp-width", type=int, default=mlp_width, help=f"default: {mlp_width}")
    part.add_argument("--vocab", type=int, default=vocab, help=f"default: {vocab}")
    part.add_argument("--chunk", type=int, default=1024, help="tokens of the loss, or of a prompt, at once (1024)")
    part.epilog = "--mixer.NAME.OPTION VALUE sets an option of a mixer, such as --mixer.swa.window 4096"


def _stream(part: argparse.ArgumentParser) -> None:
    part.add_argument("--side", type=int, default=16, help="visual tokens on each side of a frame (default: 16)")
    part.add_argument("--vision-depth", type=int, default=4, help="blocks of the vision tower (default: 4)")
    part.add_argument(
        "--vision-width", type=int, default=256, help="default: 256; depth 32 and width 1280 are Qwen2.5-VL's tower"
    )


def _shared(part: argparse.ArgumentParser) -> None:
    part.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    part.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    part.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    part.add_argument("--rounds", type=int, help="timed turns of every side (default: 7; a suite's rows their own)")
    part.add_argument("--warmup", type=int, default=1, help="runs of every side before them (default: 1)")
    part.add_argument("--no-memory", action="store_true", help="leave peak memory out, which takes one more run")


def _output(part: argparse.ArgumentParser) -> None:
    part.add_argument("--json", metavar="FILE", help="write all numbers; '-' prints them instead of tables")
    part.add_argument("--csv", metavar="FILE", help="write a line for every side")
    part.add_argument("--markdown", metavar="FILE", help="write the table")
    part.add_argument("--png", metavar="FILE", help="draw time and memory against length, or the ratios")
