"""`tiny-audio serve MODEL`: serve an HTTP endpoint with OpenAI's transcription routes.

Waiting requests are decoded together. Each round takes the next pieces of every request, so a long
recording does not block the others. If TINY_AUDIO_API_KEY is set, requests need it as bearer key.
"""

import asyncio
import hmac
import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteError

from ..asr.asr_audio import AudioError
from ..asr.asr_config import DECODE
from ..asr.asr_pipeline import Piece, Recording
from ..errors import one_line
from ..loading import load_pipeline
from . import parser_of
from .formats import render
from .transcribe import DECODE_HELP, TERMS_HELP, read_terms

Format = Literal["json", "text", "srt", "vtt", "verbose_json"]
Unit = Literal["word", "segment"]
EXTRA_PIECES = 3  # pieces in a round beyond one per request, shared among the requests


class Worker:
    """Decodes the pieces of all requests together, one batch at a time."""

    def __init__(self, pipe: Any, limit_seconds: float, queue: int) -> None:
        self.pipe, self.limit_seconds, self.queue = pipe, limit_seconds, queue
        _, self.options, _ = pipe.settings()  # how to decode, names to prefer
        self.requests = 0  # accepted and not answered yet
        self.waiting: list[tuple[list[Piece], asyncio.Future]] = []
        self.task: asyncio.Task | None = None

    async def pieces(self, recording: Recording, request: Request) -> AsyncIterator[Piece]:
        """Yield the pieces of a request as they are decoded, while its client is connected.

        Raises:
            HTTPException: if the queue is full, the audio is unreadable, decoding fails, or the
                client has disconnected.
        """
        if self.requests >= self.queue:
            raise HTTPException(429, "the queue is full", {"Retry-After": "1"})
        cut = self.pipe.preprocess(recording, limit_seconds=self.limit_seconds)
        self.requests += 1
        try:
            while some := await asyncio.to_thread(
                list, islice(cut, 1 + EXTRA_PIECES // self.requests)
            ):
                for piece in await self.decode(some, request):
                    yield piece
        except AudioError as error:
            raise HTTPException(400, str(error)) from error
        finally:
            self.requests -= 1

    async def decode(self, pieces: list[Piece], request: Request) -> list[Piece]:
        """Decode pieces together with those of other requests, in place, and return them."""
        self.waiting.append((pieces, done := asyncio.get_running_loop().create_future()))
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self.run())
        while not (await asyncio.wait({done}, timeout=1.0))[0]:
            if await request.is_disconnected():
                raise HTTPException(499, "the client has disconnected")
        if error := done.result():
            raise HTTPException(500, f"decoding failed: {type(error).__name__}")
        return pieces

    async def run(self) -> None:
        """Decode until nothing is waiting."""
        while self.waiting:
            batch, self.waiting, error = self.waiting, [], None
            try:
                todo = [piece for pieces, _ in batch for piece in pieces]
                await asyncio.to_thread(self.pipe._forward, todo, **self.options)
            except Exception as caught:  # fail these requests and keep serving
                logging.getLogger(__name__).exception("a batch failed")
                error = caught
            for _, done in batch:
                done.set_result(error)


def timed(chunks: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Convert chunks to OpenAI's format, with our confidence; `name` is the key of the text."""
    rows = [(c["text"], *c["timestamp"], c["confidence"]) for c in chunks]
    names = (name, "start", "end", "confidence")
    return [{"id": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(rows)]


def answer(pipe: Any, recording: Recording, kind: str, by: list[Unit], language: str) -> Response:
    """Build the response to a request whose pieces are all decoded, including our own flags."""
    result = pipe.postprocess(recording, return_timestamps=kind not in ("json", "text"))
    if kind in ("text", "srt", "vtt"):
        return PlainTextResponse(render(result, "txt" if kind == "text" else kind))
    if kind == "verbose_json":
        segments = timed(result.pop("chunks"), "text")
        result |= {"task": "transcribe", "language": language, "segments": segments}
        if "word" in by:
            result["words"] = timed(pipe.postprocess(recording, "word")["chunks"], "word")
    return JSONResponse(result)


def event(**data: Any) -> str:
    """Format a server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


async def stream_events(
    pipe: Any, recording: Recording, first: Piece, pieces: AsyncIterator[Piece]
) -> AsyncIterator[str]:
    """Yield the text of each piece as it is decoded, starting with `first`; then the whole text."""
    yield event(type="transcript.text.delta", delta=first.text)
    begun = bool(first.text)
    try:
        async for piece in pieces:
            if piece.text:
                delta = f" {piece.text}" if begun else piece.text
                yield event(type="transcript.text.delta", delta=delta)
                begun = True
        yield event(type="transcript.text.done", **pipe.postprocess(recording))
    except HTTPException as error:
        yield event(error={"message": error.detail, "code": error.status_code})


def refusal(message: str, status: int, param: str | None = None, headers: Any = None) -> Response:
    """Build an error response in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": str(status)}
    return JSONResponse({"error": error}, status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's format, including those raised by FastAPI itself."""

    @app.exception_handler(StarletteError)
    def failed(request: Request, error: StarletteError) -> Response:
        return refusal(error.detail, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    def broken(request: Request, error: Exception) -> Response:
        return refusal(f"the server failed: {one_line(error)}", 500)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return refusal(f"{name}: {first['msg']}", 400, param=name)


class Gate:
    """Checks the key and size of a POST request before `app` reads its body.

    Args:
        app: the ASGI application behind the gate.
        key: the required bearer key; "" requires none.
        most: maximum size of a body in bytes, also without a Content-Length.
    """

    def __init__(self, app: Any, key: str, most: int) -> None:
        self.app, self.key, self.most = app, key, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request, as an ASGI application."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        headers, size = Request(scope).headers, 0
        given, stated = (headers.get(k, "") for k in ("authorization", "content-length"))
        too_large = f"the upload is too large: at most {self.most / 1e6:.0f} MB"
        if self.key and not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            return await refusal("wrong or missing bearer key", 401)(scope, receive, send)
        if stated.isdigit() and int(stated) > self.most:
            return await refusal(too_large, 413)(scope, receive, send)

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most:
                raise HTTPException(413, too_large)
            return message

        await self.app(scope, counted, send)


def create_app(
    pipe: Any,
    name: str,
    queue: int = 64,
    max_mb: int = 200,
    limit_seconds: float = 14_400,
    cors: Sequence[str] = (),
) -> Any:
    """Create the endpoint of one model, an ASGI application.

    Args:
        pipe: see `load_pipeline`.
        name: the model's name in requests; "whisper-1" works too.
        queue: maximum number of requests in progress; further ones get status 429.
        max_mb: maximum size of an upload; larger ones get status 413.
        limit_seconds: maximum length of a recording; longer ones get status 400.
        cors: origins of web pages that may call this endpoint; "*" allows all.
    """
    worker = Worker(pipe, limit_seconds, queue)
    about = {"id": name, "object": "model", "created": 0, "owned_by": "tiny-audio"}
    app = FastAPI(title="tiny-audio")
    add_error_handlers(app)

    @app.get("/", response_class=PlainTextResponse)
    def root() -> str:
        return f"tiny-audio, model {name}: see /docs\n"

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": worker.requests}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{model}")
    def one_model(model: str) -> dict[str, Any]:
        check_model(model)
        return about

    def check_model(model: str) -> None:
        if model not in (name, "whisper-1"):
            raise HTTPException(404, f"no model {model!r} here; this one is {name!r}")

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
        by_name: Annotated[list[Unit], Form(alias="timestamp_granularities")] = [],  # noqa: B006
    ) -> Response:
        check_model(model)
        if stream and response_format != "json":
            raise HTTPException(400, "stream needs response_format=json")
        recording = Recording(file.file)
        for key, value in (("prompt", prompt), ("temperature", temperature)):
            recording.notes += [f"{key} has no effect"] if value else []
        pieces = worker.pieces(recording, request)
        first = await anext(pieces)  # unreadable audio gets a 400 instead of a stream
        if not stream:
            async for _ in pieces:
                pass
            return answer(pipe, recording, response_format, [*by, *by_name], language)

        events = stream_events(pipe, recording, first, pieces)
        return StreamingResponse(events, media_type="text/event-stream")

    gate = Gate(app, os.environ.get("TINY_AUDIO_API_KEY", ""), max_mb * 1_000_000)
    return CORSMiddleware(gate, cors, allow_methods=["*"], allow_headers=["*"]) if cors else gate


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted."""
    parser = parser_of("tiny-audio serve", __doc__)
    parser.add_argument("model", nargs="?", default="outputs/quickstart")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, local only")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best one")
    parser.add_argument("--decode", choices=DECODE, help=DECODE_HELP)
    parser.add_argument("--terms", type=read_terms, metavar="FILE", help=TERMS_HELP)
    parser.add_argument("--queue", type=int, default=64, help="maximum requests in progress")
    parser.add_argument("--max-mb", type=int, default=200, help="size limit of an upload")
    parser.add_argument("--max-minutes", type=float, default=240, help="limit of a recording")
    parser.add_argument(
        "--cors", nargs="+", metavar="ORIGIN", default=[], help="allowed web pages; * allows all"
    )
    args = parser.parse_args(argv)
    pipe = load_pipeline(args.model, args.device, args.decode, args.terms)
    name = Path(args.model).resolve().name
    app = create_app(pipe, name, args.queue, args.max_mb, 60 * args.max_minutes, args.cors)
    print(f"http://{args.host}:{args.port}/docs", flush=True)
    uvicorn.run(
        app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=5
    )
    return 0
