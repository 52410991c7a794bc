"""Rows of a stream are those of the plain path, and an unusable one is replaced by another, always the same."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from bco_lightning.batch import FeedbackRow, TokenizedSample
from bco_lightning.data.collate import collate
from bco_lightning.data.feedback_row import Columns
from bco_lightning.data.labels import DROPPED_LABEL
from bco_lightning.data.loading import BadRows, RowLoader
from bco_lightning.data.reading import ReadingOptions
from bco_lightning.data.row_table import RowTable
from bco_lightning.data.sampling import StepBatchSampler
from bco_lightning.data.source import RowFormat, Source
from bco_lightning.data.streaming import StreamDataset, StreamedRows, tables
from bco_lightning.data.tokenize import COMPLETION_TOO_LONG, LengthLimits, RowTokenizer
from bco_lightning.errors import ConfigError, FeedbackRowError
from tests.conftest import write_jsonl
from tests.reliability.tiny_run import byte_tokenizer

DROP = {"long_completions": "drop"}


def records(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"p{n}", "completion": f"c{n}", "label": n % 3 > 0} for n in range(start, start + count)]


def reading_options(limits: dict[str, Any] | None = None, **options: Any) -> ReadingOptions:
    return ReadingOptions(limits=LengthLimits(**{"max_length": 64, **(limits or {})}), **options)


def streamed(*paths: str, sample: int | None = None, weights: tuple[float, ...] = (), **options: Any) -> StreamedRows:
    sources = [
        Source(str(path), weight=weight) for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True)
    ]
    return StreamedRows.read("train", sources, reading_options(**options), byte_tokenizer(), sample)


def dataset(rows: StreamedRows, balanced: bool = False) -> StreamDataset:
    return rows.dataset(byte_tokenizer(), 8, 8, balanced, 100)


def files_of_every_kind(folder: Path) -> list[str]:
    """3 files of 400 rows in all."""
    pq.write_table(pa.Table.from_pylist(records(100, 200)), folder / "b.parquet", row_group_size=30)
    talks = [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"p{n}"}],
            "completion": [{"role": "assistant", "content": f"c{n} " * (n % 20 + 1)}],
            "label": n % 2 == 0,
        }
        for n in range(300, 400)
    ]
    return [
        write_jsonl(folder / "a.jsonl", records(200)),
        str(folder / "b.parquet"),
        write_jsonl(folder / "c.jsonl", talks),
    ]


def test_every_row_is_that_of_the_plain_path(tmp_path: Path) -> None:
    paths = files_of_every_kind(tmp_path)
    sources = [Source(path) for path in paths]
    with RowTable(paths) as table:
        RowLoader(lambda _: RowFormat(), RowTokenizer(byte_tokenizer(), LengthLimits(64)), BadRows()).load(
            sources, table
        )
        plain = table.divide({"train": np.ones(len(table), bool)})["train"].dataset
    rows = dataset(streamed(*paths))
    assert len(rows) == len(plain) == 400
    numbers = np.random.default_rng(0).permutation(400).tolist()
    for number, sample in zip(numbers, rows.__getitems__(numbers), strict=True):
        expected = plain[number]
        assert sample == {name: expected[name] for name in sample}
        assert rows.place_of(number) == expected["place"]


def test_pairs_give_both_of_their_rows(tmp_path: Path) -> None:
    pairs = [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(20)]
    rows = dataset(streamed(write_jsonl(tmp_path / "pairs.jsonl", pairs)))
    decode = byte_tokenizer().decode
    for number, sample in enumerate(rows.__getitems__(range(40))):
        said = decode([t for t, loss in zip(sample["input_ids"], sample["completion_mask"], strict=True) if loss])
        assert said == f"{'bad' if number % 2 else 'good'} {number // 2}<|im_end|>"
        assert sample["thumbs_up"] is (number % 2 == 0)


def long_log(folder: Path, every: int = 5) -> str:
    """Each fifth row has a completion that is over the limit."""
    rows = [
        {**row, "completion": row["completion"] * 40} if n % every == 0 else row for n, row in enumerate(records(300))
    ]
    return write_jsonl(folder / "log.jsonl", rows)


def test_a_row_that_is_too_long_is_replaced_and_counted(tmp_path: Path) -> None:
    rows = streamed(long_log(tmp_path), limits=DROP)
    data = dataset(rows)
    samples = data.__getitems__(range(300))
    assert len(samples) == 300
    for number, sample in enumerate(samples):
        assert sample["row_id"] % 5
        assert (sample["row_id"] == number) == (number % 5 > 0)
        assert sample["place"].endswith(f":{sample['row_id'] + 1}")
    [(reason, counted)] = data.replaced().items()
    assert reason == COMPLETION_TOO_LONG
    assert counted.count >= 60
    assert counted.places[0].endswith("log.jsonl:1")
    assert len({sample["row_id"] for number, sample in enumerate(samples) if number % 5 == 0}) > 40


def test_the_other_row_depends_on_the_seed_and_the_number_alone(tmp_path: Path) -> None:
    rows = streamed(long_log(tmp_path), limits=DROP)
    together = [sample["row_id"] for sample in dataset(rows).__getitems__(range(300))]
    alone = dataset(rows)
    assert [alone[number]["row_id"] for number in reversed(range(300))] == together[::-1]
    other = streamed(str(tmp_path / "log.jsonl"), limits=DROP, seed=1)
    assert [sample["row_id"] for sample in dataset(other).__getitems__(range(300))] != together


@pytest.mark.parametrize(("sample", "balanced"), [(None, True), (None, False), (50, False)])
def test_the_other_row_is_of_the_same_class(sample: int | None, balanced: bool, tmp_path: Path) -> None:
    data = dataset(streamed(long_log(tmp_path), sample=sample, limits=DROP), balanced=balanced)
    for number, found in enumerate(data.__getitems__(range(300))):
        assert found["thumbs_up"] is (number % 3 > 0)


@pytest.mark.parametrize("sample", [None, 500])
def test_the_other_row_is_of_a_rare_class_too_and_of_another_block(sample: int | None, tmp_path: Path) -> None:
    rows = [{**row, "label": n % 100 == 0} for n, row in enumerate(records(3000))]
    for n in range(0, 512, 100):
        rows[n]["completion"] = "long " * 40
    data = dataset(streamed(write_jsonl(tmp_path / "log.jsonl", rows), sample=sample, limits=DROP))
    found = data.__getitems__(range(0, 512, 100))
    assert all(row["thumbs_up"] and row["row_id"] > 512 for row in found)


@pytest.mark.parametrize("sample", [None, 1000])
def test_where_a_source_has_no_usable_row_of_a_class_the_other_row_is_of_another_source(
    sample: int | None, tmp_path: Path
) -> None:
    rows = [{**row, "completion": "long " * 40} if row["label"] else row for row in records(30)]
    paths = write_jsonl(tmp_path / "long.jsonl", rows), write_jsonl(tmp_path / "other.jsonl", records(30))
    data = dataset(streamed(*paths, sample=sample, limits=DROP))
    for number, found in enumerate(data.__getitems__(range(30))):
        assert found["thumbs_up"] is (number % 3 > 0)
        assert found["source"] == (number % 3 > 0)


def test_of_a_row_without_a_class_the_other_row_is_usable(tmp_path: Path) -> None:
    rows = [{**row, "label": None} if n == 7 else row for n, row in enumerate(records(300))]
    path = write_jsonl(tmp_path / "log.jsonl", rows)
    for sample in (None, 20):
        found = streamed(path, sample=sample, bad_rows="skip", max_bad_rows=1.0)
        assert dataset(found)[7]["row_id"] != 7


def half_long(folder: Path, every: int) -> str:
    """Of 1200 rows, half of them thumbs-up, each of these whose number is a multiple is too long."""
    rows = [{**row, "label": n % 2 == 0} for n, row in enumerate(records(1200))]
    for row in rows[::every]:
        row["completion"] = "long " * 40
    return write_jsonl(folder / "log.jsonl", rows)


@pytest.mark.parametrize("sample", [None, 1200])
def test_the_classes_of_steps_are_those_that_the_class_weights_are_made_of(sample: int | None, tmp_path: Path) -> None:
    rows = streamed(half_long(tmp_path, 4), sample=sample, limits=DROP)
    up, down = rows.class_counts
    assert (up, down) == (600, 600)
    order, data = rows.order(8, balanced=False, shuffle_buffer=100), dataset(rows)
    drawn = [row for step in range(order.steps_per_epoch) for row in order.rows_of_step(step)]
    assert sum(row["thumbs_up"] for row in data.__getitems__(drawn)) == 600


def test_rows_are_tokenized_in_advance_to_say_how_many_of_a_class_will_be_replaced(tmp_path: Path) -> None:
    assert str(streamed(half_long(tmp_path, 4), limits=DROP)).splitlines()[1:] == [
        f"  of 600 thumbs-up drawn evenly, 50.0% will be replaced by others of their class: {COMPLETION_TOO_LONG}: 300"
    ]
    assert len(str(streamed(half_long(tmp_path, 2000))).splitlines()) == 1


def test_of_a_rare_class_and_a_long_log_as_many_rows_are_tokenized_in_advance(tmp_path: Path) -> None:
    rows = [{**row, "label": n % 20 == 0} for n, row in enumerate(records(12_000))]
    for row in rows[:6000]:
        row["completion"] = "long " * 40
    lines = str(streamed(write_jsonl(tmp_path / "log.jsonl", rows), limits=DROP)).splitlines()[1:]
    assert lines[0].startswith("  of 600 thumbs-up drawn evenly, 50.0% ")
    assert lines[1].startswith("  of 1024 thumbs-down drawn evenly, 50.0% ")


@pytest.mark.parametrize("sample", [None, 600, 1200])
def test_a_class_without_a_usable_row_is_refused_with_reason_and_remedy(sample: int | None, tmp_path: Path) -> None:
    path = half_long(tmp_path, 2)
    with pytest.raises(FeedbackRowError) as caught:
        streamed(path, sample=sample, limits=DROP)
    assert caught.value.where == path
    assert caught.value.problem.startswith("expected usable rows of both classes, found none among ")
    assert f" thumbs-up drawn evenly ({COMPLETION_TOO_LONG}: " in caught.value.problem
    assert caught.value.remedy.startswith("Raise data.max_length")
    assert ("data.streaming_sample" in caught.value.remedy) is (sample == 600)


def test_a_row_that_no_template_takes_stops_a_strict_run_before_its_first_step(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{% if m.content == 'p7' %}{{ raise_exception('no') }}{% endif %}"
                        "{{ m.role }}: {{ m.content }}\n{% endfor %}")  # fmt: skip
    path = write_jsonl(tmp_path / "log.jsonl", records(20))
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl:8: "):
        streamed(path, chat_template=str(template))
    found = streamed(path, chat_template=str(template), bad_rows="skip")
    assert "of 13 thumbs-up drawn evenly, 7.7% will be replaced by others of their class: malformed: 1" in str(found)


def test_the_other_row_is_of_the_same_source(tmp_path: Path) -> None:
    long_file, other = long_log(tmp_path), write_jsonl(tmp_path / "other.jsonl", records(300))
    data = dataset(streamed(long_file, other, limits=DROP))
    assert all(sample["source"] == 0 for sample in data.__getitems__(range(300)))
    assert all(sample["source"] == 1 for sample in data.__getitems__(range(300, 600)))


def test_where_a_whole_block_is_unusable_the_other_row_is_of_another(tmp_path: Path) -> None:
    rows = [{**row, "completion": "long " * 40} if n < 256 else row for n, row in enumerate(records(600))]
    data = dataset(streamed(write_jsonl(tmp_path / "log.jsonl", rows), limits=DROP))
    assert all(sample["row_id"] >= 256 for sample in data.__getitems__(range(0, 256, 32)))


def test_where_no_row_is_usable_it_ends_with_words(tmp_path: Path) -> None:
    rows = streamed(long_log(tmp_path, every=1))
    data = StreamDataset(rows.index, byte_tokenizer(), reading_options(DROP))
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl:8: expected a usable row .* found 1000 others"):
        data[7]


def malformed_log(folder: Path) -> str:
    rows: list[Any] = records(600)
    rows[500] = {"prompt": "p"}
    return write_jsonl(folder / "log.jsonl", rows)


def test_a_malformed_row_outside_of_the_sample_stops_a_strict_run_and_names_its_line(tmp_path: Path) -> None:
    data = dataset(streamed(malformed_log(tmp_path), sample=20))
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl:501: expected a column 'completion'"):
        data.__getitems__([499, 500])


def test_a_malformed_row_outside_of_the_sample_is_replaced_where_it_may_be_skipped(tmp_path: Path) -> None:
    rows = streamed(malformed_log(tmp_path), sample=20, bad_rows="skip")
    data = dataset(rows)
    first, other = data.__getitems__([499, 500])
    assert first["row_id"] == 499
    assert other["row_id"] != 500
    assert data.replaced()["malformed"].places == [f"{tmp_path / 'log.jsonl'}:501"]


def loaded(data: StreamDataset, rows: StreamedRows, num_workers: int, step: int = 0, **options: Any) -> list[list[int]]:
    """Row ids of each micro-batch from a step to the end of its epoch."""
    order = rows.order(8, balanced=False, shuffle_buffer=50)
    sampler = StepBatchSampler(
        order,
        batch_size=4,
        accumulation=2,
        rank=0,
        world_size=1,
        current_step=lambda: step,
    )
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers, **options)
    return [batch.row_ids_B.tolist() for batch in loader]


def test_loader_workers_give_what_one_process_gives_and_count_together(tmp_path: Path) -> None:
    rows = streamed(long_log(tmp_path), limits=DROP)
    data = dataset(rows)
    alone = loaded(data, rows, 0)
    counted = data.replaced()[COMPLETION_TOO_LONG].count
    assert len(alone) == 2 * 38
    assert loaded(data, rows, 2) == alone
    assert data.replaced()[COMPLETION_TOO_LONG].count == 2 * counted
    assert loaded(data, rows, 2, step=7) == alone[14:]


def test_loader_workers_that_are_started_afresh_give_and_count_the_same(tmp_path: Path) -> None:
    rows = streamed(long_log(tmp_path), limits=DROP)
    data = dataset(rows)
    alone = loaded(data, rows, 0, step=30)
    counted = data.replaced()[COMPLETION_TOO_LONG].count
    assert loaded(data, rows, 1, step=30, multiprocessing_context="spawn") == alone
    assert data.replaced()[COMPLETION_TOO_LONG].count == 2 * counted > 0


def test_loader_workers_open_a_parquet_file_of_their_own(tmp_path: Path) -> None:
    # Larger than what a reader has in its own memory of a file.
    large = [{**row, "completion": np.random.default_rng(n).bytes(4000).hex()} for n, row in enumerate(records(600))]
    pq.write_table(pa.Table.from_pylist(large), tmp_path / "log.parquet", row_group_size=100)
    rows = streamed(str(tmp_path / "log.parquet"))
    data = StreamDataset(rows.index, byte_tokenizer(), rows.options, cache_bytes=1)
    alone = loaded(data, rows, 0)  # leaves the file open, somewhere in its middle
    assert sorted(row for batch in alone for row in batch) == list(range(600))
    assert loaded(data, rows, 2) == alone
    for batch in DataLoader(data, batch_sampler=alone, collate_fn=list, num_workers=2):
        for sample in batch:
            said = byte_tokenizer().decode(sample["input_ids"])
            assert f"p{sample['row_id']}<" in said


def test_a_pass_over_a_parquet_file_decodes_it_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_UNIT_ROWS", 500)
    pq.write_table(pa.Table.from_pylist(records(20_000)), tmp_path / "log.parquet", row_group_size=4000)
    rows, decoded = streamed(str(tmp_path / "log.parquet")), []
    advance = tables._Cursor._advance
    monkeypatch.setattr(tables._Cursor, "_advance", lambda cursor: decoded.append(1) or advance(cursor))
    order, data = rows.order(8, balanced=False, shuffle_buffer=2000), rows.dataset(byte_tokenizer(), 8, 8, False, 2000)
    for step in range(order.steps_per_epoch):
        for number in order.rows_of_step(step):
            data.place_of(number)
    assert len(decoded) < 10 * len(rows.index.blocks)


def test_a_malformed_row_stops_a_run_from_within_a_loader_worker(tmp_path: Path) -> None:
    data = dataset(streamed(malformed_log(tmp_path), sample=20))
    loader = DataLoader(data, batch_sampler=[[0, 500]], num_workers=1, collate_fn=collate)
    with pytest.raises(FeedbackRowError) as caught:
        list(loader)
    assert caught.value.where == f"{tmp_path / 'log.jsonl'}:501"
    assert str(caught.value).startswith(f"{caught.value.where}: expected a column 'completion', found 'prompt'.")
    assert "Traceback" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


def test_a_file_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", records(100))
    data = dataset(streamed(path, sample=5, bad_rows="skip"))
    text = Path(path).read_text()
    # Fewer rows; and as many, of the same length, of which one has another thumb.
    for now in ("".join(text.splitlines(keepends=True)[:50]), text.replace('"label": true', '"label":false', 1)):
        Path(path).write_text(now)
        with pytest.raises(FeedbackRowError, match=r"log\.jsonl: expected the records that it had when the run began"):
            data[3]
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl: expected a feedback log, found no such file"):
        data[3]


def test_the_blocks_that_are_kept_take_a_bounded_amount_of_memory(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", [{**row, "prompt": "long " * 200} for row in records(3000)])
    data = StreamDataset(streamed(path).index, byte_tokenizer(), reading_options(), cache_bytes=600_000)
    for start in range(0, 3000, 50):
        data.__getitems__(range(start, start + 50))
        kept = list(data._blocks.contents.values())
        assert data._blocks.bytes_kept == sum(content.num_bytes for content in kept) <= 600_000
    assert len(kept) == 2


def test_of_a_rare_class_only_its_own_rows_are_kept(tmp_path: Path) -> None:
    rare = [{**row, "label": n % 50 == 0} for n, row in enumerate(records(1000))]
    rows = streamed(write_jsonl(tmp_path / "log.jsonl", rare))
    data = dataset(rows, balanced=True)
    data.__getitems__(range(0, 1000, 50))
    assert sum(len(content) for content in data._blocks.contents.values()) == 20
    assert [data[number]["thumbs_up"] for number in (50, 51, 700)] == [True, False, True]


def test_a_sample_tells_shares_of_what_it_did_not_see(tmp_path: Path) -> None:
    rows: list[Any] = [{**row, "label": n % 4 == 0} for n, row in enumerate(records(4000))]
    path = write_jsonl(tmp_path / "log.jsonl", rows)
    found = streamed(path, sample=800)
    assert found.is_sampled
    assert found.num_rows == 4000
    assert found.counts.read == found.counts.used == 800
    up, down = found.class_counts
    assert up + down == pytest.approx(4000)
    assert up == pytest.approx(1000, rel=0.2)
    assert "estimates from 800 of 4000 rows" in str(found)
    assert found.index.dialects[0].labels.candidates == ((True, False),)


def test_a_sample_has_rows_of_every_source(tmp_path: Path) -> None:
    large = write_jsonl(tmp_path / "large.jsonl", records(5000))
    small = write_jsonl(tmp_path / "small.jsonl", [{**row, "label": 1} for row in records(2)])
    found = streamed(large, small, sample=40)
    assert sum(found.counts.by_source[small]) >= 1
    assert sum(found.class_counts) == pytest.approx(5002)
    assert dataset(found)[5001]["source"] == 1


def test_a_sample_counts_what_the_limits_cut_and_leave_out(tmp_path: Path) -> None:
    path = long_log(tmp_path, every=2)
    cut, dropped = (streamed(path, sample=300, limits=limits).counts for limits in ({}, DROP))
    assert cut.cut["completions cut"] == dropped.left_out[COMPLETION_TOO_LONG].count == 150
    assert dropped.read == dropped.used + 150 == 300


@pytest.mark.parametrize("sample", [None, 10, 1000])
def test_a_log_of_which_no_row_can_be_used_is_refused_with_the_reasons(sample: int | None, tmp_path: Path) -> None:
    rows = [{**row, "label": ("meh", "unsure")[n % 2]} for n, row in enumerate(records(100))]
    path = write_jsonl(tmp_path / "log.jsonl", rows)
    columns = Columns(thumbs={"meh": "drop", "good": "up", "bad": "down"})
    options = {"row_format": RowFormat(columns=columns), "bad_rows": "skip", "max_bad_rows": 1.0}
    with pytest.raises(FeedbackRowError) as caught:
        streamed(path, sample=sample, **options)
    assert caught.value.where == "train"
    assert f"{DROPPED_LABEL}: " in caught.value.remedy
    assert ("Raise data.streaming_sample" in caught.value.remedy) is (sample == 10)
    if sample != 10:
        assert caught.value.problem == "expected rows to use, found none (50 left out, 50 malformed)."
        assert caught.value.remedy == f"{DROPPED_LABEL}: 50"


def test_a_sample_of_one_class_alone_says_that_it_is_one(tmp_path: Path) -> None:
    rows = [{**row, "label": n > 0} for n, row in enumerate(records(1000))]
    path = write_jsonl(tmp_path / "log.jsonl", rows)
    with pytest.raises(FeedbackRowError) as caught:
        streamed(path, sample=5)
    assert str(caught.value) == (
        f"{path}: expected thumbs of both kinds in a sample of 5 of 1000 rows, found 5 that are all thumbs-up. "
        "Raise data.streaming_sample, or leave it out to read all rows."
    )
    assert streamed(path).counts.down == 1


def test_weights_count_in_the_classes_of_an_epoch(tmp_path: Path) -> None:
    ups = write_jsonl(tmp_path / "ups.jsonl", [{**row, "label": True} for row in records(30)])
    downs = write_jsonl(tmp_path / "downs.jsonl", [{**row, "label": False} for row in records(20)])
    rows = streamed(ups, downs, weights=(1.0, 3.0))
    assert rows.class_counts == (30, 60)
    assert rows.order(9, balanced=False, shuffle_buffer=50).steps_per_epoch == 10


def test_rows_of_a_sample_are_given_as_far_as_they_are_usable(tmp_path: Path) -> None:
    rows = streamed(long_log(tmp_path), limits=DROP)
    numbers = [found.number for found in rows.sample(byte_tokenizer(), 100)]
    assert 60 < len(numbers) < 100
    assert all(number % 5 for number in numbers)
    assert max(np.diff(numbers)) < 30  # from all over


def test_options_that_need_all_rows_at_once_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", records(10))
    with pytest.raises(ConfigError, match=r"data\.conflicts: expected keep with data\.streaming.*found drop"):
        streamed(path, conflicts="drop")
    with pytest.raises(ConfigError, match=r"data\.balanced_sampling: expected false where only a sample"):
        streamed(path, sample=5).order(8, balanced=True, shuffle_buffer=10)
    with pytest.raises(ConfigError, match=r"data\.streaming_sample: expected at least 1 row, found 0"):
        streamed(path, sample=0)


@pytest.mark.parametrize("sample", [None, 1200])
def test_another_process_of_the_node_has_the_same_rows(sample: int | None, tmp_path: Path) -> None:
    path = half_long(tmp_path, 4)
    rows = streamed(path, sample=sample, limits=DROP)
    assert rows.class_counts == (600, 600)
    shared = StreamedRows.shared(json.loads(json.dumps(rows.told())), rows.index.sources, rows.options)
    assert (shared.digest, shared.class_counts, shared.counts) == (rows.digest, rows.class_counts, rows.counts)
    assert dataset(shared).__getitems__(range(100)) == dataset(rows).__getitems__(range(100))


def test_outcomes_are_not_replaced(tmp_path: Path) -> None:
    data = dataset(streamed(long_log(tmp_path), limits=DROP))
    left_out, used = data.outcomes([0, 1])
    assert left_out.reason == COMPLETION_TOO_LONG
    assert isinstance(used.row, FeedbackRow)
    assert isinstance(used.sample, TokenizedSample)
    assert data.replaced() == {}
