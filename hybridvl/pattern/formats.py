"""Patterns to and from what other projects write: Hugging Face `layer_types`, fla's `attn`, Megatron's hybrid string.

What a format cannot say is an error, never a silent loss. Lists of layers are `Pattern.layers` and
`Pattern.from_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridvl.layers import ConfigError, MixerConfig
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.layers.softmax_attention import AttentionConfig
from hybridvl.pattern.core import Mixers, Pattern, parse_pattern
from hybridvl.pattern.errors import PatternError, suggest
from hybridvl.pattern.syntax import MAX_LAYERS

_FROM_LAYER_TYPE = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "swa",
    "linear_attention": "gdn",
    "mamba": "mamba2",
    "mamba2": "mamba2",
}
_TO_LAYER_TYPE = {
    "full": "full_attention",
    "swa": "sliding_attention",
    "gdn": "linear_attention",
    "mamba2": "mamba",
}

# Megatron-LM, megatron/core/models/hybrid: the symbols of layers, and what else may stand in the string.
_FROM_SYMBOL = {"*": "full", "G": "gdn", "M": "mamba2"}
_TO_SYMBOL = {name: symbol for symbol, name in _FROM_SYMBOL.items()}
_MLP = "-"
_NOT_OURS = {
    "E": "a mixture of experts",
    "+": "multi-latent attention",
    "D": "DeepSeek sparse attention",
    "C": "compressed sparse attention",
    "H": "heavily compressed attention",
    "W": "windowed multi-latent attention",
    "|": "a cut between pipeline stages",
    "/": "multi-token prediction",
    "[": "a group of layers",
    "]": "a group of layers",
}

_FLA_KEYS = ("layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta")
_FLA_BASES = ("gdn", "mamba2")
_FLA_ROPE_THETA = 10000.0


def from_layer_types(types: Sequence[str], linear: str = "gdn") -> Pattern:
    """The pattern of Hugging Face's `layer_types`.

    Args:
        types: "full_attention", "sliding_attention", "linear_attention", and the older "attention" and "mamba"; windows
            and head counts are elsewhere in a Hugging Face configuration, and belong into `mixers`.
        linear: the mixer that "linear_attention" stands for; transformers says it of Mamba2 models, too.

    Raises:
        ConfigError: a type that no mixer stands for, with its place.
    """
    known = {**_FROM_LAYER_TYPE, "linear_attention": linear}
    for place, kind in enumerate(types):
        if kind not in known:
            hint = suggest(str(kind), known)
            raise ConfigError(
                f"layer_types[{place}]: no mixer stands for {kind!r}{hint}; expected {', '.join(sorted(known))}"
            )
    return Pattern.from_layers(known[kind] for kind in types)


def to_layer_types(pattern: Pattern, mixers: Mixers | None = None) -> list[str]:
    """Hugging Face's `layer_types` of a pattern; options that `mixers` gives are written elsewhere in such a config.

    Raises:
        ConfigError: parallel layers, options in the pattern, mixers without a type of layer, or two mixers that would
            become one.
    """
    names = _plain_names(pattern, mixers, "layer_types")
    return [_translate(name, _TO_LAYER_TYPE, place, "layer_types") for place, name in enumerate(names)]


def from_megatron(text: str, mlp: bool = True) -> Pattern:
    """The pattern of Megatron-LM's hybrid pattern string: "M" Mamba2, "G" Gated DeltaNet, "*" attention, "-" MLP.

    Args:
        text: for example "*-G-G-G-".
        mlp: whether the model's layers have MLPs (`mlp_width` above 0); then each mixer must be followed by one "-".

    Raises:
        PatternError: a symbol that no mixer stands for, or MLPs that no layer has in a pattern, with a caret.
    """
    layers: list[str] = []
    followed = True
    for at, symbol in enumerate(text):
        if symbol == _MLP and (not mlp or followed):
            problem = (
                "found an MLP '-' in a model whose layers have none (mlp=False)" if not mlp else "found an MLP '-'"
            )
            raise PatternError(f"{problem}; expected the symbol of a mixer: {_symbols()}", text, at)
        if symbol == _MLP:
            followed = True
            continue
        if mlp and not followed:
            problem = "found a mixer without an MLP '-' before it; the layers of a pattern have all an MLP, or none"
            raise PatternError(f"{problem} (mlp=False)", text, at)
        if symbol not in _FROM_SYMBOL:
            meaning = f", {_NOT_OURS[symbol]}, which a pattern does not hold" if symbol in _NOT_OURS else ""
            raise PatternError(f"found {symbol!r}{meaning}; expected one of {_symbols()}, '-'", text, at)
        layers.append(_FROM_SYMBOL[symbol])
        followed = not mlp
    if mlp and not followed:
        problem = "found the end after a mixer without an MLP; expected '-', or a model without MLPs (mlp=False)"
        raise PatternError(problem, text, len(text))
    return Pattern.from_layers(layers)


def to_megatron(pattern: Pattern, mixers: Mixers | None = None, mlp: bool = True) -> str:
    """Megatron-LM's hybrid pattern string, with an MLP "-" after every mixer unless `mlp` is False.

    Raises:
        ConfigError: sliding windows (Megatron's "*" has one window for the whole model, outside the string), parallel
            layers, options in the pattern, other mixers, or two mixers that would become one.
    """
    names = _plain_names(pattern, mixers, "Megatron's hybrid pattern")
    symbols = [_translate(name, _TO_SYMBOL, place, "Megatron's hybrid pattern") for place, name in enumerate(names)]
    return "".join(symbol + _MLP * mlp for symbol in symbols)


def from_fla_attn(
    attn: Mapping[str, Any] | None,
    num_layers: int,
    width: int,
    base: str = "gdn",
    rope_theta: float = _FLA_ROPE_THETA,
) -> Pattern:
    """The pattern of a flash-linear-attention model of `num_layers` layers of `base` with attention where `attn` says.

    Args:
        attn: {"layers": indices, "num_heads": H, "num_kv_heads", "qkv_bias", "window_size", "rope_theta"}, or None.
        width: model width; the head dim is width / num_heads.
        base: "gdn" or "mamba2", by the class of the model.
        rope_theta: the model's rotary base, which a pattern does not hold; `attn` must agree with it.

    Raises:
        ConfigError: with the key, its value and what is accepted.
    """
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or not 1 <= num_layers <= MAX_LAYERS:
        raise ConfigError(f"num_layers: {num_layers!r}; expected a whole number from 1 to {MAX_LAYERS}")
    if attn is None:
        return parse_pattern(f"{base}*{num_layers}")
    unknown = sorted(set(attn) - set(_FLA_KEYS))
    if unknown:
        raise ConfigError(f"attn.{unknown[0]}: a pattern cannot say it; expected keys {', '.join(_FLA_KEYS)}")
    if not isinstance(attn.get("layers"), list | tuple):
        raise ConfigError(f"attn.layers: {attn.get('layers')!r}; expected a list of the attention layers' indices")
    attention = _fla_attention(attn, width)
    if attn.get("rope_theta", _FLA_ROPE_THETA) != rope_theta:
        raise ConfigError(
            f"attn.rope_theta: {attn.get('rope_theta', _FLA_ROPE_THETA)!r}; expected the model's rope_theta "
            f"= {rope_theta!r}, since a pattern holds no rotary base"
        )
    chosen = set()
    for place in attn["layers"]:
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < num_layers:
            raise ConfigError(f"attn.layers: {place!r}; expected indices from 0 to {num_layers - 1}")
        chosen.add(place)
    return Pattern.from_layers(attention if place in chosen else base for place in range(num_layers))


def to_fla_attn(
    pattern: Pattern, width: int, mixers: Mixers | None = None, rope_theta: float = _FLA_ROPE_THETA
) -> dict[str, Any] | None:
    """fla's `attn` dict of a pattern of one attention among "gdn" or "mamba2" layers; None if there is no attention.

    Args:
        pattern, mixers: the layers; the options of the linear mixer are written elsewhere in an fla configuration.
        width: model width; heads * head_dim must be equal to it.
        rope_theta: the model's rotary base.

    Raises:
        ConfigError: what an fla model cannot have: parallel layers, two kinds of attention or of linear mixer, q/k
            norm, output bias, attention without positions, free head dims.
    """
    configs = pattern.configs(mixers)
    attention: MixerConfig | None = None
    base: MixerConfig | None = None
    chosen = []
    for place, (config, text) in enumerate(zip(configs, pattern.layers, strict=True)):
        if isinstance(config, ParallelConfig):
            raise ConfigError(f"layer {place} ({text}): fla's attn has no parallel layers")
        if isinstance(config, AttentionConfig):
            attention = _same(attention, config, f"layer {place} ({text})", "attention")
            chosen.append(place)
        elif config.name in _FLA_BASES:
            base = _same(base, config, f"layer {place} ({text})", "linear mixer")
        else:
            raise ConfigError(f"layer {place} ({text}): fla's attn has no such mixer; expected {', '.join(_FLA_BASES)}")
    if not isinstance(attention, AttentionConfig):
        return None
    _check_fla_attention(attention, width)
    return {
        "layers": chosen,
        "num_heads": attention.heads,
        "num_kv_heads": attention.kv_heads,
        "qkv_bias": attention.qkv_bias,
        "window_size": attention.slots_limit,
        "rope_theta": rope_theta,
    }


def _fla_attention(attn: Mapping[str, Any], width: int) -> str:
    """The attention layer of an fla model as a pattern writes it."""
    heads, window = attn.get("num_heads"), attn.get("window_size")
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise ConfigError(f"attn.num_heads: {heads!r}; expected a divisor of the width {width}")
    kv_heads, bias = attn.get("num_kv_heads"), attn.get("qkv_bias", False)
    kv_heads = heads if kv_heads is None else kv_heads
    if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or kv_heads < 1 or heads % kv_heads:
        raise ConfigError(f"attn.num_kv_heads: {kv_heads!r}; expected a divisor of num_heads = {heads}")
    if not isinstance(bias, bool):
        raise ConfigError(f"attn.qkv_bias: {bias!r}; expected true or false")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ConfigError(f"attn.window_size: {window!r}; expected null or a whole number of at least 1")
    options = f"heads={heads}, kv_heads={kv_heads}, head_dim={width // heads}, qkv_bias={'true' if bias else 'false'}"
    return f"full({options})" if window is None else f"swa({options}, window={window})"


def _check_fla_attention(config: AttentionConfig, width: int) -> None:
    fixed = {"out_bias": False, "qk_norm": False, "rope": True, "head_dim": width // config.heads}
    for key, accepted in fixed.items():
        if getattr(config, key) != accepted:
            raise ConfigError(
                f"{config.name}.{key} = {getattr(config, key)!r}: fla's attn cannot say it; it is {accepted!r}"
            )
    if config.heads * config.head_dim != width:
        raise ConfigError(f"{config.name}.heads = {config.heads}: fla's attn needs a divisor of the width {width}")


def _same(known: MixerConfig | None, config: MixerConfig, place: str, kind: str) -> MixerConfig:
    if known is not None and known != config:
        raise ConfigError(f"{place}: a second kind of {kind}; fla's attn has one, {known}")
    return config


def _plain_names(pattern: Pattern, mixers: Mixers | None, target: str) -> list[str]:
    """The registered name of every layer's one mixer, for formats without options."""
    names: list[str] = []
    first: dict[str, tuple[str, MixerConfig]] = {}
    for place, (spec, config) in enumerate(zip(pattern.specs, pattern.configs(mixers), strict=True)):
        if len(spec.mixers) > 1:
            raise ConfigError(f"layer {place} ({spec.text}): {target} cannot say parallel mixers")
        if spec.mixers[0].options:
            raise ConfigError(f"layer {place} ({spec.text}): {target} cannot say options; expected them in mixers")
        known = first.setdefault(config.name, (spec.text, config))
        if known[1] != config:
            raise ConfigError(
                f"layer {place} ({spec.text}): {target} cannot tell it from {known[0]!r}, both are {config.name!r}"
            )
        names.append(config.name)
    return names


def _translate(name: str, table: Mapping[str, str], place: int, target: str) -> str:
    if name not in table:
        why = "has one window for all attention, outside the string" if name == "swa" else "has no such layer"
        raise ConfigError(f"layer {place} ({name}): {target} {why}; expected {', '.join(sorted(table))}")
    return table[name]


def _symbols() -> str:
    return ", ".join(map(repr, _FROM_SYMBOL))
