"""Work of whole models: a training step, reading a prompt, and decoding a token, of any pattern and size."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybridvl.bench.filling import filled_state, rewinder
from hybridvl.bench.plain import modeling, plain_functions
from hybridvl.bench.qwen2_5_vl import Qwen25TextPeer
from hybridvl.bench.qwen3_next import gated, peer_weights, qwen3_next_peer, start_as_qwen3_next
from hybridvl.bench.sides import TOLERANCES, Results, Side, Work
from hybridvl.layers.errors import ConfigError
from hybridvl.layers.full import FullAttentionConfig
from hybridvl.models.config import ModelConfig
from hybridvl.models.decoder import ModelState
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pattern import parse_pattern
from hybridvl.plan import plan_model
from hybridvl.training.losses.cross_entropy import linear_cross_entropy
from hybridvl.training.optim import OptimizerConfig, build_optimizer

QWEN3_NEXT, QWEN25 = "qwen3-next", "qwen2.5-vl"


@dataclass(frozen=True)
class ModelRequest:
    """Models to measure.

    Attributes:
        config: sizes of every model; its pattern is ours.
        peers: QWEN3_NEXT (training), QWEN25 (inference) or patterns of further models of ours.
        dtype, device: of the weights; training in bfloat16 is autocast over float32 weights.
        batch, tokens: rows and tokens of a training step.
        loss_chunk: tokens whose logits exist at once, in our training steps.
        prefill_chunk: tokens read at once.
        peer_decays: start Gated DeltaNet layers with the decays that Qwen3-Next starts with, up to -21 a token, instead
            of ours; training steps beside that peer alone.
    """

    config: ModelConfig
    peers: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch: int = 1
    tokens: int = 1024
    loss_chunk: int = 1024
    prefill_chunk: int = 1024
    peer_decays: bool = False

    @property
    def dtype_name(self) -> str:
        """Without "torch."."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def pattern(self) -> str:
        """Ours, canonical."""
        return str(parse_pattern(self.config.pattern, self.config.mixers))

    def patterns(self, known: str) -> list[str]:
        """Ours and the peers that are patterns, canonical; `known` is the peer that is a name."""
        texts = [self.config.pattern, *(peer for peer in self.peers if peer != known)]
        found = [str(parse_pattern(text, self.config.mixers)) for text in texts]
        if len(set(found)) < len(found):
            raise ConfigError(f"--peer: {', '.join(found)}; expected patterns that differ")
        return found


def train_work(request: ModelRequest) -> Work:
    """A step of training: forward, loss, backward, AdamW. Of Qwen3-Next logits and gradients must equal ours; with
    it, `full` layers are attention as it has, with an output gate and norms of queries and keys."""
    with_qwen = QWEN3_NEXT in request.peers
    config = gated(request.config) if with_qwen else request.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (request.batch, request.tokens), generator=generator)
    ids = ids.to(request.device)
    sides = []
    for pattern in request.patterns(QWEN3_NEXT):
        model = _build(dataclasses.replace(config, pattern=pattern), request.device, torch.float32)
        if request.peer_decays:
            start_as_qwen3_next(model)
        sides.append(_train_side(pattern, model, ids, request))
        if with_qwen and len(sides) == 1:
            sides.append(_qwen_side(qwen3_next_peer(model), model, ids, request, sides[0].name))
    tokens = request.batch * request.tokens
    flops = 3.0 * tokens * plan_model(config, [request.tokens]).prefill_flops(request.tokens)
    sizes: dict[str, int | str] = {"D": config.width, "mlp": config.mlp_width, "V": config.vocab_size}
    if request.peer_decays:
        sizes["decays "] = QWEN3_NEXT
    return Work(
        name=f"train {request.pattern}",
        sizes={**sizes, "B": request.batch, "T": request.tokens},
        dtype=request.dtype_name,
        direction="training step",
        device=request.device,
        sides=tuple(sides),
        flops=flops,
        tokens=tokens,
        # Two roundings of a whole model's gradients; other work differs by about their norm.
        tolerance=TOLERANCES[request.dtype_name] * (1 if request.dtype == torch.float32 else 6),
    )


def decode_works(request: ModelRequest, contexts: Sequence[int]) -> Iterator[Work]:
    """For every context, one more token after it; the states are filled with noise (`filled_state`)."""
    models, peer = inference_models(request)
    token = torch.zeros(1, 1, dtype=torch.int64, device=request.device)
    for context in contexts:
        sides = []
        for pattern, model in models.items():
            state = filled_state(model, context)
            side = Side(
                pattern,
                _step(model, token, state),
                before=rewinder(state, tokens=1),
                weight_bytes=weight_bytes(model),
                state_bytes=state.nbytes,
            )
            sides.append(side)
            if peer is not None and model is peer[1]:
                cache = peer[0].cache(state, context)
                run, before = _peer_step(peer[0], token, cache), peer[0].rewinder(cache)
                sides.append(peer_side(side, run, before, peer[0].cache_bytes(context)))
            del state
        first = next(iter(models.values()))
        plan = plan_model(first.config, [context], request.dtype)
        yield Work(
            name=f"decode {request.pattern}",
            sizes={"D": request.config.width, "T": context},
            dtype=request.dtype_name,
            direction="decode",
            device=request.device,
            sides=tuple(sides),
            flops=float(plan.decode_flops(context)),
            nbytes=weight_bytes(first) + plan.state_bytes(context),
            tokens=1,
            tolerance=TOLERANCES[request.dtype_name],
        )


def prefill_works(request: ModelRequest, lengths: Sequence[int]) -> Iterator[Work]:
    """For every length, reading so many tokens in chunks from an empty state, and the logits after the last."""
    models, peer = inference_models(request)
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        ids = torch.randint(0, request.config.vocab_size, (1, length), generator=generator).to(request.device)
        chunks = ids.split(request.prefill_chunk, dim=1)
        sides = []
        plans = [plan_model(model.config, [length], request.dtype) for model in models.values()]
        for (pattern, model), plan in zip(models.items(), plans, strict=True):
            side = Side(
                pattern,
                _reading(model, chunks),
                weight_bytes=weight_bytes(model),
                state_bytes=plan.state_bytes(length),
            )
            sides.append(side)
            if peer is not None and model is peer[1]:
                sides.append(peer_side(side, _peer_reading(peer[0], chunks), None, peer[0].cache_bytes(length)))
        plan = plans[0]
        head = plan.head_flops * (length - 1)  # only the last token's logits are made
        yield Work(
            name=f"prefill {request.pattern}",
            sizes={"D": request.config.width, "T": length, "chunk": request.prefill_chunk},
            dtype=request.dtype_name,
            direction="prefill",
            device=request.device,
            sides=tuple(sides),
            flops=plan.prefill_flops(length) * length - head,
            tokens=length,
            tolerance=TOLERANCES[request.dtype_name],
        )


def peer_side(
    ours: Side,
    run: Callable[[], Results],
    before: Callable[[], None] | None,
    cache_bytes: int,
    check: Callable[[], Results] | None = None,
) -> Side:
    """The side QWEN25, which has the weights of a side of ours and must have its results."""
    return Side(QWEN25, run, check, ours.name, before, ours.weight_bytes, cache_bytes)


def weight_bytes(model: VisionLanguageModel) -> int:
    """Bytes of a model's parameters; tied ones count once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _build(config: ModelConfig, device: str, dtype: torch.dtype) -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(config).to(device, dtype)


def inference_models(
    request: ModelRequest,
) -> tuple[dict[str, VisionLanguageModel], tuple[Qwen25TextPeer, VisionLanguageModel] | None]:
    """Our models by pattern, and the peer QWEN25, if asked for, with the model of ours whose weights it has."""
    # Weights large enough that every layer shows in the logits.
    config = dataclasses.replace(request.config, init_std=0.7 * request.config.width**-0.5)
    models = {
        pattern: _build(dataclasses.replace(config, pattern=pattern), request.device, request.dtype).eval()
        for pattern in request.patterns(QWEN25)
    }
    if QWEN25 not in request.peers:
        return models, None
    same = [m for m in models.values() if all(isinstance(mixer, FullAttentionConfig) for mixer in m.mixer_configs)]
    if not same:
        raise ConfigError(f"--peer {QWEN25}: expected a pattern of full layers too, whose results it must have: full*N")
    return models, (Qwen25TextPeer(same[0]), same[0])


def _autocast(request: ModelRequest) -> contextlib.AbstractContextManager[object]:
    kind = torch.device(request.device).type
    return torch.autocast(kind, dtype=request.dtype, enabled=request.dtype != torch.float32)


def _train_side(name: str, model: VisionLanguageModel, ids: Tensor, request: ModelRequest) -> Side:
    optimizer = build_optimizer(model, OptimizerConfig())

    def backward() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(request):
            hidden = model.hidden(ids)[:, :-1].flatten(0, 1)
            loss = linear_cross_entropy(hidden, model.lm_head_weight, ids[:, 1:].flatten(), request.loss_chunk).loss
        loss.backward()
        return loss.detach()

    def check() -> Results:
        loss = backward()
        named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        with torch.no_grad(), _autocast(request):
            logits = model(ids[:1]).logits.float()
        gradients = peer_weights(model, named, gradients=True) if QWEN3_NEXT in request.peers else named
        optimizer.zero_grad(set_to_none=True)
        return {"logits": logits, "loss": loss, "gradients": _joined(gradients)}

    return Side(name, _stepping(backward, optimizer), check)


def _qwen_side(peer: nn.Module, model: VisionLanguageModel, ids: Tensor, request: ModelRequest, same_as: str) -> Side:
    module = modeling("qwen3_next")
    optimizer = build_optimizer(peer, OptimizerConfig())

    def backward() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with plain_functions(module, request.device), _autocast(request):
            loss: Tensor = peer(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        return loss.detach()

    def check() -> Results:
        loss = backward()
        named = {name: parameter.grad for name, parameter in peer.named_parameters() if parameter.grad is not None}
        with torch.no_grad(), plain_functions(module, request.device), _autocast(request):
            logits = peer(input_ids=ids[:1], use_cache=False).logits.float()
        optimizer.zero_grad(set_to_none=True)
        return {"logits": logits, "loss": loss, "gradients": _joined(named)}

    return Side(QWEN3_NEXT, _stepping(backward, optimizer), check, same_as)


def _stepping(backward: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], Results]:
    def run() -> Results:
        loss = backward()
        optimizer.step()
        return {"loss": loss}

    return run


def _joined(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([named[name].float().flatten() for name in sorted(named)])


def _step(model: VisionLanguageModel, token: Tensor, state: ModelState) -> Callable[[], Results]:
    @torch.no_grad()
    def run() -> Results:
        return {"logits": model(token, state=state).logits}

    return run


def _peer_step(peer: Qwen25TextPeer, token: Tensor, cache: object) -> Callable[[], Results]:
    @torch.no_grad()
    def run() -> Results:
        return {"logits": peer.logits(token, cache)}

    return run


def _reading(model: VisionLanguageModel, chunks: Sequence[Tensor]) -> Callable[[], Results]:
    @torch.no_grad()
    def run() -> Results:
        state = model.init_state(1)
        for chunk in chunks:
            hidden = model.hidden(chunk, state=state)
        return {"logits": nn.functional.linear(hidden[:, -1:], model.lm_head_weight)}

    return run


def _peer_reading(peer: Qwen25TextPeer, chunks: Sequence[Tensor]) -> Callable[[], Results]:
    @torch.no_grad()
    def run() -> Results:
        cache = peer.empty_cache()
        for chunk in chunks:
            logits = peer.logits(chunk, cache)
        return {"logits": logits}

    return run
