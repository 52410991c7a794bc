"""What `inspect` measures: lengths, prompts, personal data, work and time."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score

from bco_lightning import LoraSettings
from bco_lightning.data.messages import said_in
from bco_lightning.inspection import cost as cost_module
from bco_lightning.inspection.cost import EFFICIENCY, cost_of, num_steps
from bco_lightning.inspection.numbers import RowArrays, length_summary, texts_of
from bco_lightning.inspection.personal_data import count_personal_data, find_personal_data, is_iban, passes_luhn
from bco_lightning.inspection.prompts import COIN, MOST_ROWS, drawn_rows, prompt_shift
from bco_lightning.inspection.report import _good_if_known, length_bias
from bco_lightning.models.load import load_policy, unloaded_model
from bco_lightning.models.useful_flops import UsefulFlops
from bco_lightning.options import ModelOptions

WORDS = ["river", "stone", "cloud", "ember", "lantern", "meadow", "harbor", "violet", "copper", "willow"]


def arrays_of(lengths: Any, up: Any) -> RowArrays:
    """Rows with completions of these lengths and prompts of one token."""
    lengths, ones = np.asarray(lengths), np.ones(len(lengths), dtype=int)
    return RowArrays(np.asarray(up), ones, lengths, lengths + 1, lengths, np.arange(len(lengths)))


def spread(number: int, longer: int = 0) -> Any:
    """Lengths from 0 to 49, each of them once for either class, the thumbs-up row by so much longer."""
    return np.repeat(np.arange(number // 2) % 50, 2) + np.where(np.arange(number) % 2, 0, longer)


# --- lengths


def test_a_summary_of_lengths_has_the_numbers_of_the_sorted_list() -> None:
    assert length_summary(np.arange(101)) == [101, 0, 50, 50, 90, 95, 99, 100]


def test_thumbs_that_follow_length_are_warned_of() -> None:
    lengths, up = np.concatenate([np.arange(100, 200), np.arange(50, 150)]), np.arange(200) < 100
    level, text = length_bias(arrays_of(lengths, up))
    pairs = np.sign(lengths[up][:, None] - lengths[~up][None]).mean()
    assert f"with probability {(pairs + 1) / 2:.2f} (" in text
    assert "thumbs follow length. A model may learn to write longer" in text
    assert level == "warning"
    assert "write shorter" in length_bias(arrays_of(lengths, ~up)).text


@pytest.mark.parametrize(
    ("lengths", "up", "level", "said"),
    [
        (spread(200), np.arange(200) % 2 == 0, "good", "thumbs hardly follow length"),
        (spread(400, longer=1), np.arange(400) % 2 == 0, "good", "thumbs hardly follow length"),
        (spread(50), np.arange(50) % 2 == 0, "note", "too few rows, or too close, to tell"),
        (spread(400, longer=3), np.arange(400) % 2 == 0, "note", "too few rows, or too close, to tell"),
        (np.array([9, 8, 7, 1, 2, 3]), np.arange(6) < 3, "note", "3 rows of the rarer class: too few"),
        (np.array([1, 2]), np.array([True, True]), "note", "thumbs of one kind"),
    ],
)
def test_only_what_is_known_not_to_follow_length_is_good(lengths: Any, up: Any, level: str, said: str) -> None:
    bias = length_bias(arrays_of(lengths, up))
    assert bias.level == level
    assert said in bias.text


@pytest.mark.parametrize("longest", ["mean", "tail"])
def test_a_few_endless_answers_of_one_class_are_a_bias_that_the_auc_does_not_see(longest: str) -> None:
    generator = np.random.default_rng(0)
    up = np.arange(1000) % 2 == 0
    lengths = generator.integers(30, 50, 1000)
    lengths[np.flatnonzero(up)[: {"mean": 90, "tail": 60}[longest]]] = {"mean": 900, "tail": 52}[longest]
    if longest == "tail":
        lengths[~up] = np.minimum(lengths[~up], 49)
    level, text = length_bias(arrays_of(lengths, up))
    assert abs(roc_auc_score(up, lengths) - 0.5) < 0.08
    assert level == "warning"
    assert f"in the mean they have {lengths[up].mean():,.0f} and {lengths[~up].mean():,.0f} tokens" in text


# --- prompts


def prompts_at_random(number: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, 8)) for _ in range(number)]


def test_prompts_that_say_which_class_they_are_of_are_told_apart() -> None:
    up = np.arange(400) % 2 == 0
    prompts = [
        f"{prompt} {'please' if thumb else 'now'}" for prompt, thumb in zip(prompts_at_random(400), up, strict=True)
    ]
    shift = prompt_shift(prompts, up, seed=0)
    assert shift.auc is not None
    assert shift.auc.value > 0.95
    assert shift.log_loss < 0.5
    assert (
        "Importance weights are advised where the kind of prompt that gets thumbs-up is what matters" in shift.verdict
    )
    assert "model.importance_weights: auto" in shift.verdict


@pytest.mark.parametrize("share_up", [0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_prompts_that_say_nothing_of_the_class_advise_no_weights(share_up: float, seed: int) -> None:
    up = np.random.default_rng(5 + seed).random(1000) < share_up
    shift = prompt_shift(prompts_at_random(1000, seed), up, seed=0)
    assert shift.auc is not None
    assert abs(shift.auc.value - 0.5) < 0.1
    assert shift.log_loss >= COIN
    assert "importance weights are not advised" in shift.verdict


def test_a_prompt_is_never_on_both_sides() -> None:
    """Each prompt has a class of its own, drawn by lot: who had seen it would know the class of its other rows."""
    texts = [f"{prompt} number{number}" for number, prompt in enumerate(prompts_at_random(60))]
    of_prompt = np.random.default_rng(6).random(60) < 0.5
    rows = np.repeat(np.arange(60), 20)
    shift = prompt_shift([texts[row] for row in rows], of_prompt[rows], seed=0)
    assert shift.auc is not None
    assert shift.auc.value < 0.7
    assert not shift.is_shifted


@pytest.mark.parametrize(
    ("prompts", "num_up", "why"),
    [
        (["same prompt"] * 100, 50, "at least 10 distinct prompts, found 1"),
        (prompts_at_random(100), 100, "found 100 up and 0 down"),
        (prompts_at_random(30), 15, "at least 20 rows of either class"),
        ([str("!?" * number) for number in range(1, 101)], 50, "no words"),
    ],
)
def test_where_no_classifier_can_be_trained_the_reason_is_said(prompts: list[str], num_up: int, why: str) -> None:
    shift = prompt_shift(prompts, np.arange(len(prompts)) < num_up, seed=0)
    assert shift.auc is None
    assert why in shift.why_not
    assert shift.verdict.endswith("Importance weights are not advised.")


def test_a_rarer_class_of_few_prompts_is_said_and_not_a_crash() -> None:
    prompts = [*prompts_at_random(100), *["the one that nobody likes"] * 30]
    assert "too few prompts" in prompt_shift(prompts, np.arange(130) < 100, seed=0).why_not


@pytest.mark.parametrize(("number", "is_known", "level"), [(1000, True, "good"), (60, False, "note")])
def test_that_prompts_do_not_differ_is_good_only_where_a_difference_is_ruled_out(
    number: int, is_known: bool, level: str
) -> None:
    shift = prompt_shift(prompts_at_random(number), np.arange(number) % 2 == 0, seed=0)
    assert not shift.is_shifted
    assert ("nor ruled out" in shift.verdict) is not is_known
    assert _good_if_known(shift.auc) == level


def test_the_roc_curve_has_the_area_that_is_said() -> None:
    up = np.arange(600) % 2 == 0
    noisy = np.random.default_rng(7).random(600) < 0.6
    prompts = [
        f"{p} {'please' if u == n else 'now'}" for p, u, n in zip(prompts_at_random(600), up, noisy, strict=True)
    ]
    shift = prompt_shift(prompts, up, seed=0)
    assert shift.auc is not None
    assert np.trapezoid(shift.roc, dx=1 / (len(shift.roc) - 1)) == pytest.approx(shift.auc.value, abs=0.02)


def test_rows_are_drawn_by_the_seed_and_not_twice() -> None:
    drawn = drawn_rows(3 * MOST_ROWS, seed=4)
    assert len(np.unique(drawn)) == MOST_ROWS
    assert np.array_equal(drawn, drawn_rows(3 * MOST_ROWS, seed=4))
    assert not np.array_equal(drawn, drawn_rows(3 * MOST_ROWS, seed=5))
    assert 1.4 * MOST_ROWS < drawn.mean() < 1.6 * MOST_ROWS


# --- personal data


# Numbers that card networks, the IBAN registry, RFC 5737, RFC 3849 and the 555-01xx range set aside for examples.
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("mail ann.b+c@mail.example.org.", "e-mail addresses"),
        ("<ann@example.co.uk>", "e-mail addresses"),
        ("4012888888881881", "credit-card numbers"),
        ("card 3782 822463 10005, thanks", "credit-card numbers"),
        ("5555-5555-5555-4444", "credit-card numbers"),
        ("GB82WEST12345698765432", "IBANs"),
        ("to DE89 3704 0044 0532 0130 00 PLEASE", "IBANs"),
        ("from 192.0.2.17.", "IP addresses"),
        ("2001:db8::8a2e:370:7334", "IP addresses"),
        ("call (202) 555-0143", "phone numbers"),
        ("+44 20 7946 0958", "phone numbers"),
        ("202.555.0143", "phone numbers"),
    ],
)
def test_personal_data_is_found_once_and_as_one_kind(text: str, kind: str) -> None:
    assert find_personal_data(text) == {kind: 1}


@pytest.mark.parametrize(
    "text",
    [
        "user@host, @someone, a@@b.c",
        "4012888888881882 and 0000000000000000",  # wrong digit; all alike
        "GB82WEST12345698765433",
        "version 1.2.3, 1.2.3.4.5, 999.1.1.1, 127.0.0.1",
        "at 12:30:45 on 2024-05-01, 2018-05-03T01:38:01Z",
        "3.14159265358979, 1,000,000,000, arXiv:2404.04656",
        "the words dead::beef in std::vector",
        "",
    ],
)
def test_other_numbers_are_no_personal_data(text: str) -> None:
    assert find_personal_data(text) == {}


@pytest.mark.parametrize("wrong", range(1, 10))
def test_luhn_and_iban_notice_every_single_wrong_digit(wrong: int) -> None:
    card, iban = "4111111111111111", "NL91ABNA0417164300"
    assert passes_luhn(card)
    assert is_iban(iban)
    for place in range(len(card)):
        changed = str((int(card[place]) + wrong) % 10)
        assert not passes_luhn(card[:place] + changed + card[place + 1 :])
    for place in (2, 3, *range(8, 18)):
        changed = str((int(iban[place]) + wrong) % 10)
        assert not is_iban(iban[:place] + changed + iban[place + 1 :])


def test_rows_and_finds_are_counted_apart() -> None:
    rows = [("a@example.org b@example.org", "c@example.org"), ("nothing", "192.0.2.1"), ("", "")]
    counts = count_personal_data(rows)
    assert counts["e-mail addresses"] == (1, 3)
    assert counts["IP addresses"] == (1, 1)
    assert counts["IBANs"] == (0, 0)


@pytest.mark.parametrize("piece", ["a", "1", "1 ", "a.", "a@", "A1", ":", "1.", "+1 ", "0-", "(1", "AB12 ", "a@a."])
def test_hostile_texts_are_looked_through_in_time_that_grows_with_their_length(piece: str) -> None:
    program = f"from bco_lightning.inspection.personal_data import *; find_personal_data({piece!r} * 200_000 + '@1')"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- rows


def stored_rows() -> Dataset:
    masks = [[False, True, True], [False, False, True, True], [False, True]]
    return Dataset.from_dict(
        {
            "input_ids": [[5, 6, 2], [5, 6, 7, 2], [5, 6]],
            "completion_mask": masks,
            "thumbs_up": [True, False, True],
            "prompt": [f'[{{"role": "user", "content": "{text}"}}]' for text in ("one", "two", "one")],
            "place": ["a:1", "a:2", "a:3"],
            "prompt_key": [7, -3, 7],
            "prompt_length": [1, 2, 1],
            "completion_length": [2, 2, 9],
        }
    )


class Letters:
    """A tokenizer whose tokens are letters."""

    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(chr(ord("a") + token) for token in row) for row in ids]


def test_arrays_of_rows_are_those_of_the_data_set() -> None:
    arrays = RowArrays.of(stored_rows())
    assert arrays.thumbs_up.tolist() == [True, False, True]
    assert arrays.prompt_lengths.tolist() == [1, 2, 1]
    assert arrays.completion_lengths.tolist() == [2, 2, 9]
    assert arrays.lengths.tolist() == [3, 4, 2]
    assert arrays.loss_tokens.tolist() == [2, 2, 1]
    assert arrays.prompts[0] == arrays.prompts[2] != arrays.prompts[1]


def test_texts_of_rows_are_their_prompts_and_decoded_completions() -> None:
    rows = list(texts_of(stored_rows(), Letters(), [2, 1]))
    assert [(row.prompt, row.completion, row.thumbs_up, row.place) for row in rows] == [
        ("one", "g", True, "a:3"),
        ("two", "hc", False, "a:2"),
    ]


def test_tool_calls_of_a_message_are_read_too() -> None:
    stored = '[{"content": "see"}, {"content": "", "tool_calls": [{"name": "f"}]}]'
    assert said_in(stored) == 'see\n[{"name": "f"}]'


# --- cost


@pytest.mark.parametrize(
    "lora", [None, LoraSettings(r=4, top_layers=1), LoraSettings(r=4, target_modules="q_proj,v_proj")]
)
def test_operations_without_weights_are_those_counted_on_the_policy(lora: LoraSettings | None, tiny_model: str) -> None:
    assert UsefulFlops.of(unloaded_model(tiny_model, lora)) == UsefulFlops.of(
        load_policy(tiny_model, torch.float32, lora, seed=0)
    )


def config(model: str, **trainer: Any) -> tuple[ModelOptions, dict[str, Any]]:
    return ModelOptions(model), {"accelerator": "cpu", "max_epochs": 3, "max_steps": -1, "num_nodes": 1, **trainer}


def test_time_is_operations_over_the_speed_of_products_and_devices(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_module, "_matmul_rate", lambda device, dtype: 1e6)
    arrays = arrays_of([9, 19, 29, 99], [True, True, True, False])
    cost = cost_of(arrays, 0.75, *config(tiny_model, devices=2), batch_size=1, micro_batches_per_epoch=4)
    assert (cost.rows_per_step, cost.steps_per_epoch, cost.steps) == (2, 2, 6)
    useful = UsefulFlops.of(unloaded_model(tiny_model, None))
    flops = useful.per_token * 160 + useful.per_completion_token * 156 + useful.per_squared_length * 11_400
    assert (cost.tokens, cost.completion_tokens, cost.flops) == pytest.approx((160, 156, flops))
    seconds = 3 * flops / 2e6  # three epochs, two devices
    assert cost.seconds == pytest.approx((seconds / EFFICIENCY[1], seconds / EFFICIENCY[0]))
    assert cost.machine.startswith("2 × this CPU")


def test_balanced_sampling_draws_the_rarer_class_again(tiny_model: str) -> None:
    arrays = arrays_of([9, 19, 29, 99], [True, True, True, False])
    cost = cost_of(arrays, 0.5, *config(tiny_model, devices=1), batch_size=6, micro_batches_per_epoch=1)
    assert cost.tokens == pytest.approx(3 * 20 + 3 * 100)


def test_a_model_whose_operations_are_not_known_leaves_the_time_out_and_says_why() -> None:
    cost = cost_of(arrays_of([1], [True]), 1.0, *config("./gone"), 1, 1)
    assert cost.seconds is None
    assert "found nothing there" in cost.why_not


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"max_epochs": 2, "max_steps": -1}, 20),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": 1, "max_steps": 50}, 10),
        ({"max_epochs": -1, "max_steps": -1}, None),
        ({"max_epochs": None, "max_steps": -1}, None),
    ],
)
def test_a_run_ends_with_its_epochs_or_its_steps(trainer: dict[str, Any], steps: int | None) -> None:
    assert num_steps(trainer, 10) == steps
