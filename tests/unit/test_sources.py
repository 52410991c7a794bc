"""Several logs are mixed by weight, and keep their names in counts and metrics."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bco_lightning import FeedbackDataModule, Rating, Source
from bco_lightning.data import Columns
from bco_lightning.errors import ConfigError
from tests.conftest import tiny_module, tiny_trainer, write_jsonl
from tests.reliability.tiny_run import byte_tokenizer


def make_log(tmp_path: Path, name: str, num_up: int, num_down: int) -> str:
    rows = [
        {"prompt": f"{name} {n}", "completion": f"{name} {n}", "label": n < num_up} for n in range(num_up + num_down)
    ]
    return write_jsonl(tmp_path / f"{name}.jsonl", rows)


@pytest.fixture
def logs(tmp_path: Path) -> tuple[str, str]:
    return make_log(tmp_path, "chat", 8, 4), make_log(tmp_path, "code", 2, 6)


def data(sources: list[Any], **options: Any) -> FeedbackDataModule:
    defaults = {"tokenizer": byte_tokenizer(), "validation_fraction": 0.0, "batch_size": 4}
    module = FeedbackDataModule(sources, **{**defaults, **options})
    module.setup("fit")
    return module


def drawn(module: FeedbackDataModule, epochs: int = 1) -> list[str]:
    """Places of the rows of some epochs, in order."""
    places = module.train_dataset["place"]
    order = module.training.order(module.rows_per_step)
    steps = range(epochs * module.steps_per_epoch)
    return [places[row] for step in steps for row in order.rows_of_step(step)]


def test_rows_are_counted_by_the_name_of_their_source(logs: tuple[str, str]) -> None:
    [counts] = data([Source(logs[0], name="chat"), logs[1]]).counts
    assert counts.by_source == {"chat": (8, 4), logs[1]: (2, 6)}
    assert counts.used == 20


def test_a_weight_says_how_often_an_epoch_shows_the_rows_of_a_source(logs: tuple[str, str]) -> None:
    module = data([Source(logs[0], weight=2), Source(logs[1], weight=0.5)])
    assert module.steps_per_epoch == 7  # (2 * 12 + 0.5 * 8) rows in steps of 4
    seen = Counter(drawn(module, epochs=2))
    assert {seen[f"{logs[0]}:{line}"] for line in range(1, 13)} == {4}
    assert {seen[f"{logs[1]}:{line}"] for line in range(1, 9)} == {1}


def test_class_frequencies_are_those_of_the_mixture(logs: tuple[str, str]) -> None:
    module = data([Source(logs[0], weight=2), Source(logs[1], weight=0.5)])
    # Thumbs-up: 2 * 8 + 0.5 * 2; thumbs-down: 2 * 4 + 0.5 * 6.
    assert module.class_frequencies == pytest.approx((17 / 28, 11 / 28))


def test_balanced_sampling_keeps_weights_within_each_class(logs: tuple[str, str]) -> None:
    module = data([Source(logs[0], weight=2), Source(logs[1], weight=0.5)], balanced_sampling=True)
    thumbs = dict(zip(module.train_dataset["place"], module.train_dataset["thumbs_up"], strict=True))
    places = drawn(module, epochs=11)
    assert sum(thumbs[place] for place in places) == len(places) / 2
    share_of_chat = sum(place.startswith(logs[0]) for place in places if thumbs[place])
    assert share_of_chat / (len(places) / 2) == pytest.approx(16 / 17, abs=0.02)


def test_each_source_has_a_format_columns_and_a_rule_of_its_own(tmp_path: Path, logs: tuple[str, str]) -> None:
    rated = write_jsonl(
        tmp_path / "rated.jsonl", [{"q": f"q{n}", "a": "a", "stars": stars} for n, stars in enumerate((5, 3, 1, 1))]
    )
    paired = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "good", "rejected": "bad"}])
    columns = Columns(prompt="q", completion="a")
    source = Source(rated, name="stars", columns=columns, rating=Rating("stars", up=4, down=2))
    module = data([logs[0], source, Source(paired, name="pairs", format="paired")])
    [counts] = module.counts
    assert counts.by_source == {logs[0]: (8, 4), "stars": (1, 2), "pairs": (1, 1)}
    assert counts.left_out["rating between thumbs-up and thumbs-down"].places == [f"{rated}:2"]
    assert counts.read == 12 + 4 + 2 == counts.used + counts.num_left_out
    assert "pairs: 1 up, 1 down, read as paired" in str(counts)


def test_two_sources_of_one_name_are_refused(logs: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"expected a name for each source, found 'x' twice"):
        FeedbackDataModule([Source(logs[0], name="x"), Source(logs[1], name="x")])


def test_weights_of_sources_to_evaluate_are_refused(logs: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.test_files: expected no weights"):
        FeedbackDataModule(test_files=[Source(logs[0], weight=2)])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_positive_number_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="expected a weight above 0"):
        Source("log.jsonl", weight=weight)


def test_metrics_are_told_apart_by_source(tiny_model: str, logs: tuple[str, str]) -> None:
    sources = [Source(logs[0], name="chat"), Source(logs[1], name="code help")]
    trainer = tiny_trainer()
    validated = FeedbackDataModule(validation_files=sources, batch_size=3)
    (values,) = trainer.validate(tiny_module(tiny_model), validated, verbose=False)
    both = {
        name: trainer.validate(tiny_module(tiny_model), FeedbackDataModule(validation_files=[log]), verbose=False)[0]
        for name, log in zip(("chat", "code_help"), logs, strict=True)
    }
    for name, alone in both.items():
        for key in ("loss", "log_prob_up", "log_prob_down", "length_up", "length_down"):
            assert values[f"val/by_source/{name}/{key}"] == pytest.approx(alone[f"val/{key}"], rel=1e-5)
    assert "val/by_source/chat/loss" not in both["chat"]  # one source has no need of it


def test_one_source_that_lacks_a_class_leaves_the_others_metrics_alone(tiny_model: str, tmp_path: Path) -> None:
    sources = [Source(make_log(tmp_path, "ups", 4, 0)), Source(make_log(tmp_path, "mixed", 2, 2), name="mixed")]
    validated = FeedbackDataModule(validation_files=sources)
    (values,) = tiny_trainer().validate(tiny_module(tiny_model), validated, verbose=False)
    assert values["val/by_source/mixed/loss"] > 0
    [ups] = [key for key in values if key.endswith("/loss") and "ups" in key]
    assert values[ups] != values[ups]  # NaN: there is no thumbs-down to average over
