"""Two processes that take turns step by step on the same rows, and what comes of it."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import environments
import machine
import rows
from cases import Case

HERE = Path(__file__).parent
LORA = {"lora_r": 16, "lora_alpha": 32}


class WorkerError(RuntimeError):
    """A worker ended before it was told to; the message holds the end of what it printed."""


class Worker:
    """A process that trains one step when told to.

    Args:
        module: Its program, such as ``workers.ours``.
        python: Its interpreter.
        task: What it is told on its command line.
        log: File for all that it prints.
    """

    def __init__(self, module: str, python: str, task: dict[str, Any], log: Path) -> None:
        self.module, self.log = module, log
        # `torch.compile` keeps its kernels elsewhere from run to run; everything else starts from nothing.
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(machine.THREADS),
            "BCO_CACHE": str(log.parent / "cache"),
        }
        with log.open("w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                [python, "-m", module, json.dumps(task)],
                cwd=HERE,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            WorkerError: If the process ended instead.
        """
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            status = self.process.wait()
            killed = " It was killed; perhaps memory did not suffice." if status == -9 else ""
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])
            raise WorkerError(f"{self.module} ended with status {status}.{killed} The end of its log:\n{tail}")
        return json.loads(line)  # type: ignore[no-any-return]

    def tell(self, command: str) -> dict[str, Any]:
        """Sends ``step`` or ``stop`` and waits for the answer."""
        try:
            self.process.stdin.write(command + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # `answer` says what happened
        return self.answer()


def run_case(
    case: Case, pairs: int, ceiling: dict[str, dict[str, float]], show: Callable[[str], None]
) -> dict[str, Any]:
    """Runs one case.

    Args:
        case: What to compare.
        pairs: Steps of each side that count.
        ceiling: Rates of :func:`machine.matmul_ceiling`; empty to leave out the share of the ceiling.
        show: Told what happens.

    Returns:
        The case, both sides' start and memory, every step, and a summary.

    Raises:
        WorkerError: If a side fails.
    """
    folder = rows.FOLDER / case.name
    shutil.rmtree(folder, ignore_errors=True)  # the reference cache starts empty
    model = rows.model_folder()
    written = _rows_of(case, pairs, model)
    task = {
        "case": asdict(case),
        "model": str(model),
        "threads": machine.THREADS,
        "learning_rate": 1e-4 if case.lora else 1e-6,
        **LORA,
    }
    ours_task = task | {"rows": str(rows.write_rows(folder / "ours.jsonl", written))}
    if case.rival == "unwatched":
        ours_task["run_folder"] = str(folder / "run")
    with Worker("workers.ours", sys.executable, ours_task, folder / "ours.log") as ours:
        our_start = ours.answer()
        plan = our_start.pop("plan")
        lengths = our_start.pop("lengths")
        # TRL reads its rows in file order: it gets them in the order in which ours trains on them.
        is_ours = case.rival == "unwatched"
        in_order = list(range(len(written))) if is_ours else [row for step in plan for row in step]
        theirs_task = task | {"rows": str(rows.write_rows(folder / "theirs.jsonl", [written[i] for i in in_order]))}
        python = environments.python_of(case.rival)
        with Worker(f"workers.{'ours' if is_ours else 'theirs'}", python, theirs_task, folder / "theirs.log") as theirs:
            their_start = theirs.answer()
            their_start.pop("plan", None)
            _require_same_tokens([lengths[row] for row in in_order], their_start.pop("lengths"))
            show(f"{case.name}: ready after {our_start['seconds']:.0f} and {their_start['seconds']:.0f} s")
            steps = [_step(ours, theirs, number, plan[number], lengths) for number in range(case.dropped + pairs)]
            result = {
                "case": asdict(case),
                "ours": {"start": our_start, "end": ours.tell("stop")},
                "theirs": {"start": their_start, "end": theirs.tell("stop")},
                "steps": steps,
            }
    return result | {"summary": summarise(case, result, ceiling, lengths)}


def _rows_of(case: Case, pairs: int, model: Path) -> list[dict[str, Any]]:
    from bco_lightning.models.load import load_tokenizer

    count = case.batch_size * (case.dropped + pairs)
    written = rows.synthetic_rows(load_tokenizer(str(model)), count, case.completions_per_prompt)
    for position, up in enumerate((True, False)):
        written[position]["label"] = up  # both classes, however few the rows
    return written


def _require_same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> None:
    """Both sides tokenize for themselves; they agree on every row to within an end token."""
    apart = [(a, b) for a, b in zip(ours, theirs, strict=True) if abs(a[0] - b[0]) > 1 or abs(a[1] - b[1]) > 1]
    if apart:
        raise WorkerError(f"expected the same rows on both sides, found tokens (all, completion) {apart[:3]}.")


def _step(ours: Worker, theirs: Worker, number: int, planned: list[int], lengths: list[list[int]]) -> dict[str, Any]:
    """One step of each; who goes first changes every time, so that a drift of the machine favours none."""
    sides = {"ours": ours, "theirs": theirs}
    order = list(sides) if number % 2 == 0 else list(sides)[::-1]
    answers = {side: sides[side].tell("step") for side in order}
    trained_on = answers["ours"].pop("rows")
    answers["theirs"].pop("rows", None)
    if sorted(trained_on) != sorted(planned):
        raise WorkerError(f"expected ours to train on rows {planned} in step {number}, found {trained_on}.")
    tokens = sum(lengths[row][0] for row in planned)
    return {"number": number, "rows": planned, "tokens": tokens, "first": order[0], **answers}


def _rows_of_step(case: Case, step: dict[str, Any], lengths: list[list[int]]) -> list[tuple[int, int, int]]:
    """Tokens, completion tokens and tokens of a prompt that the step has already had, of each row."""
    found, seen = [], set()
    for row in step["rows"]:
        tokens, completion = lengths[row]
        prompt = row // case.completions_per_prompt
        found.append((tokens, completion, tokens - completion if prompt in seen else 0))
        seen.add(prompt)
    return found


def summarise(
    case: Case, result: dict[str, Any], ceiling: dict[str, dict[str, float]], lengths: list[list[int]]
) -> dict[str, Any]:
    """The figures of a case, from the steps that count.

    A ratio of tokens/s is one of seconds, as both sides train on the same tokens in the same step.
    """
    counted = result["steps"][case.dropped :]
    ratios = sorted(step["theirs"]["seconds"] / step["ours"]["seconds"] for step in counted)
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    summary: dict[str, Any] = {
        "pairs": len(ratios),
        "ratio": {
            "median": quartiles[1],
            "low_quartile": quartiles[0],
            "high_quartile": quartiles[2],
            "least": ratios[0],
            "most": ratios[-1],
            "whole": sum(step["theirs"]["seconds"] for step in counted)
            / sum(step["ours"]["seconds"] for step in counted),
        },
        "cpu_seconds_ratio": sum(step["ours"]["cpu_seconds"] for step in counted)
        / sum(step["theirs"]["cpu_seconds"] for step in counted),
        "memory_ratio": result["ours"]["end"]["peak_mib"] / result["theirs"]["end"]["peak_mib"],
        "memory_ratio_above_start": result["ours"]["end"]["above_start_mib"]
        / result["theirs"]["end"]["above_start_mib"],
        "losses": {side: [step[side]["loss"] for step in result["steps"]] for side in ("ours", "theirs")},
        "tokens_per_second": {
            side: statistics.median(step["tokens"] / step[side]["seconds"] for step in counted)
            for side in ("ours", "theirs")
        },
    }
    if ceiling:
        sizes = result["ours"]["start"]["model"]
        limit = ceiling[case.products]["ceiling"] * 1e9
        flops = [machine.useful_flops(sizes, _rows_of_step(case, step, lengths), case.lora) for step in counted]
        summary["share_of_ceiling"] = {
            side: statistics.median(
                flop / step[side]["seconds"] / limit for flop, step in zip(flops, counted, strict=True)
            )
            for side in ("ours", "theirs")
        }
    return summary
