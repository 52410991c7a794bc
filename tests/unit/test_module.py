"""The module weights Eq. 8, resumes, checks its checkpoints and refuses options out of range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import AsyncCheckpointIO

from bco_lightning import BCOModule, LoraSettings, bco_loss, load_aligned
from bco_lightning.checkpoints.format import read_checkpoint
from bco_lightning.errors import CheckpointError, ConfigError, LanguageModelError, NonFiniteError
from tests.conftest import tiny_data, tiny_module, tiny_trainer, write_jsonl


def fit(module: BCOModule, log: str, max_steps: int, ckpt_path: str | None = None, **options: Any) -> Any:
    trainer = tiny_trainer(max_steps=max_steps)
    trainer.fit(module, tiny_data(log, **options), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def trained(module: BCOModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def test_auto_class_weights_make_the_mean_over_rows_the_sum_of_class_means(tiny_model: str, log: str) -> None:
    module = tiny_module(tiny_model, learning_rate=1e-30)
    fit(module, log, max_steps=1, batch_size=24, validation_fraction=0.0)
    assert module.class_weights == pytest.approx((24 / 16, 24 / 8))
    up = torch.arange(24) < 16
    rewards = torch.randn(24, dtype=torch.float64)
    losses = bco_loss(rewards, up, reward_shift=0.2)
    weighted = (torch.where(up, *module.class_weights) * losses).mean()
    assert float(weighted) == pytest.approx(float(losses[up].mean() + losses[~up].mean()))


@pytest.mark.parametrize(
    ("option", "expected"), [("none", (1.0, 1.0)), ((0.5, 2.0), (0.5, 2.0)), ("auto", (1 / 0.5, 1 / 0.5))]
)
def test_class_weights_can_be_explicit_none_or_those_of_balanced_sampling(
    option: Any, expected: tuple[float, float], tiny_model: str, log: str
) -> None:
    module = tiny_module(tiny_model, class_weights=option)
    fit(module, log, max_steps=1, balanced_sampling=True)
    assert module.class_weights == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("stop", [5, 6])
def test_a_resumed_run_equals_the_uninterrupted_one(
    kind: str, stop: int, tiny_model: str, log: str, tmp_path: Path
) -> None:
    """24 rows less the held-out prompt's 3, 4 a step: an epoch is 6 steps, so 5 is inside one and 6 is its border."""
    options: dict[str, Any] = {"lora": LoraSettings(r=4) if kind == "lora" else None, "learning_rate": 1e-2}
    whole = tiny_module(tiny_model, **options)
    fit(whole, log, max_steps=9)

    first = tiny_module(tiny_model, **options)
    trainer = tiny_trainer(max_steps=9)
    trainer.callbacks.append(_StopAt(stop, tmp_path / "x.ckpt"))
    with pytest.raises(_Killed):
        trainer.fit(first, tiny_data(log))
    resumed = tiny_module(tiny_model, **options)
    fit(resumed, log, max_steps=9, ckpt_path=str(tmp_path / "x.ckpt"))

    assert resumed.reward_shift.state_dict() == whole.reward_shift.state_dict()
    expected = trained(whole)
    for name, value in trained(resumed).items():
        assert torch.equal(value, expected[name]), name
    assert not torch.equal(trained(first)[name], expected[name])


def test_a_checkpoint_holds_neither_the_reference_nor_the_frozen_base(
    tiny_model: str, log: str, tmp_path: Path
) -> None:
    module = tiny_module(tiny_model)
    fit(module, log, max_steps=1).save_checkpoint(tmp_path / "x.ckpt")
    names = read_checkpoint(tmp_path / "x.ckpt")["state_dict"].keys()
    assert names == trained(module).keys()
    assert all("lora_" in name for name in names)


def test_evaluating_before_the_first_step_uses_a_shift_of_zero(tiny_model: str, log: str) -> None:
    (values,) = tiny_trainer().validate(tiny_module(tiny_model), tiny_data(log, validation_fraction=0.5), verbose=False)
    assert values["val/reward_shift"] == 0
    assert values["val/margin"] == 0
    assert values["val/loss"] == pytest.approx(2 * 0.693147, abs=1e-5)


def test_evaluating_a_checkpoint_uses_its_shift(tiny_model: str, log: str, tmp_path: Path) -> None:
    module = tiny_module(tiny_model)
    trainer = fit(module, log, max_steps=5, validation_fraction=0.5)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    (expected,) = trainer.validate(module, tiny_data(log, validation_fraction=0.5), verbose=False)
    assert expected["val/reward_shift"] == pytest.approx(module.reward_shift.value)
    assert expected["val/reward_shift"] != 0

    (values,) = tiny_trainer().validate(
        tiny_module(tiny_model),
        tiny_data(log, validation_fraction=0.5),
        ckpt_path=str(tmp_path / "x.ckpt"),
        weights_only=True,
        verbose=False,
    )
    assert values == expected
    assert load_aligned(tmp_path / "x.ckpt")[0].reward_shift.value == module.reward_shift.value


def test_a_checkpoint_of_other_settings_is_refused(tiny_model: str, log: str, tmp_path: Path) -> None:
    fit(tiny_module(tiny_model), log, max_steps=1).save_checkpoint(tmp_path / "x.ckpt")
    for other, message in (
        (tiny_module(tiny_model, lora=None), r"trained parameters as configured"),
        (tiny_module(tiny_model, beta=0.5), r"beta: 0\.1 then, 0\.5 now"),
    ):
        with pytest.raises(CheckpointError, match=message):
            fit(other, log, max_steps=2, ckpt_path=str(tmp_path / "x.ckpt"))


def test_resuming_on_other_data_is_refused(tiny_model: str, log: str, tmp_path: Path) -> None:
    fit(tiny_module(tiny_model), log, max_steps=1).save_checkpoint(tmp_path / "x.ckpt")
    for options, message in (
        ({"batch_size": 2}, "rows_per_step: 4 then, 2 now"),
        ({"seed": 9}, "seed: 0 then, 9 now"),
        ({"max_length": 20}, "max_length: 64 then, 20 now"),
        ({"chat_template": "plain"}, "chat_template"),
    ):
        with pytest.raises(CheckpointError, match=message):
            fit(tiny_module(tiny_model), log, max_steps=2, ckpt_path=str(tmp_path / "x.ckpt"), **options)


def test_the_training_loss_is_the_sum_of_two_class_means(tiny_model: str, log: str) -> None:
    """Eq. 8 on 16 up and 8 down, in float64 from the rewards of a policy that has moved."""
    module = tiny_module(tiny_model)
    fit(module, log, max_steps=3, batch_size=24, validation_fraction=0.0)
    data = tiny_data(log, batch_size=24, validation_fraction=0.0, tokenizer=module.tokenizer)
    data.setup("fit")
    loss = module.training_step(next(iter(data.train_dataloader())), 0)
    (rows,) = module.step_rows
    rewards, up = rows.rewards_B.double(), rows.thumbs_up_B
    delta = module.reward_shift.value
    assert delta != 0
    expected = -torch.sigmoid(rewards[up] - delta).log().mean() - torch.sigmoid(delta - rewards[~up]).log().mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_before_weights_and_shift(tiny_model: str, log: str) -> None:
    module = tiny_module(tiny_model)

    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: BCOModule, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                self.before = trained(pl_module), pl_module.reward_shift.state_dict()
                pl_module.objective.losses = lambda rows: rows.rewards_B * float("nan")

    poison = Poison()
    trainer = tiny_trainer(max_steps=4, callbacks=[poison])
    with pytest.raises(NonFiniteError, match=r"step 2: .*rank 0: losses nan in rows \d+ \(.*log\.jsonl:\d+\), "):
        trainer.fit(module, tiny_data(log))
    weights, shift = poison.before
    assert module.reward_shift.state_dict() == shift
    assert all(torch.equal(value, weights[name]) for name, value in trained(module).items())


def test_bce_decides_at_zero_whatever_the_shift(tiny_model: str) -> None:
    bce, bco = tiny_module(tiny_model, objective="bce"), tiny_module(tiny_model)
    for module in (bce, bco):
        module.reward_shift.update(sum_up=2.0, num_up=1, sum_down=1.0, num_down=1)
    assert (bce.objective.threshold, bco.objective.threshold) == (0.0, 1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"precision": name}, r"trainer\.precision.*model\.dtype: bfloat16") for name in ("bf16-true", "16-true")],
        ({"precision": "64-true"}, "trainer.precision: expected 32-true or bf16-mixed or 16-mixed, found 64-true"),
        ({"check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch: expected at least 1 epoch"),
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches: expected at least 1 micro-batch"),
        ({"val_check_interval": 0}, "trainer.val_check_interval: expected a number above 0"),
        ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val: expected a number of at least 0"),
        ({"plugins": [AsyncCheckpointIO()]}, "trainer.plugins: expected no other way .* found AsyncCheckpointIO"),
    ],
)
def test_what_of_the_trainer_would_give_other_numbers_or_not_be_heeded_is_refused_before_anything_is_read(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_trainer(max_steps=1, **options).fit(tiny_module("no model"), tiny_data("no log"))


def test_resuming_after_one_row_has_changed_is_refused(tiny_model: str, log: str, tmp_path: Path) -> None:
    fit(tiny_module(tiny_model), log, max_steps=1).save_checkpoint(tmp_path / "x.ckpt")
    path = Path(log)
    path.write_text(path.read_text().replace("answer 11.", "answer 12."))
    with pytest.raises(CheckpointError, match="row_digest"):
        fit(tiny_module(tiny_model), log, max_steps=2, ckpt_path=str(tmp_path / "x.ckpt"))


def test_gradient_checkpointing_runs_each_layer_forward_again(tiny_model: str, log: str) -> None:
    calls = {}
    for checkpointing in (False, True):
        module = tiny_module(tiny_model, gradient_checkpointing=checkpointing, reference_log_probs="online")
        count = 0

        def counted(*_: Any) -> None:
            nonlocal count
            count += 1

        module.policy.get_base_model().model.layers[0].mlp.register_forward_pre_hook(counted)
        fit(module, log, max_steps=1, validation_fraction=0.0)
        calls[checkpointing] = count
    assert calls == {False: 4, True: 5}  # policy and reference, at the start too; and the policy once more


def test_gradient_checkpointing_changes_no_number(tiny_model: str, log: str) -> None:
    plain, checkpointed = tiny_module(tiny_model), tiny_module(tiny_model, gradient_checkpointing=True)
    for module in (plain, checkpointed):
        fit(module, log, max_steps=3)
    for name, value in trained(checkpointed).items():
        assert torch.allclose(value, trained(plain)[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"model\.beta: expected a number above 0, found 0\.0"),
        ({"gradient_checkpointing": "selective"}, r"model\.gradient_checkpointing: .* with lora, found selective"),
        (
            {"optimizer": "adamw_bf16", "dtype": "bfloat16"},
            r"model\.optimizer: expected .* no lora for adamw_bf16, found lora",
        ),
        ({"optimizer": "adamw_bf16", "lora": None}, r"model\.optimizer: .* for adamw_bf16, found dtype: float32"),
        ({"learning_rate": -1.0}, r"model\.learning_rate"),
        ({"warmup_ratio": 2.0}, r"model\.warmup_ratio"),
        ({"objective": "dop"}, r"model\.objective: expected bco or .* or sft, found 'dop'"),
        ({"reward_shift_decay": 1.0}, r"model\.reward_shift_decay"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str, tiny_model: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_module(tiny_model, **options)


def test_a_run_of_one_step_learns(tiny_model: str, log: str) -> None:
    # A warm-up begins at a rate of 0, and one of a single step would be the whole run.
    module = tiny_module(tiny_model)
    fit(module, log, max_steps=1)
    assert all(each.any() for name, each in trained(module).items() if "lora_B" in name)  # which begin as zeros


class _StopAt(Checkpoint):
    """Saves and stops after an optimizer step, as a killed run with a checkpoint there would have."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)
            raise _Killed


class _Killed(RuntimeError):
    pass


@pytest.mark.parametrize("streaming", [False, True])
def test_a_rare_token_without_an_embedding_is_refused_with_both_numbers(
    streaming: bool, tiny_model: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    module, size = tiny_module(tiny_model), len(tiny_module(tiny_model).tokenizer)
    module.tokenizer.add_tokens(["zyxw"])  # and the model was not resized
    many = [{**row, "prompt": f"{row['prompt']} ({number})"} for number in range(4) for row in rows]
    many[75]["completion"] += " zyxw."
    options = {"tokenizer": module.tokenizer, "streaming": streaming, "validation_fraction": 0.0}
    with pytest.raises(LanguageModelError, match=f"expected tokens below {size}, .* found token {size} in a row"):
        tiny_trainer(max_epochs=1).fit(module, tiny_data(write_jsonl(tmp_path / "many.jsonl", many), **options))
    assert module.global_step == 0 or streaming
