"""Tests of a processor's files: what transformers makes of those saved, and any damage to those that are loaded."""

import dataclasses
import json

import pytest
import torch
from model_cases import small_config
from PIL import Image

import hybridvl
from hybridvl.data.chat import ChatFormat
from hybridvl.data.images import ImageConfig, ImageProcessor
from hybridvl.data.tokens import load_tokenizer
from hybridvl.inference.foreign import chat_template
from hybridvl.inference.processor import Processor
from hybridvl.layers import ConfigError
from hybridvl.models.vlm import VisionLanguageModel

WRONG = (None, True, "a", "14", [], ["a"], [None, True, []], {}, {"a": 1}, -1, 0, 2.5, 10**400)
WRONG_TEXTS = ("NaN", "Infinity", "-Infinity", "1e999")
NAMES = ("hybridvl_processor.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with every file that a processor may have."""
    folder = tmp_path_factory.mktemp("whole")
    Processor(ChatFormat(load_tokenizer()), ImageProcessor(ImageConfig(max_pixels=10000))).save(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": chat_template("Be brief.")}))
    sections = {
        key: json.loads((folder / name).read_text()) for key, name in zip(("image", "video"), NAMES[1:3], strict=False)
    }
    (folder / "processor_config.json").write_text(json.dumps({f"{key}_processor": sections[key] for key in sections}))
    return folder


@pytest.fixture
def copy(whole, tmp_path, monkeypatch):
    """Copies the folder without the files named; the tokenizer is read once."""
    tokenizer = load_tokenizer(str(whole))
    monkeypatch.setattr("hybridvl.inference.processor.load_tokenizer", lambda _: tokenizer)

    def make(*without):
        for path in whole.iterdir():
            if path.name not in without:
                (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    return make


def places(values, at=()):
    """The way to every value of a JSON object, in lists too."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        yield (*at, key)
        yield from places(value, (*at, key))


def changed(values, place, value):
    again = json.loads(json.dumps(values))
    inner = again
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(again)


def loads_or_names(folder, name):
    """Whether the folder is loaded; if not, the message has to name the file."""
    try:
        processor = Processor.load(folder)
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert name in message
        return False
    pixels = Image.new("RGB", (28, 28))
    assert processor.images.config.pixel_limits[0] > 10**6 or len(processor.images(pixels)[0])
    return True


@pytest.mark.parametrize("name", [*NAMES, "processor_config.json"])
def test_wrong_values_at_every_key_are_named(copy, name):
    others = {"hybridvl_processor.json", *NAMES[1:3]} if name == "processor_config.json" else {NAMES[0]}
    folder = copy(*(others - {name}))
    values, loaded = json.loads((folder / name).read_text()), []
    for place in places(values):
        for value in WRONG:
            (folder / name).write_text(changed(values, place, value))
            loaded.append(loads_or_names(folder, name))
        for text in WRONG_TEXTS:
            (folder / name).write_text(changed(values, place, "MARK").replace('"MARK"', text))
            loaded.append(loads_or_names(folder, name))
    assert not all(loaded)
    for place in places(values):
        inner = json.loads(json.dumps(values))
        parent = inner
        for key in place[:-1]:
            parent = parent[key]
        del parent[place[-1]]
        (folder / name).write_text(json.dumps(inner))
        loads_or_names(folder, name)


@pytest.mark.parametrize("name", [*NAMES, "processor_config.json"])
@pytest.mark.parametrize("data", [b"", b"[]", b"5", b"null", b'"a"', b"\xff\xfe\x00", b'{"a": ', b'{"\xff": 1}'])
def test_files_that_are_no_objects_are_named(copy, name, data):
    others = {"hybridvl_processor.json", *NAMES[1:3]} if name == "processor_config.json" else {NAMES[0]}
    folder = copy(*(others - {name}))
    (folder / name).write_bytes(data)
    assert not loads_or_names(folder, name)


def test_unknown_and_missing_keys_are_named(copy):
    folder = copy()
    values = json.loads((folder / NAMES[0]).read_text())
    for change, message in (
        (
            {"images": {"patch": 3}},
            r"hybridvl_processor\.json: images: unknown key 'patch'; expected one of patch_size",
        ),
        ({"videos": None}, r"hybridvl_processor\.json: videos: None; expected an object"),
        ({"system": 5}, r"hybridvl_processor\.json: system: 5; expected a text or null"),
    ):
        (folder / NAMES[0]).write_text(json.dumps({**values, **change}))
        with pytest.raises(ConfigError, match=message):
            Processor.load(folder)
    del values["images"]
    (folder / NAMES[0]).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"hybridvl_processor\.json: lacks 'images'"):
        Processor.load(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ messages[5].content }}",
        "{{ messages[0].a.b }}",
        "{% for n in range(10 ** 9) %}{% endfor %}",
        "{{ [1, 2][5:].pop() }}",
        "{{ 'a' + 1 }}",
        "{% if",
        "",
    ],
)
def test_templates_that_fail_are_named(copy, template):
    folder = copy(NAMES[0], "chat_template.json")
    (folder / "chat_template.jinja").write_text(template)
    assert not loads_or_names(folder, "chat_template.jinja")


def test_a_template_in_another_encoding_is_named(copy):
    folder = copy(NAMES[0], "chat_template.json")
    (folder / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: not UTF-8"):
        Processor.load(folder)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    processor = Processor(ChatFormat(load_tokenizer()), ImageProcessor(ImageConfig()))
    with pytest.raises(ConfigError, match="file"):
        processor.save(tmp_path / "file" / "model")


def test_transformers_stops_where_an_answer_ends(tmp_path):
    from transformers import AutoModelForCausalLM

    processor = Processor(ChatFormat(load_tokenizer()), ImageProcessor(ImageConfig()))
    processor.save(tmp_path / "new" / "model")
    folder = tmp_path / "new" / "model"
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    net = VisionLanguageModel(dataclasses.replace(small_config("full gdn", vision=None), tie_embeddings=False))
    ids = torch.tensor([[1, 30, 31, 32]])
    free = net.generate(ids, max_new_tokens=8)[0, 4:].tolist()
    with torch.no_grad():  # what would be the fourth token is the end of an answer
        net.lm_head_weight[[2, free[3]]] = net.lm_head_weight[[free[3], 2]].clone()
    hybridvl.save(net, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.pad_token_id == processor.chat.pad_token_id == 0
    found = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 4:].tolist()
    assert found == [*free[: free.index(free[3])], processor.stop_id]
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    processor.save(folder)
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.5}
