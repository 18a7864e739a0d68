"""Scalars of event files: against TensorBoard's own reader, resumed runs, cut and corrupt files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import write_events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from hybridvl.ablation.report.events import POINTS, CorruptEvents, merged, read_events

SCALARS = {"train/loss": [(1, 2.5), (2, 1.25), (7, 0.5)], "val/exact": [(7, 0.75)]}
points = st.lists(st.tuples(st.integers(0, 10**6), st.floats(width=32, allow_nan=False)), unique_by=lambda p: p[0])


@given(st.dictionaries(st.text("abc/_é", min_size=1, max_size=40), points.map(sorted), max_size=4))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_scalar_that_was_written_is_read(tmp_path: Path, scalars: dict[str, list[tuple[int, float]]]) -> None:
    found = read_events(write_events(tmp_path, scalars))
    assert set(found) == {tag for tag, values in scalars.items() if values}
    for tag, curve in found.items():
        assert curve.steps.tolist() == [step for step, _ in scalars[tag]]
        assert curve.values.tolist() == [value for _, value in scalars[tag]]


def test_as_tensorboard_reads_it_beside_pictures_and_texts(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    for step in range(30):
        writer.add_scalar("train/loss", 1 / (step + 1), step)
    writer.add_image("picture", torch.rand(3, 64, 64), 3)
    writer.add_text("pattern", "swa gdn*3 " * 100, 3)
    writer.add_scalar("val/exact", 0.5, 29)
    writer.close()
    (path,) = tmp_path.iterdir()
    found = read_events(path)
    reference = EventAccumulator(str(path), size_guidance={"scalars": 0})
    reference.Reload()
    assert set(found) == set(reference.Tags()["scalars"])
    for tag, curve in found.items():
        assert [(e.step, e.value) for e in reference.Scalars(tag)] == list(zip(curve.steps, curve.values, strict=True))


def test_a_later_file_of_a_resumed_run_wins(tmp_path: Path) -> None:
    first = write_events(tmp_path, {"loss": [(1, 5.0), (2, 4.0), (3, 3.0)]}, 0)
    second = write_events(tmp_path, {"loss": [(2, 4.5), (3, 3.5), (4, 2.5)], "exact": [(4, 1.0)]}, 1)
    found = merged([read_events(first), read_events(second)])
    assert found["loss"].steps.tolist() == [1, 2, 3, 4]
    assert found["loss"].values.tolist() == [5.0, 4.5, 3.5, 2.5]
    assert found["exact"].values.tolist() == [1.0]


@given(st.integers(0, 200))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_has_what_stands_before(tmp_path: Path, cut: int) -> None:
    path = write_events(tmp_path, SCALARS)
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - cut)])
    found = read_events(path)
    for tag, curve in found.items():
        assert list(zip(curve.steps, curve.values, strict=True)) == SCALARS[tag][: len(curve.steps)]
    if not cut:
        assert set(found) == set(SCALARS)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_is_seen(tmp_path: Path, data: st.DataObject) -> None:
    path = write_events(tmp_path, SCALARS)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(CorruptEvents, match="wrong checksum of the record at byte"):
        read_events(path)


def test_a_file_of_something_else_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1.here"
    path.write_text("this is no event file, whatever its name says")
    with pytest.raises(CorruptEvents):
        read_events(path)
    path.write_bytes(b"")
    assert read_events(path) == {}


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    curve = read_events(write_events(tmp_path, {"loss": [(step, float(step)) for step in range(5000)]}))["loss"]
    assert len(curve.steps) == POINTS
    assert (curve.steps[0], curve.steps[-1]) == (0, 4999)
    assert np.array_equal(curve.steps, curve.values)
    assert set(np.diff(curve.steps)) <= {5, 6}
