"""Write the scores of ``predict`` as JSON lines: of given rows, and of completions that the policy makes."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from sklearn.linear_model import LogisticRegression
from typing_extensions import override

from bco_lightning.batch import ScoredRows
from bco_lightning.callbacks.held_out_rows import HELD_OUT_FILE, HeldOut
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.data.collate import collate, images_of_prompt, prompt_of
from bco_lightning.data.images import ImageInputs
from bco_lightning.models.generation import evaluating, sample_completions
from bco_lightning.options import at_least, chosen_seed
from bco_lightning.parallel.collectives import by_all
from bco_lightning.parallel.sharding import device_of, is_sharded
from bco_lightning.places import require_free

TIE = 1e-5  # nats; float32 does not tell rewards apart that are nearer
_AT_ONCE, _FEWEST = 16, 20  # completions; held-out rows to calibrate by
_Line = dict[str, Any]


class PredictionWriter(Callback):
    """Writes one line for each scored row, in file order, then one for each completion that the policy made.

    A line holds where the row stands (``row``, ``source``), ``prompt``, the same number for the same prompt,
    ``thumbs_up`` where the row has one, ``implicit_reward`` in nats, ``probability_up``, the sigmoid of the reward
    minus the reward shift, ``calibrated_probability_up``, and ``rank`` among the ``completions`` of its prompt: 1 plus
    the number of those with a higher reward, so that equal ones share a rank. A completion that the policy made also
    has its text and whether it ended by itself; it may repeat what users wrote, so there is none unless asked for.

    ``calibrated_probability_up`` is Platt's logistic regression of thumbs on rewards, on the held-out rows of the run,
    as of the checkpoint's step; ``null`` where there are no such rows.

    The file appears under its name only when it is complete, and replaces none. Several processes write one file.

    Args:
        path: File to write.
        completions: How many completions the policy makes of each prompt; 0 for none.
        max_new_tokens: Limit of a completion, in tokens.
        seed: Seed of the completions; that of ``seed_everything`` if left out.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(
        self, path: str = "predictions.jsonl", completions: int = 0, max_new_tokens: int = 256, seed: int | None = None
    ) -> None:
        at_least(0, "completions").check("predictions.completions", completions)
        at_least(1, "token").check("predictions.max_new_tokens", max_new_tokens)
        self.path, self.completions, self.max_new_tokens = Path(path), completions, max_new_tokens
        self.seed = chosen_seed(seed)
        self._lines: list[_Line] = []

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "predict":
            require_free("predictions.path", self.path)
            self._lines = []

    @override
    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._lines += _scores(outputs)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Not at the end of the loop, which a process without rows passes over.
        table = trainer.datamodule.predict_dataset if stage == "predict" else None
        if table is None:
            return
        own = by_all(lambda: [*self._lines, *self._completions(trainer, pl_module, table)], trainer)
        self._lines = []
        if not trainer.is_global_zero:
            return
        # The given rows in file order, then those that were made, which have a number too.
        lines = sorted((line for lines in own for line in lines), key=lambda line: ("completion" in line, line["row"]))
        calibration = _calibration(trainer.ckpt_path, pl_module.steps_before)
        keys, places, sources, thumbs = (table[name] for name in ("prompt_key", "place", "source", "thumbs_up"))
        labels = [source.label for source in trainer.datamodule.options.sources("predict")]
        numbers: dict[int, int] = {}
        rewards = torch.tensor([line["implicit_reward"] for line in lines], dtype=torch.float64)
        slope, intercept = calibration or (math.nan, math.nan)
        calibrated = (slope * rewards + intercept).sigmoid().tolist()
        for line, probability in zip(lines, calibrated, strict=True):
            row, was_made = line["row"], "completion" in line
            line |= {"row": places[row], "source": labels[sources[row]], "thumbs_up": None if was_made else thumbs[row]}
            line |= {"prompt": numbers.setdefault(keys[row], len(numbers)), "calibrated_probability_up": probability}
        _rank(lines)
        with written_whole(self.path, replaces=False) as partial, partial.open("x", encoding="utf-8") as file:
            for line in lines:
                values = {name: None if value != value else value for name, value in line.items()}  # NaN is no JSON
                print(json.dumps(values, ensure_ascii=False), file=file)
        made = f", {sum('completion' in line for line in lines)} of them made by the policy" if self.completions else ""
        rank_zero_info(f"scores of {len(lines)} rows{made}: {self.path}")
        if calibration is None:
            told = f"no {HELD_OUT_FILE} of the checkpoint's step has {_FEWEST} rows and both thumbs"
            rank_zero_info(f"calibrated_probability_up: null, since {told}")

    def _completions(self, trainer: Any, module: Any, table: Any) -> Iterator[_Line]:
        """Of each prompt with its own seed, so that it does not matter how many processes share them."""
        if not self.completions:
            return
        firsts = np.sort(np.unique(np.asarray(table["prompt_key"]), return_index=True)[1]).tolist()
        together = is_sharded(module.policy)  # each process has a part of the model, and all make the same
        with torch.no_grad(), evaluating(module), module.reference.where_it_is_used(trainer):
            for number, row in enumerate(firsts):
                mine = number % trainer.world_size == trainer.global_rank
                if mine or together:
                    lines = list(self._of_prompt(module, row, table[row], self.seed + number))
                    yield from lines if mine else ()

    def _of_prompt(self, module: Any, row: int, given: Any, seed: int) -> Iterator[_Line]:
        prompt = prompt_of(given)
        seen = ImageInputs(module.tokenizer)(images_of_prompt(given))
        for start in range(0, self.completions, _AT_ONCE):
            many = min(_AT_ONCE, self.completions - start)
            asked: _Line = {"max_new_tokens": self.max_new_tokens, "seed": seed + start * 1_000_003}
            asked["images"] = [seen] * many
            made = sample_completions(module.policy, module.tokenizer, [prompt] * many, **asked)
            samples = []
            for each in made:
                mask = [False] * len(prompt) + [True] * len(each.token_ids)
                tokens = {"input_ids": [*prompt, *each.token_ids], "completion_mask": mask}
                samples.append({**tokens, "thumbs_up": False, "row_id": row, "seen": seen})
            scores = _scores(module.predict_step(collate(samples).to(device_of(module.policy)), 0))
            for each, line in zip(made, scores, strict=True):
                yield {**line, "completion": each.text, "finished": each.finished}


def _scores(rows: ScoredRows) -> list[_Line]:
    columns = {
        "row": rows.row_ids_B,
        "implicit_reward": rows.rewards_B,
        "probability_up": torch.sigmoid(rows.rewards_B.cpu().double() - rows.reward_shift),
        "policy_log_prob": rows.policy_log_probs_B,
        "reference_log_prob": rows.reference_log_probs_B,
        "completion_tokens": rows.completion_lengths_B,
    }
    return [dict(zip(columns, each, strict=True)) for each in zip(*(c.tolist() for c in columns.values()), strict=True)]


def _rank(lines: list[_Line]) -> None:
    """Ranks the completions of each prompt, the highest reward first; those that tie share a rank."""
    prompts: dict[int, list[_Line]] = {}
    for line in lines:
        prompts.setdefault(line["prompt"], []).append(line)
    for group in prompts.values():
        known = sorted(line["implicit_reward"] for line in group if math.isfinite(line["implicit_reward"]))
        for line in group:
            higher = len(known) - bisect_right(known, line["implicit_reward"] + TIE)
            line["rank"] = higher + 1 if math.isfinite(line["implicit_reward"]) else None
            line["completions"] = len(group)


def _calibration(checkpoint: Any, step: int) -> tuple[float, float] | None:
    """Slope and intercept of Platt's regression (1999), whose targets allow for few rows, on a run's held-out rows."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = HeldOut.read(Path(checkpoint).parent.parent)
        if found and found.step == step and len(found.rewards) >= _FEWEST and found.num_rarer:
            return platt(found.rewards, found.thumbs_up)
    return None


def platt(rewards: Any, up: Any) -> tuple[float, float]:
    """Slope and intercept in nats of what makes probabilities of thumbs-up of rewards, both of shape ``(B,)``."""
    targets = np.where(up, (up.sum() + 1) / (up.sum() + 2), 1 / ((~up).sum() + 2))
    scale = float(rewards.std()) or 1.0
    x = np.concatenate([rewards, rewards])[:, None] / scale
    y = np.repeat([True, False], len(rewards))
    fitted = LogisticRegression(C=1e8, tol=1e-8, max_iter=1000).fit(x, y, np.concatenate([targets, 1 - targets]))
    return float(fitted.coef_[0, 0]) / scale, float(fitted.intercept_[0])
