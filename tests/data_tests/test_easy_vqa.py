"""Tests of hybridvl.data.easy_vqa: the package's questions, splits by image, and its absence."""

import sys
from collections import Counter

import numpy as np
import pytest

from hybridvl.data import easy_vqa
from hybridvl.data.easy_vqa import WORDS, EasyVQA, read_question
from hybridvl.layers import ConfigError

package = pytest.importorskip("easy_vqa")


def turns_of(sample):
    texts = [m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"] for m in sample["messages"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_test_samples_are_the_packages_own_test_questions():
    source = EasyVQA().source("test", seed=0)
    questions, answers, _ = package.get_test_questions()
    assert len(source) == len(questions) == 9673
    asked = sorted(turns_of(source.sample(number, 0))[0] for number in range(0, 9673, 50))
    everything = sorted(zip(questions, answers, strict=True))
    assert set(asked) <= set(everything)
    whole = sorted((number, question.text, question.answer) for number, question in source._single)
    assert whole == sorted(zip(package.get_test_questions()[2], questions, answers, strict=True))


def test_an_image_goes_with_its_questions():
    source = EasyVQA(augment=False).source("train", seed=0)
    questions, answers, numbers = package.get_train_questions()
    for index in (0, 17, 3599):
        number = source.image_numbers[index]
        sample = source.sample(index, 0)
        expected = [pair[:2] for pair in zip(questions, answers, numbers, strict=True) if pair[2] == number]
        assert {turn for epoch in range(300) for turn in turns_of(source.sample(index, epoch))} == set(expected)
        from PIL import Image

        shown = np.asarray(sample["messages"][0]["content"][0]["image"])
        with Image.open(package.get_train_image_paths()[number]) as image:
            assert np.array_equal(shown, np.asarray(image.convert("RGB")))


def test_validation_images_are_not_trained_on():
    train, val = EasyVQA().source("train", 0), EasyVQA().source("val", 0)
    assert (len(train), len(val)) == (3600, 1000)
    assert not set(train.image_numbers) & set(val.image_numbers)
    assert sorted(train.image_numbers + val.image_numbers) == sorted(package.get_train_image_paths())
    assert len({number for number, _ in val._single}) > 350


def test_turns_are_drawn_anew_every_epoch_from_the_seed():
    source = EasyVQA().source("train", 0)
    first = [turns_of(source.sample(index, 0)) for index in range(20)]
    assert [turns_of(source.sample(index, 0)) for index in range(20)] == first
    assert [turns_of(source.sample(index, 1)) for index in range(20)] != first
    assert [turns_of(EasyVQA().source("train", 1).sample(index, 0)) for index in range(20)] != first


def test_no_training_answer_is_given_away_by_an_earlier_turn():
    source = EasyVQA(turns=8).source("train", 0)
    lengths = set()
    for index in range(400):
        turns = turns_of(source.sample(index, 0))
        lengths.add(len(turns))
        assert len(set(turns)) == len(turns)
        told = set()
        for text, answer in turns:
            words = set(text.rstrip("?").split())
            if answer in {"yes", "no"}:
                asked = "shape" if words & WORDS["shape"] else "color"
                reveals = {asked} if (answer == "no") == bool(words & {"no", "not"}) else set()
            else:
                asked = "shape" if answer in WORDS["shape"] else "color"
                reveals = {name for name, known in WORDS.items() if words & known} | {asked}
            assert asked not in told, turns
            told |= reveals
    assert lengths >= {1, 2, 3, 4}


def test_training_asks_about_as_often_for_what_is_there_as_for_what_is_not():
    drawn = Counter(
        read_question(*turn).kind
        for epoch in range(3)
        for index in range(0, 3600, 6)
        for turn in turns_of(EasyVQA(turns=1).source("train", epoch).sample(index, epoch))
    )
    # The package itself asks 23,258 times for what is not there and 5,149 times for what is.
    # Some images have no question about what is there.
    assert 0.45 < drawn["present"] / drawn["absent"] < 1
    assert set(drawn) == {"shape", "color", "present", "absent"}
    only = EasyVQA(kinds={"color": 1.0, "shape": 0.0}).source("train", 0)
    assert all("presence" not in only.sample(i, 0)["kinds"] or len(only.sample(i, 0)["kinds"]) == 1 for i in range(99))


def test_shapes_come_first():
    source = EasyVQA(shapes_first=2).source("train", 0)
    for epoch, expected in ((0, True), (1, True), (2, False)):
        samples = [source.sample(index, epoch) for index in range(200)]
        shapes = sum(sample["kinds"] == ["shape"] for sample in samples)
        assert (shapes > 120) is expected
        assert all(len(sample["kinds"]) == 1 for sample in samples) is expected


def test_kinds_follow_from_the_answer():
    source = EasyVQA().source("val", 0)
    for number in range(100):
        sample = source.sample(number, 0)
        (_, answer), kind = turns_of(sample)[0], sample["kinds"][0]
        shapes = {"circle", "rectangle", "triangle"}
        assert kind == ("presence" if answer in {"yes", "no"} else "shape" if answer in shapes else "color")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    easy_vqa._load.cache_clear()
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ConfigError, match=r'pip install -c constraints.txt -e "\.\[demo\]"'):
        EasyVQA().source("train", 0)
    easy_vqa._load.cache_clear()


@pytest.mark.parametrize("options", [{"turns": 0}, {"val_images": 0}, {"val_questions": 0}, {"test_questions": 0}])
def test_bad_settings_are_named(options):
    with pytest.raises(ConfigError, match=rf"data\.task\.{next(iter(options))}: 0; expected at least 1"):
        EasyVQA(**options)


def test_validation_cannot_take_all_images():
    with pytest.raises(ConfigError, match="val_images: 4000; expected fewer than the 4000"):
        EasyVQA(val_images=4000).source("train", 0)


def test_a_negative_number_of_epochs_is_refused():
    with pytest.raises(ConfigError, match=r"data\.task\.shapes_first: -1; expected a number of epochs, at least 0"):
        EasyVQA(shapes_first=-1)


def test_unknown_kinds_are_refused():
    with pytest.raises(ConfigError, match=r"data\.task\.kinds: size; known are shape, color, present, absent"):
        EasyVQA(kinds={"size": 1.0})
