"""What is exported is loaded as users load it, and is the policy; else nothing is exported."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from bco_lightning import LoraSettings
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.errors import ConfigError, LanguageModelError
from bco_lightning.serving import export as export_module
from bco_lightning.serving.export import export_checkpoint
from tests.conftest import tiny_data, tiny_module, tiny_trainer
from tests.unit.test_adapters import IDS_BT, made


def trained(model: str, log: str, folder: Path, **options: Any) -> torch.Tensor:
    """Logits of a policy after three steps, which are saved in a folder."""
    module, checkpoint = tiny_module(model, **options), RunCheckpoint()
    checkpoint.run_folder = folder
    trainer = tiny_trainer(max_steps=3, enable_checkpointing=True, default_root_dir=folder, callbacks=[checkpoint])
    trainer.fit(module, tiny_data(log, tokenizer=module.tokenizer))
    with torch.no_grad():
        return module.policy(input_ids=IDS_BT).logits


@pytest.mark.parametrize("targets", ["q_proj,lm_head", "embed_tokens", None])
def test_an_export_of_a_tied_model_is_the_policy(
    targets: str | None, tiny_model: str, log: str, tmp_path: Path
) -> None:
    lora = None if targets is None else LoraSettings(r=4, target_modules=targets)
    expected = trained(tiny_model, log, tmp_path / "run", lora=lora)
    loaders = {"merged": AutoModelForCausalLM, **({"adapter": AutoPeftModelForCausalLM} if lora else {})}
    for form, loader in loaders.items():
        export_checkpoint(tmp_path / "run", tmp_path / form, merge=form == "merged")
        found = loader.from_pretrained(tmp_path / form)(input_ids=IDS_BT).logits
        assert torch.allclose(found, expected, atol=2e-5), form


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_an_export_loads_in_lm_eval_and_gives_the_log_likelihood_that_the_policy_gives(
    form: str, tiny_model: str, log: str, tmp_path: Path
) -> None:
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="pip install lm_eval")
    instance = pytest.importorskip("lm_eval.api.instance")
    trained(tiny_model, log, tmp_path / "run", lora=LoraSettings(r=4))
    for name in ("merged", "adapter"):
        export_checkpoint(tmp_path / "run", tmp_path / name, merge=name == "merged")
    folder, given = str(tmp_path / form), ("What is this?", " A test.")
    loaded = {"pretrained": folder} if form == "merged" else {"pretrained": tiny_model, "peft": folder}
    lm = harness.HFLM(**loaded, device="cpu", dtype="float32", batch_size=1)
    asked = instance.Instance(request_type="loglikelihood", doc={}, arguments=given, idx=0)
    ((found, _),) = lm.loglikelihood([asked])
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    context, whole = (lm.tok_encode(text) for text in (given[0], "".join(given)))
    log_probs = policy(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    expected = log_probs.gather(1, torch.tensor(whole[1:])[:, None])[len(context) - 1 :].sum()
    assert found == pytest.approx(float(expected), abs=1e-4)


def test_tokens_that_came_in_with_an_adapter_go_out_with_it(tiny_model: str, log: str, tmp_path: Path) -> None:
    size = len(AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings().weight)
    made(tiny_model, tmp_path / "adapter", size + 2)
    tokenizer = tiny_module(tiny_model).tokenizer
    tokenizer.add_tokens(["<extra 1>", "<extra 2>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    expected = trained(str(tmp_path / "adapter"), log, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=IDS_BT).logits
    assert torch.allclose(found, expected, atol=2e-5)


def test_an_export_that_is_another_model_is_refused_and_leaves_nothing(
    tiny_model: str, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tiny_model, log, tmp_path / "run", lora=LoraSettings(r=4, target_modules="lm_head"))
    monkeypatch.setattr(export_module, "merge_adapter", lambda policy: policy.merge_and_unload())  # PEFT's own
    with pytest.raises(LanguageModelError, match=r"expected the log-probs of the policy .* found others by \d"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", merge=True)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_an_adapter_that_cannot_be_merged_is_exported_as_it_is_alone(tiny_model: str, log: str, tmp_path: Path) -> None:
    made(tiny_model, tmp_path / "adapter", lora_bias=True)
    trained(str(tmp_path / "adapter"), log, tmp_path / "run")
    with pytest.raises(LanguageModelError, match="Impossible to merge LoRA with `lora_bias=True`"):
        export_checkpoint(tmp_path / "run", tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    export_checkpoint(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("objective", ["bce", {"kldo": 1.0, "sft": 0.1}])
def test_an_export_is_scored_by_the_objective_that_it_was_trained_with(
    objective: str | dict[str, float], tiny_model: str, log: str, tmp_path: Path
) -> None:
    trained(tiny_model, log, tmp_path / "run", objective=objective)
    export_checkpoint(tmp_path / "run", tmp_path / "out", merge=True)
    module = tiny_module(str(tmp_path / "out"), lora=None, reference_name_or_path=tiny_model)
    (scores,) = tiny_trainer(limit_predict_batches=1).predict(module, tiny_data(log, predict_files=[log]))
    assert module.reward_shift.value != 0
    partition = module.objective.baselines.get("kldo_partition")
    assert scores.reward_shift == (math.log(partition.value) if partition else 0)


def test_the_card_tells_of_data_held_out_rows_and_drift_at_its_step(tiny_model: str, log: str, tmp_path: Path) -> None:
    trained(tiny_model, log, tmp_path / "run")
    feedback = {"train": {"/home/me/a|b.jsonl": [12, 6]}, "validation": {"/home/me/a|b.jsonl": [4, 2]}}
    (tmp_path / "run" / "provenance.json").write_text(json.dumps({"feedback": feedback}), encoding="utf-8")
    lines = [{"step": 2, "val/auroc": 0.625, "val/kl": 1.5}, {"step": 9, "val/auroc": 0.99, "val/kl": 99.0}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card, flags=re.MULTILINE))
    assert told[r"train rows of a\|b.jsonl"] == "12 thumbs up, 6 down"
    assert told[r"validation rows of a\|b.jsonl"] == "4 thumbs up, 2 down"
    assert (told["held-out auroc"], told["held-out kl"], told["optimizer steps"]) == ("0.625", "1.5", "3")
    assert "/home/me" not in card
    assert {"## Limits", "```bibtex"} <= set(card.splitlines())


@pytest.mark.parametrize("base", ['x/y"\n---\nevil: 1', "OWNER/NAME", "/srv/models/a"])
def test_a_card_says_any_name_and_only_that(base: str, tiny_model: str, log: str, tmp_path: Path) -> None:
    module = tiny_module(tiny_model)
    assert module.policy is not None  # made by its name
    module.options = dataclasses.replace(module.options, name_or_path=base)
    told = {"step": 3, "place": str(tmp_path / "run" / "checkpoints" / "step-00000003")}
    card = export_module._card(module, "a # `b` [c](d)", "", told, base, "peft")
    front = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert front.get("base_model") == (None if base.startswith("/") else base)
    assert front["library_name"] == "peft"
    assert r"# a \# \`b\` \[c\](d)" in card.splitlines()
    assert "\nevil" not in card.split("\n---\n", 1)[1]


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_goes_to_a_new_private_repository_and_nothing_else_does(
    fails: bool, tiny_model: str, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []

    def create(api: Any, name: str, private: bool) -> None:
        done.append((name, private))
        if fails:
            raise OSError("409: you already created this model repo")

    def upload(api: Any, repo_id: str, folder_path: Path) -> None:
        done.append((repo_id, sorted(path.name for path in folder_path.rglob("*"))))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    trained(tiny_model, log, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"me/it .*\(409: .*is written: use") if fails else nullcontext():
        export_checkpoint(tmp_path / "run", tmp_path / "out", push_to_hub="me/it")
    assert done[0] == ("me/it", True)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    known = "README.md adapter_config.json adapter_model.safetensors bco.json chat_template.jinja"
    assert done[1:] == ([] if fails else [("me/it", [*known.split(), "tokenizer.json", "tokenizer_config.json"])])
