"""Reference log-probs are computed once, found again by content, and give the run that computing them anew gives."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from peft import LoraConfig, get_peft_model

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.errors import LanguageModelError, NonFiniteError
from bco_lightning.identity import versions
from bco_lightning.models.load import load_language_model
from bco_lightning.reference import column
from bco_lightning.reference.column import key_of_log_probs
from bco_lightning.reference.model import Reference
from tests.conftest import tiny_data, tiny_module, tiny_trainer, write_jsonl
from tests.reliability.tiny_run import assert_same, finish, make_log, make_model, start, tiny_fit

FULL: dict[str, Any] = {"lora": None, "learning_rate": 1e-3}
LORA: dict[str, Any] = {"lora": LoraSettings(r=4), "learning_rate": 1e-3}


class Passes:
    """Counts passes through the reference, copies of it, and loads of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = self.models = 0
        score, hold = Reference.log_probs, Reference.hold

        def counted(reference: Reference, batch: Any, *others: Any) -> Any:
            self.rows += len(batch)
            return score(reference, batch, *others)

        def held(reference: Reference) -> None:
            before = reference.own_model
            hold(reference)
            self.models += before is None and reference.own_model is not None

        monkeypatch.setattr(Reference, "log_probs", counted)
        monkeypatch.setattr(Reference, "hold", held)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def fit(model: str, log: str, *, epochs: int = 2, trainer: Any = None, data: Any = None, **options: Any) -> Any:
    losses, module = Losses(), tiny_module(model, **options)
    tiny_trainer(**{"max_epochs": epochs, "callbacks": [losses], **(trainer or {})}).fit(
        module, tiny_data(log, **(data or {}))
    )
    return module, losses.values


@pytest.mark.parametrize(
    ("mode", "kind", "layout"),
    [("auto", FULL, "packed"), ("before", LORA, "padded"), ("auto", LORA, "packed")],
    ids=["full", "lora padded", "lora"],
)
def test_a_run_with_known_values_has_the_losses_of_one_that_computes_them(
    mode: str, kind: dict[str, Any], layout: str, tiny_model: str, log: str
) -> None:
    _, expected = fit(tiny_model, log, reference_log_probs="online", layout=layout, **kind)
    _, found = fit(tiny_model, log, reference_log_probs=mode, layout=layout, **kind)
    assert len(found) == 12
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_the_column_holds_the_values_of_the_model_that_came_in(kind: dict[str, Any], tiny_model: str, log: str) -> None:
    data, fresh = tiny_data(log), tiny_module(tiny_model, **kind)
    tiny_trainer(max_epochs=2).fit(tiny_module(tiny_model, **kind), data)
    for batch in data.train_dataloader():
        expected = fresh.reference.log_probs(replace(batch, reference_log_probs_B=None))
        assert torch.allclose(batch.reference_log_probs_B, expected, atol=1e-5 * 64, rtol=0)


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_a_second_run_makes_no_pass_and_no_second_model(
    kind: dict[str, Any], tiny_model: str, log: str, passes: Passes
) -> None:
    _, first = fit(tiny_model, log, **kind)
    assert (passes.rows, passes.models) == (24, 0)
    _, second = fit(tiny_model, log, **kind)
    assert (passes.rows, passes.models) == (24, 0)
    assert second == first


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_kept_values_of_another_model_stop_the_run_before_its_first_step(
    kind: dict[str, Any], tiny_model: str, log: str
) -> None:
    fit(tiny_model, log, **kind)
    (folder,) = (Path(os.environ["BCO_CACHE"]) / "reference_log_probs").iterdir()
    records = column.read_records(folder)
    for file in folder.glob("*.npy"):
        file.unlink()
    records["value"] += 0.1
    column.write_records(folder, records)
    with pytest.raises(LanguageModelError, match=r"log.jsonl:\d+: .* its own reference .* found log-probs .*Remove"):
        fit(tiny_model, log, **kind)


def test_online_reads_and_writes_nothing(tiny_model: str, log: str, passes: Passes) -> None:
    fit(tiny_model, log, reference_log_probs="online", **FULL)
    assert passes.models == 1
    assert passes.rows == 2 * 27 + 2  # the shortest and the longest at the start
    assert not (Path(os.environ["BCO_CACHE"]) / "reference_log_probs").exists()


def test_a_run_that_sees_few_rows_or_each_once_without_a_second_model_leaves_them_to_the_steps(
    tiny_model: str, log: str, passes: Passes
) -> None:
    short = {"max_epochs": -1, "max_steps": 2, "limit_val_batches": 0}
    fit(tiny_model, log, trainer=short, **FULL)
    assert (passes.rows, passes.models) == (8 + 2, 1)  # the shortest and the longest at the start
    fit(tiny_model, log, epochs=1, trainer={"limit_val_batches": 0}, **LORA)
    assert (passes.rows, passes.models) == (8 + 24 + 2 * 2, 1)
    assert not (Path(os.environ["BCO_CACHE"]) / "reference_log_probs").exists()


def test_a_changed_row_is_computed_and_the_others_are_found(
    tiny_model: str, rows: list[dict[str, Any]], tmp_path: Path, passes: Passes
) -> None:
    fit(tiny_model, write_jsonl(tmp_path / "one.jsonl", rows), data={"validation_fraction": 0.0}, **FULL)
    rows[3]["completion"] += "!"
    fit(tiny_model, write_jsonl(tmp_path / "two.jsonl", rows[::-1]), data={"validation_fraction": 0.0}, **FULL)
    assert passes.rows == 24 + 1


@pytest.mark.parametrize(
    "change",
    [
        "weight",
        *(
            pytest.param(option, marks=pytest.mark.slow)
            for option in ("libraries", "code", "dtype", "layout", "precision")
        ),
    ],
)
def test_values_of_another_reference_or_way_of_computing_are_not_used(
    change: str, tiny_model: str, log: str, tmp_path: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tiny_model, log, **FULL)
    if change == "weight":
        other = tiny_module(tiny_model, **FULL)
        with torch.no_grad():
            next(other.policy.parameters())[7, 3] += 1e-3
        other.policy.save_pretrained(tmp_path / "other")
        other.tokenizer.save_pretrained(tmp_path / "other")
        tiny_model = str(tmp_path / "other")
    if change == "libraries":
        monkeypatch.setattr(column, "versions", lambda: {**versions(), "transformers": "0.0.1"})
    if change == "code":
        monkeypatch.setattr(column, "digest_of_code", lambda *_: "another")
    options = {"dtype": {"dtype": "bfloat16"}, "layout": {"layout": "padded"}}.get(change, {})
    fit(
        tiny_model, log, trainer={"precision": "bf16-mixed" if change == "precision" else "32-true"},
        **{**FULL, **options},
    )  # fmt: skip
    assert passes.rows == 48


def test_a_pass_that_was_killed_goes_on(
    tiny_model: str, log: str, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(column, "_BATCH_TOKENS", 200)
    monkeypatch.setattr(column, "_SECONDS_BETWEEN_WRITES", 0.0)
    score = Reference.log_probs

    def killed_later(reference: Reference, batch: Any) -> Any:
        if passes.rows >= 12:
            raise KeyboardInterrupt
        return score(reference, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Reference, "log_probs", killed_later)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(tiny_model, log, **FULL)
    assert 12 <= passes.rows < 24
    fit(tiny_model, log, **FULL)
    assert passes.rows == 24


def test_a_value_that_is_not_finite_is_warned_of_and_never_written(
    tiny_model: str, log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Reference.log_probs
    monkeypatch.setattr(
        Reference, "log_probs", lambda r, batch, *_: score(r, batch).where(batch.row_ids_B != 5, torch.nan)
    )
    with (
        pytest.warns(UserWarning, match="1 reference log-probs are not finite"),
        pytest.raises(NonFiniteError, match=r"reference log probs nan in rows 5 \(.*log\.jsonl:6\)"),
    ):
        fit(tiny_model, log, epochs=1, data={"validation_fraction": 0.0}, **FULL)
    (file,) = (Path(os.environ["BCO_CACHE"]) / "reference_log_probs").rglob("*.npy")
    assert len(np.load(file)) == 23


def test_a_second_fit_of_the_same_module_still_compares_with_the_model_that_came_in(
    tiny_model: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    first, other = (write_jsonl(tmp_path / f"{n}.jsonl", rows[n::2]) for n in (0, 1))
    module, _ = fit(tiny_model, first, data={"validation_fraction": 0.0}, **FULL)
    data = tiny_data(other, validation_fraction=0.0)
    tiny_trainer(max_epochs=1).fit(module, data)
    batch = next(iter(data.train_dataloader()))
    expected = tiny_module(tiny_model, **FULL).reference.log_probs(batch)
    assert torch.allclose(batch.reference_log_probs_B, expected, atol=1e-4)
    assert module.reference.own_model is None  # it was loaded, and given back


def test_a_reference_whose_files_have_changed_is_refused(tiny_model: str, log: str, tmp_path: Path) -> None:
    source = tiny_module(tiny_model, **FULL)
    source.policy.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    module, _ = fit(str(tmp_path / "model"), log, **FULL)
    with torch.no_grad():
        next(source.policy.parameters())[7, 3] += 1
    source.policy.save_pretrained(tmp_path / "model")
    with pytest.raises(Exception, match="expected the weights that the reference had when the run began"):
        module.reference.hold()


def test_validating_a_full_checkpoint_uses_what_training_left(
    tiny_model: str, log: str, tmp_path: Path, passes: Passes
) -> None:
    options = {"validation_fraction": 0.5}
    module = tiny_module(tiny_model, **FULL)
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(module, tiny_data(log, **options))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    (expected,) = trainer.validate(module, tiny_data(log, **options), verbose=False)
    before = passes.rows
    (values,) = tiny_trainer().validate(
        tiny_module(tiny_model, **FULL), tiny_data(log, **options), ckpt_path=str(tmp_path / "x.ckpt"),
        weights_only=True, verbose=False,
    )  # fmt: skip
    assert values == expected
    assert values["val/margin"] != 0
    assert (passes.rows, passes.models) == (before, 0)


def test_validating_without_a_cache_compares_with_the_model_before_the_checkpoint(
    tiny_model: str, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny_module(tiny_model, **FULL)
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(module, tiny_data(log, validation_fraction=0.5))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    values = []
    for mode in ("online", "auto"):
        monkeypatch.setenv("BCO_CACHE", str(tmp_path / mode))
        values += tiny_trainer().validate(
            tiny_module(tiny_model, reference_log_probs=mode, **FULL), tiny_data(log, validation_fraction=0.5),
            ckpt_path=str(tmp_path / "x.ckpt"), weights_only=True, verbose=False,
        )  # fmt: skip
    assert values[1] == pytest.approx(values[0], abs=1e-5)


def test_a_named_reference_is_given_back_after_its_pass(
    tiny_model: str, log: str, tmp_path: Path, passes: Passes
) -> None:
    other = make_model(tmp_path / "other", seed=1)
    data = {"tokenizer": tiny_module(other).tokenizer, "max_length": 200}
    _, expected = fit(
        other, log, data=data, reference_name_or_path=make_model(tmp_path / "third", seed=2),
        reference_log_probs="online", **FULL,
    )  # fmt: skip
    module, found = fit(other, log, data=data, reference_name_or_path=str(tmp_path / "third"), **FULL)
    assert found == pytest.approx(expected, abs=1e-5)
    assert module.reference.own_model is None


class _Kill(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.parametrize("kind", [None, LoraSettings(r=2)], ids=["full", "lora"])
def test_a_killed_run_goes_on_with_the_same_values_to_the_bit_and_without_a_second_model(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl")
    run = partial(tiny_fit, model, log, module_options={"lora": kind})
    monkeypatch.setenv("BCO_CACHE", str(tmp_path / "one"))
    whole = run()
    monkeypatch.setenv("BCO_CACHE", str(tmp_path / "two"))
    checkpoint = RunCheckpoint(every_n_steps=5)
    with pytest.raises(RuntimeError, match="killed"):
        run(callbacks=[checkpoint, _Kill(8)])
    passes, taken = Passes(monkeypatch), _Taken()
    resumed = run(callbacks=[RunCheckpoint(every_n_steps=5), taken], ckpt_path=str(checkpoint.saved))
    assert (passes.rows, passes.models) == (0, 0)
    assert taken.values
    assert all(bool(values.isfinite().all()) for values in taken.values)
    for name in ("weights", "moments", "shift"):
        assert_same(resumed[name], whole[name], name)


class _Taken(Callback):
    """The reference log-probs that batches bring."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(batch.reference_log_probs_B)


def two_processes(model: str, log: str, cache: str, strategy: str, lora: bool) -> dict[str, Any]:
    # Each process has a disk of its own.
    os.environ["BCO_CACHE"] = f"{cache}.{os.environ.get('RANK', '0')}"
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    column._BATCH_TOKENS = 400  # several passes, which do not divide
    module = BCOModule(model, learning_rate=1e-3, dtype="float32", lora=LoraSettings(r=2) if lora else None)
    known: list[torch.Tensor] = []
    fill_in = column.KnownLogProbs.compute

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        fill_in(self, *arguments, **options)
        known.append(torch.from_numpy(self.column("train").copy()))

    column.KnownLogProbs.compute = noted  # type: ignore[method-assign]
    result = tiny_fit(
        model, log, module=module, trainer_options={"devices": ranks, "strategy": strategy if ranks > 1 else "auto"},
        data_options={"batch_size": 8 // ranks, "validation_files": log},
    )  # fmt: skip
    return {**result, "known": known[0]}


def stopped(model: str, log: str, cache: str, strategy: str, lora: bool) -> str:
    read = column.read_records

    def planted(folder: Path) -> Any:
        records = read(folder)
        records["value"] += 0.2
        return records

    column.read_records = planted
    with pytest.raises(LanguageModelError) as caught:
        two_processes(model, log, cache, strategy, lora)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "lora"), [("ddp", True), ("fsdp2", False), ("fsdp2", True)])
def test_kept_values_of_another_model_stop_all_processes(strategy: str, lora: bool, tmp_path: Path) -> None:
    run = (make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl", num_rows=32), str(tmp_path / "cache"))
    finish(start(partial(two_processes, *run, strategy, lora), ranks=2, folder=tmp_path / "1"), tmp_path / "1")
    first, second = finish(
        start(partial(stopped, *run, strategy, lora), ranks=2, folder=tmp_path / "2"), tmp_path / "2"
    )
    assert first.split(" nats")[0] == second.split(" nats")[0]
    assert "its own reference" in first


@pytest.mark.parametrize(("strategy", "lora"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)])
def test_two_processes_know_the_values_of_one(strategy: str, lora: bool, tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl", num_rows=32)
    fit_it = partial(two_processes, model, log, str(tmp_path / "cache"), strategy, lora)
    (one,) = finish(start(fit_it, folder=tmp_path / "1"), tmp_path / "1")
    for number in (0, 1):
        for file in (tmp_path / f"cache.{number}").rglob("*.npy"):
            file.unlink()
    first, second = finish(start(fit_it, ranks=2, folder=tmp_path / "2"), tmp_path / "2")
    assert_same(first["known"], second["known"])
    assert torch.allclose(first["known"], one["known"], atol=1e-4)
    for name, value in one["weights"].items():
        assert torch.allclose(first["weights"][name], value, atol=1e-5), name


def test_prompts_are_shared_only_where_steps_share_them(
    tiny_model: str, log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, score = [], Reference.log_probs

    def noted(reference: Reference, batch: Any) -> Any:
        shared.append(any(span.prefix for span in batch.spans))
        return score(reference, batch)

    monkeypatch.setattr(Reference, "log_probs", noted)
    for grouped in (True, False):
        fit(tiny_model, log, epochs=1, data={"validation_fraction": 0.0, "group_by_prompt": grouped}, **FULL)
    assert shared == [True, False]


@pytest.mark.slow
def test_the_key_of_a_continued_adapter_is_the_same_in_every_process(tiny_model: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    get_peft_model(load_language_model(tiny_model, torch.float32), config).save_pretrained(str(tmp_path / "adapter"))
    program = (
        "import sys, torch; from types import SimpleNamespace as N\n"
        "from bco_lightning.models.load import load_policy; from bco_lightning.options import LoraSettings\n"
        "from bco_lightning.reference.column import key_of_log_probs\n"
        "policy = load_policy(sys.argv[1], torch.float32, LoraSettings(r=2), 0)\n"
        "trainer = N(strategy=N(root_device=torch.device('cpu')), precision='32-true')\n"
        "print(key_of_log_probs(policy, trainer))"
    )
    keys = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "adapter")],
            env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert len(keys[0]) > 30
    assert len(set(keys)) == 1


def test_a_mapped_model_has_the_key_of_one_that_was_cast_as_it_was_read(tiny_model: str, tmp_path: Path) -> None:
    load_language_model(tiny_model, torch.bfloat16).save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    trainer = SimpleNamespace(precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cpu")))
    mapped, cast = (load_language_model(folder, torch.float32, mapped=mapped) for mapped in (True, False))
    assert next(mapped.parameters()).dtype == torch.bfloat16
    assert key_of_log_probs(mapped, trainer) == key_of_log_probs(cast, trainer)
