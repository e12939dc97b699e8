"""`tiny-audio demo [MODEL ...]`: a page to talk to. Upload or record, read along, download.

Uploads are limited in size and length, and deleted; nothing is sent anywhere else.
"""

import argparse
import base64
import functools
import html
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..asr_pipeline import Recording, chunks
from ..asr_processing import AudioError
from ..formats import render
from .transcribe import load_pipeline

MAX_SIZE, MAX_SECONDS = "200mb", 3600.0
KEEP = 7200  # seconds until an upload is deleted
CSS = """
.words span { padding: .1em .12em; border-radius: .3em; cursor: pointer }
.words .now { background: #ffd54a; color: #000 }
.words { font-size: 1.2rem; line-height: 1.9 }
.result audio { width: 100%; margin: .5rem 0 }
.result a { margin-right: 1rem; text-decoration: underline }
.status { color: inherit; font-weight: 600 }
"""
# Marks the word that is being said; a click on a word plays from there.
JS = """
const at = (e) => e.target.currentTime;
element.addEventListener('timeupdate', (e) => {
  for (const word of element.querySelectorAll('.words span'))
    word.classList.toggle('now', word.dataset.start <= at(e) && at(e) < word.dataset.end);
}, true);
element.addEventListener('click', (e) => {
  const audio = element.querySelector('audio');
  if (!audio || !e.target.dataset.start) return;
  audio.currentTime = e.target.dataset.start; audio.play();
});
"""


def page(words: list[dict[str, Any]], status: str, source: str = "", links: str = "") -> str:
    """The result as HTML: status for screen readers too, player, words with times, downloads."""
    spans = " ".join(
        f'<span data-start="{w["timestamp"][0]}" data-end="{w["timestamp"][1]}">'
        f"{html.escape(w['text'])}</span>"
        for w in words
    )
    url = f"gradio_api/file={html.escape(source)}"
    player = f'<audio controls src="{url}" aria-label="the recording"></audio>' if source else ""
    return (
        f'<div class="result"><p class="status" role="status">{html.escape(status)}</p>{player}'
        f'<p class="words" aria-label="transcript">{spans}</p><p>{links}</p></div>'
    )


def link(result: dict[str, Any], kind: str, name: str) -> str:
    """A download that is part of the page: no file is made."""
    data = base64.b64encode(render(result, kind).encode()).decode()
    href = f"data:text/plain;charset=utf-8;base64,{data}"
    return f'<a download="{html.escape(name)}.{kind}" href="{href}">Download .{kind}</a>'


def transcribe(source: str | None, model: str) -> Iterator[str]:
    """The page's HTML, again and again while the text comes in."""
    if not source:
        yield page([], "Choose a file, record something or take an example first.")
        return
    yield page([], "Listening ...")
    pipe, began = load(model), time.perf_counter()
    recording, done = Recording(source), []
    try:
        for piece in pipe.pieces(recording, limit_seconds=MAX_SECONDS, batch_seconds=20.0):
            done.append(piece)
            yield page(chunks(done), f"{piece.start + piece.seconds:.0f} s read ...")
    except AudioError as error:
        yield page([], f"Error: {str(error).replace(source, Path(source).name)}")
        return
    spent = time.perf_counter() - began
    result = pipe.postprocess(recording, return_timestamps=True)
    seconds, notes = result["duration"], result.get("warnings", []) + result.get("missing", [])
    status = f"{seconds:.1f} s of audio in {spent:.1f} s ({seconds / spent:.1f} times real time). "
    status += "; ".join(notes) if result["text"] else "No speech was found."
    links = " ".join(link(result, kind, Path(source).stem) for kind in ("txt", "srt"))
    words = [word for piece in done for word in piece.words or piece.whole()]
    yield page(words, status, source, links)


@functools.lru_cache(1)
def load(model: str) -> Any:
    """The pipeline of the model that was used last."""
    return load_pipeline(model)


def build(models: list[str], examples: list[str]) -> gr.Blocks:
    """The page for a choice of models and example recordings."""
    with gr.Blocks(title="tiny-audio", delete_cache=(300, KEEP)) as blocks:
        gr.Markdown("# tiny-audio\nUpload or record speech; the text appears as it is decoded.")
        audio = gr.Audio(type="filepath", label="Recording", elem_id="recording")
        choice = gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1)
        button = gr.Button("Transcribe", variant="primary", elem_id="go")
        out = gr.HTML(elem_id="result", js_on_load=JS)
        if examples:
            gr.Examples(examples, audio, cache_examples=False)
        button.click(transcribe, [audio, choice], out)
    return blocks


def main(argv: list[str] | None = None) -> int:
    """Show the page until interrupted."""
    parser = argparse.ArgumentParser(prog="tiny-audio demo", description=__doc__)
    parser.add_argument("models", nargs="*", help="default: every model in outputs")
    parser.add_argument("--examples", nargs="*", default=[], help="recordings to offer")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    models = args.models or [str(p.parent) for p in sorted(Path("outputs").glob("*/config.json"))]
    if not models:
        print("error: no model in outputs; name a folder or Hub id", file=sys.stderr)
        return 2
    load(models[0])
    try:
        build(models, args.examples).launch(
            server_name=args.host, server_port=args.port, max_file_size=MAX_SIZE, css=CSS
        )
    except OSError as error:
        print(f"error: {error}; see --port", file=sys.stderr)
        return 2
    return 0
