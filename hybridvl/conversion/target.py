"""The configuration of a converted model: the source's, with another pattern and mixers sized like the source's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridvl.layers import MIXERS, ConfigError, MixerConfig
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.layers.softmax_attention import AttentionConfig
from hybridvl.models.config import ModelConfig
from hybridvl.pattern import parse_pattern

Options = dict[str, dict[str, Any]]


def target_config(
    source: ModelConfig, pattern: str, mixers: Mapping[str, Any] | None = None, place: str = "mixers"
) -> ModelConfig:
    """The source's configuration with another pattern.

    An option in the pattern overrides that of `mixers`, which overrides the source's sizes (`default_options`).

    Args:
        source: configuration of the model that is converted.
        pattern: of the new one.
        mixers: named mixers and overrides, as in `ModelConfig.mixers`.
        place: where they stand, for messages.

    Raises:
        ConfigError: a mistake in the pattern or in mixers.
    """
    options = _merged(default_options(source), {} if mixers is None else mixers, place)
    parsed = parse_pattern(pattern, options)
    parsed.configs(options, place)  # all of them are checked, not only those that are kept
    used = {mixer.name for spec in parsed.specs for mixer in spec.mixers}
    kept = {name: values for name, values in options.items() if name in used}
    return dataclasses.replace(source, pattern=str(parsed), mixers=kept)


def default_options(source: ModelConfig) -> Options:
    """Options of mixers by name that fit a model.

    A mixer of the source is what it is there. The others are sized by the source's first attention layer: full and
    sliding-window attention have its geometry, Gated DeltaNet its query heads and head dim (values twice as wide, as
    in InfiniteVL), Mamba2 a head of its head dim, with B and C of their own, for each query head.
    """
    options = {name: dict(values) for name, values in source.mixers.items()}
    used: dict[str, list[MixerConfig]] = {}
    for name, config in _mixers(source):
        used.setdefault(name, []).append(config)
    for name, configs in used.items():
        options[name] = _agreed(configs, options.get(name, {}))
    attention = next((config for _, config in _mixers(source) if isinstance(config, AttentionConfig)), None)
    sized = {} if attention is None else _sized(attention, source.width)
    return {**sized, **options}


def source_layers(layers: Sequence[int] | None, wanted: int, available: int, pattern: str) -> list[int]:
    """The source's layer that each layer of the pattern takes the place of: the one of the same number, or `layers`.

    Raises ConfigError unless there is one for each.
    """
    if layers is None:
        if wanted != available:
            raise ConfigError(
                f"pattern {pattern!r} has {wanted} layers; expected {available}, one for each layer of the source, or "
                "layers: which of the source's each one follows"
            )
        return list(range(available))
    if len(layers) != wanted:
        raise ConfigError(f"layers: a list of {len(layers)}; expected {wanted}, one for each layer of {pattern!r}")
    for layer in layers:
        if not 0 <= layer < available:
            raise ConfigError(f"layers: {layer}; expected layers of the source, 0 to {available - 1}")
    return list(layers)


def _mixers(config: ModelConfig) -> Iterator[tuple[str, MixerConfig]]:
    """(name in the pattern, configuration) of every mixer of every layer."""
    pattern = parse_pattern(config.pattern, config.mixers)
    for spec, layer in zip(pattern.specs, pattern.configs(config.mixers), strict=True):
        branches = layer.branches if isinstance(layer, ParallelConfig) else (layer,)
        for mixer, branch in zip(spec.mixers, branches, strict=True):
            yield mixer.name, branch


def _agreed(configs: list[MixerConfig], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with those that all layers of a name agree on, whether they stand in the pattern or not."""
    found = dict(options)
    for field in dataclasses.fields(configs[0]):
        values = [getattr(config, field.name) for config in configs]
        if all(value == values[0] for value in values) and (field.name in found or values[0] != field.default):
            found[field.name] = values[0]
    return found


def _sized(attention: AttentionConfig, width: int) -> Options:
    geometry = {
        field.name: getattr(attention, field.name)
        for field in dataclasses.fields(AttentionConfig)
        if field.name != "backend"
    }
    heads, head_dim = attention.heads, attention.head_dim
    sized = {"full": geometry, "swa": dict(geometry), "gdn": {"heads": heads, "head_dim": head_dim}}
    if heads * head_dim % width == 0:  # Mamba2's inner width is a multiple of the model's
        groups = {"head_dim": head_dim, "state_dim": head_dim, "groups": heads}
        sized["mamba2"] = {"expand": heads * head_dim // width, **groups}
    return sized


def _merged(defaults: Options, mixers: Mapping[str, Any], place: str) -> Options:
    if not isinstance(mixers, Mapping):
        raise ConfigError(f"{place}: {mixers!r}; expected a mapping of names to options")
    merged = dict(defaults)
    for name, given in mixers.items():
        if not isinstance(given, Mapping):
            raise ConfigError(f"{place}.{name}: {given!r}; expected a mapping of options")
        base = defaults.get(name, {})
        kind = given.get("type")
        if isinstance(kind, str) and kind != base.get("type", name):
            # Another name for a registered mixer: sized like it. Other types bring their own defaults.
            base = defaults.get(kind, {}) if kind in MIXERS and "type" not in defaults.get(kind, {}) else {}
        merged[name] = {**base, **given}
    return merged
