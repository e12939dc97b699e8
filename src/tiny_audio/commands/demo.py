"""`tiny-audio demo [MODEL ...]`: serve a web page that transcribes uploads and speech as you speak.

Words that the model is unsure of are highlighted in red; a click on a word plays it.

Uploads are limited in size and length, deleted later, and never sent to another machine. With
`--corrections FOLDER`, visitors can correct a text and keep it with its recording in that folder.
"""

import base64
import functools
import html
import json
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
import numpy as np

from ..asr.asr_audio import AudioError, load_audio, split_blocks
from ..asr.asr_config import DECODE
from ..asr.asr_pipeline import Recording
from ..loading import load_pipeline
from ..training.manifests import read_source
from . import append_row, cache_dir, home_path, parser_of
from .formats import render
from .transcribe import DECODE_HELP

MAX_SIZE, MAX_SECONDS = "200mb", 3600.0
KEEP = 7200  # seconds until an upload is deleted
LISTEN_EVERY = 2.0  # seconds between two updates of the live text
LIVE_SECONDS = 10.0  # each update decodes only this much of the latest speech again
CSS = """
.result { overflow-wrap: anywhere } .result audio { width: 100% }
.result a { margin-right: 1rem; text-decoration: underline }
.words { font-size: 1.2rem; line-height: 1.9 }
.words span { background: rgb(211 47 47 / calc(var(--doubt) * 0.5)) }
.words .now { background: #ffd54a; color: #000 }
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
    spans = []
    for word in words or []:
        (start, end), sure = word["timestamp"], word["confidence"]
        sure = 1.0 if sure is None else sure
        about = f'data-start="{start}" data-end="{end}" title="{sure:.0%} sure"'
        style = f'style="--doubt: {1 - sure:.2f}"'
        spans.append(f"<span {about} {style}>{html.escape(word['text'])}</span>")
    status = f'<p role="status" class="status"><b>{html.escape(status)}</b></p>'
    return f'<div class="result">{status}{more}<p class="words">{" ".join(spans)}</p></div>'


def player(result: dict[str, Any], source: Path) -> str:
    """Render an audio player and download links; the links contain their files as data URLs."""
    out = f'<audio controls src="gradio_api/file={html.escape(quote(str(source)))}"></audio>'
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
    recording, done = Recording(Path(source)), []  # a path, never a URL
    try:
        for piece in pipe.pieces(recording, limit_seconds=MAX_SECONDS):
            done += piece.words
            yield page(f"{piece.start + piece.seconds:.0f} s read ...", done), ""
    except AudioError as error:
        yield page(f"Error: {str(error).replace(source, Path(source).name)}"), ""
        return
    spent = time.perf_counter() - began
    result = pipe.postprocess(recording, return_timestamps=True)
    seconds, hint = result["duration"], "" if result["text"] else "No speech was found."
    status = f"{seconds:.1f} s of audio in {spent:.1f} s: {seconds / spent:.1f} times real time. "
    notes = result.get("warnings", []) + result.get("missing", [])
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    yield page(status + hint, done, player(result, Path(source))) + notes, result["text"]


def listen(
    chunk: tuple[int, np.ndarray] | None, said: Any, model: str, decode: str | None = None
) -> tuple[Any, Any]:
    """Add what the microphone heard since the last call to what was said, and show its text.

    Args:
        chunk: rate (Hz) and samples (n,) or (n, channels); None after the last one.
        said: the result of the last call: the text that is finished, and the samples of what may
            still change. None at the start.
        model, decode: see `load`.

    Returns:
        The next `said`, and the page's HTML.
    """
    text, samples = said or ("", np.zeros(0, np.float32))
    if chunk is None:
        return said, gr.skip()
    pipe, (rate, heard) = load(model, decode), chunk
    samples = np.concatenate([samples, load_audio(heard, rate)])
    *finished, (_, samples) = split_blocks([samples], LIVE_SECONDS)
    for _, piece in finished:
        text = f"{text} {pipe(piece)['text']}".strip()
    now = pipe(samples, return_timestamps="word")["chunks"]
    return (text, samples), page("Listening ...", now, html.escape(text))


def describe(model: str) -> str:
    """A model's name, and its WER where the quickstart has measured it."""
    name, summary = Path(model).resolve().name, Path(model) / "summary.json"
    if not summary.is_file():
        return name
    measured = json.loads(summary.read_text())
    return f"{name}: {measured['wer']:.1f} % WER on {measured['utterances']} clips"


def held_out_clips() -> list[str]:
    """Two clips that the quickstart was not trained on, if they were fetched."""
    manifest = cache_dir() / "speech" / "test.jsonl"
    clips = read_source({"path": str(manifest)}) if manifest.is_file() else []
    return [clip.audio for clip in islice(clips, 2)]


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
        names = [(describe(model), model) for model in models]
        choice = gr.Dropdown(names, value=models[0], label="Model", elem_id="model")
        audio = gr.Audio(type="filepath", label="Recording", elem_id="recording", buttons=[])
        button = gr.Button("Transcribe", variant="primary", elem_id="go")
        out = gr.HTML(elem_id="result", js_on_load=JS)
        text = gr.Textbox(label="Correct the text", lines=2, elem_id="text", visible=bool(folder))
        save = gr.Button("Keep as a training clip", elem_id="keep", visible=bool(folder))
        kept = gr.HTML(elem_id="kept")
        if examples:
            gr.Examples(examples, audio, cache_examples=False)
        with gr.Accordion("Or watch the text appear as you speak", open=False, elem_id="live"):
            microphone = gr.Audio(sources=["microphone"], streaming=True, label="Microphone")
        said = gr.State()
        hear = functools.partial(listen, decode=decode)
        microphone.stream(hear, [microphone, said, choice], [said, out], stream_every=LISTEN_EVERY)
        microphone.start_recording(lambda: None, None, said)
        write = functools.partial(transcribe, decode=decode)
        running = button.click(write, [audio, choice], [out, text])
        # The text of another recording goes, and no more of it comes.
        audio.change(lambda: ("", ""), None, [text, kept], cancels=[running])
        if folder:
            save.click(functools.partial(keep, folder=folder), [audio, text], kept)
    return blocks


def main(argv: list[str] | None = None) -> int:
    """Serve the page until interrupted."""
    parser = parser_of("tiny-audio demo", __doc__)
    parser.add_argument("models", nargs="*", help="default: every model in outputs")
    parser.add_argument("--examples", nargs="*",
                        help="recordings to offer; default: two held-out clips")  # fmt: skip
    parser.add_argument("--decode", choices=DECODE, help=DECODE_HELP)
    parser.add_argument("--corrections", type=home_path, metavar="FOLDER",
                        help="keep corrected texts and their recordings here")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, local only")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    outputs = Path("outputs")
    finished = sorted([*outputs.glob("*/config.json"), *outputs.glob("*/model/config.json")])
    models = args.models or [str(config.parent) for config in finished]
    if not models:
        parser.error("no model in outputs: name a folder or Hub id")
    load(models[0], args.decode)
    examples = held_out_clips() if args.examples is None else args.examples
    try:
        build(models, examples, args.decode, args.corrections).launch(
            server_name=args.host, server_port=args.port, max_file_size=MAX_SIZE, css=CSS
        )
    except OSError as error:
        parser.error(f"{error}; choose another --port")
    return 0
