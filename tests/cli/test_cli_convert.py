"""`hybridvl convert` from a folder that transformers wrote to one that generates, and what it says about mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hybridvl
from hybridvl.cli import main
from hybridvl.data.tokens import load_tokenizer

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
TOKENS = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 3, "vision_end_token_id": 4}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Qwen2.5-VL's, from transformers, with its tokenizer, chat template and image settings."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True, **TOKENS)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer = load_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    settings = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 56 * 56, "max_pixels": 28**4}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "README.md").write_text("not ours to copy")
    return folder


@pytest.fixture
def source(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "source"))


def converted(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["convert", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_from_transformers_to_an_answer(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "students" / "hybrid", tmp_path / "reports" / "hybrid.json"
    shown = converted(capsys, source, "--pattern", "(swa gdn)*2", "--out", out, "--json", report)
    student, teacher = hybridvl.load(out), hybridvl.load(source)
    own, taught = student.state_dict(), teacher.state_dict()
    assert student.pattern == "(swa gdn)*2"
    for layer in range(4):
        for name in ("mlp.gate_proj.weight", "mlp_norm.weight", "mixer.q_proj.weight"):
            assert torch.equal(own[f"decoder.layers.{layer}.{name}"], taught[f"decoder.layers.{layer}.{name}"])
    assert all(torch.equal(own[name], taught[name]) for name in own if name.startswith("visual."))
    keys = taught["decoder.layers.1.mixer.k_proj.weight"]
    assert torch.equal(own["decoder.layers.1.mixer.k_proj.weight"], keys.view(2, 8, 32)[[0, 0, 1, 1]].flatten(0, 1))

    written = json.loads(report.read_text())
    assert written["total"]["params"] == student.num_params
    assert written["total"]["copied"] + written["total"]["left"] == teacher.num_params
    assert f"{student.num_params:,} parameters" in shown
    assert "left of the source's layers 1, 3: k_proj.bias (16), q_proj.bias (32), v_proj.bias (16)\n" in shown
    row = next(line for line in shown.splitlines() if line.startswith("│ 1 "))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    counts = written["layers"][1]["counts"]
    assert cells == [
        "1",
        "full",
        "gdn",
        "inherited",
        *(f"{counts[k]:,}" for k in ("copied", "repeated", "new", "left")),
    ]

    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"}
    kept |= {"generation_config.json"}
    for name in kept:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert {path.name for path in out.iterdir()} == kept | {"config.json", "model.safetensors"}
    assert [path.name for path in out.parent.iterdir()] == ["hybrid"]  # nothing is left of what was written beside it
    assert main(["generate", str(out), "--prompt", "2 + 2?", "--max-new-tokens", "3"]) == 0


@pytest.mark.parametrize(("pattern", "format"), [("swa gdn*3", "infinitevl"), ("full*2 swa*2", "qwen2_5_vl")])
def test_other_formats(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str, format: str
) -> None:
    converted(capsys, source, "--pattern", pattern, "--out", tmp_path / "own")
    converted(capsys, source, "--pattern", pattern, "--out", tmp_path / "theirs", "--format", format)
    own, theirs = (hybridvl.load(tmp_path / name) for name in ("own", "theirs"))
    assert own.mixer_configs == theirs.mixer_configs
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in own.state_dict().items())
    kind = json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"]
    assert kind == {"infinitevl": "infinite_vl", "qwen2_5_vl": "qwen2_5_vl"}[format]


def test_without_writing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.iterdir())
    shown = converted(capsys, source, "--pattern", "gdn*4", "--dry-run", "--details")
    assert "gdn*4" in shown
    assert "rows of k_proj.weight" in shown
    assert "written" not in shown
    plain = converted(capsys, source, "--pattern", "gdn*4", "--dry-run", "--json", "-", "--inherit", "none")
    assert {layer["how"] for layer in json.loads(plain)["layers"]} == {"new"}
    assert sorted(tmp_path.iterdir()) == before


def test_options(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixers = tmp_path / "mixers.yaml"
    mixers.write_text("near: {type: swa, window: 3}\ngdn: {expand_v: 1, gate: false}\n")
    flags = ["--mixer.near.window", "5", "--mixer.gdn.conv_width=2", "--dtype", "bfloat16", "--layers", "3,0-1"]
    out = tmp_path / "out"
    converted(capsys, source, "--pattern", "near gdn full", "--mixers", mixers, "--out", out, *flags)
    student = hybridvl.load(out)
    near, gdn, full = student.mixer_configs
    assert (near.window, near.heads, near.kv_heads, near.head_dim) == (5, 4, 2, 8)
    assert (gdn.expand_v, gdn.gate, gdn.conv_width, gdn.heads) == (1.0, False, 2, 4)
    assert full.heads == 4
    assert student.lm_head_weight.dtype == torch.bfloat16
    taught = hybridvl.load(source).state_dict()["decoder.layers.3.mixer.q_proj.weight"]
    assert torch.equal(student.state_dict()["decoder.layers.0.mixer.q_proj.weight"], taught.bfloat16())
    seeds = [converted_a_log(source, tmp_path / f"seed{seed}", seed, capsys) for seed in (0, 0, 1)]
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])


def converted_a_log(source: Path, out: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> torch.Tensor:
    converted(capsys, source, "--pattern", "gdn*4", "--out", out, "--seed", seed, "--force")
    return hybridvl.load(out).state_dict()["decoder.layers.0.mixer.A_log"]


def test_a_folder_that_is_not_empty(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [source, "--pattern", "swa*4", "--out", out]
    converted(capsys, *command)
    (out / "notes.txt").write_text("mine")
    (out / "model.safetensors.index.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused(capsys, command, f"{out}: is not empty; expected a new or empty folder, or --force to replace its model")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    converted(capsys, source, "--pattern", "gdn*4", "--out", out, "--force")
    assert hybridvl.load(out).pattern == "gdn*4"
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "model.safetensors.index.json").exists()
    refused(capsys, [source, "--pattern", "swa*4", "--out", source, "--force"], "is the source itself")
    refused(capsys, [source, "--pattern", "swa*4", "--out", out / "notes.txt"], "notes.txt: is a file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
def test_a_report_in_the_place_of_the_model(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    out = tmp_path / "out"
    command = [source, "--pattern", "gdn*4", "--out", out, "--json"]
    for folder in (out, source, tmp_path / "source" / ".." / "out"):
        refused(capsys, [*command, folder / name], f"{name} is a file of the model; expected another name for the")
    assert not out.exists()
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    converted(capsys, *command, out / "report.json")
    assert hybridvl.load(out).pattern == "gdn*4"
    assert json.loads((out / "report.json").read_text())["pattern"] == "gdn*4"


def refused(capsys: pytest.CaptureFixture[str], arguments: list[Any], message: str) -> None:
    assert main(["convert", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--pattern", "(swa gdm)*2"],
            "unknown mixer 'gdm', did you mean 'gdn'? (known: full, gdn, mamba2, swa)\n  (swa",
        ),
        (
            ["--pattern", "gdn*4", "--mixer.gdn.heads", "4000000"],
            "error: decoder.layers.0.mixer.A_log would have the shape (4000000,); expected at most 262144",
        ),
        (["--pattern", "gdn*4", "--mixer.gdn.heads", "4000000000"], "mixers.gdn.heads = 4000000000: expected an integ"),
        (["--pattern", "swa*3"], "pattern 'swa*3' has 3 layers; expected 4"),
        (["--pattern", "gdn(heads=3)*4"], "layer 0: gdn.heads: 3 heads cannot inherit from 4 query heads"),
        (["--pattern", "swa*4", "--mixer.swa.window", "0"], "mixers.swa.window = 0: expected an integer of at least 1"),
        (["--pattern", "swa*4", "--mixer.swa.window"], "--mixer.swa.window: expected a value after it"),
        (["--pattern", "swa*4", "--mixer.swa.window", "["], "--mixer.swa.window '[': not valid YAML"),
        (["--pattern", "swa*4", "--mixers", "none.yaml"], "none.yaml: cannot be read: No such file"),
        (["--pattern", "swa*4", "--layers", "0-x"], "--layers: '0-x'; expected numbers and ranges of layers"),
        (["--pattern", "swa*4", "--layers", "0-99999999999"], "--layers: '0-99999999999'; expected numbers"),
        (["--pattern", "swa*4", "--layers", "3-0"], "--layers: '3-0'; expected numbers"),
        (["--pattern", "swa*4", "--json", "."], ".: is a folder; expected the name of a file to write"),
        (["--pattern", "swa*4", "--mixer.swa.type", "[1]"], "mixers.swa.type = [1]: expected the name"),
        (["--pattern", "swa*4", "--inherit", "all"], "invalid choice: 'all'"),
        (["--pattern", "swa*4", "--format", "onnx"], "invalid choice: 'onnx'"),
        (["--pattern", "swa gdn*3", "--format", "qwen2_5_vl"], "format 'qwen2_5_vl': layer 1 is gdn, which it cannot"),
        ([], "the following arguments are required: --pattern"),
    ],
)
def test_mistakes(published: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    refused(capsys, [published, *arguments, "--dry-run"], message)


def test_mistakes_in_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [source, "--pattern", "swa*4"], "--out is required, unless with --dry-run")
    refused(
        capsys, [source, "--pattern", "gdn*4", "--out", tmp_path / "out", "--seed", -1], "seed: -1; expected a whole"
    )
    refused(
        capsys, [source, "--pattern", "swa*4", "--dry-run", "--json", source / "README.md" / "x"], "cannot be written"
    )
    refused(capsys, [tmp_path / "none", "--pattern", "swa*4", "--dry-run"], "no such folder")
    mixers = tmp_path / "mixers.yaml"
    for text, message in (
        ("[1]", "[1]; expected a mapping"),
        ("a: [", "expected YAML"),
        ("swa: 3", "swa: 3; expected"),
    ):
        mixers.write_text(text)
        refused(capsys, [source, "--pattern", "swa*4", "--mixers", mixers, "--dry-run"], message)
    mixers.write_text("swa: 3")
    refused(
        capsys, [source, "--pattern", "swa*4", "--mixers", mixers, "--mixer.swa.window", "3", "--dry-run"], "swa: 3"
    )


def test_links_and_folders_in_the_way(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another folder's files, the source's too, stay what they are when links to them are replaced."""
    other, out = tmp_path / "other.json", tmp_path / "out"
    other.write_text("another model's")
    out.mkdir()
    (out / "tokenizer.json").symlink_to(other)
    (out / "generation_config.json").symlink_to(source / "generation_config.json")
    (out / "vocab.json").write_text("of the model that was there")
    command = [source, "--pattern", "swa*4", "--out", out, "--force"]
    converted(capsys, *command)
    assert other.read_text() == "another model's"
    assert not (out / "vocab.json").exists()
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
        assert not (out / name).is_symlink()
    for name in ("tokenizer_config.json", "merges.txt"):  # one to write, one to remove
        (out / name).unlink(missing_ok=True)
        (out / name).mkdir()
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        refused(capsys, [*command[:2], "gdn*4", *command[3:]], f"{name}: is a folder; expected a file, or nothing")
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
        (out / name).rmdir()


def test_a_dtype_that_is_too_narrow(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    command = [source, "--pattern", "gdn*4", "--out", tmp_path / "out", "--dtype"]
    refused(
        capsys,
        [*command, "float16"],
        "dtype: decoder.layers.1.mlp.up_proj.weight holds 1e+06, too large for float16; expected at most 65504",
    )
    assert not (tmp_path / "out").exists()
    converted(capsys, *command, "bfloat16")
    assert hybridvl.load(tmp_path / "out").state_dict()["decoder.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("flag", ["--json", "--out", "--mixers"])
def test_names_that_no_file_can_have(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [published, "--pattern", "swa*4", *([] if flag == "--out" else ["--dry-run"])]
    refused(capsys, [*command, flag, "x" * 300], "(300 characters): File name too long; expected a path")
    refused(capsys, [*command, flag, "a\0b"], "'a\\x00b': embedded null byte; expected a path")
    assert list(tmp_path.iterdir()) == []
