"""`hybridvl generate` on folders made here: replies, batches, media in order, other projects' folders, mistakes."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from streaming_cases import text

import hybridvl
from hybridvl.cli import main
from hybridvl.data.chat import ChatFormat
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.tokens import load_tokenizer
from hybridvl.data.video import VideoConfig, VideoProcessor
from hybridvl.inference.processor import Processor
from hybridvl.models import ModelConfig, Sampling, VisionConfig, VisionLanguageModel

RATES = re.compile(r"prompt [\d,]+ tokens, prefill [\d,.]+ tokens/s, decode [\d,.]+ tokens/s, state [\d,]+ bytes\n")
RUN = "import sys; from hybridvl.cli import main; sys.exit(main())"
ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 16}
CONFIG = ModelConfig(
    pattern="swa gdn*3",
    mixers={"full": ATTENTION, "swa": {**ATTENTION, "window": 16}, "gdn": {"heads": 2, "head_dim": 16}},
    width=64,
    mlp_width=48,
    vocab_size=512,
    rope_sections=(2, 3, 3),
    vision=VisionConfig(depth=2, width=32, heads=2, mlp_width=32, window_size=56, full_attention_blocks=(1,)),
    image_token_id=6,
    video_token_id=7,
    vision_start_token_id=3,
    init_std=0.15,
)


def make_folder(folder: Path, config: ModelConfig) -> Path:
    torch.manual_seed(0)
    hybridvl.save(VisionLanguageModel(config), folder)
    images = ImageProcessor(ImageConfig(min_pixels=784))
    videos = VideoConfig(min_pixels=784, max_pixels=3136)
    Processor(ChatFormat(load_tokenizer()), images, VideoProcessor(images, videos)).save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, and beside it pictures a.png and b.png and a clip of two seconds, c.mp4."""
    place = tmp_path_factory.mktemp("generate")
    random = np.random.default_rng(0)
    for name, size in (("a.png", (56, 84)), ("b.png", (112, 56))):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(place / name)
    with av.open(str(place / "c.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
        for number in range(16):
            pixels = np.full((56, 56, 3), 16 * number, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return make_folder(place / "model", CONFIG)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """Standard output and error of a command that succeeds."""
    capsys.readouterr()
    assert main(["generate", *map(str, arguments), "--max-new-tokens", "12"]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def written(folder: Path, content: list[dict[str, Any]], system: str | None = None, **options: Any) -> str:
    """What the model writes, by way of `VisionLanguageModel.generate`."""
    model, processor = hybridvl.load(folder), Processor.load(folder)
    messages = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    inputs = processor.prompt(messages)
    sampling = Sampling(stop_ids=(processor.stop_id,), **options)
    tokens = model.generate(**inputs, max_new_tokens=12, sampling=sampling)
    return processor.text(tokens[0, inputs["input_ids"].shape[1] :])


def test_pictures_and_clips_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (folder.parent / name for name in ("a.png", "b.png", "c.mp4"))
    out, err = run(capsys, folder, "--image", b, "--video", c, "--fps", 4, "--image", a, "--prompt", "What is it?")
    content = [
        {"type": "image", "image": str(b)},
        {"type": "video", "video": str(c), "fps": 4.0},
        {"type": "image", "image": str(a)},
        text("What is it?"),
    ]
    assert out == written(folder, content) + "\n"
    assert RATES.fullmatch(err)
    assert out != written(folder, [content[2], content[1], content[0], content[3]]) + "\n"
    other, _ = run(capsys, folder, "--image", b, "--video", c, "--image", a, "--prompt", "What is it?", "--chunk", 5)
    del content[1]["fps"]
    assert other == written(folder, content) + "\n"


def test_several_prompts_are_a_batch(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["How many 7s are there?", "no", "What is on line 2?"]
    image = {"type": "image", "image": str(folder.parent / "a.png")}
    replies = [written(folder, [image, text(prompt)]) for prompt in prompts]
    wanted = "\n".join(
        f"[{number + 1}/3] {prompt}\n{reply}\n"
        for number, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
    )
    media = ["--image", folder.parent / "a.png"]
    out, _ = run(capsys, folder, *media, *(word for prompt in prompts for word in ("--prompt", prompt)))
    assert out == wanted
    (tmp_path / "prompts.txt").write_text("\n".join([prompts[1], "", prompts[2]]) + "\n")
    out, _ = run(capsys, folder, *media, "--prompt", prompts[0], "--prompt-file", tmp_path / "prompts.txt")
    assert out == wanted
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(prompts)))
    out, _ = run(capsys, folder, *media, "--prompt-file", "-")
    assert out == wanted


@pytest.mark.parametrize("source", ["-", "{tmp}/marked.txt"])
def test_a_byte_order_mark_is_no_part_of_the_prompt(
    source: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = run(capsys, folder, "--prompt", "no", "--prompt", "What?")
    (tmp_path / "marked.txt").write_text("no\r\nWhat?\r\n", encoding="utf-8-sig")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffno\nWhat?"))
    assert run(capsys, folder, "--prompt-file", source.format(tmp=tmp_path))[0] == plain


@pytest.mark.parametrize(
    ("closed", "arguments", "message"),
    [
        ("stdin", ["--prompt-file", "-"], "error: --prompt-file: - cannot be read: standard input is closed"),
        ("stdout", ["--prompt", "no"], "error: standard output: closed; expected a terminal, a file or a pipe"),
    ],
)
def test_closed_streams(
    closed: str,
    arguments: list[str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, closed, None)  # as Python starts after `<&-` and `>&-`
    assert main(["generate", str(folder), *arguments]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_rates_go_nowhere_else_without_standard_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, _ = run(capsys, folder, "--prompt", "no")
    monkeypatch.setattr(sys, "stderr", None)
    assert run(capsys, folder, "--prompt", "no")[0] == plain


def test_a_reader_that_leaves(folder: Path) -> None:
    prompts = [word for number in range(9) for word in ("--prompt", f"What is on line {number}?")]
    command = [sys.executable, "-c", RUN, "generate", str(folder), *prompts]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        assert writer.stdout.readline() == b"[1/9] What is on line 0?\n"
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode == 141


def test_choices_are_passed_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "What is on line 2?"
    out, err = run(capsys, folder, "--prompt", prompt, "--system", "Be brief.", "--quiet")
    assert (out, err) == (written(folder, [text(prompt)], system="Be brief.") + "\n", "")
    plain, _ = run(capsys, folder, "--prompt", prompt)
    assert plain != out
    flags = ["--temperature", "2", "--top-k", "20", "--top-p", "0.7", "--repetition-penalty", "2", "--seed", "7"]
    out, _ = run(capsys, folder, "--prompt", prompt, *flags)
    options = {"temperature": 2.0, "top_k": 20, "top_p": 0.7, "repetition_penalty": 2.0, "seed": 7}
    assert out == written(folder, [text(prompt)], **options) + "\n"
    for flag in range(0, 8, 2):
        assert run(capsys, folder, "--prompt", prompt, *flags[:flag], *flags[flag + 2 :])[0] != out
    stop = plain[4:7]
    assert run(capsys, folder, "--prompt", prompt, "--stop", stop)[0] == plain[: plain.index(stop)] + "\n"
    out, _ = run(capsys, folder, "--prompt", prompt, "--dtype", "bfloat16")
    assert out.strip()


def test_a_terminal_that_knows_no_unicode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    arguments = ["generate", str(folder), "--prompt", "Grüße", "--prompt", "no", "--quiet", "--max-new-tokens", "3"]
    assert main(arguments) == 0
    assert raw.getvalue().startswith(b"[1/2] Gr??e\n")


class Terminal(io.StringIO):
    """A terminal that remembers what it showed whenever it was flushed."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[str] = []

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.shown.append(self.getvalue())


def test_the_reply_is_written_while_it_grows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["generate", str(folder), "--prompt", "What is on line 2?", "--max-new-tokens", "12"]) == 0
    assert all(later.startswith(earlier) for earlier, later in pairwise(terminal.shown))
    assert len(set(terminal.shown)) > 6


def test_a_terminal_gets_no_control_characters(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model may write whatever it likes, the terminal's own commands included."""
    arguments = [folder, "--prompt", "\x1b[2Jx\ty", "--prompt", "no", "--temperature", "5", "--seed", "1", "--quiet"]
    file, _ = run(capsys, *arguments)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    run(capsys, *arguments)
    assert terminal.getvalue() == "".join(
        "\ufffd" if unicodedata.category(letter) == "Cc" and letter not in "\t\n" else letter for letter in file
    )
    assert terminal.getvalue() != file


@pytest.mark.parametrize(("format_", "pattern"), [("qwen2_5_vl", "full*2"), ("infinitevl", "swa gdn*3")])
def test_folders_of_other_projects(
    format_: str, pattern: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = make_folder(tmp_path / "ours", dataclasses.replace(CONFIG, pattern=pattern))
    theirs = tmp_path / "theirs"
    hybridvl.save(hybridvl.load(ours), theirs, format=format_)
    load_tokenizer().save_pretrained(theirs)
    (theirs / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 784, "max_pixels": 12845056}))
    arguments = ["--image", folder.parent / "a.png", "--image", folder.parent / "b.png", "--prompt", "What is it?"]
    out, _ = run(capsys, theirs, *arguments)
    assert out == run(capsys, ours, *arguments)[0]
    # Where the folder says what else ends a reply, that does.
    inputs = Processor.load(ours).prompt([{"role": "user", "content": "no"}])
    first = int(hybridvl.load(theirs).generate(**inputs, max_new_tokens=1)[0, -1])
    (theirs / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, 0]}))
    assert run(capsys, theirs, "--prompt", "no")[0] == "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "--prompt: no prompt given; expected --prompt TEXT or a --prompt-file"),
        (["{model}", "--prompt-file", "{tmp}/empty.txt"], "--prompt: no prompt given"),
        (["{model}", "--prompt-file", "{tmp}/gone.txt"], "--prompt-file: {tmp}/gone.txt cannot be read"),
        (["{model}", "--prompt-file", "{tmp}/latin.txt"], "--prompt-file: {tmp}/latin.txt cannot be read"),
        (["{model}", "--prompt", "\udcff"], "--prompt: '\\udcff' is not UTF-8"),
        (["{model}", "--prompt", "x", "--image", "{tmp}/gone.png"], "--image: {tmp}/gone.png cannot be read: no such"),
        (["{model}", "--prompt", "x", "--image", "{tmp}"], "--image: {tmp} cannot be read: is a folder"),
        (["{model}", "--prompt", "x", "--image", "{tmp}/empty.txt"], "empty.txt cannot be read"),
        (
            ["{model}", "--prompt", "x", "--image", "/dev/null"],
            "--image: /dev/null cannot be read: is a device or a pipe",
        ),
        (
            ["{model}", "--prompt", "x", "--video", "{tmp}/pipe"],
            "--video: {tmp}/pipe cannot be read: is a device or a p",
        ),
        (["{model}", "--prompt", "x", "--image", "x" * 300], "x cannot be read: File name too long"),
        (["{model}", "--prompt", "x", "--video", "{tmp}/gone.mp4"], "--video: {tmp}/gone.mp4 cannot be read: no such"),
        (["{model}", "--prompt", "x", "--video", "{tmp}/latin.txt"], "latin.txt cannot be read"),
        (["{model}", "--prompt", "x", "--fps", "0"], "--fps: 0.0; expected a number of frames per second above 0"),
        (
            ["{model}", "--prompt", "x", "--max-context", "4"],
            "--max-context: the prompt has 20 tokens; expected at most 4",
        ),
        (["{model}", "--prompt", "x", "--chunk", "0"], "chunk: 0; expected a whole number of at least 1"),
        (
            ["{model}", "--prompt", "x", "--max-new-tokens", "-1"],
            "max_new_tokens: -1; expected a whole number of at least 0",
        ),
        (["{model}", "--prompt", "x", "--top-k", "-1"], "top_k: -1"),
        (["{model}", "--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty: 0.0"),
        (["{model}", "--prompt", "x", "--repetition-penalty", "1e-30"], "repetition_penalty: 1e-30; expected a number"),
        (["{model}", "--prompt", "x", "--temperature", "1e-38"], "temperature: 1e-38; expected 0 (greedy) or at least"),
        (
            ["{model}", "--prompt", "x", "--seed", str(2**64)],
            "seed: 18446744073709551616; expected a whole number of 64",
        ),
        (["{model}", "--prompt", "x", "--device", "meta"], "'meta' cannot be used: it keeps shapes without numbers"),
        (["{model}", "--prompt", "x", "--dtype", "int8"], "--dtype"),
        (["{text}", "--prompt", "x", "--image", "{tmp}/empty.txt"], "given to a model without a vision tower"),
        (["{small}", "--prompt", "What is on line 2?"], "the model knows tokens below 64"),
        (["{tmp}/gone", "--prompt", "x"], "{tmp}/gone: no such folder"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"Gr\xfc\xdfe\n")
    places = {"tmp": tmp_path, "model": folder, "text": tmp_path / "text", "small": tmp_path / "small"}
    for name, changes in (("text", {"vision": None}), ("small", {"vocab_size": 64})):
        if f"{{{name}}}" in arguments:
            make_folder(tmp_path / name, dataclasses.replace(CONFIG, **changes))
    capsys.readouterr()
    assert main(["generate", *(word.format(**places) for word in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message.format(**places) in printed.err
