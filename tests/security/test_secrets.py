"""S11 and S12: secrets and the texts of users stay out of logs, files, configs, errors and tracebacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from bco_lightning.cli.app import main
from bco_lightning.cli.plain_yaml import Refusal, load_without_secrets
from tests.reliability.tiny_run import ROOT, make_model
from tests.trials import Trials

LETTERS = "".join(chr(ord("a") + 7 * n % 26) for n in range(24))
SECRETS = {
    "HF_TOKEN": f"hf_{LETTERS}",
    "AWS_SECRET_ACCESS_KEY": f"{LETTERS}/{LETTERS}",
    "OPENAI_API_KEY": f"sk-proj-{LETTERS[::-1]}",
    "DATABASE_PASSWORD": f"correct-horse-{LETTERS[5:]}",
    "HTTPS_PROXY": f"http://somebody:{LETTERS[3:]}x@proxy.invalid:8080",
}
NAMES = ["Zdenka Prvá", "Ødegård", "李小龍", "o'Brien-Smith", "Nguyễn Thị"]
CANARIES = [f"{NAMES[n % 5]} {n} <canary.{n}@example.invalid> +44 20 7946 {n:04}" for n in range(20)]


def write_log(path: Path, rows: int = 40, **changes: dict[str, Any]) -> str:
    """Rows that each hold a canary in prompt or completion; ``changes`` are of the rows that they number."""
    lines = []
    for n in range(rows):
        prompt, completion = f"Who is {n}? {CANARIES[n % 20]}", f"It is {n}. {CANARIES[(n + 7) % 20]}"
        row = {"prompt": prompt, "completion": completion, "label": n % 3 != 0, **changes.get(f"row{n}", {})}
        lines.append(json.dumps(row, ensure_ascii=n % 2 == 0))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def options(model: str, log: str) -> list[str]:
    return [
        f"--model.name_or_path={model}",
        f"--data.train_files={log}",
        f"--data.predict_files={log}",
        "--data.validation_fraction=0.2",
        "--data.max_length=200",
        "--trainer.max_steps=3",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
    ]


def found_in(texts: dict[str, bytes], needles: list[str]) -> list[str]:
    """Where a needle stands, plain or as JSON and YAML escape it."""
    forms = [
        (needle, form)
        for needle in needles
        for form in {needle.encode(), json.dumps(needle)[1:-1].encode(), yaml.safe_dump(needle).strip()[1:-1].encode()}
    ]
    return [f"{needle} in {place}" for place, text in texts.items() for needle, form in forms if form in text]


def everything_written(root: Path, *but: str) -> dict[str, bytes]:
    written = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {place: text for place, text in written.items() if not place.startswith(("model/", *but))}


def outcome(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, dict[str, bytes]]:
    capfd.readouterr()
    try:
        status = main(arguments)
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    printed = capfd.readouterr()
    return status, {"stdout": printed.out.encode(), "stderr": printed.err.encode()}


def fresh_process(arguments: list[str], root: Path, **environment: str) -> tuple[int, dict[str, bytes]]:
    """Runs the command with home, caches and temporary files below ``root``."""
    folder = str(root)
    ours = {"HOME": folder, "HF_HOME": f"{folder}/hf", "TMPDIR": folder, "PYTHONPATH": str(ROOT / "src"), **environment}
    done = subprocess.run(
        [sys.executable, "-m", "bco_lightning", *arguments], env={**os.environ, **ours}, cwd=root, capture_output=True
    )
    return done.returncode, {"stdout": done.stdout, "stderr": done.stderr}


@pytest.mark.promise(
    "S11", "secrets of the environment: 0 hits in files, stdout and stderr of fit, failing fit, print_config"
)
def test_secrets_of_the_environment_are_written_nowhere(
    trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, log = make_model(tmp_path / "model"), write_log(tmp_path / "log.jsonl")
    bad = write_log(tmp_path / "bad.jsonl", row8={"completion": None})
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    runs: dict[str, tuple[int, list[str], bool]] = {
        "fit": (0, ["fit", *options(model, log)], False),
        "predict": (0, ["predict", *options(model, log)], False),
        "print_config": (0, ["fit", *options(model, log), "--print_config"], False),
        "failing fit, bad row": (2, ["fit", *options(model, bad)], False),
        "failing fit, no model": (2, ["fit", *options("gone/nowhere", log)], False),
        "failing fit, unknown option": (2, ["fit", *options(model, log), "--model.bata=1"], False),
        "failing fit with a traceback": (1, ["fit", *options(model, bad)], True),
        "fit in a fresh process": (0, ["fit", *options(model, log)], True),
    }
    for trial in trials(list(runs), quick=3):
        with trial as name:
            expected, arguments, fresh = runs[name]
            debug = {"BCO_DEBUG": "1"} if expected == 1 else {}
            status, said = fresh_process(arguments, tmp_path, **debug) if fresh else outcome(arguments, capfd)
            assert status == expected, said["stderr"][-500:]
            assert expected != 1 or b"Traceback" in said["stderr"]
            assert found_in({**everything_written(tmp_path), **said}, list(SECRETS.values())) == []


API_KEY = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x", "api_key": "@"}}
# The config, the secret that stands for @, and the key that the error names.
CONFIGS: dict[str, tuple[str, str, str]] = {
    "a token option": ("model: {hf_token: '@'}", "HF_TOKEN", "model.hf_token"),
    "a token option of another look": ("model: {hubToken: '@'}", "DATABASE_PASSWORD", "model.hubToken"),
    "a token in a known option": ("model: {name_or_path: 'x/@'}", "HF_TOKEN", "model.name_or_path"),
    "a password": ("known_reward: {password: '@'}", "DATABASE_PASSWORD", "known_reward.password"),
    "a key of a logger": (yaml.safe_dump({"trainer": {"logger": API_KEY}}), "OPENAI_API_KEY", "api_key"),
    "credentials as a mapping": (
        "data: {credentials: {user: me, x: '@'}}",
        "AWS_SECRET_ACCESS_KEY",
        "data.credentials",
    ),
    "user and password of a URL": ("data: {train_files: ['@/log.jsonl']}", "HTTPS_PROXY", "data.train_files.0"),
    "a token as a key": ("model: {'@': 1}", "HF_TOKEN", "config.yaml"),
    "beside a mistake in the YAML": ("model: {x: *@\n", "HF_TOKEN", "config.yaml"),
    "as the whole config": ("'@'", "OPENAI_API_KEY", "config.yaml"),
    "of a type that no option has": ("model: {beta: '@'}", "OPENAI_API_KEY", "model.beta"),
}
COMMANDS: dict[str, tuple[list[str], str, str]] = {
    "an unknown option": (["fit", "--hf_token=@"], "HF_TOKEN", "hf_token"),
    "an option and a value": (["fit", "--model.api_key", "@"], "OPENAI_API_KEY", "model.api_key"),
    "a known option": (["fit", "--model.name_or_path", "@"], "HF_TOKEN", "model.name_or_path"),
    "in a structure": (["fit", "--bogus={password: '@'}"], "DATABASE_PASSWORD", "bogus.password"),
    "a config in full": (["fit", "--config={model: {token: '@'}}"], "DATABASE_PASSWORD", "config.model.token"),
    "a URL": (["fit", "--ckpt_path=@/x.ckpt"], "HTTPS_PROXY", "ckpt_path"),
    "export": (["export", "--token", "@"], "HF_TOKEN", "token"),
    "the name of an option": (["fit", "--@"], "HF_TOKEN", "command line"),
    "instead of a command": (["@"], "HF_TOKEN", "command line"),
}


@pytest.mark.promise("S11", "a secret in a config or on the command line is refused by its key and never shown")
def test_a_secret_that_is_written_down_is_refused_and_not_shown(
    trials: Trials, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for trial in trials([*CONFIGS, *COMMANDS], quick=10):
        with trial as name:
            if name in CONFIGS:
                text, secret, key = CONFIGS[name]
                (tmp_path / "config.yaml").write_text(text.replace("@", SECRETS[secret]))
                arguments = ["fit", "--config=config.yaml", "--model.name_or_path=x"]
            else:
                given, secret, key = COMMANDS[name]
                arguments = [argument.replace("@", SECRETS[secret]) for argument in given]
            status, said = outcome(arguments, capfd)
            assert status == 2
            assert f"{key}".encode() in said["stderr"]
            assert b"expected no secret in a config file or on the command line" in said["stderr"]
            assert b"environment" in said["stderr"]
            written = everything_written(tmp_path, "config.yaml")
            assert found_in({**written, **said}, [SECRETS[secret], LETTERS[5:20]]) == []


@pytest.mark.parametrize(
    "text",
    [
        "known_reward: {max_new_tokens: 64}",
        "data: {tokenizer: x, max_tokens: 5, special_tokens: [a], tokens_per_row: 3}",
        "x: {eos_token: '</s>', pad_token: '<pad>', eos_token_id: 2, token_ids: [1], max_token: 9}",
        "trainer: {logger: {api_key: null, password: '', token: false}}",
        "trainer: {callbacks: {monitor: val/loss, key: x, primary_key: id, keyboard: us, secretary: Ann}}",
        "model: {name_or_path: hf-internal/task-sk-learn-model-of-feedback-2024, revision: akia}",
        "data: {train_files: 'hub:owner/name@train', columns: {label: password}}",
        "data: {train_files: ['abfs://box@account.host/*.jsonl', 'abfss://box@account.host/a', 'az://box@account/a']}",
        "data: {train_files: 'https://host/a.jsonl?download=true&page=2&sort=keys&monkey=&tokens=5'}",
        "data: {train_files: ['logs/a?.jsonl', 'logs/sk_test.jsonl', 'npm_install.jsonl', 'dapi.csv', 'pypi-log.csv']}",
        "ckpt_path: 'https://host.invalid/x.ckpt#sha256=0123456789abcdef0123456789abcdef'",
    ],
)
def test_what_only_sounds_like_a_secret_is_read(text: str) -> None:
    assert load_without_secrets(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    "value",
    [
        "ghp_" + LETTERS,
        "AKIA" + LETTERS[:16].upper(),
        "glpat-" + LETTERS,
        "-----BEGIN RSA PRIVATE KEY-----",
        "sk_live_" + LETTERS,
        "rk_test_" + LETTERS,
        "dapi" + "0a1b2c3d" * 4,
        "npm_" + LETTERS + LETTERS[:12],
        "pypi-AgEIcHlwaS5vcmc" + LETTERS,
        "dckr_pat_" + LETTERS,
        "xapp-1-" + LETTERS,
        "xoxb-1234-" + LETTERS,
        "https://hooks.slack.com/services/T0/B0/" + LETTERS,
        "ya29." + LETTERS,
        "GOCSPX-" + LETTERS,
        "AIza" + LETTERS * 2,
        f"SG.{LETTERS}.{LETTERS}",
        "whsec_" + LETTERS,
        "hvs." + LETTERS,
        "sk-ant-api03-" + LETTERS,
    ],
)
def test_known_kinds_of_tokens_are_recognized_under_any_key(value: str) -> None:
    with pytest.raises(Refusal) as caught:
        load_without_secrets(yaml.safe_dump({"a": {"b": [f"x {value} y"]}}))
    assert caught.value.user_error.where == "a.b.0"
    assert value not in str(caught.value.user_error)


@pytest.mark.parametrize(
    "url",
    [
        "https://host/a.jsonl?X-Amz-Date=1&X-Amz-Signature=@", "https://host/a.jsonl?sv=2&sig=@",
        "https://host/a.jsonl?token=@", "https://host/a.jsonl?Signature=@", "https://host/a.jsonl?X-Goog-Signature=@",
        "https://host/a.jsonl?api_key=@", "https://host/a.jsonl?v=1&key=@", "https://host/a.jsonl?password=@",
        "https://host/a.jsonl?Key-Pair-Id=1&x-api-key=@", "https://host/a.jsonl?client_secret=@", "gs://b/a?PRIVATE_KEY=@",
        "https://host/a.jsonl?jwt=@", "hf://datasets/a/b.jsonl?auth=@", "s3://KEY:@@bucket/a.jsonl", "abfs://me:@@account.host/a.jsonl",
    ],
)  # fmt: skip
def test_an_address_that_grants_access_is_refused_and_not_shown(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Two @ stand for a secret before an @.
    url = url.replace("@", LETTERS[:12], 1)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"train_files": [{"path": url}]}}))
    for arguments in (["--config=config.yaml"], [f"--data.train_files={url}"], ["--data.train_files", url]):
        status, said = outcome(["inspect", *arguments, "--model.name_or_path=x"], capfd)
        assert status == 2
        assert b"data.train_files" in said["stderr"]
        assert b"expected no secret in a config file or on the command line" in said["stderr"]
        assert found_in(said, [LETTERS[:12]]) == []


@pytest.mark.promise(
    "S12", "20 canaries in prompts and completions: 0 hits in logs, events, checkpoints, predictions, errors"
)
def test_what_users_wrote_is_written_nowhere(
    trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    # Tokenized rows lie in temporary files for as long as their data module lives, here as long as the test.
    for folder in ("at work", "temporary"):
        (tmp_path / folder).mkdir()
    model, log = make_model(tmp_path / "model"), write_log(tmp_path / "log.jsonl")
    leaking = {
        "a missing column": {"completion": None},
        "a label of another kind": {"label": "great"},
        "a label that is text": {"label": CANARIES[3]},
        "a prompt of another kind": {"prompt": {"text": CANARIES[4]}},
        "turns of another kind": {"prompt": [{"role": CANARIES[5], "content": CANARIES[6]}]},
        "an empty completion": {"completion": ""},
        "a lone surrogate": {"completion": CANARIES[7] + "\ud83d"},
        "a column name that is text": {CANARIES[8]: 1, "completion": None},
    }
    for number, change in enumerate(leaking.values()):
        write_log(tmp_path / f"log{number}.jsonl", row10=change)
    texts = Path(log).read_bytes().splitlines(keepends=True)
    (tmp_path / "log90.jsonl").write_bytes(b"".join([*texts[:9], texts[9][:-3] + b"\n", *texts[10:]]))
    (tmp_path / "log91.jsonl").write_bytes(b"".join([*texts[:9], texts[9].replace(b"is 9", b"is \xff"), *texts[10:]]))
    runs: dict[str, tuple[int, list[str]]] = {
        "fit": (0, ["fit", *options(model, log)]),
        "fit that drops rows": (0, ["fit", *options(model, log), "--data.max_length=170", "--data.long_prompts=drop"]),
        "validate": (0, ["validate", *options(model, log)]),
        "predict": (0, ["predict", *options(model, log)]),
        "swapped columns": (2, ["fit", *options(model, log), "--data.columns.label=completion"]),
        "malformed JSON": (2, ["fit", *options(model, str(tmp_path / "log90.jsonl"))]),
        "not UTF-8": (2, ["fit", *options(model, str(tmp_path / "log91.jsonl"))]),
        "fit in a fresh process": (0, ["fit", *options(model, log)]),
        **{name: (2, ["fit", *options(model, str(tmp_path / f"log{n}.jsonl"))]) for n, name in enumerate(leaking)},
    }
    for trial in trials(list(runs), quick=5):
        with trial as name:
            expected, arguments = runs[name]
            caplog.clear()
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("temporary" if expected else "at work")))
            run = fresh_process(arguments, tmp_path) if "fresh" in name else outcome(arguments, capfd)
            assert run[0] == expected, run[1]["stderr"][-500:]
            texts_said = {**everything_written(tmp_path, "log", "at work"), **run[1], "log": caplog.text.encode()}
            if name.startswith("fit"):
                assert any("events.out" in place for place in texts_said)
                assert any("checkpoints" in place for place in texts_said)
            fragments = [*CANARIES, "example.invalid", "+44 20 7946"]
            hits = found_in(texts_said, fragments)
            assert not hits, sorted({hit.rpartition(" in ")[2] for hit in hits})
