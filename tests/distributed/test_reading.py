"""One process of each node reads; all of them have the same rows, and together they use every row as promised."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from bco_lightning import BCOModule, FeedbackDataModule
from bco_lightning.cli import app as cli
from bco_lightning.data.row_sets import RowReader
from bco_lightning.data.tokenize import RowTokenizer
from tests.reliability.tiny_run import finish, make_log, make_model, start, tiny_fit, wait

ROWS, HELD_OUT, ROWS_PER_STEP, STEPS_PER_EPOCH = 51, 13, 8, 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


class Watch(Callback):
    """Notes the rows of each validation, and the data module's files while they are in use."""

    def __init__(self) -> None:
        self.validated: list[list[int]] = []
        self.files: dict[str, int] = {}

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        self.validated.append([])
        self.files = files_of(trainer.datamodule)

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.validated[-1] += batch.row_ids_B.tolist()


def files_of(data: FeedbackDataModule) -> dict[str, int]:
    """The file behind each data set."""
    datasets = {"train": data.train_dataset, "validation": data.validation_dataset}
    return {name: Path(rows.cache_files[0]["filename"]).stat().st_ino for name, rows in datasets.items() if rows}


def mapped() -> set[int]:
    """The files that this process maps."""
    return {int(line.split()[4]) for line in Path("/proc/self/maps").read_text().splitlines()}


def drawn(model: str, log: str, held_out: str, ranks: int) -> dict[str, Any]:
    """Trains for two epochs and returns what this process has read and used."""
    tempfile.tempdir = f"{Path(log).parent}/temporary"
    tokenized = []
    tokenize, setup = RowTokenizer.tokenize, FeedbackDataModule.setup
    found: dict[str, Any] = {}

    def noted_tokenize(self: Any, items: Any) -> Any:
        for item in tokenize(self, items):
            tokenized.append(item)
            yield item

    def noted_setup(self: Any, stage: Any = None) -> None:
        setup(self, stage)
        found["derived"] = {
            "counts": [str(counts) for counts in self.counts],
            "feedback": self.feedback_summary,
            "fingerprints": self.fingerprints(),
            "class frequencies": self.class_frequencies,
            "rows": [list(self.train_dataset), list(self.validation_dataset)],
        }

    RowTokenizer.tokenize, FeedbackDataModule.setup = noted_tokenize, noted_setup  # type: ignore[method-assign]
    watch = Watch()
    options = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "accumulate_grad_batches": 2}
    state = tiny_fit(
        model, log, callbacks=[watch], trainer_options=options,
        data_options={
            "validation_files": held_out, "batch_size": ROWS_PER_STEP // 2 // ranks, "num_workers": 2,
            "group_by_prompt": True, "cache_rows": False,  # the second run would find the rows of the first
        },
    )  # fmt: skip
    assert set(watch.files.values()) <= mapped()
    return {
        **found, "rows": state["rows"], "validated": watch.validated, "files": watch.files,
        "tokenized": len(tokenized),
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of one process, and one of two; what each process returned and printed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "temporary").mkdir()
    lines = Path(make_log(folder / "x.jsonl", ROWS)).read_text().splitlines(keepends=True)
    log = folder / "log.jsonl"
    log.write_text("".join(lines).replace('"q5', '"q1'))  # some prompts with several answers, apart from each other
    held_out = make_log(folder / "held_out.jsonl", HELD_OUT, seed=1)
    found: dict[str, Any] = {}
    for ranks in (1, 2):
        own = folder / str(ranks)
        processes = start(partial(drawn, model, str(log), held_out, ranks), ranks=ranks, folder=own)
        found[str(ranks)] = finish(processes, own)
        found[f"output {ranks}"] = [(own / f"output.{rank}").read_text() for rank in range(ranks)]
    found["left behind"] = list((folder / "temporary").iterdir())
    return found


def test_every_row_is_drawn_as_often_as_any_other_give_or_take_the_pass_that_is_under_way(runs: dict) -> None:
    steps = [one["rows"] for one in runs["2"]]
    assert steps[0].keys() == steps[1].keys() == set(range(2 * STEPS_PER_EPOCH))
    times: Counter[int] = Counter(dict.fromkeys(range(ROWS), 0))
    for step in range(2 * STEPS_PER_EPOCH):
        rows = [row for rank in (0, 1) for row in steps[rank][step]]
        assert len(rows) == ROWS_PER_STEP
        times.update(rows)
        assert max(times.values()) - min(times.values()) <= 1  # a pass is drawn whole before the next begins
        if step == STEPS_PER_EPOCH - 1:  # an epoch: each row once, and what the last step lacks from the next pass
            assert Counter(times.values()) == {1: ROWS - 5, 2: 5}


def test_a_step_has_the_same_rows_with_one_process_and_with_two(runs: dict) -> None:
    ((one,), (first, second)) = runs["1"], runs["2"]
    for step, rows in one["rows"].items():
        assert sorted(first["rows"][step] + second["rows"][step]) == sorted(rows)


def test_every_validation_row_is_evaluated_once(runs: dict) -> None:
    first, second = (one["validated"] for one in runs["2"])
    assert len(first) == len(second) == 2
    for validation in zip(first, second, strict=True):
        assert sorted(row for rows in validation for row in rows) == list(range(HELD_OUT))


def test_the_second_process_maps_what_the_first_has_tokenized(runs: dict) -> None:
    first, second = runs["2"]
    assert (first["tokenized"], second["tokenized"]) == (ROWS + HELD_OUT, 0)
    assert first["files"] == second["files"]
    assert len(set(first["files"].values())) == 2


def test_all_processes_derive_the_same(runs: dict) -> None:
    ((one,), (first, second)) = runs["1"], runs["2"]
    assert first["derived"] == second["derived"]
    assert first["derived"]["rows"] == one["derived"]["rows"]
    assert first["derived"]["counts"] == one["derived"]["counts"]
    assert first["derived"]["feedback"] == one["derived"]["feedback"]


def test_what_became_of_the_rows_is_printed_once(runs: dict) -> None:
    for message in (f"train: {ROWS} rows read", f"validation: {HELD_OUT} rows read", "feedback: "):
        assert [output.count(message) for output in runs["output 2"]] == [1, 0]
        assert runs["output 1"][0].count(message) == 1


def test_no_temporary_file_is_left(runs: dict) -> None:
    assert runs["left behind"] == []


def fails(model: str, log: str, how: str) -> None:
    tempfile.tempdir = f"{Path(log).parent}/temporary"
    load = RowReader.read_training

    def slow_load(self: Any, *arguments: Any) -> Any:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "slowly":
            time.sleep(8)
        if how == "unexpectedly":
            raise KeyError("an error of ours")
        return load(self, *arguments)

    RowReader.read_training = slow_load  # type: ignore[method-assign]
    options = {
        "model.name_or_path": model, "data.train_files": log, "trainer.accelerator": "cpu", "trainer.devices": "2",
        "trainer.strategy": "ddp", "process_timeout": "5",
    }  # fmt: skip
    raise SystemExit(cli.main(["fit", *(f"--{name}={value}" for name, value in options.items())]))


BAD_ROW = r"error: \S*log\.jsonl:7: expected a column 'completion', found 'prompt', 'label'\."


@pytest.mark.parametrize(
    ("how", "codes", "messages"),
    [
        ("at once", [2, 2], [BAD_ROW] * 2),
        ("slowly", [2, 2], [BAD_ROW] * 2),  # longer than processes wait for each other
        ("unexpectedly", [1, 1], ["error: internal error: KeyError at", "error: internal error: RuntimeError at"]),
        ("killed", [-signal.SIGKILL, 2], ["", "error: processes: expected an answer of every process"]),
    ],
)
def test_where_reading_fails_all_processes_end_promptly_and_say_why(
    model: str, tmp_path: Path, how: str, codes: list[int], messages: list[str]
) -> None:
    log = Path(make_log(tmp_path / "log.jsonl", 20))
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:6], '{"prompt": "q", "label": true}', *lines[6:]]))
    (tmp_path / "temporary").mkdir()
    processes = start(partial(fails, model, str(log), how), ranks=2, folder=tmp_path)
    outputs = tmp_path / "output.0", tmp_path / "output.1"
    assert wait(processes, timeout=30) == codes, outputs[1].read_text()[-3000:]
    for output, message in zip(outputs, messages, strict=True):
        assert re.search(message, output.read_text()), output.read_text()
    assert list((tmp_path / "temporary").iterdir()) == []


def reads_on_its_own_node(model: str, logs: list[str]) -> dict[str, Any]:
    node = int(os.environ["RANK"])
    os.environ |= {"NODE_RANK": str(node), "LOCAL_RANK": "0"}
    data = FeedbackDataModule(logs[node], batch_size=2, max_length=96)
    trainer = Trainer(
        accelerator="cpu", devices=1, num_nodes=2, strategy="ddp", use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_steps=1,
    )  # fmt: skip
    trainer.fit(BCOModule(model, dtype="float32"), data)
    return {
        "files": files_of(data),
        "rows": [list(data.train_dataset["prompt"]), list(data.validation_dataset["prompt"])],
    }


def test_each_node_reads_its_own_copy(model: str, tmp_path: Path) -> None:
    logs = [make_log(tmp_path / f"node{node}.jsonl", 20) for node in (0, 1)]
    first, second = finish(start(partial(reads_on_its_own_node, model, logs), ranks=2, folder=tmp_path), tmp_path)
    assert first["rows"] == second["rows"]
    assert not set(first["files"].values()) & set(second["files"].values())


def test_nodes_with_different_rows_are_refused_on_all_of_them(model: str, tmp_path: Path) -> None:
    logs = [make_log(tmp_path / f"node{node}.jsonl", 20, seed=node) for node in (0, 1)]
    processes = start(partial(reads_on_its_own_node, model, logs), ranks=2, folder=tmp_path)
    assert wait(processes, timeout=30) == [1, 1]
    for rank in (0, 1):
        output = (tmp_path / f"output.{rank}").read_text()
        assert "FeedbackRowError: node 1: expected the rows that node 0 has read, found others (train" in output, output
