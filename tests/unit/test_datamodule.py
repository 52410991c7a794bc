"""The data module reads, splits, counts, shuffles and refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from bco_lightning import FeedbackDataModule
from bco_lightning.data.counts import Counted
from bco_lightning.errors import ConfigError, FeedbackRowError
from tests.conftest import tiny_data, tiny_module, tiny_trainer, write_jsonl
from tests.reliability.tiny_run import byte_tokenizer

CPU_STRATEGY = SimpleNamespace(root_device=torch.device("cpu"))


def data(tokenizer: Any, log: str, **options: Any) -> FeedbackDataModule:
    module = FeedbackDataModule(log, **{"batch_size": 4, "tokenizer": tokenizer, "max_length": 64, **options})
    module.setup("fit")
    return module


def counts(module: FeedbackDataModule) -> dict[str, Any]:
    return {count.name: count for count in module.counts}


def test_a_prompt_never_stands_on_both_sides_of_the_split(tokenizer: Any, log: str) -> None:
    module = data(tokenizer, log, validation_fraction=0.25)
    train, held_out = set(module.train_dataset["prompt"]), set(module.validation_dataset["prompt"])
    assert len(train) == 6
    assert len(held_out) == 2
    assert not train & held_out


def test_validation_files_take_the_place_of_the_split(tokenizer: Any, log: str, rows: list, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows[:5])
    module = data(tokenizer, log, validation_files=held_out)
    assert (len(module.train_dataset), len(module.validation_dataset)) == (24, 5)


def test_every_row_read_is_used_or_counted_as_left_out(tokenizer: Any, rows: list, tmp_path: Path) -> None:
    rows[3]["completion"] = "long " * 100
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    module = data(tokenizer, log, long_completions="drop", validation_fraction=0.0)
    count = counts(module)["train"]
    assert (count.read, count.used, count.num_left_out, count.up, count.down) == (24, 23, 1, 16, 7)
    assert count.left_out == {"completion too long (data.max_length)": Counted(1, [f"{log}:4"])}
    assert "24 rows read, 23 used (16 up, 7 down), 1 left out" in str(count)
    assert f"1 left out: completion too long (data.max_length) (for instance {log}:4)" in str(count)


def test_cut_rows_are_counted(tokenizer: Any, rows: list, tmp_path: Path) -> None:
    rows[3]["completion"] = "long " * 100
    rows[5]["prompt"] = "long " * 100
    count = counts(data(tokenizer, write_jsonl(tmp_path / "x.jsonl", rows), validation_fraction=0.0))["train"]
    assert (count.used, count.num_left_out) == (24, 0)
    assert (count.cut["prompts cut"], count.cut["completions cut"]) == (2, 1)


def test_batches_hold_their_rows_and_score_their_end(tokenizer: Any, log: str) -> None:
    module = data(tokenizer, log)
    batch = next(iter(module.train_dataloader()))
    assert len(batch) == 4
    for row, span in enumerate(batch.row_spans):
        ids = batch.input_ids_S[span.places()].tolist()
        assert ids == module.train_dataset[int(batch.row_ids_B[row])]["input_ids"]
        assert batch.targets_N[batch.rows_N == row][-1] == ids[-1] == tokenizer.eos_token_id


def test_an_epoch_shuffles_and_covers_every_row(tokenizer: Any, log: str) -> None:
    module = data(tokenizer, log, validation_fraction=0.0)
    ids = [int(row) for batch in module.train_dataloader() for row in batch.row_ids_B]
    assert sorted(ids) == list(range(24))
    assert ids != sorted(ids)


def test_evaluation_keeps_file_order_and_repeats_nothing(tokenizer: Any, log: str) -> None:
    module = data(tokenizer, log, validation_fraction=0.4)
    ids = [int(row) for batch in module.val_dataloader() for row in batch.row_ids_B]
    assert ids == list(range(len(module.validation_dataset)))


def test_class_frequencies_are_those_of_the_rows_or_of_balanced_sampling(tokenizer: Any, log: str) -> None:
    assert data(tokenizer, log, validation_fraction=0.0).class_frequencies == pytest.approx((2 / 3, 1 / 3))
    balanced = data(tokenizer, log, balanced_sampling=True)
    assert balanced.class_frequencies == (0.5, 0.5)
    assert all(int(batch.thumbs_up_B.sum()) == 2 for batch in balanced.train_dataloader())


def test_a_balanced_epoch_still_sees_every_row(tokenizer: Any, log: str) -> None:
    module = data(tokenizer, log, balanced_sampling=True, validation_fraction=0.0)
    seen = {int(row) for batch in module.train_dataloader() for row in batch.row_ids_B}
    assert seen == set(range(24))


def test_validating_first_does_not_hinder_training(tokenizer: Any, log: str) -> None:
    module = FeedbackDataModule(log, log, tokenizer=tokenizer)
    module.setup("validate")
    assert module.train_dataset is None
    module.setup("fit")
    assert len(module.train_dataset) == 24


def test_testing_reads_the_test_files_alone(tokenizer: Any, log: str) -> None:
    module = FeedbackDataModule(test_files=log, tokenizer=tokenizer)
    module.setup("test")
    assert sum(len(batch) for batch in module.test_dataloader()) == 24
    assert [count.name for count in module.counts] == ["test"]


def test_limited_epochs_are_refused(tiny_model: str, log: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.limit_train_batches"):
        tiny_trainer(max_steps=2, limit_train_batches=2).fit(tiny_module(tiny_model), tiny_data(log))


def test_workers_change_no_row(tokenizer: Any, log: str) -> None:
    def stream(num_workers: int) -> list[int]:
        module = data(tokenizer, log, num_workers=num_workers)
        return [int(row) for batch in module.train_dataloader() for row in batch.row_ids_B]

    assert stream(2) == stream(0)


def test_rows_to_predict_need_no_label(tokenizer: Any, rows: list, tmp_path: Path) -> None:
    unlabelled = write_jsonl(tmp_path / "x.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in rows])
    module = FeedbackDataModule(predict_files=unlabelled, tokenizer=tokenizer)
    module.setup("predict")
    assert sum(len(batch) for batch in module.predict_dataloader()) == 24


def test_one_class_alone_is_refused(tokenizer: Any, rows: list, tmp_path: Path) -> None:
    ups = write_jsonl(tmp_path / "ups.jsonl", [row for row in rows if row["label"]])
    with pytest.raises(FeedbackRowError, match=r"ups\.jsonl: expected thumbs of both kinds .* all thumbs-up"):
        data(tokenizer, ups)


def test_thumbs_that_are_all_up_beside_rows_without_any_are_remarked_on(tokenizer: Any, tmp_path: Path) -> None:
    trace = {"traceId": "t", "input": "a", "output": "b"}
    ups = write_jsonl(tmp_path / "ups.jsonl", [{**trace, "user-feedback": score} for score in ([1], None, [1], [])])
    both = write_jsonl(tmp_path / "both.jsonl", [{**trace, "user-feedback": score} for score in ([0], [1], None)])
    for files in ([ups, both], both):
        [count] = data(tokenizer, files, validation_fraction=0.0).counts
        remarks = re.findall(r"every thumb of (.*) is up: perhaps its export leaves out scores of 0", str(count))
        assert remarks == ([ups] if ups in files else [])


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_not_used_or_tell_the_model_something_are_named_at_every_start(
    streaming: bool, tokenizer: Any, rows: list, tmp_path: Path
) -> None:
    log = write_jsonl(
        tmp_path / "log.jsonl", [{**row, "system": "Be brief.", "weight": 0.5, "born in Bremen": 1} for row in rows]
    )
    for _ in range(2):
        count = data(tokenizer, log, streaming=streaming, validation_fraction=0.0).counts[0]
        words = "system prompt: 'system'; not used: 'weight', a text of 14 characters"
        assert str(count).count(f"\n  columns of {log}: {words}") == 1


def test_an_empty_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(FeedbackRowError, match="at least one row"):
        data(tokenizer, write_jsonl(tmp_path / "empty.jsonl", []))


def test_two_files_may_speak_two_vocabularies(tokenizer: Any, rows: list, tmp_path: Path) -> None:
    thumbs = write_jsonl(tmp_path / "a.jsonl", [{**row, "label": "👍" if row["label"] else "👎"} for row in rows])
    numbers = write_jsonl(tmp_path / "b.jsonl", [{**row, "label": 1 if row["label"] else -1} for row in rows])
    module = FeedbackDataModule([thumbs, numbers], tokenizer=tokenizer, validation_fraction=0.0)
    module.setup("fit")
    assert (counts(module)["train"].up, counts(module)["train"].down) == (32, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size"),
        ({"max_length": 1}, r"data\.max_length"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction"),
    ],
)
def test_options_out_of_range_are_refused(tokenizer: Any, log: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(tokenizer, log, **options)


def test_the_packaged_log_keeps_its_held_out_subjects_apart() -> None:
    folder = Path(__file__).parents[2] / "src" / "bco_lightning" / "demo"
    prompts = {
        name: {json.loads(line)["prompt"] for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()}
        for name in ("train", "heldout")
    }
    assert len(prompts["train"]) > 200
    assert len(prompts["heldout"]) == 64
    assert not prompts["train"] & prompts["heldout"]


def test_rows_with_one_prompt_share_a_micro_batch(tokenizer: Any, rows: list, tmp_path: Path) -> None:
    twice = [{**row, "completion": f"{row['completion']} {number}"} for row in rows for number in range(2)]
    shuffled = [twice[place] for place in np.random.default_rng(0).permutation(len(twice))]
    log = write_jsonl(tmp_path / "x.jsonl", shuffled)
    module = data(tokenizer, log, validation_fraction=0.0, group_by_prompt=True)
    apart = data(tokenizer, log, validation_fraction=0.0)
    assert all(batch.num_computed < batch.num_tokens for batch in module.train_dataloader())
    assert module.fingerprints() != apart.fingerprints()


def grouped(log: str) -> str:
    """The seed of this process's hashes, as it were, and the order of the rows."""
    module = data(byte_tokenizer(), log, validation_fraction=0.0, group_by_prompt=True)
    order = [batch.row_ids_B.tolist() for batch in module.train_dataloader()]
    return json.dumps([hash("a"), list(module.train_dataset["prompt_key"]), order])


@pytest.mark.slow
def test_grouping_by_prompt_gives_one_order_in_all_processes(rows: list, tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "x.jsonl", [rows[place] for place in np.random.default_rng(0).permutation(len(rows))])
    command = "import sys; from tests.unit.test_datamodule import grouped; print(grouped(sys.argv[1]))"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", command, log], cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONHASHSEED": seed},
    )  # fmt: skip
    (own_hash, *own), (other_hash, *other) = (json.loads(text) for text in (grouped(log), done.stdout))
    assert own_hash != other_hash
    assert own == other


def test_grouping_by_prompt_and_balanced_sampling_exclude_each_other(tokenizer: Any, log: str) -> None:
    with pytest.raises(ConfigError, match=r"data.group_by_prompt: expected false with balanced_sampling"):
        data(tokenizer, log, balanced_sampling=True, group_by_prompt=True)


def evaluated_by_two(stage: str, batch_size: int, tokenizer: Any, rows: list, tmp_path: Path) -> list[list[list[int]]]:
    """The rows of each micro-batch of each of two processes."""
    log = write_jsonl(tmp_path / "x.jsonl", rows)
    files = {"validate": "validation_files", "predict": "predict_files"}[stage]
    module = FeedbackDataModule(**{files: log}, batch_size=batch_size, tokenizer=tokenizer, max_length=64)
    module.setup(stage)
    found = []
    for rank in (0, 1):
        sharded = SimpleNamespace(layout="packed")
        module.trainer = SimpleNamespace(
            global_rank=rank, world_size=2, strategy=CPU_STRATEGY, lightning_module=sharded
        )
        loader = module.val_dataloader() if stage == "validate" else module.predict_dataloader()
        found.append([batch.row_ids_B.tolist() for batch in loader])
    return found


@pytest.mark.parametrize("stage", ["validate", "predict"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_processes_evaluate_as_many_micro_batches_and_every_row_once(
    tokenizer: Any, rows: list, tmp_path: Path, stage: str, batch_size: int
) -> None:
    found = evaluated_by_two(stage, batch_size, tokenizer, [*rows, *rows[:9]], tmp_path)  # 33 rows
    assert len(found[0]) == len(found[1])
    assert sorted(row for batches in found for batch in batches for row in batch) == list(range(33))
    sizes = [len(batch) for batches in found for batch in batches]
    assert max(sizes) <= max(batch_size, 2)  # one row more than asked for, where nothing else comes out even


def test_a_process_without_a_row_to_predict_has_no_micro_batch(tokenizer: Any, rows: list, tmp_path: Path) -> None:
    assert evaluated_by_two("predict", 4, tokenizer, rows[:1], tmp_path) == [[[0]], []]


def test_a_column_goes_into_the_batches(tokenizer: Any, log: str) -> None:
    module = data(tokenizer, log)
    known = {
        "train": np.arange(len(module.train_dataset)) / -8,
        "validation": torch.arange(len(module.validation_dataset)) / -4,
    }
    for name, values in known.items():
        module.set_column(name, "reference_log_prob", values)
    module.set_column("train", "importance_weight", np.ones(len(module.train_dataset)))
    module.set_column("train", "importance_weight", np.full(len(module.train_dataset), 0.5))
    for name, loader in (("train", module.train_dataloader()), ("validation", module.val_dataloader())):
        for batch in loader:
            assert batch.reference_log_probs_B.dtype == torch.float32
            assert batch.reference_log_probs_B.tolist() == [known[name][row] for row in batch.row_ids_B]
            assert batch.importance_weights_B.tolist() == [0.5 if name == "train" else 1.0] * len(batch)
    module.set_column("train", "reference_log_prob", None)
    assert next(iter(module.train_dataloader())).reference_log_probs_B is None
    with pytest.raises(ValueError, match="values for importance_weight"):
        module.set_column("train", "importance_weight", np.ones(1))


def test_the_rows_of_a_padded_step_are_cut_into_micro_batches_by_length(
    tiny_model: str, rows: list, tmp_path: Path
) -> None:
    for number, row in enumerate(rows):
        row["completion"] += " more" * (number % 7)
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    of_layout = {}
    for layout in ("packed", "padded"):
        data = tiny_data(log, validation_fraction=0.0)
        tiny_trainer(max_steps=1, accumulate_grad_batches=2).fit(tiny_module(tiny_model, layout=layout), data)
        one, other = (batch.lengths for _, batch in zip(range(2), data.train_dataloader(), strict=False))
        of_layout[layout] = max(one) <= min(other) or max(other) <= min(one)
    assert of_layout == {"packed": False, "padded": True}


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_tell_most_are_the_shortest_the_longest_and_the_first_of_each_source(
    tmp_path: Path, tokenizer: Any, streaming: bool
) -> None:
    lengths = [*range(10, 40), 3, 300, *range(40, 70)]  # the longest is far behind the first ones
    rows = [{"prompt": "Say it.", "completion": "a " * each, "label": bool(each % 2)} for each in lengths]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows), ("b", rows[5:9]))]
    data = FeedbackDataModule(
        files, tokenizer=tokenizer, batch_size=4, max_length=512, validation_fraction=0.0, streaming=streaming
    )
    data.setup("fit")
    found = data.telling_rows()
    completions = [sum(row["completion_mask"]) for row in found]
    assert {row["source"] for row in found} == {0, 1}
    assert min(completions) < 10
    assert max(completions) > 200


def test_held_out_rows_of_one_class_are_warned_of_and_do_not_end_a_run(
    tiny_model: str, log: str, rows: list, tmp_path: Path
) -> None:
    ups = write_jsonl(tmp_path / "ups.jsonl", [row for row in rows if row["label"]][:4])
    trainer = tiny_trainer(max_steps=4, val_check_interval=1, check_val_every_n_epoch=None)
    trainer.callbacks.append(EarlyStopping("val/loss", patience=9))
    data = tiny_data(log, validation_files=ups)
    with pytest.warns(UserWarning, match=r"validation: all 4 rows are thumbs-up.* such as val/auroc .* not known"):
        trainer.fit(tiny_module(tiny_model), data)
    assert trainer.global_step == 4
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(0.69, abs=0.2)
    assert np.isnan(float(trainer.callback_metrics["val/auroc"]))
