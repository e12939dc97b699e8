"""`tiny-audio demo [MODEL ...]`: serve a web page that transcribes uploads and recordings.

Uploads are limited in size and length, deleted later, and never sent to another machine. With
`--corrections FOLDER`, visitors can correct a text and keep it with its recording in that folder.
"""

import base64
import functools
import html
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..asr.asr_config import DECODE
from ..asr.asr_pipeline import Recording
from ..asr.asr_processing import AudioError
from ..loading import load_pipeline
from . import append_row, home_path, parser_of
from .formats import render
from .transcribe import DECODE_HELP

MAX_SIZE, MAX_SECONDS = "200mb", 3600.0
KEEP = 7200  # seconds until an upload is deleted
CSS = """
.result { overflow-wrap: anywhere } .result audio { width: 100% }
.result a { margin-right: 1rem; text-decoration: underline }
.words { font-size: 1.2rem; line-height: 1.9 } .words .now { background: #ffd54a; color: #000 }
"""
# Highlights the current word during playback; a click on a word plays from there.
JS = """
element.addEventListener('timeupdate', ({target: {currentTime: t}}) => {
  for (const word of element.querySelectorAll('.words span'))
    word.classList.toggle('now', word.dataset.start <= t && t < word.dataset.end);
}, true);
element.addEventListener('click', ({target: {dataset: {start}}}) => {
  const audio = element.querySelector('audio');
  if (audio && start) { audio.currentTime = start; audio.play(); }
});
"""


def page(status: str, words: list[dict[str, Any]] | None = None, more: str = "") -> str:
    """Render a result as HTML: a status for screen readers too, then `more`, then timed words."""
    spans = [
        f'<span data-start="{word["timestamp"][0]}" data-end="{word["timestamp"][1]}">'
        f"{html.escape(word['text'])}</span>"
        for word in words or []
    ]
    status = f'<p role="status" class="status"><b>{html.escape(status)}</b></p>'
    return f'<div class="result">{status}{more}<p class="words">{" ".join(spans)}</p></div>'


def player(result: dict[str, Any], source: Path) -> str:
    """Render an audio player and download links; the links contain their files as data URLs."""
    out = f'<audio controls src="gradio_api/file={html.escape(str(source))}"></audio>'
    for kind in ("txt", "srt"):
        data = base64.b64encode(render(result, kind).encode()).decode()
        href = f"data:text/plain;charset=utf-8;base64,{data}"
        out += f'<a download="{html.escape(source.stem)}.{kind}" href="{href}">Download .{kind}</a>'
    return out


def transcribe(source: str | None, model: str, decode: str | None = None) -> Iterator[tuple]:
    """Yield the page's HTML and the text to correct, updated as the text arrives."""
    if not source:
        yield page("Choose a file, record something or select an example first."), ""
        return
    yield page("Listening ..."), ""
    pipe, began = load(model, decode), time.perf_counter()
    recording, done = Recording(source), []
    try:
        for piece in pipe.pieces(recording, limit_seconds=MAX_SECONDS):
            done += piece.words
            yield page(f"{piece.start + piece.seconds:.0f} s read ...", done), ""
    except AudioError as error:
        yield page(f"Error: {str(error).replace(source, Path(source).name)}"), ""
        return
    spent = time.perf_counter() - began
    result = pipe.postprocess(recording, return_timestamps=True)
    seconds, none = result["duration"], "" if result["text"] else "No speech was found."
    status = f"{seconds:.1f} s of audio in {spent:.1f} s: {seconds / spent:.1f} times real time. "
    notes = result.get("warnings", []) + result.get("missing", [])
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    yield page(status + none, done, player(result, Path(source))) + notes, result["text"]


def keep(source: str | None, text: str, folder: Path) -> str:
    """Add a recording and its corrected text to the manifest in `folder`."""
    if not source or not text.strip():
        return page("Transcribe a recording and correct its text first.")
    folder.mkdir(parents=True, exist_ok=True)
    audio, manifest = folder / f"{time.time_ns()}{Path(source).suffix}", folder / "clips.csv"
    shutil.copyfile(source, audio)
    append_row(manifest, {"audio": audio.name, "text": " ".join(text.split())})
    return page(f"Kept. Enough clips? Run: tiny-audio adapt MODEL --data .../{manifest.name}")


@functools.lru_cache(1)
def load(model: str, decode: str | None = None) -> Any:
    """Load the pipeline of a model; keeps the last one in memory."""
    return load_pipeline(model, decode=decode)


def build(
    models: list[str], examples: list[str], decode: str | None = None, folder: Path | None = None
) -> gr.Blocks:
    """Build the page for some models and example recordings; corrections are kept in `folder`."""
    with gr.Blocks(title="tiny-audio", delete_cache=(300, KEEP)) as blocks:
        gr.Markdown("# tiny-audio\nUpload or record speech; the text appears as it is decoded.")
        audio = gr.Audio(type="filepath", label="Recording", elem_id="recording", buttons=[])
        choice = gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1)
        button = gr.Button("Transcribe", variant="primary", elem_id="go")
        out = gr.HTML(elem_id="result", js_on_load=JS)
        text = gr.Textbox(label="Correct the text", lines=2, elem_id="text", visible=bool(folder))
        save = gr.Button("Keep as a training clip", elem_id="keep", visible=bool(folder))
        kept = gr.HTML(elem_id="kept")
        if examples:
            gr.Examples(examples, audio, cache_examples=False)
        button.click(functools.partial(transcribe, decode=decode), [audio, choice], [out, text])
        audio.change(lambda: ("", ""), None, [text, kept])  # the text of another recording
        if folder:
            save.click(functools.partial(keep, folder=folder), [audio, text], kept)
    return blocks


def main(argv: list[str] | None = None) -> int:
    """Serve the page until interrupted."""
    parser = parser_of("demo", __doc__)
    parser.add_argument("models", nargs="*", help="default: every model in outputs")
    parser.add_argument("--examples", nargs="*", default=[], help="recordings to show as examples")
    parser.add_argument("--decode", choices=DECODE, help=DECODE_HELP)
    parser.add_argument("--corrections", type=home_path, metavar="FOLDER",
                        help="keep corrected texts and their recordings here")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, local only")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    models = args.models or [str(p.parent) for p in sorted(Path("outputs").glob("*/config.json"))]
    if not models:
        parser.error("no model in outputs: name a folder or Hub id")
    load(models[0], args.decode)
    try:
        build(models, args.examples, args.decode, args.corrections).launch(
            server_name=args.host, server_port=args.port, max_file_size=MAX_SIZE, css=CSS
        )
    except OSError as error:
        parser.error(f"{error}; choose another --port")
    return 0
