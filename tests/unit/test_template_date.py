"""What day it is to a chat template that asks: an option, and of a run that goes on the day on which it began."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as library

from bco_lightning import FeedbackDataModule
from bco_lightning.data import chat
from bco_lightning.data.options import DataOptions
from bco_lightning.errors import CheckpointError, ConfigError
from bco_lightning.objectives.exported import ALIGNMENT_FILE
from bco_lightning.serving.export import export_checkpoint
from tests.conftest import tiny_data, tiny_module, tiny_trainer, told

# As Llama 3.2 asks.
_SET = """{%- if not date_string is defined %}{%- if strftime_now is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}{%- endif %}
"""
_TURNS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
DATED = f"{_SET}{{{{ 'Today is ' + date_string + '.' }}}}{_TURNS}"
QUESTION = [{"role": "user", "content": "Hi?"}]


def set_clock(monkeypatch: pytest.MonkeyPatch, year: int, month: int, day: int) -> None:
    class Date(date):
        @classmethod
        def today(cls) -> date:
            return date(year, month, day)

    class DateTime(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(year, month, day)

    monkeypatch.setattr(chat, "date", Date)
    monkeypatch.setattr(library, "datetime", DateTime)


@pytest.mark.parametrize(
    "template",
    [
        DATED,
        f"  {DATED}",
        f"\n\n{{{{ strftime_now(format='%A, %-d %B %y, day %j of %Y; 100%% %%d %H:%M%p') }}}}{_TURNS}",
        f"{{% macro inner(how) %}}{{{{ strftime_now(how) | upper }}}}{{% endmacro %}}{{{{ inner('%a %x') }}}}{_TURNS}",
    ],
)  # fmt: skip
def test_a_template_says_on_any_day_what_transformers_says_on_that_day(
    template: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(template, encoding="utf-8")
    set_clock(monkeypatch, 2026, 2, 3)
    expected = tokenizer.apply_chat_template(
        QUESTION, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert told(tokenizer, DataOptions(chat_template=str(file)), QUESTION) == expected
    set_clock(monkeypatch, 2031, 12, 30)
    options = DataOptions(chat_template=str(file), template_date="2026-02-03")
    assert told(tokenizer, options, QUESTION) == expected


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_goes_on_tomorrow_has_the_tokens_of_the_day_on_which_it_began(
    streaming: bool, tiny_model: str, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(DATED, encoding="utf-8")
    seen = []

    def fit(ckpt_path: str | None = None, **options: Any) -> Any:
        module = tiny_module(tiny_model)
        data = tiny_data(log, chat_template=str(file), validation_fraction=0.0, streaming=streaming, **options)
        trainer = tiny_trainer(max_steps=2 if ckpt_path else 1)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        seen.append(module.tokenizer.decode(next(iter(data.train_dataloader())).input_ids_S))
        return trainer

    set_clock(monkeypatch, 2026, 11, 28)
    fit().save_checkpoint(tmp_path / "x.ckpt")
    set_clock(monkeypatch, 2026, 11, 29)
    fit(str(tmp_path / "x.ckpt"))
    assert all("Today is 28 Nov 2026." in text for text in seen)
    if streaming:
        return
    fit()
    assert "Today is 29 Nov 2026." in seen.pop()
    with pytest.raises(CheckpointError, match="template_date: 2026-11-28 then, 2026-11-30 now"):
        fit(str(tmp_path / "x.ckpt"), template_date="2026-11-30")
    export_checkpoint(tmp_path / "x.ckpt", tmp_path / "exported")
    assert '"template_date": "2026-11-28"' in (tmp_path / "exported" / ALIGNMENT_FILE).read_text(encoding="utf-8")


def test_a_template_that_does_not_ask_knows_no_day(tokenizer: Any, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for day in (28, 29):
        set_clock(monkeypatch, 2026, 11, day)
        data = FeedbackDataModule(log, tokenizer=tokenizer)
        data.setup("fit")
        folders.append(data._rows["training"].folder)
        assert "template_date" not in data.fingerprints()
    assert folders[0] == folders[1]


@pytest.mark.parametrize("day", ["2026-2-3", "20260203", "2026-02-30", "today"])
def test_a_day_that_is_none_is_refused(day: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.template_date: expected a day as YYYY-MM-DD"):
        DataOptions(template_date=day)
