"""Tests of hybridvl.data.digits: scans kept apart, pages that are what their answers say, errors."""

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from hybridvl.data.digits import DigitPages, scan_splits, scans
from hybridvl.layers import ConfigError


def page_of(sample):
    return np.asarray(sample["messages"][0]["content"][0]["image"])


def turns_of(sample):
    """(question, answer) pairs."""
    texts = [m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"] for m in sample["messages"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_scans_are_those_of_scikit_learn():
    pixels, labels = load_digits(return_X_y=True)
    assert np.array_equal(scans()[0].reshape(-1, 64) * 16, pixels)
    assert np.array_equal(scans()[1], labels)
    assert scans()[0].dtype == np.float32
    assert scans()[1].dtype == np.int64


def test_scans_are_read_without_loading_scikit_learn():
    code = "import sys; from hybridvl.data.digits import scans; scans(); sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)


def test_without_scikit_learn_the_scans_are_missed(monkeypatch):
    monkeypatch.setattr("hybridvl.data.digits.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"^data\.task: the scanned digits are scikit-learn's, which is not installed"
    ):
        scans.__wrapped__()


def test_splits_share_no_scan():
    splits = scan_splits()
    assert {name: len(numbers) for name, numbers in splits.items()} == {"train": 1297, "val": 200, "test": 300}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1797))
    pixels = {name: {scans()[0][number].tobytes() for number in numbers} for name, numbers in splits.items()}
    assert not pixels["train"] & pixels["test"]
    assert not pixels["train"] & pixels["val"]
    assert not pixels["val"] & pixels["test"]


def test_pages_use_the_scans_of_their_split_alone():
    for split in ("train", "val", "test"):
        source = DigitPages().source(split, seed=3)
        used = {int(number) for page in range(100) for number in source.scan_numbers(page, epoch=2).flat}
        assert used <= set(scan_splits()[split].tolist())
        assert len(used) > 150


def test_every_class_is_in_every_split():
    for numbers in scan_splits().values():
        assert set(scans()[1][numbers]) == set(range(10))


def test_a_page_shows_its_scans():
    """Every cell of an undistorted page is its scan as PIL enlarges it, with a strip of paper around."""
    source = DigitPages(cell=16).source("test", seed=0)
    step = 1.15 * 8 / 16
    first = 6 - 1.15 * 4  # left edge of the cell, in pixels of the padded scan
    for number in range(10):
        page = page_of(source.sample(number, 0))
        numbers = source.scan_numbers(number)
        for row, column in np.ndindex(numbers.shape):
            scan = Image.fromarray(np.pad(scans()[0][numbers[row, column]], 2))
            where = (step, 0, first, 0, step, first)
            ink = scan.transform((16, 16), Image.Transform.AFFINE, where, Image.Resampling.BILINEAR)
            cell = page[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            assert np.abs(cell - (236.0 - 212.0 * np.asarray(ink))).max() <= 1


@given(st.integers(0, 10**6), st.sampled_from(["train", "val", "test"]), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_answers_are_what_stands_on_the_page(index, split, epoch):
    source = DigitPages(rows=(1, 4), columns=(1, 5), eval_turns=4).source(split, seed=1)
    sample = source.sample(index, epoch)
    digits = scans()[1][source.scan_numbers(index, epoch)]
    assert page_of(sample).shape == (digits.shape[0] * 16, digits.shape[1] * 16)
    turns = turns_of(sample)
    assert len({question for question, _ in turns}) == len(turns) == len(sample["kinds"])
    for kind, (question, answer) in zip(sample["kinds"], turns, strict=True):
        numbers = [int(found) for found in re.findall(r"\d+", question)]
        if kind == "line":
            assert answer.split() == [str(digit) for digit in digits[numbers[0] - 1]]
        elif kind == "cell":
            assert answer == str(digits[numbers[0] - 1, numbers[1] - 1])
        elif kind == "count":
            assert answer == str((digits == numbers[0]).sum())
        else:
            assert question == "Read the page."
            assert [line.split() for line in answer.split("\n")] == digits.astype(str).tolist()


def test_pages_follow_from_seed_split_epoch_and_number():
    def page(split, seed, index, epoch):
        return page_of(DigitPages().source(split, seed).sample(index, epoch)).tobytes()

    assert page("train", 0, 5, 1) == page("train", 0, 5, 1)
    different = {page("train", 0, 5, 1), page("train", 0, 5, 2), page("train", 0, 6, 1), page("train", 1, 5, 1)}
    assert len(different) == 4
    assert page("val", 0, 5, 0) == page("val", 0, 5, 7)


def test_training_pages_grow_from_one_digit():
    source = DigitPages(growth=10).source("train", 0)

    def sizes(epoch, of=source):
        return {of.scan_numbers(page, epoch).shape for page in range(300)}

    assert sizes(0) == sizes(1) == {(1, 1)}
    # A third of the way: at most 1 + int(1 / 3 * 19) = 7 digits, in every shape that fits on a whole page.
    assert sizes(4) == {(r, c) for r in range(1, 5) for c in range(1, 6) if r * c <= 7}
    most = [max(r * c for r, c in sizes(epoch)) for epoch in range(11)]
    assert most == sorted(most)
    assert most[-1] == 20
    whole = {(r, c) for r in range(2, 5) for c in range(2, 6)}
    assert sizes(10) == sizes(0, DigitPages().source("train", 0)) == whole
    assert sizes(0, DigitPages(growth=10).source("test", 0)) == whole


def test_only_training_pages_are_distorted():
    def clean_paper(split, augment):
        source = DigitPages(augment=augment).source(split, 0)
        return np.mean([(page_of(source.sample(number, 0)) == 236).mean() for number in range(20)])

    assert clean_paper("train", 1.0) < 0.05
    assert min(clean_paper("train", 0.0), clean_paper("val", 1.0), clean_paper("test", 1.0)) > 0.3


def test_kinds_are_asked_by_weight():
    source = DigitPages(kinds={"line": 3.0, "cell": 1.0, "count": 0.0}, eval_turns=1).source("test", 0)
    asked = [source.sample(number, 0)["kinds"][0] for number in range(800)]
    assert set(asked) == {"line", "cell"}
    assert abs(asked.count("line") / 800 - 0.75) < 0.05


def test_turns_and_separator():
    sample = DigitPages(turns=3, separator="").source("train", 0).sample(0, 0)
    assert len(sample["messages"]) == 6
    assert not any(" " in answer for _, answer in turns_of(sample))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": (3, 2)}, r"data\.task\.rows: \[3, 2\]"),
        ({"columns": (0, 2)}, r"data\.task\.columns"),
        ({"growth": -1}, r"data\.task\.growth: -1; expected a number of epochs"),
        ({"turns": 0}, r"data\.task\.turns: 0; expected at least 1"),
        ({"test_pages": 0}, r"data\.task\.test_pages: 0"),
        ({"augment": -1.0}, r"data\.task\.augment: -1\.0"),
        ({"kinds": {"lines": 1.0}}, "lines; known are line, cell, count, page"),
        ({"kinds": {"line": 0.0}}, "one of them above 0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        DigitPages(**options)
