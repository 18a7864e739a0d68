"""Tests of hybridvl.data.messages and hybridvl.data.rows on local files of every kind."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from data_cases import assert_same_batches, small_module, take
from PIL import Image

from hybridvl.data.images import open_image
from hybridvl.data.messages import MessageData
from hybridvl.data.rows import MessageColumns
from hybridvl.layers import ConfigError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def colour(number):
    return (10 * number % 256, 7, 200)


def picture(number):
    return Image.new("RGB", (16, 16), colour(number))


def png(number):
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    return buffer.getvalue()


def text_rows(count):
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} plus 1?"},
                {"role": "assistant", "content": str(number + 1)},
            ]
        }
        for number in range(count)
    ]


def part_rows(count):
    """Rows with parts: a text in parts and an image without its pixels."""
    return [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": str(number)}]},
            ]
        }
        for number in range(count)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path, rows, images):
    table = datasets.Dataset.from_list([{**row, "images": images(number)} for number, row in enumerate(rows)])
    table = table.cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(path)
    return str(path)


def answers(sample):
    contents = [message["content"] for message in sample["messages"] if message["role"] == "assistant"]
    return [content if isinstance(content, str) else content[0]["text"] for content in contents]


def shown(sample):
    """The colour of the first pixel of every image."""
    parts = [
        part for message in sample["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    return [open_image(part["image"]).convert("RGB").getpixel((0, 0)) for part in parts if part["type"] == "image"]


def every(source, epoch=0):
    return [source.sample(index, epoch) for index in range(len(source))]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_file_with_held_out_validation(tmp_path, suffix):
    path = tmp_path / f"chat.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, text_rows(10))
    else:
        path.write_text(json.dumps(text_rows(10)))
    task = MessageData(str(path), val_samples=3)
    assert [answers(sample) for sample in every(task.source("train", 0))] == [[str(n)] for n in range(4, 11)]
    assert [answers(sample) for sample in every(task.source("val", 0))] == [["1"], ["2"], ["3"]]
    assert [answers(sample) for sample in every(task.source("test", 0))] == [["1"], ["2"], ["3"]]


def test_parquet_with_images_inside(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", part_rows(5), lambda number: [{"bytes": png(number), "path": None}])
    source = MessageData(path, val_samples=1).source("train", 0)
    for number, sample in enumerate(every(source), 1):
        assert shown(sample) == [colour(number)]
        assert answers(sample) == [str(number)]


def test_folder_with_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", text_rows(4))
    write_jsonl(tmp_path / "validation.jsonl", text_rows(2))
    write_jsonl(tmp_path / "test.jsonl", text_rows(3))
    task = MessageData(str(tmp_path))
    assert [len(task.source(split, 0)) for split in ("train", "val", "test")] == [4, 2, 3]
    assert len(MessageData(str(tmp_path), test_split="train").source("test", 0)) == 4
    shards = tmp_path / "other"
    (shards / "data").mkdir(parents=True)
    for number in range(2):
        write_parquet(shards / "data" / f"train-0000{number}-of-00002.parquet", part_rows(3), lambda row: [])
    assert len(MessageData(str(shards), val_samples=1).source("train", 0)) == 5


def test_imagefolder(tmp_path):
    (tmp_path / "train").mkdir()
    rows = []
    for number, row in enumerate(text_rows(4)):
        picture(number).save(tmp_path / "train" / f"{number}.png")
        rows.append({"file_name": f"{number}.png", **row})
    write_jsonl(tmp_path / "train" / "metadata.jsonl", rows)
    source = MessageData(str(tmp_path), val_samples=1).source("train", 0)
    assert [shown(sample) for sample in every(source)] == [[colour(number)] for number in (1, 2, 3)]


def test_saved_to_disk(tmp_path):
    datasets.Dataset.from_list(text_rows(3)).save_to_disk(tmp_path / "one")
    assert len(MessageData(str(tmp_path / "one"), val_samples=1).source("train", 0)) == 2
    parts = {"train": datasets.Dataset.from_list(text_rows(3)), "test": datasets.Dataset.from_list(text_rows(2))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert len(MessageData(str(tmp_path / "two"), val_samples=1).source("test", 0)) == 2


def test_image_files_are_looked_for_beside_the_data(tmp_path):
    (tmp_path / "pictures").mkdir()
    picture(3).save(tmp_path / "pictures" / "3.png")
    row = {"images": ["pictures/3.png"], **text_rows(1)[0]}
    inside = json.loads(json.dumps(text_rows(1)[0]))
    inside["messages"][0]["content"] = [{"type": "image", "image": "pictures/3.png"}, {"type": "text", "text": "?"}]
    inside["messages"][1]["content"] = [{"type": "text", "text": "1"}]
    for name, rows in (("column", [row, row]), ("inside", [inside, inside])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        sample = MessageData(path, val_samples=1).source("train", 0).sample(0, 0)
        assert shown(sample) == [colour(3)]
        assert sample["messages"][0]["content"][0]["type"] == "image"


def test_marks_and_other_spellings():
    columns = MessageColumns(messages="conversations", images="image")
    row = {
        "conversations": [
            {"from": "human", "value": "First <image>\nthen <image>"},
            {"from": "gpt", "value": "a <image> tag"},
        ],
        "image": [png(1), png(2)],
    }
    sample = columns.sample(row, None, "row 0")
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant"]
    kinds = [part["type"] for part in sample["messages"][0]["content"]]
    assert kinds == ["text", "image", "text", "image"]
    assert [part.get("text") for part in sample["messages"][0]["content"]][::2] == ["First ", "then "]
    assert shown(sample) == [colour(1), colour(2)]
    assert sample["messages"][1]["content"] == "a <image> tag"


def test_kinds():
    row = text_rows(1)[0]
    assert MessageColumns().sample({**row, "kinds": "sum"}, None, "row 0")["kinds"] == ["sum"]
    assert MessageColumns().sample({**row, "kinds": ["a"]}, None, "row 0")["kinds"] == ["a"]
    assert "kinds" not in MessageColumns().sample(row, None, "row 0")


@pytest.mark.parametrize("images", [[], [png(0), png(1)]])
def test_images_that_do_not_match_the_messages_are_named(images):
    row = {**part_rows(1)[0], "images": images}
    with pytest.raises(ConfigError, match=rf"row 4: the messages show 1 images, but the row has {len(images)}"):
        MessageColumns().sample(row, None, "row 4")


def test_batches_with_images(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", part_rows(9), lambda number: [{"bytes": png(number), "path": None}])
    module = small_module(MessageData(path, val_samples=1), workers=2)
    batches = list(module.train_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4]
    assert batches[0]["image_grid_thw"].shape == (4, 3)
    assert_same_batches(batches, list(small_module(MessageData(path, val_samples=1)).train_dataloader()))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_streaming_reads_everything_and_resumes_exactly(tmp_path, kind):
    if kind == "jsonl":
        path = write_jsonl(tmp_path / "chat.jsonl", text_rows(23))
    elif kind == "parquet":
        path = write_parquet(
            tmp_path / "chat.parquet", part_rows(23), lambda number: [{"bytes": png(number), "path": None}]
        )
    else:
        path = str(tmp_path / "saved")
        datasets.Dataset.from_list(text_rows(23)).save_to_disk(path, num_shards=3)

    def module(workers=0):
        task = MessageData(path, val_samples=3, streaming=True)
        return small_module(task, workers=workers, shuffle_block=6, epoch_batches=12)

    loader = module(workers=2).train_dataloader()
    iterator = iter(loader)
    first = [next(iterator) for _ in range(4)]
    state = json.loads(json.dumps(loader.state_dict()))
    rest = [next(iterator) for _ in range(8)]
    loader.close()
    tokens = [
        tuple(ids[mask].tolist())
        for b in first + rest
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert len(set(tokens[:20])) == 20
    assert set(tokens[20:40]) == set(tokens[:20])
    assert tokens[20:40] != tokens[:20]
    resumed = module().train_dataloader()
    resumed.load_state_dict(state)
    assert_same_batches(list(resumed), rest)
    assert sum(len(batch["input_ids"]) for batch in module().val_dataloader()) == 3


def test_streaming_and_reading_whole_agree(tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", text_rows(9))
    streamed = small_module(MessageData(path, val_samples=1, streaming=True)).val_dataloader()
    assert_same_batches(list(streamed), list(small_module(MessageData(path, val_samples=1)).val_dataloader()))


def test_a_truncated_image_file_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    rows = [{**row, "images": ["cut.png"]} for row in text_rows(3)]
    module = small_module(MessageData(write_jsonl(tmp_path / "a.jsonl", rows), val_samples=1), workers=1)
    with pytest.raises(
        ConfigError, match=r"train .*a\.jsonl \(train\) row [12]\[0\]\.content\[0\]: image .*cut\.png cannot be read"
    ):
        take(module.train_dataloader(), 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_data_is_refused(tmp_path, streaming):
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "list.json").write_text("[]")
    none = datasets.Dataset.from_dict({"messages": []})
    none.to_parquet(tmp_path / "none.parquet")
    none.save_to_disk(tmp_path / "saved")
    for name in ("none.jsonl", "blank.jsonl", "list.json", "none.parquet", "saved"):
        with pytest.raises(ConfigError, match=rf"data\.task\.path: .*{name}.* is empty; expected at least one sample"):
            take(small_module(MessageData(str(tmp_path / name), streaming=streaming)).train_dataloader(), 1)


def test_mistakes_are_named(tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", text_rows(4))
    (tmp_path / "broken.jsonl").write_text('{"messages": [')
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "nothing").mkdir()
    columns = MessageColumns(messages="chat")
    cases = [
        (MessageData(str(tmp_path / "gone.parquet")), r"gone\.parquet does not exist"),
        (MessageData(str(tmp_path / "broken.jsonl")), r"broken\.jsonl cannot be read"),
        (MessageData(str(tmp_path / "note.txt")), r"note\.txt is no data set"),
        (MessageData(str(tmp_path / "nothing")), "nothing cannot be read"),
        (MessageData(path, train_split="training"), r"data\.task\.train_split: .* no split 'training'; it has train"),
        (MessageData(path), r"val_samples: 256 of the 4 samples"),
        (MessageData(path, val_samples=1, columns=columns), r"no column 'chat'; it has messages"),
    ]
    for task, message in cases:
        with pytest.raises(ConfigError, match=message):
            task.source("train", 0)
    with pytest.raises(ConfigError, match="val_samples: 0; expected at least 1"):
        MessageData(path, val_samples=0)
    with pytest.raises(ConfigError, match="row 2: column 'messages' is None"):
        MessageColumns().sample({}, None, "row 2")


def test_questions_with_their_answers():
    turns = [{"user": "What?", "assistant": "Noise.", "source": "x"}, {"user": "Sure?", "assistant": "Yes."}]
    sample = MessageColumns(messages="texts").sample({"texts": turns, "images": ["a.png"]}, Path("there"), "row 0")
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant"] * 2
    first, answer, second, last = (message["content"] for message in sample["messages"])
    assert first == [{"type": "image", "image": "there/a.png"}, {"type": "text", "text": "What?"}]
    assert (answer, second, last) == ("Noise.", [{"type": "text", "text": "Sure?"}], "Yes.")
