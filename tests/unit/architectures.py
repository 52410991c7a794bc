"""Small random models of every decoder-only architecture, and what each row's log-prob and gradient should be.

The oracle is transformers' own forward, and peft's around it, in float64: one row at a time, whole logits.

    python -m tests.unit.architectures            # writes docs/architectures.md
    python -m tests.unit.architectures llama opt  # prints the rows of these
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collate import collate
from bco_lightning.errors import UserError
from bco_lightning.models.experts import Routing, experts_per_token, routers_of
from bco_lightning.models.layout import find_trunk
from bco_lightning.models.load import load_policy
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.models.prepare import prepare
from bco_lightning.options import LoraSettings

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LORA = LoraSettings(r=2, alpha=4)
BALANCE = 3.0  # coefficient of the load-balancing loss


def of_layers(*kinds: str) -> dict[str, Any]:
    return {"layer_types": [f"{kind}_attention" for kind in kinds]}


def experts(name: str = "num_experts", each: str = "num_experts_per_tok", width: str = "") -> dict[str, Any]:
    return {name: 4, each: 2, **({width: 24} if width else {})}


WINDOW = {"sliding_window": 8}
ALTERNATING = {**WINDOW, **of_layers("sliding", "full", "sliding")}
LOCAL = experts("num_local_experts")
WIDE = experts(width="moe_intermediate_size")
ROUTED = {
    **experts("n_routed_experts", width="moe_intermediate_size"),
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip
INDEXED = {"index_topk": 24, "index_n_heads": 2, "index_head_dim": 8}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    **of_layers("linear", "full", "linear"),
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4}
BLOCKS = {"index_topk_blocks": 2, "index_block_size": 8, "index_n_heads": 2, "index_head_dim": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    # plain attention
    **{
        name: {}
        for name in (
            "llama", "qwen3", "gemma", "phi", "ministral3", "gpt2", "gpt_neox", "gpt_bigcode", "olmo", "olmo2",
            "nemotron", "stablelm", "glm", "glm4", "ernie4_5", "hunyuan_v1_dense", "seed_oss", "apertus", "arcee",
            "helium", "persimmon", "biogpt", "diffllama", "bitnet", "nanochat", "jais2", "hyperclovax", "beam",
            "lfm3", "gpt_neox_japanese", "iquestcoder", "hrm_text", "olmo_hybrid", "internlm3", "cohere2_moe", "zaya",
        )
    },
    "cpmant": {"dim_head": 8, "dim_ff": 48},
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "openai-gpt": {**GPT, "n_positions": 256},
    "ctrl": {**GPT, "n_positions": 256, "dff": 48},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
    "bloom": {"n_layer": 3, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "falcon (ALiBi)": {"new_decoder_architecture": False, "multi_query": False, "alibi": True},
    "falcon (new)": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.3},
    "minicpm3": LATENT,
    "youtu": LATENT,
    # sliding windows and chunks
    "qwen2": {"use_sliding_window": True, **WINDOW, "max_window_layers": 1},
    "mistral": WINDOW,
    "ministral": WINDOW,
    "phi3": WINDOW,
    "starcoder2": WINDOW,
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**ALTERNATING, "query_pre_attn_scalar": 8},
    "gemma3n_text": {
        **WINDOW, **of_layers("sliding", "full", "full"), "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 1, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        **WINDOW, **of_layers("sliding", "full", "full"), "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1,
        "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 8,
    },
    "vaultgemma": {**WINDOW, "query_pre_attn_scalar": 8},
    "gpt_neo": {
        "num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]], "window_size": 8
    },
    "olmo3": ALTERNATING,
    "cohere2": {**ALTERNATING, "logit_scale": 0.3},
    "exaone4": ALTERNATING,
    "cwm": ALTERNATING,
    "smollm3": {**ALTERNATING, "use_sliding_window": True, "no_rope_layers": [1, 0, 1]},
    "granite_swa": WINDOW,
    "modernbert-decoder": {**WINDOW, "local_attention": 8},
    "inkling2_text": {"sliding_window_size": 8},
    "gemma4_unified_text": {
        **WINDOW, **of_layers("sliding", "full", "full"), "num_kv_shared_layers": 1, "global_head_dim": 8,
    },
    "cohere_compass_text": {
        **ALTERNATING, "logit_scale": 0.3,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    # mixtures of experts
    "mixtral": {**LOCAL, **WINDOW},
    "phimoe": {**LOCAL, **WINDOW},
    "jetmoe": {**LOCAL, "kv_channels": 8},
    "granitemoe": {**LOCAL, "logits_scaling": 2.0},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 24},
    "granitemoe_swa": {**LOCAL, **WINDOW},
    "gpt_oss": {**LOCAL, **ALTERNATING},
    "minimax_m2": LOCAL,
    "olmoe": experts(),
    "flex_olmo": experts(),
    "doge": {"num_experts": 4},
    "qwen2_moe": {**WIDE, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": {**WIDE, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "hy_v3": WIDE,
    "afmoe": WIDE,
    "exaone_moe": WIDE,
    "flint": WIDE,
    "laguna": WIDE,
    "mellum": WIDE,
    "bailing_hybrid": {**ROUTED, **LATENT, "num_local_experts": 4},
    "gemma4_text (experts)": {
        **WINDOW, **of_layers("sliding", "full", "full"), "hidden_size_per_layer_input": 8, "enable_moe_block": True,
        "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 8, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "doge (experts)": {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 2},
    "kolibri1": ROUTED,
    "qwen4_exp_text": WIDE,
    "hunyuan_v1_moe": experts(each="moe_topk"),
    "aria_text": experts("moe_num_experts", "moe_topk"),
    "ernie4_5_moe": {**experts("moe_num_experts", "moe_k", "moe_intermediate_size"), "moe_layer_start_index": 1},
    "glm4_moe": ROUTED,
    "solar_open": ROUTED,
    "dots1": {**ROUTED, **ALTERNATING},
    "mimo_v2_flash": {**ROUTED, **WINDOW},
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16, "no_rope_layers": [1, 1, 0], **of_layers("chunked", "chunked", "full"),
    },
    "deepseek_v2": {**ROUTED, **LATENT},
    "deepseek_v3": {**ROUTED, **LATENT, "n_group": 2},
    "axk1": {**ROUTED, **LATENT},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "inkling_text": {
        **ROUTED, "sliding_window_size": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "d_rel": 4, "rel_extent": 64, "n_shared_experts": 2, "logits_mup_width_multiplier": 2.0,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "glm4_moe_lite": {**ROUTED, **LATENT},
    "longcat_flash": {
        **LATENT, "n_routed_experts": 4, "moe_topk": 2, "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48,
        "num_layers": 2, "zero_expert_num": 1,
    },
    # attention to some of the tokens before
    "deepseek_v32": {**ROUTED, **LATENT, **INDEXED},
    "glm_moe_dsa": {**ROUTED, **LATENT, **INDEXED},
    "axk2": {**ROUTED, **LATENT, **INDEXED},
    "dots3_note_text": {**ROUTED, **LATENT, **INDEXED, "head_dim": 8, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "hy_v4": {**WIDE, **LATENT, **INDEXED},
    "deepseek_v4": {
        **experts("n_routed_experts", width="moe_intermediate_size"), "n_shared_experts": 1, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, **INDEXED, "index_topk": 4, "o_groups": 2, "o_lora_rank": 8, "swiglu_limit": 1.0,
        **WINDOW,
    },
    "minimax_m3_vl_text": {**LOCAL, **BLOCKS, "layer_types": ["full_attention", *2 * ["minimax_m3_sparse"]]},
    # recurrent layers
    "qwen3_next": {**WIDE, **DELTA, "shared_expert_intermediate_size": 24},
    "qwen3_5_text": DELTA,
    "minimax": {**LOCAL, **of_layers("linear", "full", "linear"), "block_size": 16},
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 16},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "bamba": {**MAMBA, "mamba_expand": 2, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **LOCAL, **MAMBA, "shared_intermediate_size": 24, "mamba_expand": 2, "logits_scaling": 2.0,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "jamba": {
        **experts(), "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 3, "attn_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "zamba2": {
        "n_mamba_heads": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_ngroups": 1, "mamba_headdim": 8,
        "layers_block_type": ["mamba", "hybrid", "mamba"], "chunk_size": 16, "num_mem_blocks": 1, "adapter_rank": 4,
        "hybrid_layer_ids": [1], "attention_head_dim": 16,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M*-", "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8,
        "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16,
    },
    "nemotron_h (experts)": {
        **ROUTED, "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16, "moe_shared_expert_intermediate_size": 24,
    },
    "zamba": {
        "mamba_d_state": 8, "mamba_expand": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False, "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "hybrid"], "attention_head_dim": 16, "n_mamba_heads": 2,
    },
    "kimi_linear": {
        **ROUTED, **LATENT, "num_local_experts": 4, **of_layers("linear", "full", "linear"),
        "linear_head_dim": 8, "linear_num_heads": 4, "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "qwen3_5_moe_text": {**WIDE, **DELTA, "shared_expert_intermediate_size": 24},
    "recurrent_gemma": {
        "attention_window_size": 8, "lru_width": 32, "block_types": ["recurrent", "attention", "recurrent"]
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "xlstm": {"num_blocks": 3},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**WIDE, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    # frequencies that follow the longest row, beyond the model's own length, and dropout that a config asks for
    "phi3 (longrope)": {
        "original_max_position_embeddings": 16, "partial_rotary_factor": 1.0,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 16,
        },
    },
    "llama (dynamic)": {
        "max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    },
    "opt (dropout)": {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.5, "layerdrop": 0.5},
}  # fmt: skip
MODES = {
    "full": {},
    "full, padded": {"layout": "padded"},
    "full, recomputed": {"recomputed": True},
    "LoRA": {"lora": LORA},
    "LoRA, recomputed": {"lora": LORA, "recomputed": True},
    "LoRA, top layer": {"lora": LoraSettings(r=2, alpha=4, top_layers=1)},
}


def config_of(family: str) -> Any:
    """The config of a family, without those settings that it does not know."""
    settings, kind = {**COMMON, **FAMILIES[family]}, CONFIG_MAPPING[family.split(" ")[0]]
    while True:
        try:
            return kind(**settings)
        except (TypeError, AttributeError) as error:
            unknown = re.search(r"'(\w+)'", str(error))
            if unknown is None or unknown[1] not in settings:
                raise
            del settings[unknown[1]]


def save_model(family: str, folder: Path) -> None:
    """A model whose weights are large enough for what is left out to show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or any(part in name for part in ("A_log", "conv1d", "time_")):
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif parameter.is_floating_point():
                ends = any(part in name for part in ("embed", "wte", "lm_head"))
                parameter.copy_(torch.randn_like(parameter) * (0.5 if ends else 0.8 * parameter.shape[-1] ** -0.5))
    model.save_pretrained(folder)


def rows() -> list[dict[str, Any]]:
    """Short and long ones; two of them have the same prompt."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, (prompt, completion) in enumerate([(3, 9), (12, 41), (1, 20), (7, 7), (12, 5)]):
        ids = torch.randint(3, VOCABULARY, (prompt + completion,), generator=generator).tolist()
        if prompt == 12 and number > 1:
            ids[:prompt] = found[1]["input_ids"][:prompt]
        mask = [False] * prompt + [True] * completion
        found.append({"input_ids": ids, "completion_mask": mask, "thumbs_up": True, "row_id": number, "source": 0})
    return found


@dataclass(frozen=True)
class Outcome:
    """What was found of a family in one mode: differences from the oracle, and how rows were laid out, or why not."""

    words: str
    refused: bool = False
    log_probs: float = 0.0
    gradients: float = 0.0
    balance: float = 0.0
    experts: str = ""  # whether their routers are watched

    @property
    def right(self) -> bool:
        return self.refused or max(self.log_probs, self.gradients, self.balance) < 5e-3


def outcome(family: str, mode: str, folder: Path) -> Outcome:
    """What the package makes of a family, against float64; what is no refusal in words is raised."""
    torch.manual_seed(1)
    batch, options = collate(rows()), dict(MODES[mode])
    lora = options.pop("lora", None)
    try:
        policy: Any = load_policy(str(folder), torch.float32, lora, 0)
        words = prepare(policy, rows=rows(), longest=max(batch.lengths), **options).words
    except UserError as error:
        return Outcome(str(error), refused=True)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    trained = {name: each for name, each in policy.named_parameters() if each.requires_grad}
    trunk = find_trunk(policy)
    routing = Routing(policy, BALANCE if routers_of(policy) else 0.0)
    with routing.watched(batch):
        states_SH = trunk.states(batch) if trunk else None
        with trunk.left_out() if trunk else nullcontext():
            found_B = completion_log_probs(policy, batch, states_SH)
    router_losses_B = routing.losses_B
    weights_B = torch.linspace(-1, 2, len(batch))
    routing.add_to((found_B * weights_B).sum()).backward()
    try:
        oracle = oracle_of(policy, folder, torch.float64)
        expected_B, balance_B = alone(oracle, batch, router_losses_B is not None)
    except RuntimeError:  # some have a number or a buffer that is float32 whatever the weights are
        oracle = oracle_of(policy, folder, torch.float32)
        expected_B, balance_B = alone(oracle, batch, router_losses_B is not None)
    ((expected_B * weights_B.double()).sum() + BALANCE * balance_B.mean()).backward()
    right = dict(oracle.named_parameters())
    pairs = [(each.grad, right[name].grad) for name, each in trained.items()]
    total = sum(float(each.grad.square().sum()) for each in right.values() if each.grad is not None)
    wrong = sum(float(((0 if f is None else f.double()) - (0 if r is None else r)).square().sum()) for f, r in pairs
                if f is not None or r is not None)  # fmt: skip
    missed = sum(float(each.grad.square().sum()) for name, each in right.items()
                 if name not in trained and each.grad is not None)  # fmt: skip
    return Outcome(
        words,
        log_probs=float((found_B.double() - expected_B).abs().max().detach()),
        gradients=((wrong + missed) / total) ** 0.5,
        balance=0.0 if router_losses_B is None else float((router_losses_B.double() - balance_B).abs().max().detach()),
        experts="" if router_losses_B is None else "yes",
    )


def oracle_of(policy: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The same weights, in float64 where that can be, with transformers' and peft's own classes and nothing of ours."""
    own_experts: Any = {"experts_implementation": "eager"}  # transformers' other kernels take no float64
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **own_experts)
    if hasattr(policy, "peft_config"):
        model = get_peft_model(model, copy.deepcopy(policy.peft_config["default"]))
        adapters = {name: each for name, each in policy.state_dict().items() if "lora_" in name}
        assert not model.load_state_dict(adapters, strict=False).unexpected_keys
    return model.to(dtype).eval()


def alone(model: Any, batch: FeedbackBatch, routed: bool) -> tuple[Tensor, Tensor]:
    """Log-probs of completions, one row at a time; and the load-balancing loss of each row, a mean over layers."""
    found, balance, sent = [], [], []
    options = {"output_router_logits": True} if routed else {}
    for part in model.modules():  # what experts are told, which is not what is likeliest where offsets are added
        if type(part).__name__.endswith("Experts"):
            part.register_forward_pre_hook(lambda _m, told: sent.append(told[1]) if len(told) == 3 else None)
    for row, span in enumerate(batch.row_spans):
        sent.clear()
        ids = batch.input_ids_S[span.places()]
        scored = batch.position_ids_S[batch.predictors_N[batch.rows_N == row]]
        given = model(input_ids=ids[None], use_cache=False, **options)
        logits = given.logits[0, scored]
        found.append(logits.double().log_softmax(-1).gather(-1, ids[scored + 1, None]).sum())
        layers = list({id(each): each for each in given.router_logits}.values()) if routed else []
        losses = []
        for number, logits_tE in enumerate(layers):
            each = experts_per_token(model.config.get_text_config(), 1)
            chosen_tK = sent[number] if len(sent) == len(layers) else logits_tE.topk(each).indices
            share_E = nn.functional.one_hot(chosen_tK, logits_tE.shape[1]).sum(1).double().mean(0)
            losses.append(len(share_E) * (share_E * logits_tE.double().softmax(-1).mean(0)).sum())
        balance.append(torch.stack(losses).mean() if losses else found[-1].new_zeros(()))
    return torch.stack(found), torch.stack(balance)


def outcomes(family: str, modes: Iterator[str] | tuple[str, ...] = tuple(MODES)) -> dict[str, Outcome]:
    """Those of a family in each mode."""
    with tempfile.TemporaryDirectory() as name:
        save_model(family, Path(name))
        return {mode: outcome(family, mode, Path(name)) for mode in modes}


def said(found: Outcome) -> str:
    """A cell of the table: how rows are laid out, or why the run is refused."""
    words = re.sub(r"/\S+: ", "", found.words.split("; ")[0].replace("\n", " "))
    return (f"refused: {words[:160]}" if found.refused else words).replace("|", "/")


def table_row(family: str) -> str:
    """A row of the table in the documentation."""
    found = outcomes(family)
    assert not (wrong := {mode: each for mode, each in found.items() if not each.right}), wrong
    top, recomputed = (any(not found[mode].refused for mode in MODES if part in mode) for part in ("top", "recomputed"))
    return (
        f"| {family} | {said(found['full'])} | {said(found['LoRA'])} | {'yes' if top else 'refused'} | "
        f"{'yes' if recomputed else 'refused'} | {found['full'].experts} |"
    )


def main() -> None:
    """Prints rows of the table, or writes all of it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = sys.argv[1:]
    lines = []
    for family in names or FAMILIES:
        try:
            lines.append(table_row(family))
        except Exception as error:
            lines.append(f"| {family} | FAULT {type(error).__name__} {str(error)[:600]} |")
        print(lines[-1], flush=True)
    if not names and not any("FAULT" in line for line in lines):
        head = TABLE.read_text(encoding="utf-8").partition("| model type |")[0]
        columns = (
            "model type",
            "full fine-tuning",
            "LoRA, all linear layers",
            "top layer alone",
            "recomputed",
            "experts balanced",
        )
        parts = [head + "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *lines]
        TABLE.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
