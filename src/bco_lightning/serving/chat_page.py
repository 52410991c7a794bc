"""The page of ``chat``: models side by side, thumbs under each answer, and nothing that is loaded from elsewhere."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bco_lightning.errors import UserError
from bco_lightning.serving.chat import Answer, Speakers, rate, said

with suppress(ModuleNotFoundError):  # or ``chat`` says what to install
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.responses import PlainTextResponse

_OWN_ALONE = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
_OFF: Any = dict.fromkeys(("share", "mcp_server", "ssr_mode", "enable_monitoring", "pwa", "inline"), False)


class _Talk(dict[str, list[Answer]]):
    """The answers of each model, from left to right; each goes on with its own."""

    blind = False

    def ask(self, text: str, images: list[str]) -> list[Answer]:
        for model, given in self.items():
            given[:] = [answer for answer in given if answer.text.strip()]  # what could not be answered was not said
            before = [*given[-1].prompt, {"role": "assistant", "content": said(given[-1].text)}] if given else []
            given.append(Answer(model, [*before, {"role": "user", "content": said(text, images)}]))
        return [given[-1] for given in self.values()]


def page(speakers: Speakers, log: Path, blind: bool) -> gr.Blocks:
    """The page, which is not served yet."""
    models = list(speakers.models)

    def begun() -> list[Any]:
        talk = _Talk({model: [] for model in (random.sample(models, len(models)) if blind else models)})
        talk.blind = blind
        return _shown(talk, speakers.name, log)

    def ask(told: dict[str, Any], talk: _Talk, temperature: float, most: float) -> Iterator[list[Any]]:
        with _told_on_the_page():
            for answer in talk.ask(told["text"], told["files"]) if told["text"].strip() or told["files"] else ():
                for _ in speakers.speak(answer, temperature, int(most)):
                    yield _shown(talk, speakers.name, log)
        yield _shown(talk, speakers.name, log)

    def rating(side: int) -> Any:
        def rated(talk: _Talk, given: gr.LikeData) -> list[Any]:
            with _told_on_the_page():
                thumb, number = given.liked if isinstance(given.liked, bool) else None, given.index // 2
                rate(log, [*talk.values()][side][number], thumb, speakers.name)
            return _shown(talk, speakers.name, log)

        return rated

    def revealed(talk: _Talk) -> list[Any]:
        talk.blind = False
        return _shown(talk, speakers.name, log)

    with gr.Blocks(title="bco_lightning chat", analytics_enabled=False) as blocks:
        talk, asked = gr.State(), gr.State()
        with gr.Row():
            chats = [gr.Chatbot(height="65vh", buttons=["copy"], latex_delimiters=[]) for _ in models]
        images: dict[str, Any] = {"sources": ["upload"] * (speakers.inputs.processor is not None)}
        images |= {"file_types": ["image"], "file_count": "multiple", "max_plain_text_length": 10**9}
        typed = gr.MultimodalTextbox(placeholder="Ask something", show_label=False, **images)
        with gr.Row():
            again = gr.Button("New conversation", size="sm")
            reveal = gr.Button("Who is who?", size="sm", visible=blind)
        with gr.Accordion("How answers are drawn", open=False):
            warmth = gr.Slider(0, 2, 0.7, step=0.1, label="Temperature; 0 takes the likeliest token")
            most = gr.Slider(16, 4096, 512, step=16, label="Most tokens of an answer")
        everything = [talk, *chats, gr.Markdown()]
        taken = typed.submit(lambda told: (told, None), typed, [asked, typed])  # the next may be typed meanwhile
        said = taken.then(ask, [asked, talk, warmth, most], everything, trigger_mode="multiple")
        gr.on([blocks.load, again.click, *(chat.clear for chat in chats)], begun, None, everything, cancels=[said])
        reveal.click(revealed, talk, everything)
        for side, chat in enumerate(chats):
            chat.like(rating(side), talk, everything)
    return blocks


def serve(blocks: Any, host: str, port: int | None, waits: bool = True) -> str:
    """Serves the page until it is interrupted, for those who know the URL that it prints and gives."""
    token = secrets.token_urlsafe()
    cookie = f"chat-{token[:6]}"

    async def guarded(request: Any, follow: Any) -> Any:
        if request.url.path == "/gradio_api/startup-events":  # asked by the server itself; it tells nothing
            return await follow(request)
        brought = request.query_params.get("token") or request.cookies.get(cookie, "")
        if not secrets.compare_digest(brought.encode(), token.encode()):
            return PlainTextResponse("Open the URL that the command has printed, which ends with a token.", 401)
        response = await follow(request)
        response.headers["Content-Security-Policy"] = _OWN_ALONE
        response.set_cookie(cookie, token, httponly=True, samesite="strict")
        return response

    guard = {"middleware": [Middleware(BaseHTTPMiddleware, dispatch=guarded)]}
    theme = gr.themes.Default(font="system-ui", font_mono="monospace")  # none that would be fetched
    how = {**_OFF, "app_kwargs": guard, "theme": theme, "footer_links": [], "quiet": True, "prevent_thread_lock": True}
    _, url, _ = blocks.launch(server_name=host, server_port=port, **how)
    print(url := f"{url}?token={token}", flush=True)
    if waits:
        blocks.block_thread()
    return url


def _shown(talk: _Talk, name: str, log: Path) -> list[Any]:
    """What the page shows of a conversation: its columns, and a line about its thumbs."""
    columns = []
    for letter, (model, given) in zip("AB", talk.items(), strict=False):
        shown: list[Any] = []
        for answer in given:
            text = answer.text + "\n\n*(cut off, and not to be rated)*" * (answer.finished is False)
            asked = answer.prompt[-1]["content"]
            if isinstance(asked, list):
                asked = [{"path": part["image"]} if "image" in part else part for part in asked]
            shown += [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        label = f"model {letter}" if talk.blind else f"{model}: {name}" if model == "policy" else model
        thumbs = ["Like" if each.thumb else None if each.thumb is None else "Dislike" for each in given]
        columns.append(gr.Chatbot(shown, label=label, feedback_value=thumbs))
    count = sum(answer.thumb is not None for given in talk.values() for answer in given)
    return [talk, *columns, f"Thumbs of this conversation: {count}. Log: `{log}`"]


@contextmanager
def _told_on_the_page() -> Iterator[None]:
    try:
        yield
    except (UserError, OSError) as error:
        gr.Warning(str(error))
