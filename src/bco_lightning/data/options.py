"""What a user can set about rows: each option states its type, default, range and meaning here, and nowhere else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from bco_lightning.data.remote import public_name
from bco_lightning.errors import ConfigError
from bco_lightning.options import DAY, SHARE, SHARE_BELOW_1, Options, Range, at_least, chosen_seed, option, options

FormatName = Literal[
    "auto", "unpaired", "ranked", "compared", "paired", "open_webui", "langfuse", "langsmith", "argilla", "chainlit",
    "chitchat", "librechat", "mlflow", "opik", "phoenix", "weave", "helicone", "tensorzero", "label_studio",
    "anythingllm", "dify",
]  # fmt: skip
PresetName = Literal[
    "helpsteer2", "llava_rlhf", "openai_preference", "rlaif_v", "rlhf_v", "sharelm", "toxic_chat", "wildfb"
]
LossOn = Literal["rated_turn", "all_turns"]
Conflicts = Literal["keep", "drop", "majority", "last"]
LongPrompts = Literal["keep_end", "keep_start", "drop"]
LongCompletions = Literal["cut", "drop"]
BadRowPolicy = Literal["strict", "skip"]


@options("data.columns")
class Columns(Options):
    """Names of the columns of a feedback log, and what its labels mean.

    A name with dots reaches into nested objects: ``feedback.score``.
    """

    prompt: str = option("Text, or a list of chat messages.", default="prompt")
    completion: str = option(
        "Text, or a list of chat messages; under its usual name, ``response`` is taken as well.", default="completion"
    )
    label: str = option("The thumb; in exports, the name of the score or question that holds it.", default="label")
    messages: str = option(
        "A whole conversation whose last assistant turn is rated, instead of prompt and completion; under its usual "
        "name, ``conversation``, ``conversations`` and ``chat`` are taken as well.",
        default="messages",
    )
    chosen: str = option(
        "The better answer of a pair: text, a list of chat messages, or a whole conversation.", default="chosen"
    )
    rejected: str = option("The worse answer of a pair, in the same form.", default="rejected")
    first: str | None = option(
        "The first of two answers; if left out, ``response_a``, ``conversation_a``, ``response1`` and others.",
        default=None,
    )
    second: str | None = option("The second one, in the same form.", default=None)
    winner: str | list[str] | None = option(
        "Which of the two is better, or two columns, each with the label or rating of its answer; if left out, "
        "``winner``, ``overall_preference`` and others.",
        default=None,
    )
    winners: dict[str, Literal["first", "second", "both", "neither", "drop"]] | None = option(
        'What values of ``winner`` mean, if not the usual: ``{"tie": both}`` gives two thumbs-up, ``neither`` two '
        "thumbs-down, ``drop`` leaves both rows out.",
        default=None,
    )
    answers: str = option("Several answers to the prompt, objects with a text and a rank or rating.", default="answers")
    history: str | None = option("Messages that came before those of the row, if they stand apart.", default=None)
    system: str = option(
        "The system prompt, where it stands beside the messages; under its usual name, ``system_prompt`` is taken as "
        "well; optional.",
        default="system",
    )
    tools: str = option(
        "JSON schemas of the functions that the assistant could call, a list or the JSON text of one; optional.",
        default="tools",
    )
    images: str = option(
        "Images, in the order of ``<image>`` in texts or of image parts that name none; optional.", default="images"
    )
    template_options: str = option(
        "What else the chat template is told, an object or the JSON text of one; optional.",
        default="chat_template_kwargs",
    )
    thumbs: dict[str, Literal["up", "down", "drop"]] | None = option(
        'What each label means, where a log speaks a vocabulary of its own: ``{"good": up, "bad": down}``, or for a '
        'rating ``{"1": down, "2": down, "3": drop, "4": up, "5": up}``, where ``drop`` leaves the row out. Any other '
        "label is then an error.",
        default=None,
    )

    def check(self) -> None:
        """Looks at what labels mean."""
        for label, thumb in (self.thumbs or {}).items():
            if thumb not in ("up", "down", "drop"):
                raise ConfigError("data.columns.thumbs", f"expected up, down or drop for {label!r}, found {thumb!r}.")


@options("data.rating")
class Rating(Options):
    """The rule that makes thumbs of numbers."""

    column: str | None = option(
        "Name of the rating, such as ``helpfulness``; if left out, the label's own column is rated.", default=None
    )
    up: float | None = option("Least rating that is thumbs-up. Scales differ, so it has to be given.", default=None)
    down: float | None = option(
        "Largest rating that is thumbs-down, below ``up``; rows between the two are left out and counted. It has to be "
        "given.",
        default=None,
    )
    untouched: dict[str, float] = option(
        "Ratings as they are before anyone has touched them; a row in which all of these stand is left out and "
        "counted.",
        default_factory=dict,
    )
    scale: tuple[float, float] = option(
        "The least and the largest rating, for objectives of scores, which go from 0 to 1.", default=(0.0, 1.0)
    )

    def check(self) -> None:
        """Refuses a rule without its two limits, or with limits that do not divide."""
        up, down = self.limits
        ranks = (self.column or "").rpartition(".")[2] == "rank"
        if not (up < down if ranks else down < up):
            expected = "up below down, as 1 is the best rank" if ranks else "down below up"
            raise ConfigError("data.rating", f"expected {expected}, found {down:g} as down and {up:g} as up.")
        if not self.scale[0] < self.scale[1]:
            raise ConfigError("data.rating.scale", f"expected the least and the largest rating, found {self.scale}.")

    def score(self, rating: float) -> float | None:
        """Where a rating lies in the scale, from 0 to 1; none outside."""
        least, largest = self.scale
        return (rating - least) / (largest - least) if least <= rating <= largest else None

    @property
    def limits(self) -> tuple[float, float]:
        """``up`` and ``down``.

        Raises:
            ConfigError: If one is not given.
        """
        if self.up is None or self.down is None:
            missing = " and ".join(name for name in ("up", "down") if getattr(self, name) is None)
            raise ConfigError(
                "data.rating",
                f"expected both up and down, found no {missing}.",
                "Say which ratings are thumbs-up and which thumbs-down, for instance {column: stars, up: 4, down: 2}.",
            )
        return self.up, self.down


@options("data")
class Source(Options):
    """One feedback log of several."""

    path: str = option(
        "A file, a glob, a URL of fsspec such as ``s3://bucket/*.jsonl``, ``package:NAME/path`` or "
        "``hub:OWNER/NAME@SPLIT``."
    )
    name: str | None = option(
        "Under which its rows are counted and measured; the path if left out, of a URL without its query.", default=None
    )
    weight: float = option(
        "Passes over its rows in one epoch: 2 shows each row twice, 0.5 half of the rows, the other half next.",
        default=1.0,
    )
    format: FormatName | None = option("What its records are; that of ``data.format`` if left out.", default=None)
    columns: Columns | None = option("Names of its columns; those of ``data.columns`` if left out.", default=None)
    feedback: str | None = option(
        "A file with the feedback on its answers, where the tool keeps that apart: of Phoenix, TensorZero and Weave.",
        default=None,
    )
    rating: Rating | None = option("The rule for its ratings; that of ``data.rating`` if left out.", default=None)
    preset: PresetName | None = option(
        "As ``data.preset``; then none of these three is left to ``data``.", default=None
    )

    def check(self) -> None:
        """Refuses a source without a path, or with a weight that is not above 0."""
        if not self.path:
            raise ConfigError("data", "expected a path or URL of each feedback log, found an empty one.")
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                "data.train_files", f"expected a weight above 0 for {public_name(self.path)!r}, found {self.weight}."
            )

    @property
    def label(self) -> str:
        """The name that its rows go by."""
        return self.name or public_name(self.path)


Files = list[str | Source] | str | None


@options("data")
class DataOptions(Options):
    """Which rows are read, how, and in which order: the options of :class:`~bco_lightning.FeedbackDataModule`."""

    train_files: Files = option(
        "Feedback logs: files, globs, URLs such as ``s3://bucket/*.jsonl``, ``package:NAME/path``, "
        "``hub:OWNER/NAME@SPLIT``; or a :class:`Source` for each, with a name, a weight and a format of its own.",
        default=None,
    )
    validation_files: Files = option(
        "Held-out logs. If left out, ``validation_fraction`` of the training prompts is held out.", default=None
    )
    test_files: Files = option("Logs for ``test``; the validation rows if left out.", default=None)
    predict_files: Files = option("Logs for ``predict``; they need no labels.", default=None)
    batch_size: int = option("Rows of a micro-batch on each device.", default=8, fits=at_least(1, "row"))
    tokens_per_micro_batch: int | Literal["auto"] | None = option(
        "Cut the ``batch_size`` rows of a device, then those of a whole step, into micro-batches of at most so many "
        "tokens to compute; a longer row is alone. ``auto`` takes what fits into memory, and when a run goes on what "
        "it took before. Gradients differ by rounding alone.",
        default=None,
        fits=Range("auto, or at least 1 token", lambda value: value == "auto" or value >= 1),
    )
    format: FormatName = option("What the records are; ``auto`` goes by the first one of each source.", default="auto")
    columns: Columns = option("Names of the columns.", default=Columns())
    rating: Rating | None = option("The rule that makes thumbs of numbers; without, labels are thumbs.", default=None)
    preset: PresetName | None = option(
        "A public data set, by whose options of format, columns and rating are those that are not set.", default=None
    )
    loss_on: LossOn = option(
        "``rated_turn`` trains on the last assistant turn, ``all_turns`` on each of the conversation.",
        default="rated_turn",
    )
    conflicts: Conflicts = option(
        "What becomes of answers with thumbs of both kinds, to train on: ``keep`` all rows, ``drop`` all, keep those "
        "of the ``majority``, or those that agree with the ``last`` one.",
        default="keep",
        on_resume="refused",
    )
    max_length: int = option(
        "Limit of prompt and completion together, in tokens.",
        default=1024,
        fits=at_least(2, "tokens"),
        on_resume="refused",
    )
    max_prompt_length: int | None = option(
        "Limit of the prompt in tokens; if left out, what the completion leaves, and at least half.",
        default=None,
        on_resume="refused",
    )
    long_prompts: LongPrompts = option(
        "``keep_end`` cuts a prompt over its limit on the left (a leading system message stays), ``keep_start`` on the "
        "right, ``drop`` leaves the row out.",
        default="keep_end",
        on_resume="refused",
    )
    long_completions: LongCompletions = option(
        "``cut`` cuts a completion over the limit, which then gets no end token; ``drop`` leaves the row out.",
        default="cut",
        on_resume="refused",
    )
    chat_template: str | None = option(
        "``None`` for the tokenizer's own, ``plain`` for a base model, or a Jinja file.", default=None
    )
    template_date: str | None = option(
        "What day it is to a chat template that asks (``strftime_now``); if left out, the one on which the run began, "
        "also where it goes on. To others it makes no difference.",
        default=None,
        fits=DAY,
        on_resume="free",  # where a template asks, fingerprints have it
    )
    image_folder: str | None = option(
        "Folder that paths of images begin and stay in; that of each log if left out.",
        default=None,
        on_resume="free",
    )
    image_urls: bool = option(
        "Fetch images that a log names by web address. From the command line alone.", default=False, on_resume="free"
    )
    validation_fraction: float = option(
        "Share of the distinct training prompts to hold out when there are no validation files; a prompt is never on "
        "both sides.",
        default=0.1,
        fits=SHARE_BELOW_1,
    )
    balanced_sampling: bool = option(
        "Draw as many thumbs-up as thumbs-down into every micro-batch, the rarer class more often.",
        default=False,
        on_resume="refused",
    )
    group_by_prompt: bool = option(
        "Keep rows with one prompt next to each other and compute their prompt once in a micro-batch, where rows are "
        "packed. Steps then hold fewer distinct prompts.",
        default=False,
        on_resume="refused",
    )
    seed: int | None = option(
        "Seed of the row order and the validation split; that of ``seed_everything`` if left out.",
        default=None,
        on_resume="refused",
    )
    num_workers: int = option(
        "Worker processes of each data loader.", default=0, fits=at_least(0, "processes"), on_resume="free"
    )
    bad_rows: BadRowPolicy = option(
        "``strict`` stops at the first malformed row; ``skip`` leaves them out, counts and shows them.",
        default="strict",
    )
    max_bad_rows: float = option(
        "Share of the rows read, of each data set, above which ``skip`` stops too, if these are more than "
        "``few_bad_rows``.",
        default=0.001,
        fits=SHARE,
    )
    few_bad_rows: int = option(
        "So many malformed rows of each data set ``skip`` leaves out, however small it is.",
        default=10,
        fits=at_least(0, "rows"),
    )
    streaming: bool = option(
        "Leave training rows in their files and read them as steps need them: for JSON lines, Parquet and Arrow "
        "folders that are larger than memory or disk. Nothing is held out; give ``validation_files``.",
        default=False,
    )
    shuffle_buffer: int = option(
        "Rows of a stream that are mixed with each other, from places all over the files.",
        default=10_000,
        fits=at_least(1, "row"),
        on_resume="refused",
    )
    cache_rows: bool = option(
        "Keep tokenized rows on disk, so that the next start with the same logs, options and tokenizer finds them. "
        "They hold what users wrote; what nobody used for 30 days is removed.",
        default=True,
        on_resume="free",
    )
    cache_folder: str | None = option(
        "Where they are kept; else ``BCO_CACHE`` in the environment, else ``~/.cache/bco_lightning``.",
        default=None,
        on_resume="free",
    )

    def __post_init__(self) -> None:
        self._set("seed", chosen_seed(self.seed))
        self._set("columns", self.columns or Columns())
        for name in ("train_files", "validation_files", "test_files", "predict_files"):
            self._set(name, _sources(getattr(self, name), name))
        super().__post_init__()

    def sources(self, name: str) -> list[Source]:
        """The logs of ``train``, ``validation``, ``test`` or ``predict``; files given by name alone are sources too."""
        return list(getattr(self, f"{name}_files"))

    @property
    def row_seed(self) -> int:
        """The seed given, or the one that stands for none."""
        return self.seed or 0

    def check(self) -> None:
        """Refuses options that do not go together."""
        for name, fits, expected in (
            (
                "group_by_prompt", not (self.group_by_prompt and (self.balanced_sampling or self.streaming)),
                "false with balanced_sampling or streaming, which draw rows apart from each other, found true",
            ),
            (
                "max_prompt_length", self.max_prompt_length is None or 1 <= self.max_prompt_length < self.max_length,
                f"at least 1 token and fewer than data.max_length ({self.max_length}), found {self.max_prompt_length}",
            ),
            (
                "batch_size", not (self.balanced_sampling and self.batch_size % 2),
                f"an even number with balanced_sampling, found {self.batch_size}",
            ),
        ):  # fmt: skip
            if not fits:
                raise ConfigError(f"data.{name}", f"expected {expected}.")


def _sources(files: Any, name: str) -> list[Source]:
    given = [files] if isinstance(files, (str, Source)) else list(files or [])
    sources = [
        Source(**file) if isinstance(file, Mapping) else Source(file) if isinstance(file, str) else file
        for file in given
    ]
    twice = [label for label, count in Counter(source.label for source in sources).items() if count > 1]
    if twice:
        raise ConfigError(
            f"data.{name}", f"expected a name for each source, found {twice[0]!r} twice.", "Give them names."
        )
    if name != "train_files" and any(source.weight != 1 for source in sources):
        raise ConfigError(f"data.{name}", "expected no weights, which are for sources to train on, found some.")
    return sources
