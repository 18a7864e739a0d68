"""Streams in a bench: the frame that is timed, where it stands, what equals it, and from where every run begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybridvl.bench import model_cases, stream_cases
from hybridvl.bench.filling import filled_state, rewinder
from hybridvl.bench.included import INCLUDED
from hybridvl.bench.model_cases import QWEN25, ModelRequest, decode_works, prefill_works
from hybridvl.bench.qwen2_5_vl import Qwen25TextPeer, Qwen25VisionPeer
from hybridvl.bench.sides import UnequalWorkError, Work, compare
from hybridvl.bench.sizes import model_config, vision_config
from hybridvl.bench.stream_cases import stream_works, with_vision
from hybridvl.data.chat import ChatFormat
from hybridvl.data.tokens import load_tokenizer
from hybridvl.inference.streaming.timeline import Timeline
from hybridvl.layers import ConfigError
from hybridvl.models.config import VisionConfig
from hybridvl.models.vlm import VisionLanguageModel

SMALL = model_config("full*2", 64, 96, 600, {"swa": {"window": 24}})
VISION = vision_config(depth=2, width=32)


def request(pattern: str, *peers: str, dtype: torch.dtype = torch.float32) -> ModelRequest:
    config = dataclasses.replace(with_vision(SMALL, VISION), pattern=pattern)
    return ModelRequest(config, peers, dtype, prefill_chunk=16)


def test_the_tower_of_qwen25() -> None:
    assert vision_config(32, 1280) == VisionConfig()
    assert vision_config(4, 256).full_attention_blocks == (3,)
    for depth, width, message in ((2, 40, "--vision-width 40"), (0, 64, "vision.depth: 0"), (2, 0, "vision.width: 0")):
        with pytest.raises(ConfigError, match=message):
            vision_config(depth, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frame_as_qwen25(dtype: torch.dtype) -> None:
    contexts = [0, 1, 64, 130]
    asked = request("swa gdn", "full*2", QWEN25, dtype=dtype)
    for work, context in zip(stream_works(asked, contexts, side=5), contexts, strict=True):
        assert [side.name for side in work.sides] == ["swa gdn", "full*2", QWEN25]
        assert (work.sizes["T"], work.tokens, work.frames, work.direction) == (context, 25, 1, "stream")
        found = compare(work)[QWEN25]
        assert found.keys() == {"features", "hidden", "logits"}
        assert max(found.values()) < (1e-5 if dtype == torch.float32 else 4e-2)


def test_a_frame_of_several_pieces_as_qwen25(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvl.inference.streaming.feeding.PREFILL_CHUNK", 7)
    [work] = stream_works(request("full", QWEN25), [30], side=5)
    assert max(compare(work)[QWEN25].values()) < 1e-5


def _other_tower(peer: Qwen25VisionPeer) -> None:
    merger = peer.tower.merger.mlp[2]
    merger.bias = torch.nn.Parameter(merger.bias.detach() + 0.01)


def _other_text(peer: Qwen25TextPeer) -> None:
    projection = peer.text.layers[0].self_attn.k_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach() * 1.1)


def _other_positions(peer: Qwen25TextPeer) -> None:
    right = peer.hidden

    def hidden(embeds: Tensor, positions: Tensor, cache: object) -> Tensor:
        return right(embeds, positions.roll(1, dims=0), cache)  # axes mixed up

    peer.hidden = hidden  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_tower, "features of qwen2.5-vl differs"),
        (_other_text, "hidden of qwen2.5-vl differs"),
        (_other_positions, "hidden of qwen2.5-vl differs"),
    ],
)
def test_another_weight_or_place_is_found(
    change: Callable[[object], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, right = (stream_cases, Qwen25VisionPeer) if change is _other_tower else (model_cases, Qwen25TextPeer)

    def wrong(ours: object) -> object:
        peer = right(ours)  # type: ignore[arg-type]
        change(peer)
        return peer

    monkeypatch.setattr(module, right.__name__, wrong)
    [work] = stream_works(request("full", QWEN25), [30], side=4)
    with pytest.raises(UnequalWorkError, match=message):
        compare(work)


@pytest.mark.parametrize("frames", [0, 1, 7])
def test_the_frame_stands_where_a_stream_has_it(frames: int) -> None:
    """After so many frames of a video whose frames come one for every temporal position."""
    chat, config = ChatFormat(load_tokenizer()), with_vision(SMALL, VISION)
    timeline = Timeline.opened(chat, "video", config.tokens_per_second)
    for number in range(frames + 2):
        shown = timeline.frame(3, 3, number / config.tokens_per_second)
    made = stream_cases._frame(config, 9 * frames, 3)
    feed = made.feed(made.timeline.copy())
    assert torch.equal(feed.positions, shown.positions)
    assert (feed.before, feed.features, feed.after) == ([], 9, [])


@pytest.mark.parametrize("works", [decode_works, lambda asked, contexts: stream_works(asked, contexts, 8)])
def test_every_run_begins_from_the_same_context(works: Callable[..., list[Work]]) -> None:
    """Full attention gives the same result to the last bit after the state was brought back, another without it."""
    [work] = works(request("full swa(window=500)", "full*2", QWEN25), [70])
    for side in work.sides:
        found = []
        for _ in range(3):
            side.begin()
            found.append(next(reversed(side.run().values())))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[1], found[2])
        assert not torch.equal(found[2], next(reversed(side.run().values())))


@pytest.mark.parametrize("context", [0, 30, 64])
@pytest.mark.parametrize("tokens", [1, 64])
def test_states_are_brought_back(context: int, tokens: int) -> None:
    model = VisionLanguageModel(dataclasses.replace(SMALL, pattern="full swa gdn mamba2 swa+full"))
    state = filled_state(model, context)
    rewind = rewinder(state, tokens)
    before = {name: value.clone() for name, value in state.tensors().items() if not value.is_floating_point()}
    size = state.nbytes
    slots = []
    for _ in range(3):
        with torch.no_grad():
            model(torch.zeros(1, tokens, dtype=torch.int64), state=state)
        assert int(state.length) == context + tokens
        slots.append(state.layers[0].slots)
        rewind()
        assert all(torch.equal(state.tensors()[name], value) for name, value in before.items())
        assert int(state.length) == context
        if tokens == 64:
            assert state.nbytes == size
    assert len(set(slots)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("context", [0, 1, 64, 65])
def test_states_have_the_bytes_that_mixers_promise(context: int, dtype: torch.dtype) -> None:
    asked = request("swa gdn mamba2", "full*3", QWEN25, dtype=dtype)
    kinds = [prefill_works(asked, [context]), decode_works(asked, [context])] if context else []
    for works in (*kinds, stream_works(asked, [context], 2)):
        [work] = works
        ours, full, theirs = work.sides
        for side in (ours, full):
            model = VisionLanguageModel(dataclasses.replace(asked.config, pattern=side.name))
            promised = sum(mixer.state_bytes(context, dtype, 64) for mixer in model.mixer_configs)
            assert side.state_bytes == promised + 16  # two counters
            if dtype == torch.float32 or side is full:  # decays stay in float32
                assert side.weight_bytes == model.num_params * dtype.itemsize
        assert theirs.state_bytes == 2 * 3 * context * 64 // 2 * dtype.itemsize  # half as many heads for keys
        assert theirs.weight_bytes == full.weight_bytes


def test_the_cache_of_the_peer_has_the_bytes_told() -> None:
    model = VisionLanguageModel(SMALL)
    peer = Qwen25TextPeer(model)
    cache = peer.cache(filled_state(model, 37), 37)
    assert peer.cache_bytes(37) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_patterns_share_the_tower() -> None:
    [work] = stream_works(request("gdn", "swa"), [3], 4)
    features = [side.run()["features"] for side in work.sides]
    assert torch.equal(*features)
    assert work.direction in INCLUDED


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="--side 0: expected at least 1"):
        list(stream_works(request("gdn"), [3], 0))
    with pytest.raises(ConfigError, match="expected a pattern of full layers too"):
        list(stream_works(request("gdn", QWEN25), [3], 2))
    with pytest.raises(ConfigError, match=r"--vocab 50: expected at least \d+, the tokens of a chat"):
        with_vision(model_config("gdn", 64, 96, 50), VISION)
