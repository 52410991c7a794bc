"""A model and a tokenizer that Python holds are trained, gone on with and loaded like those that have a name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from bco_lightning import BCOModule, FeedbackDataModule, LoraSettings, RewardShift, bco_loss, load_aligned, score
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.cli.app import main
from bco_lightning.errors import CheckpointError, ConfigError, FeedbackRowError, LanguageModelError
from bco_lightning.models.load import GIVEN
from tests.conftest import tiny_data, tiny_module, tiny_trainer

CONSTANT: dict[str, Any] = {"warmup_ratio": 0.0, "lr_schedule": "constant_with_warmup"}
LORA = LoraSettings(r=4, alpha=8)
DOCS = Path(__file__).parents[2] / "docs" / "python.md"


def model_object(tiny_model: str, name: str | None = None, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, **options)
    model.name_or_path = tiny_model if name is None else name
    return model.train()


def fitted(
    module: BCOModule, log: str, folder: Path | None = None, steps: int = 3, data: Any = None, **options: Any
) -> BCOModule:
    checkpoint = RunCheckpoint()
    checkpoint.run_folder = folder
    saving = {"enable_checkpointing": True, "callbacks": [checkpoint], "default_root_dir": folder} if folder else {}
    tiny_trainer(max_steps=steps, **saving).fit(module, tiny_data(log, seed=0, **(data or {})), **options)
    return module


def weights(module: BCOModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("lora", [LORA, pytest.param(None, marks=pytest.mark.slow)])
def test_a_model_object_is_trained_as_the_model_of_its_name_and_gone_on_with(
    lora: LoraSettings | None, tiny_model: str, tokenizer: Any, log: str, tmp_path: Path
) -> None:
    def of_objects() -> BCOModule:
        model = model_object(tiny_model, "")
        return BCOModule(model=model, tokenizer=tokenizer, lora=lora, learning_rate=1e-2, **CONSTANT)

    expected = weights(fitted(tiny_module(tiny_model, lora=lora, **CONSTANT), log))
    fitted(of_objects(), log, tmp_path / "run", steps=2)
    module = fitted(of_objects(), log, ckpt_path=str(tmp_path / "run" / "checkpoints" / "step-00000002"))
    for name, value in weights(module).items():
        assert torch.equal(value, expected[name]), name
    # The reference is what came in, also where no name could give it again.
    with module.reference.model() as reference, torch.no_grad():
        ids = torch.arange(3, 23)[None]
        assert torch.equal(reference(ids).logits, model_object(tiny_model).eval()(ids).logits)
    with pytest.raises(LanguageModelError, match=r"expected the model object that the run was given, found none.*Give"):
        load_aligned(tmp_path / "run")
    loaded, _ = load_aligned(str(tmp_path / "run"), model=model_object(tiny_model, ""), tokenizer=tokenizer)
    assert weights(loaded).keys() == expected.keys()


@pytest.mark.slow
def test_a_run_that_was_given_objects_is_loaded_by_name_where_that_gives_the_same(
    tiny_model: str, tokenizer: Any, log: str, tmp_path: Path
) -> None:
    def changed(name: str) -> Any:
        model = model_object(tiny_model, name)
        with torch.no_grad():
            model.get_input_embeddings().weight[5] += 1
        return model

    fitted(BCOModule(model=model_object(tiny_model), lora=LORA), log, tmp_path / "same")
    module, steps = load_aligned(tmp_path / "same", dtype="bfloat16")
    assert (module.hparams["name_or_path"], steps, module.policy.dtype) == (tiny_model, 3, torch.bfloat16)
    fitted(BCOModule(tiny_model, model=changed(""), tokenizer=tokenizer, lora=LORA), log, tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"found another model \(other frozen weights\)\. Give them: load_aligned"
    ):
        load_aligned(tmp_path / "other")
    load_aligned(tmp_path / "other", model=changed("anything"), tokenizer=tokenizer)
    own = BCOModule(tiny_model).tokenizer
    own.add_tokens(["<added>"])
    fitted(BCOModule(tiny_model, tokenizer=own, lora=LORA), log, tmp_path / "tokens")
    with pytest.raises(CheckpointError, match="found another tokenizer"):
        load_aligned(tmp_path / "tokens")


def test_objects_that_would_not_be_trained_as_they_seem_are_refused(tiny_model: str) -> None:
    bfloat16 = model_object(tiny_model, dtype=torch.bfloat16)
    with pytest.raises(
        ConfigError, match=r"model: expected weights of float32, found bfloat16. Load it with dtype=torch"
    ):
        BCOModule(model=bfloat16)
    assert BCOModule(model=bfloat16, dtype="bfloat16").hparams["dtype"] == "bfloat16"
    assert BCOModule(model=bfloat16, lora=LORA).hparams["name_or_path"] == tiny_model
    assert BCOModule(model=model_object(tiny_model, "")).hparams["name_or_path"] == GIVEN
    module = BCOModule(model=model_object(tiny_model), lora=LORA)
    for taken in (module.policy, module.policy.get_base_model(), module.objective):
        with pytest.raises(ConfigError, match="model: expected a model of transformers without adapters, found"):
            BCOModule(model=taken)


def test_the_command_line_takes_no_objects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model.name_or_path=x", "--model.tokenizer=y"]) == 2
    assert "--model.tokenizer" in capsys.readouterr().err


# --- score


def log_probs_of(model: Any, tokenizer: Any, row: dict[str, Any]) -> torch.Tensor:
    """By transformers alone."""
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
    ids = torch.tensor(whole[:end])
    log_probs = model(ids[None]).logits[0].log_softmax(-1)
    return log_probs[:-1].gather(-1, ids[1:, None])[len(prompt) - 1 :].sum()


def test_scores_are_log_ratios_of_float64(tiny_model: str, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    torch.manual_seed(3)
    policy, rows = model_object(tiny_model), [{key: row[key] for key in ("prompt", "completion")} for row in rows[:6]]
    for parameter in policy.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    before = [parameter.requires_grad for parameter in policy.parameters()]
    prompts, completions = ([row[name] for row in rows] for name in ("prompt", "completion"))
    how: dict[str, Any] = {
        "policy": policy,
        "reference": tiny_model,
        "tokenizer": tokenizer,
        "beta": 0.5,
        "batch_size": 4,
    }
    found = score(prompts, completions, **how)
    assert policy.training
    assert [parameter.requires_grad for parameter in policy.parameters()] == before
    for given in (rows, Dataset.from_list(rows), pd.DataFrame(rows)):
        assert torch.equal(score(given, **how).rewards, found.rewards)
    assert torch.allclose(score(rows, tokens_per_micro_batch=40, **how).rewards, found.rewards, atol=1e-4)
    with torch.no_grad():
        exact = [model.double().eval() for model in (policy, model_object(tiny_model))]
        by_policy, by_reference = (torch.stack([log_probs_of(m, tokenizer, row) for row in rows]) for m in exact)
    assert torch.allclose(found.rewards.double(), 0.5 * (by_policy - by_reference), atol=2e-3)
    assert torch.allclose(found.policy_log_probs.double(), by_policy, atol=2e-3)


@pytest.mark.slow
def test_a_module_and_its_checkpoint_score_as_the_run_did(
    tiny_model: str, log: str, rows: list, tmp_path: Path
) -> None:
    module = fitted(tiny_module(tiny_model, beta=0.3), log, tmp_path / "run")
    found = score(rows, policy=module)
    assert found.rewards.abs().max() > 1e-3
    assert torch.equal(score(rows, policy=str(tmp_path / "run")).rewards, found.rewards)
    plain = fitted(tiny_module(tiny_model, beta=0.3), log, tmp_path / "plain", data={"chat_template": "plain"})
    told = score(rows, policy=plain)
    assert torch.equal(score(rows, policy=tmp_path / "plain").rewards, told.rewards)
    by_hand = score(rows, policy=plain.policy, reference=tiny_model, tokenizer=plain.tokenizer, chat_template="plain")
    assert torch.allclose(told.policy_log_probs, by_hand.policy_log_probs, atol=1e-4)
    batch = next(iter(module_data(module, rows).predict_dataloader()))
    assert torch.allclose(module.predict_step(batch, 0).rewards_B, found.rewards, atol=1e-5)


def module_data(module: BCOModule, rows: list) -> FeedbackDataModule:
    data = FeedbackDataModule(predict=rows, tokenizer=module.tokenizer, batch_size=len(rows))
    data.setup("predict")
    return data


def test_what_cannot_be_scored_is_said(tiny_model: str, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="score: expected a reference beside a policy that brings none"):
        score(rows, policy=tiny_model)
    with pytest.raises(ValueError, match="shorter"):
        score(["a", "b"], ["c"], policy=tiny_model, reference=tiny_model)
    rows[0]["completion"] *= 9
    with pytest.raises(FeedbackRowError, match=r"expected answers that can all be scored, found .*row 1 of predict"):
        score(rows, policy=tiny_model, reference=tiny_model, max_length=80, long_completions="drop")


# --- the loss


def test_a_training_loop_of_ones_own_takes_the_steps_of_the_module(
    tiny_model: str, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    rows = [{**row, "label": number % 2 == 0} for number, row in enumerate(rows[:8])]
    module = BCOModule(model=model_object(tiny_model), tokenizer=tokenizer, learning_rate=1e-2, **CONSTANT)
    data = FeedbackDataModule(train=rows, validation_fraction=0.0, batch_size=8)
    tiny_trainer(max_steps=3).fit(module, data)

    policy, reference, shift = model_object(tiny_model).eval(), model_object(tiny_model).eval(), RewardShift(0.9)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    thumbs_up = torch.tensor([row["label"] for row in rows])
    for _ in range(3):
        found = torch.stack([log_probs_of(policy, tokenizer, row) for row in rows])
        with torch.no_grad():
            known = torch.stack([log_probs_of(reference, tokenizer, row) for row in rows])
        rewards = 0.1 * (found - known)
        losses = bco_loss(rewards, thumbs_up, reward_shift=shift.value)
        optimizer.zero_grad()
        (losses[thumbs_up].mean() + losses[~thumbs_up].mean()).backward()
        optimizer.step()
        up, down = rewards.detach()[thumbs_up], rewards.detach()[~thumbs_up]
        shift.update(sum_up=up.sum().item(), num_up=4, sum_down=down.sum().item(), num_down=4)
    assert shift.value == pytest.approx(module.reward_shift.value, abs=2e-4)
    assert shift.value != 0
    ids = torch.arange(3, 23)[None]
    assert torch.allclose(policy(ids).logits, module.policy(ids).logits, atol=2e-2)
    assert not torch.allclose(policy(ids).logits, reference(ids).logits, atol=0.2)


# --- the documentation


def test_what_the_page_on_python_shows_runs(
    tiny_model: str, tokenizer: Any, rows: list, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"NAME": tiny_model, "rows": rows}
    for block in blocks:
        exec(block.replace("Qwen/Qwen2.5-0.5B-Instruct", tiny_model), names)  # noqa: S102
    assert names["trainer"].global_step == 3


CELLS = (
    """
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from bco_lightning import BCOModule, FeedbackDataModule, LoraSettings, score
model = AutoModelForCausalLM.from_pretrained(NAME, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(NAME)
rows = [{"prompt": f"q{n % 8}", "completion": f"answer {n}", "label": n % 3 > 0} for n in range(24)]
""",
    """
module = BCOModule(model=model, tokenizer=tokenizer, lora=LoraSettings(r=4), learning_rate=1e-2)
trainer = Trainer(max_epochs=1, enable_progress_bar=False)
trainer.fit(module, FeedbackDataModule(train=rows, batch_size=4))
""",
    "print(score(['Is tea good?'], ['Yes, very.'], policy=module))",
)


@pytest.mark.slow
def test_a_notebook_trains_its_own_model_object_and_prints_nothing_that_its_reader_cannot_act_on(
    tiny_model: str, tmp_path: Path
) -> None:
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    cells = [nbformat.v4.new_code_cell(cell.replace("NAME", repr(tiny_model))) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells[1:] for output in cell.outputs]
    said = "".join(str(output.get("text", output.get("data"))) for output in outputs)
    assert "Scores(rewards=tensor([" in said
    for words in (
        "Tip:",
        "in eval mode at the start",
        "LeafSpec",
        "on_before_batch_transfer",
        "TPU",
        "logging interval",
    ):
        assert words not in said
