"""`hybridvl place` as a user runs it: a student trained once, files that agree with what is printed, mistakes told."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import cli_runs
import pytest
import torch

import hybridvl
from hybridvl.cli import main
from hybridvl.models.config import ModelConfig
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.pattern import parse_pattern

TEXT = """
model: {student: {inherit: qkvo}}
data: {batch_size: 4, eval_batch_size: 2, task: {init_args: {val_pages: 8, eval_turns: 2}}}
trainer: {max_steps: 4, val_check_interval: 4, max_epochs: 1, num_sanity_val_steps: 0}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, the recipe of its student, and one search that has ended."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    config = ModelConfig.from_dict({**cli_runs.RECIPE["model"]["net"], "pattern": "full*4", "init_std": 0.2})
    hybridvl.save(VisionLanguageModel(config), folder / "teacher")
    cli_runs.stage_recipe(folder, "layers", {"student": {"inherit": "qkvo"}}, text=TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        assert main([*asked("out"), "--keep", "2", "--rank", "loss", "beam", "probe", "--also", "gdn full*2 gdn"]) == 0
    return folder


def asked(out: str) -> list[str]:
    return ["place", "teacher", "--config", "layers.yaml", "--out", out]


@pytest.fixture
def here(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    return work


def test_everything_is_in_one_folder(here: Path) -> None:
    found = json.loads((here / "out/place.json").read_text())
    assert (here / "out/place.png").read_bytes().startswith(b"\x89PNG")
    assert (here / "out/layers/version_0/done.json").is_file()
    assert found["validated_on_samples"] == found["ranked_on_samples"] == 4
    assert set(found["rankings"]) == {"loss", "beam", "probe"}
    assert found["inputs"]["keep"] == 2
    assert found["inputs"]["teacher_pattern"] == "full*4"
    assert found["inputs"]["versions"]["torch"] == torch.__version__
    for ranking in ("loss", "probe"):
        means = {int(layer): score["mean"] for layer, score in found["rankings"][ranking]["scores"].items()}
        order = found["rankings"][ranking]["order"]
        assert order == sorted(means, key=lambda layer: -means[layer])
        assert found["rankings"][ranking]["keeps"] == sorted(order[:2])
    candidates = found["candidates"]
    assert found["winner"] == candidates[0]["pattern"]
    scores = [candidate["score"]["mean"] for candidate in candidates]
    assert scores == sorted(scores)
    assert candidates[0]["behind"]["mean"] is None
    for candidate in candidates[1:]:
        assert candidate["behind"]["mean"] == pytest.approx(candidate["score"]["mean"] - scores[0])
    for candidate in candidates:
        layers = parse_pattern(candidate["pattern"]).layers
        assert [layer for layer, text in enumerate(layers) if text == "full"] == candidate["kept"]
    names = [name for candidate in candidates for name in candidate["names"]]
    own = ["loss", "beam", "probe", "uniform", "uniform-last", "bottom", "top", "gdn full*2 gdn"]
    assert sorted(names) == sorted(own)
    assert found["attention_everywhere"]["mean"] == pytest.approx(0, abs=1e-6)


def test_the_best_is_a_model_that_another_stage_can_go_on_from(here: Path) -> None:
    winner = json.loads((here / "out/place.json").read_text())["candidates"][0]
    model, teacher = hybridvl.load(here / "out/model"), hybridvl.load(here / "teacher")
    student = hybridvl.load(here / "out/layers/version_0/model")
    assert model.pattern == winner["pattern"]
    for layer in range(4):
        source = teacher if layer in winner["kept"] else student
        for name, tensor in source.decoder.layers[layer].state_dict().items():
            assert torch.equal(tensor, model.decoder.layers[layer].state_dict()[name]), name
    assert (here / "out/model/tokenizer.json").is_file()


def test_again_trains_nothing_and_says_the_same(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (here / "out/place.json").read_text()
    weights = (here / "out/layers/version_0/model/model.safetensors").stat().st_mtime_ns
    again = [*asked("out"), "--keep", "2", "--rank", "loss", "beam", "probe", "--also", "gdn full*2 gdn"]
    assert main(again) == 0
    printed = capsys.readouterr().out
    assert (here / "out/layers/version_0/model/model.safetensors").stat().st_mtime_ns == weights
    assert not (here / "out/layers/version_1").exists()
    assert (here / "out/place.json").read_text() == before
    winner = json.loads(before)["winner"]
    assert printed.splitlines()[-1] == f"pattern      {winner}"
    assert all(candidate["pattern"] in printed for candidate in json.loads(before)["candidates"])


def test_a_budget_of_bytes_and_a_students_folder(here: Path) -> None:
    student = ["--student", "out/layers/version_0/model", "--attention", "swa(window=24)", "--metric", "exact"]
    given = ["--budget.state_bytes", "11000", "--context", "40"]
    assert main([*asked("bytes"), *student, *given, "--rank", "removal", "--batches", "1"]) == 0
    found = json.loads((here / "bytes/place.json").read_text())
    assert found["ranked_on_samples"] == found["validated_on_samples"] == 2
    assert "swa(window=24)" in found["winner"]
    assert not (here / "bytes/layers").exists()
    scores = [candidate["score"]["mean"] for candidate in found["candidates"]]
    assert scores == sorted(scores, reverse=True)  # of answers that are right, more is better
    model = hybridvl.load(here / "bytes/model")
    state = model.init_state(1)
    model(torch.arange(40)[None] + 20, state=state)
    kept = {candidate["state_bytes"]: len(candidate["kept"]) for candidate in found["candidates"]}
    assert list(kept) == [state.nbytes]
    per_layer = [layer.nbytes for layer in state.layers]
    one_more = state.nbytes + max(per_layer) - min(per_layer)
    assert state.nbytes <= 11000 < one_more, (state.nbytes, one_more, kept)


MISTAKES = {
    "--keep 4": r"--keep: 4; expected 1 to 3 of 4 layers",
    "--keep 0": r"--keep: 0; expected 1 to 3 of 4 layers",
    "--keep many": r"argument --keep: invalid int value: 'many'",
    "": r"one of the arguments --keep --budget\.state_bytes --budget\.params is required",
    "--budget.state_bytes 10": r"--budget: no layer can keep attention; expected .*: [\d,]+ to [\d,]+ bytes of state",
    "--budget.params 100000000": r"--budget: (every layer can keep|attention costs no more than) .* parameters",
    "--keep 2 --linear full": r"--linear: 'full' is what --attention says",
    "--keep 2 --linear gnd": r"--linear: layer pattern, column 1: unknown mixer 'gnd', did you mean 'gdn'\?",
    "--keep 2 --attention full*2": r"--attention: 'full\*2' is 2 layers; expected one",
    "--keep 2 --attention mamba2": r"--attention: 'mamba2' cannot go on with",
    "--keep 2 --metric accuracy": r"--metric: 'accuracy'; expected one of divergence, cross_entropy, exact",
    "--keep 2 --rank size": r"--rank: 'size'; expected one of loss, probe, removal, beam",
    "--keep 2 --beam 0": r"--beam: 0; expected at least 1",
    "--keep 2 --also full*2": r"--also: 'full\*2'; expected 4 layers of full and gdn",
    "--keep 2 --also full*3 gdn": r"unrecognized arguments|--also: 'full\*3'; expected 4 layers",
    "--keep 2 --student teacher": r"--student: teacher: its pattern is 'full\*4'; expected 'gdn\*4'",
    "--keep 2 --student nowhere": r"--student: nowhere: no such folder",
    "--keep 2 --batches 9 --student out/layers/version_0/model": r"--batches: .* has 4 batches; expected at least 18",
    "--keep 2 --model.student.pattern gdn*4": r"--model\.student\.pattern: not to be given here: .*--linear",
    "--keep 2 --model.student.inhrit none": r"model\.student\.inhrit: unknown key, did you mean .*\.inherit",
    "--keep 2 --data.batch_size": r"--data\.batch_size: expected a value after it",
    "--keep 2 --out layers.yaml": r"--out: layers\.yaml: is a file; expected a folder",
    "--keep 2 --config nothing.yaml": r"nothing\.yaml: cannot be read",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_sentence(here: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    before = sorted(path.name for path in here.iterdir())
    assert main([*asked("mistaken"), *words.split()]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "Traceback" not in told
    assert re.search(MISTAKES[words], told), told
    assert sorted(path.name for path in here.iterdir()) == before


def test_another_teacher_folder_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["place", "nowhere", "--config", "layers.yaml", "--keep", "2"]) == 2
    assert "TEACHER: nowhere: no such folder" in capsys.readouterr().err
