"""Several processes by Lightning's launcher, ``configs/torchrun.sh`` and ``configs/slurm.sbatch``, on loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from bco_lightning.checkpoints.folders import saved_steps
from bco_lightning.checkpoints.format import read_checkpoint
from tests.reliability.tiny_run import ROOT, free_port, make_log, make_model

LAST = "step-00000012"
TORCHRUN = "--standalone --nproc_per_node 2 -m bco_lightning"
SRUN = """#!/bin/bash
# One task on each node, and every node is this machine; a task that fails ends the others.
[ "$1" = --kill-on-bad-exit=1 ] && shift
for node in $(seq 0 $((SLURM_NNODES - 1))); do
    SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 "$@" > "task-$node" 2>&1 &
done
for _ in $(seq "$SLURM_NNODES"); do
    wait -n || { status=$?; sleep 2; kill -KILL $(jobs -p) 2> /dev/null; exit $status; }
done
"""
OURS = (
    "Seed set to", "feedback: 0 rows", "train: 96 rows read", "policy: ", "rows of a micro-batch", "Run folder",
    "Checkpoint ", "Next:",
)  # fmt: skip


@dataclass
class Group:
    """Processes that are started together, in a folder of their own."""

    folder: Path
    environment: dict[str, str]
    commands: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str, **environment: str) -> None:
        """Starts a command; what it prints goes into ``output-NUMBER``."""
        output = (self.folder / f"output-{len(self.commands)}").open("wb")
        shared = {**os.environ, **self.environment, **environment}
        self.commands.append(subprocess.Popen(command, cwd=self.folder, env=shared, stdout=output, stderr=output))

    def wait(self, seconds: float = 200) -> list[int]:
        """Exit statuses of the commands."""
        deadline = time.monotonic() + seconds
        return [command.wait(max(0.1, deadline - time.monotonic())) for command in self.commands]

    def said(self, name: str = "output-*") -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(name)))

    def left(self) -> list[int]:
        """Processes of this group that are alive, whoever started them."""
        mark = f"GROUP_FOLDER={self.folder}".encode()
        return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if mark in _read(path)]


def _read(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a log, a log with a bad row, and programs that stand for those of SLURM."""
    folder = tmp_path_factory.mktemp("files")
    make_model(folder / "model")
    lines = Path(make_log(folder / "log.jsonl")).read_text().splitlines()
    (folder / "bad.jsonl").write_text("\n".join([*lines[:6], '{"prompt": "q", "label": true}', *lines[6:]]) + "\n")
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$@" >> requeued\n')):
        (folder / "slurm").mkdir(exist_ok=True)
        (folder / "slurm" / name).write_text(text)
        (folder / "slurm" / name).chmod(0o755)
    return folder


@pytest.fixture
def group(files: Path, tmp_path: Path) -> Iterator[Group]:
    yield from make_group(files, tmp_path)


def make_group(files: Path, folder: Path, **options: Any) -> Iterator[Group]:
    config = {
        "model": {"name_or_path": str(files / "model"), "learning_rate": 1e-2, "reference_log_probs": "online"},
        "data": {
            "train_files": str(files / "log.jsonl"), "batch_size": 4, "max_length": 96, "validation_fraction": 0.0,
        },
        "trainer": {"strategy": "fsdp2", "accelerator": "cpu", "devices": 2, "max_epochs": 1},
        "checkpoint": {"every_n_steps": 2},
        "run_folder": "runs",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "GROUP_FOLDER": str(folder), "BCO_CACHE": str(folder / "cache"),
        "BCO_ALLOWED_IMPORTS": "tests.distributed.launch_faults",
    }  # fmt: skip
    group = Group(folder, environment)
    yield group
    for process in group.left():
        os.kill(process, 9)


def fault(how: str, *ranks: int) -> list[str]:
    """Options that make something happen to processes after four steps."""
    return [
        "--trainer.callbacks+=tests.distributed.launch_faults.Fault", f"--trainer.callbacks.how={how}",
        f"--trainer.callbacks.ranks={list(ranks)}",
    ]  # fmt: skip


def fit(group: Group, launcher: str, *options: str) -> None:
    """Starts two processes on this machine."""
    program = [sys.executable, "-m", *(TORCHRUN.split() if launcher == "torchrun" else ["bco_lightning"])]
    if launcher == "torchrun":
        program[2:2] = ["torch.distributed.run"]
    group.start(*program, "fit", "--config", "config.yaml", "--trainer.enable_progress_bar", "false", *options)


def on_two_nodes(group: Group, *options: str) -> None:
    """Runs ``configs/torchrun.sh`` as it is run on each of two nodes with one GPU."""
    port = str(free_port())
    for node in ("0", "1"):
        environment = {"NNODES": "2", "NODE_RANK": node, "HEAD": "127.0.0.1", "PORT": port, "GPUS": "1"}
        group.start(str(ROOT / "configs" / "torchrun.sh"), "config.yaml", *options, **environment)


def on_slurm(group: Group, files: Path, *options: str) -> None:
    """Runs ``configs/slurm.sbatch`` as SLURM would run it for two nodes with one task each."""
    environment = {
        "PATH": f"{files / 'slurm'}:{group.environment['PATH']}", "SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "bco",
        "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    script = str(ROOT / "configs" / "slurm.sbatch")
    group.start("bash", script, "config.yaml", "--trainer.enable_progress_bar", "false", *options, **environment)


def weights(folder: Path) -> dict[str, Any]:
    """What the only run of a folder ended with."""
    (run,) = (folder / "runs").iterdir()
    return read_checkpoint(str(run / "checkpoints" / LAST))["state_dict"]  # type: ignore[no-any-return]


def assert_whole(folder: Path) -> list[str]:
    """Checkpoints are whole, nothing half-written is left; names of the steps."""
    (checkpoints,) = folder.glob("runs/*/checkpoints")
    assert sorted(checkpoints.iterdir()) == saved_steps(checkpoints)
    for step in saved_steps(checkpoints):
        read_checkpoint(str(step))
    return [step.name for step in saved_steps(checkpoints)]


@pytest.fixture(scope="module")
def alone(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Weights of one process that has all rows of a step."""
    folder = tmp_path_factory.mktemp("alone")
    for group in make_group(files, folder):
        options = ["--trainer.strategy", "auto", "--trainer.devices", "1", "--data.batch_size", "8"]
        fit(group, "Lightning", *options)
        assert group.wait() == [0], group.said()
    return weights(folder)


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= 1e-5 * weight.norm(), name


def test_torchrun_sh_trains_on_two_nodes_as_one_process_does(group: Group, alone: dict[str, Any]) -> None:
    on_two_nodes(group, "--trainer.enable_progress_bar", "false")
    assert group.wait() == [0, 0], group.said()
    assert assert_whole(group.folder)[-1] == LAST
    assert_close(weights(group.folder), alone)
    # What torchrun itself says of a store that has gone before its exit barrier is none of ours.
    assert not re.search(r"policy:|feedback:|error:", group.said("output-1")), "the second node has nothing to say"
    assert_said_once(group.said("output-0"))


@pytest.mark.slow
def test_lightnings_launcher_prints_every_line_and_bar_once(group: Group) -> None:
    options = ["--data.validation_fraction", "0.1", "--model.reference_log_probs", "before"]
    fit(group, "Lightning", *options, "--trainer.enable_progress_bar", "true")
    assert group.wait() == [0], group.said()
    said = group.said()
    for text in ("Steps: |  ", "Loading weights:   0%", "reference log-probs:   0%"):
        assert said.count(text) == 1, said
    assert_said_once(said.replace("train: 86", "train: 96"))
    assert group.left() == []


def assert_said_once(said: str) -> None:
    lines = Counter(line for line in said.split("\n") if "it/s" not in line)  # bars are counted where there are any
    assert {line: times for line, times in lines.items() if times > 1 and re.search(r"\w", line)} == {}
    for text in OURS:
        assert said.count(text) == 1, (text, said)


@pytest.mark.slow
def test_slurm_sbatch_saves_requeues_and_goes_on(group: Group, files: Path, alone: dict[str, Any]) -> None:
    for steps in (["step-00000004", "step-00000005"], ["step-00000010", LAST]):  # the first turn, and the second
        on_slurm(group, files, *fault("is asked to stop", 0, 1))
        group.wait()
        assert assert_whole(group.folder) == steps, group.said("task-*")
    assert [command.returncode for command in group.commands] == [138, 0]
    assert (group.folder / "requeued").read_text() == "requeue 1234\n"
    assert_said_once(group.said("task-0").replace("checkpoint: ", ""))
    assert_close(weights(group.folder), alone)


BAD_ROW = r"error: \S*bad\.jsonl:7: expected a column 'completion', found 'prompt', 'label'\."


@pytest.mark.parametrize(
    ("launcher", "option", "message"),
    [
        pytest.param("Lightning", "--data.train_files=FILES/bad.jsonl", BAD_ROW, marks=pytest.mark.slow),
        pytest.param("torchrun", "--data.train_files=FILES/bad.jsonl", BAD_ROW, marks=pytest.mark.slow),
        pytest.param("Lightning", "--data.batch_sise=4", "error: --data.batch_sise: expected", marks=pytest.mark.slow),
    ],
)
def test_what_the_user_can_mend_is_said_once_by_each_process_and_all_end(
    launcher: str, option: str, message: str, group: Group, files: Path
) -> None:
    fit(group, launcher, option.replace("FILES", str(files)))
    (status,) = group.wait()
    said = group.said()
    assert 1 <= len(re.findall(message, said)) <= 2, said
    assert status == 2 if launcher == "Lightning" else set(re.findall(r"exitcode  : (\S+)", said)) <= {"2", "-15"}
    assert "Traceback" not in said.split("torch/distributed/elastic")[0]
    assert group.left() == []
    assert not (group.folder / "runs").exists()


GONE = r"error: processes: expected an answer of every process, found that one is gone or hangs \("


@pytest.mark.parametrize(
    ("launcher", "how", "rank"),
    [
        ("Lightning", "raises", 1),
        pytest.param("torchrun", "is killed", 1, marks=pytest.mark.slow),
        pytest.param("Lightning", "is killed", 0, marks=pytest.mark.slow),
        pytest.param("torchrun", "raises", 0, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_fails_takes_the_others_along(launcher: str, how: str, rank: int, group: Group) -> None:
    fit(group, launcher, *fault(how, rank))
    (status,) = group.wait()
    said = group.said()
    assert status == {"torchrun": 1, "Lightning": -9 if rank == 0 else 2}[launcher]
    seconds = time.time() - (group.folder / f"fault-{rank}").stat().st_mtime
    assert seconds < 20
    deadline = time.monotonic() + 10
    while group.left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert group.left() == []
    said = group.said()
    # torchrun stops the others by a signal, which may come before they can say what they have noticed.
    stopped_first = launcher == "torchrun" and "exitcode  : -15" in said
    assert len(re.findall(GONE, said)) == (not stopped_first), said
    assert said.count("internal error: KeyError at") == (how == "raises")
    assert assert_whole(group.folder) == ["step-00000002", "step-00000004"]


HANGS = "found that one is gone or hangs: none in {} s (process_timeout)"


@pytest.mark.slow
def test_a_hang_ends_within_the_timeout_and_says_which(group: Group, files: Path) -> None:
    on_slurm(group, files, *fault("sleeps", 1), "--process_timeout", "5")
    assert group.wait() == [2]
    assert time.time() - (group.folder / "fault-1").stat().st_mtime < 15
    assert HANGS.format(5) in group.said("task-0")
    assert group.left() == []
    assert assert_whole(group.folder) == ["step-00000002", "step-00000004"]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), [("Lightning", 1), ("Lightning", 0), ("torchrun", 1)])
def test_no_process_that_hangs_is_left_behind(launcher: str, rank: int, group: Group) -> None:
    fit(group, launcher, *fault("sleeps", rank), "--process_timeout", "15")  # the second one starts ten seconds later
    assert group.wait() == [1 if launcher == "torchrun" else 2]
    assert time.time() - (group.folder / f"fault-{rank}").stat().st_mtime < 60
    assert group.said().count(HANGS.format(15)) == 1
    assert group.left() == []
