"""Pictures of a report: slices found by name, bands, and what stands in the figures that are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from report_runs import recipe, write_run, write_study
from scipy import stats
from strange_style import strange_style

from hybridvl.ablation.report.analysis import Analysis, analyse
from hybridvl.ablation.report.cache import Cache
from hybridvl.ablation.report.cell_pictures import draw_cells, draw_differences
from hybridvl.ablation.report.cells import Settings
from hybridvl.ablation.report.cost_pictures import draw_growth, draw_pareto
from hybridvl.ablation.report.curve_pictures import band, curve_tags, draw_curves, draw_slices
from hybridvl.ablation.report.events import Curve
from hybridvl.ablation.report.figures import draw_all
from hybridvl.ablation.report.guessing import guessing
from hybridvl.ablation.report.naming import cell_names, shared_labels
from hybridvl.ablation.report.runs import collect
from hybridvl.ablation.report.slices import slices_of
from hybridvl.ablation.report.style import limits
from hybridvl.ablation.report.tables import length_tables

VALUES = {"0": [0.42, 0.40, 0.47], "1/4": [0.61, 0.66, 0.70], "1": [0.60, 0.68, 0.69]}


def analysed(folder: Path, settings: Settings | None = None) -> Analysis:
    return analyse(collect([folder], Cache()), settings or Settings())


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "ratio", VALUES)


@pytest.fixture
def sliced(tmp_path: Path) -> Path:
    """Two patterns with slices by lag, so that costs differ, too."""
    for pattern, start in (("gdn*3", 0.5), ("swa*3", 0.8)):
        for seed in (0, 1):
            metrics = {"test/exact": start + 0.01 * seed}
            metrics |= {f"test/lag_{lag}_exact": start - 0.1 * i for i, lag in enumerate(("1", "2", "3_4", "9_16"))}
            config = recipe(seed, {"mixer": pattern.split("*")[0]}, pattern)
            write_run(tmp_path / pattern.split("*")[0] / f"seed_{seed}", config, metrics)
    return tmp_path


def test_slices_by_the_names_of_metrics() -> None:
    logged = [
        *("test/exact", "test/digit_accuracy", "val/exact", "val/lag_1_exact", "test/lag_1_digit_accuracy"),
        *("test/lag_9_16_exact", "test/lag_1_exact", "test/lag_3_4_exact"),
        *("test/items_5_8_lag_1_exact", "test/items_5_8_place_lag_3_4_exact", "test/items_9_16_lag_1_exact"),
        *("test/page_exact", "test/cell_exact"),
    ]
    found = {(part.axis, part.panel): part for part in slices_of("test/exact", logged)}
    assert set(found) == {
        *(("lag", ""), ("lag", "items 5-8"), ("lag", "items 9-16"), ("place lag", "items 5-8"), ("kind", ""))
    }
    by_lag = found["lag", ""]
    assert by_lag.labels == ("1", "3-4", "9-16")
    assert by_lag.metrics == ("test/lag_1_exact", "test/lag_3_4_exact", "test/lag_9_16_exact")
    assert by_lag.ordered
    assert found["kind", ""].labels == ("cell", "page")
    assert not found["kind", ""].ordered
    (other,) = slices_of("test/digit_accuracy", logged)
    assert other.metrics == ("test/lag_1_digit_accuracy",)


def test_a_band_is_the_interval_at_every_step(study: Path) -> None:
    analysis = analysed(study)
    curves = [Curve(np.array([0, 10, 20]), np.array(values)) for values in ([1.0, 2.0, 4.0], [3.0, 3.0, 3.0])]
    found = band(curves, analysis)
    assert found.steps.tolist() == [0, 10, 20]
    assert found.mean.tolist() == [2.0, 2.5, 3.5]
    low, high = stats.t.interval(0.95, 1, 2.0, stats.sem([1.0, 3.0]))
    assert (found.low[0], found.high[0]) == pytest.approx((low, high))


def test_a_band_of_curves_with_other_steps(study: Path) -> None:
    curves = [Curve(np.array([0, 10, 20]), np.array([0.0, 1.0, 2.0])), Curve(np.array([5, 25]), np.array([1.0, 3.0]))]
    found = band(curves, analysed(study))
    assert found.steps.tolist() == [5, 10, 20]
    assert found.mean.tolist() == pytest.approx([0.75, 1.25, 2.25])


def test_the_figure_of_cells_shows_every_seed_mean_and_interval(study: Path) -> None:
    figure = draw_cells(analysed(study), "test/exact")
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(VALUES)
    points = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
    means = [np.mean(values) for values in VALUES.values()]
    assert sorted(points) == pytest.approx(sorted([*means, *(v for values in VALUES.values() for v in values)]))
    bars = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert bars[0] == pytest.approx(stats.t.interval(0.95, 2, means[0], stats.sem(VALUES["0"])))
    assert axes.get_xlabel() == "test/exact (share, 0 to 1)"
    assert any("95 % interval" in text.get_text() for text in figure.texts)


def test_the_figure_of_differences(study: Path) -> None:
    figure = draw_differences(analysed(study), "test/exact")
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1/4", "1"]
    pairs = [b - a for label in ("1/4", "1") for a, b in zip(VALUES["0"], VALUES[label], strict=True)]
    drawn = [line.get_xdata()[0] for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert drawn == pytest.approx(pairs)
    assert axes.get_xlabel() == "test/exact, minus that of ratio=0"


def test_the_figure_of_learning_curves(study: Path) -> None:
    analysis = analysed(study)
    assert curve_tags(analysis, "test/exact") == ["val/exact"]
    figure = draw_curves(analysis, "test/exact")
    assert figure is not None
    (axes,) = figure.axes
    assert [line.get_ydata()[-1] for line in axes.lines] == pytest.approx([np.mean(v) for v in VALUES.values()])
    assert len(axes.collections) == 3  # bands
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer steps", "val/exact (share, 0 to 1)")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(VALUES)


def test_the_figure_of_slices(sliced: Path) -> None:
    figure = draw_slices(analysed(sliced), "test/exact")
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3-4", "9-16"]
    assert axes.get_xlabel() == "lag"
    lines = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 4]
    assert [list(line) for line in lines] == [pytest.approx([s - 0.1 * i for i in range(4)]) for s in (0.5, 0.8)]


def test_the_figure_of_costs(sliced: Path) -> None:
    analysis = analysed(sliced)
    figure = draw_pareto(analysis, "test/exact")
    assert figure is not None
    labels = [axes.get_xlabel() for axes in figure.axes if axes.get_visible()]
    assert labels == ["forward FLOPs per token, 128 tokens", "state of one row after 128 tokens"]
    fronts = [line.get_xdata() for line in figure.axes[1].lines if line.get_label() == "front"]
    # The window's state is smaller and its quality higher: it alone is the front.
    assert list(fronts[0]) == [analysis.costs[1].state_bytes]
    assert analysis.cells[1].labels == {"mixer": "swa"}
    assert draw_pareto(analysed(sliced / "swa"), "test/exact") is None


def test_the_figure_of_growth(sliced: Path) -> None:
    analysis = analysed(sliced)
    figure = draw_growth(analysis, "test/exact")
    assert figure is not None
    (axes,) = figure.axes
    for line, cost in zip(axes.lines, analysis.costs, strict=True):
        assert list(line.get_xdata()) == [128, 1024, 8192, 65536]
        assert list(line.get_ydata()) == [cost.growth[tokens] for tokens in (128, 1024, 8192, 65536)]


def test_decode_steps_are_timed_after_so_many_tokens(sliced: Path) -> None:
    analysis = analyse(collect([sliced], Cache()), Settings(), measured=(16, 64))
    for cost in analysis.costs:
        assert list(cost.latency) == [16, 64]
        assert cost.decode_seconds == cost.latency[64]
        assert min(cost.latency.values()) > 0
    figure = draw_growth(analysis, "test/exact")
    assert figure is not None
    assert [list(line.get_xdata()) for line in figure.axes[1].lines] == [[16, 64]] * 2
    (head, rows) = length_tables(analysis)[0]
    assert head == ["cell", "state after 16", "state after 64", "step after 16", "step after 64"]
    assert [row[0] for row in rows] == ["mixer=gdn", "mixer=swa"]
    assert [float(row[4].removesuffix(" ms")) for row in rows] == pytest.approx(
        [1e3 * cost.latency[64] for cost in analysis.costs], abs=5e-3
    )
    spans = [line.get_segments() for line in figure.axes[1].collections]  # from the shortest to the slowest block
    for (((_, low), (_, high)),), cost in zip(spans[::2], analysis.costs, strict=True):
        assert (low, high) == pytest.approx((1e3 * cost.latency[16], 1e3 * max(cost.latency_blocks[16])))
    pareto = draw_pareto(analysis, "test/exact")
    assert pareto is not None
    assert "measured time of a decode step after 64 tokens (ms)" in [axes.get_xlabel() for axes in pareto.axes]


def test_times_that_runs_have_logged_come_first(tmp_path: Path) -> None:
    for seed, seconds in enumerate((0.002, 0.004)):
        metrics = {"test/exact": 0.5, "test/decode_seconds": seconds}
        write_run(tmp_path / "a" / f"seed_{seed}", recipe(seed), metrics)
    (cost,) = analysed(tmp_path).costs
    assert cost.decode_seconds == pytest.approx(0.003)


def test_how_far_guessing_gets(tmp_path: Path) -> None:
    """On frame recall every digit is as likely as any other."""
    kinds = ("", "lag_1_", "lag_2_", "lag_3_4_")
    for seed in (0, 1):
        config = recipe(seed, {"mixer": "gdn"})
        arguments = {"frames": 4, "test_streams": 20}
        config["data"]["task"] = {
            "class_path": "hybridvl.data.probes.frame_recall.FrameRecall",
            "init_args": arguments,
        }
        metrics = {f"test/{kind}exact": 0.9 for kind in kinds}
        write_run(tmp_path / "gdn" / f"seed_{seed}", config, {**metrics, "test/digit_accuracy": 0.9})
    analysis = analysed(tmp_path)
    found = guessing(analysis.cells, [f"test/{kind}exact" for kind in kinds] + ["test/digit_accuracy", "test/a_exact"])
    assert found == {f"test/{kind}exact": pytest.approx(0.1) for kind in kinds}
    figure = draw_slices(analysis, "test/exact")
    assert figure is not None
    dotted = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in dotted] == [pytest.approx([0.1] * 9)]


@pytest.fixture
def two_tasks(tmp_path: Path) -> Path:
    """Two patterns on two probes, of which each has slices and a level of guessing of its own."""
    tasks = {
        "frames": ("frame_recall.FrameRecall", {"frames": 4, "test_streams": 20}, ("lag_1", "lag_2", "lag_3_4")),
        "pages": ("dense_pages.DensePages", {"digits": [1, 2], "test_samples": 20}, ("digits_1", "digits_2")),
    }
    for task, (name, arguments, kinds) in tasks.items():
        for pattern, value in (("gdn*3", 0.5), ("swa*3", 0.7)):
            for seed in (0, 1):
                config = recipe(seed, {"task": task, "mixer": pattern[:3]}, pattern)
                config["data"]["task"] = {"class_path": f"hybridvl.data.probes.{name}", "init_args": arguments}
                value = value + 0.01 + (task == "pages") / 8
                metrics = {"test/exact": value, **{f"test/{kind}_exact": value for kind in kinds}}
                write_run(tmp_path / task / pattern[:3] / f"seed_{seed}", config, metrics)
    return tmp_path


def test_guessing_is_that_of_the_cells_that_were_asked(two_tasks: Path) -> None:
    figure = draw_slices(analysed(two_tasks), "test/exact")
    assert figure is not None
    levels = {}
    for axes in figure.axes:
        (dotted,) = [line for line in axes.lines if line.get_linestyle() == ":"]
        levels[axes.get_xlabel()] = np.asarray(dotted.get_ydata())
    assert levels["lag"].tolist() == pytest.approx([0.1] * 9)
    # Of one digit and of two: two levels, and no line from one to the other.
    assert levels["digits"][[0, 1, 3, 4]].tolist() == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert np.isnan(levels["digits"][[2, 5]]).all()


def test_each_task_has_a_front_of_its_own(two_tasks: Path) -> None:
    """A share of other answers is no better or worse."""
    analysis = analysed(two_tasks)
    figure = draw_pareto(analysis, "test/exact")
    assert figure is not None
    state = next(axes for axes in figure.axes if axes.get_xlabel().startswith("state"))
    fronts = [line for line in state.lines if line.get_drawstyle() == "steps-post"]
    means = {cell.name: r.interval.mean for cell, r in zip(analysis.cells, analysis.results["test/exact"], strict=True)}
    assert [list(line.get_ydata()) for line in fronts] == [
        [means["mixer=swa, task=frames"]],
        [means["mixer=swa, task=pages"]],
    ]
    assert len({line.get_linestyle() for line in fronts}) == 2


def test_pictures_are_readable_files(study: Path, tmp_path: Path) -> None:
    pictures = draw_all(analysed(study))
    assert [picture.name for picture in pictures] == [
        *(f"test-exact-{what}.png" for what in ("cells", "differences", "curves")),
        "growth.png",
    ]
    for picture in pictures:
        (tmp_path / picture.name).write_bytes(picture.data)
        image = imread(tmp_path / picture.name)
        assert min(image.shape[:2]) > 200
        assert 0.001 < (image[..., :3].min(axis=-1) < 0.9).mean() < 0.5  # neither empty nor full


def test_pictures_do_not_depend_on_a_matplotlibrc(study: Path, caplog: pytest.LogCaptureFixture) -> None:
    analysis = analysed(study)
    plain = draw_all(analysis)
    with strange_style():
        assert [picture.data for picture in draw_all(analysis)] == [picture.data for picture in plain]
    assert "findfont" not in caplog.text


def test_of_many_cells_the_best_are_drawn_and_the_rest_is_counted(tmp_path: Path) -> None:
    study = write_study(tmp_path / "many", {str(label): [label / 100, label / 100] for label in range(50)})
    figure = draw_cells(analysed(study), "test/exact")
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [str(label) for label in range(10, 50)]
    assert "the 40 best of 50 cells" in figure.get_suptitle()


@pytest.fixture
def long_names(tmp_path: Path) -> Path:
    """Twelve cells whose labels have many words, two of them the same in all."""
    for number in range(12):
        words = " ".join(f"layer{layer}(option={number})" for layer in range(8))
        config = recipe(0, {"pattern": words, "size": "small", "lr": "0.003"}, "gdn*2 swa" if number % 2 else "swa*3")
        metrics = {"test/exact": 0.2 + 0.05 * number, **{f"test/lag_{lag}_exact": 0.5 for lag in (1, 2)}}
        curve = [(step, 100.0 / step) for step in (1, 10, 100)]
        write_run(tmp_path / str(number) / "seed_0", config, metrics, {"val/loss": curve})
    return tmp_path


def test_names_leave_out_what_all_cells_have(long_names: Path) -> None:
    analysis = analysed(long_names)
    heading, names = cell_names(analysis, range(12))
    assert heading == "pattern"
    assert names[3].replace("\n", " ").startswith("layer0(option=3) layer1(option=3) layer2(option=3)")
    assert shared_labels(analysis, range(12)) == "; all with lr=0.003, size=small"
    assert shared_labels(analysis, [3]) == ""
    figure = draw_cells(analysis, "test/exact")
    assert figure is not None
    assert any("all with lr=0.003, size=small" in text.get_text().replace("\n", " ") for text in figure.texts)


def test_legends_of_long_names_are_in_their_pictures(long_names: Path) -> None:
    analysis = analysed(long_names)
    for draw in (draw_curves, draw_slices, draw_growth, draw_pareto):
        figure = draw(analysis, "test/exact")
        assert figure is not None
        figure.canvas.draw()
        found = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend() is not None)]
        for legend in found:
            box = legend.get_window_extent()
            assert min(box.x0, box.y0, figure.bbox.x1 - box.x1, figure.bbox.y1 - box.y1) > -1, draw
        assert found


def test_of_many_cells_those_on_the_front_have_numbers(long_names: Path) -> None:
    figure = draw_pareto(analysed(long_names), "test/exact")
    assert figure is not None
    state = next(axes for axes in figure.axes if axes.get_xlabel().startswith("state"))
    found = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend() is not None)]
    names = [text.get_text() for text in found[0].get_texts()]
    assert [name[:20] for name in names] == ["1  layer0(option=10)", "2  layer0(option=11)"]  # the best of each pattern
    assert sorted(text.get_text() for text in state.texts) == ["1", "2"]


def test_limits_of_axes() -> None:
    assert limits([0.2, 0.8], [0.1, 0.9], share=True) == pytest.approx((0.052, 0.948))
    low, high = limits([0.4, 0.5], [-5.0, 6.0], share=True)  # what two seeds leave open is cut
    assert 0.2 < low < 0.4 < 0.5 < high < 0.7
    assert limits([0.97, 1.0], [0.9, 1.1], share=True)[1] == 1.02
    assert limits([], [], share=False) == (0.0, 1.0)
    assert limits([3.0], [float("nan")], share=False)[0] < 3.0
