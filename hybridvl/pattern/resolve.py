"""From what a pattern says to mixer configurations: names looked up, options merged and checked, mistakes located."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from hybridvl.layers import MIXERS, ConfigError, MixerConfig, mixer_class
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.layers.registry import known_mixers
from hybridvl.layers.validate import fits, spell
from hybridvl.pattern.errors import PatternError, suggest
from hybridvl.pattern.syntax import LayerSpec, MixerSpec


def check_names(source: str, specs: Iterable[LayerSpec], mixers: Mapping[str, Any]) -> None:
    """Raise PatternError for the first mixer that is neither in `mixers` nor registered."""
    named = _mapping(mixers, "mixers")
    for spec in {id(spec): spec for spec in specs}.values():
        for mixer in spec.mixers:
            if mixer.name not in named and not _registered(mixer.name):
                known = sorted({*map(str, named), *known_mixers()})
                problem = f"unknown mixer {mixer.name!r}{suggest(mixer.name, known)} (known: {', '.join(known)})"
                raise PatternError(problem, source, mixer.at)


def resolve(source: str, specs: Iterable[LayerSpec], mixers: Mapping[str, Any], path: str) -> list[MixerConfig]:
    """One configuration per layer; see `Pattern.configs`."""
    named = {name: _named_mixer(name, entry, path) for name, entry in _mapping(mixers, path).items()}
    made: dict[str, MixerConfig] = {}
    layers = []
    for spec in specs:
        if spec.text not in made:
            branches = tuple(_Resolver(source, mixer, named.get(mixer.name)).config() for mixer in spec.mixers)
            made[spec.text] = branches[0] if len(branches) == 1 else ParallelConfig(branches=branches)
        layers.append(made[spec.text])
    return layers


@dataclass(frozen=True)
class _NamedMixer:
    """An entry of `mixers`: its configuration class, its checked options, and its path."""

    cls: type[MixerConfig]
    options: dict[str, Any]
    place: str


@dataclass(frozen=True)
class _Resolver:
    """One mixer of the pattern, and the entry of `mixers` that its name refers to."""

    source: str
    spec: MixerSpec
    named: _NamedMixer | None

    def config(self) -> MixerConfig:
        cls = self.named.cls if self.named else self.registered()
        options = dict(self.named.options) if self.named else {}
        for key, value in self.spec.options.items():
            try:
                options[key] = _checked(cls, key, value, self.spec.name)
            except ConfigError as error:
                raise PatternError(str(error), self.source, self.spec.option_at[key]) from None
        try:
            return cls(**options)
        except ConfigError as error:
            self.locate(str(error), cls, options)

    def registered(self) -> type[MixerConfig]:
        try:
            return mixer_class(self.spec.name)
        except ConfigError as error:
            raise PatternError(str(error), self.source, self.spec.at) from None

    def locate(self, message: str, cls: type[MixerConfig], options: dict[str, Any]) -> NoReturn:
        """Raise the message of a configuration, in which fields are called 'swa.window', at what the user wrote."""
        field = next((key for key in options if message.startswith(f"{cls.name}.{key} ")), None)
        if field in self.spec.options:
            raise PatternError(message, self.source, self.spec.option_at[field])
        if self.named is None or self.spec.options:
            raise PatternError(message, self.source, self.spec.at)
        own = message.removeprefix(cls.name) if field else f": {message}"
        raise ConfigError(f"{self.named.place}{own}")


def _named_mixer(name: str, entry: object, path: str) -> _NamedMixer:
    place = f"{path}.{name}"
    options = dict(_mapping(entry, place))
    kind = options.pop("type", None)
    if kind is None and not _registered(name):
        near = suggest(str(name), known_mixers())
        raise ConfigError(
            f"{place}: no type, and no mixer is registered as {name!r}{near}; "
            f"expected type: with one of {', '.join(known_mixers())}, or an import path"
        )
    if kind is not None and not isinstance(kind, str):
        raise ConfigError(f"{place}.type = {kind!r}: expected the name or import path of a mixer")
    try:
        cls = mixer_class(kind or name)
    except ConfigError as error:
        raise ConfigError(f"{place}.type: {error}") from None
    return _NamedMixer(cls, {key: _checked(cls, key, value, place) for key, value in options.items()}, place)


def _checked(cls: type[MixerConfig], key: object, value: Any, place: str) -> Any:
    """The value in the type of the class's field; ConfigError if there is no such field or it has another type."""
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    if key not in known:
        hint = f"{suggest(str(key), known)} (known: {', '.join(sorted(known))})"
        raise ConfigError(f"{place}.{key}: unknown option{hint}")
    annotation = typing.get_type_hints(cls)[str(key)]
    value = _converted(value, annotation)
    if not fits(value, annotation):
        raise ConfigError(f"{place}.{key} = {value!r}: expected {spell(annotation)}")
    return value


def _converted(value: Any, annotation: Any) -> Any:
    """Sequences as the field wants them (YAML has lists only), and whole numbers as floats where it holds floats."""
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list | tuple):
        return list(value) if typing.get_origin(annotation) is list or annotation is list else tuple(value)
    return value


def _registered(name: str) -> bool:
    return name in MIXERS or name in known_mixers()  # in this order: installed packages take milliseconds to list


def _mapping(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place}: {value!r}; expected a mapping of names to options")
    return value
