"""The endpoint, driven by OpenAI's own client and by clients that misbehave; the page; load."""

import html
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import numpy as np
import openai
import psutil
import pytest
import uvicorn
from conftest import babble, write_audio, write_manifest

from tiny_audio.asr.handler import EndpointHandler
from tiny_audio.commands import demo, transcribe
from tiny_audio.commands.formats import render
from tiny_audio.commands.serve import create_app
from tiny_audio.loading import load_pipeline
from tiny_audio.training.manifests import read_source

KINDS = {
    "wav": "pcm_s16le",
    "flac": "flac",
    "mp3": "libmp3lame",
    "ogg": "vorbis",
    "m4a": "aac",
    "webm": "libopus",
}


class Running:
    """An endpoint in a thread, on a free port."""

    def __init__(self, app) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        run = {"sockets": [self.sock]}
        self.thread = threading.Thread(target=self.server.run, kwargs=run, daemon=True)
        self.thread.start()

    def client(self, **options) -> openai.OpenAI:
        key = options.pop("api_key", "none")
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def endpoint(pipe):
    running = Running(create_app(pipe, "tiny", queue=16, max_mb=2, limit_seconds=60))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def talk(tmp_path_factory) -> Path:
    """A file of several pieces."""
    samples = np.concatenate([babble(3.0, 0), np.zeros(8000, np.float32), babble(5.0, 7)])
    return write_audio(tmp_path_factory.mktemp("talk") / "talk.mp3", samples, 16_000, "libmp3lame")


def ask(client: openai.OpenAI, file, **options):
    return client.audio.transcriptions.create(model="tiny", file=file, **options)


def test_plain_forms(endpoint, talk, pipe):
    client = endpoint.client()
    expected = pipe(str(talk), return_timestamps=True)
    assert expected["text"]
    assert ask(client, talk).text == expected["text"]
    assert ask(client, talk, response_format="text").strip() == expected["text"].strip()
    for kind in ("srt", "vtt"):
        assert ask(client, talk, response_format=kind) == render(expected, kind)
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_verbose_json(endpoint, talk, pipe):
    said = ask(
        endpoint.client(),
        talk,
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
        language="en",
    )
    words = pipe(str(talk), return_timestamps="word")
    segments = pipe(str(talk), return_timestamps=True)["chunks"]
    assert said.text == words["text"] and float(said.duration) == words["duration"]
    assert said.language == "en"
    times = [(w.word, (w.start, w.end)) for w in said.words]
    assert times == [(w["text"], tuple(w["timestamp"])) for w in words["chunks"]]
    assert [(s.text, s.start, s.end) for s in said.segments] == [
        (c["text"], *c["timestamp"]) for c in segments
    ]
    assert all(s.confidence is None or 0 <= s.confidence <= 1 for s in said.segments)
    plain = ask(endpoint.client(), talk, response_format="verbose_json")
    assert plain.words is None and len(plain.segments) == len(segments)


def test_stream(endpoint, talk, pipe):
    events = list(ask(endpoint.client(), talk, stream=True))
    kinds = [event.type for event in events]
    assert kinds[-1] == "transcript.text.done" and len(kinds) >= 3
    assert set(kinds[:-1]) == {"transcript.text.delta"}
    text = pipe(str(talk))["text"]
    assert events[-1].text == text
    assert "".join(event.delta for event in events[:-1]).strip() == text


@pytest.mark.parametrize(
    ("content", "options", "kind", "says"),
    [
        (b"this is no recording" * 9, {}, openai.BadRequestError, "not readable"),
        (b"", {}, openai.BadRequestError, "not readable"),
        (b"junk" * 9, {"stream": True}, openai.BadRequestError, "not readable"),
        (None, {"stream": True, "response_format": "srt"}, openai.BadRequestError, "stream needs"),
        (None, {"response_format": "xml"}, openai.BadRequestError, "response_format: .*'json'"),
        (bytes(3_000_000), {}, openai.APIStatusError, "at most 2 MB"),
    ],
)
def test_bad_requests_are_4xx_with_a_reason(endpoint, talk, content, options, kind, says):
    file = talk if content is None else ("a.wav", content)
    with pytest.raises(kind, match=says) as caught:
        ask(endpoint.client(), file, **options)
    assert 400 <= caught.value.status_code < 500


def test_errors_have_the_form_that_clients_read(endpoint, talk):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(endpoint.client(), talk, response_format="xml")
    body = caught.value.body
    assert body["param"] == "response_format" and body["type"] == "invalid_request_error"
    assert body["code"] == "400"
    for path, status in (("/v1/nothing", 404), ("/v1/models/other", 404)):
        answer = httpx.get(endpoint.url + path)
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_what_other_programs_send_has_no_effect_and_is_said(endpoint, talk, pipe):
    said = ask(endpoint.client(), talk, temperature=0.2, prompt="Names: Ada, Grace")
    assert said.text == pipe(str(talk))["text"]
    assert said.warnings[:2] == ["prompt has no effect", "temperature has no effect"]
    plain = ask(endpoint.client(), talk).to_dict().get("warnings", [])
    assert not [line for line in plain if "no effect" in line]


def test_a_body_without_a_length_is_counted_as_it_comes(endpoint, talk, pipe):
    def upload(content: bytes) -> httpx.Response:
        form = httpx.Request(
            "POST", endpoint.url, data={"model": "tiny"}, files={"file": ("a.mp3", content)}
        )
        body = form.read()
        parts = (body[at : at + 50_000] for at in range(0, len(body), 50_000))
        kind = {"content-type": form.headers["content-type"]}
        url = f"{endpoint.url}/v1/audio/transcriptions"
        return httpx.post(url, content=parts, headers=kind, timeout=60)

    assert upload(talk.read_bytes()).json()["text"] == pipe(str(talk))["text"]
    refused = upload(bytes(3_000_000))
    assert refused.status_code == 413 and "at most 2 MB" in refused.json()["error"]["message"]


def test_the_model_and_the_root_answer(endpoint):
    assert endpoint.client().models.retrieve("tiny").id == "tiny"
    assert "/docs" in httpx.get(endpoint.url).text


def test_pages_of_named_origins_may_call(pipe, endpoint, monkeypatch):
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    url = "/v1/audio/transcriptions"
    monkeypatch.setenv("TINY_AUDIO_API_KEY", "secret")
    running = Running(create_app(pipe, "tiny", cors=["https://page.example"]))
    allowed = httpx.options(running.url + url, headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    refused = httpx.post(running.url + url, headers=asked)  # readable for the page, though refused
    assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
    other = httpx.options(running.url + url, headers={**asked, "origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    running.stop()
    assert (
        "access-control-allow-origin"
        not in httpx.options(endpoint.url + url, headers=asked).headers
    )


def test_wrong_model_and_too_long(endpoint, tmp_path):
    client = endpoint.client()
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.audio.transcriptions.create(model="large", file=("a.wav", b"x"))
    long = write_audio(tmp_path / "long.mp3", babble(70, 0), 8_000, "libmp3lame")
    with pytest.raises(openai.BadRequestError, match="limit of 60 s"):
        ask(client, long)


def test_bearer_key(pipe, talk, monkeypatch):
    monkeypatch.setenv("TINY_AUDIO_API_KEY", "secret")
    running = Running(create_app(pipe, "tiny"))
    with pytest.raises(openai.AuthenticationError):
        ask(running.client(api_key="guess"), talk)
    assert ask(running.client(api_key="secret"), talk).text
    running.stop()


def test_a_hundred_at_once(endpoint, talk, pipe):
    """What fits into the queue is answered right, the rest is refused with 429 at once."""
    text = pipe(str(talk))["text"]

    def one(_: int) -> str | int:
        try:
            return ask(endpoint.client(timeout=120), talk).text
        except openai.RateLimitError as error:
            return error.status_code

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(one, range(100)))
    assert set(answers) <= {text, 429}
    assert answers.count(text) >= 16
    assert endpoint.client().models.list().data


def test_a_client_that_leaves_is_forgotten(endpoint, tmp_path):
    long = write_audio(tmp_path / "long.flac", babble(55, 0), 16_000, "flac")
    for options in ({}, {"stream": True}):
        client = endpoint.client(timeout=0.3)
        with pytest.raises(openai.APIConnectionError):
            for _ in ask(client, long, **options):
                client.close()
                raise openai.APIConnectionError(request=None)
        ended = time.monotonic() + 20
        while time.monotonic() < ended:
            if endpoint.client().get("/../health", cast_to=dict)["waiting"] == 0:
                break
            time.sleep(0.2)
        else:
            pytest.fail("the job of a client that left is still there")


def test_a_failure_is_answered_and_the_next_request_served(endpoint, talk, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as broken:
        broken.setattr("tiny_audio.asr.asr_pipeline.ASRPipeline._forward", fail)
        with pytest.raises(openai.InternalServerError, match="RuntimeError"):
            ask(endpoint.client(), talk)
    assert ask(endpoint.client(), talk).text


def test_an_unexpected_failure_has_the_form_that_clients_read(pipe, talk, monkeypatch):
    monkeypatch.setattr("tiny_audio.commands.serve.answer", lambda *_: 1 / 0)
    running = Running(create_app(pipe, "tiny"))
    with pytest.raises(openai.InternalServerError, match="the server failed: division by zero"):
        ask(running.client(), talk)
    running.stop()


def test_a_port_that_is_taken_is_named(endpoint, model_folder, capfd):
    from tiny_audio.commands import serve

    port = endpoint.url.rsplit(":", 1)[1]
    with pytest.raises(SystemExit):
        serve.main([str(model_folder), "--port", port, "--device", "cpu"])
    assert port in capfd.readouterr().err


@pytest.fixture(scope="module")
def twenty(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("twenty")
    kinds = list(KINDS) * 4
    return [
        write_audio(
            folder / f"{i}.{kinds[i]}", babble(1 + 0.1 * i, i), 48_000 if i % 2 else 16_000,
            KINDS[kinds[i]],
        )
        for i in range(20)
    ]  # fmt: skip


def page_text(source: Path, model: str) -> str:
    """The text that the page ends with."""
    *_, (last, _) = demo.transcribe(str(source), model)
    return " ".join(html.unescape(w) for w in re.findall(r"<span [^>]*>(.*?)</span>", last, re.S))


def everywhere(files: list[Path], model: str, pipe, client, capsys) -> list[str]:
    """Asserts one text for each file everywhere; returns the texts."""
    texts = [r["text"] for r in pipe(list(map(str, files)))]
    assert transcribe.main([*map(str, files), "--model", model, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said == "".join(f"{f}: {t}\n" for f, t in zip(files, texts, strict=True))
    handler = EndpointHandler(model)
    for file, text in zip(files, texts, strict=True):
        assert handler({"inputs": file.read_bytes()})["text"] == text
        assert ask(client, file).text == text
        assert page_text(file, model).split() == text.split()
    return texts


def test_one_text_everywhere(twenty, model_folder, pipe, endpoint, capsys):
    texts = everywhere(twenty, str(model_folder), pipe, endpoint.client(), capsys)
    assert sum(map(bool, texts)) > 15


def test_the_endpoint_decodes_as_it_was_told_to(model_folder, talk, pipe):
    """--decode and --terms of `tiny-audio serve`."""
    for options in ({"decode": "generate"}, {"decode": "ctc", "terms": ["zzz"]}):
        told = load_pipeline(str(model_folder), "cpu", **options)
        expected = told(str(talk))["text"]
        assert expected != pipe(str(talk))["text"]
        running = Running(create_app(told, "tiny"))
        try:
            assert ask(running.client(), talk).text == expected
        finally:
            running.stop()


def test_the_page_says_what_is_wrong(model_folder, tmp_path):
    (tmp_path / "a<b>.wav").write_text("no audio")
    *_, (last, _) = demo.transcribe(str(tmp_path / "a<b>.wav"), str(model_folder))
    assert "Error: a&lt;b&gt;.wav: not readable" in last and str(tmp_path) not in last
    assert "Choose a file" in list(demo.transcribe(None, str(model_folder)))[-1][0]
    demo.build([str(model_folder)], [])


def test_the_page_reads_nothing_but_the_upload(model_folder, tmp_path):
    """Neither the files that an uploaded playlist names nor an address in place of a file."""
    secret = write_audio(tmp_path / "secret.mp3", babble(3.0, 1), 16_000, "libmp3lame")
    playlist = tmp_path / "x.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:3.0,\n{secret}\n"
                        "#EXT-X-ENDLIST\n")  # fmt: skip
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.5)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.wav"
        for source in (str(playlist), url):
            *_, (last, _) = demo.transcribe(source, str(model_folder))
            assert "not readable as audio" in last
        with pytest.raises(TimeoutError):
            asked.append(listening.accept())
    assert not asked


def test_the_page_plays_files_of_any_name(model_folder, tmp_path):
    path = write_audio(tmp_path / "talk #1 50%.wav", babble(1.0, 1), 16_000, "pcm_s16le")
    *_, (last, _) = demo.transcribe(str(path), str(model_folder))
    assert f'src="gradio_api/file={tmp_path}/talk%20%231%2050%25.wav"' in last


def test_text_appears_as_one_speaks(model_folder, pipe):
    """What is finished is what the pipeline says of that stretch, and nothing is lost between."""
    whole, said, finished, done = babble(23.0, 4), None, [], 0
    for start in range(0, len(whole), 32_000):
        heard = whole[: start + 32_000]
        said, shown = demo.listen((16_000, heard[start:]), said, str(model_folder))
        text, unfinished = said
        if len(heard) - len(unfinished) > done:
            begin, done = done, len(heard) - len(unfinished)
            finished.append(pipe(whole[begin:done])["text"])
        assert text == " ".join(filter(None, finished))
        assert np.array_equal(unfinished, heard[done:])
        words = html.unescape(re.sub("<.*?>", " ", shown)).removeprefix(" ").split()
        assert words[2:] == f"{text} {pipe(unfinished)['text']}".split()  # after "Listening ..."
    assert len(finished) > 1
    assert demo.listen(None, said, str(model_folder))[0] is said  # the end of the recording


def test_words_that_are_unsure_are_marked():
    words = [{"text": "a<b", "timestamp": (0, 1.5), "confidence": 0.25},
             {"text": "7", "timestamp": (2, 3), "confidence": None}]  # fmt: skip
    shown = demo.page("done", words)
    assert 'data-end="1.5" title="25% sure" style="--doubt: 0.75">a&lt;b</span>' in shown
    assert 'title="100% sure" style="--doubt: 0.00">7</span>' in shown


def test_the_page_names_its_models_and_offers_clips(tmp_path, monkeypatch):
    model, cache = tmp_path / "mine", tmp_path / "cache"
    model.mkdir()
    assert demo.describe(str(model)) == "mine"
    (model / "summary.json").write_text('{"wer": 8.73, "utterances": 110}')
    assert demo.describe(str(model)) == "mine: 8.7 % WER on 110 clips"
    monkeypatch.setenv("TINY_AUDIO_CACHE", str(cache))
    assert demo.held_out_clips() == []
    (cache / "speech").mkdir(parents=True)
    rows = [{"id": i, "audio": f"{i}.wav", "text": "one", "duration": 1.0} for i in range(3)]
    write_manifest(cache / "speech" / "test.jsonl", rows)
    assert demo.held_out_clips() == [str(cache / "speech" / f"{i}.wav") for i in range(2)]


def test_corrections_become_a_manifest(tmp_path):
    source, folder = tmp_path / "said.wav", tmp_path / "mine"
    write_audio(source, babble(1.0, 1), 16_000, "pcm_s16le")
    assert "first" in demo.keep(None, "text", folder) and "first" in demo.keep("x", " ", folder)
    for text in ("hello, world", "good\nbye"):
        assert "--data .../clips.csv" in demo.keep(str(source), text, folder)
    examples = list(read_source({"path": str(folder / "clips.csv")}))
    assert [example.text for example in examples] == ["hello, world", "good bye"]
    assert len({example.audio for example in examples}) == 2


@pytest.mark.long
def test_load(pipe, talk, tmp_path):
    """8 clients, 200 requests, one in twenty broken: every answer right, memory flat."""
    running = Running(create_app(pipe, "tiny"))
    files = [write_audio(tmp_path / f"{i}.wav", babble(1 + i / 2, i), 16_000, "pcm_s16le")
             for i in range(5)]  # fmt: skip
    texts = [r["text"] for r in pipe(list(map(str, files)))]
    memory = []

    def one(i: int) -> bool:
        memory.append(psutil.Process().memory_info().rss)
        try:
            said = ask(running.client(timeout=300), ("x", b"bad") if i % 20 == 7 else files[i % 5])
        except openai.BadRequestError:
            return i % 20 == 7
        return i % 20 != 7 and said.text == texts[i % 5]

    with ThreadPoolExecutor(8) as pool:
        right = list(pool.map(one, range(200)))
    running.stop()
    assert all(right)
    assert max(memory[-50:]) < max(memory[:50]) + 100e6
