"""Times of training steps, prompts and decoded tokens, predicted for any pattern from a machine's calibration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybridvl.layers import ConfigError, MixerConfig
from hybridvl.layers.parallel import ParallelConfig
from hybridvl.models.config import ModelConfig
from hybridvl.pattern import parse_pattern

MODES = ("train", "prefill", "decode")
CACHED = "cached"
"""The mode of a decoded token where all that it reads stays in the processor's cache; "decode" is from memory."""
PREFILL_CHUNK = 1024
_VERSION = 1


@dataclass(frozen=True)
class Pass:
    """What a layer is run on.

    Attributes:
        mode: "train" (forward and backward), "prefill" (a chunk, with a state), "decode" or CACHED (one token, with a
            state).
        rows, tokens: of the input. context: tokens that the state has seen.
    """

    mode: str
    rows: int = 1
    tokens: int = 1
    context: int = 0


@dataclass(frozen=True)
class Calibration:
    """What was measured of a machine.

    Attributes:
        about: dtype, device, threads, hardware, versions and date.
        limits: FLOP/s of matrix products by size, bytes/s, seconds of a small operation.
        rates: kind of layer or part -> mode -> seconds per unit of every feature (`mixer_features`, `part_features`).
        errors: mode -> median absolute relative error of the predictions for patterns that were held out.
        held_out: those patterns with their measured and predicted seconds.
    """

    about: dict[str, Any]
    limits: dict[str, float]
    rates: dict[str, dict[str, list[float]]]
    errors: dict[str, float]
    held_out: list[dict[str, Any]]

    def train_seconds(self, config: ModelConfig, rows: int, tokens: int) -> float:
        """A step on rows x tokens: forward, loss, backward, AdamW; the vision tower aside."""
        total = self._layers(config, Pass("train", rows, tokens))
        params = _parameters(config)
        count = rows * tokens
        for part, sizes in (
            ("embedding", (count * config.width, config.vocab_size * config.width)),
            ("head", (count * config.width * config.vocab_size, count * config.vocab_size)),
            ("optimizer", (params,)),
        ):
            total += _dot(self._rates(part, "train"), (1.0, *sizes))
        return total

    def prefill_seconds(self, config: ModelConfig, tokens: int, chunk: int = PREFILL_CHUNK) -> float:
        """Reading a prompt of one row in chunks, with the logits after its last token."""
        total = self._head_of_a_token(config) + self._rates("call", "decode")[0] * -(-tokens // chunk)
        for start in range(0, tokens, chunk):
            total += self._layers(config, Pass("prefill", 1, min(chunk, tokens - start), start))
        return total

    def decode_seconds(self, config: ModelConfig, context: int) -> float:
        """One more token of one row after `context` tokens, with its logits.

        Between the rates for a model that stays in the cache and for one that is read from memory, by its size.
        """
        streamed = self._streamed(config, context)
        total = self._rates("call", "decode")[0]
        for mode, share in (("decode", streamed), (CACHED, 1 - streamed)):
            if share:
                total += share * (self._layers(config, Pass(mode, 1, 1, context)) + self._head_of_a_token(config, mode))
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"version": _VERSION, **dataclasses.asdict(self)}

    def save(self, path: Path) -> None:
        """Write the calibration, its folder made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def _layers(self, config: ModelConfig, given: Pass) -> float:
        pattern = parse_pattern(config.pattern, config.mixers)
        dtype = getattr(torch, self.about["dtype"])
        known: dict[str, float] = {}
        total = 0.0
        for text, mixer in zip(pattern.layers, pattern.configs(config.mixers), strict=True):
            if text not in known:
                known[text] = self._layer(mixer, config, given, dtype)
            total += known[text]
        return total

    def _layer(self, mixer: MixerConfig, config: ModelConfig, given: Pass, dtype: torch.dtype) -> float:
        seconds = 0.0
        for branch in mixer.branches if isinstance(mixer, ParallelConfig) else (mixer,):
            rates = self._rates(branch.name, given.mode)
            seconds += _dot(rates, mixer_features(branch, config.width, given, dtype))
        if config.mlp_width:
            features = mlp_features(config.width, config.mlp_width, given, dtype)
            seconds += _dot(self._rates("mlp", given.mode), features)
        return seconds

    def _head_of_a_token(self, config: ModelConfig, mode: str = "decode") -> float:
        return _dot(self._rates("head", mode), (1.0, config.vocab_size * config.width))

    def _streamed(self, config: ModelConfig, context: int) -> float:
        """From 0 where weights and state take half of the cache to 1 where they take more than all of it."""
        cache = self.limits.get("cache_bytes", 0.0)
        if not cache:
            return 1.0
        dtype = getattr(torch, self.about["dtype"])
        mixers = parse_pattern(config.pattern, config.mixers).configs(config.mixers)
        state = sum(mixer.state_bytes(context, dtype, config.width) for mixer in mixers)
        return min(max(2 * (_parameters(config) * dtype.itemsize + state) / cache - 1, 0.0), 1.0)

    def _rates(self, kind: str, mode: str) -> list[float]:
        """A kind that was not measured, such as a mixer registered since, has the mean of the mixers that were."""
        if kind in self.rates:
            return self.rates[kind][mode]
        known = [rates[mode] for name, rates in self.rates.items() if name not in PARTS]
        return [sum(column) / len(known) for column in zip(*known, strict=True)]


PARTS = ("mlp", "embedding", "head", "optimizer", "call")
"""Kinds that are no mixers."""


def load_calibration(path: Path) -> Calibration:
    """The calibration in a file; ConfigError when it is none, or of another version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("version") != _VERSION:
            raise ConfigError(f"{path}: a calibration of another version; expected one of version {_VERSION}")
        return Calibration(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: not a calibration ({error}); expected one that plan --calibrate wrote") from error


def mixer_features(mixer: MixerConfig, width: int, given: Pass, dtype: torch.dtype) -> tuple[float, ...]:
    """What the time of a mixer is taken to be linear in: 1, FLOPs of its projections, of its operator, numbers that it
    passes on, bytes of its state; when it decodes: 1, bytes of its weights and of its state."""
    params = mixer.num_params(width)
    state = given.rows * mixer.state_bytes(given.context + given.tokens, dtype, width)
    if given.mode in ("decode", CACHED):
        return 1.0, float(params * dtype.itemsize), float(state)
    tokens = given.rows * given.tokens
    products = 2.0 * tokens * params
    operator = max(given.rows * mixer.flops(width, given.tokens, given.context) - products, 0.0)
    numbers = tokens * (width + params / width)
    return 1.0, products, operator, numbers, float(state) if given.mode == "prefill" else 0.0


def mlp_features(width: int, hidden: int, given: Pass, dtype: torch.dtype) -> tuple[float, ...]:
    """The same for an MLP: 1, FLOPs, numbers; when it decodes: 1, bytes of its weights."""
    params = 3 * width * hidden
    if given.mode in ("decode", CACHED):
        return 1.0, float(params * dtype.itemsize)
    tokens = given.rows * given.tokens
    return 1.0, 2.0 * tokens * params, float(tokens * (width + 3 * hidden))


def _parameters(config: ModelConfig) -> int:
    """Trainable parameters of the decoder."""
    pattern = parse_pattern(config.pattern, config.mixers)
    mixers = sum(mixer.num_params(config.width) for mixer in pattern.configs(config.mixers))
    embeddings = config.vocab_size * config.width * (1 if config.tie_embeddings else 2)
    return mixers + 3 * config.width * config.mlp_width * len(pattern) + embeddings


def _dot(rates: list[float], features: tuple[float, ...]) -> float:
    return sum(rate * feature for rate, feature in zip(rates, features, strict=True))


def predictions(
    calibration: Calibration, config: ModelConfig, contexts: tuple[int, ...], rows: int, tokens: int
) -> dict[str, Any]:
    """Seconds of a training step, and by number of tokens of a prompt and of a token after it."""
    return {
        "train_step": calibration.train_seconds(config, rows, tokens),
        "train_rows": rows,
        "train_tokens": tokens,
        "prefill": {str(context): calibration.prefill_seconds(config, context) for context in contexts},
        "decode": {str(context): calibration.decode_seconds(config, context) for context in contexts},
    }


def same_machine(calibration: Calibration, about: Mapping[str, Any]) -> bool:
    """Whether it was measured on such a machine, with as many threads, in the dtype, with these versions."""
    keys = ("dtype", "device", "cpu", "threads", "versions", "gpu")
    return all(calibration.about.get(key) == about.get(key) for key in keys)
