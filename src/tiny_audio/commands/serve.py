"""`tiny-audio serve MODEL`: an HTTP endpoint with OpenAI's routes for transcription.

Requests that wait are decoded together: each round takes the next piece of every one of them, so
that a long recording holds nobody up. TINY_AUDIO_API_KEY, where set, is asked for as bearer key.
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

from ..asr.asr_config import DECODE
from ..asr.asr_pipeline import Piece, Recording
from ..asr.asr_processing import AudioError
from ..loading import load_pipeline
from . import parser_of
from .formats import render
from .transcribe import DECODE_HELP, TERMS_HELP, read_terms

Format = Literal["json", "text", "srt", "vtt", "verbose_json"]
Unit = Literal["word", "segment"]
PIECES = 3  # that a round takes, shared by the requests, beside one of each


class Worker:
    """Decodes the pieces of all requests in common batches, one batch at a time."""

    def __init__(self, pipe: Any, limit_seconds: float, queue: int) -> None:
        self.pipe, self.limit_seconds, self.queue = pipe, limit_seconds, queue
        self.requests = 0  # taken in and not answered yet
        self.waiting: list[tuple[list[Piece], asyncio.Future]] = []
        self.task: asyncio.Task | None = None

    async def pieces(self, recording: Recording, request: Request) -> AsyncIterator[Piece]:
        """The pieces of a request as they are decoded, as long as its client is there.

        Raises:
            HTTPException: for a full queue, audio that cannot be read, a failure, no client.
        """
        if self.requests >= self.queue:
            raise HTTPException(429, "the queue is full", {"Retry-After": "1"})
        cut = self.pipe.preprocess(recording, limit_seconds=self.limit_seconds)
        self.requests += 1
        try:
            while some := await asyncio.to_thread(list, islice(cut, 1 + PIECES // self.requests)):
                for piece in await self.decode(some, request):
                    yield piece
        except AudioError as error:
            raise HTTPException(400, str(error)) from error
        finally:
            self.requests -= 1

    async def decode(self, pieces: list[Piece], request: Request) -> list[Piece]:
        """Have pieces decoded together with those of other requests; the final ones."""
        self.waiting.append((pieces, done := asyncio.get_running_loop().create_future()))
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self.run())
        while not (await asyncio.wait({done}, timeout=1.0))[0]:
            if await request.is_disconnected():
                raise HTTPException(499, "the client is gone")
        if error := done.result():
            raise HTTPException(500, f"decoding failed: {type(error).__name__}")
        return [final for piece in pieces for final in piece.final()]

    async def run(self) -> None:
        """Decode until nothing waits."""
        while self.waiting:
            batch, self.waiting, error = self.waiting, [], None
            try:
                todo = [piece for pieces, _ in batch for piece in pieces]
                await asyncio.to_thread(self.pipe._forward, todo)
            except Exception as caught:  # whatever it is: these requests fail, the next go on
                logging.getLogger(__name__).exception("a batch failed")
                error = caught
            for _, done in batch:
                done.set_result(error)


def timed(chunks: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Chunks in OpenAI's form, with the confidence of the CTC head."""
    rows = [(c["text"], *c["timestamp"], c["confidence"]) for c in chunks]
    names = (name, "start", "end", "confidence")
    return [{"id": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(rows)]


def answer(pipe: Any, recording: Recording, kind: str, by: list[Unit], language: str) -> Response:
    """The response to a request whose pieces are all decoded, with the flags of ours."""
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
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


async def stream_events(
    pipe: Any, recording: Recording, first: Piece, pieces: AsyncIterator[Piece]
) -> AsyncIterator[str]:
    """Send the text of each piece as it is decoded, `first` before the others, and then all."""
    yield event(type="transcript.text.delta", delta=first.text)
    said = bool(first.text)
    try:
        async for piece in pieces:
            if piece.text:
                delta = f" {piece.text}" if said else piece.text
                yield event(type="transcript.text.delta", delta=delta)
                said = True
        yield event(type="transcript.text.done", **pipe.postprocess(recording))
    except HTTPException as error:
        yield event(error={"message": error.detail, "code": error.status_code})


def refusal(message: str, status: int, param: str | None = None, headers: Any = None) -> Response:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": str(status)}
    return JSONResponse({"error": error}, status, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's form, those that FastAPI finds by itself too."""

    @app.exception_handler(StarletteError)
    def failed(request: Request, error: StarletteError) -> Response:
        return refusal(error.detail, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return refusal(f"{name}: {first['msg']}", 400, param=name)


class Gate:
    """Looks at the key and the size of a request before `app` reads its body.

    Args:
        app: what answers the requests that pass.
        key: that requests must bear; "" asks for none.
        most: bytes of a body, whether its length is stated or not.
    """

    def __init__(self, app: Any, key: str, most: int) -> None:
        self.app, self.key, self.most = app, key, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request; an ASGI application."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        headers, size = Request(scope).headers, 0
        given, stated = (headers.get(k, "") for k in ("authorization", "content-length"))
        too_large = f"at most {self.most / 1e6:.0f} MB can be sent"
        if self.key and not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            return await refusal("wrong or no bearer key", 401)(scope, receive, send)
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
    """The endpoint of one model, an ASGI application.

    Args:
        pipe: see `load_pipeline`.
        name: what the model is called in requests; "whisper-1" is taken too.
        queue: requests that may wait or be decoded; more are answered 429.
        max_mb: larger uploads are answered 413.
        limit_seconds: longer recordings are answered 400.
        cors: origins of web pages that may call this endpoint; "*" means every one.
    """
    worker = Worker(pipe, limit_seconds, queue)
    about = {"id": name, "object": "model", "created": 0, "owned_by": "tiny-audio"}
    app = FastAPI(title="tiny-audio")
    add_error_handlers(app)

    @app.get("/", response_class=PlainTextResponse)
    def root() -> str:
        return f"tiny-audio, model {name}: how to use it is in /docs\n"

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
        first = await anext(pieces)  # what cannot be read is a 400, not a stream
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
    parser = parser_of("serve", __doc__)
    parser.add_argument("model", nargs="?", default="outputs/quickstart")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--decode", choices=DECODE, help=DECODE_HELP)
    parser.add_argument("--terms", type=read_terms, metavar="FILE", help=TERMS_HELP)
    parser.add_argument("--queue", type=int, default=64, help="requests taken in at once")
    parser.add_argument("--max-mb", type=int, default=200, help="of an upload")
    parser.add_argument("--max-minutes", type=float, default=240, help="of a recording")
    parser.add_argument(
        "--cors", nargs="+", metavar="ORIGIN", default=[], help="web pages that may call; * is all"
    )
    args = parser.parse_args(argv)
    pipe = load_pipeline(args.model, args.device, args.decode, args.terms)
    name = Path(args.model).resolve().name
    app = create_app(pipe, name, args.queue, args.max_mb, 60 * args.max_minutes, args.cors)
    print(f"http://{args.host}:{args.port}/docs", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0
