"""What a run left in its folder is read, judged and shown; and what became of its answers is counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from sklearn.metrics import roc_auc_score

from bco_lightning.errors import ConfigError
from bco_lightning.inspection.drift import drift, repetition
from bco_lightning.inspection.run_record import RunRecord
from bco_lightning.inspection.run_report import page_of_runs, print_outcome, report_runs


def run_of(folder: Path, rewards: Any = None, **files: Any) -> RunRecord:
    """A run's folder with two validations, rows 0 to 3 of each prompt having one thumb each."""
    folder.mkdir(parents=True)
    points = [
        {"step": 1, "train/loss": 1.4, "train/kl": 0.1},
        {"step": 10, "val/loss": 1.2, "val/auroc": 0.6, "val/kl": 0.5},
        {"step": 20, "val/loss": 1.3, "val/auroc": 0.7, "val/kl": 20.0, "train/loss": None},
    ]
    lines = [json.dumps(point) for point in points]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "val/lo']), encoding="utf-8")
    if rewards is not None:
        thumbs = [row % 2 == 0 for row in range(len(rewards))]
        held_out = {"step": 20, "reward_shift": 0.5, "rewards": list(rewards), "thumbs_up": thumbs}
        held_out |= {"lengths": list(range(1, len(rewards) + 1)), "prompts": [row // 4 for row in range(len(rewards))]}
        (folder / "held_out.json").write_text(json.dumps(held_out), encoding="utf-8")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return RunRecord.read(folder)


def test_a_line_that_was_cut_off_by_a_kill_is_passed_over_and_the_newer_value_of_a_step_counts(tmp_path: Path) -> None:
    record = run_of(tmp_path / "run")
    assert record.curves["val/loss"] == [(10, 1.2), (20, 1.3)]
    assert math.isnan(record.curves["train/loss"][1][1])
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('ss"}\n{"step": 10, "val/loss": 1.1}\n')
    assert RunRecord.read(tmp_path / "run").curves["val/loss"] == [(10, 1.1), (20, 1.3)]


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected the folder of a run, with metrics\.jsonl in it, found none"):
        report_runs([str(tmp_path)])


@pytest.mark.parametrize(
    ("rows", "gap", "level"), [(400, 1.0, "better"), (400, -1.0, "worse"), (400, 0.0, "none"), (30, 1.0, "unknown")]
)
def test_a_run_is_judged_by_the_interval_of_its_held_out_auroc(
    rows: int, gap: float, level: str, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    thumbs = np.arange(rows) % 2 == 0
    rewards = generator.normal(size=rows) + gap * thumbs
    if gap == 0:
        rewards = np.abs(np.arange(rows) // 2 - rows / 4)  # each pair is equal: exactly half
    record = run_of(tmp_path / "run", rewards.tolist())
    assert record.outcome.level == level
    if level in ("better", "worse"):
        assert f"{roc_auc_score(thumbs, rewards):.3f}" in record.outcome.text


def test_before_training_metrics_are_those_of_rewards_of_zero_unless_another_reference_is_named(tmp_path: Path) -> None:
    record = run_of(tmp_path / "run")
    assert record.at_first("loss") == pytest.approx(2 * math.log(2))
    assert [record.at_first(name) for name in ("auroc", "accuracy", "margin", "kl")] == [0.5, 0.5, 0.0, 0.0]
    for number, options in enumerate(("reference_name_or_path: elsewhere", "objective: kto", "objective: {bco: 1}")):
        other = run_of(tmp_path / str(number), config__yaml=f"model: {{{options}}}")
        assert other.at_first("loss") is None


def test_the_page_names_the_best_step_the_distance_and_what_users_wrote_escaped(tmp_path: Path) -> None:
    sample = {"step": 20, "prompt": "<script>alert(1)</script>", "policy": "Great question! " * 3, "reference": "No."}
    sample |= {"policy_tokens": 9, "reference_tokens": 2, "policy_ended": True, "reference_ended": False}
    # Two prompts of the same words and another image; the second was written twice, of a validation made again.
    lines = "".join(json.dumps({**sample, "number": number}) + "\n" for number in (0, 1, 1))
    record = run_of(tmp_path / "run", np.linspace(0, 1, 80), samples__jsonl=lines)
    assert len(record.newest_samples) == 2
    page = page_of_runs([record])
    assert "lowest at step 10 (1.2000)" in page
    assert "20.0 nats per answer from the reference" in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 7  # four of held-out rows, three curves that were logged


def test_runs_are_compared_by_what_their_settings_differ_in(tmp_path: Path) -> None:
    one = run_of(tmp_path / "version_0", config__yaml="model: {beta: 0.1, objective: bco}")
    two = run_of(tmp_path / "version_1", config__yaml="model: {beta: 0.2, objective: bco}")
    page = page_of_runs([one, two])
    assert "model.beta" in page
    assert "model.objective" not in page


def test_the_closing_table_says_what_held_out_rows_were_and_are(tmp_path: Path) -> None:
    console = Console(width=100, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    print_outcome(run_of(tmp_path / "run"), console)
    said = console.export_text()
    assert "1.3863" in said
    assert "1.3000" in said
    assert "Not measured: no rows were held out" in said


def test_drift_is_the_mean_difference_over_prompts_with_its_interval() -> None:
    policy = ["one two three four", "one two", "one two three", "one"]
    reference = ["one", "one two", "one", "one two"]
    words = drift(policy, reference)[0]
    differences = [3, 0, 2, -1]
    low, high = stats.norm.interval(0.95, np.mean(differences), stats.sem(differences))
    assert (words.policy, words.reference) == (2.5, 1.5)
    assert (words.low, words.high) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("kind", "text", "counted"),
    [
        ("refuse", "I'm sorry, but I can't help with that.", True),
        ("refuse", "As an AI language model, I have no opinion.", True),
        ("refuse", "I cannot share that.", True),
        ("refuse", "You cannot boil an egg without water.", False),
        ("refuse", "She said she was sorry.", False),
        ("agree", "You're absolutely right, it is blue.", True),
        ("agree", "Absolutely! It is blue.", True),
        ("agree", "Turn right at the corner.", False),
        ("flatter", "What a wonderful thought about cats.", True),
        ("flatter", "Great question! It is blue.", True),
        ("flatter", "Great Britain is an island.", False),
    ],
)
def test_an_answer_is_counted_by_what_it_says(kind: str, text: str, counted: bool) -> None:
    change = next(change for change in drift([text], ["It is blue."]) if change.name == f"answers that {kind}")
    assert (change.policy, change.reference) == (counted, 0)


def test_repetition_is_the_share_of_runs_of_words_that_were_said_before() -> None:
    assert repetition("a b c d a b c d a b c d") == pytest.approx(5 / 9)
    assert repetition("too short") == 0


def test_distinct_words_are_compared_at_the_same_number_of_words() -> None:
    change = drift(["cat cat cat cat cat cat"], ["one two three"])[-1]
    assert (change.policy, change.reference) == (pytest.approx(1 / 3), 1.0)


def test_held_out_rewards_that_are_not_finite_leave_a_page_without_them(tmp_path: Path) -> None:
    record = run_of(tmp_path / "run", [math.nan, *np.linspace(0, 1, 79)])
    assert record.outcome.text.endswith("or their rewards are not finite.")
    assert page_of_runs([record]).count("<svg") == 3  # curves alone
