"""A value that is not finite stops all processes before optimizer and shift, or leaves the step out; and the shift."""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

from bco_lightning import BCOModule, LoraSettings, RewardShift
from bco_lightning.callbacks import FiniteGuard, RunCheckpoint
from bco_lightning.checkpoints.folders import saved_steps
from bco_lightning.checkpoints.format import read_checkpoint
from bco_lightning.data.order import RowOrder
from bco_lightning.errors import NonFiniteError
from tests.reliability.tiny_run import assert_same, finish, make_log, start, state_of, tiny_fit, wait
from tests.trials import Trials

PLACES = ("policy states", "reference log-probs", "embedding weight", "loss", "gradient")
VALUES = (math.nan, math.inf, -math.inf)


class Inject(Callback):
    """Puts a value that is not finite into one place, on one rank, in one micro-batch of the given steps."""

    def __init__(self, place: str, value: float, rank: int, micro_batch: int, steps: tuple[int, ...]) -> None:
        self.place, self.value, self.rank, self.micro_batch, self.steps = place, value, rank, micro_batch, steps
        self.active = False
        self.rows: list[int] = []
        self.before: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, module: BCOModule) -> None:
        module.policy.base_model.register_forward_hook(self.in_policy_states)
        score, objective = module.reference.log_probs, module.objective.losses
        module.reference.log_probs = lambda *a: score(*a) + self.now("reference log-probs")
        module.objective.losses = lambda *a: objective(*a) + self.now("loss")
        trained = next(p for p in module.parameters() if p.requires_grad)
        trained.register_hook(lambda gradient: gradient + self.now("gradient"))

    def in_policy_states(self, _module: Any, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + self.now("policy states")
        return output

    def now(self, place: str) -> float:
        return self.value if self.active and place == self.place else 0.0

    def on_train_batch_start(self, trainer: Any, module: BCOModule, batch: Any, batch_idx: int) -> None:
        step, micro_batch = trainer.global_step, batch_idx % trainer.accumulate_grad_batches + 1
        self.active = trainer.global_rank == self.rank and micro_batch == self.micro_batch and step in self.steps
        if self.active:
            self.rows = batch.row_ids_B.tolist()
            if self.place == "embedding weight":
                with torch.no_grad():
                    module.policy.get_input_embeddings().weight[batch.input_ids_S[0]] = self.value
        if step in self.steps and (micro_batch == 1 or self.active):
            self.before = bits(state_of(module, trainer, local))


def bits(state: dict[str, Any]) -> dict[str, Any]:
    """Weights, moments and shift as whole numbers, so that NaN equals itself."""
    kept = {name: state[name] for name in ("weights", "moments", "shift")}
    flat = [*kept["weights"].values(), *(value for moment in kept["moments"] for value in moment.values())]
    return {"numbers": [value.reshape(-1).view(torch.int32) for value in flat], "shift": kept["shift"]}


def local(value: Any) -> Any:
    """This process's part: another may not be asking for the whole."""
    return value.to_local() if isinstance(value, DTensor) else value


def injected(
    model: str, log: str, folder: str, place: str, value: float, rank: int, micro_batch: int, strategy: str
) -> dict[str, Any]:
    inject = Inject(place, value, rank, micro_batch, steps=(3,))
    module = BCOModule(model, learning_rate=1e-2, dtype="float32", reference_log_probs="online")
    options = {"accumulate_grad_batches": 4, "devices": 2, "strategy": strategy, "default_root_dir": folder}
    try:
        tiny_fit(
            model, log, module=module, callbacks=[inject, RunCheckpoint(every_n_steps=1, keep=9)],
            trainer_options=options, data_options={"batch_size": 1},
        )  # fmt: skip
    except NonFiniteError as error:
        assert_same(bits(state_of(module, module.trainer, local)), inject.before)
        return {"error": str(error), "rows": inject.rows}
    return {"error": "none"}


@pytest.mark.promise("R10", "A value that is not finite, anywhere, stops all processes in its step and harms nothing")
def test_a_value_that_is_not_finite_stops_all_processes(
    byte_model: str, feedback: str, tmp_path: Path, trials: Trials
) -> None:
    # Where weights are sharded, those of one process and their gradients are everyone's.
    cases = [(p, v, 1, 3, "fsdp2") for p in ("policy states", "reference log-probs", "loss") for v in VALUES]
    cases += [(p, v, rank, micro, "ddp") for p in PLACES for v in VALUES for rank in (0, 1) for micro in (1, 3)]
    for trial in trials(cases, quick=3):  # one of them sharded
        with trial as (place, value, rank, micro_batch, strategy):
            folder = tmp_path / f"{place}{value}{rank}{micro_batch}{strategy}"
            run = partial(injected, byte_model, feedback, str(folder), place, value, rank, micro_batch, strategy)
            results = finish(start(run, ranks=2, folder=folder), folder)
            assert results[0]["error"] == results[1]["error"]
            message = results[0]["error"]
            assert message.startswith("optimizer step 3: expected finite numbers")
            assert f"rank {rank}: " in message
            for row in results[rank]["rows"]:
                assert f"{row} ({feedback}:{row + 1})" in message
            newest = saved_steps(folder / "checkpoints")[-1]
            assert newest.name == "step-00000003"
            assert all(bool(value.isfinite().all()) for value in read_checkpoint(str(newest))["state_dict"].values())


class LeaveOut(BCOModule):
    """Takes no step and no rows at the given steps: what skipping them should come to, in another way."""

    left_out: tuple[int, ...] = (3, 7, 8)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.trainer.global_step in self.left_out:
            optimizer_closure()
            optimizer.zero_grad()
            self.step_rows.clear()
        else:
            optimizer.step(closure=optimizer_closure)


@pytest.mark.promise("R10", "Skipped steps are counted, and the rest goes on as if they had not been taken")
def test_skipped_steps_are_counted_and_harm_nothing(
    byte_model: str, feedback: str, tmp_path: Path, trials: Trials
) -> None:
    for trial in trials([("gradient", math.inf), ("loss", math.nan), ("reference log-probs", -math.inf)], quick=3):
        with trial as (place, value):
            online = {"reference_log_probs": "online"}
            oracle = LeaveOut(byte_model, learning_rate=1e-2, dtype="float32", **online)
            options = {"trainer_options": {"accumulate_grad_batches": 2}, "data_options": {"batch_size": 4}}
            expected = tiny_fit(byte_model, feedback, module=oracle, **options)
            options["module_options"] = online
            guard = FiniteGuard(policy="skip", max_skipped=3)
            callbacks = [guard, Inject(place, value, rank=0, micro_batch=2, steps=LeaveOut.left_out)]
            with pytest.warns(UserWarning, match="Skipped"):
                result = tiny_fit(byte_model, feedback, callbacks=callbacks, **options)
            assert guard.skipped == len(LeaveOut.left_out)
            for name in ("weights", "moments", "shift", "learning_rate"):
                assert_same(result[name], expected[name], name)


@pytest.mark.promise("R10", "Beyond the limit of skipped steps the run stops after all")
def test_beyond_the_limit_of_skipped_steps_the_run_stops(byte_model: str, feedback: str) -> None:
    callbacks = [FiniteGuard("skip", max_skipped=1), Inject("loss", math.nan, rank=0, micro_batch=1, steps=(2, 5))]
    with (
        pytest.warns(UserWarning, match="Skipped"),
        pytest.raises(NonFiniteError, match=r"step 5: .*1 steps were skipped"),
    ):
        tiny_fit(byte_model, feedback, callbacks=callbacks)


def test_a_step_whose_mismatched_rows_are_not_finite_is_left_out_before_the_baseline_learns_of_it(
    byte_model: str, feedback: str
) -> None:
    class Spoil(Callback):
        def on_train_batch_start(self, trainer: Any, module: BCOModule, batch: Any, batch_idx: int) -> None:
            score, spoiled = module.log_probs, trainer.global_step == 2
            module.log_probs = lambda rows: [value * (math.nan if rows is batch.unrelated and spoiled else 1)
                                              for value in score(rows)]  # fmt: skip

    module = BCOModule(byte_model, objective="kto", learning_rate=1e-2, dtype="float32", reference_log_probs="online")
    with pytest.warns(UserWarning, match=r"step 2: .* sum_unrelated nan, which a baseline learns, .*Skipped \(1 of"):
        tiny_fit(
            byte_model, feedback, module=module, callbacks=[FiniteGuard("skip"), Spoil()],
            trainer_options={"max_steps": 5},
        )  # fmt: skip
    assert math.isfinite(module.objective.threshold)


def test_weights_that_are_not_finite_are_not_saved(byte_model: str, feedback: str, tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_train_batch_end(self, trainer: Any, module: BCOModule, *_: Any) -> None:
            if trainer.global_step == 4:
                next(module.parameters()).data[0, 0] = math.nan

    with pytest.raises(NonFiniteError, match=r"optimizer step 4: expected finite weights to save"):
        tiny_fit(
            byte_model, feedback, callbacks=[Spoil(), RunCheckpoint(every_n_steps=2)],
            trainer_options={"default_root_dir": str(tmp_path)},
        )  # fmt: skip
    assert [step.name for step in saved_steps(tmp_path / "checkpoints")] == ["step-00000002"]


@pytest.mark.promise("R11", "The shift follows a float64 reference, or is unchanged and an error is raised")
def test_the_shift_is_right_or_unchanged(trials: Trials) -> None:
    drawn = random.Random(11)
    shift, sums, counts = RewardShift(0.9), [0.0, 0.0], [0.0, 0.0]
    for trial in trials(range(500), quick=500):
        with trial as number:
            scale = drawn.choice([1e-6, 1.0, 1e6, 1e150])
            rewards = [[drawn.gauss(0, scale) for _ in range(drawn.choice([0, 0, 1, 7]))] for _ in range(2)]
            if number % 10 == 0:
                rewards[drawn.randrange(2)].append(drawn.choice([math.nan, math.inf, -math.inf]))
            before = shift.state_dict()
            arguments = {
                "sum_up": sum(rewards[0]), "num_up": len(rewards[0]),
                "sum_down": sum(rewards[1]), "num_down": len(rewards[1]),
            }  # fmt: skip
            if not all(math.isfinite(value) for value in arguments.values()):
                with pytest.raises(ValueError, match="expected finite sums"):
                    shift.update(**arguments)
                assert shift.state_dict() == before
                continue
            shift.update(**arguments)
            for which in range(2):
                if rewards[which]:
                    sums[which] = math.fsum([0.9 * sums[which], *rewards[which]])
                    counts[which] = 0.9 * counts[which] + len(rewards[which])
            means = [s / n if n else 0.0 for s, n in zip(sums, counts, strict=True)]
            tolerance = 1e-6 * max(abs(mean) for mean in means)
            assert shift.value == pytest.approx((means[0] + means[1]) / 2, abs=tolerance)
    down = shift.class_means[1]
    for _ in range(100):
        shift.update(sum_up=1.0, num_up=1, sum_down=0.0, num_down=0)
    assert shift.class_means[1] == down


def one_sided(model: str, log: str, held_out: str) -> dict[str, Any]:
    """In every step one process sees thumbs-up only and the other thumbs-down only; they swap after each."""
    original = RowOrder.rows_of_step

    def sides(order: RowOrder, step: int) -> list[int]:
        assert len(original(order, step)) == 8
        ups, downs = (
            [n for n in range(96) if n % 3][step : step + 4],
            [n for n in range(96) if not n % 3][step : step + 4],
        )
        return ups + downs if step % 2 else downs + ups

    RowOrder.rows_of_step = sides  # type: ignore[method-assign]
    return tiny_fit(
        model, log, trainer_options={"devices": 2, "strategy": "ddp", "max_steps": 20, "log_every_n_steps": 1},
        data_options={"batch_size": 4, "validation_files": held_out},
    )  # fmt: skip


@pytest.mark.promise("R12", "Processes that see one class each neither hang nor log different keys")
def test_processes_that_see_one_class_each_stay_together(
    byte_model: str, feedback: str, tmp_path: Path, trials: Trials
) -> None:
    for trial in trials([13, 2], quick=2):
        with trial as held_out_rows:
            held_out = make_log(tmp_path / f"{held_out_rows}.jsonl", num_rows=held_out_rows, seed=3)
            run = partial(one_sided, byte_model, feedback, held_out)
            first, second = finish(start(run, ranks=2, folder=tmp_path), tmp_path)
            assert first["step"] == second["step"] == 20
            assert_same(first["values"], second["values"])
            assert len(first["values"]) >= 20
            assert_same(first["weights"], second["weights"])


@pytest.mark.promise("R12", "Fewer held-out rows than processes are refused on all of them, where they would hang")
def test_fewer_held_out_rows_than_processes_are_refused(byte_model: str, feedback: str, tmp_path: Path) -> None:
    held_out = make_log(tmp_path / "one.jsonl", num_rows=1, seed=3)
    processes = start(partial(one_sided, byte_model, feedback, held_out), ranks=2, folder=tmp_path)
    assert wait(processes, timeout=30) == [1, 1]
    for rank in range(2):
        assert "expected a row for each of 2 processes, found 1" in (tmp_path / f"output.{rank}").read_text()


def test_an_exploding_reward_and_a_collapsed_class_are_warned_of(byte_model: str, feedback: str) -> None:
    with pytest.warns(
        UserWarning, match="the mean implicit reward of thumbs-(up|down) rows is .* nats per answer away"
    ):
        tiny_fit(byte_model, feedback, module_options={"learning_rate": 1.0, "beta": 5.0})
    module = BCOModule(
        byte_model, learning_rate=3e-2, dtype="float32", class_weights=(1e-9, 1.0), reward_shift_decay=0.99
    )
    module.reward_shift.load_state_dict({"sums": [1e9, 1e9], "counts": [1e9, 1e9]})
    with pytest.warns(UserWarning, match="says thumbs-down to nearly every row"):
        tiny_fit(byte_model, feedback, module=module, trainer_options={"log_every_n_steps": 2})


def test_adapters_are_guarded_too(byte_model: str, feedback: str) -> None:
    module = BCOModule(byte_model, learning_rate=1e-2, dtype="float32", lora=LoraSettings(r=2, alpha=4))
    with pytest.raises(NonFiniteError, match=r"optimizer step 1: .*gradient of .*lora"):
        tiny_fit(byte_model, feedback, module=module, callbacks=[Inject("gradient", math.nan, 0, 1, steps=(1,))])
