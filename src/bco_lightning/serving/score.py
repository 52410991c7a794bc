"""Implicit rewards of answers, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bco_lightning.batch import micro_batches_of
from bco_lightning.checkpoints.manifest import MANIFEST_FILE
from bco_lightning.data.chat import told_by
from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.errors import ConfigError, FeedbackRowError
from bco_lightning.models.generation import evaluating
from bco_lightning.models.load import load_language_model, load_tokenizer, resolve_dtype
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.models.prepare import prepare
from bco_lightning.module import BCOModule
from bco_lightning.options import POSITIVE, LoraSettings
from bco_lightning.serving.export import load_aligned


class Scores(NamedTuple):
    """Of each answer, in the order given: three float32 tensors of shape ``(N,)`` on the CPU, in nats."""

    rewards: Tensor
    policy_log_probs: Tensor
    reference_log_probs: Tensor


@torch.no_grad()
def score(
    rows: Any, completions: Iterable[Any] | None = None, *, policy: Any, reference: Any = None, tokenizer: Any = None,
    beta: float = 0.1, max_length: int = 2**31, **options: Any,
) -> Scores:  # fmt: skip
    """Scores answers by their implicit rewards: ``beta`` times the log-ratio of policy and reference.

    Log-probabilities are summed over the tokens of a completion, with the end token that the chat template gives it.
    No row is left out, and none is cut unless ``max_length`` says so.

    Args:
        rows: Prompts, each a text or a list of messages, with ``completions`` beside them. Or rows with both: a list of
            dictionaries, a ``Dataset`` of ``datasets``, a frame of pandas. Labels are not needed.
        completions: As many answers, each a text or a list of messages.
        policy: A trained :class:`BCOModule`, or the folder of its checkpoint, either of which brings its reference,
            tokenizer, chat template and ``beta``; or the name or path of a model, or a model of transformers.
        reference: Name, path or model of the reference, of a policy that does not bring one.
        tokenizer: That of the rows, of a policy that is a model object.
        beta: Scale of the rewards; above 0.
        max_length: Tokens of a row, from which on it is cut as in training.
        options: Others of :class:`~bco_lightning.data.options.DataOptions`, such as ``batch_size``.

    Returns:
        Rewards, and the log-probabilities that they are made of.

    Raises:
        ConfigError: If there is no reference or tokenizer, or an option is out of range.
        FeedbackRowError: If a row is malformed, or one that no score can be given.
        LanguageModelError: If a model cannot be loaded, or not be computed right.

    Example:
        ``score(["Hi"], ["Hello!"], policy="runs/bco/version_0").rewards``

    Source:
        Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290, section 5.
    """
    if isinstance(policy, (str, Path)) and any(Path(policy, name).exists() for name in ("checkpoints", MANIFEST_FILE)):
        policy, _ = load_aligned(Path(policy))
    if isinstance(policy, BCOModule):
        tokenizer, beta = told_by(policy.tokenizer, policy.told.get("chat_template")), policy.beta
        options = {"template_date": policy.told.get("template_date"), **options}
        models: list[Any] = [nullcontext(policy.policy), policy.reference.model()]
    elif reference is None:
        raise ConfigError("score", "expected a reference beside a policy that brings none, found none.")
    else:
        models = [nullcontext(_prepared(model)) for model in (policy, reference)]
    if tokenizer is None and isinstance(policy, str):
        tokenizer = load_tokenizer(policy)
    POSITIVE.check("beta", beta)
    if completions is not None:
        rows = [{"prompt": prompt, "completion": said} for prompt, said in zip(rows, completions, strict=True)]
    options = {"cache_rows": False, "max_length": max_length, **options}
    data = FeedbackDataModule(predict=rows, tokenizer=tokenizer, **options)
    data.setup("predict")
    if reasons := data.counts[0].left_out:
        told = "; ".join(f"{reason} ({', '.join(found.places)})" for reason, found in reasons.items())
        raise FeedbackRowError("rows of predict", f"expected answers that can all be scored, found {told}.")
    found: list[list[Tensor]] = []
    for entered in models:
        with entered as model, evaluating(model):
            batches = (part.to(model.device) for batch in data.predict_dataloader() for part in micro_batches_of(batch))
            found.append([completion_log_probs(model, batch).cpu() for batch in batches])
    policy_N, reference_N = map(torch.cat, found)
    return Scores(beta * (policy_N - reference_N), policy_N, reference_N)


def _prepared(model: Any) -> Any:
    """A model, tried for the quickest right way to compute; nothing of one that is given is trained any less later."""
    if isinstance(model, (str, Path)):
        model = load_language_model(str(model), resolve_dtype("auto", LoraSettings(), torch.device("cpu")))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model.requires_grad_(False)):
        prepare(model)
    for parameter in trained:
        parameter.requires_grad_(True)
    return model
