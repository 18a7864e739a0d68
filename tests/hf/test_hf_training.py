"""Training through transformers: the loss, recomputed layers, the Trainer, LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_cases import CASES, NO_VISUALS, Case, Wrapped
from model_cases import DATA
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

import hybridvl
from hybridvl.layers import ConfigError


def labelled(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {**inputs, "labels": labels.masked_fill(labels >= 85, -100)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_outputs(case: Case) -> None:
    net, inputs = case.net(), labelled(case)
    model = Wrapped.wrap(net)
    found = model(**inputs, output_hidden_states=True)
    labels = inputs.pop("labels")
    wanted = net(**inputs, output_hidden_states=True)
    assert torch.equal(found.logits, wanted.logits)
    assert len(found.hidden_states) == len(wanted.hidden_states)
    assert all(torch.equal(*pair) for pair in zip(found.hidden_states, wanted.hidden_states, strict=True))
    assert found.past_key_values is None
    kept = labels[:, 1:] != -100
    chosen = F.log_softmax(wanted.logits[:, :-1], -1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0][kept]
    torch.testing.assert_close(found.loss, -chosen.mean())
    per_token = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(per_token, -chosen.sum() / 100)
    last = model(**inputs, logits_to_keep=2, return_dict=False)
    torch.testing.assert_close(last[0], wanted.logits[:, -2:])
    some = model(**inputs, logits_to_keep=torch.tensor([0, 3])).logits
    torch.testing.assert_close(some, wanted.logits[:, [0, 3]])


@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_positions_given(case: Case) -> None:
    net, inputs = case.net(), case.inputs()
    places = torch.randint(0, 50, (3, *inputs["input_ids"].shape), generator=torch.Generator().manual_seed(0))
    places[:, :, -1] = 50  # text at the end, as generation goes on from it: the largest, and equal on the three axes
    model = Wrapped.wrap(net)
    given = {**inputs, "position_ids": places}
    assert torch.equal(model(**given).logits, net(**given).logits)
    assert torch.equal(model.generate(**given, max_new_tokens=4), net.generate(max_new_tokens=4, **given))
    beams = {"max_new_tokens": 4, "num_beams": 2, "bad_words_ids": NO_VISUALS}
    assert torch.equal(model.generate(**given, **beams), model.generate(**given, **beams, use_cache=False))
    with pytest.raises(ConfigError, match="position_ids: shape"):
        model(**inputs, position_ids=places[0])


def test_packed_rows() -> None:
    net = CASES[5].net()
    ids, bounds = torch.arange(9)[None], torch.tensor([0, 4, 9])
    found = Wrapped.wrap(net)(ids, cu_seqlens=bounds).logits
    torch.testing.assert_close(found[:, 4:], net(ids[:, 4:]).logits)


@pytest.mark.parametrize("bounds", [[0, 4, 9], [0, 4, 4, 9, 9]], ids=str)
def test_the_loss_of_packed_rows_stays_within_segments(bounds: list[int]) -> None:
    model, ids = Wrapped.wrap(CASES[5].net()), torch.arange(9)[None]
    alone = [model(part, labels=part, num_items_in_batch=7).loss for part in ids.split([4, 5], dim=1)]
    packed = model(ids, labels=ids, cu_seqlens=torch.tensor(bounds), num_items_in_batch=7).loss
    torch.testing.assert_close(packed, alone[0] + alone[1])


def test_labels_of_another_shape() -> None:
    model, inputs = Wrapped.wrap(CASES[2].net()), labelled(CASES[2])
    with pytest.raises(ConfigError, match=r"labels: shape \(3, 9\); expected \(3, 2\).*logits_to_keep: 0"):
        model(**inputs, logits_to_keep=2)
    with pytest.raises(ConfigError, match=r"labels: shape \(3, 8\); expected \(3, 9\)"):
        model(**{**inputs, "labels": inputs["labels"][:, 1:]})


@pytest.mark.parametrize("items", [None, 7])
def test_the_loss_is_that_of_transformers_own_class(items: int | None) -> None:
    theirs = AutoModelForImageTextToText.from_pretrained(DATA / "qwen2_5_vl_tiny")
    ours = Wrapped.wrap(hybridvl.load(DATA / "qwen2_5_vl_tiny"))
    config = ours.net.config
    image, start = config.image_token_id, config.vision_start_token_id
    ids = torch.tensor([[7, 3, start, *[image] * 6, 5, 2, 9], [0, 0, 0, 0, 8, start, *[image] * 4, 1, 4]])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == image).long(),
        "pixel_values": torch.randn(40, config.vision.patch_dim, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 4, 4]]),
        "labels": ids.masked_fill((ids == 0) | (ids == image), -100),
        "num_items_in_batch": items,
    }
    found, wanted = ours(**inputs).loss, theirs(**inputs).loss
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    found.backward()
    wanted.backward()
    embedding = ours.get_input_embeddings().weight.grad
    torch.testing.assert_close(embedding, theirs.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-5)


def gradients(model: Wrapped, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_recomputed_layers(case: Case) -> None:
    model, inputs = Wrapped.wrap(case.net()), labelled(case)
    plain = gradients(model, inputs)
    model.activation_checkpointing_enable()
    assert model.net.decoder.activation_checkpointing
    assert model.net.visual.activation_checkpointing
    calls: list[int] = []
    block = model.net.decoder.layers[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients(model, inputs)
    assert len(calls) == 2
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)
    with pytest.raises(ConfigError, match="every_n_layers: 2; expected 1"):
        model.activation_checkpointing_enable(every_n_layers=2)
    model.activation_checkpointing_disable()
    assert not model.net.decoder.activation_checkpointing
    assert not model.is_activation_checkpointing


def test_trainer_takes_steps(tmp_path: Path) -> None:
    case = CASES[5]
    model = Wrapped.wrap(case.net())
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": (ids := torch.randint(0, 80, (6,), generator=generator)), "labels": ids} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        num_train_epochs=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        ids = torch.stack([row["input_ids"] for row in rows])
        wanted = F.cross_entropy(case.net()(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert before == pytest.approx(float(wanted), rel=1e-4)
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.evaluate()["eval_loss"] < before - 0.3
    trainer.save_model(str(tmp_path / "model"))
    saved = hybridvl.load(tmp_path / "model")
    assert torch.equal(saved(ids).logits, model.net.eval()(ids).logits)


def test_lora() -> None:
    case = CASES[3]
    net, inputs = case.net(), labelled(case)
    before = net(inputs["input_ids"]).logits
    tuned = get_peft_model(Wrapped.wrap(net), LoraConfig(target_modules=["in_proj", "lm_head"], task_type="CAUSAL_LM"))
    torch.testing.assert_close(tuned(input_ids=inputs["input_ids"]).logits, before)
    tuned(**inputs).loss.backward()
    moved = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert moved
    assert all("lora_" in name for name in moved)
    assert any("lm_head" in name for name in moved)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = inputs["input_ids"][:1]
    assert not torch.allclose(tuned(input_ids=ids).logits, before[:1], atol=0.1)
    new = tuned.generate(input_ids=ids, max_new_tokens=4)
    assert torch.equal(new, tuned.generate(input_ids=ids, max_new_tokens=4, use_cache=False))
