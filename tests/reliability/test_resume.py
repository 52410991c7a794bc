"""A resumed run is the run that never stopped: weights, optimizer, shift, metrics, random numbers and rows."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from bco_lightning import BCOModule, RunRecord, Source
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.checkpoints.folders import saved_steps, step_folder
from bco_lightning.checkpoints.manifest import resolve_checkpoint
from bco_lightning.errors import CheckpointError
from tests.reliability.tiny_run import ROWS, ROWS_PER_STEP, STEPS, assert_same, finish, make_log, start, tiny_fit
from tests.trials import Trials

STEPS_PER_EPOCH = ROWS // ROWS_PER_STEP


@pytest.fixture(scope="module")
def validation_log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_log(tmp_path_factory.mktemp("validation") / "held_out.jsonl", num_rows=13, seed=1)


def cut(
    accumulation: int = 1, workers: int = 0, ranks: int = 1, validation: str | None = None, strategy: str = "ddp"
) -> dict[str, Any]:
    """The tiny run with its eight rows per step cut over micro-batches and processes."""
    data: dict[str, Any] = {"batch_size": ROWS_PER_STEP // accumulation // ranks, "num_workers": workers}
    if validation:
        data["validation_files"] = validation
    trainer: dict[str, Any] = {"accumulate_grad_batches": accumulation, "devices": ranks}
    if ranks > 1:
        trainer["strategy"] = strategy
    return {"data_options": data, "trainer_options": trainer}


def saving(model: str, log: str, folder: str, steps: list[int], options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Trains to the end and keeps the checkpoints of the given steps, taken on the way."""

    class Keep(RunCheckpoint):
        def on_step_end(self, trainer: Any, module: Any, summary: Any) -> None:
            self.every_n_steps = summary.step if summary.step in steps else 10**9
            super().on_step_end(trainer, module, summary)

    options = {**options, "trainer_options": {**options["trainer_options"], "default_root_dir": folder}}
    return tiny_fit(model, log, callbacks=[Keep(keep=10**6)], **options, **more)


def resuming(model: str, log: str, folder: str, step: int, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    checkpoint = str(step_folder(Path(folder) / "checkpoints", step))
    options = {**options, "trainer_options": {**options["trainer_options"], "default_root_dir": f"{folder}/again"}}
    return tiny_fit(model, log, ckpt_path=checkpoint, callbacks=[RunCheckpoint(every_n_steps=10**9)], **options, **more)


def assert_goes_on(whole: dict[str, Any], resumed: dict[str, Any], step: int) -> None:
    """Everything at the end is equal, and every step after the resume saw the same rows and logged the same values."""
    for name in ("step", "weights", "moments", "learning_rate", "shift", "random"):
        assert_same(whole[name], resumed[name], name)
    assert resumed["rows"] == {number: rows for number, rows in whole["rows"].items() if number >= step}
    logged = {number: values for number, values in whole["values"].items() if number > step}
    assert logged.keys() <= resumed["values"].keys()
    for number, values in logged.items():
        assert_same(values, resumed["values"][number], f"values at step {number}")
    due = {name: value for name, value in whole["values"].get(step, {}).items() if name.startswith("val/")}
    assert_same(due, {name: resumed["values"][step][name] for name in due}, "validation that was due")


@pytest.mark.promise("R1", "A run resumed in a fresh process ends as the uninterrupted one, to the bit")
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    byte_model: str, feedback: str, validation_log: str, tmp_path: Path, trials: Trials
) -> None:
    steps = [1, 5, 11, 12, 13, 23]
    runs: dict[tuple[int, int], dict[str, Any]] = {}
    cases = [(step, workers, accumulation) for step in steps for workers in (0, 2) for accumulation in (1, 4)]
    for trial in trials(cases[1:] + cases[:1], quick=2):
        with trial as (step, workers, accumulation):
            options, folder = (
                cut(accumulation, workers, validation=validation_log),
                tmp_path / f"{workers}{accumulation}",
            )
            if (workers, accumulation) not in runs:
                whole = partial(saving, byte_model, feedback, str(folder), steps, options)
                (runs[workers, accumulation],) = finish(start(whole, folder=folder), folder)
            resumed = partial(resuming, byte_model, feedback, str(folder), step, options)
            (result,) = finish(start(resumed, folder=folder), folder)
            assert_goes_on(runs[workers, accumulation], result, step)
    # An oracle that cannot fail is none: a run of another length differs.
    shorter = tiny_fit(byte_model, feedback, trainer_options={"max_steps": 23})
    with pytest.raises(AssertionError):
        assert_same(next(iter(runs.values()))["weights"], shorter["weights"])


@pytest.mark.promise(
    "R1", "The same with adapters, balanced sampling, weighted sources, and validating within the epoch"
)
@pytest.mark.parametrize(
    "kind",
    [
        "lora",
        "validation within the epoch",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("balanced", "sources", "random numbers")),
    ],
)
def test_other_kinds_of_runs_resume_too(
    kind: str, byte_model: str, feedback: str, validation_log: str, tmp_path: Path, trials: Trials
) -> None:
    from bco_lightning import LoraSettings

    options = cut(accumulation=2, validation=validation_log)
    more: dict[str, Any] = {}
    if kind == "lora":
        more["module_options"] = {"lora": LoraSettings(r=4, alpha=8), "learning_rate": 1e-2}
    elif kind == "balanced":
        options["data_options"]["balanced_sampling"] = True
    elif kind == "sources":
        # Metrics of each source are gathered over steps, too.
        options["data_options"]["train_files"] = [Source(feedback, "one", 0.75), Source(validation_log, "other", 2.0)]
    elif kind == "random numbers":
        more["module"] = noisy_module(byte_model)
    else:
        options["trainer_options"]["val_check_interval"] = 10
    whole = saving(byte_model, feedback, str(tmp_path), [5, 12, 17], options, **more)
    for trial in trials([5, 12, 17], quick=3):
        with trial as step:
            if kind == "random numbers":
                more["module"] = noisy_module(byte_model)
            resumed = resuming(byte_model, feedback, str(tmp_path), step, options, **more)
            assert_goes_on(whole, resumed, step)


@pytest.mark.promise("R1", "A streamed run goes on exactly, on any number of processes")
def test_a_streamed_run_resumes_too(byte_model: str, feedback: str, tmp_path: Path, trials: Trials) -> None:
    runs: dict[int, list[dict[str, Any]]] = {}
    cases = [
        (ranks, after, workers, step)
        for ranks, after in ((2, 1), (2, 2), (1, 1), (1, 2))
        for workers in (2, 0)
        for step in (5, 12, 17)
    ]
    for trial in trials(cases, quick=1):
        with trial as (ranks, after, workers, step):
            folder = tmp_path / str(ranks)
            if ranks not in runs:
                whole = partial(saving, byte_model, feedback, str(folder), [5, 12, 17], streamed(ranks))
                runs[ranks] = finish(start(whole, ranks=ranks, folder=folder), folder)
            resumed = partial(resuming, byte_model, feedback, str(folder), step, streamed(after, workers))
            again = finish(start(resumed, ranks=after, folder=folder), folder)
            for number in range(step, STEPS):
                rows = sorted(row for run in again for row in run["rows"][number])
                assert rows == sorted(row for run in runs[ranks] for row in run["rows"][number])
            for name, value in runs[ranks][0]["weights"].items():
                assert float((value - again[0]["weights"][name]).abs().max()) <= (0 if ranks == after else 1e-6), name


def streamed(ranks: int, workers: int = 0) -> dict[str, Any]:
    options = cut(accumulation=2, ranks=ranks, workers=workers)
    options["data_options"] |= {"streaming": True, "shuffle_buffer": 40}
    return options


@pytest.mark.promise("R3", "The rows of a streamed step do not depend on workers, micro-batches or processes either")
def test_the_rows_of_a_streamed_step_do_not_depend_on_plumbing(
    byte_model: str, feedback: str, tmp_path: Path, trials: Trials
) -> None:
    cases = [(workers, rows, ranks) for workers in (2, 0) for rows in (1, 4) for ranks in (2, 1)]
    expected = {step: sorted(rows) for step, rows in tiny_fit(byte_model, feedback, **streamed(1))["rows"].items()}
    assert sorted(row for step in range(STEPS_PER_EPOCH) for row in expected[step]) == list(range(ROWS))
    for trial in trials(cases, quick=1):
        with trial as (workers, rows, ranks):
            options = streamed(ranks, workers)
            options["data_options"]["batch_size"] = rows
            options["trainer_options"]["accumulate_grad_batches"] = ROWS_PER_STEP // rows // ranks
            run = partial(tiny_fit, byte_model, feedback, **options)
            results = finish(start(run, ranks=ranks, folder=tmp_path), tmp_path)
            seen = {step: sorted(row for result in results for row in result["rows"][step]) for step in range(STEPS)}
            assert seen == expected


def noisy_module(model: str) -> Any:
    """A module whose loss draws random numbers, as dropout would, from all three generators."""
    import numpy as np
    import torch

    from bco_lightning import BCOModule

    module = BCOModule(model, learning_rate=1e-2, dtype="float32")
    losses = module.objective.losses

    def noisy(*arguments: Any, **options: Any) -> Any:
        return losses(*arguments, **options) * (1 + 0.1 * (torch.rand(()) + random.random() + np.random.rand()))

    module.objective.losses = noisy
    return module


@pytest.mark.promise("R2", "Over a stop and a resume no row is lost or repeated")
def test_no_row_is_lost_or_repeated(byte_model: str, feedback: str, tmp_path: Path, trials: Trials) -> None:
    drawn = random.Random(2)
    stops = [(drawn.randrange(1, STEPS), ranks) for ranks in (1, 2) for _ in range(20)]
    runs: dict[int, list[dict[str, Any]]] = {}
    for trial in trials(stops, quick=2):
        with trial as (step, ranks):
            options, folder = cut(ranks=ranks), tmp_path / str(ranks)
            if ranks not in runs:
                whole = partial(saving, byte_model, feedback, str(folder), list(range(1, STEPS)), options)
                runs[ranks] = finish(start(whole, ranks=ranks, folder=folder), folder)
            resumed = partial(resuming, byte_model, feedback, str(folder), step, options)
            again = finish(start(resumed, ranks=ranks, folder=folder), folder)
            for rank in range(ranks):
                before = {number: rows for number, rows in runs[ranks][rank]["rows"].items() if number < step}
                assert {**before, **again[rank]["rows"]} == runs[ranks][rank]["rows"]
                assert not before.keys() & again[rank]["rows"].keys()
            for epoch in range(2):
                numbers = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
                seen = [row for run in again for number in numbers if number >= step for row in run["rows"][number]]
                seen += [
                    row for run in runs[ranks] for number in numbers if number < step for row in run["rows"][number]
                ]
                assert sorted(seen) == list(range(ROWS))


@pytest.mark.promise("R3", "The rows of a step do not depend on workers, micro-batches or processes")
def test_the_rows_of_a_step_do_not_depend_on_plumbing(
    byte_model: str, feedback: str, tmp_path: Path, trials: Trials
) -> None:
    cases = [(workers, rows, ranks) for workers in (2, 1, 0) for rows in (1, 2, 4, 8) for ranks in (2, 1)]
    expected = {step: sorted(rows) for step, rows in tiny_fit(byte_model, feedback)["rows"].items()}
    for trial in trials(cases, quick=2):
        with trial as (workers, rows, ranks):
            # Two processes with micro-batches of eight rows would make sixteen rows a step: they have four.
            options = cut(accumulation=max(1, ROWS_PER_STEP // rows // ranks), workers=workers, ranks=ranks)
            run = partial(tiny_fit, byte_model, feedback, **options)
            results = finish(start(run, ranks=ranks, folder=tmp_path), tmp_path)
            seen = {step: sorted(row for result in results for row in result["rows"][step]) for step in range(STEPS)}
            assert seen == expected


@pytest.mark.promise("R5", "A run saved on some processes goes on, on another number of them, under DDP and FSDP2")
def test_a_run_goes_on_with_another_number_of_processes(
    byte_model: str, feedback: str, tmp_path: Path, trials: Trials
) -> None:
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    moves = [((2, "ddp"), (1, "")), ((1, ""), (2, "ddp")), ((2, "ddp"), (2, "ddp"))]
    moves += [((2, "fsdp2"), (1, "fsdp2")), ((1, "fsdp2"), (2, "fsdp2")), ((2, "fsdp2"), (2, "fsdp2"))]
    moves += [((2, "fsdp2"), (2, "ddp")), ((1, ""), (2, "fsdp2"))]
    cases = [(*move, step, cut_by) for move in moves for step in (5, 17) for cut_by in ("rows", "steps")]
    for trial in trials(cases, quick=2):
        with trial as (saved_at, resumed_at, step, cut_by):
            folder = tmp_path / f"{saved_at}"
            (ranks, strategy), (ranks_after, strategy_after) = saved_at, resumed_at
            if saved_at not in runs:
                options = with_strategy(cut(ranks=ranks, accumulation=2), strategy)
                whole = partial(saving, byte_model, feedback, str(folder), [5, 17], options)
                runs[saved_at] = finish(start(whole, ranks=ranks, folder=folder), folder)
            # The same eight rows of a step: in other micro-batches, or in another number of them.
            accumulation = 2 if cut_by == "rows" else 4 // ranks_after
            options = with_strategy(cut(ranks=ranks_after, accumulation=accumulation), strategy_after)
            resumed = partial(resuming, byte_model, feedback, str(folder), step, options)
            again = finish(start(resumed, ranks=ranks_after, folder=folder), folder)
            for name, value in runs[saved_at][0]["weights"].items():
                assert float((value - again[0]["weights"][name]).abs().max()) <= 1e-6, name
            assert again[0]["shift"]["value"] == pytest.approx(runs[saved_at][0]["shift"]["value"], abs=1e-6)
            for number in range(step, STEPS):
                rows = sorted(row for run in again for row in run["rows"][number])
                assert rows == sorted(row for run in runs[saved_at] for row in run["rows"][number])


def with_strategy(options: dict[str, Any], strategy: str) -> dict[str, Any]:
    return {**options, "trainer_options": {**options["trainer_options"], "strategy": strategy or "auto"}}


@pytest.mark.promise("R5", "Another number of rows per step is refused, with both numbers")
def test_another_number_of_rows_per_step_is_refused(byte_model: str, feedback: str, tmp_path: Path) -> None:
    saving(byte_model, feedback, str(tmp_path), [5], cut())
    with pytest.raises(CheckpointError, match="rows_per_step: 8 then, 16 now"):
        resuming(byte_model, feedback, str(tmp_path), 5, {**cut(), "data_options": {"batch_size": 16}})


def test_what_may_change_when_a_run_goes_on_is_told_by_name_with_both_values(
    byte_model: str, feedback: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving(byte_model, feedback, str(tmp_path), [5], cut())
    resuming(byte_model, feedback, str(tmp_path), 5, cut())
    assert " then, " not in caplog.text
    options = cut(accumulation=2)
    options["trainer_options"] |= {
        "precision": "bf16-mixed", "gradient_clip_val": 0.5, "gradient_clip_algorithm": "value", "max_epochs": 3,
        "deterministic": "warn",
    }  # fmt: skip
    changed = {"learning_rate": 2e-2, "dtype": "float32", "weight_decay": 0.1}
    resuming(byte_model, feedback, str(tmp_path), 5, options, module_options=changed)
    for told in (
        "model.learning_rate: 0.01 then, 0.02 now", "model.weight_decay: 0.0 then, 0.1 now",
        "data.batch_size: 8 then, 4 now", "trainer.accumulate_grad_batches: 1 then, 2 now",
        "trainer.max_epochs and max_steps: 24 steps then, 36 steps now",
        "trainer.precision: 32-true then, bf16-mixed now", "trainer.deterministic: True then, warn now",
        "trainer.gradient_clip_val: None then, 0.5 now", "trainer.gradient_clip_algorithm: norm then, value now",
    ):  # fmt: skip
        assert f"checkpoint: {told}." in caplog.text
    assert caplog.text.count(" then, ") == 9


def test_a_learning_rate_that_is_changed_when_a_run_goes_on_is_the_one_of_its_steps(
    byte_model: str, feedback: str, tmp_path: Path
) -> None:
    whole = saving(byte_model, feedback, str(tmp_path), [5], cut())
    resumed = resuming(byte_model, feedback, str(tmp_path), 5, cut(), module_options={"learning_rate": 2e-2})
    rates = [{n: told["train/learning_rate"] for n, told in run["values"].items() if n > 5} for run in (whole, resumed)]
    assert rates[1] == {step: pytest.approx(2 * rate) for step, rate in rates[0].items()}
    assert resumed["learning_rate"] == [2 * rate for rate in whole["learning_rate"]]


def test_a_checkpoint_that_another_callback_writes_within_a_step_goes_on_with_the_whole_step(
    byte_model: str, feedback: str, tmp_path: Path
) -> None:
    class Within(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (0, 7 * 4 + 1):
                trainer.save_checkpoint(tmp_path / "within")

    options = cut(accumulation=4)
    options["trainer_options"]["default_root_dir"] = str(tmp_path)
    whole = tiny_fit(byte_model, feedback, callbacks=[Within(), RunCheckpoint()], **options)
    again = tiny_fit(byte_model, feedback, callbacks=[RunCheckpoint()], ckpt_path=str(tmp_path / "within"), **options)
    assert_goes_on(whole, again, 7)


def test_a_run_that_goes_on_from_an_earlier_step_sets_the_later_ones_aside(
    byte_model: str, feedback: str, tmp_path: Path
) -> None:
    saving(byte_model, feedback, str(tmp_path), [5, 12, 17], cut())
    logged = "".join(f'{{"step": {step}, "train/kl": {step}.0}}\n' for step in (4, 5, 6, 24))
    (tmp_path / "metrics.jsonl").write_text(logged)
    options = cut()
    options["trainer_options"] |= {"default_root_dir": str(tmp_path), "max_steps": 9}
    callback = RunCheckpoint(every_n_steps=2)
    checkpoint = str(step_folder(tmp_path / "checkpoints", 5))
    tiny_fit(byte_model, feedback, ckpt_path=checkpoint, callbacks=[callback], **options)
    steps = [path.name for path in saved_steps(tmp_path / "checkpoints")]
    assert steps == ["step-00000008", "step-00000009"]
    assert resolve_checkpoint(tmp_path, pytest.fail).name == "step-00000009"
    aside = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.left-at-5.0"))
    assert aside == ["step-00000012.left-at-5.0", "step-00000017.left-at-5.0", "step-00000024.left-at-5.0"]
    assert RunRecord.read(tmp_path).curves["train/kl"] == [(4, 4.0), (5, 5.0)]
    assert (tmp_path / "metrics.jsonl.left-at-5.0").read_text() == logged


def test_a_run_that_ends_early_is_saved_where_it_ended(byte_model: str, feedback: str, tmp_path: Path) -> None:
    class Enough(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 7

    whole = tiny_fit(byte_model, feedback)
    options = {"default_root_dir": str(tmp_path)}
    ended = tiny_fit(byte_model, feedback, callbacks=[Enough(), RunCheckpoint()], trainer_options=options)
    assert ended["step"] == 7
    checkpoint = str(step_folder(tmp_path / "checkpoints", 7))
    again = tiny_fit(byte_model, feedback, ckpt_path=checkpoint, callbacks=[RunCheckpoint()], trainer_options=options)
    assert_goes_on(whole, again, 7)


def test_a_run_goes_on_with_its_validation_switched_off(
    byte_model: str, feedback: str, validation_log: str, tmp_path: Path
) -> None:
    options = cut(accumulation=2, validation=validation_log)
    whole = saving(byte_model, feedback, str(tmp_path), [12, 24], options)
    options["trainer_options"]["limit_val_batches"] = 0
    again = resuming(byte_model, feedback, str(tmp_path), 12, options)
    assert again["rows"] == {step: rows for step, rows in whole["rows"].items() if step >= 12}
    assert_same(whole["weights"], again["weights"])
    assert resuming(byte_model, feedback, str(tmp_path), 24, options)["step"] == STEPS


def test_a_model_that_was_built_before_is_told_apart_all_the_same(
    byte_model: str, feedback: str, tmp_path: Path
) -> None:
    module = BCOModule(byte_model, learning_rate=1e-2, dtype="float32")
    assert module.policy is not None
    saving(byte_model, feedback, str(tmp_path), [5], cut(), module=module)
    resuming(byte_model, feedback, str(tmp_path), 5, cut())


@pytest.mark.promise("R18", "A changed row, tokenizer, template, beta or reference is noticed when a run goes on")
def test_changed_inputs_are_noticed(byte_model: str, feedback: str, tmp_path: Path, trials: Trials) -> None:
    saving(byte_model, feedback, str(tmp_path), [5], cut())
    for trial in trials(["row_digest", "tokenizer", "chat_template", "beta", "reference"], quick=5):
        with trial as what:
            model, log, options = changed(what, byte_model, feedback, tmp_path / what)
            with pytest.raises(CheckpointError, match=f"found another .*{what}: .* then, .* now"):
                resuming(model, log, str(tmp_path), 5, cut(), **options)
            allowed = RunCheckpoint(accept_changes=[what])
            checkpoint = str(step_folder(tmp_path / "checkpoints", 5))
            tiny_fit(
                model, log, ckpt_path=checkpoint, callbacks=[allowed], **options,
                trainer_options={"default_root_dir": str(tmp_path / what)},
            )  # fmt: skip
            manifest = (step_folder(tmp_path / what / "checkpoints", STEPS) / "manifest.json").read_text()
            assert f"step 5: {what}" in manifest


def changed(what: str, model: str, log: str, folder: Path) -> tuple[str, str, dict[str, Any]]:
    """The model, log and options of the run with one thing changed."""
    import json
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    copy, rows = folder / "model", Path(log).read_text()
    shutil.copytree(model, copy)
    other = folder / "log.jsonl"
    other.write_text(rows.replace('"q17"', '"q18"') if what == "row_digest" else rows)
    if what == "tokenizer":
        file = copy / "tokenizer.json"
        file.write_text(file.read_text().replace('"a":', '"TMP":').replace('"b":', '"a":').replace('"TMP":', '"b":'))
    if what == "chat_template":
        file = copy / "chat_template.jinja"
        file.write_text(file.read_text().replace("<|im_end|>\n", "<|im_end|>"))
    if what == "reference":
        weights = load_file(copy / "model.safetensors")
        value = weights["model.norm.weight"]
        value.view(torch.uint8)[0] ^= 1
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert json.loads(rows.splitlines()[0])
    return str(copy), str(other), {"module_options": {"beta": 0.2}} if what == "beta" else {}
