"""S5: no YAML text, small as it may be, takes long or much memory to refuse, and none can name a Python object."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from bco_lightning.cli.app import main
from bco_lightning.cli.plain_yaml import LARGEST_TEXT, MOST_NODES, Refusal, load_without_secrets
from tests.trials import Trials


def doubling(first: str, each: str, levels: int) -> str:
    """Aliases of aliases: every level stands nine times for the one before."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} {each.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


BOMBS: dict[str, str] = {
    "lists of lists": doubling("[x, x, x, x, x, x, x, x, x]", "[{}]", 10),
    "mappings of mappings": doubling("{k: v}", "{{k: [{}]}}", 10),
    "merged mappings": doubling("{k: v}", "{{<<: [{}]}}", 10),
    "few levels, long first": doubling("[" + ", ".join(["x"] * 60) + "]", "[{}]", 5),
    "an alias of itself": "a: &a [*a]\n",
    "an alias of itself, further down": "a: &a {b: {c: [*a]}}\n",
    "ten megabytes of keys": "".join(f"key{n}: {n}\n" for n in range(700_000)),
    "just under the limit, of keys": "".join(f"k{n}: 1\n" for n in range(LARGEST_TEXT // 10)),
    "one long line": "trainer: '" + "x" * (2 * LARGEST_TEXT) + "'\n",
    "nested lists": "a: " + "[" * 100_000 + "]" * 100_000,
    "nested mappings": "a: " + "{a: " * 400 + "1" + "}" * 400,
    "nested by indentation": "\n".join(" " * n + "a:" for n in range(900)),
    "a number in base 60": "a: 1" + ":59" * 300_000,
    "a number of many digits": "a: " + "9" * 900_000,
    "python object": "trainer: !!python/object/apply:os.system ['touch marker']\n",
    "python name": "trainer: {max_steps: !!python/name:os.system }\n",
    "python module": "trainer: !!python/module:antigravity\n",
    "python tag in long form": "a: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch marker']\n",
    "python tag by a shorthand": "%TAG !p! tag:yaml.org,2002:python/\n---\na: !p!object/apply:os.system ['x']\n",
}


class TooSlow(BaseException):
    """Nothing on the way takes it for an error in the config."""


def too_slow(*_: Any) -> None:
    raise TooSlow


def memory(which: str) -> float:
    """Megabytes of this process: at present, or the most since that was set back."""
    return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3  # type: ignore[index]


def run(*arguments: str) -> tuple[int, float, float]:
    """Exit status, seconds of a processor, and megabytes that the process grew by."""
    signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, 10)  # a bomb that goes off must not take the machine with it
    Path("/proc/self/clear_refs").write_text("5")
    before, started = memory("VmRSS"), time.process_time()  # others may have the machine for a while
    try:
        status: Any = main(["fit", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    except TooSlow:
        status = "did not end"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return status, time.process_time() - started, memory("VmHWM") - before


@pytest.mark.promise("S5", "aliases, tags, depth and size: refused in less than 2 s and 200 MB")
def test_a_yaml_bomb_is_refused_at_once(trials: Trials, capsys: pytest.CaptureFixture[str]) -> None:
    run("--help")  # what is imported or made once is no cost of a bomb
    for trial in trials(list(BOMBS), quick=8):
        with trial as name:
            Path("bomb.yaml").write_text(BOMBS[name])
            capsys.readouterr()
            status, seconds, megabytes = run("--config=bomb.yaml")
            error = capsys.readouterr().err
            assert status == 2
            assert re.search(r"error: bomb\.yaml(:1)?: expected", error), error[-300:]  # libyaml 0.2.6 may say it, too
            assert len(error) < 1000
            assert seconds < 2, f"{seconds:.1f} s"
            assert megabytes < 200, f"{megabytes:.0f} MB"
            assert not Path("marker").exists()


@pytest.mark.promise("S5", "a bomb in a config that a config names, and on the command line, is refused too")
def test_every_text_is_measured(trials: Trials, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = BOMBS["lists of lists"]
    Path("bomb.yaml").write_text(bomb)
    Path("outer.yaml").write_text("trainer: bomb.yaml\n")
    inline = "{" + ", ".join(bomb.strip().splitlines()) + "}"
    cases = {
        "a config named in a config": "--config=outer.yaml",
        "a config of the trainer": "--trainer=bomb.yaml",
        "a config of the model": "--model=bomb.yaml",
        "a whole config on the command line": f"--config={inline}",
        "a value on the command line": f"--trainer={inline}",
    }
    for trial in trials(list(cases), quick=len(cases)):
        with trial as name:
            status, seconds, megabytes = run(cases[name])
            assert status == 2
            assert f"expected at most {MOST_NODES:,} YAML nodes" in capsys.readouterr().err
            assert seconds < 2
            assert megabytes < 200


def test_aliases_count_as_what_they_stand_for() -> None:
    row = "[" + ", ".join(["x"] * 98) + "]"  # 99 nodes
    fits = f"a: &a {row}\nb: [" + ", ".join(["*a"] * 98) + "]\n"
    assert len(load_without_secrets(fits)["b"]) == 98
    with pytest.raises(Refusal):
        load_without_secrets(fits.replace("]\n", ", *a, *a, *a, *a]\n", 2))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("a: 1e-6", {"a": 1e-6}),
        ("a: 3.0e-4", {"a": 3e-4}),
        ("a: [1, 2.5, true, null, x]", {"a": [1, 2.5, True, None, "x"]}),
        ("a: 2026-01-01", {"a": "2026-01-01"}),
        ("{a, b}", "{a, b}"),
        ("base: &base {x: 1}\nmore: {<<: *base, y: 2}", {"base": {"x": 1}, "more": {"x": 1, "y": 2}}),
        ("logs/*.jsonl", "logs/*.jsonl"),
    ],
)
def test_plain_yaml_is_read_as_before(text: str, value: Any) -> None:
    assert load_without_secrets(text) == value


@pytest.mark.parametrize(
    ("text", "line", "first"),
    [
        ("data:\n  batch_size: 4\n  max_length: 9\n  batch_size: 8\n", 4, 2),
        ("data: {}\nmodel: {}\ndata: {}\n", 3, 1),
        ("data: {rating: {up: 4, up: 2}}", 1, 1),
        ("trainer:\n  logger:\n  - {name: a}\n  - name: b\n    name: c\n", 5, 4),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(text: str, line: int, first: int) -> None:
    with pytest.raises(Refusal) as refused:
        load_without_secrets(text, "mine.yaml")
    assert f"mine.yaml:{line}: expected each key once" in str(refused.value.user_error)
    assert f"here and in line {first}." in str(refused.value.user_error)


@pytest.mark.parametrize("text", ["*.jsonl", "!important", "a: [", "a: *unknown", "@x"])
def test_what_is_no_yaml_stays_an_ordinary_yaml_error(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load_without_secrets(text)


def test_a_number_like_1e_6_arrives_as_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text("model: {name_or_path: x, learning_rate: 1e-6}\ndata: {train_files: '*.jsonl'}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config=c.yaml", "--model.beta=2e-1", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["beta"] == 0.2
    assert float(printed["model"]["learning_rate"]) == 1e-6
    assert printed["data"]["train_files"] == "*.jsonl"


def test_a_config_is_a_local_file(capsys: pytest.CaptureFixture[str]) -> None:
    with fsspec.open("memory://elsewhere.yaml", "w") as file:
        file.write("max_epochs: 7\n")
    Path("c.yaml").write_text("trainer: memory://elsewhere.yaml\n")
    assert run("--config=c.yaml", "--print_config")[0] == 2
    assert "max_epochs: 7" not in capsys.readouterr().out
