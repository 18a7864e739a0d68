"""Hybrids of a teacher and its student: scores against models built by hand, losses against a plain loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import place_cases
import pytest
import torch
from torch import Tensor

import hybridvl
from hybridvl.ablation.placement.hybrids import Hybrids, assemble
from hybridvl.ablation.placement.measures import Measures, layer_losses
from hybridvl.ablation.placement.ranking import LINEAR, by_beam, by_probe, by_removal
from hybridvl.conversion.target import target_config
from hybridvl.layers.errors import ConfigError
from hybridvl.models.vlm import VisionLanguageModel
from hybridvl.training.layer_distillation import LayerDistillation

ALL = [frozenset(kept) for count in range(5) for kept in itertools.combinations(range(4), count)]
CLOSE = {"rel": 1e-9, "abs": 1e-12}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return place_cases.teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def stage(teacher: str) -> LayerDistillation:
    return place_cases.stage(teacher)


@pytest.fixture(scope="module")
def hybrids(stage: LayerDistillation, teacher: str) -> Hybrids:
    return assemble(stage, teacher, "full")


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    return place_cases.batches()


def by_hand(stage: LayerDistillation, kept: Iterable[int], attention: str = "full") -> VisionLanguageModel:
    """A model of its own whose weights are copied from both, tensor by tensor."""
    kept = set(kept)
    pattern = " ".join(attention if layer in kept else "gdn" for layer in range(4))
    model = VisionLanguageModel(target_config(stage.teacher.config, pattern)).double().eval()
    theirs, own = stage.teacher.state_dict(), stage.net.state_dict()
    for name, tensor in model.state_dict().items():
        layer = int(name.split(".")[2]) if ".mixer." in name else None
        tensor.copy_((own if layer is not None and layer not in kept else theirs)[name])
    return model


def log_probabilities(model: VisionLanguageModel, batch: dict[str, Any], row: int) -> Tensor:
    """(T, vocab) of one conversation alone, without its padding, the images of those before it left out."""
    tokens = int(batch["attention_mask"][row].sum())
    sizes = (batch["input_ids"] == 6).sum(1) * 4  # patches of each conversation, all in one image
    pixels = batch["pixel_values"].split(sizes.tolist())[row]
    inputs = batch["input_ids"][row : row + 1, :tokens]
    positions = batch["position_ids"][:, row : row + 1, :tokens]
    out = model(inputs, position_ids=positions, pixel_values=pixels, image_grid_thw=batch["image_grid_thw"][[row]])
    return out.logits[0].log_softmax(-1)


def reference_scores(model: VisionLanguageModel, teacher: VisionLanguageModel, batches: Any) -> dict[str, list[float]]:
    """Each metric of each conversation, answer by answer and token by token."""
    found: dict[str, list[float]] = {"divergence": [], "cross_entropy": [], "exact": []}
    for batch in batches:
        for row, labels in enumerate(batch["labels"].tolist()):
            own, theirs = (log_probabilities(net, batch, row) for net in (model, teacher))
            wanted = [at for at, label in enumerate(labels) if at and label != -100]
            divergences = [float((theirs[at - 1].exp() * (theirs[at - 1] - own[at - 1])).sum()) for at in wanted]
            found["divergence"].append(sum(divergences) / len(wanted))
            found["cross_entropy"].append(-sum(float(own[at - 1, labels[at]]) for at in wanted) / len(wanted))
            answers: list[bool] = []
            for at in wanted:
                right = int(own[at - 1].argmax()) == labels[at]
                if at - 1 in wanted:
                    answers[-1] = answers[-1] and right
                else:
                    answers.append(right)
            assert len(answers) == 2
            found["exact"].append(sum(answers) / len(answers))
    return found


@pytest.mark.parametrize("metric", ["divergence", "cross_entropy", "exact"])
@pytest.mark.parametrize("kept", [(), (2,), (0, 3), (0, 1, 2, 3)])
@torch.no_grad()
def test_scores_are_those_of_a_model_built_by_hand(
    stage: LayerDistillation, hybrids: Hybrids, batches: Any, metric: str, kept: tuple[int, ...]
) -> None:
    placement = frozenset(kept)
    scores = Measures(hybrids, batches, metric).scores([placement, frozenset((1,))])[placement]
    expected = reference_scores(by_hand(stage, kept), stage.teacher, batches)[metric]
    assert len(scores) == 6
    assert scores == pytest.approx(expected, **CLOSE)
    if metric == "divergence":
        assert all(score > 1e-3 for score in scores) if len(kept) < 4 else scores == pytest.approx([0] * 6, abs=1e-12)


@torch.no_grad()
def test_answers_that_are_right_are_counted(stage: LayerDistillation, hybrids: Hybrids, batches: Any) -> None:
    told = []
    for batch in batches:  # the teacher's own first choices as labels
        batch = {**batch, "labels": batch["labels"].clone()}
        for row in range(len(batch["labels"])):
            choices = log_probabilities(stage.teacher, batch, row).argmax(-1)
            for at in (batch["labels"][row] != -100).nonzero().flatten().tolist():
                batch["labels"][row, at] = choices[at - 1]
        told.append(batch)
    scores = Measures(hybrids, told, "exact").scores(ALL)
    assert scores[frozenset(range(4))] == [1.0] * 6
    assert sum(scores[LINEAR]) < 6
    for placement in (LINEAR, frozenset((0,)), frozenset((0, 1, 3))):
        assert scores[placement] == reference_scores(by_hand(stage, placement), stage.teacher, told)["exact"]


@torch.no_grad()
def test_together_or_one_by_one_is_the_same_to_the_last_bit(hybrids: Hybrids, batches: Any) -> None:
    together = Measures(hybrids, batches).scores(ALL)
    for placement in ALL:
        assert Measures(hybrids, batches).scores([placement])[placement] == together[placement]
    assert len(set(map(tuple, together.values()))) == len(ALL)


def test_hybrids_that_begin_alike_run_their_first_layers_once(hybrids: Hybrids, batches: Any) -> None:
    """Up to the layer that it probes, a probe is the model of linear layers."""
    runs: list[int] = []
    mixers = [block.mixer for layer in range(4) for block in hybrids.own(layer)]
    hooks = [mixer.register_forward_hook(lambda *_: runs.append(1)) for mixer in mixers]
    try:
        by_probe(Measures(hybrids, batches[:1]))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(runs) == 4 + (2 + 3 + 4 + 5)  # the teacher itself, then at each depth those that differ up to it


@pytest.mark.parametrize("kind", ["mse", "relative_mse", "cosine"])
@pytest.mark.parametrize("match", ["layer", "mixer"])
@torch.no_grad()
def test_layer_losses_are_those_of_a_plain_loop(
    stage: LayerDistillation, hybrids: Hybrids, batches: Any, kind: str, match: str
) -> None:
    losses = layer_losses(hybrids, batches, kind, match)
    expected: dict[int, list[float]] = {layer: [] for layer in range(4)}
    for batch in batches:
        mask = batch["attention_mask"]
        x = stage.teacher.embed(batch["input_ids"], batch["pixel_values"], batch["image_grid_thw"])
        sequence = stage.teacher.layer_sequence(x, batch["position_ids"])
        for layer in range(4):
            theirs, own = stage.teacher.decoder.layers[layer], stage.net.decoder.layers[layer]
            target, output = (block.mixer(block.mixer_norm(x), sequence) for block in (theirs, own))
            following = theirs.finish(x, target)
            if match == "layer":
                target, output = following, own.finish(x, output)
            for row in range(3):
                distances = []
                for a, b in zip(output[row][mask[row]], target[row][mask[row]], strict=True):
                    square = float(((a - b) ** 2).sum())
                    relative = square / float(b @ b)
                    cosine = 1 - float(a @ b) / float(a.norm() * b.norm())
                    distances.append({"mse": square / len(a), "relative_mse": relative, "cosine": cosine}[kind])
                expected[layer].append(sum(distances) / len(distances))
            x = following
    assert set(losses) == {0, 1, 2, 3}
    for layer, values in expected.items():
        assert losses[layer] == pytest.approx(values, **CLOSE)


def test_layer_losses_are_those_that_training_reports(stage: LayerDistillation, hybrids: Hybrids, batches: Any) -> None:
    with torch.no_grad():
        reported = [float(part.loss) for part in stage.layer_losses(batches[0])]
    losses = layer_losses(hybrids, batches[:1])
    tokens = batches[0]["attention_mask"].sum(1).tolist()
    weighted = [sum(n * v for n, v in zip(tokens, losses[i], strict=True)) / sum(tokens) for i in range(4)]
    assert weighted == pytest.approx(reported, **CLOSE)


def test_rankings_are_differences_of_scores(hybrids: Hybrids, batches: Any) -> None:
    measures = Measures(hybrids, batches, "cross_entropy")
    mean = {placement: sum(scores) / 6 for placement, scores in measures.scores(ALL).items()}
    probe, removal = by_probe(measures), by_removal(measures)
    every = frozenset(range(4))
    for layer in range(4):
        assert probe.scores[layer].mean == pytest.approx(mean[LINEAR] - mean[frozenset((layer,))], **CLOSE)
        assert removal.scores[layer].mean == pytest.approx(mean[every - {layer}] - mean[every], **CLOSE)
        assert probe.scores[layer].low < probe.scores[layer].mean < probe.scores[layer].high
    assert probe.order == sorted(range(4), key=lambda layer: mean[frozenset((layer,))])
    assert removal.chosen(2) == frozenset(sorted(range(4), key=lambda layer: -mean[every - {layer}])[:2])
    pairs = [placement for placement in ALL if len(placement) == 2]
    assert by_beam(measures, 4).chosen(2) == min(pairs, key=lambda pair: mean[pair])
    greedy = min((frozenset((layer,)) for layer in range(4)), key=lambda one: mean[one])
    assert by_beam(measures, 1).chosen(2) == min((p for p in pairs if greedy < p), key=lambda pair: mean[pair])


@torch.no_grad()
def test_attention_with_a_window_has_the_teachers_weights(stage: LayerDistillation, teacher: str, batches: Any) -> None:
    hybrids = assemble(stage, teacher, "swa(window=5)")
    for layer, mixer in hybrids.attention.items():
        own_block = stage.teacher.decoder.layers[layer]
        theirs = {name: tensor.data_ptr() for name, tensor in own_block.mixer.named_parameters()}
        assert {name: own.data_ptr() for name, own in mixer.named_parameters()} == theirs
    placement = frozenset((1, 2))
    scores = Measures(hybrids, batches).scores([placement])[placement]
    model = by_hand(stage, placement, "swa(window=5)")
    assert scores == pytest.approx(reference_scores(model, stage.teacher, batches)["divergence"], **CLOSE)
    narrow = Measures(hybrids, batches).scores([frozenset(range(4))])
    assert min(narrow[frozenset(range(4))]) > 1e-3  # the teacher's own weights, yet not the teacher


@torch.no_grad()
def test_a_hybrid_as_a_model_is_saved_and_loaded(
    stage: LayerDistillation, teacher: str, batches: Any, tmp_path: Path
) -> None:
    hybrids, placement = assemble(stage, teacher, "swa(window=5)"), frozenset((0, 2))
    model = hybrids.model(placement, target_config(stage.teacher.config, "(swa(window=5) gdn)*2"))
    hybridvl.save(model, tmp_path / "model")
    loaded = hybridvl.load(tmp_path / "model", dtype=torch.float64)
    assert loaded.pattern == "(swa(window=5) gdn)*2"
    expected = by_hand(stage, placement, "swa(window=5)").state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_layers_that_stay_are_no_choice(tmp_path: Path, batches: Any) -> None:
    folder = place_cases.teacher(tmp_path / "teacher", "full gdn full full")
    stage = place_cases.stage(folder)
    hybrids = assemble(stage, folder, "full")
    assert hybrids.layers == (0, 2, 3)
    everything = frozenset((0, 2, 3))
    assert Measures(hybrids, batches).scores([everything])[everything] == pytest.approx([0] * 6, abs=1e-12)


@pytest.mark.parametrize("attention", ["swa(heads=4, kv_heads=1, window=5)", "mamba2", "full(rope=false)"])
def test_attention_that_is_not_the_teachers_is_refused(stage: LayerDistillation, teacher: str, attention: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot go on with the weights of the teacher's layer 0"):
        assemble(stage, teacher, attention)


def test_a_student_of_a_later_stage_is_refused(teacher: str) -> None:
    stage = place_cases.stage(teacher)
    weight = stage.net.decoder.layers[1].mlp.up_proj.weight
    stage.net.decoder.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight + 1e-3)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight is not the teacher's; expected a student"):
        assemble(stage, teacher, "full")


def test_samples_without_answers_have_no_score(hybrids: Hybrids, batches: Any) -> None:
    silent = {**batches[0], "labels": batches[0]["labels"].clone()}
    silent["labels"][1] = -100
    whole, fewer = (Measures(hybrids, [batch]).scores([LINEAR])[LINEAR] for batch in (batches[0], silent))
    assert fewer == [whole[0], whole[2]]
    silent["labels"][:] = -100
    with pytest.raises(ConfigError, match="0 validation samples with answers; expected at least 2"):
        Measures(hybrids, [silent]).scores([LINEAR])
