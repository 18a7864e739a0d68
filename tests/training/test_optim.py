"""Parameter groups, AdamW, and the schedule's numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import tiny
import torch
from torch import nn

from hybridvl.layers.errors import ConfigError
from hybridvl.training.optim import OptimizerConfig, build_optimizer, build_schedule, lr_share, parameter_groups


def test_groups_hold_every_trainable_parameter_once_and_decay_only_matrices() -> None:
    model = tiny.module("(full gdn mamba2 swa+mamba2)").net
    decayed, kept = parameter_groups(model, OptimizerConfig())
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert sorted(decayed["names"] + kept["names"]) == sorted(name for name, _ in model.named_parameters())
    endings = {name.rpartition(".")[2] for name in decayed["names"]}
    assert endings == {"weight"}
    assert all(dict(model.named_parameters())[name].ndim >= 2 for name in decayed["names"])
    for part in ("A_log", "dt_bias", ".D", "norm.weight", "bias", "embed_tokens.weight"):
        assert any(name.endswith(part) for name in kept["names"]), part
        assert not any(name.endswith(part) for name in decayed["names"]), part


def test_embeddings_are_decayed_on_request() -> None:
    model = tiny.module().net
    decayed, _ = parameter_groups(model, OptimizerConfig(decay_embeddings=True))
    assert any("embed_tokens" in name for name in decayed["names"])


def test_a_tied_head_is_listed_once_and_not_decayed() -> None:
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    groups = parameter_groups(nn.ModuleList([head, embedding]), OptimizerConfig())
    assert [(group["weight_decay"], group["names"]) for group in groups] == [(0.0, ["0.weight"])]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    assert [group["names"] for group in parameter_groups(model, OptimizerConfig())] == [["bias"]]
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(model.requires_grad_(False), OptimizerConfig())


def test_one_step_is_adamw() -> None:
    model = nn.Linear(3, 2).double()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    config = OptimizerConfig(lr=0.1, betas=(0.9, 0.99), weight_decay=0.5, eps=1e-8)
    optimizer = build_optimizer(model, config)
    (model.weight.sum() * 3 + model.bias.sum() * -2).backward()
    optimizer.step()
    # The first Adam step has length lr in the direction of the gradient's sign.
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.1 * 0.5) - 0.1, rtol=0, atol=1e-8)
    torch.testing.assert_close(model.bias.detach(), bias + 0.1, rtol=0, atol=1e-8)


def test_the_fused_kernel_is_used_on_a_cpu() -> None:
    assert build_optimizer(nn.Linear(2, 2), OptimizerConfig()).defaults["fused"] is True
    assert build_optimizer(nn.Linear(2, 2), OptimizerConfig(fused=False)).defaults["fused"] is False


def test_schedule_warms_up_and_ends_at_the_final_share() -> None:
    share = [lr_share(step, warmup_steps=4, total_steps=14, final=0.1) for step in range(16)]
    assert share[:4] == [0.25, 0.5, 0.75, 1.0]
    assert share[4] == 1.0
    assert math.isclose(share[9], 0.1 + 0.9 * 0.5)  # half way down
    assert share[14] == share[15] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(share[4:]))


def test_schedule_drives_the_optimizer() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerConfig(lr=2.0, warmup_steps=2))
    schedule = build_schedule(optimizer, OptimizerConfig(lr=2.0, warmup_steps=2), 10)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.0), ("betas", (0.9, 1.0)), ("weight_decay", -1.0), ("warmup_steps", -1), ("final_lr", 2.0), ("eps", 0.0)],
)
def test_mistakes_name_the_key_and_the_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"model.optimizer.{name}: .*is not"):
        OptimizerConfig(**{name: value})
