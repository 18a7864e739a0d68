"""Tests of hybridvl.data.easy_vqa: the package's questions, splits by image, and its absence."""

import sys

import numpy as np
import pytest

from hybridvl.data import easy_vqa
from hybridvl.data.easy_vqa import EasyVQA
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
    whole = sorted((number, *question) for number, question in source._single)
    assert whole == sorted(zip(package.get_test_questions()[2], questions, answers, strict=True))


def test_an_image_goes_with_its_questions():
    source = EasyVQA(augment=False, turns=100).source("train", seed=0)
    questions, answers, numbers = package.get_train_questions()
    for index in (0, 17, 3599):
        number = source.image_numbers[index]
        sample = source.sample(index, 0)
        expected = [pair[:2] for pair in zip(questions, answers, numbers, strict=True) if pair[2] == number]
        assert sorted(turns_of(sample)) == sorted(expected)
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
    source = EasyVQA(turns=3).source("train", 0)
    first = turns_of(source.sample(4, 0))
    assert len(first) == 3
    assert turns_of(source.sample(4, 0)) == first
    assert any(turns_of(source.sample(4, epoch)) != first for epoch in range(1, 4))
    assert any(turns_of(EasyVQA(turns=3).source("train", seed).sample(4, 0)) != first for seed in range(1, 4))


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
    with pytest.raises(ConfigError, match=r"pip install 'hybridvl\[demo\]'"):
        EasyVQA().source("train", 0)
    easy_vqa._load.cache_clear()


@pytest.mark.parametrize("options", [{"turns": 0}, {"val_images": 0}, {"val_questions": 0}, {"test_questions": 0}])
def test_bad_settings_are_named(options):
    with pytest.raises(ConfigError, match=rf"data\.task\.{next(iter(options))}: 0; expected at least 1"):
        EasyVQA(**options)


def test_validation_cannot_take_all_images():
    with pytest.raises(ConfigError, match="val_images: 4000; expected fewer than the 4000"):
        EasyVQA(val_images=4000).source("train", 0)
