"""Policies that see images, against the library's own processor and forward pass in float64, one row at a time."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

from bco_lightning import BCOModule, FeedbackDataModule, load_aligned
from bco_lightning.batch import FeedbackBatch, FeedbackRow, TokenizedSample
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.checkpoints.manifest import resolve_checkpoint
from bco_lightning.data.collate import collate
from bco_lightning.data.images import IMAGES, MARK, ImageInputs, Picture
from bco_lightning.data.options import DataOptions
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.importance.features import ReferenceEncoder
from bco_lightning.inspection.inspect import inspect_log
from bco_lightning.models.adapters import add_adapters
from bco_lightning.models.generation import held_out_prompts, sample_completions
from bco_lightning.models.layout import set_layout
from bco_lightning.models.load import load_language_model, load_policy
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.options import LoraSettings, PromptFeatures
from bco_lightning.serving.export import export_checkpoint
from tests.conftest import tiny_data, tiny_trainer, tokenized_row, write_jsonl
from tests.unit.vision_models import (
    KINDS,
    image_bytes,
    model_of,
    picture,
    processor_of,
    saved,
    tokenizer_of,
    torchvision_processor_of,
)

SIZES = ((20, 14), (16, 30), (15, 15))
# Of each row the numbers of its images, what is said with them, and the answer.
ROWS: list[tuple[list[int], str, str]] = [
    ([0], "What is it?", "A red dog."),
    ([1, 2], "Which is larger?", "The second."),
    ([], "Hello", "Hi there"),
]


def seeing(kind: str) -> Any:
    tokenizer = tokenizer_of(kind)
    tokenizer.processor = processor_of(kind, tokenizer)
    return tokenizer


def pictures(numbers: list[int]) -> list[Any]:
    return [picture(number, SIZES[number]) for number in numbers]


def samples_of(tokenizer: Any) -> list[dict[str, Any]]:
    made = RowTokenizer(tokenizer, DataOptions(max_length=256))
    samples = []
    for number, (images, asked, answer) in enumerate(ROWS):
        stored = [Picture(image_bytes(image, size=SIZES[image]), str(image)) for image in images]
        message = {"role": "user", "content": MARK * len(images) + asked, **({IMAGES: stored} if images else {})}
        row = FeedbackRow([message], [{"role": "assistant", "content": answer}], number == 0, f"x:{number}")
        sample = tokenized_row(made, row)
        assert isinstance(sample, TokenizedSample)
        samples.append({**vars(sample), "thumbs_up": row.thumbs_up, "row_id": number})
    return samples


def batch_of(tokenizer: Any) -> FeedbackBatch:
    return collate(samples_of(tokenizer), images=ImageInputs(tokenizer))


def by_hand(model: Any, tokenizer: Any) -> Tensor:
    """Log-probs as anyone would compute them with the processor: of the answer and the end token, in float64."""
    found = []
    for images, asked, answer in ROWS:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": asked}]
        told = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
        said = f"{answer}{tokenizer.eos_token}"
        given = {"images": [pictures(images)]} if images else {}
        inputs = tokenizer.processor(text=[text + said], **given, return_tensors="pt")
        ids = inputs["input_ids"][0]
        length = len(tokenizer(said, add_special_tokens=False)["input_ids"])
        log_probs = model(**inputs).logits[0].log_softmax(-1)
        found.append(log_probs[-length - 1 : -1].gather(-1, ids[-length:, None]).sum())
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_of_rows_with_images_are_those_of_the_library(kind: str) -> None:
    tokenizer = seeing(kind)
    exact = model_of(kind, tokenizer).double()
    ours = model_of(kind, tokenizer)
    expected_B = by_hand(exact, tokenizer)
    weights_B = torch.tensor([1.0, -2.0, 0.5])
    (expected_B * weights_B.double()).sum().backward()
    for layout in ("padded", "alone"):
        set_layout(ours, layout)
        ours.zero_grad()
        found_B = completion_log_probs(ours, batch_of(tokenizer))
        assert torch.allclose(found_B.double(), expected_B, rtol=2e-5, atol=2e-5)
        (found_B * weights_B).sum().backward()
        for (name, found), right in zip(ours.named_parameters(), exact.parameters(), strict=True):
            assert right.grad is not None or found.grad is None or not found.grad.any(), name
            if right.grad is not None:
                assert torch.allclose(found.grad.double(), right.grad, rtol=1e-3, atol=2e-4), name


@pytest.mark.parametrize("kind", ["smolvlm", "mistral3"])
def test_log_probs_are_right_by_a_processor_that_wants_torchvision(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("num2words")
    tokenizer = tokenizer_of(kind)
    model = model_of(kind, tokenizer)
    model.save_pretrained(tmp_path)
    torchvision_processor_of(kind, tokenizer).save_pretrained(tmp_path)
    batch = batch_of(tokenizer := AutoTokenizer.from_pretrained(tmp_path))
    set_layout(model, "padded")
    with torch.no_grad():
        found_B = completion_log_probs(model, batch).double()
        tokenizer.processor = AutoProcessor.from_pretrained(tmp_path)
        assert torch.allclose(found_B, by_hand(model.double(), tokenizer), rtol=2e-5, atol=2e-5)


def test_rows_of_text_have_the_log_probs_of_the_text_model_alone() -> None:
    from transformers import LlamaForCausalLM

    tokenizer = seeing("llava")
    model = model_of("llava", tokenizer)
    text = LlamaForCausalLM(model.config.text_config).eval()
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    row = {"input_ids": list(range(20, 40)), "completion_mask": [False] * 9 + [True] * 11}
    batch = collate([{**row, "thumbs_up": True, "row_id": 0}] * 2)
    for layout in ("packed", "padded"):
        set_layout(model, layout)
        set_layout(text, layout)
        assert torch.equal(completion_log_probs(model, batch), completion_log_probs(text, batch))


def test_adapters_are_those_of_the_language_model_unless_the_tower_is_asked_for() -> None:
    def trained(vision_tower: bool) -> set[str]:
        policy = add_adapters(model_of("llava", tokenizer_of("llava")), LoraSettings(r=2), 0, "x", None, vision_tower)
        return {name.split(".")[3] for name, each in policy.named_parameters() if each.requires_grad}

    assert trained(False) == {"language_model"}
    assert trained(True) == {"language_model", "vision_tower", "multi_modal_projector"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    saved("llava", folder / "model")
    for number in range(4):
        (folder / f"{number}.png").write_bytes(image_bytes(number))
    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image", "path": f"{n % 4}.png"}, f"What is {n}?"]}],
            "completion": f"Answer {n}.",
            "label": bool(n % 2),
        }
        for n in range(8)
    ]
    write_jsonl(folder / "log.jsonl", [*rows, {"prompt": "Hello", "completion": "Hi", "label": True}])
    return folder


def test_all_weights_are_those_of_the_language_model_unless_the_tower_is_asked_for(folder: Path) -> None:
    policy = load_policy(str(folder / "model"), torch.float32, None, 0)
    assert {n.split(".")[1] for n, each in policy.named_parameters() if not each.requires_grad} == {
        "vision_tower",
        "multi_modal_projector",
    }
    policy = load_policy(str(folder / "model"), torch.float32, None, 0, vision_tower=True)
    assert all(each.requires_grad for each in policy.parameters())


@pytest.mark.parametrize("known", ["before", "online"])
def test_a_step_on_images_has_the_losses_of_equation_8(folder: Path, known: str) -> None:
    module = BCOModule(
        str(folder / "model"), lora=LoraSettings(r=2, alpha=4), dtype="float32", learning_rate=0.05, beta=0.3,
        reference_log_probs=known, class_weights=(1.0, 1.0), seed=0,
    )  # fmt: skip
    data = tiny_data(str(folder / "log.jsonl"), max_length=128, validation_fraction=0.0, seed=0)
    tiny_trainer(max_steps=3).fit(module, datamodule=data)
    assert module.said_of_rows == "rows of a micro-batch are padded, since rows have images"
    (rows,) = module.step_rows
    exact = load_language_model(str(folder / "model"), torch.float64)
    chosen = [data.train_dataset[number] for number in rows.row_ids_B.tolist()]
    batch = collate([{**row, "images": row["images"]} for row in chosen], images=ImageInputs(data.tokenizer))
    reference_B = completion_log_probs(exact, batch).double()
    assert torch.allclose(rows.reference_log_probs_B.double(), reference_B, rtol=1e-5, atol=1e-4)
    rewards_B = 0.3 * (rows.policy_log_probs_B.double() - reference_B)
    signs_B = torch.where(rows.thumbs_up_B, 1.0, -1.0).double()
    losses_B = -torch.nn.functional.logsigmoid(signs_B * (rewards_B - rows.reward_shift))
    assert torch.allclose(rows.losses_B.double(), losses_B, atol=1e-4)
    assert not torch.allclose(rewards_B, torch.zeros(4).double(), atol=1e-3)


def fitted(folder: Path, steps: int, root: Path | None = None, ckpt_path: str | None = None) -> Any:
    module = BCOModule(
        str(folder / "model"), lora=LoraSettings(r=2, alpha=4), dtype="float32", learning_rate=0.05, seed=0,
        lr_schedule="constant_with_warmup",
    )  # fmt: skip
    data = tiny_data(str(folder / "log.jsonl"), max_length=128, validation_fraction=0.3, seed=0)
    checkpoint, saving = RunCheckpoint(), {}
    if root is not None:
        checkpoint.run_folder = root
        saving = {"enable_checkpointing": True, "callbacks": [checkpoint], "default_root_dir": root}
    trainer = tiny_trainer(max_steps=steps, **saving)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def test_a_stream_gives_the_rows_of_a_table_with_their_images(folder: Path) -> None:
    tokenizer = seeing("llava")
    given = {"train_files": str(folder / "log.jsonl"), "tokenizer": tokenizer, "validation_fraction": 0.0}
    tables, streams = FeedbackDataModule(**given), FeedbackDataModule(**given, streaming=True)
    tables.setup("fit")
    streams.setup("fit")
    for number in range(9):
        (own,) = streams.training.dataset().__getitems__([number])
        row = tables.train_dataset[number]
        assert {n: row[n] for n in ("input_ids", "completion_mask")} == {
            n: own[n] for n in ("input_ids", "completion_mask")
        }
        assert list(own["images"]) == row["images"] and own["prompt_key"] == row["prompt_key"]


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl"])
def test_answers_are_sampled_after_seeing_the_image(kind: str) -> None:
    tokenizer = seeing(kind)
    model = model_of(kind, tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)  # one token has all of the probability
        content = [{"type": "image"}, {"type": "text", "text": "What?"}]
        told = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
        expected = set()
        for number in range(3):
            inputs = tokenizer.processor(images=[[picture(number)]], text=[text], return_tensors="pt")
            prompt = inputs["input_ids"][0].tolist()
            first = int(model(**inputs).logits[0, -1].argmax())
            images = [{}, ImageInputs(tokenizer)([image_bytes(number)])]
            given = {"max_new_tokens": 1, "seed": 3, "images": images}
            assert sample_completions(model, tokenizer, [prompt[-3:], prompt], **given)[1].token_ids == [first]
            expected.add(first)
    assert len(expected) > 1


@pytest.mark.parametrize("kind", ["gemma3", "idefics3"])
def test_features_of_prompts_are_those_of_their_images_too(kind: str) -> None:
    tokenizer = seeing(kind)
    model = model_of(kind, tokenizer)
    encoder = ReferenceEncoder(PromptFeatures(layer=1), lambda: nullcontext(model), None, ImageInputs(tokenizer))
    names = ("input_ids", "completion_mask", "thumbs_up", "row_id", "images")
    table = Dataset.from_list([{name: row[name] for name in names} for row in samples_of(tokenizer)])
    expected = torch.zeros(len(ROWS), 32)
    with torch.no_grad():
        for number, (images, asked, _) in enumerate(ROWS):
            told = [
                {"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": asked}]}
            ]
            text = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
            inputs = tokenizer.processor(
                text=[text], **({"images": [pictures(images)]} if images else {}), return_tensors="pt"
            )
            expected[number] = model(**inputs, output_hidden_states=True).hidden_states[1][0].mean(0)
        in_advance = torch.zeros_like(expected)
        for places, batch in encoder.batches(table, np.arange(len(ROWS))):
            in_advance[places] = encoder.features(batch)
        set_layout(model, "padded")
        with encoder.watching(model):
            completion_log_probs(model, batch := batch_of(tokenizer))
        in_step = encoder.features_in_step(batch)
    assert torch.allclose(in_advance, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(in_step, expected, rtol=1e-4, atol=1e-5)


def test_images_behind_a_prompt_are_none_of_it(folder: Path, tmp_path: Path) -> None:
    """Of a conversation all of whose answers are rated, the first question is the prompt."""

    def asked(number: int) -> dict[str, Any]:
        path = str(folder / f"{number % 4}.png")
        return {"role": "user", "content": [{"type": "image", "path": path}, {"type": "text", "text": f"Nr {number}?"}]}

    def answered(number: int) -> dict[str, Any]:
        return {"role": "assistant", "content": "Yes." * (number % 3 + 1)}

    talks = [[turn(2 * n + m) for m in range(2 - (n == 5)) for turn in (asked, answered)] for n in range(6)]
    log = write_jsonl(tmp_path / "log.jsonl", [{"messages": talk, "label": n % 2} for n, talk in enumerate(talks)])
    module = BCOModule(str(folder / "model"), lora=LoraSettings(r=2), dtype="float32", objective="kto")
    given = {"loss_on": "all_turns", "max_length": 256, "image_folder": str(folder)}
    data = tiny_data(log, validation_fraction=0.0, tokenizer=module.tokenizer, **given)
    tiny_trainer(max_steps=2).fit(module, datamodule=data)  # whose batches, and whose check, exchange completions
    table = data.train_dataset
    assert [len(images) for images in table["images"]] == [2, 2, 2, 2, 2, 1]
    assert [len(images) for images in held_out_prompts(table, None)[2]] == [1] * 6
    encoder = ReferenceEncoder(
        PromptFeatures(), lambda: nullcontext(module.policy), None, ImageInputs(module.tokenizer)
    )
    assert sum(len(encoder.features(batch)) for _, batch in encoder.batches(table, np.arange(6))) == 6


@pytest.mark.slow
def test_an_export_keeps_the_files_of_the_processor(folder: Path, tmp_path: Path) -> None:
    fitted(folder, 1, root=tmp_path / "run")
    for form in ("merged", "adapter"):
        export_checkpoint(tmp_path / "run", tmp_path / form, merge=form == "merged")
        assert type(AutoProcessor.from_pretrained(tmp_path / form)).__name__ == "LlavaProcessor"
        assert "AutoModelForImageTextToText" in (tmp_path / form / "README.md").read_text()


@pytest.mark.slow
def test_a_run_on_images_goes_on_exactly_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    def weights(trainer: Any) -> dict[str, Tensor]:
        return {n: each for n, each in trainer.lightning_module.named_parameters() if each.requires_grad}

    whole = weights(fitted(folder, 4))
    fitted(folder, 2, root=tmp_path / "run")
    resumed = weights(fitted(folder, 4, ckpt_path=str(resolve_checkpoint(tmp_path / "run", print))))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.skipif(bool(find_spec("torchvision")), reason="torchvision is installed")
def test_a_processor_that_wants_torchvision_for_videos_is_loaded_without_them(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen2_vl")
    model_of("qwen2_vl", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    processor_of("qwen2_vl", tokenizer).image_processor.save_pretrained(tmp_path)
    tokenizer.name_or_path = str(tmp_path)
    seen = ImageInputs(tokenizer)([image_bytes(0)])
    expected = processor_of("qwen2_vl", tokenizer)(images=[picture(0)], text=["<|image_pad|>"], return_tensors="pt")
    assert seen.keys() == {"pixel_values", "image_grid_thw"}
    assert all(torch.equal(seen[name], expected[name]) for name in seen)


def test_inspect_tells_how_many_images_there_are_and_how_large(folder: Path) -> None:
    module = BCOModule(str(folder / "model"))
    data = tiny_data(str(folder / "log.jsonl"), max_length=128, validation_fraction=0.0, tokenizer=module.tokenizer)
    said = [finding.text for finding in inspect_log(module, data, {"max_epochs": 1}).findings]
    assert "8 images, of 20 x 14 to 20 x 14 pixels." in said


def test_a_tower_that_is_trained_gets_gradients_of_zero_from_rows_of_text() -> None:
    model = model_of("llava", tokenizer_of("llava")).requires_grad_(True)
    row = {"input_ids": list(range(20, 40)), "completion_mask": [False] * 9 + [True] * 11}
    batch = collate([{**row, "thumbs_up": True, "row_id": 0}])
    completion_log_probs(model, batch).sum().backward()
    assert all(each.grad is not None and not each.grad.any() for each in model.model.vision_tower.parameters())


def test_images_after_a_start_without_any_go_through_all_layers(folder: Path, tmp_path: Path) -> None:
    words = [{"prompt": f"What is {n}?", "completion": f"Answer {n}.", "label": bool(n % 2)} for n in range(8)]
    module = BCOModule(str(folder / "model"), lora=LoraSettings(r=2, top_layers=1), dtype="float32", learning_rate=0.05)
    log = write_jsonl(tmp_path / "log.jsonl", words)
    tiny_trainer(max_steps=2).fit(module, tiny_data(log, max_length=128, validation_fraction=0.0, seed=0))
    assert "first 1 layers run once" in module.said_of_rows
    seen = FeedbackDataModule(predict_files=str(folder / "log.jsonl"), tokenizer=module.tokenizer, batch_size=9)
    seen.setup("predict")
    (batch,) = seen.predict_dataloader()
    policy_B, reference_B = module.log_probs(batch)
    expected_B = completion_log_probs(load_language_model(str(folder / "model"), torch.float64), batch)
    assert torch.allclose(reference_B.double(), expected_B.double(), atol=1e-3)
    assert torch.allclose(policy_B, completion_log_probs(module.policy, batch), atol=1e-5)


def test_a_run_that_has_trained_the_tower_is_loaded_and_scores_as_it_did(folder: Path, tmp_path: Path) -> None:
    checkpoint = RunCheckpoint()
    checkpoint.run_folder = tmp_path / "run"
    module = BCOModule(
        str(folder / "model"), lora=LoraSettings(r=2), dtype="float32", learning_rate=0.05, vision_tower=True, seed=0
    )
    data = tiny_data(str(folder / "log.jsonl"), max_length=128, validation_fraction=0.0, seed=0)
    tiny_trainer(max_steps=3, enable_checkpointing=True, callbacks=[checkpoint]).fit(module, data)
    loaded, _ = load_aligned(tmp_path / "run")
    batch = next(iter(data.train_dataloader()))
    assert torch.allclose(loaded.log_probs(batch)[0], module.log_probs(batch)[0], atol=1e-4)
    assert any("vision_tower" in name for name in loaded.trained_shapes())
