"""Shards of weights: batches without images, dtypes, and what lies in memory, in two processes."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any, cast

import pairs
import pytest
import sharded_work
import tiny
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry

from hybridvl.layers.errors import ConfigError
from hybridvl.training.processes.strategy import ShardedStrategy, sharding_of


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found."""
    folder = tmp_path_factory.mktemp("sharding")
    pairs.folder(folder / "teacher", tiny.net("full*3"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(sharded_work.run, (port, str(folder)), nprocs=sharded_work.WORLD)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(sharded_work.WORLD)]


def test_one_process_without_images_changes_nothing(found: list[dict[str, Any]]) -> None:
    module = tiny.module().double()
    losses = [module.token_loss(batch) for batch in (sharded_work.image_batch(), sharded_work.text_batch())]
    counts = [hits.numel() for _, hits in losses]
    (sum(loss * count for (loss, _), count in zip(losses, counts, strict=True)) / sum(counts)).backward()
    wanted = {name: p.grad for name, p in module.net.named_parameters()}
    assert any(name.startswith("visual.blocks") for name in wanted)
    for process in found:
        assert process["mixed_batches"].keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(process["mixed_batches"][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_what_is_precise_stays_so_under_bf16_mixed(found: list[dict[str, Any]]) -> None:
    for process in found:
        seen = process["dtypes"]
        assert set(seen["kept"].values()) == {(torch.float32, torch.float32)}
        assert seen["moments"] == {torch.float32}
        computed = seen["computed"]
        # The embeddings and the vision tower's ends are gathered too, but in no layer.
        layers = {name: dtype for name, dtype in computed.items() if name.startswith("decoder.layers.")}
        linear = {name for name, dtype in layers.items() if dtype == torch.bfloat16}
        leaves = {name.split(".mixer.")[-1].split(".mlp.")[-1] for name in linear}
        assert {"q_proj.weight", "o_proj.weight", "in_proj.weight", "a_proj.weight", "down_proj.weight"} <= leaves
        precise = {name.rpartition(".mixer.")[2] for name in layers.keys() - linear}
        assert {"A_log", "dt_bias", "D", "o_norm.weight", "norm.weight", "conv1d.weight"} <= precise
        assert not any("norm" in name or "conv" in name for name in linear)
        assert {dtype for name, dtype in layers.items() if name not in linear} == {torch.float32}


def test_the_loss_under_bf16_mixed_is_that_of_one_process(found: list[dict[str, Any]]) -> None:
    module = tiny.module("(swa gdn) mamba2")
    with torch.autocast("cpu", torch.bfloat16):
        loss = float(module.token_loss(tiny.batch()).loss.detach())
    assert [process["dtypes"]["loss"] for process in found] == [pytest.approx(loss, rel=1e-6)] * 2


@pytest.mark.parametrize("stage", ["layers", "logits", "decoder"])
def test_each_process_holds_its_share_of_student_and_teacher(found: list[dict[str, Any]], stage: str) -> None:
    for process in found:
        facts = process["distillation"][stage]
        # What both models share is in memory once, as before; rows that cannot be halved cost a little.
        assert facts["sharded"] == pytest.approx(facts["whole"] / 2, rel=0.02)
        assert facts["layers"] == 1
    first, second = (process["distillation"][stage]["together"] for process in found)
    assert second == 0 < first


@pytest.mark.parametrize("stage", ["layers", "logits", "decoder"])
def test_shards_change_no_gradient(found: list[dict[str, Any]], stage: str) -> None:
    for process in found:
        assert process["distillation"][stage]["error"] < 1e-5


class _Trainer:
    """What a trainer says about how it trains."""

    def __init__(self, strategy: Strategy, precision: str) -> None:
        self.strategy = strategy
        self.precision = precision


@pytest.mark.parametrize(
    ("strategy", "precision", "message"),
    [
        (
            ShardedStrategy(),
            "16-mixed",
            "trainer.precision: '16-mixed'; fsdp2 takes one of 64-true, 32-true",
        ),
        # A_log and dt_bias stay float32, and a unit of weights has one dtype.
        (ShardedStrategy(), "bf16-true", "trainer.precision: 'bf16-true'; fsdp2 takes one of 64-true, 32-true"),
        (ModelParallelStrategy(), "32-true", "trainer.strategy: ModelParallelStrategy; expected auto, ddp or fsdp2"),
        (FSDPStrategy(), "32-true", "trainer.strategy: FSDPStrategy; expected auto, ddp or fsdp2"),
    ],
)
def test_what_the_stages_cannot_do_is_refused(strategy: Strategy, precision: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        sharding_of(cast(Trainer, _Trainer(strategy, precision)))


def test_other_strategies_have_nothing_in_shards() -> None:
    assert sharding_of(cast(Trainer, _Trainer(DDPStrategy(), "16-mixed"))) is None
    assert StrategyRegistry["fsdp2"]["strategy"] is ShardedStrategy
