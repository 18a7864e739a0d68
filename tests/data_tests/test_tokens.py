"""Tests of hybridvl.data.tokens: the built-in tokenizer and loading others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridvl.data.tokens import BUILTIN_FOLDER, SPECIAL_TOKENS, load_tokenizer, train_builtin
from hybridvl.layers import ConfigError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_special_tokens_come_first_and_the_vocabulary_is_small(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(8))
    assert len(tokenizer) == 512
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_every_digit_is_a_token_of_its_own(tokenizer):
    ascii_digits = "0123456789"
    assert tokenizer.tokenize("4719") == list("4719")
    assert tokenizer.tokenize("How many 12s?") == ["How", "Ġmany", "Ġ", "1", "2", "s", "?"]
    with_digit = [token for token in tokenizer.get_vocab() if any(char in ascii_digits for char in token)]
    assert sorted(with_digit) == list(ascii_digits)


@pytest.mark.parametrize("word", ["yes", "no", "circle", "rectangle", "teal", "yellow", " column", " digit"])
def test_words_of_the_built_in_tasks_are_single_tokens(tokenizer, word):
    assert len(tokenizer.tokenize(word)) == 1


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=200)
def test_any_text_survives(text):
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(text, split_special_tokens=True)
    assert tokenizer.decode(ids) == text


def test_the_committed_files_are_what_the_function_makes(tmp_path):
    train_builtin(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (BUILTIN_FOLDER / name).read_text()


def test_a_folder_is_loaded_by_path(tmp_path, tokenizer):
    train_builtin(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer '.*nowhere' cannot be loaded"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_tokenizer_without_the_chat_tokens_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "<|im_start|>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks <\|endoftext\|>, <\|im_end\|>"):
        load_tokenizer(str(tmp_path))
