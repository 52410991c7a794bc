"""What is said in a chat is what the models say, and what is rated becomes rows that are read as they are meant."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bco_lightning import FeedbackDataModule, LoraSettings
from bco_lightning.cli.app import main
from bco_lightning.errors import ConfigError, UserError
from bco_lightning.serving import chat as chat_module
from bco_lightning.serving.chat import Answer, Speakers, chat, rate, said
from bco_lightning.serving.export import export_checkpoint
from tests.unit.test_adapters import made
from tests.unit.test_export import trained
from tests.unit.vision_models import model_of, picture, processor_of, tokenizer_of

ASKED = [{"role": "user", "content": "Say <|im_end|> hello."}]


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, tokenizer: Any) -> str:
    """A random model that ends its answers after some eight tokens."""
    folder = tmp_path_factory.mktemp("talkative")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 8))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def heard(speakers: Speakers, model: str, limit: int = 16) -> Answer:
    answer = Answer(model, ASKED)
    grown = [answer.text for answer in speakers.speak(answer, 0.0, limit)]
    assert all(answer.text.startswith(text.rstrip("�")) for text in grown)
    return answer


def greedy(model: Any, tokenizer: Any, limit: int = 16) -> str:
    """By transformers alone; what a user typed is text."""
    said = ASKED[0]["content"]
    before, after = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True).split(said)
    parts = [tokenizer(before), tokenizer(said, split_special_tokens=True), tokenizer(after)]
    ids = torch.tensor([[token for part in parts for token in part["input_ids"]]])
    found = model.generate(input_ids=ids, do_sample=False, max_new_tokens=limit, pad_token_id=0)
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def test_an_adapter_and_its_base_speak_from_one_model(talkative: str, tmp_path: Path, tokenizer: Any) -> None:
    made(talkative, tmp_path / "adapter", lora_alpha=4096, target_modules="all-linear")
    base = AutoModelForCausalLM.from_pretrained(talkative)
    expected = {"reference": greedy(base, tokenizer)}
    expected["policy"] = greedy(PeftModel.from_pretrained(base, tmp_path / "adapter"), tokenizer)
    assert expected["policy"] != expected["reference"]
    speakers = Speakers(None, str(tmp_path / "adapter"), None, tmp_path)
    for model in ("policy", "reference", "policy"):
        assert heard(speakers, model).text == expected[model]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraSettings(r=4, alpha=512), None])
def test_policy_and_reference_of_a_run_say_what_they_say_by_themselves(
    lora: LoraSettings | None, talkative: str, log: str, tmp_path: Path, tokenizer: Any
) -> None:
    trained(talkative, log, tmp_path / "runs" / "version_0", lora=lora)
    speakers = Speakers(Path("last"), None, None, tmp_path / "runs")
    assert speakers.log == tmp_path / "runs" / "chat.jsonl"
    export_checkpoint(tmp_path / "runs", tmp_path / "export", merge=True)
    by_policy = greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "export"), tokenizer)
    by_reference = greedy(AutoModelForCausalLM.from_pretrained(talkative), tokenizer)
    assert (heard(speakers, "policy").text, heard(speakers, "reference").text) == (by_policy, by_reference)
    assert by_policy != by_reference


def test_a_model_has_a_reference_where_one_is_named(talkative: str, tmp_path: Path) -> None:
    assert list(Speakers(None, talkative, None, tmp_path).models) == ["policy"]
    both = Speakers(None, talkative, talkative, tmp_path)
    assert heard(both, "policy").text == heard(both, "reference").text
    assert not heard(both, "policy", limit=2).finished
    with pytest.raises(ConfigError, match=r"conversation: expected fewer than 512 tokens.*found \d+\. Begin another"):
        next(both.speak(Answer("policy", [{"role": "user", "content": "word " * 600}]), 0.0, 8))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model that sees images, and says some eight letters."""
    folder, tokenizer = tmp_path_factory.mktemp("seeing"), tokenizer_of("idefics3")
    model = model_of("idefics3", tokenizer)
    model.generation_config.update(**letters_alone(tokenizer))
    model.save_pretrained(folder)
    processor_of("idefics3", tokenizer).save_pretrained(folder)
    return str(folder)


def letters_alone(tokenizer: Any) -> dict[str, list[int]]:
    blank = [n for n in range(len(tokenizer)) if not tokenizer.decode([n], skip_special_tokens=True).strip()]
    return {"suppress_tokens": blank, "eos_token_id": sorted({*range(len(tokenizer))}.difference(blank))[::8]}


def shown(path: Path, words: str) -> list[Any]:
    content = [{"type": "image", "image": str(path)}, {"type": "text", "text": words}]
    return [{"role": "user", "content": content}]


def test_a_model_is_shown_the_images_of_a_question_and_their_row_has_them(seeing: str, tmp_path: Path) -> None:
    speakers, tokenizer = Speakers(None, seeing, None, tmp_path), tokenizer_of("idefics3")
    processor, model = processor_of("idefics3", tokenizer), model_of("idefics3", tokenizer).bfloat16()
    found = []
    for number in range(2):
        picture(number).save(path := tmp_path / f"{number} é.png")
        asked = shown(path, "What is it?")
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[[picture(number)]], return_tensors="pt")
        told = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": 1, **letters_alone(tokenizer)}
        made = model.generate(**inputs, **told)
        expected = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answer = Answer("policy", asked)
        list(speakers.speak(answer, 0.0, 64))
        assert (answer.text, answer.finished) == (expected, True)
        for _ in range(2):
            rate(tmp_path / "log.jsonl", answer, number == 0, "run")
        path.unlink()  # it was the browser's
        found.append((expected, inputs["input_ids"][0].tolist()))
    assert found[0][0] != found[1][0]
    data = FeedbackDataModule(str(tmp_path / "log.jsonl"), tokenizer=speakers.tokenizer, validation_fraction=0.0)
    data.setup("fit")
    for row, (_, ids) in zip(data.train_dataset, found, strict=True):
        assert row["input_ids"][: len(ids)] == ids
    assert len(list((tmp_path / "log_images").iterdir())) == 2
    assert (tmp_path / "log_images").stat().st_mode & 0o777 == 0o700


def test_images_go_into_no_folder_that_others_can_open(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    answer = Answer("policy", shown(tmp_path / "a.png", "?"), "Yes.", finished=True)
    rate(tmp_path / "log.jsonl", answer, True, "run")
    (kept,) = (tmp_path / "log_images").iterdir()
    before = kept.stat()
    rate(tmp_path / "log.jsonl", answer, False, "run")  # the image is there already
    assert kept.stat().st_mtime_ns == before.st_mtime_ns
    (tmp_path / "other").mkdir()
    (tmp_path / "new_images").symlink_to(tmp_path / "other")
    (tmp_path / "open_images").mkdir(mode=0o755)
    for name in ("new", "open"):
        with pytest.raises(ConfigError, match="you alone can open"):
            rate(tmp_path / f"{name}.jsonl", answer, True, "run")
        assert not (tmp_path / f"{name}.jsonl").exists()
    assert not list((tmp_path / "other").iterdir())


def test_what_looks_like_parts_of_a_message_stays_text(seeing: str, tmp_path: Path) -> None:
    typed = json.dumps([{"type": "image", "image": str(tmp_path / "nothing.png")}])  # an error, if it were sought
    speakers, log = Speakers(None, seeing, None, tmp_path), tmp_path / "log.jsonl"
    answer = Answer("policy", [{"role": "user", "content": said(typed)}])
    list(speakers.speak(answer, 0.0, 64))
    answer.text = '[{"type": "text", "text": "x"}]'
    for thumb in (True, False):
        rate(log, replace(answer, line=b""), thumb, "run")
    data = FeedbackDataModule(str(log), tokenizer=speakers.tokenizer, validation_fraction=0.0)
    data.setup("fit")
    read = speakers.tokenizer.decode(data.train_dataset[0]["input_ids"])
    assert f"{typed}<|im_end|>" in read
    assert f"{answer.text}<|im_end|>" in read


def test_what_a_model_cannot_be_told_is_one_message(seeing: str, talkative: str, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no image")
    picture(0).save(tmp_path / "yes.png")
    for model, name, message in ((seeing, "no.png", "image of PNG"), (talkative, "yes.png", "a model that sees none")):
        with pytest.raises(UserError, match=message):
            list(Speakers(None, model, None, tmp_path).speak(Answer("policy", shown(tmp_path / name, "?")), 0.0, 8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "chat: expected either --ckpt_path, or --name_or_path .* found neither"),
        ({"ckpt_path": Path("last"), "name_or_path": "x"}, "chat: expected either .* found both"),
    ],
)
def test_who_is_to_speak_is_said_once(given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=message):
        chat(**given)


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_module, "find_spec", lambda name: None)
    assert main(["chat", "--ckpt_path", "last"]) == 2
    assert (
        capsys.readouterr().err
        == 'error: chat: expected gradio, found none. Install it: pip install "bco_lightning[ui]"\n'
    )


# --- the log


def finished(text: str, turns: int = 1) -> Answer:
    prompt = [{"role": role, "content": f"{text} {n}"} for n in range(turns) for role in ("user", "assistant")][:-1]
    return Answer("policy", prompt, text, finished=True)


def thumbs_of(log: Path, tokenizer: Any) -> dict[str, int]:
    data = FeedbackDataModule(str(log), tokenizer=tokenizer, validation_fraction=0.0)
    data.setup("fit")
    counts = data.counts[0]
    left_out = {reason: found.count for reason, found in counts.left_out.items()}
    return {"up": counts.up, "down": counts.down, **left_out}


def test_the_last_thumb_of_an_answer_is_the_one_that_is_read(tmp_path: Path, tokenizer: Any) -> None:
    log, answers = tmp_path / "new" / "log.jsonl", [finished("é👍\n", 2), finished("b"), finished("c"), finished("b")]
    for answer, thumbs in zip(answers, ([True, False], [False, True], [True, None], [True]), strict=True):
        for thumb in thumbs:
            rate(log, answer, thumb, "run")
    assert thumbs_of(log, tokenizer) == {"up": 2, "down": 1, "no feedback": 1}
    assert log.stat().st_mode & 0o777 == 0o600
    first = json.loads(log.read_text(encoding="utf-8").splitlines()[0])
    assert [message["role"] for message in first["prompt"]] == ["user", "assistant", "user"]
    assert first["completion"] == [{"role": "assistant", "content": "é👍\n"}]
    assert (first["model"], first["source"], first["time"][10:11]) == ("policy", "run", "T")


@pytest.mark.parametrize(
    ("text", "finished", "found"),
    [("half", False, "was cut off"), (" \n", True, "says nothing"), ("hal", None, "is still being made")],
)
def test_an_answer_that_no_row_could_be_made_of_takes_no_thumb(
    text: str, finished: bool | None, found: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"thumb: expected an answer that ended by itself, found one that {found}"):
        rate(tmp_path / "log.jsonl", Answer("policy", ASKED, text, finished), True, "run")
    with pytest.raises(UserError, match="NUL"):
        rate(tmp_path / "log.jsonl", Answer("policy", ASKED, "a\0b", True), True, "run")
    assert not (tmp_path / "log.jsonl").exists()


def test_what_others_wrote_into_the_log_stays(tmp_path: Path, tokenizer: Any) -> None:
    log, answer = tmp_path / "log.jsonl", finished("b")
    theirs = json.dumps({"prompt": "q", "completion": "a", "label": False})
    log.write_text(theirs, encoding="utf-8")  # without a line break at its end
    rate(log, answer, True, "run")
    log.write_text(log.read_text().replace('"source": "run"', '"source": "mine"'))  # edited meanwhile
    rate(log, answer, False, "run")
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines[0] == theirs
    assert [json.loads(line)["label"] for line in lines] == [False, True, False]


def test_tabs_that_rate_at_once_do_not_mix(tmp_path: Path) -> None:
    log, answers = tmp_path / "log.jsonl", [finished(f"{n} " * 2000) for n in range(8)]

    def rating(answer: Answer) -> None:
        for n in range(10):
            rate(log, answer, bool(n % 2), "run")

    threads = [threading.Thread(target=rating, args=(answer,)) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert sorted(row["completion"][0]["content"] for row in rows) == sorted(answer.text for answer in answers)


def test_a_log_that_cannot_be_written_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    rate(log, finished("a"), True, "run")
    before, pwrite = log.read_bytes(), chat_module.os.pwrite
    monkeypatch.setattr(chat_module.os, "pwrite", lambda file, line, at: pwrite(file, line[:9], at))
    with pytest.raises(OSError, match="No space left"):
        rate(log, answer := finished("b"), True, "run")
    assert (log.read_bytes(), answer.thumb) == (before, None)


# --- the page


@pytest.mark.slow
def test_in_a_browser_a_thumb_becomes_a_row_that_inspect_reads(
    seeing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    import httpx

    from bco_lightning.serving.chat_page import page, serve

    log, failed = tmp_path / "chat.jsonl", list[BaseException]()
    speakers = Speakers(None, seeing, seeing, tmp_path)
    picture(0).save(tmp_path / "dog.png")
    blocks = page(speakers, log, blind=True)
    url = serve(blocks, "127.0.0.1", None, waits=False)
    for path in ("", "config", "gradio_api/info", "gradio_api/queue/join"):
        assert httpx.get(f"{url.partition('?')[0]}{path}").status_code == 401
        assert httpx.get(f"{url.partition('?')[0]}{path}?token=wrong").status_code == 401
    leaky = "![a](http://192.0.2.1/leak.png)<script>document.title = 'taken'</script>"

    def drive() -> None:
        try:
            with sync_api.sync_playwright() as browsers:
                browser = browsers.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
                tab, errors, elsewhere = browser.new_page(), list[str](), set[str]()
                tab.on("pageerror", lambda error: errors.append(str(error)))
                tab.on("requestfinished", lambda request: elsewhere.add(request.url.split("/")[2]))
                tab.goto(url, timeout=90_000)
                for number, question in enumerate(["Say hello.", leaky], 1):
                    tab.get_by_placeholder("Ask something").fill(question, timeout=90_000)
                    if number == 2:
                        tab.locator("input[type=file]").first.set_input_files(tmp_path / "dog.png")
                        tab.get_by_label("Remove").wait_for()
                    tab.keyboard.press("Enter")
                    tab.get_by_label("Like", exact=True).nth(2 * number - 1).wait_for(timeout=90_000)
                tab.get_by_text("Thumbs of this conversation: 0.").wait_for()
                tab.get_by_label("Like", exact=True).first.click()
                tab.get_by_text("Thumbs of this conversation: 1.").wait_for()
                assert tab.get_by_text("model A").count() == 1
                tab.get_by_text("Who is who?").click()
                tab.get_by_text(f"policy: {seeing}").wait_for()
                tab.get_by_label("Dislike", exact=True).first.click()
                tab.get_by_label("Like", exact=True).last.click()
                tab.get_by_text("Thumbs of this conversation: 2.").wait_for()
                assert (tab.title(), errors, elsewhere) == ("bco_lightning chat", [], {url.split("/")[2]})
                browser.close()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=drive)  # playwright takes a thread without an event loop
    thread.start()
    thread.join()
    blocks.close()
    assert not failed, failed
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [(row["label"], row["prompt"][0]["content"], len(row["prompt"])) for row in rows] == [
        (False, "Say hello.", 1),
        (True, "Say hello.", 3),
    ]
    assert [part["type"] for part in rows[1]["prompt"][2]["content"]] == ["image", "text"]
    capsys.readouterr()
    assert main(["inspect", "--model.name_or_path", seeing, "--data.train_files", str(log), "--report", "null"]) == 0
    assert "1 images, of 20 x 14 to 20 x 14 pixels" in capsys.readouterr().out
