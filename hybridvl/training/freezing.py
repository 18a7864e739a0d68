"""What of a model is trained, chosen by parts, mixers, layers or names of parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hybridvl.layers.errors import ConfigError
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pattern import parse_pattern

NEW_MIXERS = "mixers:new"

_PARTS = {
    "vision": re.compile(r"visual\..+"),
    "embeddings": re.compile(r"decoder\.embed_tokens\..+"),
    "norms": re.compile(r"decoder\.norm\..+|decoder\.layers\.\d+\.(mixer_norm|mlp_norm)\..+"),
    "mlps": re.compile(r"decoder\.layers\.\d+\.mlp\..+"),
    "mixers": re.compile(r"decoder\.layers\.\d+\.mixer\..+"),
}
_HEAD = "head"
_MIXERS = "mixers:"
_LAYERS = "layers:"
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def choose_trained(
    net: VisionLanguageModel,
    train_only: Sequence[str] | None = None,
    freeze: Sequence[str] = (),
    replaced: Sequence[int] | None = None,
) -> None:
    """Set requires_grad: of what `train_only` names (None: of everything) but for what `freeze` names.

    Names: "vision", "embeddings", "head" (the embeddings where they are tied), "norms" (of the decoder, not within its
    mixers), "mlps", "mixers", "mixers:swa" (a mixer by its name in the pattern, or its type), "mixers:new" (of layers
    that differ from the teacher's), "layers:0-3,7" (whole layers), or a parameter's name or its beginning up to a dot.

    Args:
        net: the model.
        train_only: names of what is trained; None: everything.
        freeze: names of what is not trained of that.
        replaced: numbers of the layers that differ from the teacher's; None where there is no teacher.

    Raises:
        ConfigError: a name that means no parameter of this model, such a list written as text.
    """
    parameters = dict(net.named_parameters())
    trained = set(parameters) if train_only is None else _all(net, train_only, replaced, "model.train_only")
    trained -= _all(net, freeze, replaced, "model.freeze")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)


def select_parameters(
    net: VisionLanguageModel, name: str, replaced: Sequence[int] | None = None, place: str = "model.freeze"
) -> set[str]:
    """Names of the parameters that one name stands for (see `choose_trained`); ConfigError, at `place`, for none."""
    if name == NEW_MIXERS and replaced is None:
        raise ConfigError(f"{place}: {name!r} needs a teacher to compare with; expected {_accepted(net, replaced)}")
    if name.startswith(_LAYERS):
        prefixes = [f"decoder.layers.{layer}." for layer in _numbers(name, len(net.mixer_configs), place)]
    elif name == NEW_MIXERS:
        prefixes = [f"decoder.layers.{layer}.mixer." for layer in replaced or ()]
    elif name.startswith(_MIXERS):
        prefixes = [prefix for prefix, names in _mixers(net) if name.removeprefix(_MIXERS) in names]
    elif name == _HEAD:
        prefixes = ["decoder.embed_tokens." if net.lm_head is None else "lm_head."]
    else:
        prefixes = [f"{name}."]
    part = _PARTS.get(name)
    found = {
        full
        for full in dict(net.named_parameters())
        if (full == name or full.startswith(tuple(prefixes)) if part is None else part.fullmatch(full))
    }
    if not found:
        raise ConfigError(
            f"{place}: no parameter is called {name!r} or lies below it; expected {_accepted(net, replaced)}"
        )
    return found


def _all(net: VisionLanguageModel, names: Sequence[str], replaced: Sequence[int] | None, place: str) -> set[str]:
    if isinstance(names, str):
        raise ConfigError(f"{place}: {names!r}; expected a list of names")
    return set().union(*(select_parameters(net, name, replaced, place) for name in names))


def _mixers(net: VisionLanguageModel) -> Iterator[tuple[str, set[str]]]:
    """(beginning of its parameters' names, what it is called) of every mixer, those side by side one by one."""
    specs = parse_pattern(net.config.pattern, net.config.mixers).specs
    for layer, (spec, config) in enumerate(zip(specs, net.mixer_configs, strict=True)):
        prefix = f"decoder.layers.{layer}.mixer."
        if isinstance(config, ParallelConfig):
            for number, (mixer, branch) in enumerate(zip(spec.mixers, config.branches, strict=True)):
                yield f"{prefix}branches.{number}.", {mixer.name, branch.name}
        else:
            yield prefix, {spec.mixers[0].name, config.name}


def _numbers(name: str, layers: int, place: str) -> list[int]:
    """The layers of "layers:0-3,7"."""
    numbers: list[int] = []
    for part in name.removeprefix(_LAYERS).split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < layers:
            raise ConfigError(
                f"{place}: {name!r}: {part.strip()!r} is not a layer or a range of layers from 0 to {layers - 1}; "
                "expected for example 'layers:0-3,7'"
            )
        numbers += range(first, last + 1)
    return numbers


def _accepted(net: VisionLanguageModel, replaced: Sequence[int] | None) -> str:
    mixers = sorted(set().union(*(names for _, names in _mixers(net))))
    parts = [part for part in _PARTS if part != "vision" or net.visual is not None]
    named = [*parts, _HEAD, *(_MIXERS + mixer for mixer in mixers), *([] if replaced is None else [NEW_MIXERS])]
    roots = ", ".join(child for child, _ in net.named_children())
    return f"{', '.join(named)}, 'layers:0-3,7', or the beginning of a parameter's name (top level: {roots})"
