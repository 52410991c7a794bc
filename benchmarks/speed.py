"""How fast is `bco_lightning`, against what it replaces and against what the machine can do?

    python benchmarks/speed.py setup                    # once: an environment for each rival
    python benchmarks/speed.py run --cases bars         # tokens/s and peak memory against TRL, turn by turn
    python benchmarks/speed.py run --cases watched --pairs 60 --no-ceiling --name watched   # what seeing a run costs
    python benchmarks/speed.py growth                   # time and memory against vocabulary, length, batch
    python benchmarks/speed.py ceiling                  # matrix products per second of this machine
    python benchmarks/speed.py plot                     # pictures of what was written last

Figures mean something on a quiet machine only. Each command writes benchmarks/results/NAME.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import cases
import environments
import growth
import machine
import turns

RESULTS = Path(__file__).parent / "results"
console = Console(width=None if sys.stdout.isatty() else 170)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that workers are ended too
    return int(options.command(options) or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="speed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("setup", help="create the rivals' virtual environments in benchmarks/.venvs")
    command.add_argument("--rivals", nargs="+", choices=list(environments.PACKAGES), default=[*environments.PACKAGES])
    command.set_defaults(command=_setup)

    command = commands.add_parser("run", help="ours against TRL on the same rows, in turns")
    command.add_argument("--list", action="store_true", help="show the cases and what is demanded of them, and end")
    command.add_argument("--cases", nargs="+", default=["bars"], help="names of cases, or bars, or all (default: bars)")
    command.add_argument("--pairs", type=int, default=6, help="steps of each side that count (default: 6)")
    command.add_argument("--no-ceiling", action="store_true", help="leave out the share of the matmul ceiling")
    command.add_argument("--name", default="speed", help="of the file in benchmarks/results (default: speed)")
    command.set_defaults(command=_run)

    command = commands.add_parser("ceiling", help="GFLOP/s of matrix products, float32 and bfloat16")
    command.add_argument("--name", default="ceiling", help="of the file in benchmarks/results (default: ceiling)")
    command.set_defaults(command=_ceiling)

    command = commands.add_parser("growth", help="time and memory against vocabulary, length and batch")
    command.add_argument("--curves", nargs="+", choices=list(growth.CURVES), default=[*growth.CURVES])
    command.add_argument("--designs", nargs="+", choices=growth.DESIGNS, default=[*growth.DESIGNS])
    command.add_argument(
        "--limit", type=float, default=18.0, help="GiB; points expected to need more are left out (default: 18)"
    )
    command.add_argument("--name", default="growth", help="of the file in benchmarks/results (default: growth)")
    command.set_defaults(command=_growth)

    command = commands.add_parser("plot", help="draw benchmarks/results/*.json as PNG (needs matplotlib)")
    command.add_argument("names", nargs="*", default=["speed", "growth"], help="default: speed growth")
    command.set_defaults(command=_plot)
    return parser


def _setup(options: argparse.Namespace) -> None:
    environments.create(options.rivals)


def _run(options: argparse.Namespace) -> int:
    if options.list:
        console.print(_case_table(list(cases.CASES.values())))
        return 0
    chosen = cases.chosen_cases(options.cases)
    if options.pairs < 1:
        raise SystemExit(f"--pairs: expected at least 1, found {options.pairs}.")
    for case in chosen:
        environments.python_of(case.rival)  # a missing one is better known now than in an hour
    report = started()
    needed = sorted({case.products for case in chosen})
    report["ceiling"] = {} if options.no_ceiling else machine.matmul_ceiling(needed)
    report["cases"], failed = [], []
    for case in chosen:
        try:
            report["cases"].append(turns.run_case(case, options.pairs, report["ceiling"], console.print))
        except turns.WorkerError as error:
            failed.append(case.name)
            console.print(f"{case.name} failed. {error}", style="red", markup=False, highlight=False)
        write(options.name, report)  # what is done stays, whatever comes
    if report["cases"]:
        console.print(_result_table(report["cases"]))
    for result in report["cases"]:
        if result["case"]["rival"] == "unwatched":
            console.print(_cost_of_watching(result), highlight=False)
    return 1 if failed else 0


def _ceiling(options: argparse.Namespace) -> None:
    report = started()
    report["ceiling"] = machine.matmul_ceiling(repeats=20)
    table = Table("GFLOP/s, best", *report["ceiling"], title="Matrix products")
    for shape in report["ceiling"]["float32"]:
        table.add_row(shape, *(f"{rates[shape]:,.0f}" for rates in report["ceiling"].values()))
    console.print(table)
    write(options.name, report)


def _growth(options: argparse.Namespace) -> None:
    report = started()
    report["points"] = []
    for curve in options.curves:
        for point in growth.CURVES[curve](options.designs):
            report["points"].append(growth.measure(curve, point, options.limit))
            console.print(growth.sentence(report["points"][-1]), highlight=False)
            write(options.name, report)
    for curve in options.curves:
        console.print(growth.table(curve, report["points"]))


def _plot(options: argparse.Namespace) -> None:
    import plot

    for name in options.names:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            raise SystemExit(f"There is no {path.relative_to(RESULTS.parent)} yet; run or growth writes it.")
        plot.draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
        console.print(f"benchmarks/results/{name}.png")


def started() -> dict[str, Any]:
    """What belongs to every result; warns if the machine is busy."""
    before = machine.load()
    if before > machine.BUSY:
        console.print(f"Warning: the load average is {before}; figures of a busy machine are noise.", style="yellow")
    return {
        "command": shlex.join(["speed.py", *sys.argv[1:]]),
        "machine": machine.describe(),
        "revision": _revision(),
        "load": {"start": before},
    }


def write(name: str, report: dict[str, Any]) -> None:
    """Writes a result, with the load average at the end; the benchmark's own work is in that."""
    report["load"]["end"] = machine.load()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _revision() -> str:
    """Commit of the source, and whether it was changed since."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _case_table(chosen: list[cases.Case]) -> Table:
    table = Table("case", "rival", "tokens/s at least", "peak memory at most", "share of ceiling at least")
    for case in chosen:
        demands = (case.min_speed, case.max_memory, case.min_share)
        table.add_row(case.name, case.rival, *("–" if demand is None else f"{demand:.2f}" for demand in demands))
    return table


def _result_table(results: list[dict[str, Any]]) -> Table:
    title = "Ours against TRL: ratios of tokens/s (median, quartiles, all steps), peak memory, share of matmul ceiling"
    table = Table(title=title)
    rates, memory = ("tok/s TRL", "ours", "ratio", "quartiles", "all"), ("peak MiB TRL", "ours", "ratio")
    for heading in ("case", *rates, "demand", *memory, "demand", "share TRL", "ours", "demand", "loss TRL", "ours"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for result in results:
        case, summary = result["case"], result["summary"]
        ratio, speed, share = summary["ratio"], summary["tokens_per_second"], summary.get("share_of_ceiling")
        table.add_row(
            case["name"],
            f"{speed['theirs']:.0f}",
            f"{speed['ours']:.0f}",
            _judged(ratio["median"], case["min_speed"], at_least=True),
            f"{ratio['low_quartile']:.2f}–{ratio['high_quartile']:.2f}",
            f"{ratio['whole']:.2f}",
            _demand(case["min_speed"], "≥"),
            f"{result['theirs']['end']['peak_mib']:.0f}",
            f"{result['ours']['end']['peak_mib']:.0f}",
            _judged(summary["memory_ratio"], case["max_memory"], at_least=False),
            _demand(case["max_memory"], "≤"),
            f"{share['theirs']:.2f}" if share else "–",
            _judged(share["ours"], case["min_share"], at_least=True) if share else "–",
            _demand(case["min_share"], "≥"),
            *(f"{summary['losses'][side][-1]:.4f}" for side in ("theirs", "ours")),
        )
    return table


def _cost_of_watching(result: dict[str, Any]) -> str:
    """A step with everything to see, in terms of one with nothing."""
    ratio, case = result["summary"]["ratio"], result["case"]
    middle, least, most = (1 / ratio[name] for name in ("median", "high_quartile", "low_quartile"))
    return (
        f"{case['name']}: a step that logs and shows everything takes {middle:.3f} ({least:.3f} to {most:.3f}) times "
        f"as long as one that shows nothing, at most {1 / case['min_speed']:.2f} demanded; CPU seconds of all steps: "
        f"{result['summary']['cpu_seconds_ratio']:.3f} times."
    )


def _demand(demand: float | None, sign: str) -> str:
    return "" if demand is None else f"{sign} {demand:.2f}"


def _judged(value: float, demand: float | None, *, at_least: bool) -> str:
    if demand is None:
        return f"{value:.2f}"
    met = value >= demand if at_least else value <= demand
    return f"[{'green' if met else 'red'}]{value:.2f}[/]"


if __name__ == "__main__":
    sys.exit(main())
