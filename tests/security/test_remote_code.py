"""S3: code in a model folder is never run, and no file, config or variable can say otherwise; nor is a pickle read."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.cli.app import main
from bco_lightning.errors import LanguageModelError
from bco_lightning.models.load import load_language_model, load_policy, load_tokenizer
from tests.reliability.tiny_run import make_log, make_model
from tests.security.test_data_bombs import within
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
                assert main(cases[name]) == 2
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


CORE = "open({!r}, 'w').close()\nraise SystemExit('own code ran')\n"
# Fields of an adapter's config by which PEFT would import, load, or work for hours.
ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "a package beside it": ({"megatron_config": {"a": 1}, "megatron_core": "megatron.core"}, "megatron_config"),
    "a package of another name": ({"megatron_config": [{}], "megatron_core": "megatron.core"}, "megatron_config"),
    "a pickled cache": ({"corda_config": {"cache_file": "x.pt"}, "init_lora_weights": "corda"}, "corda_config"),
    "quantizing for ever": ({"loftq_config": {"loftq_iter": 10**9}, "init_lora_weights": "loftq"}, "loftq_config"),
    "decomposing for ever": ({"init_lora_weights": "pissa_niter_1000000"}, "init_lora_weights"),
    "a million layers": ({"layer_replication": [[0, 2]] * 5_000}, "layer_replication"),
    "other adapters": ({"peft_type": "XLORA", "adapters": {"a": "nobody/nothing"}}, "adapters"),
    "another tokenizer": ({"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "x/y"}, "tokenizer_name_or_path"),
    "a text in a number's place": ({"r": "__import__('os')"}, "found r in"),
    "a rank of millions": ({"r": 20_000_000}, "expected a rank that the weights have, found 20,000,000"),
    "a rank of millions in a pattern": ({"rank_pattern": {"q_proj": 10**7}}, "found 10,000,000"),
    "a slow pattern": ({"target_modules": "(([a-z_]+)+[.0-9]*)+!"}, "found some that take longer"),
    "a slow pattern in a list": ({"rank_pattern": {"(([a-z_]+)+[.0-9]*)+!": 2}}, "found some that take longer"),
}


@pytest.mark.promise("S3", "an adapter's config imports nothing, loads nothing else, and costs no more than seconds")
def test_what_an_adapter_asks_for_besides_is_refused(
    trials: Trials, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_model(tmp_path / "plain")
    honest = Path(adapter_of(plain, tmp_path / "adapter"))
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron/core.py").write_text(CORE.format(str(marker)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("bco_lightning.models.refusals._SECONDS", 1)
    for trial in trials(list(ADAPTERS), quick=9):
        with trial as name:
            changes, found = ADAPTERS[name]
            folder = tmp_path / name
            shutil.copytree(honest, folder)
            change_json(folder / "adapter_config.json", **changes)
            for load in (
                lambda: load_policy(str(folder), torch.float32, LoraSettings(), seed=0),  # noqa: B023
                lambda: load_language_model(str(folder), torch.float32),  # noqa: B023
            ):
                with within(seconds=2.0, megabytes=300), pytest.raises(LanguageModelError, match=found):
                    load()
                assert not marker.exists()
                assert "megatron" not in sys.modules


@pytest.mark.parametrize(
    "settings",
    [
        LoraConfig(r=2, target_modules=r".*\.(q_proj|v_proj)", rank_pattern={r"layers\.0\.": 1}),
        LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"], use_rslora=True),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa_niter_4", use_dora=True),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        AdaLoraConfig(init_r=2, target_r=1, target_modules=["q_proj"], total_step=10),
        VeraConfig(r=2, target_modules=["q_proj"]),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_adapters_of_the_usual_kinds_are_taken(settings: Any, tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain")
    get_peft_model(AutoModelForCausalLM.from_pretrained(plain), settings).save_pretrained(tmp_path / "adapter")
    assert type(load_language_model(str(tmp_path / "adapter"), torch.float32)).__name__ == "LlamaForCausalLM"


MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "a million layers": ({"num_hidden_layers": 10**6}, "at most 2,000 layers"),
    "layers further down": (
        {"text_config": {"model_type": "llama", "num_hidden_layers": 10**6}},
        "at most 2,000 layers",
    ),
    "layers by another name": ({"model_type": "gpt2", "n_layer": 10**6}, "at most 2,000 layers"),
    "a million experts": ({"model_type": "qwen3_moe", "num_experts": 10**6}, "200,000 experts"),
    "a vocabulary of billions": ({"vocab_size": 3 * 10**9}, "a vocab_size that the weights have, of at most 259"),
    "wide layers": ({"intermediate_size": 10**9}, "an? intermediate_size that the weights have"),
    "wide heads": ({"head_dim": 10**9}, "an? head_dim that the weights have"),
    "a kernel of the hub": ({"_attn_implementation": "own/kernel"}, "code which is never run"),
    "a kernel of the hub by its public name": ({"attn_implementation": "own/kernel"}, "code which is never run"),
    "weights elsewhere": ({}, "expected files of its own folder, found '../plain/model.safetensors'"),
    "a pipe": ({}, "expected a file, found one that cannot be read"),
    "a link to nothing": ({}, "expected a file, found one that cannot be read"),
}


@pytest.mark.promise(
    "S3", "a model folder's config names no kernel or weights elsewhere, and asks for no endless model"
)
def test_what_a_model_asks_for_besides_is_refused(trials: Trials, tmp_path: Path) -> None:
    plain = Path(make_model(tmp_path / "plain"))
    for trial in trials(list(MODELS), quick=len(MODELS)):
        with trial as name:
            changes, found = MODELS[name]
            folder = tmp_path / name
            shutil.copytree(plain, folder)
            change_json(folder / "config.json", **changes)
            if name == "a pipe":
                os.mkfifo(folder / "tokenizer.json.new")
            elif name == "a link to nothing":
                (folder / "generation_config.json").unlink(missing_ok=True)
                (folder / "generation_config.json").symlink_to("nowhere")
            elif name == "weights elsewhere":
                index = {"metadata": {}, "weight_map": {"x": "../plain/model.safetensors"}}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            with within(seconds=2.0, megabytes=300), pytest.raises(LanguageModelError, match=found):
                load_language_model(str(folder), torch.float32)


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
