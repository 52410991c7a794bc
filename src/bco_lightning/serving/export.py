"""Write a checkpoint as a folder that transformers and peft load."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bco_lightning.checkpoints import resolve_checkpoint, verify_checkpoint
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.data.images import ImageInputs
from bco_lightning.errors import LanguageModelError
from bco_lightning.models.adapters import merge_adapter
from bco_lightning.models.layout import causal_lm_of, kind_of_model
from bco_lightning.models.load import ModelSource, load_language_model, locate_model
from bco_lightning.models.refusals import in_words
from bco_lightning.module import BCOModule
from bco_lightning.objectives.exported import ALIGNMENT_FILE, write_alignment
from bco_lightning.places import require_free

IMPORTANCE_FILE = "importance.safetensors"
# Root mean squares of differences in log-probs that rounding explains, in nats: three times and more of what was seen.
_ROUNDING = {"float32": 2e-3, "bfloat16": 0.3}
_TAKEN_BACK = "Nothing is left of it. Try with or without --merge, and please report the kind of adapter."
_CARD = """---
library_name: {library}
base_model: {base}
tags: [alignment, bco, binary-feedback]
---

# {name}

{base}, aligned with thumbs-up / thumbs-down feedback by Binary Classifier Optimization
([arXiv:2404.04656](https://arxiv.org/abs/2404.04656)) and `bco_lightning`.

```python
{usage}
```

| | |
|---|---|
| objective | {options.objective} |
| beta | {options.beta} |
| threshold, nats | {threshold:.6f} |
| learning rate | {options.learning_rate} |
| trained | {trained} |
| optimizer steps | {steps} |

`{alignment_file}` holds what the objective keeps. Implicit reward of an answer: beta times the difference of its summed
log-probability under this model and under {reference}; probability of thumbs-up: the logistic function of the implicit
reward less the threshold, which under `bco` is the reward shift. To score rows with it:

```
python -m bco_lightning predict --model.name_or_path FOLDER --model.reference_name_or_path {reference} \\
    --model.beta {options.beta} --data.predict_files FILE
```
"""
_MERGED_USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""
_ADAPTER_USAGE = """# For a GGUF base: load_language_model of bco_lightning.models.load.
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")"""
_SEEING_USAGE = """from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("BASE"), "FOLDER")"""


def export_checkpoint(
    ckpt_path: Path,
    output_dir: Path,
    *,
    merge: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    run_folder: Path = Path("runs/bco"),
) -> None:
    """Writes model or adapter, tokenizer with chat template, reward shift and model card.

    The folder appears under its name only when it is complete, and transformers or peft, loading it as its users will,
    has given the log-probs of the policy.

    Args:
        ckpt_path: Checkpoint of a :class:`BCOModule`: the folder of a step, or of a run for its newest step; ``last``
            or ``best``, also after the folder of a run, as in ``RUN/best``.
        output_dir: Folder to write.
        merge: Merge the adapter into the weights; full fine-tuning always writes whole weights.
        dtype: Data type of whole weights.
        run_folder: Folder of the runs of which ``last`` or ``best`` alone takes the newest.

    Raises:
        CheckpointError: If it is missing, damaged or no such checkpoint.
        ConfigError: If there is anything under the name ``output_dir``, or it cannot be written to.
        LanguageModelError: If the adapter cannot be merged, or if what was written is not the policy.
    """
    require_free("--output_dir", output_dir)
    module, told = opened(ckpt_path, dtype, run_folder)
    chat_template = told.get("fingerprints", {}).get("chat_template")
    adapted, whole = module.lora is not None, merge or module.lora is None
    policy: Any = module.policy
    # An adapter that was trained on belongs to its own base, not to the adapter that came in.
    base = None if whole else policy.peft_config["default"].base_model_name_or_path
    ids_T = torch.randint(len(policy.get_input_embeddings().weight), (32,), generator=torch.Generator().manual_seed(0))
    expected_TV = _log_probs(policy, ids_T)
    with written_whole(output_dir, replaces=False) as folder:
        folder.mkdir()
        if not whole:
            ends = getattr(policy.get_base_model(), "has_own_vocabulary", False)
            policy.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=ends)
        elif adapted:
            with in_words(module.options.name_or_path, "PEFT adapter that can be merged"):
                merge_adapter(policy).save_pretrained(folder)
        else:
            policy.save_pretrained(folder)
        if chat_template is not None:
            module.tokenizer.chat_template = chat_template
        if (processor := ImageInputs(module.tokenizer).processor) is not None:
            processor.save_pretrained(folder)
        module.tokenizer.save_pretrained(folder)
        day = {name: day for name, day in told.get("fingerprints", {}).items() if name == "template_date"}
        named = {"objective": module.hparams["objective"], "reference": _reference_name(module), **day}
        write_alignment(folder, module.objective, beta=module.beta, **named)
        if module.importance is not None:
            module.importance.save(folder / IMPORTANCE_FILE, prompt_features=module.hparams["prompt_features"])
        card = _card(module, output_dir.name, told["step"], base)
        (folder / "README.md").write_text(card, encoding="utf-8")
        del module, policy
        gc.collect()  # one model at a time; adapted layers hold themselves
        with in_words(str(output_dir), "model" if whole else "PEFT adapter", _TAKEN_BACK):
            found_TV = _log_probs(_as_users_load(folder, base, getattr(torch, dtype)), ids_T)
            off, size = torch.stack([found_TV - expected_TV, expected_TV]).square().mean((1, 2)).sqrt().tolist()
        if not off <= _ROUNDING[dtype] * (1 + size / 10):
            problem = f"expected the log-probs of the policy from what was written, found others by {off:.3g} nats."
            raise LanguageModelError(str(output_dir), problem, _TAKEN_BACK)


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


def _card(module: BCOModule, name: str, steps: int, base: str | None) -> str:
    usage, kind = _ADAPTER_USAGE if base else _MERGED_USAGE, kind_of_model(causal_lm_of(module.policy).config)
    if kind is not AutoModelForCausalLM:
        usage = usage.replace("ForCausalLM", "ForImageTextToText").replace("AutoTokenizer", "AutoProcessor")
        usage = _SEEING_USAGE.replace("BASE", base) if base else usage
    return _CARD.format(
        library="peft" if base else "transformers",
        base=base or module.options.name_or_path,
        name=name,
        usage=usage,
        options=module.options,
        threshold=module.objective.threshold,
        trained=f"LoRA, rank {module.policy.peft_config['default'].r}" if module.lora else "all weights",
        steps=steps,
        alignment_file=ALIGNMENT_FILE,
        reference=_reference_name(module),
    )


def _reference_name(module: BCOModule) -> str:
    return module.options.reference_name_or_path or module.options.name_or_path
