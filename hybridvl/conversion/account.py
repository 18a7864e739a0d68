"""The account of a conversion: every tensor of the new model and of the source, and what of it went where."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from hybridvl.conversion.ledger import Ledger, runs
from hybridvl.conversion.report import Counts, Inherited, LayerReport, Report, TensorReport
from hybridvl.layers import MixerConfig
from hybridvl.layers.inherit import same_weights
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.layers.pieces import Piece
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pattern import parse_pattern

_IN_LAYER = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_PARTS = {"visual.": "vision", "decoder.embed_tokens.": "embeddings", "lm_head.": "head", "decoder.norm.": "norms"}
_UNUSED = "other layers' mixers"


def source_name(name: str, follows: Sequence[int]) -> str | None:
    """The source's tensor that one of the new model's is copied from; None for those of mixers."""
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        return name
    if match["rest"].startswith("mixer."):
        return None
    return f"decoder.layers.{follows[int(match['layer'])]}.{match['rest']}"


def mixer_prefix(layer: int) -> str:
    """What the names of a layer's mixer's tensors begin with."""
    return f"decoder.layers.{layer}.mixer."


def same_layer(before: MixerConfig, after: MixerConfig) -> bool:
    """Whether two layers are the same, backends aside: their weights, and what they compute with them."""
    return same_weights(after, before) and not _changes(before, after)


def account(
    shapes: Mapping[str, tuple[int, ...]],
    old: VisionLanguageModel,
    new: VisionLanguageModel,
    follows: Sequence[int],
    pieces: Sequence[Sequence[Piece]],
    source: str,
    inherit: str,
) -> Report:
    """The report of a conversion.

    Args:
        shapes: of the source's tensors.
        old, new: the source's model and the new one, on the meta device.
        follows: the source's layer that each new layer takes the place of.
        pieces: what each new layer's mixer takes over.
        source, inherit: for the report.
    """
    ledger = Ledger(shapes)
    tensors = new.state_dict()
    layers = [_tensor_reports(ledger, tensors, layer, follows[layer], parts) for layer, parts in enumerate(pieces)]
    parts = _parts(ledger, tensors, follows)
    unused = set(range(len(old.mixer_configs))) - set(follows)
    for name in shapes:
        match = _IN_LAYER.fullmatch(name)
        if match is None or not match["rest"].startswith("mixer.") or int(match["layer"]) in unused:
            part = _part(name)
            parts[part] = parts.get(part, Counts()) + Counts(left=ledger.left(name))
    texts = [parse_pattern(model.config.pattern, model.config.mixers).layers for model in (old, new)]
    reports = []
    for layer, origin in enumerate(follows):
        left = {} if origin in follows[:layer] else _left(ledger, shapes, mixer_prefix(origin))
        before, after = old.mixer_configs[origin], new.mixer_configs[layer]
        counts = sum((tensor.counts for tensor in layers[layer]), Counts(left=sum(left.values())))
        how = _how(before, after, bool(pieces[layer]))
        named = (layer, origin, texts[0][origin], texts[1][layer], how)
        reports.append(LayerReport(*named, counts, tuple(layers[layer]), left))
    return Report(source, old.pattern, new.pattern, inherit, tuple(reports), parts)


def _tensor_reports(
    ledger: Ledger, tensors: Mapping[str, Tensor], layer: int, origin: int, pieces: Sequence[Piece]
) -> list[TensorReport]:
    reports = []
    for full_name, tensor in tensors.items():
        if not full_name.startswith(mixer_prefix(layer)):
            continue
        name = full_name.removeprefix(mixer_prefix(layer))
        copied, placed, origins = 0, 0, []
        for piece in pieces:
            if piece.target == name:
                placed += len(piece.into) * (tensor.numel() // (*tensor.shape, 1)[piece.axis])
                copied += ledger.take(mixer_prefix(origin) + piece.source, piece.axis, piece.taken)
                axis = ("rows", "columns")[piece.axis]
                origins.append(Inherited(piece.source, axis, tuple(runs(piece.into, piece.taken))))
        reports.append(TensorReport(name, Counts(copied, placed - copied, tensor.numel() - placed), tuple(origins)))
    return reports


def _parts(ledger: Ledger, tensors: Mapping[str, Tensor], follows: Sequence[int]) -> dict[str, Counts]:
    parts: dict[str, Counts] = {}
    for name, tensor in tensors.items():
        found = source_name(name, follows)
        if found is not None:
            copied = ledger.take_all(found)
            counts = Counts(copied, repeated=tensor.numel() - copied)
            parts[_part(name)] = parts.get(_part(name), Counts()) + counts
    return parts


def _part(name: str) -> str:
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        return next(part for prefix, part in _PARTS.items() if name.startswith(prefix))
    kind = match["rest"].split(".")[0]
    return {"mlp": "mlps", "mixer": _UNUSED}.get(kind, "norms")


def _left(ledger: Ledger, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, int]:
    left = {name.removeprefix(prefix): ledger.left(name) for name in shapes if name.startswith(prefix)}
    return {name: count for name, count in left.items() if count}


def _how(before: MixerConfig, after: MixerConfig, inherits: bool) -> str:
    if not same_weights(after, before):
        return "inherited" if inherits else "new"
    changed = _changes(before, after)
    return "options" if changed - {"window"} else "window" if changed else "copied"


def _changes(before: MixerConfig, after: MixerConfig) -> set[str]:
    """The options in which two layers of the same weights differ."""
    if isinstance(before, ParallelConfig) and isinstance(after, ParallelConfig):
        pairs = zip(before.branches, after.branches, strict=True)
        return set().union(*(_changes(*pair) for pair in pairs))
    names = {field.name for config in (before, after) for field in dataclasses.fields(config)} - {"backend"}
    return {name for name in names if getattr(before, name, None) != getattr(after, name, None)}
