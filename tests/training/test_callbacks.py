"""What the callbacks measure, draw and write, against numbers worked out another way."""

from __future__ import annotations

import contextlib
import io
import json
import math
import mmap
import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import tiny
import torch
from lightning.pytorch import Callback

import hybridvl
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.inference.processor import Processor
from hybridvl.layers.errors import ConfigError
from hybridvl.training.answers import Question, model_inputs, split_questions
from hybridvl.training.callbacks.checkpoints import Checkpoints, is_better
from hybridvl.training.callbacks.exact_resume import ExactResume, random_state, set_random_state
from hybridvl.training.callbacks.examples import ExampleImages, draw, last_image, spread
from hybridvl.training.callbacks.export import ExportModel
from hybridvl.training.callbacks.hparams import HParams
from hybridvl.training.callbacks.memory import MemoryMonitor, memory_usage
from hybridvl.training.callbacks.predictions import PredictionWriter
from hybridvl.training.callbacks.run_card import RunCard
from hybridvl.training.callbacks.run_summary import RunSummary
from hybridvl.training.callbacks.state_norms import StateNorms, state_norms
from hybridvl.training.callbacks.throughput import Throughput


class _Logger:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))


def _batch(tokens: int, rows: int) -> dict[str, torch.Tensor]:
    mask = torch.zeros(rows, tokens, dtype=torch.bool)
    mask[:, : tokens // 2] = True
    return {"input_ids": torch.zeros(rows, tokens, dtype=torch.int64), "attention_mask": mask}


def test_throughput_counts_real_tokens_and_leaves_validation_out() -> None:
    times: Iterator[float] = iter([0.0, 1.0, 3.0, 4.0, 104.0, 105.0, 106.0])
    meter, logger = Throughput(clock=lambda: next(times)), _Logger()
    trainer: Any = SimpleNamespace(
        global_step=0, log_every_n_steps=2, loggers=[logger], training=True, state=SimpleNamespace(fn="fit")
    )
    module: Any = None
    meter.on_train_start(trainer, module)  # at 0
    for step, action in enumerate(["step", "step", "validate", "step", "step"]):
        if action == "validate":
            meter.on_validation_start(trainer, module)  # at 4
            meter.on_validation_end(trainer, module)  # at 104
            continue
        trainer.global_step += 1
        meter.on_train_batch_end(trainer, module, None, _batch(10, 4), step)  # at 1, 3, 105, 106
    first, second = logger.logged
    assert first == (2, {"speed/tokens_per_s": 40 / 3, "speed/samples_per_s": 8 / 3, "speed/step_s": 1.5})
    # From 3 to 4 before the validation, from 104 to 106 after it.
    assert second == (4, {"speed/tokens_per_s": 40 / 3, "speed/samples_per_s": 8 / 3, "speed/step_s": 1.5})
    assert (meter.tokens, meter.samples, meter.seconds) == (80, 16, 6.0)
    again = Throughput()
    again.load_state_dict(meter.state_dict())
    assert (again.tokens, again.samples, again.seconds) == (80, 16, 6.0)


def test_memory_grows_with_what_is_held() -> None:
    before = memory_usage()["memory/rss_mib"]
    # Pages of its own: an array may be given memory that the process had and freed.
    held = mmap.mmap(-1, 64 * 2**20)
    held.write(b"\1" * len(held))
    usage = memory_usage()
    assert 60 < usage["memory/rss_mib"] - before < 80
    assert usage["memory/peak_rss_mib"] >= usage["memory/rss_mib"] * 0.99
    held.close()


def test_random_state_is_restored_in_every_generator() -> None:
    def draw_all() -> tuple[float, float, float, float]:
        return random.gauss(0, 1), random.random(), float(np.random.standard_normal()), float(torch.rand(()))

    draw_all()  # leaves half a pair of normal numbers behind in Python's and numpy's generators
    state = random_state()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    first = draw_all()
    draw_all()
    buffer.seek(0)
    set_random_state(torch.load(buffer, weights_only=True))
    assert draw_all() == first


def test_training_draws_are_untouched_by_what_happens_between_steps() -> None:
    trainer: Any = None
    module: Any = None

    def steps(noise: bool) -> list[float]:
        torch.manual_seed(0)
        callback, drawn = ExactResume(), []
        for index in range(3):
            callback.on_train_batch_start(trainer, module, None, index)
            drawn.append(float(torch.rand(())))
            callback.on_train_batch_end(trainer, module, None, None, index)
            if noise:
                torch.rand(100)
        return drawn

    assert steps(noise=True) == steps(noise=False)


def test_state_norms_are_those_of_the_recurrent_states() -> None:
    module, batch = tiny.module("(swa gdn mamba2 swa+gdn)"), tiny.batch()
    with torch.no_grad():
        norms = state_norms(module.net, batch)
        state = module.net.init_state(len(batch["input_ids"]))
        module.net(**model_inputs(batch), state=state)
    assert [name.split(".")[0] for name in norms] == [f"state_norm/layer_{index}" for index in (1, 2, 3)]
    recurrent = state.layers[1].tensors()["recurrent"]  # (B, H, K, V)
    expected = torch.stack([matrix.norm() ** 2 for matrix in recurrent.flatten(0, 1)]).mean().sqrt()
    assert norms["state_norm/layer_1"] == pytest.approx(float(expected), rel=1e-5)


def test_packed_batches_have_one_state_a_segment() -> None:
    module = tiny.module("gdn")
    norms = state_norms(module.net, tiny.batch(packing=True))
    assert norms["state_norm/layer_0"] > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_the_last_image_is_put_together_from_its_patches(channels: int) -> None:
    config = ImageConfig(4, 2, 2, mean=(0.5,) * channels, std=(0.25,) * channels)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (16, wide, channels), dtype=np.uint8) for wide in (8, 24)]
    parts = [ImageProcessor(config).patches(picture[None]) for picture in pictures]
    question = Question(
        prompt=torch.zeros(1),
        answer=torch.zeros(1),
        pixel_values=torch.cat([rows for rows, _ in parts]),
        image_grid_thw=torch.tensor([grid for _, grid in parts]),
        kind="",
        row=0,
    )
    assert np.array_equal(last_image(question, config), pictures[1])


def test_examples_are_of_different_samples_first() -> None:
    questions = split_questions(tiny.batch(), 6, 4)
    chosen = spread(questions, 4)
    assert sorted(question.row for question in chosen) == [0, 1, 2, 3]
    assert len({question.kind for question in chosen}) > 1
    assert len(spread(questions, 100)) == len(questions)


def test_a_drawing_shows_the_image_and_whether_the_reply_is_right() -> None:
    image = np.zeros((8, 8, 1), dtype=np.uint8)
    right = draw(image, "What is it?", "7", "7")
    wrong = draw(image, "What is it?", "8", "7")
    assert right.dtype == np.uint8
    assert right.shape == (440, 400, 3)
    assert (right[20:270, 100:300] == 0).any()
    assert _has_colour(right, green=True)
    assert not _has_colour(right, green=False)
    assert _has_colour(wrong, green=False)
    assert not _has_colour(wrong, green=True)


def _has_colour(picture: np.ndarray, green: bool) -> bool:
    red_part, green_part = picture[..., 0].astype(int), picture[..., 1].astype(int)
    return bool(((green_part - red_part if green else red_part - green_part) > 60).any())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A fit and a test with every callback; the run folder, and what was measured."""
    module, datamodule = tiny.module(), tiny.data(turns=1)
    summary, throughput = RunSummary(), Throughput()
    callbacks: list[Callback] = [
        *(throughput, MemoryMonitor(), StateNorms(), ExampleImages(2), HParams(0), RunCard(0, {"ratio": "1/2"})),
        ExactResume(),
        *(Checkpoints(every_n_steps=3, monitor="val/loss", mode="min"), ExportModel(), summary, PredictionWriter()),
    ]
    trainer = tiny.trainer(tmp_path_factory.mktemp("run"), 8, callbacks, validate=4)
    trainer.fit(module, datamodule=datamodule)
    trainer.test(module, datamodule=datamodule, verbose=False)
    trainer.predict(module, datamodule=datamodule)
    assert trainer.log_dir is not None
    return Path(trainer.log_dir), {"summary": summary, "trainer": trainer, "module": module, "throughput": throughput}


def test_every_scalar_is_there(run: tuple[Path, dict[str, Any]]) -> None:
    scalars = tiny.scalars(run[0])
    for tag in ("train/loss", "train/token_accuracy", "train/lr", "train/gradient_norm", "speed/tokens_per_s"):
        assert len(scalars[tag]) == 8, tag
    assert {"memory/rss_mib", "state_norm/layer_1", "test/exact", "test/digit_accuracy"} < set(scalars)
    assert len(scalars["val/loss"]) == len(scalars["val/exact"]) == 2
    assert scalars["train/lr"][0][1] == pytest.approx(3e-3 / 2)
    assert all(value > 0 for _, value in scalars["train/gradient_norm"])


def test_examples_are_in_tensorboard(run: tuple[Path, dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(min(run[0].glob("events.*"))), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["run/pattern", "examples/0", "examples/1"]
    assert [image.step for image in events.Images("examples/0")] == [4, 8]
    assert (events.Images("examples/0")[0].width, events.Images("examples/0")[0].height) == (400, 440)


def test_a_card_says_what_the_run_is(run: tuple[Path, dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    events = EventAccumulator(str(min(run[0].glob("events.*"))), size_guidance={"images": 0})
    events.Reload()
    text = events.Tensors("run/summary/text_summary")[0].tensor_proto.string_val[0].decode()
    count = run[1]["module"].net.num_params
    for row in ("| ratio | `1/2` |", "| pattern | `swa gdn` |", f"| trained parameters | {count:,} |", "| seed | 0 |"):
        assert row in text.splitlines()
    picture = matplotlib.image.imread(io.BytesIO(events.Images("run/pattern")[0].encoded_image_string), format="png")
    assert picture.shape[1] == 1800
    colours = {tuple(np.rint(colour * 255).astype(int)) for colour in picture[::3, ::3, :3].reshape(-1, 3)}
    assert {(0xE9, 0xA2, 0x3B), (0x2F, 0x66, 0x90)} <= colours  # a layer of each of the two mixers
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    scalars = set(tiny.scalars(run[0]))
    for category in layout.category:
        for chart in category.chart:
            found = {tag for tag in scalars for pattern in chart.multiline.tag if re.match(pattern, tag)}
            assert found, chart.title


def test_hparams_show_settings_and_real_metrics(run: tuple[Path, dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(min(run[0].glob("events.*"))))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["stage"].string_value == "supervised"
    assert settings["pattern"].string_value == "swa gdn"
    assert settings["lr"].number_value == 3e-3
    assert settings["seed"].string_value == "0"
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    tags = [info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos]
    scalars = tiny.scalars(run[0])
    assert set(tags) <= set(scalars)  # every column has real values, and no placeholder was ever written
    assert all(step > 0 for tag in tags for step, _ in scalars[tag])


def test_a_fit_that_breaks_is_no_success_in_hparams(tmp_path: Path) -> None:
    class Broken(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise KeyError("broken")

    ends = []
    for callbacks in ([HParams(0), Broken()], [HParams(0)]):
        trainer = tiny.trainer(tmp_path, 1, callbacks)
        with contextlib.suppress(KeyError):
            trainer.fit(tiny.module(), datamodule=tiny.data())
        content = b"".join(path.read_bytes() for path in Path(str(trainer.log_dir)).glob("events.*"))
        assert b"_hparams_/session_start_info" in content
        ends.append(b"_hparams_/session_end_info" in content)
    assert ends == [False, True]


@pytest.mark.parametrize(("mode", "higher"), [("max", True), ("min", False)])
def test_no_score_but_a_number_is_the_best(mode: Any, higher: bool) -> None:
    assert is_better(0.3, None, mode)
    assert is_better(0.5, 0.3, mode) is higher
    assert is_better(0.3, 0.5, mode) is not higher
    assert not is_better(0.3, 0.3, mode)
    for score in (math.nan, math.inf, -math.inf):
        assert not is_better(score, None, mode)
        assert not is_better(score, 0.3, mode)


def test_metrics_json(run: tuple[Path, dict[str, Any]]) -> None:
    folder, found = run
    written = json.loads((folder / "metrics.json").read_text())
    scalars = tiny.scalars(folder)
    for tag in ("val/loss", "test/exact", "test/digit_accuracy"):
        assert written["metrics"][tag] == pytest.approx(scalars[tag][-1][1])
    assert written["pattern"] == "swa gdn"
    assert written["parameters"] == written["trainable_parameters"] == found["module"].net.num_params
    assert (written["steps"], written["samples"]) == (8, 32)
    assert written["tokens"] == found["throughput"].tokens > 0
    assert written["seconds"] > 0
    assert written["versions"]["torch"] == torch.__version__
    assert written["checkpoint"] == str(folder / "checkpoints" / "best.ckpt")


def test_the_last_lines_say_where_everything_is(run: tuple[Path, dict[str, Any]]) -> None:
    folder, found = run
    lines = found["summary"].lines(found["trainer"])
    assert lines[0] == f"run folder   {folder}"
    assert lines[1] == f"checkpoint   {folder / 'checkpoints' / 'best.ckpt'}"
    assert lines[-1] == f"watch        tensorboard --logdir {folder.parent}"
    assert any(line.startswith("score        test/digit_accuracy ") for line in lines)


def test_the_exported_model_is_the_trained_one(run: tuple[Path, dict[str, Any]]) -> None:
    folder, found = run
    model = hybridvl.load(folder / "model")
    assert tiny.same(dict(model.state_dict()), dict(found["module"].net.state_dict()))
    processor = Processor.load(folder / "model")
    sample = tiny.data(turns=1).source("test").sample(0, 0)
    inputs = processor.prompt(sample["messages"][:1])
    question = split_questions(tiny.batch(split="val", turns=1), 6, 4)[0]
    assert inputs["input_ids"].shape[0] == 1
    assert inputs["pixel_values"].shape[1] == question.pixel_values.shape[1]  # type: ignore[union-attr]
    assert processor.text(processor.chat.tokenizer("hello").input_ids) == "hello"
    assert processor.stop_id == 2


def test_predictions_are_written(run: tuple[Path, dict[str, Any]]) -> None:
    rows = [json.loads(line) for line in (run[0] / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert set(rows[0]) == {"kind", "question", "answer", "reply"}
    assert {row["kind"] for row in rows} <= {"line", "cell", "count", "page"}
    assert all(row["question"].endswith(("?", ".")) and row["answer"] for row in rows)


def test_the_best_checkpoint_is_the_one_with_the_best_metric(run: tuple[Path, dict[str, Any]]) -> None:
    folder, found = run
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    losses = dict(tiny.scalars(folder)["val/loss"])
    keeper = best["callbacks"]["Checkpoints"]
    assert keeper["best"] == pytest.approx(min(losses.values()))
    weights = {name.removeprefix("net."): tensor for name, tensor in best["state_dict"].items()}
    assert tiny.same(weights, dict(found["module"].net.state_dict()))
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 8


def test_an_unknown_metric_to_monitor_names_the_known_ones(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, 1, [Checkpoints(monitor="val/nothing")], validate=1)
    with pytest.raises(ConfigError, match=r"checkpoints\.monitor: .*'val/nothing'.*val/exact"):
        trainer.fit(tiny.module(), datamodule=tiny.data())


@pytest.mark.filterwarnings("error")
def test_drawing_what_the_font_lacks_is_silent() -> None:
    strange = draw(None, "\x00\x1b \u4e2d", "\x02", "7")
    assert (strange != draw(None, "", "", "7")).any()
