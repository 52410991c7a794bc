"""What the README tells a user to type exists and parses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bco_lightning
from bco_lightning.metrics import ImplicitRewardMetrics

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = "".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("feedback_logs.md", "importance_weights.md")
)


def test_every_option_it_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    from bco_lightning.cli.app import main

    with pytest.raises(SystemExit):
        main(["fit", f"--config={ROOT / 'configs' / 'bco.yaml'}", "--data.columns.prompt=question", "--print_config"])
    import yaml

    config = yaml.safe_load(capsys.readouterr().out)
    for group, name in re.findall(r"(?<![\w/])(model|data|trainer|checkpoint|guard)\.([a-z_]+)", README + DOCS):
        assert name in config[group], f"{group}.{name}"


def test_every_config_and_file_it_names_exists() -> None:
    for name in re.findall(r"(?<!ai/)(?:configs|docs|notebooks|tests|src)/[\w./]+", README + DOCS):
        assert (ROOT / name.rstrip("./")).exists(), name


def test_every_metric_is_explained() -> None:
    for name in ImplicitRewardMetrics().compute():
        assert name.split("/")[-1] in README, name


def test_its_python_example_runs_as_far_as_building_the_objects() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    namespace: dict[str, object] = {}
    exec(example.rsplit("Trainer(", 1)[0], namespace)  # noqa: S102
    assert isinstance(namespace["module"], bco_lightning.BCOModule)


def test_every_public_name_can_be_imported() -> None:
    for name in bco_lightning.__all__:
        assert getattr(bco_lightning, name).__doc__, name
