"""Random models built by transformers itself load here, and ours load there, with equal logits."""

from __future__ import annotations

import copy
import inspect
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import relative_error
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.olmo_hybrid import modeling_olmo_hybrid
from transformers.models.qwen3_next import modeling_qwen3_next

import hybridvl
from hybridvl.checkpoints import open_checkpoint
from hybridvl.layers import ConfigError
from hybridvl.models.vlm import VisionLanguageModel

TOLERANCE = 5e-5
VOCAB, IMAGE, VIDEO, START = 128, 120, 121, 118
SEEDS = range(4)


def randomized(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights large enough that every option matters, norms and biases that are not at their first values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "A_log" in name or "dt_bias" in name or parameter.dim() == 1:
                parameter += 0.1 * noise
            else:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
    return model.eval()


def qwen(seed: int) -> PreTrainedModel:
    """Qwen2.5-VL of a random shape: heads, groups, depth, vision sizes, window layers, tied or not."""
    pick = random.Random(seed)
    half = pick.choice([8, 16])
    kv_heads, groups, layers = pick.choice([1, 2]), pick.choice([1, 2, 3]), pick.choice([2, 3])
    vision_heads, merge, depth = pick.choice([1, 2]), 2, pick.choice([2, 3])
    width, window_layers = 2 * half * kv_heads * groups, pick.choice([0, 1])
    config = Qwen2_5_VLConfig(
        text_config={
            **{"hidden_size": width, "num_attention_heads": kv_heads * groups, "num_key_value_heads": kv_heads},
            **{"num_hidden_layers": layers, "intermediate_size": 8 * pick.randint(3, 9), "vocab_size": VOCAB},
            **{"rms_norm_eps": pick.choice([1e-6, 1e-5]), "max_position_embeddings": 512},
            **{"use_sliding_window": bool(seed % 2), "sliding_window": 5, "max_window_layers": window_layers},
            **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": pick.choice([1e4, 1e6])},
                "mrope_section": [half // 4, half - half // 4 - 3 * half // 8, 3 * half // 8],
            },
        },
        vision_config={
            **{"hidden_size": vision_heads * 8 * pick.choice([1, 2]), "num_heads": vision_heads, "depth": depth},
            **{
                "intermediate_size": 4 * pick.randint(3, 9),
                "out_hidden_size": width,
                "patch_size": pick.choice([4, 6]),
            },
            **{"spatial_merge_size": merge, "fullatt_block_indexes": [pick.randrange(depth)]},
            **{"tokens_per_second": pick.choice([1, 2, 4])},
        },
        tie_word_embeddings=bool(seed // 2 % 2),
        **{"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START},
    )
    config.vision_config.window_size = config.vision_config.patch_size * merge * pick.choice([2, 3])
    config._attn_implementation = "eager"
    return randomized(Qwen2_5_VLForConditionalGeneration(config), seed)


def visual_inputs(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """A row of text, two images and a video."""
    vision, generator = model.config.vision_config, torch.Generator().manual_seed(seed)
    grids = {"image": [(1, 6, 10), (1, 4, 4)], "video": [(3, 4, 6)]}
    ids: list[int] = torch.randint(0, 100, (5,), generator=generator).tolist()
    for kind, token in (("image", IMAGE), ("video", VIDEO)):
        for t, h, w in grids[kind]:
            ids += [START, *[token] * (t * h * w // 4), *torch.randint(0, 100, (3,), generator=generator).tolist()]
    columns = 3 * 2 * vision.patch_size**2
    pixels = {
        kind: torch.randn(sum(t * h * w for t, h, w in found), columns, generator=generator)
        for kind, found in grids.items()
    }
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": pixels["image"],
        "image_grid_thw": torch.tensor(grids["image"]),
        "pixel_values_videos": pixels["video"],
        "video_grid_thw": torch.tensor(grids["video"]),
        "second_per_grid_ts": torch.tensor([0.75]),
    }


def text(seed: int) -> dict[str, Tensor]:
    """Two rows."""
    return {"input_ids": torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(seed))}


@torch.no_grad()
def answers(ours: VisionLanguageModel, theirs: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of both, of rows of text or of text, images and videos; videos placed as this transformers does."""
    ids = inputs["input_ids"]
    if len(inputs) == 1:
        return ours(ids).logits, theirs(input_ids=ids, use_cache=False).logits
    kinds = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
    positions, _ = ours.rope_positions(ids, **grids, video_convention="v523")
    return ours(**inputs, position_ids=positions).logits, theirs(**inputs, mm_token_type_ids=kinds).logits


def compare(theirs: PreTrainedModel, inputs: dict[str, Tensor], folder: Path, format: str) -> None:
    """There and here; here and there, once with the files as they were and once as if the model were ours."""
    theirs.save_pretrained(folder / "theirs", max_shard_size="8KB")
    assert (folder / "theirs" / "model.safetensors.index.json").exists()
    ours = hybridvl.load(folder / "theirs")
    assert relative_error(*answers(ours, theirs, inputs)) < TOLERANCE
    assert ours.num_params == sum(p.numel() for p in theirs.parameters())
    hybridvl.save(ours, folder / "same", format=format)
    for path in (folder / "same").iterdir():
        assert path.read_bytes() == (folder / "theirs" / path.name).read_bytes()
    hybridvl.save(copy.deepcopy(ours), folder / "ours", format=format, max_shard_size="8KB")
    again, report = type(theirs).from_pretrained(folder / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(report.values())
    assert relative_error(*answers(ours, again.eval(), inputs)) < TOLERANCE
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    assert again.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    assert again.dtype == theirs.dtype


@pytest.mark.parametrize("seed", SEEDS)
def test_qwen2_5_vl(tmp_path: Path, seed: int) -> None:
    theirs = qwen(seed)
    compare(theirs, visual_inputs(theirs, seed), tmp_path, "qwen2_5_vl")
    values, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    free = {"bos_token_id", "eos_token_id", "max_position_embeddings", "initializer_range", "max_window_layers"}
    for part in ("text_config", "vision_config"):
        differing = {key for key, value in values[part].items() if again[part].get(key) != value} - {*free, "dtype"}
        assert not differing, {key: (values[part][key], again[part].get(key)) for key in differing}


@pytest.mark.parametrize("seed", SEEDS)
def test_mamba2(tmp_path: Path, seed: int) -> None:
    pick = random.Random(seed)
    groups, head_dim = pick.choice([1, 2, 4]), pick.choice([8, 16])
    heads = 2 * groups
    config = Mamba2Config(
        **{"hidden_size": heads * head_dim // 2, "num_heads": heads, "head_dim": head_dim, "n_groups": groups},
        **{"state_size": pick.choice([4, 8]), "num_hidden_layers": 2, "vocab_size": VOCAB, "chunk_size": 8},
        **{"conv_kernel": pick.choice([2, 4]), "use_bias": bool(seed % 2), "use_conv_bias": bool(seed < 2)},
        **{"tie_word_embeddings": seed == 3, "layer_norm_epsilon": pick.choice([1e-5, 1e-6])},
    )
    theirs = randomized(Mamba2ForCausalLM(config), seed)
    compare(theirs, text(seed), tmp_path, "mamba2")


def delta_net_options(seed: int) -> dict[str, Any]:
    pick = random.Random(seed)
    return {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": pick.choice([2, 4, 6])},
        **{"linear_key_head_dim": pick.choice([6, 8]), "linear_value_head_dim": pick.choice([8, 12])},
        **{"linear_conv_kernel_dim": pick.choice([3, 4]), "tie_word_embeddings": bool(seed % 2)},
        **{"layer_types": ["linear_attention"] * 2, "rms_norm_eps": 1e-5, "pad_token_id": None},
    }


@pytest.fixture
def torch_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own PyTorch functions: where fla is installed it would call that, which needs a GPU."""
    for module in (modeling_qwen3_next, modeling_olmo_hybrid):
        for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn"):
            monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))


@pytest.mark.usefixtures("torch_functions")
@pytest.mark.parametrize("seed", SEEDS)
def test_qwen3_next_of_gated_delta_net_and_plain_mlps(tmp_path: Path, seed: int) -> None:
    theirs = randomized(Qwen3NextForCausalLM(Qwen3NextConfig(**delta_net_options(seed), num_experts=0)), seed)
    theirs.save_pretrained(tmp_path)
    ours = hybridvl.load(tmp_path)
    assert relative_error(*answers(ours, theirs, text(seed))) < TOLERANCE
    with pytest.raises(ConfigError, match="'qwen3_next' is only read"):
        hybridvl.save(ours, tmp_path / "out", format="qwen3_next")
    tensors = load_file(tmp_path / "model.safetensors")
    assert len(open_checkpoint(tmp_path).names) > len(tensors)


@pytest.mark.usefixtures("torch_functions")
@pytest.mark.parametrize("seed", SEEDS)
def test_olmo_hybrid_of_gated_delta_net(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its configuration insists on an attention layer, which our mixers cannot express; its model can do without.
    mixed = {**delta_net_options(seed), "layer_types": ["linear_attention", "full_attention"]}
    if seed % 2:  # transformers cuts the convolution it saves in the published format into equal parts
        mixed |= {"linear_num_value_heads": 4, "linear_value_head_dim": 6, "linear_key_head_dim": 12}
    config = OlmoHybridConfig(**mixed, linear_allow_neg_eigval=seed < 2, num_attention_heads=2)
    config.layer_types = ["linear_attention"] * 2
    monkeypatch.setattr(OlmoHybridConfig, "validate", lambda config: None)
    theirs = randomized(OlmoHybridForCausalLM(config), seed)
    theirs.save_pretrained(tmp_path / "in", save_original_format=bool(seed % 2))
    assert ("q_conv1d" in " ".join(load_file(tmp_path / "in" / "model.safetensors"))) == bool(seed % 2)
    ours = hybridvl.load(tmp_path / "in")
    assert relative_error(*answers(ours, theirs, text(seed))) < TOLERANCE
    if seed % 2:
        hybridvl.save(ours, tmp_path / "out", format="olmo_hybrid")
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
            tmp_path / "in" / "model.safetensors"
        ).read_bytes()
    else:
        with pytest.raises(ConfigError, match="'olmo_hybrid' is only read"):
            hybridvl.save(ours, tmp_path / "out", format="olmo_hybrid")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Qwen3NextConfig(),
            "layer_types: layer 3 is 'full_attention', whose output gate .*; expected 'linear_attention'",
        ),
        (Qwen3NextConfig(layer_types=["linear_attention"] * 48), "num_experts 512: layer 0 is a mixture of experts"),
        (OlmoHybridConfig(), "layer_types: layer 3 is 'full_attention', which norms queries and keys over all heads"),
        (Mamba2Config(time_step_limit=(0.1, 1.0)), r"time_step_limit \[0.1, 1.0\]; expected no limit"),
        (Mamba2Config(hidden_act="gelu"), "hidden_act 'gelu'; expected 'silu'"),
    ],
)
def test_what_our_mixers_cannot_express(tmp_path: Path, config: Any, message: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"config.json: {message}"):
        open_checkpoint(tmp_path)
