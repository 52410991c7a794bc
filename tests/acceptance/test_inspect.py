"""`inspect`, as it is typed: the data of a config, read as `fit` reads it, reported before anything is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bco_lightning.cli.app import main
from bco_lightning.errors import FeedbackRowError
from bco_lightning.models.load import load_tokenizer
from tests.conftest import tiny_data, write_jsonl

CONFIGS = Path(__file__).parents[2] / "configs"
SCRIPT = "<script>alert('prompt')</script>"


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def inspect(model: str, log: str, *more: str) -> int:
    options = [f"--model.name_or_path={model}", f"--data.train_files={log}", "--data.batch_size=4"]
    return main(["inspect", *options, "--data.max_length=64", "--trainer.accelerator=cpu", *more])


@pytest.fixture
def marked(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows, some with what must not be run or repeated."""
    rows[0]["prompt"] = f"{SCRIPT} write to ann@example.org"
    rows[1]["completion"] = "Call +44 20 7946 0958, or ann@example.org."
    rows[2] = rows[5]
    return write_jsonl(tmp_path / "marked.jsonl", rows)


def test_a_log_is_reported_in_the_terminal_and_on_a_page(
    tiny_model: str, marked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(tiny_model, marked, "--data.validation_fraction=0") == 0
    said = " ".join(re.sub(r"[│┃]", " ", capsys.readouterr().out).split())
    page = Path("inspect.html").read_text()
    assert "train 24 24 16 8 0 0" in said
    assert "rows of an optimizer step 4" in said
    assert "optimizer steps of an epoch 6" in said
    assert "e-mail addresses 2 2" in said
    assert "phone numbers 1 1" in said
    assert "Rows that repeat an earlier one, thumb included: 1." in said
    assert "on this CPU" in said
    assert said.endswith("Page inspect.html")
    assert "<script>" not in page
    assert not Path("runs").exists()


def test_counts_and_lengths_are_those_of_fit(tiny_model: str, marked: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(tiny_model, marked, "--data.max_length=24", "--trainer.accumulate_grad_batches=2") == 0
    said = " ".join(re.sub(r"[│┃]", " ", capsys.readouterr().out).split())
    from bco_lightning.models.load import load_tokenizer

    data = tiny_data(marked, max_length=24, tokenizer=load_tokenizer(tiny_model))
    data.setup("fit")
    counts = data.counts[0]
    assert f"train {counts.read} {counts.used} {counts.up} {counts.down} {counts.num_left_out}" in said
    for what, count in counts.cut.items():
        assert f"train, {what} {count}" in said or not count
    assert counts.cut["completions cut"] > 0
    steps = -(-len(data.train_dataset) // 8)
    tokens = sum(map(len, data.train_dataset["input_ids"])) * steps * 8 / len(data.train_dataset)
    assert f"optimizer steps of an epoch {steps}" in said
    assert f"tokens of an epoch {tokens:,.0f}" in said


def test_a_stream_is_reported_from_rows_drawn_from_it(
    tiny_model: str, log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(tiny_model, log, "--data.streaming=true") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r"A stream: all but the counts is about (?:2\d|1\d) rows drawn evenly from it", told)
    assert Path("inspect.html").exists()


def test_examples_are_a_few_of_either_class_the_same_again(tiny_model: str, marked: str) -> None:
    pages = []
    for _ in range(2):
        assert inspect(tiny_model, marked, "--examples=2", "--report=page.html", "--overwrite") == 0
        pages.append(re.findall(r"thumbs-(?:up|down), \S+:\d+", Path("page.html").read_text()))
    assert [example.partition(",")[0] for example in pages[0]] == ["thumbs-up"] * 2 + ["thumbs-down"] * 2
    assert pages[0] == pages[1]


def test_hidden_examples_leave_no_text_of_a_row_anywhere(
    tiny_model: str, marked: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert inspect(tiny_model, marked, "--hide_examples") == 0
    written = "".join(capfd.readouterr()) + Path("inspect.html").read_text()
    for text in ("Tell me about", "is good, and", "ann@example", "7946", "alert"):
        assert text not in written


def test_reasons_with_first_places_are_shown(
    tiny_model: str, tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    for number, row in enumerate(rows):
        row["label"] = (5, 1, 3)[number % 3]
    rows[7] = {"prompt": "only this"}
    log = write_jsonl(tmp_path / "rated.jsonl", rows)
    rule = ["--data.rating.up=4", "--data.rating.down=2", "--data.bad_rows=skip", "--data.max_bad_rows=0.5"]
    assert inspect(tiny_model, log, *rule, "--data.validation_fraction=0") == 0
    said = " ".join(re.sub(r"[│┃]", " ", capsys.readouterr().out).split())
    assert "train 24 15 8 7 8 1" in said
    assert re.search(
        r"rating between thumbs-up and thumbs-down 8 \S+rated.jsonl:3, \S+rated.jsonl:6, \S+rated.jsonl:9", said
    )
    assert re.search(r"malformed 1 \S+rated.jsonl:8", said)


def test_a_messy_log_is_told_in_one_round_and_then_clean(
    tiny_model: str, tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(row) for row in rows]
    bad = {3: '{"prompt": "cut', 8: json.dumps({**rows[8], "label": "yes"}), 15: '{"prompt": "cut', 20: "[]"}
    log = Path("messy.jsonl")
    log.write_text("".join(f"{bad.get(number, line)}\n" for number, line in enumerate(lines)))
    # The error of a run says how to see all.
    data = tiny_data(str(log), tokenizer=load_tokenizer(tiny_model))
    with pytest.raises(FeedbackRowError, match=r"messy\.jsonl:4: .*inspect, which writes bad_rows\.jsonl"):
        data.setup("fit")
    capsys.readouterr()
    assert inspect(tiny_model, str(log), "--report=page.html") == 2
    printed = capsys.readouterr()
    told = [json.loads(line) for line in Path("bad_rows.jsonl").read_text().splitlines()]
    assert [row["place"] for row in told] == [f"messy.jsonl:{number + 1}" for number in bad]
    assert all(row.keys() == {"place", "reason", "expected", "found", "remedy"} for row in told)
    assert (told[0]["expected"], told[3]["found"]) == ("one JSON object per line", "a list of 0")
    assert "data.columns.thumbs" in told[1]["remedy"]
    said = " ".join(re.sub(r"[│┃]", " ", printed.out).split())
    assert "one JSON object per line 2 messy.jsonl:4, messy.jsonl:16" in said
    assert "fit would not start: messy.jsonl:4: expected one JSON object per line" in said
    assert "messy.jsonl:4: expected one JSON object per line" in printed.err
    assert "To see all such rows" not in printed.err
    assert inspect(tiny_model, str(log), "--report=page.html") == 2
    assert "With --overwrite, what this command wrote is replaced." in capsys.readouterr().err
    log.write_text("".join(f"{line}\n" for number, line in enumerate(lines) if number not in bad))
    assert inspect(tiny_model, str(log), "--report=page.html", "--overwrite") == 0
    assert not Path("bad_rows.jsonl").exists()


def test_a_log_of_malformed_rows_alone_is_told_whole(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text("[]\n{}\n")
    assert inspect(tiny_model, "bad.jsonl") == 2
    assert len(Path("bad_rows.jsonl").read_text().splitlines()) == 2
    assert "bad.jsonl:1: expected a JSON object" in capsys.readouterr().err
    Path("bad_rows.jsonl").write_text("mine\n")
    assert inspect(tiny_model, "bad.jsonl", "--overwrite") == 2
    assert "that this command did not write" in capsys.readouterr().err
    assert Path("bad_rows.jsonl").read_text() == "mine\n"


def test_a_log_with_one_class_is_reported_and_then_refused_as_by_fit(
    tiny_model: str, tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_jsonl(tmp_path / "up.jsonl", [{**row, "label": True} for row in rows])
    assert inspect(tiny_model, log) == 2
    printed = capsys.readouterr()
    assert "fit would not start" in printed.out
    assert "thumbs of both kinds" in printed.err
    assert "fit would not start" in Path("inspect.html").read_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.train_files=gone.jsonl", "gone.jsonl: expected a feedback log, found no such file"),
        ("--examples=-1", "--examples: expected a number from 0 on, found -1."),
        ("--report=log.jsonl/page.html", "--report: expected a name to write under that is free"),
        ("--report=.", "--report: expected a name to write under that is free"),
        ("--data.batch_size=0", "data.batch_size: expected at least 1 row, found 0."),
        ("--model.name_or_path=./gone", "found nothing there"),
    ],
)
def test_what_is_wrong_is_one_message_and_no_page(
    option: str, message: str, tiny_model: str, log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(tiny_model, log, option) == 2
    assert message in capsys.readouterr().err
    assert not Path("inspect.html").exists()


def test_a_misspelt_option_is_met_with_the_one_that_was_meant(
    tiny_model: str, log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(tiny_model, log, "--data.max_lenght=3") == 2
    assert "nearest are data.max_length, " in capsys.readouterr().err


def test_a_config_names_no_page_outside(tiny_model: str, log: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text("report: ../elsewhere.html\n")
    assert inspect(tiny_model, log, "--config=config.yaml") == 2
    assert "error: report: expected a place inside the working directory" in capsys.readouterr().err
    assert not Path("../elsewhere.html").exists()


@pytest.mark.parametrize("config", ["bco.yaml", "lora.yaml"])
def test_configs_of_fit_are_taken_with_options_over_them(config: str, tiny_model: str, log: str) -> None:
    options = [f"--config={CONFIGS / config}", "--data.validation_files=null"]
    assert main(["inspect", *options, f"--model.name_or_path={tiny_model}", f"--data.train_files={log}"]) == 0


@pytest.mark.slow
@pytest.mark.real_model
def test_the_ratings_of_chitchat_are_read_and_every_row_is_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("chitchat_dataset")
    assert main(["inspect", f"--config={CONFIGS / 'chitchat.yaml'}", "--hide_examples"]) == 0
    said = " ".join(re.sub(r"[│┃]", " ", capsys.readouterr().out).split())
    found = [tuple(map(int, line)) for line in re.findall(
        r"(?:train|validation) (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", said.replace(",", ""))]  # fmt: skip
    assert len(found) == 2
    assert sum(read for read, *_ in found) == 7168
    for read, used, up, down, left_out, malformed in found:
        assert read == used + left_out + malformed
        assert used == up + down
    assert "rating left at its default 2,920" in said


# --- errors of this package


def test_help_says_what_inspect_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for option in ("--report REPORT", "--examples EXAMPLES", "--hide_examples", "--config CONFIG", "--data.max_length"):
        assert option in said


def test_a_log_larger_than_the_sample_of_the_classifier_is_drawn_from(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bco_lightning.inspection import prompts

    monkeypatch.setattr(prompts, "MOST_ROWS", 50)
    rows = [{"prompt": f"thing {n}", "completion": "yes", "label": n % 2 == 0} for n in range(80)]
    assert inspect(tiny_model, write_jsonl(tmp_path / "many.jsonl", rows), "--data.validation_fraction=0") == 0
    said = capsys.readouterr().out
    assert re.search(r"rows looked at\s*│\s*50 ", said)
    assert "What looks like personal data, in 50 of 80 rows" in " ".join(said.split())
