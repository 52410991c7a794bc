"""Features of prompts: pooled states of the reference, or what a sentence-transformers model makes of the words."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers.utils import cached_file

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collate import collate
from bco_lightning.errors import ConfigError, LanguageModelError, UserError
from bco_lightning.identity import digest_of_tensors, digest_of_tokenizer, digest_of_values
from bco_lightning.importance.prompt_table import prompt_lengths
from bco_lightning.models.layout import causal_lm_of, decoder_layers_of, only_layers, predicting_states, run
from bco_lightning.models.parallel import is_sharded
from bco_lightning.options import PromptFeatures
from bco_lightning.places import resolve_packaged

BATCH_TOKENS = 4096
_OPTION = "model.prompt_features"
_NO_PART_OF_A_MODEL = ("_name_or_path", "transformers_version")
_KNOWN_PARTS = ("Transformer", "Pooling", "Normalize", "Dense")


@dataclass
class CapturedStates:
    """What a decoder layer has left behind.

    Args:
        states: Of the last forward pass: packed, ``(1, S, H)`` or ``(S, H)``, or padded, ``(B, T, H)``, in the model's
            data type and without a gradient; ``None`` before the first pass.
    """

    states: Tensor | None = None


class ReferenceStates:
    """Pooled states of prompts in a causal language model, taken behind one of its decoder layers.

    States of a prompt do not depend on what follows it, so they may come from a pass over whole rows.

    Args:
        model: A causal language model, perhaps with PEFT around it, with all of its layers.
        features: Which layer, and how its states are pooled.

    Raises:
        ConfigError: If the model has no such layer, or no list of layers.
    """

    def __init__(self, model: Any, features: PromptFeatures) -> None:
        causal_lm = causal_lm_of(model)
        layers = decoder_layers_of(causal_lm)[1]
        if not len(layers):
            raise ConfigError(
                f"{_OPTION}.encoder",
                f"expected a reference with one list of decoder layers, found {type(causal_lm).__name__}.",
                "Name a sentence-transformers model.",
            )
        self.depth = max(1, len(layers) // 2) if features.layer is None else features.layer
        self.pooling = features.pooling
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or not 1 <= self.depth <= len(layers):
            raise ConfigError(
                f"{_OPTION}.layer",
                f"expected a decoder layer from 1 to {len(layers)}, found {features.layer!r}.",
                "Leave it out for the middle one.",
            )
        # A model that stands on its trunk does not show its lower layers.
        self._causal_lm, self._layer = causal_lm, layers[self.depth - 1]

    @property
    def fingerprint_parts(self) -> dict[str, Any]:
        """What features depend on besides the weights, as plain values."""
        return {"layer": self.depth, "pooling": self.pooling}

    @contextmanager
    def captured(self, model: Any) -> Iterator[CapturedStates]:
        """Within it, every forward pass that runs the layer leaves the layer's output behind.

        Args:
            model: The model given at first, whole or on its trunk; or another one of its architecture, whole.
        """
        causal_lm, captured = causal_lm_of(model), CapturedStates()
        own = causal_lm is self._causal_lm
        layer = self._layer if own else decoder_layers_of(causal_lm)[1][self.depth - 1]

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            captured.states = (output if isinstance(output, Tensor) else output[0]).detach()

        hook, compiled = layer.register_forward_hook(keep), layer._compiled_call_impl
        layer._compiled_call_impl = None  # what torch.compile has made of it does not know the hook
        try:
            yield captured
        finally:
            hook.remove()
            layer._compiled_call_impl = compiled

    @torch.no_grad()
    def pooled(self, batch: FeedbackBatch, captured: CapturedStates) -> Tensor:
        """Features of each row's prompt: the tokens before the first that carries loss, or all where none does.

        Args:
            batch: The micro-batch that the states are of, on their device.
            captured: What :meth:`captured` gave, after a forward pass.

        Returns:
            Shape ``(B, H)``, float32.
        """
        if captured.states is None:
            raise RuntimeError(f"no forward pass has run decoder layer {self.depth}")
        states, device = captured.states, batch.input_ids_S.device
        padded_length = states.shape[1] if states.ndim == 3 and states.shape[0] > 1 else None
        lengths = torch.tensor(batch.lengths)
        # Made on the host, from what it knows: nothing here waits for a GPU.
        places_L = torch.tensor(_places(batch, padded_length)).to(device, non_blocking=True)
        positions_L = torch.cat([torch.arange(length) for length in batch.lengths]).to(device, non_blocking=True)
        rows_L = torch.arange(len(batch)).repeat_interleave(lengths).to(device, non_blocking=True)
        prompts_B = lengths.to(device, non_blocking=True).scatter_reduce(
            0, batch.rows_N, batch.position_ids_S[batch.predictors_N] + 1, "amin"
        )
        ends_L = prompts_B[rows_L]
        taken_L = positions_L < ends_L if self.pooling == "mean" else positions_L == ends_L - 1
        flat = states.reshape(-1, states.shape[-1])
        chosen_LH = torch.where(taken_L[:, None], flat[places_L].float(), 0)
        sums_BH = chosen_LH.new_zeros(len(batch), flat.shape[1]).index_add_(0, rows_L, chosen_LH)
        return sums_BH / prompts_B[:, None] if self.pooling == "mean" else sums_BH

    @torch.no_grad()
    def features(self, batch: FeedbackBatch, model: Any = None) -> Tensor:
        """Features of each row's prompt, by a forward pass that stops behind the layer if the model is not sharded.

        Args:
            batch: A micro-batch on the model's device, such as :func:`prompt_batches` makes.
            model: Another model than the one given at first, of its architecture.

        Returns:
            Shape ``(B, H)``, float32, on the batch's device.
        """
        causal_lm = self._causal_lm if model is None else causal_lm_of(model)
        cut = contextlib.nullcontext() if is_sharded(causal_lm) else only_layers(causal_lm, slice(self.depth))
        with self.captured(causal_lm) as captured, cut:
            run(causal_lm, partial(predicting_states, batch=batch))
        return self.pooled(batch, captured)


def _places(batch: FeedbackBatch, padded_length: int | None) -> list[int]:
    """Where the tokens of each row are among all states of a layer."""
    if padded_length is None:
        return [place for span in batch.row_spans for place in span.places()]
    return [row * padded_length + place for row, length in enumerate(batch.lengths) for place in range(length)]


def prompt_batches(
    dataset: Dataset, rows: Sequence[int] | np.ndarray[Any, Any], max_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[np.ndarray[Any, Any], FeedbackBatch]]:
    """The prompts of some rows alone, the longest first, in batches.

    Args:
        dataset: Rows with ``input_ids``, ``completion_mask``, ``thumbs_up`` and ``row_id``.
        rows: Which of its rows.
        max_tokens: Of a batch; a longer prompt comes alone.

    Yields:
        Rows of the data set, int64, and their prompts, on the CPU; no token of them carries loss.
    """
    rows = np.asarray(rows, dtype=np.int64)
    lengths = prompt_lengths(dataset.select(rows))
    order = np.argsort(-lengths, kind="stable")
    rows, lengths = rows[order], lengths[order]
    columns = dataset.select_columns(["input_ids", "thumbs_up", "row_id"])
    start = 0
    while start < len(rows):
        tokens = np.cumsum(lengths[start : start + max_tokens])
        stop = start + max(1, int(np.searchsorted(tokens, max_tokens, side="right")))
        found = columns[rows[start:stop]]
        samples = [
            {
                "input_ids": ids[:length],
                "completion_mask": [False] * int(length),
                "thumbs_up": thumb,
                "row_id": row_id,
            }
            for ids, length, thumb, row_id in zip(
                found["input_ids"], lengths[start:stop], found["thumbs_up"], found["row_id"], strict=True
            )
        ]
        # Prompts that begin alike are not shared: what rows are beside would show in the last bits.
        yield rows[start:stop], collate(samples, share_prompts=False)
        start = stop


class SentenceEncoder:
    """A sentence-transformers model; code of its own is never run, and pickled weights are never read.

    Args:
        name: A hub id, a folder, or ``package:NAME/path``; offline, a hub id has to be in the cache.
        device: Where it runs.

    Attributes:
        fingerprint: Digest of its weights, tokenizer, pooling, and the number of tokens that it takes.

    Raises:
        ConfigError: If sentence-transformers or a package is not installed.
        LanguageModelError: If it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device | str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ConfigError(
                f"{_OPTION}.encoder",
                f"expected sentence-transformers to be installed for {name}, found that it is not.",
                "Install it: pip install 'bco-lightning[encoder]'.",
            ) from error
        location = str(Path(resolve_packaged(name)).expanduser()) if _is_path(name) else name
        with _in_words(name):
            _check_parts(name, location)
            self._model: Any = SentenceTransformer(
                location,
                device=str(device),
                trust_remote_code=False,
                model_kwargs={"dtype": torch.float32, "use_safetensors": True, "weights_only": True},
            ).eval()
            self.fingerprint = self._digest()

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Tensor:
        """Features of some texts, cut where they are too long for the model.

        Returns:
            Shape ``(n, H)``, float32, on the CPU.
        """
        found: Tensor = self._model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return found.float().cpu()

    def num_truncated(self, texts: Sequence[str]) -> int:
        """How many texts have more tokens than the model takes, with what it puts around them."""
        prompt = self._model.prompts.get(self._model.default_prompt_name) or ""
        limit = self._model.max_seq_length
        if limit is None or not len(texts):
            return 0
        encoded = self._model.tokenizer(
            [prompt + text for text in texts], truncation=False, padding=False, verbose=False
        )
        return sum(len(ids) > limit for ids in encoded["input_ids"])

    def _digest(self) -> str:
        model = self._model
        config = model[0].config.to_dict()
        return digest_of_values(
            {
                "weights": digest_of_tensors(model.state_dict().items()),
                # Before the first use, which changes how it truncates and pads.
                "tokenizer": digest_of_tokenizer(model.tokenizer),
                "parts": [f"{type(part).__name__} {part.get_config_dict()}" for part in model],
                "config": {name: value for name, value in config.items() if name not in _NO_PART_OF_A_MODEL},
                "max_seq_length": model.max_seq_length,
                "prompt": model.prompts.get(model.default_prompt_name),
            }
        )


def _is_path(name: str) -> bool:
    return name.startswith(("package:", "~")) or Path(name).exists()


def _check_parts(name: str, location: str) -> None:
    """Refuses a model with parts whose code or weights could run code."""
    listed = _file(location, "modules.json")
    if listed is None:
        raise LanguageModelError(
            name,
            "expected a sentence-transformers model, found no modules.json there, or could not reach it.",
            f"Give a hub id, a folder or package:NAME/path in {_OPTION}.encoder.",
        )
    for part in json.loads(Path(listed).read_text(encoding="utf-8")):
        kind, folder = part["type"].rpartition(".")[2], f"{part['path']}/" if part["path"] else ""
        if not part["type"].startswith("sentence_transformers.") or kind not in _KNOWN_PARTS:
            raise LanguageModelError(
                name, f"expected a model made of {', '.join(_KNOWN_PARTS)}, found a part of type {part['type']}."
            )
        if kind == "Transformer" and _file(location, f"{folder}adapter_config.json"):
            raise LanguageModelError(name, "expected a whole model, found an adapter.", "Merge it into its model.")
        config = _file(location, f"{folder}config.json") if kind == "Transformer" else None
        weights = json.loads(Path(config).read_text(encoding="utf-8")).get("transformers_weights") if config else None
        pickled = weights is not None and not str(weights).endswith((".safetensors", ".safetensors.index.json"))
        if pickled or (kind == "Dense" and _file(location, f"{folder}model.safetensors") is None):
            raise LanguageModelError(
                name, "expected weights in .safetensors files, found others, which are never read."
            )


def _file(location: str, path: str) -> str | None:
    found = cached_file(location, path, _raise_exceptions_for_missing_entries=False)
    return str(found) if found else None


@contextmanager
def _in_words(name: str) -> Iterator[None]:
    """Says in one message what a damaged or hostile model leads to."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LanguageModelError(
            name,
            f"expected a sentence-transformers model, but it could not be loaded ({said}).",
            f"Give a hub id, a folder or package:NAME/path in {_OPTION}.encoder.",
        ) from error
