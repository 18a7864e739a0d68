"""Whole models: transformers' with our weights compute what ours compute, and states filled without reading."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hybridvl.bench.filling import filled_state
from hybridvl.bench.model_cases import QWEN3_NEXT, QWEN25, ModelRequest, decode_works, prefill_works, train_work
from hybridvl.bench.qwen3_next import GatedAttentionConfig
from hybridvl.bench.sides import compare
from hybridvl.bench.sizes import model_config
from hybridvl.layers import ConfigError
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.testing import check_mixer

SMALL = model_config("(gdn*3 full)*2", 64, 96, 100, {"swa": {"window": 24}})


def request(pattern: str, *peers: str, dtype: torch.dtype = torch.float32) -> ModelRequest:
    config = dataclasses.replace(SMALL, pattern=pattern)
    return ModelRequest(config, peers, dtype, batch=2, tokens=70, loss_chunk=32, prefill_chunk=16)


def test_sizes_fit_the_width() -> None:
    wide = model_config("full", 1024, 2816, 10, {"swa": {"window": 9}, "gdn": {"heads": 2}})
    assert wide.mixers["full"] == {"heads": 8, "kv_heads": 2, "head_dim": 128}
    assert wide.mixers["swa"] == {"heads": 8, "kv_heads": 2, "head_dim": 128, "window": 9}
    assert wide.mixers["gdn"] == {"heads": 2, "head_dim": 128}
    assert model_config("full", 256, 0, 10).mixers["full"] == {"heads": 4, "kv_heads": 2, "head_dim": 64}
    with pytest.raises(ConfigError, match="--width 40: expected a multiple of 16"):
        model_config("full", 40, 0, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["(gdn*3 full)*2", "full gdn(value_heads=8)", "gdn", "full(kv_heads=1)"])
def test_training_as_qwen3_next(pattern: str, dtype: torch.dtype) -> None:
    work = train_work(request(pattern, QWEN3_NEXT, dtype=dtype))
    found = compare(work)[QWEN3_NEXT]
    assert found.keys() == {"logits", "loss", "gradients"}
    if dtype == torch.float32:
        assert max(found.values()) < 2e-5
    first, second = (work.sides[0].run()["loss"] for _ in range(2))
    assert first != second  # the weights moved
    assert work.sides[1].run()["loss"] == pytest.approx(float(first), rel=1e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_training_with_the_decays_that_qwen3_next_starts_with(tied: bool) -> None:
    asked = request("gdn full", QWEN3_NEXT)
    asked = dataclasses.replace(asked, config=dataclasses.replace(asked.config, tie_embeddings=tied), peer_decays=True)
    work = train_work(asked)
    assert "decays qwen3-next" in work.title
    assert max(compare(work)[QWEN3_NEXT].values()) < 2e-5


def test_another_weight_is_found() -> None:
    work = train_work(request("gdn full", QWEN3_NEXT))
    work.sides[1].run()  # one step ahead of ours
    with pytest.raises(Exception, match="qwen3-next differs"):
        compare(work)


def test_the_gated_attention_is_a_mixer() -> None:
    check_mixer(GatedAttentionConfig(heads=4, kv_heads=2, head_dim=16), width=32)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gdn swa", "expected layers of full and gdn alone"),
        ("gdn gdn(heads=2)", "expected the same options"),
        ("gdn(negative_eigenvalues=true)", "without negative_eigenvalues"),
        ("full(rope=false)", "full with rope"),
    ],
)
def test_what_qwen3_next_cannot_be(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_work(request(pattern, QWEN3_NEXT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_and_reading_as_qwen25(dtype: torch.dtype) -> None:
    asked = request("(swa gdn*3)", "full*4", QWEN25, dtype=dtype)
    for works in (decode_works(asked, [1, 30, 65]), prefill_works(asked, [1, 30, 65])):
        for work, length in zip(works, (1, 30, 65), strict=True):
            assert [side.name for side in work.sides] == ["swa gdn*3", "full*4", QWEN25]
            assert work.sizes["T"] == length
            assert compare(work)[QWEN25]["logits"] < (1e-5 if dtype == torch.float32 else 4e-2)


def test_decoding_needs_the_state() -> None:
    """The comparison is not blind: with another context the logits differ."""
    asked = request("full*2", QWEN25)
    one, other = (work.sides[0].run()["logits"] for work in decode_works(asked, [30, 31]))
    assert (one - other).norm() > 0.05 * one.norm()


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"expected a pattern of full layers too"):
        list(decode_works(request("swa*2", "gdn*2", QWEN25), [4]))
    with pytest.raises(ConfigError, match="expected patterns that differ"):
        train_work(request("swa*2", "swa swa"))
    with pytest.raises(ConfigError, match=r"peer qwen2.5-vl: full\(rope=false\); expected"):
        list(decode_works(request("swa", "full(rope=false)", QWEN25), [4]))


@pytest.mark.parametrize("context", [1, 24, 25, 100])
def test_filled_states_count_and_hold_the_context(context: int) -> None:
    config = dataclasses.replace(SMALL, pattern="full swa gdn mamba2 swa+gdn")
    model = VisionLanguageModel(config)
    state = filled_state(model, context)
    read = model.init_state(1)
    with torch.no_grad():
        model(torch.zeros(1, context, dtype=torch.int64), state=read)
    for found, expected in zip(state.layers, read.layers, strict=True):
        assert found.nbytes == expected.nbytes
        for name, tensor in found.tensors().items():
            other = expected.tensors()[name]
            assert tensor.shape == other.shape
            if tensor.is_floating_point():
                # Noise where reading leaves something: as many slots of a cache are in use.
                used, wanted = (x.flatten(2).any(-1).sum() if x.dim() == 4 else x.any().sum() for x in (tensor, other))
                assert used == wanted
            else:
                assert torch.equal(tensor, other)
    assert torch.equal(state.next_position, read.next_position)
