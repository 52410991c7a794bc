"""Names and texts of files reach a terminal without the characters that it would obey."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from bco_lightning.cli.app import main
from tests.reliability.tiny_run import make_log, make_model
from tests.trials import Trials

# Sets the title, turns red, goes up a line, and writes from right to left.
ESCAPES = "\x1b]0;owned\x07\x1b[31m\x1b[1A\x9b2K\u202e"
TEMPLATE = "{{ raise_exception('x" + ESCAPES + "') }}"
# Which file of a model says it, and what.
IN_MODEL: dict[str, tuple[str, dict[str, object]]] = {
    "model type": ("config.json", {"model_type": f"x{ESCAPES}"}),
    "data type": ("config.json", {"dtype": f"x{ESCAPES}"}),
    "kernel": ("config.json", {f"{ESCAPES}_implementation": "a/b"}),
    "tokenizer": ("tokenizer_config.json", {"tokenizer_class": f"x{ESCAPES}", "auto_map": {"AutoTokenizer": "a.b"}}),
    "adapter": ("adapter_config.json", {"peft_type": "LORA", f"x{ESCAPES}": "y"}),
    "template": ("chat_template.jinja", {}),
}
IN_CONFIG: dict[str, dict[str, object]] = {
    "option": {"model": {f"x{ESCAPES}": 1}},
    "value": {"model": {"beta": f"x{ESCAPES}"}},
    "class": {"trainer": {"callbacks": [{"class_path": f"x{ESCAPES}"}]}},
    "checkpoint": {"ckpt_path": f"x{ESCAPES}"},
    "source": {"data": {"train_files": [{"path": "log.jsonl", "name": f"s{ESCAPES}", "weight": 1}]}},
    "run folder": {"run_folder": f"runs{ESCAPES}"},
}


def arguments_of(name: str, base: str) -> list[str]:
    """A command line whose files hold escapes where the name says."""
    model, log = base, make_log(Path("log.jsonl"), num_rows=24)
    given = ["fit", "--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    if name in IN_CONFIG:
        Path("config.yaml").write_text(yaml.safe_dump(IN_CONFIG[name]))
        given.append("--config=config.yaml")
    elif name in IN_MODEL:
        file, changes = IN_MODEL[name]
        model = shutil.copytree(base, f"model of {name}")
        path = Path(model) / file
        told = json.loads(path.read_text()) if path.exists() and changes else {}
        path.write_text(json.dumps({**told, **changes}) if changes else TEMPLATE)
    else:
        log = shutil.copy(log, f"log{ESCAPES}\nerror: none.jsonl")
        if name == "malformed file":
            Path(log).write_text("{}\n")
        elif name == "inspected file":
            given = ["inspect"]
    if name != "source":
        given.append(f"--data.train_files={log}")
    return [*given, f"--model.name_or_path={model}", "--data.max_length=96"]


@pytest.mark.promise("S19", "no control character of a file name, config, model or template reaches the terminal")
def test_escapes_do_not_reach_the_terminal(
    trials: Trials, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    base = make_model(tmp_path / "base")
    for trial in trials([*IN_MODEL, *IN_CONFIG, "malformed file", "inspected file", "file"], quick=8):
        with trial as name:
            capfd.readouterr()
            try:
                main(arguments_of(name, base))
            except SystemExit as stopped:
                assert stopped.code == 2
            said = "".join(capfd.readouterr())
            assert "owned" in said or name in ("file", "source", "tokenizer")
            found = {character for character in said if not character.isprintable()} - {"\n", "\r"}
            assert not found, repr(said[-400:])
            assert "\nerror: none" not in said
