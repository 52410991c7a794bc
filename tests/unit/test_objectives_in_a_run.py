"""Objectives in a run: what they need of the data, what they keep, what they refuse before a model loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bco_lightning import inspect_log
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.data.collate import collate
from bco_lightning.errors import UserError
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.objectives import chosen_class_weights, class_weights_of, make_objective
from bco_lightning.objectives.shifts import PromptSpread
from bco_lightning.options import ModelOptions
from tests.conftest import tiny_data, tiny_module, tiny_trainer, write_jsonl
from tests.reliability.tiny_run import make_model


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [{"prompt": f"Question {n}?", "chosen": f"yes {n}", "rejected": "no " * (n % 3 + 1)} for n in range(12)]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


class Watch(Callback):
    """Keeps the batches and rows of each micro-batch."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.rows: list[Any] = []
        self.gradients: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.rows.append(module.step_rows[-1])

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad]).clone())


def run(
    model: str, log: str, size: int = 4, cut: int = 1, steps: int = 3, held_out: float = 0.25, **options: Any
) -> tuple[Any, Watch]:
    module, watch = tiny_module(model, **options), Watch()
    data = tiny_data(log, batch_size=size, validation_fraction=held_out)
    tiny_trainer(max_steps=steps, accumulate_grad_batches=cut, callbacks=[watch]).fit(module, data)
    return module, watch


@pytest.mark.parametrize("objective", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "nca"))])
def test_both_answers_of_a_pair_are_in_a_micro_batch_and_give_its_loss(
    tiny_model: str, pairs: str, objective: str
) -> None:
    module, watch = run(tiny_model, pairs, steps=5, objective=objective)  # an epoch, and its validation
    for batch, rows in zip(watch.batches, watch.rows, strict=True):
        assert batch.thumbs_up_B.tolist() == [True, False] * 2
        assert batch.prompt_keys_B[::2].tolist() == batch.prompt_keys_B[1::2].tolist()
        if objective == "dpo":
            margins = rows.rewards_B[::2] - rows.rewards_B[1::2]
            expected = -torch.nn.functional.logsigmoid(margins.double())
            assert (rows.losses_B[::2] + rows.losses_B[1::2]).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert module.trainer.callback_metrics["val/loss"].isfinite()


_MIX = pytest.param({"kldo": 1.0, "sft": 0.1}, marks=pytest.mark.slow)


@pytest.mark.parametrize("objective", ["dpo", "kto", _MIX])
def test_the_cut_of_a_step_changes_neither_gradients_nor_baselines(tiny_model: str, pairs: str, objective: Any) -> None:
    whole, cut = (run(tiny_model, pairs, size, cut, objective=objective) for size, cut in ((8, 1), (2, 4)))
    for one, other in zip(whole[1].gradients, cut[1].gradients, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-3
    values = [[each.value for each in module.objective.baselines.values()] for module, _ in (whole, cut)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert all(value not in (0, 1) for value in values[0])


def test_kto_compares_with_what_answers_to_other_prompts_gain(tiny_model: str, log: str) -> None:
    gains: list[float] = []

    class Gains(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                policy, reference = (
                    score(batch.unrelated) for score in (module.policy_scores, module.reference.log_probs)
                )
            gains.append(module.beta * float((policy - reference).mean()))

    module = tiny_module(tiny_model, objective="kto", reward_shift_decay=0.0)
    module.policy_scores = lambda batch: completion_log_probs(module.policy, batch)
    tiny_trainer(max_steps=2, callbacks=[Gains()]).fit(module, tiny_data(log, validation_fraction=0.0))
    assert gains[0] == 0
    assert module.objective.baselines["kl_baseline"].value == pytest.approx(gains[1], rel=1e-4)


def test_an_answer_follows_another_prompt_and_takes_no_more_room_than_the_two_rows() -> None:
    mine = {"input_ids": [1, 2, 3, 4], "completion_mask": [False] * 2 + [True] * 2, "thumbs_up": True, "row_id": 0}
    other = {**mine, "input_ids": [5, 6, 7, 8, 9], "completion_mask": [False] + [True] * 4, "row_id": 1}
    batch = collate([mine, other, other, {**other, "row_id": 2}], with_unrelated=True)
    assert len(batch) == 2
    assert batch.unrelated is not None
    assert batch.unrelated.input_ids_S.tolist() == [1, 2, 6, 7, 8, 5, 6, 7, 8, 9]  # 9 is beyond the longer of the two
    assert batch.unrelated.targets_N.tolist() == [6, 7, 8, 6, 7, 8, 9]
    assert batch.unrelated.importance_weights_B.tolist() == [1, 0]  # the second has the same prompt


def test_thumbs_up_alone_are_enough_for_sft_and_for_nothing_else(tiny_model: str, tmp_path: Path) -> None:
    log = write_jsonl(
        tmp_path / "up.jsonl", [{"prompt": f"{n}?", "completion": f"yes {n}", "label": True} for n in range(8)]
    )
    _, watch = run(tiny_model, log, objective="sft", steps=2, held_out=0.0)
    lengths = watch.rows[0].completion_lengths_B
    assert torch.allclose(watch.rows[0].losses_B, -watch.rows[0].policy_log_probs_B / lengths)
    with pytest.raises(UserError, match="expected thumbs of both kinds"):
        run(tiny_model, log, objective={"sft": 1.0, "bco": 1.0}, held_out=0.0)


def test_una_trains_on_ratings_where_they_lie_in_their_scale(tiny_model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "completion": f"yes {n}", "stars": 1 + n % 5} for n in range(16)]
    log, watch = write_jsonl(tmp_path / "stars.jsonl", rows), Watch()
    rating = {"column": "stars", "up": 4, "down": 3, "scale": [1, 5]}
    data = tiny_data(log, rating=rating, validation_fraction=0.0)
    tiny_trainer(max_steps=1, callbacks=[watch]).fit(tiny_module(tiny_model, objective="una"), data)
    expected = [(0.5 - (row["stars"] - 1) / 4) ** 2 for row in rows]  # rewards are 0 at first
    found = watch.rows[0]
    assert found.losses_B.tolist() == pytest.approx([expected[row] for row in found.row_ids_B.tolist()])


def test_a_shift_per_prompt_sees_all_answers_to_a_prompt(tiny_model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n % 4}?", "completion": f"yes {n}", "label": n % 4 < 2} for n in range(16)]
    module = tiny_module(tiny_model, reward_shift="per_prompt")
    data = tiny_data(write_jsonl(tmp_path / "log.jsonl", rows), group_by_prompt=True, validation_fraction=0.0)
    tiny_trainer(max_steps=2).fit(module, data)
    assert module.objective.baselines["prompt_spread"].value > 0  # all of a prompt's answers have one thumb
    assert module.trainer.callback_metrics["train/prompt_spread"] >= 0


def test_a_prompt_whose_answers_differ_in_length_is_not_scattered_over_padded_micro_batches_and_what_is_cut_is_said(
    tiny_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"{n % 4}?", "completion": "yes " * (1 + n // 4), "label": n % 4 < 2} for n in range(16)]
    log, kept = write_jsonl(tmp_path / "log.jsonl", rows), []
    for size, cut in ((4, 2), (2, 2)):
        watch = Watch()
        data = tiny_data(log, batch_size=size, group_by_prompt=True, validation_fraction=0.0)
        module = tiny_module(tiny_model, reward_shift="per_prompt", layout="padded")
        with caplog.at_level("INFO"):
            tiny_trainer(max_steps=2, accumulate_grad_batches=cut, callbacks=[watch]).fit(module, data)
        kept.append([len(batch.prompt_keys_B.unique()) for batch in watch.batches])
    assert kept[0] == [1] * 4
    assert "model.reward_shift: 4 of 4 prompts of the first steps are cut by the ends of micro-batches" in caplog.text


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"objective": "una"}, {}, r"log\.jsonl:\d+: expected a score from 0 to 1, .* none \(\d+ of \d+ train rows\)"),
        (
            {"reward_shift": "per_prompt"},
            {},
            r"data\.group_by_prompt: expected true with model\.reward_shift",
        ),
        *(
            ({"reward_shift": shift, "objective": "kto"}, {}, r"model\.objective: expected bco, found 'kto'")
            for shift in ("per_prompt", "by_length")
        ),
        ({"objective": "dpo"}, {}, r"log\.jsonl:\d+: expected pairs, .* found 21 of 21 train rows that"),
        (
            {"objective": {"bco": 1, "nca": 1}},
            {"batch_size": 3},
            r"data\.batch_size: expected an even number",
        ),
        ({"objective": "ipo"}, {"balanced_sampling": True}, r"data\.balanced_sampling: expected false with pairs"),
        ({"objective": "dpo"}, {"streaming": True}, r"data\.streaming: expected false with pairs"),
        ({"objective": "dpo", "importance_weights": "on"}, {}, r"model\.importance_weights: expected off"),
        ({"objective": "kto", "reference_log_probs": "before"}, {}, r"model\.reference_log_probs: expected online"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_model_loads(
    tiny_model: str, log: str, options: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    def run_with_them() -> None:
        module = tiny_module(tiny_model, **options)
        module.configure_model = lambda: pytest.fail("the model is loaded")
        tiny_trainer(max_steps=1).fit(module, tiny_data(log, **data))

    with pytest.raises(UserError, match=message):
        run_with_them()


def test_baselines_are_in_checkpoints_and_another_objective_does_not_go_on(
    tiny_model: str, log: str, tmp_path: Path
) -> None:
    module, checkpoint, other = tiny_module(tiny_model, objective="kldo"), RunCheckpoint(), {"objective": {"kldo": 1.0}}
    checkpoint.run_folder = tmp_path
    tiny_trainer(max_steps=8, enable_checkpointing=True, callbacks=[checkpoint]).fit(module, tiny_data(log))
    step = max((tmp_path / "checkpoints").iterdir())
    restored = type(module).load_from_checkpoint(step)
    assert restored.objective.state_dict() == module.objective.state_dict()
    assert restored.objective.threshold == module.objective.threshold != 0
    trainer, data = tiny_trainer(max_steps=9), tiny_data(log)
    with pytest.raises(UserError, match="objective"):
        trainer.fit(tiny_module(tiny_model, **other), data, ckpt_path=step)


def losses_on(data: Any, model: str, **options: Any) -> torch.Tensor:
    watch = Watch()
    tiny_trainer(max_steps=2, callbacks=[watch]).fit(tiny_module(model, **options), data)
    return torch.cat([rows.losses_B for rows in watch.rows])


@pytest.mark.parametrize(("before", "now"), [("bco", "kto"), ("dpo", "bco"), ("bco", "dpo"), ("inspect", "kto")])
def test_rows_of_a_data_module_that_is_used_again_are_drawn_for_the_new_objective(
    tiny_model: str, tmp_path: Path, before: str, now: str
) -> None:
    pairs = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": "no " * (n % 3 + 1)} for n in range(12)]
    singles = [{"prompt": f"more {n}?", "completion": f"yes {n}", "label": True} for n in range(6)]
    pairs_file = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    files = [pairs_file] if "dpo" in (before, now) else [pairs_file, write_jsonl(tmp_path / "log.jsonl", singles)]
    module = tiny_module(tiny_model, objective=now)
    once, twice = (tiny_data(files, validation_fraction=0.0, seed=0, tokenizer=module.tokenizer) for _ in range(2))
    if before == "inspect":
        inspect_log(module, twice)
    else:
        losses_on(twice, tiny_model, objective=before)
    expected = losses_on(once, tiny_model, objective=now)
    assert torch.equal(losses_on(twice, tiny_model, objective=now), expected)
    assert expected.isfinite().all()


def test_what_an_objective_asks_of_rows_is_asked_again_where_they_were_read_before(
    tiny_model: str, log: str, tmp_path: Path
) -> None:
    data = tiny_data(log)
    losses_on(data, tiny_model)
    with pytest.raises(UserError, match="expected pairs"):
        losses_on(data, tiny_model, objective="dpo")
    rows = [{"prompt": f"{n}?", "completion": f"yes {n}", "label": True} for n in range(8)]
    up = write_jsonl(tmp_path / "up.jsonl", rows)
    data = tiny_data(up)
    for _ in range(2):
        with pytest.raises(UserError, match="expected thumbs of both kinds"):
            losses_on(data, tiny_model)
    with pytest.raises(UserError, match="expected thumbs of both kinds"):
        losses_on(tiny_data(up, balanced_sampling=True), tiny_model, objective="sft")


def test_rows_are_tokenized_again_for_a_module_with_another_tokenizer(
    tiny_model: str, log: str, tmp_path: Path
) -> None:
    data, other = tiny_data(log, max_length=256), make_model(tmp_path)
    losses_on(data, tiny_model)
    losses_on(data, other)
    assert all("Tell me about thing" in data.tokenizer.decode(ids) for ids in data.train_dataset["input_ids"])
    assert max(map(max, data.train_dataset["input_ids"])) < len(data.tokenizer) < 1000


def test_held_out_rows_have_the_loss_of_new_prompts_however_they_are_cut(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{n % 4}?", "completion": f"yes {n}", "label": n % 4 < 2} for n in range(16)]
    log, found = write_jsonl(tmp_path / "log.jsonl", rows), []
    monkeypatch.setattr(PromptSpread, "value", 2.0)
    for size in (8, 1):
        module = tiny_module(tiny_model, reward_shift="per_prompt")
        options = {"validation_files": log, "group_by_prompt": True, "seed": 0}
        tiny_trainer(max_steps=2, limit_val_batches=0).fit(module, tiny_data(log, batch_size=8, **options))
        found += tiny_trainer().validate(module, tiny_data(log, batch_size=size, **options), verbose=False)
    assert found[0]["val/loss"] == pytest.approx(found[1]["val/loss"], rel=1e-5)


def test_a_mix_with_scores_keeps_the_class_weights_of_its_other_parts() -> None:
    options, shares = ModelOptions("no/model"), (0.1, 0.9)
    alone, mixed = (
        chosen_class_weights(options, make_objective(name), lambda: shares) for name in ("una", {"bco": 1, "una": 0.1})
    )
    assert alone == (1.0, 1.0)
    assert mixed == class_weights_of(*shares)


def test_rows_are_told_anew_for_a_run_with_another_template(tiny_model: str, log: str, tmp_path: Path) -> None:
    module, checkpoint = tiny_module(tiny_model), RunCheckpoint()
    checkpoint.run_folder = tmp_path
    saving = tiny_trainer(max_steps=2, enable_checkpointing=True, callbacks=[checkpoint])
    saving.fit(module, tiny_data(log, chat_template="plain"))
    step = max((tmp_path / "checkpoints").iterdir())
    held_out, loaded = tiny_data(log, validation_files=log), type(module).load_from_checkpoint(step)
    (other,) = tiny_trainer().validate(tiny_module(tiny_model), held_out, verbose=False)
    (found,) = tiny_trainer().validate(loaded, held_out, verbose=False)
    plain = tiny_data(log, validation_files=log, chat_template="plain")
    (expected,) = tiny_trainer().validate(module, plain, verbose=False)
    assert found["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-5) != other["val/loss"]
    again = tiny_module(tiny_model)
    tiny_trainer().validate(again, plain, ckpt_path=str(step), verbose=False)
    assert again.told == loaded.told == module.told
    with pytest.raises(UserError, match=r"chat_template: .* then, .* now"):
        tiny_trainer().validate(tiny_module(tiny_model), held_out, ckpt_path=str(step), verbose=False)


def test_a_data_module_that_is_used_again_finds_out_anew_how_many_tokens_fit(tiny_model: str, log: str) -> None:
    data, found = tiny_data(log, tokens_per_micro_batch="auto"), []
    for fits in (100, 200):
        module = tiny_module(tiny_model)
        module.tokens_that_fit = lambda fits=fits: fits
        tiny_trainer(max_steps=2).fit(module, data)
        found.append(data.state_dict()["tokens"])
    assert found == [100, 200]


def test_held_out_rows_of_a_stream_have_the_reference_of_the_model_that_scores_them(
    tiny_model: str, log: str, tmp_path: Path
) -> None:
    options = {"streaming": True, "validation_files": log}
    used, new = tiny_data(log, **options), tiny_data(log, **options)
    other = type(AutoModelForCausalLM.from_pretrained(tiny_model))(AutoConfig.from_pretrained(tiny_model))
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    found = []
    for model, data in ((tiny_model, used), (str(tmp_path / "other"), used), (str(tmp_path / "other"), new)):
        module = tiny_module(model, lora=None, learning_rate=1e-4)
        trainer = tiny_trainer(max_steps=6)
        trainer.fit(module, data)
        found.append(float(trainer.callback_metrics["val/loss"]))
        trainer.validate(module, data, verbose=False)
    assert found[1] == pytest.approx(found[2], rel=1e-5)
