"""Loggers of our own; what all show beside numbers, and where each says to look; none of them ends a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Literal, NamedTuple

import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from typing_extensions import override

from bco_lightning.errors import ConfigError, causes_of

SAMPLES_FILE = "samples.jsonl"
METRICS_FILE = "metrics.jsonl"  # of a run's folder, whatever other loggers there are: ``report`` is made of it
Rows = Sequence[Sequence[str]]


@contextmanager
def telling(file: Path, makes_folder: bool = True) -> Iterator[None]:
    """Goes on with a word where a file, or what a logger has, cannot be written: training is worth more than that."""
    try:
        if makes_folder:
            file.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, ValueError) as error:  # Lightning makes a ValueError of whatever TensorBoard meets
        fault = next((cause for cause in causes_of(error) if isinstance(cause, OSError)), None)
        if fault is None:
            raise
        rank_zero_warn(f"{file}: could not be written ({fault.strerror}); going on without it.")


class MetricsFile(Logger):
    """Appends a line of JSON for whatever is logged: ``step``, and numbers by name; ``null`` is not a finite number.

    A run that goes on appends to its file. Of two lines that hold a number for the same step, the later one counts.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)

    @property
    @override
    def name(self) -> str:
        return ""

    @property
    @override
    def version(self) -> str:
        return self.folder.name

    @property
    @override
    def save_dir(self) -> str:
        return str(self.folder)

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in ``config.yaml``."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        plain = {name: float(v) if math.isfinite(v) else None for name, v in metrics.items() if name != "epoch"}
        if not plain or step is None:
            return
        with telling(file := self.folder / METRICS_FILE), file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **plain}) + "\n")


class TrackioLogger(Logger):
    """Logs to Trackio: on this machine, or where its environment variables say.

    Args:
        project: Name of the project.
        run_name: Name of the run; Trackio's choice if left out.

    Raises:
        ConfigError: If Trackio is not installed.
    """

    def __init__(self, project: str = "bco_lightning", run_name: str | None = None) -> None:
        super().__init__()
        try:
            import trackio
        except ImportError as error:
            problem = f"expected trackio, found that it cannot be imported ({error})."
            raise ConfigError("trainer.logger", problem, "pip install trackio") from None
        self._trackio, self._project, self._run_name = trackio, project, run_name
        self._run: Any = None

    @property
    @override
    def name(self) -> str:
        return self._project

    @property
    @override
    def version(self) -> str | None:
        return self._run.name if self._run is not None else self._run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run; begun when first asked for, in the first process."""
        if self._run is None:
            self._run = self._trackio.init(self._project, name=self._run_name, embed=False)
        return self._run

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.experiment.config.update(dict(params))

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()

    def log_figure(self, name: str, figure: Figure, step: int) -> None:
        """Shows a figure."""
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        self.log_metrics({name: self._trackio.Image(pixels)}, step)

    def log_table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Shows a table of texts."""
        self.log_metrics({name: self._trackio.Table(columns=list(columns), data=[list(row) for row in rows])}, step)


class _Ways(NamedTuple):
    """How a logger shows a figure and a table of texts, by its public methods, and where to look at what it has."""

    figure: Callable[[Any, str, Figure, int], None] | None
    table: Callable[[Any, str, Sequence[str], Rows, int], None] | None
    look: Callable[[Any], str]


def _look_at_wandb(logger: WandbLogger) -> str:
    run = logger.experiment
    return f"wandb sync {quote(str(Path(run.dir).parent))}" if run.offline else str(run.url)


_WAYS: dict[type[Logger], _Ways] = {
    TensorBoardLogger: _Ways(
        lambda logger, name, figure, step: logger.experiment.add_figure(name, figure, step),
        lambda logger, name, columns, rows, step: logger.experiment.add_text(name, _markdown(columns, rows), step),
        lambda logger: f"tensorboard --logdir {quote(logger.save_dir)}",
    ),
    WandbLogger: _Ways(
        lambda logger, name, figure, step: logger.log_image(name, [figure], step),
        lambda logger, name, columns, rows, step: logger.log_text(name, list(columns), list(rows), step=step),
        _look_at_wandb,
    ),
    MLFlowLogger: _Ways(
        lambda logger, name, figure, step: logger.experiment.log_figure(
            logger.run_id, figure, f"{name}/step-{step:08}.png"
        ),
        lambda logger, name, columns, rows, step: logger.experiment.log_text(
            logger.run_id, _markdown(columns, rows), f"{name}/step-{step:08}.md"
        ),
        lambda logger: f"mlflow ui --backend-store-uri {quote(logger.experiment.tracking_uri)}",
    ),
    TrackioLogger: _Ways(
        TrackioLogger.log_figure,
        TrackioLogger.log_table,
        lambda logger: f"trackio show --project {quote(logger.name)}",
    ),
    CSVLogger: _Ways(None, None, lambda logger: f"less {quote(str(Path(logger.log_dir) / 'metrics.csv'))}"),
}


def shows_figures(loggers: Sequence[Logger]) -> bool:
    """Whether it is worth drawing some."""
    return any(ways.figure for _, ways in _known(loggers))


def show(kind: Literal["figure", "table"], loggers: Sequence[Logger], name: str, *what: Any) -> None:
    """Shows a figure, or column names and rows of texts, at a step in every logger that can."""
    for logger, ways in _known(loggers):
        if (way := getattr(ways, kind)) is not None:
            with telling(_place_of(logger), makes_folder=False):
                way(logger, name, *what)


def where_to_look(loggers: Sequence[Logger]) -> list[str]:
    """What to type, or to open, for each logger that is known."""
    return [ways.look(logger) for logger, ways in _known(loggers)]


def goes_on_when_full(logger: Logger) -> None:
    """Has a run go on with a word where a logger meets a full disk; whether it is saved is for checkpoints to say."""
    for name in ("log_hyperparams", "log_metrics", "save", "finalize"):
        setattr(logger, name, partial(_told, getattr(logger, name), logger))


def _told(write: Callable[..., None], logger: Logger, *args: Any, **kwargs: Any) -> None:
    with telling(_place_of(logger), makes_folder=False):
        write(*args, **kwargs)


def _place_of(logger: Logger) -> Path:
    return Path(str(logger.log_dir or logger.save_dir or ".")) / type(logger).__name__


def _known(loggers: Sequence[Logger]) -> list[tuple[Logger, _Ways]]:
    return [(logger, ways) for logger in loggers for kind, ways in _WAYS.items() if isinstance(logger, kind)]


def _markdown(columns: Sequence[str], rows: Rows) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    lines = [list(columns), ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
