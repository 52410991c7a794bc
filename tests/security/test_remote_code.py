"""S3: code in a model folder is never run, and no file, config or variable can say otherwise; nor is a pickle read."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.cli.app import main
from bco_lightning.errors import LanguageModelError
from bco_lightning.models.load import load_language_model, load_policy, load_tokenizer
from tests.reliability.tiny_run import make_log, make_model
from tests.trials import Trials

SOURCE = Path(__file__).parents[2] / "src" / "bco_lightning"
NEVER_RUN = "needs Python code of its own, which is never run"


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.marker), "w")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_code(folder: Path, marker: Path, *files: str) -> str:
    """Makes ``config.json``, ``tokenizer_config.json`` or both ask for code of the folder."""
    make_model(folder)
    (folder / "own_code.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit('own code ran')\n")
    classes = {"AutoConfig": "own_code.C", "AutoModelForCausalLM": "own_code.M", "AutoTokenizer": ["own_code.T", None]}
    if "config" in files:
        change_json(
            folder / "config.json", auto_map=classes, model_type="own", architectures=["M"], trust_remote_code=True
        )
    if "tokenizer" in files:
        change_json(
            folder / "tokenizer_config.json", auto_map=classes, tokenizer_class="OwnTokenizer", trust_remote_code=True
        )
    if "generate" in files:
        (folder / "custom_generate").mkdir()
        shutil.copy(folder / "own_code.py", folder / "custom_generate/generate.py")
    return str(folder)


def adapter_of(base: str, folder: Path) -> str:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "TRUST_REMOTE_CODE",
        "HF_TRUST_REMOTE_CODE",
        "TRANSFORMERS_TRUST_REMOTE_CODE",
        "HF_DATASETS_TRUST_REMOTE_CODE",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a person in a hurry answers
    return tmp_path / "marker"


@pytest.mark.promise(
    "S3", "code of a model folder is refused in words, for policy, reference and tokenizer, and never run"
)
def test_code_of_a_model_folder_is_refused(
    trials: Trials, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, log = make_model(tmp_path / "plain"), make_log(tmp_path / "log.jsonl")
    hostile = with_code(tmp_path / "hostile", marker, "config", "tokenizer")
    own_model = with_code(tmp_path / "own_model", marker, "config")
    own_tokenizer = with_code(tmp_path / "own_tokenizer", marker, "tokenizer")
    silent = with_code(tmp_path / "silent", marker, "tokenizer")
    change_json(Path(silent) / "config.json", model_type="qwen2")  # transformers would take a tokenizer of its own
    adapter = adapter_of(plain, tmp_path / "adapter")
    change_json(Path(adapter) / "adapter_config.json", base_model_name_or_path=own_model, trust_remote_code=True)
    cases = {
        "policy": lambda: load_policy(own_model, torch.float32, LoraSettings(r=2), seed=0),
        "policy in full": lambda: load_policy(own_model, torch.float32, None, seed=0),
        "reference": lambda: BCOModule(plain, reference_name_or_path=own_model, dtype="float32").reference.hold(),
        "tokenizer": lambda: load_tokenizer(own_tokenizer),
        "tokenizer that another would stand in for": lambda: load_tokenizer(silent),
        "tokenizer of a hostile model": lambda: load_tokenizer(hostile),
        "base of an adapter": lambda: load_language_model(adapter, torch.float32),
        "adapter that is trained on": lambda: load_policy(adapter, torch.float32, LoraSettings(), seed=0),
    }
    for trial in trials([*cases, "command line"], quick=9):
        with trial as name:
            if name == "command line":
                assert main(["fit", f"--model.name_or_path={hostile}", f"--data.train_files={log}"]) == 2
                message = capsys.readouterr().err
            else:
                with pytest.raises(LanguageModelError) as caught:
                    cases[name]()
                message = str(caught.value)
            assert NEVER_RUN in message
            assert not marker.exists()
            assert "own_code" not in " ".join(sys.modules)


@pytest.mark.promise("S3", "no config, command line, model file or checkpoint can set trust_remote_code")
def test_nothing_can_ask_for_trust(
    trials: Trials, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile, log = with_code(tmp_path / "hostile", marker, "config"), make_log(tmp_path / "log.jsonl")
    given = [f"--model.name_or_path={hostile}", f"--data.train_files={log}"]
    Path("model.yaml").write_text("model: {trust_remote_code: true}\n")
    Path("columns.yaml").write_text("data: {trust_remote_code: true}\n")
    cases = {
        "config of the model": ["fit", "--config=model.yaml", *given],
        "config of the data": ["fit", "--config=columns.yaml", *given],
        "command line": ["fit", *given, "--model.trust_remote_code=true"],
        "trainer": ["fit", *given, "--trainer.trust_remote_code=true"],
    }
    for trial in trials([*cases, "checkpoint"], quick=5):
        with trial as name:
            if name == "checkpoint":
                options = {**BCOModule(hostile, dtype="float32").hparams, "trust_remote_code": True}
                with pytest.raises(Exception, match=r"trust_remote_code|unexpected"):
                    BCOModule(**options).policy  # noqa: B018
            else:
                with pytest.raises(SystemExit) as caught:
                    main(cases[name])
                assert caught.value.code == 2
                assert "trust_remote_code" in capsys.readouterr().err
            assert not marker.exists()


def test_code_that_is_not_needed_is_left_alone(marker: Path, tmp_path: Path) -> None:
    folder = Path(with_code(tmp_path / "model", marker, "generate"))
    classes = {"AutoModelForCausalLM": "own_code.M", "AutoTokenizer": ["own_code.T", None]}
    change_json(folder / "config.json", auto_map=classes)
    change_json(folder / "tokenizer_config.json", auto_map=classes)
    model, tokenizer = load_language_model(str(folder), torch.float32), load_tokenizer(str(folder))
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


@pytest.mark.promise("S3", "pickled weights are never read: the error says so, and how to convert them")
def test_pickled_weights_are_refused(trials: Trials, marker: Path, tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain")

    def pickled(name: str, file: str, index: str | None = None) -> Path:
        folder = tmp_path / name
        shutil.copytree(plain, folder)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / file)
        if index:
            weight_map = dict.fromkeys(weights, file)
            (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    whole = pickled("whole", "pytorch_model.bin")
    sharded = pickled("sharded", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json")
    evil = pickled("evil", "pytorch_model.bin")
    (evil / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    named = tmp_path / "named"
    shutil.copytree(plain, named)
    torch.save(load_file(named / "model.safetensors"), named / "adapter_model.bin")
    change_json(named / "config.json", transformers_weights="adapter_model.bin")
    adapter = Path(adapter_of(plain, tmp_path / "adapter"))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    cases: dict[str, Callable[[], Any]] = {
        "model": lambda: load_language_model(str(whole), torch.float32),
        "model in shards": lambda: load_language_model(str(sharded), torch.float32),
        "model with a payload": lambda: load_policy(str(evil), torch.float32, None, seed=0),
        "named by the config": lambda: load_language_model(str(named), torch.float32),
        "adapter": lambda: load_language_model(str(adapter), torch.float32),
        "adapter that is trained on": lambda: load_policy(str(adapter), torch.float32, LoraSettings(), seed=0),
    }
    for trial in trials(list(cases), quick=6):
        with trial as name:
            with pytest.raises(LanguageModelError) as caught:
                cases[name]()
            assert re.search(r"found pickled ones alone \((\w|-)+\.bin\), which are never read", str(caught.value))
            assert "save_pretrained" in str(caught.value)
            assert not marker.exists()


def test_every_loader_is_told_so_explicitly() -> None:
    calls = [
        call
        for path in SOURCE.rglob("*.py")
        for call in re.findall(
            r"Auto\w+\.from_pretrained\((.*?)\n?\s*\)\n", path.read_text(encoding="utf-8"), re.DOTALL
        )
        if "FOLDER" not in call
    ]
    assert len(calls) >= 3
    assert all("trust_remote_code=False" in call for call in calls), calls
    assert not [
        path for path in SOURCE.rglob("*.py") if re.search(r"trust_remote_code\s*=\s*(?!False)\w", path.read_text())
    ]
