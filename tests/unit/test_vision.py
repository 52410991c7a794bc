"""Policies that see images, against the library's own processor and forward pass in float64, one row at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bco_lightning import BCOModule
from bco_lightning.batch import FeedbackBatch, FeedbackRow, TokenizedSample
from bco_lightning.data.collate import collate
from bco_lightning.data.images import IMAGES, MARK, ImageInputs, Picture
from bco_lightning.data.options import DataOptions
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.models.adapters import add_adapters
from bco_lightning.models.layout import set_layout
from bco_lightning.models.load import load_language_model, load_policy
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.options import LoraSettings
from tests.conftest import tiny_data, tiny_trainer, tokenized_row, write_jsonl
from tests.unit.vision_models import KINDS, image_bytes, model_of, picture, processor_of, saved, tokenizer_of

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


def batch_of(tokenizer: Any) -> FeedbackBatch:
    made = RowTokenizer(tokenizer, DataOptions(max_length=256))
    samples = []
    for number, (images, asked, answer) in enumerate(ROWS):
        stored = [Picture(image_bytes(image, size=SIZES[image]), str(image)) for image in images]
        message = {"role": "user", "content": MARK * len(images) + asked, **({IMAGES: stored} if images else {})}
        row = FeedbackRow([message], [{"role": "assistant", "content": answer}], number == 0, f"x:{number}")
        sample = tokenized_row(made, row)
        assert isinstance(sample, TokenizedSample)
        samples.append({**vars(sample), "thumbs_up": row.thumbs_up, "row_id": number})
    return collate(samples, images=ImageInputs(tokenizer))


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
            assert (found.grad is None) == (right.grad is None), name
            if right.grad is not None:
                assert torch.allclose(found.grad.double(), right.grad, rtol=1e-3, atol=2e-4), name


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
    batch = collate([{**row, "images": row["images"]} for row in chosen], images=data.image_inputs)
    reference_B = completion_log_probs(exact, batch).double()
    assert torch.allclose(rows.reference_log_probs_B.double(), reference_B, rtol=1e-5, atol=1e-4)
    rewards_B = 0.3 * (rows.policy_log_probs_B.double() - reference_B)
    signs_B = torch.where(rows.thumbs_up_B, 1.0, -1.0).double()
    losses_B = -torch.nn.functional.logsigmoid(signs_B * (rewards_B - rows.reward_shift))
    assert torch.allclose(rows.losses_B.double(), losses_B, atol=1e-4)
    assert not torch.allclose(rewards_B, torch.zeros(4).double(), atol=1e-3)
