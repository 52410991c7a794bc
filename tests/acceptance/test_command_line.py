"""What a user types: fit, validate, test, predict, export and resume, and every bad input in one message."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bco_lightning.checkpoints.folders import saved_steps
from bco_lightning.checkpoints.format import read_checkpoint
from bco_lightning.checkpoints.manifest import resolve_checkpoint
from bco_lightning.cli import app
from bco_lightning.cli.app import main
from bco_lightning.data.chat import PLAIN_TEMPLATE
from bco_lightning.errors import PreemptedError
from bco_lightning.models.load import load_language_model, load_tokenizer
from tests.conftest import REAL_MODEL

CONFIGS = Path(__file__).parents[2] / "configs"


def command(name: str, model: str, log: str, *more: str) -> int:
    options = {
        "model.name_or_path": model,
        "model.dtype": "float32",
        "model.learning_rate": "1e-2",
        "model.lora.r": "4",
        "data.train_files": log,
        "data.validation_files": log,
        "data.batch_size": "4",
        "data.max_length": "64",
        "trainer.max_epochs": "-1",
        "trainer.max_steps": "6",
        "trainer.accelerator": "cpu",
        "trainer.log_every_n_steps": "2",
        "checkpoint.every_n_steps": "4",
    }
    return main([name, *(f"--{key}={value}" for key, value in options.items()), *more])


def text_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_fit_then_resume_validate_test_predict_and_export(
    tiny_model: str, log: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert command("fit", tiny_model, log, "--trainer.max_steps=4") == 0
    run = Path("runs/bco/version_0")
    printed = capsys.readouterr()
    assert "24 rows read, 24 used (16 up, 8 down), 0 left out" in caplog.text
    assert f"Run folder   {run}" in printed.out
    assert f"export --ckpt_path {run} " in printed.out
    assert {
        "config.yaml",
        "provenance.json",
        *(f"checkpoints/step-00000004/{name}" for name in ("values.json", "manifest.json")),
    } <= set(text_of(run))

    assert command("fit", tiny_model, log, "--ckpt_path=last") == 0
    assert not Path("runs/bco/version_1").exists()
    checkpoint = read_checkpoint(str(run / "checkpoints/step-00000006"))
    assert checkpoint["global_step"] == 6

    capsys.readouterr()
    best = resolve_checkpoint(run / "best", pytest.fail)
    caplog.clear()
    for name, stage, word in (("validate", "val", "last"), ("test", "test", "best")):
        assert command(name, tiny_model, log, f"--ckpt_path={word}") == 0
        assert re.search(rf"{stage}/margin +│ +-?\d+\.\d{{4}} │", capsys.readouterr().out)
        assert not Path("runs/bco/version_1").exists()
    assert f"checkpoint: {best}\n" in caplog.text

    assert command("predict", tiny_model, log, f"--data.predict_files={log}", "--ckpt_path=last") == 0
    scores = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert [score["row"] for score in scores] == [f"{log}:{line}" for line in range(1, 25)]
    shift = checkpoint["reward_shift"]["value"]
    for score in scores:
        assert score["implicit_reward"] == pytest.approx(
            0.1 * (score["policy_log_prob"] - score["reference_log_prob"]), abs=1e-5
        )
        logit = torch.tensor(score["implicit_reward"] - shift, dtype=torch.float64)
        assert score["probability_up"] == pytest.approx(float(logit.sigmoid()), abs=1e-9)
    # The scored rows are the held-out ones, and a regression with an intercept keeps the mean of its targets.
    mean = sum(score["calibrated_probability_up"] for score in scores) / 24
    assert mean == pytest.approx((16 * 17 / 18 + 8 * 1 / 10) / 24, abs=1e-4)

    exported_scores(tiny_model, log, run, scores)


def exported_scores(tiny_model: str, log: str, run: Path, scores: list[dict[str, Any]]) -> None:
    """An exported model, merged or as adapter, gives the checkpoint's scores: same rewards, same shift."""
    for form, flags, which in (("merged", ["--merge"], str(run)), ("adapter", [], "last")):
        export = ["export", f"--ckpt_path={which}", f"--output_dir=exports/{form}", *flags]
        assert main(export) == 0
        assert command(
            "predict", f"exports/{form}", log, f"--data.predict_files={log}", f"--predictions.path={form}.jsonl",
            f"--model.reference_name_or_path={tiny_model}", "--model.lora=null",
        ) == 0  # fmt: skip
        again = [json.loads(line) for line in Path(f"{form}.jsonl").read_text().splitlines()]
        for score, other in zip(scores, again, strict=True):
            assert other["implicit_reward"] == pytest.approx(score["implicit_reward"], abs=1e-3)
            assert other["probability_up"] == pytest.approx(score["probability_up"], abs=1e-3)
        assert not list(Path("exports").glob(".*"))


def test_full_fine_tuning_trains_saves_and_exports(tiny_model: str, log: str) -> None:
    main(["fit", f"--model.name_or_path={tiny_model}", f"--data.train_files={log}", "--data.batch_size=4",
          "--trainer.max_steps=3", "--trainer.accelerator=cpu", "--data.max_length=64"])  # fmt: skip
    assert main(["export", "--ckpt_path=runs/bco/version_0", "--output_dir=out"]) == 0
    exported = dict(AutoModelForCausalLM.from_pretrained("out").named_parameters())
    original = dict(AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters())
    assert exported.keys() == original.keys()
    assert all(not torch.equal(exported[name], original[name]) for name in exported)


def test_an_adapter_that_came_in_is_trained_on_and_its_export_names_its_base(tiny_model: str, log: str) -> None:
    assert command("fit", tiny_model, log, "--run_folder=first") == 0
    assert main(["export", "--ckpt_path=first/version_0", "--output_dir=adapter"]) == 0
    assert command("fit", "adapter", log, "--run_folder=second", "--data.chat_template=plain") == 0
    assert main(["export", "--ckpt_path=second/version_0", "--output_dir=again"]) == 0
    assert json.loads(Path("again/adapter_config.json").read_text())["base_model_name_or_path"] == tiny_model
    assert "AutoPeftModelForCausalLM.from_pretrained" in Path("again/README.md").read_text()
    assert AutoTokenizer.from_pretrained("again").chat_template == PLAIN_TEMPLATE

    base = load_language_model(tiny_model, torch.float32)
    first, second = (
        {
            name: value.clone()
            for name, value in PeftModel.from_pretrained(base, name).state_dict().items()
            if "lora" in name
        }
        for name in ("adapter", "again")
    )
    assert first.keys() == second.keys()
    assert not all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "switches",
    [["enable_progress_bar=false", "enable_checkpointing=false"], ["fast_dev_run=true"]],
)
def test_trainer_switches_work(switches: list[str], tiny_model: str, log: str) -> None:
    assert command("fit", tiny_model, log, *(f"--trainer.{switch}" for switch in switches)) == 0


@pytest.mark.parametrize(
    ("limits", "steps", "said"),
    [
        (["max_epochs=null", "max_steps=8"], 8, ""),
        (["max_epochs=null", "max_steps=-1"], 6, ""),
        (["max_epochs=1", "max_steps=8"], 6, "trainer.max_epochs: 1 ends the run before trainer.max_steps does"),
    ],
)
def test_steps_or_epochs_that_are_asked_for_alone_end_a_run_and_of_both_the_smaller(
    limits: list[str], steps: int, said: str, tiny_model: str, log: str, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = ["--trainer.limit_val_batches=0", "--trainer.logger=false"]
    assert command("fit", tiny_model, log, *(f"--trainer.{limit}" for limit in limits), *quiet) == 0
    assert saved_steps(Path("runs/bco/version_0/checkpoints"))[-1].name == f"step-{steps:08}"
    assert said in caplog.text
    assert ("ends the run before" in caplog.text) == bool(said)


@pytest.mark.parametrize("logger", [["false"], ["CSVLogger", "--trainer.logger.save_dir=csv"]])
def test_with_any_logger_everything_of_a_run_is_in_its_folder_and_the_commands_that_are_named_work(
    logger: list[str], tiny_model: str, log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(Path().iterdir())
    own = [
        "--trainer.callbacks+=ModelCheckpoint",
        "--run_folder=my runs",
        "--trainer.max_steps=2",
        "--known_reward.reward=tone",
        "--known_reward.max_prompts=1",
    ]
    assert command("fit", tiny_model, log, f"--trainer.logger={logger[0]}", *logger[1:], *own) == 0
    assert {path.name for path in set(Path().iterdir()) - before} <= {"my runs", "csv"}
    run = Path("my runs/version_0")
    assert {"config.yaml", "provenance.json", "alignment.json"} <= {path.name for path in run.iterdir()}
    printed = capsys.readouterr().out
    assert f"Run folder   {run}\n" in printed
    assert "tensorboard" not in printed
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  python -m bco_lightning ")]
    assert [words[3] for words in commands] == ["export", "predict"]
    for words in commands:
        assert main([log if word == "FILE" else word for word in words[3:]]) == 0


def test_a_trial_run_leaves_the_newest_checkpoint_to_those_that_are_none(tiny_model: str, log: str) -> None:
    assert command("fit", tiny_model, log, "--trainer.max_steps=2") == 0
    before = text_of(Path("runs"))
    for more in ([], ["--ckpt_path=last"]):
        assert command("fit", tiny_model, log, "--trainer.fast_dev_run=1", "--trainer.max_steps=4", *more) == 0
    assert text_of(Path("runs")) == before


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model_trains_and_its_exports_generate_text(log: str) -> None:
    config = yaml.safe_load((CONFIGS / "bco.yaml").read_text())
    assert config["model"]["name_or_path"] == REAL_MODEL
    options = [
        f"--config={CONFIGS / 'bco.yaml'}",
        f"--data.train_files={log}",
        f"--data.validation_files={log}",
        "--data.batch_size=4",
        "--trainer.max_steps=3",
        "--known_reward.samples_per_prompt=2",
        "--known_reward.max_new_tokens=8",
        "--known_reward.max_prompts=4",
    ]
    assert main(["fit", *options]) == 0
    run = Path("runs/bco/version_0")
    assert json.loads((run / "alignment.json").read_text())["num_prompts"] == 4
    checkpoint = f"--ckpt_path={run}"
    assert main(["export", checkpoint, "--output_dir=merged", "--merge"]) == 0
    assert main(["export", checkpoint, "--output_dir=adapter"]) == 0
    (newest, *_) = reversed(saved_steps(run / "checkpoints"))
    assert sum(file.stat().st_size for file in newest.iterdir()) < 30e6  # adapters and moments, not 270 MB of base

    tokenizer = AutoTokenizer.from_pretrained("merged")
    assert tokenizer.chat_template == load_tokenizer(REAL_MODEL).chat_template
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is rain?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    merged = AutoModelForCausalLM.from_pretrained("merged")
    adapted = PeftModel.from_pretrained(load_language_model(REAL_MODEL, torch.float32), "adapter")
    texts = [
        tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
        for model in (merged, adapted)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) > len("user\nWhat is rain?\nassistant\n")


def test_a_model_that_is_not_there_gives_one_message_and_leaves_nothing(
    log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("fit", "./gone", log) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("error: ./gone: expected a model folder or .gguf file, found nothing there.")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("option", "messages"),
    [
        ("--model.betaa=1", ["error: --model.betaa: expected an option", "nearest are model.beta, "]),
        ("--config=c.yaml", ["error: model.betaa: expected an option", "nearest are model.beta, "]),
        ("--data.batchsize=1", ["data.batchsize", "nearest are data.batch_size, "]),
        ("--model.objective=dop", ["model.objective: expected bco or bce or ", ", found dop."]),
        ("--data.batch_size=many", ["data.batch_size: expected a whole number, found many."]),
    ],
)
def test_a_misspelt_option_is_named(
    option: str, messages: list[str], tiny_model: str, log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text("model: {betaa: 0.1}\n")
    for name in ("fit", "inspect"):
        assert main([name, f"--model.name_or_path={tiny_model}", f"--data.train_files={log}", option]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(rf"error: .* See python -m bco_lightning {name} --help\.\n", error)
        assert all(message in error for message in messages), error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["export", "--ckpt_path=no.ckpt", "--output_dir=x"],
            "no.ckpt: expected a whole checkpoint to go on with, found none.",
        ),
        (
            ["export", "--ckpt_path=junk.ckpt", "--output_dir=x"],
            "junk.ckpt: expected the folder of a checkpoint, found a file",
        ),
        (
            ["export", "--ckpt_path=junk.ckpt", "--output_dir=."],
            "--output_dir: expected a name to write under that is free",
        ),
    ],
)
def test_an_export_that_cannot_be_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("junk.ckpt").write_text("no checkpoint")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("x").exists()


def test_resuming_where_there_is_no_run_is_refused(
    tiny_model: str, log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("fit", tiny_model, log, "--ckpt_path=last") == 2
    assert "expected a whole checkpoint to go on with" in capsys.readouterr().err
    assert command("validate", tiny_model, log, "--ckpt_path=gone.ckpt") == 2
    assert (
        "gone.ckpt: expected a checkpoint, or the word 'last', 'best' or 'auto', found no such file."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("recipe", sorted(str(path.relative_to(CONFIGS))[:-5] for path in CONFIGS.rglob("*.yaml")))
def test_every_recipe_is_found_by_its_name_and_parses(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["fit", f"--config={recipe}", "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["name_or_path"]


def test_a_recipe_that_there_is_not_is_refused_with_the_names_of_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", "--config", "bko"]) == 2
    assert "expected a file, or one of bco, chitchat, " in capsys.readouterr().err


def test_the_path_of_a_recipe_typed_elsewhere_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "configs/paper/helpsteer2.yaml"]) == 2
    assert "or --config paper/helpsteer2 anywhere." in capsys.readouterr().err


def test_features_of_prompts_are_options_and_come_back_from_the_config_of_a_run(
    tiny_model: str, log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*arguments: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            main(["fit", *arguments, "--print_config"])
        return capsys.readouterr().out

    options = [f"--model.name_or_path={tiny_model}", f"--data.train_files={log}", "--model.importance_weights=auto"]
    config = printed(*options, "--model.prompt_features.layer=1", "--model.prompt_features.pooling=last")
    assert yaml.safe_load(config)["model"]["prompt_features"] == {"encoder": "reference", "layer": 1, "pooling": "last"}
    (tmp_path / "config.yaml").write_text(config)
    assert printed(f"--config={tmp_path / 'config.yaml'}") == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.prompt_features.pooling=max"], "model.prompt_features"),
        (
            ["--model.prompt_features.encoder=some/model", "--model.prompt_features.layer=1"],
            "error: model.prompt_features.layer: expected none with a sentence-transformers model",
        ),
        (["--model.importance_clip=[2,10]"], "importance_clip: expected 0 < low <= 1 <= high, not both 1, found"),
        (["--process_timeout=-1"], "error: process_timeout: expected a number above 0, found -1"),
        (["--model.lora.r=0"], "error: model.lora.r: expected at least 1 dimension, found 0"),
        (
            ["--data.train_files=[{path: log.jsonl, wieght: 2}]"],
            "data.train_files.wieght: expected an option of Source",
        ),
        (["--data.train_files={path: log.jsonl}"], "data.train_files: expected a list, found"),
        (["--data.columns.thumbs.good=banana"], "banana"),
    ],
)
def test_parts_of_options_that_are_wrong_are_named(
    options: list[str], said: str, tiny_model: str, log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("fit", "inspect"):
        assert main([name, f"--model.name_or_path={tiny_model}", f"--data.train_files={log}", *options]) == 2
        assert said in capsys.readouterr().err


# --- errors that are nobody's, and signals


class Broken(RuntimeError):
    """An error that is nobody's, and says what a user wrote."""


def leave_by(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the commands fail before they do anything."""

    def leave(*_: object, **__: object) -> None:
        raise error

    monkeypatch.delenv("BCO_DEBUG", raising=False)
    monkeypatch.setattr(app, "plan_command", leave)
    monkeypatch.setattr(app, "BCOCLI", leave)


@pytest.mark.parametrize("words", [["plan", "--model", "8B"], ["fit", "--model.name_or_path=x"]])
def test_an_error_of_this_package_is_one_message_without_what_users_wrote(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_by(Broken("secret words of a user"), monkeypatch)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert re.search(r"error: internal error: Broken at \S+\.py:\d+\. Run the same command again with --debug", said)
    assert "secret words" not in said
    for place in range(len(words) + 1):
        with pytest.raises(Broken):
            main([*words[:place], "--debug", *words[place:]])


@pytest.mark.parametrize("leaving", [KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_a_process_ends_it_still(leaving: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_by(leaving, monkeypatch)
    with pytest.raises(type(leaving)):
        main(["plan"])


def test_a_run_that_was_asked_to_stop_keeps_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_by(PreemptedError(15, 4, "here"), monkeypatch)
    assert main(["plan"]) == 143
