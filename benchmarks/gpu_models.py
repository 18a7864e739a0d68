"""What `gpu_check.py` measures of whole models with random weights: decoding, frames, prefill and a training step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvl.bench.filling import filled_state
from hybridvl.bench.timing import timer
from hybridvl.models.config import ModelConfig, VisionConfig
from hybridvl.models.decoder import ModelState
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.losses.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class ModelSizes:
    """What is measured; the defaults are InfiniteVL-4B's and the goals of its figures."""

    config: ModelConfig
    contexts: tuple[int, ...] = (1024, 32768, 262144)
    grid: int = 32  # patches a side of a frame
    prompt: int = 32768
    chunk: int = 4096
    training: int = 8192
    parameters: int | None = 4_408_381_536

    @classmethod
    def infinitevl(cls) -> ModelSizes:
        """4.4 B parameters."""
        return cls(ModelConfig(vision=VisionConfig()))

    @classmethod
    def tiny(cls) -> ModelSizes:
        """For a CPU."""
        vision = VisionConfig(depth=2, width=32, heads=2, mlp_width=32, full_attention_blocks=(1,))
        mixers = {
            "swa": {"heads": 2, "kv_heads": 1, "head_dim": 16, "window": 40},
            "gdn": {"heads": 2, "head_dim": 16},
        }
        config = ModelConfig(
            pattern="swa gdn*3", mixers=mixers, width=32, mlp_width=48, vocab_size=151936, vision=vision
        )
        return cls(config, (16, 100), 8, 96, 32, 64, None)


def measured_model(sizes: ModelSizes, device: str, dtype: torch.dtype) -> VisionLanguageModel:
    """The model that everything is measured of."""
    model = build(sizes.config, device, dtype)
    if sizes.parameters is not None and model.num_params != sizes.parameters:
        raise RuntimeError(f"the model has {model.num_params} parameters, expected {sizes.parameters}")
    return model


def measure_models(model: VisionLanguageModel, sizes: ModelSizes, clock: Clock, peak: float) -> list[dict[str, Any]]:
    """Records of every figure; peak: FLOP/s of matrix products, for the utilisation. The last one leaves the model in
    training mode."""
    records = [decode_record(model, context, clock) for context in sizes.contexts]
    records += [frame_record(model, sizes, clock), prefill_record(model, sizes, clock, peak)]
    records.append(training_record(model, sizes, clock, peak))
    return records


def build(config: ModelConfig, device: str, dtype: torch.dtype) -> VisionLanguageModel:
    """Random weights, made where they will be."""
    with torch.device(device):
        return VisionLanguageModel(config).to(dtype).eval()


class Clock:
    """Medians of rounds, after a warm-up."""

    def __init__(self, device: str, rounds: int) -> None:
        self.measure, self.rounds, self.is_cuda = timer(device), rounds, torch.device(device).type == "cuda"

    def __call__(self, run: Callable[[], object], repeats: int = 1) -> dict[str, float]:
        def work() -> dict[str, Tensor]:
            run()
            return {}

        self.measure(work, 2)
        seconds = [self.measure(work, repeats) for _ in range(self.rounds)]
        return {"median_s": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds)}


@torch.no_grad()
def decode_record(model: VisionLanguageModel, context: int, clock: Clock) -> dict[str, Any]:
    """One greedy token after another, one row, in a CUDA graph where it can be captured."""
    state = filled_state(model, context)
    token = torch.ones(1, 1, dtype=torch.int64, device=model.lm_head_weight.device)

    def step() -> None:
        embeds = model.decoder.embed_tokens(token)
        hidden = model.run_decoder(embeds, state.next_position.expand(3, 1, 1), state=state)
        token.copy_(F.linear(hidden, model.lm_head_weight).argmax(-1))

    run, how = captured(step) if clock.is_cuda else (step, "eager")
    found = clock(run, 10 if clock.is_cuda else 1)
    weights = sum(p.nbytes for p in model.decoder.parameters())
    return {"figure": f"decode a token at {context} tokens", **found, "how": how, "weight_bytes": weights,
            "bytes_per_s": (weights + state.nbytes) / found["median_s"]}  # fmt: skip


@torch.no_grad()
def frame_record(model: VisionLanguageModel, sizes: ModelSizes, clock: Clock) -> dict[str, Any]:
    """A frame's patches through the vision tower, its tokens through the decoder, behind a full window."""
    assert model.config.vision is not None
    vision, weight = model.config.vision, model.lm_head_weight
    grid, side = torch.tensor([[1, sizes.grid, sizes.grid]]), sizes.grid // vision.spatial_merge_size
    pixels = torch.randn(sizes.grid**2, vision.patch_dim, device=weight.device).to(weight.dtype)
    state = filled_state(model, sizes.prompt)
    row, column = torch.meshgrid(*2 * [torch.arange(side)], indexing="ij")
    places = torch.stack([torch.zeros_like(row), row, column]).flatten(1)[:, None].to(weight.device)  # (3, 1, tokens)

    def run() -> None:
        features = model.encode_images(pixels, grid)
        model.run_decoder(features[None], places + state.next_position[:, None], state=state)

    found = clock(run)
    return {"figure": f"a frame of {side * side} tokens", **found, "frames_per_s": 1 / found["median_s"]}


@torch.no_grad()
def prefill_record(model: VisionLanguageModel, sizes: ModelSizes, clock: Clock, peak: float) -> dict[str, Any]:
    """A prompt in chunks; the head for its last token."""
    device = model.lm_head_weight.device
    ids = torch.randint(0, 1000, (1, sizes.prompt), device=device)
    positions = torch.arange(sizes.prompt, device=device).expand(3, 1, -1)
    state: ModelState = model.init_state(1)

    def run() -> None:
        state.reset()
        for start in range(0, sizes.prompt, sizes.chunk):
            part = slice(start, start + sizes.chunk)
            hidden = model.run_decoder(model.decoder.embed_tokens(ids[:, part]), positions[:, :, part], state=state)
        F.linear(hidden[:, -1], model.lm_head_weight)

    found = clock(run)
    flops = decoder_flops(model, sizes.prompt)
    return {"figure": f"prefill of {sizes.prompt} tokens", **found, "flops": flops,
            "utilisation": flops / found["median_s"] / peak}  # fmt: skip


def training_record(model: VisionLanguageModel, sizes: ModelSizes, clock: Clock, peak: float) -> dict[str, Any]:
    """Forward and backward of the decoder with its loss, layers recomputed; recomputation does not count as work."""
    model.train()
    model.decoder.activation_checkpointing = True
    device, tokens = model.lm_head_weight.device, sizes.training
    ids = torch.randint(0, 1000, (1, tokens), device=device)
    positions = torch.arange(tokens, device=device).expand(3, 1, -1)

    def run() -> None:
        hidden = model.run_decoder(model.decoder.embed_tokens(ids), positions)
        linear_cross_entropy(hidden[0], model.lm_head_weight, ids[0]).loss.backward()
        model.zero_grad(set_to_none=True)

    found = clock(run)
    flops = 3 * (decoder_flops(model, tokens) + 2 * tokens * model.lm_head_weight.numel())
    return {"figure": f"training step of {tokens} tokens, without the optimizer", **found, "flops": flops,
            "utilisation": flops / found["median_s"] / peak}  # fmt: skip


def decoder_flops(model: VisionLanguageModel, tokens: int) -> int:
    """Forward, without the output head."""
    config = model.config
    mixers = sum(mixer.flops(config.width, tokens) for mixer in model.mixer_configs)
    return mixers + len(model.mixer_configs) * 6 * tokens * config.width * config.mlp_width


def captured(step: Callable[[], object]) -> tuple[Callable[[], object], str]:
    """The step as a CUDA graph's replay; where it cannot be captured, the step itself and why."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return step, f"eager, no CUDA graph: {str(error).strip().splitlines()[0]}"
    return graph.replay, "CUDA graph"
