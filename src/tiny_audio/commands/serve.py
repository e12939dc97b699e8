"""`tiny-audio serve MODEL`: an HTTP endpoint with OpenAI's routes for transcription.

Requests that wait are decoded together: each round takes the next piece of every one of them, so
that a long recording holds nobody up. TINY_AUDIO_API_KEY, where set, is asked for as bearer key.
"""

import argparse
import asyncio
import hmac
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Form, HTTPException, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from ..asr_pipeline import Piece, Recording
from ..asr_processing import AudioError
from .formats import render
from .transcribe import load_pipeline

logger = logging.getLogger(__name__)
# What happens to a request: its next piece is decoded, all are (None), or it fails.
Event = Piece | HTTPException | None
Format = Literal["json", "text", "srt", "vtt", "verbose_json"]
Unit = Literal["word", "segment"]
PIECES = 4  # decoded together when fewer requests wait


class Job:
    """A request on its way: its events are decoded pieces, then None, or the error that ends it."""

    def __init__(self, recording: Recording, pieces: Iterator[Piece]) -> None:
        self.recording, self.pieces, self.events = recording, pieces, asyncio.Queue()


class Worker:
    """Decodes the pieces of all jobs in common batches, in one thread."""

    def __init__(self, pipe: Any, limit_seconds: float, queue: int) -> None:
        self.pipe, self.limit_seconds, self.queue = pipe, limit_seconds, queue
        self.jobs: dict[Job, None] = {}  # in order
        self.task: asyncio.Task | None = None

    def add(self, source: Any) -> Job:
        """Take a request in, or refuse it with 429."""
        if len(self.jobs) >= self.queue:
            raise HTTPException(429, "the queue is full", {"Retry-After": "1"})
        pieces = self.pipe.preprocess(recording := Recording(source), 16_000, self.limit_seconds)
        self.jobs[job := Job(recording, pieces)] = None
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self.run())
        return job

    async def follow(self, job: Job, request: Request) -> AsyncIterator[Piece]:
        """The pieces of a job as they are decoded; it is forgotten at the end, whatever that is.

        Raises:
            HTTPException: for audio that cannot be read, a failure, or a client that is gone.
        """
        try:
            while not await request.is_disconnected():
                try:
                    event = await asyncio.wait_for(job.events.get(), 1.0)
                except TimeoutError:
                    continue
                if isinstance(event, HTTPException):
                    raise event
                if event is None:
                    return
                yield event
            raise HTTPException(499, "the client is gone")
        finally:
            self.jobs.pop(job, None)

    async def run(self) -> None:
        """Decode until there are no jobs."""
        while self.jobs:
            for job, event in await asyncio.to_thread(self.round, list(self.jobs)):
                job.events.put_nowait(event)
                if not isinstance(event, Piece):
                    self.jobs.pop(job, None)

    def round(self, jobs: list[Job]) -> list[tuple[Job, Event]]:
        """Read and decode one batch with pieces of every job; the events in order."""
        events: list[tuple[Job, Event]] = []
        try:
            for job in jobs:
                try:
                    pieces = list(islice(job.pieces, max(1, PIECES // len(jobs))))
                    events += [(job, piece) for piece in pieces or [None]]
                except AudioError as error:
                    events.append((job, HTTPException(400, str(error))))
            self.pipe._forward([piece for _, piece in events if isinstance(piece, Piece)])
        except Exception as error:  # whatever it is: these requests fail, the next go on
            logger.exception("a batch failed")
            failure = HTTPException(500, f"decoding failed: {type(error).__name__}")
            return [(job, failure) for job in jobs]
        finals = [(job, e.final() if isinstance(e, Piece) else [e]) for job, e in events]
        return [(job, event) for job, final in finals for event in final]


def timed(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The chunks of a result in OpenAI's form, with the confidence of the CTC head."""
    rows = [(c["text"], *c["timestamp"], c["confidence"]) for c in result["chunks"]]
    names = (name, "start", "end", "confidence")
    return [{"id": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(rows)]


def answer(pipe: Any, recording: Recording, kind: str, by: list[Unit], language: str) -> Response:
    """The response to a request whose pieces are all decoded, with the flags of ours."""
    result = pipe.postprocess(recording, return_timestamps=kind not in ("json", "text"))
    if kind in ("text", "srt", "vtt"):
        return PlainTextResponse(render(result, "txt" if kind == "text" else kind))
    if kind == "verbose_json":
        result |= {"task": "transcribe", "language": language, "segments": timed(result, "text")}
        del result["chunks"]
        if "word" in by:
            result["words"] = timed(pipe.postprocess(recording, return_timestamps="word"), "word")
    return JSONResponse(result)


def event(**data: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


def create_app(
    pipe: Any, name: str, queue: int = 64, max_mb: int = 200, limit_seconds: float = 14_400
) -> FastAPI:
    """The endpoint of one model.

    Args:
        pipe: see `load_pipeline`.
        name: what the model is called in requests; "whisper-1" is taken too.
        queue: requests that may wait or be decoded; more are answered 429.
        max_mb: larger uploads are answered 413.
        limit_seconds: longer recordings are answered 400.
    """
    worker, key = Worker(pipe, limit_seconds, queue), os.environ.get("TINY_AUDIO_API_KEY", "")

    app = FastAPI(title="tiny-audio")

    @app.middleware("http")
    async def gate(request: Request, follow: Any) -> Response:
        """Look at key and size before a byte of the body is read."""
        given, size = (request.headers.get(k, "") for k in ("authorization", "content-length"))
        refused = None
        if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            refused = 401, "wrong or no bearer key"
        elif not size.isdigit() or int(size) > max_mb * 1_000_000:
            refused = 413, f"the body's length must be stated, and at most {max_mb} MB"
        if refused and request.method == "POST":
            return JSONResponse({"error": {"message": refused[1]}}, refused[0])
        return await follow(request)

    @app.exception_handler(HTTPException)
    def failed(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": {"message": error.detail}}, error.status_code, error.headers)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": len(worker.jobs)}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": 0, "owned_by": "tiny-audio"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(
        request: Request,
        file: UploadFile,
        model: Annotated[str, Form()],
        response_format: Annotated[Format, Form()] = "json",
        stream: Annotated[bool, Form()] = False,
        language: Annotated[str, Form()] = "",
        prompt: Annotated[str, Form()] = "",
        temperature: Annotated[float, Form()] = 0.0,
        by: Annotated[list[Unit], Form(alias="timestamp_granularities[]")] = [],  # noqa: B006
    ) -> Response:
        if model not in (name, "whisper-1"):
            raise HTTPException(404, f"no model {model!r} here; this one is {name!r}")
        if prompt or temperature or (stream and response_format != "json"):
            raise HTTPException(400, "prompt, temperature, streams other than json: not supported")
        pieces = worker.follow(job := worker.add(file.file), request)
        if not stream:
            async for _ in pieces:
                pass
            return answer(pipe, job.recording, response_format, by, language)
        first = await anext(pieces)  # what cannot be read is a 400, not a stream

        async def events() -> AsyncIterator[str]:
            yield event(type="transcript.text.delta", delta=first.text)
            try:
                async for piece in pieces:
                    if piece.text:
                        yield event(type="transcript.text.delta", delta=" " + piece.text)
                yield event(type="transcript.text.done", **pipe.postprocess(job.recording))
            except HTTPException as error:
                yield event(error={"message": error.detail, "code": error.status_code})
            finally:
                worker.jobs.pop(job, None)

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="tiny-audio serve", description=__doc__)
    parser.add_argument("model", nargs="?", default="outputs/quickstart")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--queue", type=int, default=64, help="requests taken in at once")
    parser.add_argument("--max-mb", type=int, default=200, help="of an upload")
    parser.add_argument("--max-minutes", type=float, default=240, help="of a recording")
    args = parser.parse_args(argv)
    pipe, name = load_pipeline(args.model, args.device), Path(args.model).name
    app = create_app(pipe, name, args.queue, args.max_mb, 60 * args.max_minutes)
    print(f"http://{args.host}:{args.port}/docs", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0
