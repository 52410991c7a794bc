"""What ``predict`` writes: scores in file order, thumbs where rows have one, ranks, and completions of the policy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bco_lightning.callbacks import PredictionWriter, prediction_writer
from bco_lightning.callbacks.prediction_writer import _rank, platt
from tests.conftest import tiny_data, tiny_module, tiny_trainer, write_jsonl


@pytest.mark.parametrize(
    ("rewards", "ranks"),
    [
        ([0.3, 0.1, 0.2], [1, 3, 2]),
        ([0.1, 0.3, 0.3, 0.2], [4, 1, 1, 3]),
        ([0.1, 0.1 + 1e-6], [1, 1]),
        ([math.nan, 0.1], [None, 1]),
    ],
)
def test_a_rank_is_one_plus_the_number_of_better_answers_to_the_prompt(rewards: list[float], ranks: list[Any]) -> None:
    lines = [{"prompt": 0, "implicit_reward": reward} for reward in rewards]
    others = [{"prompt": 1, "implicit_reward": 9.0}]
    _rank(mixed := [*lines[:1], *others, *lines[1:]])
    assert [line["rank"] for line in lines] == ranks
    assert [line["completions"] for line in lines] == [len(lines)] * len(lines)
    assert mixed[1]["rank"] == mixed[1]["completions"] == 1


def test_calibration_of_two_rewards_gives_the_shares_of_platts_targets() -> None:
    rewards = np.repeat([0.02, -0.01], [40, 60])
    up = np.concatenate([np.arange(40) < 30, np.arange(60) < 15])
    slope, intercept = platt(rewards, up)
    high, low = 46 / 47, 1 / 57  # Platt (1999): (n + 1) / (n + 2) of 45 thumbs up, 1 / (n + 2) of 55 down
    for reward, num_up, number in ((0.02, 30, 40), (-0.01, 15, 60)):
        expected = (num_up * high + (number - num_up) * low) / number
        assert 1 / (1 + math.exp(-(slope * reward + intercept))) == pytest.approx(expected, abs=1e-5)


def predicted(model: str, log: str, moves: bool = False, data: dict[str, Any] | None = None, **options: Any) -> Any:
    module = tiny_module(model)
    if moves:
        torch.manual_seed(1)
        for parameter in module.policy.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.1
    Path("predictions.jsonl").unlink(missing_ok=True)
    trainer = tiny_trainer(callbacks=[PredictionWriter(**options)])
    trainer.predict(module, tiny_data(None, predict_files=log, **(data or {})))
    return module, [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]


def test_rows_are_in_file_order_with_their_thumb_and_a_policy_that_has_not_moved_prefers_none(
    tiny_model: str, log: str, rows: list[dict[str, Any]]
) -> None:
    _, scores = predicted(tiny_model, log, data={"streaming": True})
    assert [score["row"] for score in scores] == [f"{log}:{line}" for line in range(1, 25)]
    assert [score["thumbs_up"] for score in scores] == [row["label"] for row in rows]
    assert [score["prompt"] for score in scores] == [number % 8 for number in range(24)]
    assert {(score["rank"], score["completions"], score["probability_up"]) for score in scores} == {(1, 3, 0.5)}
    assert {score["calibrated_probability_up"] for score in scores} == {None}


def test_a_row_without_a_label_or_with_one_that_means_nothing_is_scored_without_a_thumb(
    tiny_model: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows[0]["label"] = None
    del rows[1]["label"]
    rows[2]["label"] = "perhaps"
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    files = [write_jsonl(tmp_path / "a.jsonl", rows[:4]), write_jsonl(tmp_path / "b.jsonl", [pair])]
    _, scores = predicted(tiny_model, files)  # type: ignore[arg-type]
    assert [score["thumbs_up"] for score in scores] == [None, None, None, False, True, False]
    assert [score["source"] for score in scores] == [files[0]] * 4 + [files[1]] * 2


def test_completions_of_the_policy_are_scored_like_rows_and_ranked_among_them(
    tiny_model: str, log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    sample = prediction_writer.sample_completions

    def recorded(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        found = sample(model, tokenizer, prompts, **options)
        made.extend(zip(prompts, found, strict=True))
        return found

    monkeypatch.setattr(prediction_writer, "sample_completions", recorded)
    module, scores = predicted(tiny_model, log, moves=True, completions=2, max_new_tokens=5)
    answers = scores[24:]
    assert [answer["prompt"] for answer in answers] == [number // 2 for number in range(16)]
    assert all(answer["completions"] == 5 and 1 <= answer["rank"] <= 5 for answer in scores)
    assert all(answer["thumbs_up"] is None for answer in answers)
    module.eval()
    for answer, (prompt, completion) in zip(answers, made, strict=True):
        assert answer["completion"] == completion.text
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            log_probs = module.policy(ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
            with module.policy.disable_adapter():
                reference = module.policy(ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
        taken = torch.tensor(completion.token_ids)[:, None]
        difference = float((log_probs - reference).gather(1, taken).sum())
        assert answer["implicit_reward"] == pytest.approx(0.1 * difference, abs=1e-4)
        assert answer["completion_tokens"] == len(completion.token_ids)
    module, again = predicted(tiny_model, log, moves=True, completions=2, max_new_tokens=5)
    assert again == scores
