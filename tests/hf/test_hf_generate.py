"""transformers' generate drives our models: the same tokens and logits as VisionLanguageModel.generate."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hf_cases import CASES, NO_VISUALS, Case, Wrapped, reloaded, video_inputs
from model_cases import DATA, joined_images, prompt
from transformers import AutoModelForImageTextToText

import hybridvl
from hybridvl.hf import modeling
from hybridvl.hf.cache import HybridVLCache
from hybridvl.layers import ConfigError
from hybridvl.models import Sampling

NEW = 10


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_tokens_and_logits_are_ours(case: Case, tmp_path: Path) -> None:
    net, inputs = case.net(), case.inputs()
    model = reloaded(net, tmp_path)
    steps = list(net.steps(max_new_tokens=NEW, **inputs))
    found = model.generate(**inputs, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True)
    wanted = torch.stack([step.tokens for step in steps], dim=1)
    assert torch.equal(found.sequences, torch.cat((inputs["input_ids"], wanted), dim=1))
    for step, logits in zip(steps, found.logits, strict=True):
        torch.testing.assert_close(logits, step.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_rows_without_padding_and_prompts_of_one_token(case: Case) -> None:
    net = case.net()
    for length in (1, 6):
        ids = torch.randint(0, 80, (2, length), generator=torch.Generator().manual_seed(length))
        assert torch.equal(Wrapped.wrap(net).generate(ids, max_new_tokens=NEW), net.generate(ids, NEW))


@pytest.mark.parametrize("convention", ["v457", "v523"])
def test_videos(convention: str) -> None:
    net = CASES[1].net()
    net.config = type(net.config).from_dict(
        {**net.config.to_dict(), "video_convention": convention, "tokens_per_second": 3.0}
    )
    inputs = video_inputs(3)
    wanted = net.generate(max_new_tokens=NEW, **inputs)
    assert torch.equal(Wrapped.wrap(net).generate(**inputs, max_new_tokens=NEW), wanted)


def test_rows_end_at_stop_tokens_as_ours_do() -> None:
    net, inputs = CASES[0].net(), CASES[0].inputs()
    stop = int(net.generate(max_new_tokens=3, **inputs)[0, -1])
    wanted = net.generate(max_new_tokens=NEW, sampling=Sampling(stop_ids=(stop,)), **inputs)
    found = Wrapped.wrap(net).generate(**inputs, max_new_tokens=NEW, eos_token_id=stop, pad_token_id=stop)
    assert torch.equal(found, wanted)
    assert (wanted[0, -NEW + 3 :] == stop).all()


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.8}], ids=str)
def test_draws_are_ours(options: dict[str, float]) -> None:
    net, inputs = CASES[4].net(), CASES[4].inputs()
    torch.manual_seed(5)
    wanted = net.generate(max_new_tokens=NEW, sampling=Sampling(temperature=0.7, **options), **inputs)
    torch.manual_seed(5)
    found = Wrapped.wrap(net).generate(
        **inputs, max_new_tokens=NEW, do_sample=True, temperature=0.7, **{"top_k": 0, **options}
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beams_and_greedy_search_with_the_state_as_without(case: Case) -> None:
    model, inputs = Wrapped.wrap(case.net()), case.inputs()
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "num_beams": beams, "bad_words_ids": NO_VISUALS}
        with_state = model.generate(**inputs, **options)
        assert torch.equal(with_state, model.generate(**inputs, **options, use_cache=False))


def test_several_answers_see_the_pictures_of_their_row() -> None:
    model, inputs = Wrapped.wrap(CASES[0].net()), CASES[0].inputs()
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    once = model.generate(**inputs, **options).logits[0]
    several = model.generate(**inputs, **options, do_sample=True, num_return_sequences=3).logits[0]
    torch.testing.assert_close(several, once.repeat_interleave(3, 0), atol=1e-5, rtol=1e-5)


def test_several_answers_see_the_video_of_their_row() -> None:
    model, inputs = Wrapped.wrap(CASES[1].net()), video_inputs(4)
    options = {"max_new_tokens": 4, "num_beams": 2}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))


@pytest.mark.parametrize("case", CASES[2:5], ids=str)
def test_a_conversation_goes_on_from_the_returned_cache(case: Case) -> None:
    model, inputs = Wrapped.wrap(case.net()), case.inputs()
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "bad_words_ids": NO_VISUALS}
    first = model.generate(**inputs, **options)
    assert isinstance(first.past_key_values, HybridVLCache)
    question = torch.randint(0, 80, (len(first.sequences), 5), generator=torch.Generator().manual_seed(1))
    ids = torch.cat((first.sequences, question), dim=1)
    new = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.int64)
    mask = torch.cat((inputs["attention_mask"], new), dim=1)
    afresh = model.generate(**{**inputs, "input_ids": ids, "attention_mask": mask}, **options)
    goes_on = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **options)
    assert torch.equal(goes_on.sequences, afresh.sequences)
    assert goes_on.past_key_values.get_seq_length() == ids.shape[1] + 3


def test_a_prompt_must_be_longer_than_what_the_cache_has_seen() -> None:
    model, ids = Wrapped.wrap(CASES[5].net()), torch.tensor([[1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
    for prompt_ids in (ids[:, :4], ids[:, 4:]):
        with pytest.raises(ConfigError, match="has seen 4 tokens a row, the prompt with its attention_mask has"):
            model.generate(prompt_ids, past_key_values=cache, max_new_tokens=2)
    wanted = model.generate(ids, max_new_tokens=2)[:, 6:]
    fork = copy.deepcopy(cache)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=2)[:, 6:], wanted)
    new = model.generate(ids[:, 4:], attention_mask=torch.ones(1, 6), past_key_values=fork, max_new_tokens=2)
    assert torch.equal(new[:, 2:], wanted)


def test_a_second_turn_shows_a_picture() -> None:
    model = Wrapped.wrap(CASES[1].net())
    one, two = prompt(5, [(1, 4, 6)], 1), prompt(4, [(1, 6, 6)], 2)
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "bad_words_ids": NO_VISUALS}
    images = {"pixel_values": two.pixel_values, "image_grid_thw": two.image_grid_thw}
    first = model.generate(one.input_ids, pixel_values=one.pixel_values, image_grid_thw=one.image_grid_thw, **options)
    ids = torch.cat((first.sequences, two.input_ids), dim=1)
    afresh = model.generate(ids, **joined_images([one, two]), **options)
    with pytest.raises(ConfigError, match=r"input_ids: 9 image tokens \(id 90\), but the images given make 0"):
        model.generate(ids, past_key_values=first.past_key_values, **options)
    goes_on = model.generate(ids, past_key_values=first.past_key_values, **images, **options)
    assert torch.equal(goes_on.sequences, afresh.sequences)


def test_generation_config_of_the_folder(tmp_path: Path) -> None:
    net, inputs = CASES[1].net(), CASES[1].inputs()
    length = inputs["input_ids"].shape[1]
    free = net.generate(max_new_tokens=NEW, **inputs)[:, length:]
    stop = int(free[0, 2])
    hybridvl.save(net, tmp_path / "ours")
    settings = {"eos_token_id": [stop, 95], "pad_token_id": 77, "max_new_tokens": NEW}
    (tmp_path / "ours" / "generation_config.json").write_text(json.dumps(settings))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    found = model.generate(**inputs)[:, length:]
    for ours, row in zip(free.tolist(), found.tolist(), strict=True):
        end = next((n + 1 for n, token in enumerate(ours) if token in (stop, 95)), NEW)
        assert row == (ours[:end] + [77] * (NEW - end))[: len(row)]
    assert stop in found[0]
    model.save_pretrained(tmp_path / "theirs")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again.generate(**inputs)[:, length:], found)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16], ids=str)
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    net, inputs = CASES[1].net(), CASES[1].inputs()
    wanted = net.generate(max_new_tokens=4, **inputs)
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    assert torch.equal(net.generate(max_new_tokens=4, **inputs), wanted)
    assert torch.equal(Wrapped.wrap(net).generate(max_new_tokens=4, **inputs), wanted)


def test_a_prompt_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = CASES[4].net(), CASES[4].inputs()
    monkeypatch.setattr(modeling, "PREFILL_CHUNK", 5)
    found = Wrapped.wrap(net).generate(**inputs, max_new_tokens=NEW)
    assert torch.equal(found, net.generate(max_new_tokens=NEW, **inputs))


@pytest.mark.parametrize("beams", [1, 2])
def test_embeddings_in_place_of_tokens(beams: int) -> None:
    net, inputs = CASES[5].net(), CASES[5].inputs()
    model = Wrapped.wrap(net)
    embeds = net.decoder.embed_tokens(inputs["input_ids"])
    options = {"attention_mask": inputs["attention_mask"], "max_new_tokens": NEW, "num_beams": beams}
    found = model.generate(inputs_embeds=embeds, **options)
    assert torch.equal(found, model.generate(inputs["input_ids"], **options)[:, -NEW:])
    with pytest.raises(ConfigError, match="inputs_embeds: given with input_ids or pixel values"):
        model(inputs["input_ids"], inputs_embeds=embeds)
    with pytest.raises(ConfigError, match="input_ids: None; expected tokens, or inputs_embeds"):
        model()


def test_embeddings_with_pictures_need_positions() -> None:
    net, inputs = CASES[0].net(), CASES[0].inputs()
    model, grids = Wrapped.wrap(net), inputs["image_grid_thw"]
    embeds = net.embed(inputs["input_ids"], inputs["pixel_values"], grids)
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "image_grid_thw": grids}
    with pytest.raises(ConfigError, match="position_ids: None with inputs_embeds and grids"):
        model(**given)
    places, _ = net.rope_positions(inputs["input_ids"], grids, attention_mask=inputs["attention_mask"])
    assert torch.equal(model(**given, position_ids=places).logits, model(**inputs).logits)
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "num_beams": beams}
        found = model.generate(**given, position_ids=places, **options)
        assert torch.equal(found, model.generate(**inputs, **options)[:, -4:])


def test_hidden_states_of_every_step() -> None:
    case = CASES[3]
    model, inputs = Wrapped.wrap(case.net()), case.inputs()
    found = model.generate(**inputs, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True)
    assert [len(step) for step in found.hidden_states] == [3, 3, 3]
    assert [step[0].shape[1] for step in found.hidden_states] == [inputs["input_ids"].shape[1], 1, 1]


def test_a_cache_starts_again() -> None:
    model, inputs = Wrapped.wrap(CASES[5].net()), CASES[5].inputs()
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        cache = first.past_key_values
        assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (inputs["input_ids"].shape[1], 3, 4)
        cache.reset()
        again = model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    torch.testing.assert_close(again.logits, first.logits)


def test_padding_on_the_right_is_refused() -> None:
    model, ids = Wrapped.wrap(CASES[5].net()), torch.tensor([[1, 2, 3], [4, 85, 85]])
    with pytest.raises(ConfigError, match="a row of `generate` ends in padding; expected padding on the left"):
        model.generate(ids, attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]))


def test_what_a_state_cannot_do_is_refused() -> None:
    model = Wrapped.wrap(CASES[2].net())
    ids = torch.tensor([[1, 2, 3]])
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(0)
    with pytest.raises(ConfigError, match="crop: a recurrent state cannot forget"):
        cache.crop(-1)
    with pytest.raises(ConfigError, match="batch_repeat_interleave"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ConfigError, match="batch_select_indices"):
        cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(ConfigError, match=r"past_key_values: a int; expected the cache of an earlier output"):
        model(ids, past_key_values=3)
    with pytest.raises(ConfigError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ConfigError, match=r"attention_mask: shape \(1, 5\); expected \(1, 3\).*or \(1, 6\)"):
        model(ids, attention_mask=torch.ones(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, assistant_model=Wrapped.wrap(CASES[2].net()))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_a_qwen_folder_gives_what_transformers_own_class_gives(options: dict[str, int]) -> None:
    theirs = AutoModelForImageTextToText.from_pretrained(DATA / "qwen2_5_vl_tiny")
    ours = Wrapped.wrap(hybridvl.load(DATA / "qwen2_5_vl_tiny"))
    config = ours.net.config
    image, start = config.image_token_id, config.vision_start_token_id
    ids = torch.tensor([[7, 3, start, *[image] * 6, 5, 2, 9], [0, 0, 0, 0, 8, start, *[image] * 4, 1, 4]])
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == image).long(),
        "pixel_values": torch.randn(40, config.vision.patch_dim, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 4]]),
    }
    options = {**options, "max_new_tokens": NEW, "bad_words_ids": [[image], [config.video_token_id]]}
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))
