"""Before the first step the policy is the reference: rewards are 0, or the run stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from bco_lightning.batch import FeedbackBatch, ScoredRows
from bco_lightning.data.collate import COLUMNS, collate
from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.errors import LanguageModelError
from bco_lightning.models.build import dtype_of_matrices
from bco_lightning.models.layout import causal_lm_of
from bco_lightning.models.refusals import refuse_unknown_token
from bco_lightning.options import ModelOptions
from bco_lightning.parallel.collectives import by_all
from bco_lightning.places import cache_root
from bco_lightning.reference.model import Reference

_DRAWN = 64  # rows of a stream, among which the shortest and the longest are looked for
# What rounding explains of the difference of a token's log-probs, in nats, absolute and relative to them.
_EXACT, _ROUNDED = (2e-3, 2e-4), (0.1, 0.02)


def refuse_other_start(
    data: FeedbackDataModule | None,
    reference: Reference,
    score: Callable[[FeedbackBatch], ScoredRows],
    options: ModelOptions,
    trainer: Any,
) -> None:
    """Stops a run whose reference is another model than its policy, by the shortest, the longest and one more row.

    They are scored as in a step, by known reference log-probs where there are some: a reference that is loaded as
    another model shows here, and so do values of another one. Rounding of a sum grows as the root of its terms.
    """
    if data is None or not reference.is_policy_that_came_in:
        return
    table = data.training.table(_DRAWN)
    lengths = np.asarray(pc.list_value_length(table.data.column("input_ids")))
    rows = [table[number] for number in {int(lengths.argmin()), int(lengths.argmax()), len(table) // 2}]
    samples = [{name: row[name] for name in COLUMNS if name in row} for row in rows]
    with torch.no_grad(), reference.where_it_is_used(trainer) as device:
        batch = collate(samples, share_prompts=data.options.group_by_prompt)
        refuse_unknown_token(causal_lm_of(reference.policy), int(batch.input_ids_S.max()))
        scored = score(batch.to(device))
    is_known = batch.reference_log_probs_B is not None
    same_path = not (is_known or options.compile) and device.type == "cpu"
    plain = dtype_of_matrices(reference.policy) == torch.float32 and "32" in str(trainer.precision)
    absolute, relative = _EXACT if plain or same_path else _ROUNDED
    policy_B, reference_B = scored.policy_log_probs_B, scored.reference_log_probs_B
    terms_B = scored.completion_lengths_B.clamp(min=1).sqrt()
    off_B = (policy_B - reference_B).abs() - terms_B * absolute - policy_B.abs() * relative / terms_B

    def refuse() -> None:
        worst = int(off_B.nan_to_num(-torch.inf).argmax())  # NaN is the guard's business
        if off_B[worst] > 0:
            found = f"log-probs of {policy_B[worst]:.3f} and {reference_B[worst]:.3f} nats"
            cache = cache_root(options.cache_folder) / "reference_log_probs"
            raise LanguageModelError(
                options.name_or_path,
                f"expected a policy that is its own reference before the first step, found {found} in "
                f"{data.training.place_of(rows[worst]['row_id'])}.",
                f"The latter were kept in {cache}: remove it."
                if is_known
                else "Merge adapters into their model first.",
            )

    by_all(refuse, trainer)
