"""Measures a machine once, layer by layer, so that the time of any pattern can be predicted from it."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn

from hybridvl.bench.filling import fill_layer, filled_state
from hybridvl.bench.machine import cache_size, describe, measure_limits, overhead
from hybridvl.bench.sides import Results
from hybridvl.bench.sizes import model_config
from hybridvl.bench.timing import Timer, timer
from hybridvl.layers import MIXERS, ConfigError, MixerConfig
from hybridvl.layers import Sequence as Tokens
from hybridvl.layers.norms import RMSNorm
from hybridvl.layers.ops.rotary import rotary_table
from hybridvl.models.block import Block, SwiGLU
from hybridvl.models.config import ModelConfig
from hybridvl.models.decoder import ModelState
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pattern import parse_pattern
from hybridvl.plan.prediction import CACHED, MODES, Calibration, Pass, mixer_features, mlp_features
from hybridvl.training.losses.cross_entropy import linear_cross_entropy
from hybridvl.training.optim import OptimizerConfig, build_optimizer

_WIDTHS = (256, 640)
_PASSES = (
    *(Pass("train", 1, 256), Pass("train", 1, 1024), Pass("train", 4, 256)),
    *(Pass("prefill", 1, 256, 0), Pass("prefill", 1, 1024, 0), Pass("prefill", 1, 512, 1536)),
    *(Pass("decode", 1, 1, 256), Pass("decode", 1, 1, 4096)),
    *(Pass(CACHED, 1, 1, 256), Pass(CACHED, 1, 1, 4096)),
)
_MLPS = ((256, 1024), (640, 1792), (1024, 2816))  # width, hidden width; the last one does not fit into a cache
_HEADS = ((256, 2048, 512), (256, 8192, 1024), (640, 4096, 512), (128, 16384, 256))  # width, vocabulary, tokens
_WINDOW = 512  # of `swa` here: less than the longest passes, so that they see the ring turn
_LEAST_BYTES = 64 << 20  # of weights that decoding goes through in turn: in a model they come from memory
_MOST_COPIES = 24
_TOLERANCE = 0.8
_HELD_OUT = (
    ("(swa gdn*3)", 384, 1024, 4096),
    ("full mamba2 gdn swa", 320, 768, 8192),
    ("gdn*2 full*2", 512, 1408, 2048),
    ("swa+mamba2 gdn", 448, 1152, 4096),
)  # pattern, width, MLP, vocabulary
_HELD_OUT_SIZES = 2, 384, 1536, 2048  # rows and tokens of a training step, tokens of a prompt, context of a token

Progress = Callable[[str], None]


class Calibrator:
    """Measures on one device in one dtype; training in bfloat16 is autocast over float32 weights."""

    def __init__(
        self, dtype: torch.dtype, device: str = "cpu", measure: Timer | None = None, progress: Progress | None = None
    ) -> None:
        self.dtype, self.device = dtype, device
        self._measure = measure or timer(device)
        self._say = progress or (lambda text: None)

    def run(self) -> Calibration:
        """All of it."""
        about = {**describe(self.device), "dtype": str(self.dtype).removeprefix("torch.")}
        limits = self._limits()
        rates = {name: self._mixer(name, limits) for name in MIXERS if _configured(name, _WIDTHS[0]) is not None}
        rates |= {"mlp": self._mlp(limits), **self._parts(), "call": {"decode": [self._call()]}}
        found = Calibration(about, limits, rates, {}, [])
        held_out = [row for case in _HELD_OUT for row in self._hold_out(found, *case)]
        errors = {
            mode: statistics.median(
                abs(row["predicted"] / row["measured"] - 1) for row in held_out if row["mode"] == mode
            )
            for mode in MODES
        }
        return Calibration(about, limits, rates, errors, held_out)

    def seconds(self, run: Callable[[], object], repeats: int = 3) -> float:
        """The shortest of a few runs after a first: other work on the machine only ever adds."""

        def work() -> Results:
            run()
            return {}

        first = self._measure(work, 1)
        more = [self._measure(work, max(1, math.ceil(2e-3 / max(first, 1e-9)))) for _ in range(repeats)]
        return min(more)

    def _limits(self) -> dict[str, float]:
        self._say("matrix products and memory")
        found = measure_limits(self.dtype, self.device, self._measure)
        limits = {"copy_bytes": found.copy_bytes, "inplace_bytes": found.inplace_bytes, "overhead": overhead()}
        limits["cache_bytes"] = cache_size(self.device)
        for size in (64, 256, 1024):
            a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
            limits[f"matmul_{size}"] = 2 * size**3 / self.seconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        return limits

    def _mixer(self, name: str, limits: dict[str, float]) -> dict[str, list[float]]:
        found: dict[str, list[tuple[tuple[float, ...], float]]] = {}
        for width in _WIDTHS:
            config = _configured(name, width)
            assert config is not None
            for given in _PASSES:
                self._say(f"{name} of width {width}: {given.mode}")
                seconds = self._layer_seconds(lambda width=width, config=config: Block(config, width, 0, 1e-6), given)  # type: ignore[misc]
                found.setdefault(given.mode, []).append((mixer_features(config, width, given, self.dtype), seconds))
        return {mode: fit(points, _least(mode, limits)) for mode, points in found.items()}

    def _mlp(self, limits: dict[str, float]) -> dict[str, list[float]]:
        found: dict[str, list[tuple[tuple[float, ...], float]]] = {}
        for width, hidden in _MLPS:
            for given in _PASSES:
                if given.mode == CACHED and (width, hidden) == _MLPS[-1]:
                    continue
                self._say(f"MLP of width {width}: {given.mode}")
                seconds = self._layer_seconds(lambda width=width, hidden=hidden: _Mlp(width, hidden), given)  # type: ignore[misc]
                found.setdefault(given.mode, []).append((mlp_features(width, hidden, given, self.dtype), seconds))
        return {mode: fit(points, _least(mode, limits)) for mode, points in found.items()}

    def _layer_seconds(self, build: Callable[[], nn.Module], given: Pass) -> float:
        torch.manual_seed(0)
        dtype = torch.float32 if given.mode == "train" else self.dtype
        first = build().to(self.device, dtype)
        width = next(parameter.shape[0] for name, parameter in first.named_parameters() if "norm" in name)
        x = torch.randn(given.rows, given.tokens, width, device=self.device, dtype=dtype)
        if given.mode == "train":
            return self.seconds(self._trained(first, x.requires_grad_()))
        copies = [first]
        if given.mode == "decode":
            size = sum(parameter.nbytes for parameter in first.parameters())
            wanted = min(_MOST_COPIES, math.ceil(_LEAST_BYTES / size))
            copies += [build().to(self.device, dtype) for _ in range(wanted - 1)]
        return self.seconds(self._continued(copies, x, given)) / len(copies)

    def _trained(self, layer: nn.Module, x: Tensor) -> Callable[[], object]:
        parameters = list(layer.parameters())
        sequence = _sequence(layer, x, 0)
        cotangent = torch.randn_like(x)

        def run() -> object:
            with self._autocast():
                y = layer(x, sequence)
            return torch.autograd.grad(y, [x, *parameters], cotangent.to(y.dtype))

        return run

    def _continued(self, layers: Sequence[nn.Module], x: Tensor, given: Pass) -> Callable[[], object]:
        """Every layer on x, each time from a state of the same context (decoding moves it on by a token)."""
        generator = torch.Generator().manual_seed(0)
        sequence = _sequence(layers[0], x, given.context)
        states = [layer.mixer.init_state(given.rows) if isinstance(layer, Block) else None for layer in layers]
        for state in states:
            if state is not None and given.context:
                fill_layer(state, given.context, generator)

        def run() -> object:
            y = x
            with torch.no_grad():
                for layer, state in zip(layers, states, strict=True):
                    own = state.clone() if state is not None and given.mode == "prefill" else state
                    y = layer(x, sequence, own)
            return y

        return run

    def _parts(self) -> dict[str, dict[str, list[float]]]:
        """The embedding, the head with its loss, and the optimizer."""
        found: dict[str, list[tuple[tuple[float, ...], float]]] = {name: [] for name in ("embedding", "head", "adam")}
        alone, cached = [], []
        for width, vocab, tokens in _HEADS:
            self._say(f"head of {vocab} tokens")
            table = nn.Embedding(vocab, width).to(self.device)
            ids = torch.randint(0, vocab, (tokens,), device=self.device)
            hidden = torch.randn(tokens, width, device=self.device, requires_grad=True)
            seconds = self.seconds(lambda t=table, i=ids: torch.autograd.grad(t(i).sum(), t.weight))  # type: ignore[misc]
            found["embedding"].append(((1.0, tokens * width, vocab * width), seconds))
            seconds = self.seconds(lambda t=table, i=ids, h=hidden: self._loss(h, t.weight, i))  # type: ignore[misc]
            found["head"].append(((1.0, tokens * width * vocab, tokens * vocab), seconds))
            copies = min(_MOST_COPIES, math.ceil(_LEAST_BYTES / (vocab * width * self.dtype.itemsize)))
            weights = [table.weight.detach().to(self.dtype, copy=True) for _ in range(copies)]
            one = hidden.detach()[:1].to(self.dtype)
            seconds = self.seconds(lambda ws=weights, o=one: [nn.functional.linear(o, w) for w in ws])  # type: ignore[misc]
            alone.append(((1.0, float(vocab * width)), seconds / copies))
            seconds = self.seconds(lambda w=weights[0], o=one: nn.functional.linear(o, w))  # type: ignore[misc]
            cached.append(((1.0, float(vocab * width)), seconds))
        for width in (256, 1024):
            layer = nn.Sequential(*(nn.Linear(width, width) for _ in range(4))).to(self.device)
            optimizer = build_optimizer(layer, OptimizerConfig())
            for parameter in layer.parameters():
                parameter.grad = torch.randn_like(parameter)
            params = sum(parameter.numel() for parameter in layer.parameters())
            found["adam"].append(((1.0, float(params)), self.seconds(optimizer.step)))
        return {
            "embedding": {"train": fit(found["embedding"])},
            "head": {"train": fit(found["head"]), "decode": fit(alone), CACHED: fit(cached)},
            "optimizer": {"train": fit(found["adam"])},
        }

    def _call(self) -> float:
        """What a call of a model costs beside its layers: embedding, positions, norm, counters."""
        self._say("a call")
        config = model_config("full", 64, 0, 16)
        model = VisionLanguageModel(config).to(self.device, self.dtype).eval()
        state, token = filled_state(model, 256), torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        whole = self.seconds(lambda: _decode(model, token, state), repeats=5)
        layer = self._layer_seconds(lambda: Block(model.mixer_configs[0], 64, 0, 1e-6), Pass("decode", 1, 1, 256))
        return max(whole - layer, 0.0)

    def _loss(self, hidden: Tensor, weight: Tensor, ids: Tensor) -> object:
        with self._autocast():
            loss = linear_cross_entropy(hidden, weight, ids).loss
        return torch.autograd.grad(loss, [hidden, weight])

    def _hold_out(
        self, calibration: Calibration, pattern: str, width: int, hidden: int, vocab: int
    ) -> Iterator[dict[str, Any]]:
        """Whole models of patterns and sizes that no rate was fitted to, measured and predicted."""
        self._say(f"held out: {pattern}")
        config = model_config(pattern, width, hidden, vocab, {"swa": {"window": _WINDOW}})
        torch.manual_seed(0)
        model = VisionLanguageModel(config).to(self.device)
        rows, tokens, prompt, context = _HELD_OUT_SIZES
        measured = {"train": self.seconds(self._training(model, rows, tokens), repeats=2)}
        model = model.to(self.dtype).eval()
        ids = torch.zeros(1, prompt, dtype=torch.int64, device=self.device)
        measured["prefill"] = self.seconds(lambda: _read(model, ids), repeats=2)
        state = filled_state(model, context)
        measured["decode"] = self.seconds(lambda: _decode(model, ids[:, :1], state))
        predicted = {
            "train": calibration.train_seconds(config, rows, tokens),
            "prefill": calibration.prefill_seconds(config, prompt),
            "decode": calibration.decode_seconds(config, context),
        }
        for mode in MODES:
            sizes = {"pattern": pattern, "width": width, "mlp_width": hidden, "vocab_size": vocab}
            yield {**sizes, "mode": mode, "measured": measured[mode], "predicted": predicted[mode]}

    def _training(self, model: VisionLanguageModel, rows: int, tokens: int) -> Callable[[], object]:
        optimizer = build_optimizer(model, OptimizerConfig())
        ids = torch.randint(0, model.config.vocab_size, (rows, tokens), device=self.device)

        def run() -> object:
            optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                hidden = model.hidden(ids)[:, :-1].flatten(0, 1)
                loss = linear_cross_entropy(hidden, model.lm_head_weight, ids[:, 1:].flatten()).loss
            loss.backward()
            return optimizer.step()

        return run

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=self.dtype, enabled=self.dtype != torch.float32)


class _Mlp(nn.Module):
    """The MLP half of a block, called as a block is."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.mlp = RMSNorm(width), SwiGLU(width, hidden)

    def forward(self, x: Tensor, sequence: Tokens, state: None = None) -> Tensor:
        return x + self.mlp(self.norm(x))


def fit(points: Iterable[tuple[tuple[float, ...], float]], least: float = 0.0) -> list[float]:
    """Rates by least squares of relative errors over (features, seconds): none negative, the second at least `least`.

    The second feature, products or bytes of weights, has a rate that the machine cannot beat. Where another feature
    grows with it, as in the few sizes that are measured, it would else be left out, and larger models misjudged.
    """
    features, seconds = zip(*points, strict=True)
    scaled = np.array(features, dtype=np.float64) / np.array(seconds)[:, None]
    floor = np.zeros(scaled.shape[1])
    if scaled.shape[1] > 1:
        floor[1] = least
    size = np.abs(scaled).max(axis=0)
    size[size == 0] = 1.0
    model = LinearRegression(positive=True, fit_intercept=False).fit(scaled / size, 1 - scaled @ floor)
    return [float(rate) for rate in model.coef_ / size + floor]


def _least(mode: str, limits: dict[str, float]) -> float:
    """Seconds per FLOP of a projection, or per byte of weights, at the best rate measured and some tolerance."""
    if mode == CACHED:
        return 0.0
    if mode == "decode":
        return _TOLERANCE / max(limits["copy_bytes"], limits["inplace_bytes"])
    best = max(rate for name, rate in limits.items() if name.startswith("matmul"))
    return _TOLERANCE * (3 if mode == "train" else 1) / best


def _configured(name: str, width: int) -> MixerConfig | None:
    """A mixer with sizes that fit the width; None for one whose defaults do not."""
    config: ModelConfig = model_config(name, width, 0, 16, {"swa": {"window": _WINDOW}})
    try:
        (mixer,) = parse_pattern(name, config.mixers).configs(config.mixers)
        mixer.num_params(width)
    except ConfigError:
        return None
    return mixer


def _sequence(layer: nn.Module, x: Tensor, start: int) -> Tokens:
    if not isinstance(layer, Block):
        return Tokens()
    positions = torch.arange(start, start + x.shape[1], device=x.device).expand(x.shape[0], -1)
    dims = layer.mixer.config.rotary_dims  # type: ignore[union-attr]
    return Tokens(rotary={dim: rotary_table(positions, dim, dtype=x.dtype) for dim in dims})  # type: ignore[union-attr]


@torch.no_grad()
def _read(model: VisionLanguageModel, ids: Tensor) -> object:
    state = model.init_state(1)
    for chunk in ids.split(1024, dim=1):
        hidden = model.hidden(chunk, state=state)
    return nn.functional.linear(hidden[:, -1:], model.lm_head_weight)


@torch.no_grad()
def _decode(model: VisionLanguageModel, token: Tensor, state: ModelState) -> object:
    return model(token, state=state).logits
