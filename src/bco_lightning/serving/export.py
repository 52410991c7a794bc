"""Write a checkpoint as a folder that transformers and peft load."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCardData
from lightning.pytorch.utilities import rank_zero_warn
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bco_lightning.callbacks.loggers import METRICS_FILE
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.checkpoints.manifest import resolve_checkpoint, verify_checkpoint
from bco_lightning.data.images import ImageInputs
from bco_lightning.errors import ConfigError, LanguageModelError, printable
from bco_lightning.inspection.run_record import RunRecord
from bco_lightning.models.adapters import merge_adapter
from bco_lightning.models.gguf import read_gguf
from bco_lightning.models.layout import causal_lm_of, kind_of_model
from bco_lightning.models.load import ModelSource, load_language_model, locate_model
from bco_lightning.models.refusals import in_words
from bco_lightning.module import BCOModule
from bco_lightning.objectives.exported import ALIGNMENT_FILE, write_alignment
from bco_lightning.places import require_free
from bco_lightning.serving.gguf import GgufDtype, modelfile, write_gguf

IMPORTANCE_FILE = "importance.safetensors"
# Root mean squares of differences in log-probs that rounding explains, in nats: three times and more of what was seen.
_ROUNDING = {"float32": 2e-3, "f32": 2e-3, "f16": 0.1, "bfloat16": 0.3, "bf16": 0.3, "q8_0": 0.3}
_TAKEN_BACK = "Nothing is left of it. Try with or without --merge, and please report the kind of adapter."
_CARD = """---
{front}
---

# {name}

{base}, aligned with thumbs-up / thumbs-down feedback by Binary Classifier Optimization and `bco_lightning`.

To load it: {usage}.

| | |
|---|---|
{table}

{outcome}

`{alignment_file}` holds what the objective keeps. Implicit reward of an answer: beta times the difference of its summed
log-probability under this model and under {reference}; probability of thumbs-up: the logistic function of the implicit
reward less the threshold, which under `bco` is the reward shift. To score rows: `python -m bco_lightning predict
--model.name_or_path FOLDER --model.reference_name_or_path REFERENCE --model.beta {beta} --data.predict_files FILE`

## Limits

It was made to please those whose thumbs it was trained on, for prompts like theirs. That measures neither truth nor
safety; other people and other prompts were not asked; what the base model must not be used for, this must not either.

## Citation

```bibtex
@inproceedings{{jung2025binary, title={{Binary Classifier Optimization for Large Language Model Alignment}},
  author={{Jung, Seungjae and Han, Gunsoo and Nam, Daniel Wontae and On, Kyoung-Woon}},
  booktitle={{Proceedings of ACL 2025}}, year={{2025}}, url={{https://arxiv.org/abs/2404.04656}}}}
```
"""
_USAGE = {
    "transformers": "`AutoModelForCausalLM.from_pretrained(FOLDER)` of transformers, or `vllm serve FOLDER`",
    "peft": "`AutoPeftModelForCausalLM.from_pretrained(FOLDER)` of peft; for a GGUF base, `load_language_model` of "
    "`bco_lightning.models.load`; or `vllm serve BASE --enable-lora --lora-modules NAME=FOLDER`, which beyond rank 16 "
    "needs `--max-lora-rank`",
    "gguf": "`llama-server --model FOLDER/{file}`, or `ollama create NAME --file FOLDER/Modelfile`",
}
_SEEING = {
    "transformers": "`AutoModelForImageTextToText.from_pretrained(FOLDER)` of transformers, or `vllm serve FOLDER`",
    "peft": "`PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(BASE), FOLDER)` of peft",
}


def export_checkpoint(
    ckpt_path: str | Path,
    output_dir: str | Path,
    *,
    merge: bool = False,
    gguf: GgufDtype | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    push_to_hub: str | None = None,
    run_folder: str | Path = "runs/bco",
) -> None:
    """Writes model or adapter, tokenizer with chat template, reward shift and model card.

    The folder appears under its name only when it is complete, and transformers or peft, loading it as its users will,
    has given the log-probs of the policy.

    Args:
        ckpt_path: Checkpoint of a :class:`BCOModule`: the folder of a step, or of a run for its newest step; ``last``
            or ``best``, also after the folder of a run, as in ``RUN/best``.
        output_dir: Folder to write.
        merge: Merge the adapter into the weights; full fine-tuning always writes whole weights.
        gguf: Write whole weights, of this data type, as a GGUF file for llama.cpp, with a Modelfile for Ollama: of
            Llama, Qwen2 and Qwen3 with a byte-level tokenizer.
        dtype: Data type of whole weights.
        push_to_hub: Also make a private repository on the hub, ``OWNER/NAME``, and put the folder there, which holds
            no rows. The token is in ``HF_TOKEN``, or kept by ``hf auth login``.
        run_folder: Folder of the runs of which ``last`` or ``best`` alone takes the newest.

    Raises:
        CheckpointError: If it is missing, damaged or no such checkpoint.
        ConfigError: If there is anything under the name ``output_dir``, it cannot be written to, or the hub refuses.
        LanguageModelError: If the adapter cannot be merged or GGUF hold the model, or what was written is not it.
    """
    require_free("--output_dir", output_dir := Path(output_dir))
    module, told = opened(Path(ckpt_path), dtype, Path(run_folder))
    adapted, whole = module.lora is not None, bool(merge or gguf) or module.lora is None
    policy: Any = module.policy
    # An adapter that was trained on belongs to its own base, not to the adapter that came in.
    base = None if whole else policy.peft_config["default"].base_model_name_or_path
    ids_T = torch.randint(len(policy.get_input_embeddings().weight), (32,), generator=torch.Generator().manual_seed(0))
    expected_TV = _log_probs(policy, ids_T)
    with written_whole(output_dir, replaces=False) as folder:
        folder.mkdir()
        if whole and adapted:
            with in_words(module.options.name_or_path, "PEFT adapter that can be merged"):
                policy = merge_adapter(policy)
        file, config = folder / f"{output_dir.name}-{gguf}.gguf", policy.config
        if gguf is not None:
            write_gguf(policy, module.tokenizer, file, gguf)
            text = modelfile(file, module.tokenizer, policy.generation_config)
            (folder / "Modelfile").write_text(text, encoding="utf-8")
        else:
            if (processor := ImageInputs(module.tokenizer).processor) is not None:
                processor.save_pretrained(folder)
            module.tokenizer.save_pretrained(folder)
            own = not whole and getattr(policy.get_base_model(), "has_own_vocabulary", False)
            parts = {} if whole else {"selected_adapters": ["default"], "save_embedding_layers": own}
            policy.save_pretrained(folder, **parts)
        day = {name: day for name, day in told.get("fingerprints", {}).items() if name == "template_date"}
        named = {"objective": module.hparams["objective"], "reference": module.options.reference_name, **day}
        write_alignment(folder, module.objective, beta=module.beta, **named)
        if module.importance is not None:
            module.importance.save(folder / IMPORTANCE_FILE, prompt_features=module.hparams["prompt_features"])
        library = "gguf" if gguf else "peft" if base else "transformers"
        card = _card(module, output_dir.name, file.name, told, base, library)
        (folder / "README.md").write_text(card, encoding="utf-8")
        del module, policy
        gc.collect()  # one model at a time; adapted layers hold themselves
        with in_words(str(output_dir), "model" if whole else "PEFT adapter", _TAKEN_BACK):
            if gguf is None:
                read = _as_users_load(folder, base, getattr(torch, dtype))
            else:  # transformers does not read factors of positions
                read = read_gguf(file, config if config.rope_parameters["rope_type"] != "default" else None)[0]
            found_TV = _log_probs(read, ids_T)
            off, size = torch.stack([found_TV - expected_TV, expected_TV]).square().mean((1, 2)).sqrt().tolist()
        if not off <= _ROUNDING[gguf or dtype] * (1 + size / 10):
            problem = f"expected the log-probs of the policy from what was written, found others by {off:.3g} nats."
            raise LanguageModelError(str(output_dir), problem, _TAKEN_BACK)
    if push_to_hub is not None:
        try:
            HfApi().create_repo(push_to_hub, private=True)
            HfApi().upload_folder(repo_id=push_to_hub, folder_path=output_dir)
        except (OSError, ValueError) as error:
            problem = f"expected that {push_to_hub} can be made on the hub, and filled, found that it cannot ({error})."
            raise ConfigError("--push_to_hub", problem, f"{output_dir} is written: use `hf upload`.") from error


def load_aligned(ckpt_path: str | Path, *, dtype: str | None = None, **given: Any) -> tuple[BCOModule, int]:
    """Builds the module of a checkpoint with its trained weights and reward shift, for use without a trainer.

    Args:
        ckpt_path: Checkpoint of a :class:`BCOModule`: the folder of a step, or of a run for its newest step.
        dtype: Data type of the weights; that of the run if left out.
        given: ``model`` and ``tokenizer``, where a run was given objects that cannot be loaded by their name.

    Returns:
        The module, and the number of optimizer steps it was trained for.

    Raises:
        CheckpointError: If it is missing, damaged or no such checkpoint.
    """
    module, told = opened(Path(ckpt_path), dtype, **given)
    return module, int(told["step"])


def opened(
    ckpt_path: Path, dtype: str | None, runs: Path | None = None, **given: Any
) -> tuple[BCOModule, dict[str, Any]]:
    """The module of a checkpoint, and its manifest, with its place."""
    told = "Taking an earlier step."
    step = resolve_checkpoint(ckpt_path, lambda error: rank_zero_warn(f"{error} {told}"), run_folder=runs)
    # An export has whole weights; how they were trained is in the checkpoint's own settings.
    other = {"quantization": "none", "compile": False, **({"dtype": dtype} if dtype else {}), **given}
    return BCOModule.load_from_checkpoint(step, **other), {**verify_checkpoint(step, share=None), "place": str(step)}


@torch.no_grad()
def _log_probs(model: Any, ids_T: Tensor) -> Tensor:
    """Log-probs ``(T, V)`` of all tokens after each of some, by transformers' own forward pass."""
    return model(input_ids=ids_T[None], use_cache=False).logits[0].float().log_softmax(-1)  # type: ignore[no-any-return]


def _as_users_load(folder: Path, base: str | None, dtype: torch.dtype) -> Any:
    """The exported model, as its card says."""
    if base is not None and locate_model(base) != ModelSource(base):  # converted first, which peft cannot
        return load_language_model(str(folder), dtype)
    kind: Any = kind_of_model(AutoConfig.from_pretrained(base or folder, trust_remote_code=False))
    if base is not None and kind is not AutoModelForCausalLM:  # of which peft has no class of its own
        return PeftModel.from_pretrained(kind.from_pretrained(base, dtype=dtype), folder)
    kind = kind if base is None else AutoPeftModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype)  # what peft does not know it warns of


def _card(module: BCOModule, name: str, file: str, told: dict[str, Any], base: str | None, library: str) -> str:
    """What the folder's README says; of the run, whose folder may be gone, what it knew at the exported step."""
    options, named, steps = module.options, base or module.options.name_or_path, told["step"]
    run = Path(told["place"]).parent.parent
    record = RunRecord.read(run) if (run / METRICS_FILE).is_file() else RunRecord(run, {})
    table = {
        "objective": options.objective,
        "beta": options.beta,
        "threshold, nats": f"{module.objective.threshold:.6f}",
        "learning rate": options.learning_rate,
        "trained": f"LoRA, rank {module.policy.peft_config['default'].r}" if module.lora else "all weights",
        "optimizer steps": steps,
    }
    for rows, sources in record.provenance.get("feedback", {}).items():
        for name_of in sorted({Path(source).name for source in sources}):  # of several files, perhaps
            up, down = np.sum([told for source, told in sources.items() if Path(source).name == name_of], axis=0)
            table[f"{rows} rows of {name_of}"] = f"{up:,} thumbs up, {down:,} down"
    for metric, points in record.curves.items():  # also if the run went on
        if metric.startswith("val/") and (then := [value for step, value in points if step <= steps]):
            table[metric.replace("val/", "held-out ")] = f"{then[-1]:.4g}"
    sees = kind_of_model(causal_lm_of(module.policy).config) is not AutoModelForCausalLM
    known = record.held_out is not None and record.held_out.step == steps
    on_hub: dict[str, Any] = {} if Path(named).exists() or named.count("/") != 1 else {"base_model": named}
    return _CARD.format(
        front=ModelCardData(library_name=library, tags=["alignment", "bco", "binary-feedback"], **on_hub).to_yaml(),
        name=_plain(name),
        base=_plain(named),
        usage=(_SEEING if sees else _USAGE)[library].format(file=file),
        table="\n".join(f"| {_plain(key)} | {_plain(value)} |" for key, value in table.items()),
        outcome=record.outcome.text if known else "",
        beta=options.beta,
        alignment_file=ALIGNMENT_FILE,
        reference=_plain(options.reference_name),
    )


def _plain(text: Any) -> str:
    """A text of anybody's, for one line of Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|&~])", r"\\\1", " ".join(printable(str(text)).split()))
