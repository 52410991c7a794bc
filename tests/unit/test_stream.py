"""A stream gives what a table gives, and another usable row where its tokens show one to be unusable."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from bco_lightning import FeedbackDataModule, Source
from bco_lightning.data.collate import collate
from bco_lightning.data.stream import StreamDataset
from bco_lightning.data.tokenize import COMPLETION_TOO_LONG
from bco_lightning.errors import FeedbackRowError
from tests.conftest import write_jsonl
from tests.reliability.tiny_run import byte_tokenizer
from tests.unit.made_rows import records_of
from tests.unit.test_formats import ACCOUNTS, BESIDE, LOGS, OPTIONS
from tests.unit.test_public_sets import SETS, source_of

DROP = {"long_completions": "drop"}


def records(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"p{n}", "completion": f"c{n}", "label": n % 3 > 0} for n in range(start, start + count)]


def read(*sources: Any, streaming: bool = True, **options: Any) -> FeedbackDataModule:
    defaults = {"max_length": 64, "batch_size": 8, "validation_fraction": 0.0, "tokenizer": byte_tokenizer()}
    module = FeedbackDataModule(list(sources), **{**defaults, "streaming": streaming, **options})
    module.setup("fit")
    return module


def rows_of(module: FeedbackDataModule) -> StreamDataset:
    return module.train_dataloader().dataset  # type: ignore[return-value]


def sources_of_every_kind(folder: Path) -> list[Any]:
    """500 rows, two of a pair at a time among them; one is malformed, and two of the pairs say nothing."""
    pq.write_table(pa.Table.from_pylist(records(100, 200)), folder / "b.parquet", row_group_size=30)
    Dataset.from_list(records(60, 300)).save_to_disk(str(folder / "c"))
    pairs = [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n % 9 and n}"} for n in range(20)]
    pairs[3]["rejected"] = pairs[3]["chosen"]
    pairs[4]["prompt"] = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "It is"}]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    talks = [{"prompt": talk, "completion": f"c{n} " * (n % 20 + 1), "label": n % 2 == 0} for n in range(100)]
    return [
        write_jsonl(folder / "a.jsonl", [*records(200), {"prompt": "p"}]),
        Source(str(folder / "b.parquet"), weight=0.5),
        str(folder / "c"),
        write_jsonl(folder / "d.jsonl", pairs),
        Source(write_jsonl(folder / "e.jsonl", talks), weight=2.0),
    ]


def written(records: list[dict[str, Any]], path: Path) -> str:
    """A file or folder of records, by its suffix; a table has ``Json()`` where their types differ."""
    if path.suffix == ".jsonl":
        return write_jsonl(path, records)
    names = dict.fromkeys(name for record in records for name in record)
    filled = [{name: record.get(name) for name in names} for record in records]
    dataset = Dataset.from_list(filled, on_mixed_types="use_json")
    dataset.to_parquet(path) if path.suffix else dataset.save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""])
def test_a_stream_of_every_format_gives_what_a_table_gives_whatever_comes_first(suffix: str, tmp_path: Path) -> None:
    sources = [Source(written(records(6), tmp_path / f"both{suffix}"), name="both")]
    for name in ACCOUNTS:
        log = [{}, *(record for _, record in records_of(str(LOGS / name)))]
        path, rating = written(log, (tmp_path / name).with_suffix(suffix)), OPTIONS.get(name)
        beside = str(LOGS / BESIDE[name]) if name in BESIDE else None
        sources.append(Source(path, name=name, rating=rating and rating.rating, feedback=beside))
    thumbs = {name: (up, used - up) for name, (used, up, *_) in ACCOUNTS.items()}
    for number, (name, options, told) in enumerate(SETS):
        source = source_of(name, options)
        log = [{}, *(record for _, record in records_of(source.path))]
        path = written(log, (tmp_path / f"{number}").with_suffix(suffix))
        sources.append(replace(source, path=path, name=f"{number}"))
        thumbs[f"{number}"] = tuple(map(int, re.findall(r"(\d+) (?:up|down)", told)))
    skipping: dict[str, Any] = {"bad_rows": "skip", "max_bad_rows": 1.0, "max_length": 2000}
    table, stream = (read(*sources, streaming=streaming, **skipping) for streaming in (False, True))
    known, [counts], [streamed] = table.train_dataset, table.counts, stream.counts
    assert counts.by_source == streamed.by_source
    expected, (unseen,) = {"both": (4, 2), **thumbs}, {n.count for why, n in counts.left_out.items() if "none" in why}
    assert counts.by_source.keys() == expected.keys()
    short = {name: sum(each) - sum(counts.by_source[name]) for name, each in expected.items()}
    assert (min(short.values()), sum(short.values())) == (0, unseen)  # rows with images, which this model does not see
    assert [streamed.read, streamed.left_out, streamed.malformed, streamed.formats, streamed.columns] == [
        counts.read, counts.left_out, counts.malformed, counts.formats, counts.columns
    ]  # fmt: skip
    drawn = rows_of(stream).__getitems__(range(len(known)))
    assert [sample["input_ids"] for sample in drawn] == known["input_ids"][:]


@pytest.mark.parametrize("options", [{}, {"balanced_sampling": True}, {"conflicts": "drop"}], ids=str)
def test_a_stream_has_the_rows_the_order_and_the_counts_of_a_table(options: dict, tmp_path: Path) -> None:
    sources = sources_of_every_kind(tmp_path)
    table, stream = (
        read(*sources, streaming=streaming, bad_rows="skip", max_bad_rows=0.1, **options) for streaming in (False, True)
    )
    known, (counts,), (streamed,) = table.train_dataset, table.counts, stream.counts
    assert [streamed.read, streamed.up, streamed.down, streamed.left_out, streamed.malformed, streamed.by_source] == [
        counts.read, counts.up, counts.down, counts.left_out, counts.malformed, counts.by_source
    ]  # fmt: skip
    assert str(stream.feedback_summary) == str(table.feedback_summary)
    assert stream.class_frequencies == table.class_frequencies
    assert stream.steps_per_epoch == table.steps_per_epoch
    assert stream.fingerprints()["row_digest"] == table.fingerprints()["row_digest"]
    assert len(rows_of(stream)) == len(known)
    numbers = np.random.default_rng(0).permutation(len(known)).tolist()
    for number, sample in zip(numbers, rows_of(stream).__getitems__(numbers), strict=True):
        expected = known[number]
        assert {name: sample[name] for name in sample if name != "prompt"} == {
            name: expected.get(name, () if name == "images" else 0) for name in sample if name != "prompt"
        }
        assert stream.training.place_of(number) == expected["place"]
    for one, other in zip(table.train_dataloader(), stream.train_dataloader(), strict=True):
        assert one.row_ids_B.tolist() == other.row_ids_B.tolist()
        assert one.input_ids_S.tolist() == other.input_ids_S.tolist()


def test_the_second_start_finds_the_places(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    sources = sources_of_every_kind(tmp_path)
    first, second = (read(*sources, bad_rows="skip", max_bad_rows=0.1) for _ in range(2))
    assert caplog.text.count("rows: found as they were") == 1
    assert first.fingerprints() == second.fingerprints()
    assert [str(counts) for counts in first.counts] == [str(counts) for counts in second.counts]
    assert rows_of(first)[7] == rows_of(second)[7]


def test_rows_that_lie_near_each_other_are_read_together(tmp_path: Path) -> None:
    long = [{**row, "prompt": f"{n} " + "long " * 400} for n, row in enumerate(records(2000))]
    module = read(write_jsonl(tmp_path / "log.jsonl", long), shuffle_buffer=400, max_length=4000)
    regions = rows_of(module).regions()
    assert 10 < len(np.unique(regions)) < 30
    drawn = [row for batch in module.train_dataloader().batch_sampler for row in batch]  # type: ignore[union-attr]
    assert sorted(drawn) == list(range(2000))
    assert all(len(np.unique(regions[drawn[start : start + 200]])) < 10 for start in range(0, 2000, 200))
    assert np.abs(np.corrcoef(drawn, np.arange(2000))[0, 1]) < 0.4


def long_log(folder: Path, every: int = 5, name: str = "log.jsonl") -> str:
    """Each fifth row has a completion that is over the limit."""
    rows = [{**row, "completion": "long " * 40} if n % every == 0 else row for n, row in enumerate(records(300))]
    return write_jsonl(folder / name, rows)


def test_an_unusable_row_is_replaced_by_one_of_its_class_and_source_and_counted(tmp_path: Path, caplog: Any) -> None:
    module = read(long_log(tmp_path), write_jsonl(tmp_path / "other.jsonl", records(300)), **DROP)
    data = rows_of(module)
    samples = data.__getitems__(range(600))
    for number, sample in enumerate(samples):
        assert (sample["row_id"] == number) == (number % 5 > 0 or number >= 300)
        assert sample["thumbs_up"] is (number % 3 > 0)
        assert sample["source"] == (number >= 300)
    others = [sample["row_id"] for number, sample in enumerate(samples[:300]) if number % 5 == 0]
    assert len(set(others)) > 30
    assert data.num_replaced >= 60
    assert caplog.text.count("is replaced by another row of its class, and so is each like it") == 1
    assert f"log.jsonl:1 is replaced by another row of its class, and so is each like it: {COMPLETION_TOO_LONG}" in (
        caplog.text
    )
    module.teardown("fit")
    assert f"process 0: {data.num_replaced} rows of the stream were replaced by others" in caplog.text
    # The seed and the number alone choose.
    assert [rows_of(module)[number]["row_id"] for number in range(295, -1, -5)] == others[::-1]
    again = rows_of(read(long_log(tmp_path), seed=1, **DROP))
    assert [again[number]["row_id"] for number in range(0, 300, 5)] != others


def test_where_a_source_has_no_usable_row_of_a_class_the_other_row_is_of_another_source(tmp_path: Path) -> None:
    rows = [{**row, "completion": "long " * 40} if row["label"] else row for row in records(30)]
    paths = write_jsonl(tmp_path / "long.jsonl", rows), write_jsonl(tmp_path / "other.jsonl", records(30))
    for number, found in enumerate(rows_of(read(*paths, **DROP)).__getitems__(range(30))):
        assert found["thumbs_up"] is (number % 3 > 0)
        assert found["source"] == (number % 3 > 0)


def test_where_no_row_is_usable_it_ends_with_words(tmp_path: Path) -> None:
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl:8: expected a usable row .* found 1000 others"):
        rows_of(read(long_log(tmp_path, every=1), **DROP))[7]


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader_workers_give_what_one_process_gives_and_count_together(start_method: str, tmp_path: Path) -> None:
    parquet = tmp_path / "large.parquet"  # larger than what a reader has in its own memory of a file
    large = [{**row, "prompt": np.random.default_rng(n).bytes(2000).hex()} for n, row in enumerate(records(200))]
    pq.write_table(pa.Table.from_pylist(large), parquet, row_group_size=50)
    module = read(long_log(tmp_path), str(parquet), **DROP)
    loader = module.train_dataloader()
    data: Any = loader.dataset
    options = {"batch_sampler": list(loader.batch_sampler), "collate_fn": collate}  # type: ignore[call-overload]
    alone = [batch.input_ids_S.tolist() for batch in DataLoader(data, **options)]
    counted = data.num_replaced
    workers = DataLoader(data, **options, num_workers=2, multiprocessing_context=start_method)
    assert [batch.input_ids_S.tolist() for batch in workers] == alone
    assert data.num_replaced == 2 * counted > 0


def refusing_template(folder: Path) -> str:
    template = folder / "template.jinja"
    template.write_text("{% for m in messages %}{% if m.content == 'p7' %}{{ raise_exception('no') }}{% endif %}"
                        "{{ m.role }}: {{ m.content }}\n{% endfor %}")  # fmt: skip
    return str(template)


def test_a_row_that_the_template_refuses_stops_a_strict_run_from_within_a_loader_worker(tmp_path: Path) -> None:
    log, template = write_jsonl(tmp_path / "log.jsonl", records(20)), refusing_template(tmp_path)
    data = rows_of(read(log, chat_template=template))
    with pytest.raises(FeedbackRowError) as caught:
        list(DataLoader(data, batch_sampler=[[0, 7]], num_workers=1, collate_fn=collate))
    assert caught.value.where == f"{tmp_path / 'log.jsonl'}:8"
    assert "Traceback" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301
    replaced = rows_of(read(log, chat_template=template, bad_rows="skip"))
    assert replaced[7]["row_id"] != 7


def test_a_file_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", records(100))
    text = Path(path).read_text()
    for now in ("".join(text.splitlines(keepends=True)[:3]), text.replace('"label": true', '"label":false')):
        Path(path).write_text(text)
        data = rows_of(read(path))
        Path(path).write_text(now)
        with pytest.raises(FeedbackRowError, match=r"log\.jsonl: expected the records that it had when the run began"):
            data[4]


def test_a_sample_as_a_table_is_of_rows_from_all_over_as_far_as_they_are_usable(tmp_path: Path) -> None:
    module = read(long_log(tmp_path), **DROP)
    sample = module.training.table(100)
    lines = [int(place.rpartition(":")[2]) for place in sample["place"]]
    assert 60 < len(lines) < 100
    assert all((line - 1) % 5 for line in lines)
    assert max(np.diff(lines)) < 30
    assert Counter(sample["source"][:]) == {0: len(lines)}


def test_nothing_is_held_out_of_a_stream_and_validation_files_are_a_table(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    log, held_out = write_jsonl(tmp_path / "a.jsonl", records(50)), write_jsonl(tmp_path / "b.jsonl", records(9))
    assert read(log, validation_fraction=0.1).validation_dataset is None
    assert "validation: nothing is held out of a stream; give data.validation_files to measure it" in caplog.text
    module = read(log, validation_files=held_out)
    assert len(module.validation_dataset) == 9
    assert "9 validation rows have a prompt that is trained on too" in str(module.feedback_summary)
