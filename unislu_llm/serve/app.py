"""The routes of `unislu serve`, what stands before them, and the process."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

import prometheus_client as prometheus
import python_multipart  # noqa: F401  FastAPI asks for it late
import torch
import uvicorn
from fastapi import FastAPI, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from torch import Tensor
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from unislu_llm.config import DecodeConfig
from unislu_llm.data import audio
from unislu_llm.decoding.answer import Answer
from unislu_llm.decoding.files import as_json
from unislu_llm.decoding.phrases import Phrases
from unislu_llm.decoding.predict import understand
from unislu_llm.errors import UserError, dotted, explain
from unislu_llm.models.base import SLUModel
from unislu_llm.run_folder import find_run, load_model
from unislu_llm.serve import Serving
from unislu_llm.serve.queue import BUSY, STOPPING, Queue
from unislu_llm.text_files import read_text

_LOCAL = ("127.0.0.1", "localhost", "::1")
_VALUES = 2 * 96_000  # frames times channels that count as a second: stereo at 96 kHz
_FORM: Any = {"max_files": 16, "max_fields": 64, "max_part_size": 1 << 20}  # a list of phrases
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


class Transcription(BaseModel):
    """OpenAI's form. Others of its fields, as `prompt` and `temperature`, change nothing."""

    file: list[UploadFile]
    model: str
    language: str = ""
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    stream: bool = False
    include: Annotated[list[str], Field(alias="include[]")] = []
    granularities: Annotated[list[str], Field(alias="timestamp_granularities[]")] = []


def _phrases(given: list[str]) -> list[str]:
    """Phrases of a form: one a line as in a file, or JSON lists. Raises ValueError: they are none,
    before they wait with others."""
    found: list[Any] = []
    for text in given:
        found += from_json(text) if text.lstrip().startswith("[") else [
            line for line in text.split("\n") if line.strip() and line.lstrip()[0] != "#"]
    if not all(isinstance(text, str) for text in found):
        raise ValueError("is no list of strings")
    Phrases.of(found, 1.0)
    return found


class Understanding(BaseModel, extra="forbid"):
    """Options of `unislu predict`, for one file or several."""

    file: list[UploadFile]
    model: str = ""
    tasks: list[str] = ["all"]
    language: str = ""
    n_best: int = 1
    num_beams: Annotated[int, Field(ge=1, le=8)] = 1  # they cost memory
    transcript: Literal["rewrite", "verbatim"] | None = None
    grounded: bool = False
    no_speech: Annotated[float, Field(ge=0, le=1)] = 0.6
    confidences: bool = False
    phrases: Annotated[list[str], AfterValidator(_phrases)] = []
    phrase_boost: Annotated[float, Field(ge=0, le=1e6)] = 2.0


class Service:
    """Answers requests for a model; :attr:`app` is the ASGI application. Where there is a token,
    all but `/health` want it."""

    def __init__(self, model: SLUModel, name: str, how: Serving, token: str = "") -> None:
        self._model, self._name, self._how, self._token = model, name, how, token
        own = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter("unislu_requests", "", ["path", "code"], registry=own)
        self._latency = prometheus.Histogram("unislu_request_seconds", "", ["path"], registry=own,
                                             buckets=(.1, .2, .5, 1, 2, 5, 10, 20, 50, 100))
        sizes = prometheus.Summary("unislu_batch_size", "", registry=own)
        seconds = prometheus.Counter("unislu_audio_seconds", "", registry=own)

        def decode(clips: Sequence[Tensor], how: Mapping[str, Any]) -> list[Answer]:
            sizes.observe(len(clips))
            seconds.inc(sum(map(len, clips)) / audio.SAMPLE_RATE)
            return understand(model, [(clip, audio.SAMPLE_RATE) for clip in clips], **how)

        self.queue = queue = Queue(decode, how.batch_size)
        prometheus.Gauge("unislu_waiting", "", registry=own).set_function(lambda: len(queue))
        # Two files are read at one time: of silence, samples take much more memory than a body.
        self._readers, self._inside = ThreadPoolExecutor(2), 0
        self.app = app = FastAPI(title="unislu_llm", docs_url=None, redoc_url=None,
                                 form_limits=_FORM)
        app.get("/health", name="health")(lambda: {"status": "ok"})
        app.get("/metrics", name="metrics")(lambda: Response(
            prometheus.generate_latest(own), media_type=prometheus.CONTENT_TYPE_LATEST))
        app.get("/v1/models", name="models")(lambda: {"object": "list", "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "unislu_llm",
             "tasks": model.registry.names}]})
        most = how.max_mb * 1_000_000
        app.post("/v1/audio/transcriptions", max_body_size=most)(self.transcribe)
        app.post("/v1/understand", max_body_size=most)(self.understand)
        for kind in (HTTPException, RequestValidationError, UserError, Exception):
            app.add_exception_handler(kind, _error)
        app.middleware("http")(self._gate)

    async def _gate(self, request: Request, go_on: Callable[[Request], Awaitable[Response]]
                    ) -> Response:
        """Refuse before a body is read; count and time all."""
        start, code, fault = time.perf_counter(), 500, self._fault(request)
        self._inside += 1
        try:
            response = await (_error(request, HTTPException(*fault)) if fault else go_on(request))
            code = response.status_code
            return response
        finally:
            self._inside -= 1
            path = getattr(request.scope.get("route"), "path", "other")
            self._requests.labels(path, code).inc()
            self._latency.labels(path).observe(time.perf_counter() - start)

    def _fault(self, request: Request) -> tuple[int, str] | None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._token and request.url.path != "/health" and not hmac.compare_digest(
                given.encode("latin-1"), self._token.encode()):
            return 401, "the token is wrong or lacking; send 'Authorization: Bearer TOKEN'"
        if int(request.headers.get("content-length", 0)) > self._how.max_mb * 1_000_000:
            return 413, f"the request has over {self._how.max_mb} MB; send a shorter file"
        if self.queue.stopping and request.url.path != "/metrics":
            return STOPPING
        return BUSY if request.method == "POST" and self._inside >= self._how.max_requests else None

    async def transcribe(self, request: Request, ask: Annotated[Transcription, Form()]) -> Any:
        """The transcript of a file."""
        if ask.stream or ask.include or "word" in ask.granularities:
            raise UserError("stream, include[] and times of words are not there; leave them out")
        if len(ask.file) > 1:
            raise UserError("file: is there more than once; send a request for each")
        answer, = await self._answers(request, ask, {}, tasks=())
        return _transcription(answer, ask.response_format,
                              ask.language or self._model.config.language)

    async def understand(self, request: Request, ask: Annotated[Understanding, Form()]) -> Any:
        """What `unislu predict --json` prints of each file, in their order."""
        registry = self._model.registry
        names = [name for field in ask.tasks for name in field.split(",") if name]
        names = list(registry.names) if names == ["all"] else [registry[n].name for n in names]
        answers = await self._answers(
            request, ask, ask.model_dump(include={
                "num_beams", "transcript", "grounded", "no_speech", "phrase_boost"}),
            tasks=names, **ask.model_dump(include={"n_best", "phrases"}))
        return {"answers": [json.loads(as_json(file.filename or "", answer, ask.confidences))
                            for file, answer in zip(ask.file, answers, strict=True)]}

    async def _answers(self, request: Request, ask: Transcription | Understanding,
                       options: Mapping[str, Any], **how: Any) -> list[Answer]:
        """Answers to files of a request, which leave the queue if its sender goes away."""
        if ask.model not in ("", self._name):
            raise HTTPException(404, f"the model here is '{self._name}', not '{ask.model[:80]}'")
        decode = DecodeConfig(batch_size=self._how.batch_size, **options)
        told = None if ask.language in ("", self._model.config.language) else ask.language
        clips = await asyncio.gather(*(asyncio.get_running_loop().run_in_executor(
            self._readers, _samples, file, self._how.max_seconds) for file in ask.file))
        jobs = self.queue.submit(clips, {**how, "options": decode, "language": told})
        done: asyncio.Future[Any] = asyncio.gather(*map(asyncio.wrap_future, jobs))
        gone: asyncio.Future[Any] = asyncio.ensure_future(request.receive())  # nothing else comes
        try:
            await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise HTTPException(499, "the client has gone away")
            return done.result()
        finally:
            gone.cancel()
            done.cancel()
            for job in jobs:
                job.cancel()


def _samples(file: UploadFile, most: float) -> Tensor:
    """Samples `(samples,)` of a file at 16 kHz, which has at `most` so many seconds. Raises
    UserError: not readable, HTTPException: too long."""
    name = file.filename or "file"
    with audio.open_audio(name, file.file.read()) as sound:
        # By the header, before it takes memory; no more is read than that says.
        seconds = max(sound.frames / sound.samplerate, sound.frames * sound.channels / _VALUES)
        if seconds > most:
            raise HTTPException(413, f"{name}: has {seconds:.0f} s, over {most}; send parts of it")
        return audio.to_mono(name, audio.read_frames(name, sound, 0, sound.frames),
                             sound.samplerate)


def _transcription(answer: Answer, kind: str, language: str) -> Any:
    """In one of OpenAI's formats. Times are those of windows: there are no others."""
    parts = [{key: part[key] for key in ("start", "end", "text")} for part in answer.windows or [
        {"start": 0.0, "end": round(answer.seconds, 3), "text": answer.transcript}]]
    if kind == "json":
        return {"text": answer.transcript}
    if kind == "verbose_json":
        return {"task": "transcribe", "language": LANGUAGES.get(language, language),
                "duration": round(answer.seconds, 3), "text": answer.transcript,
                "segments": [{"id": i, **part} for i, part in enumerate(parts)],
                "warnings": answer.warnings}
    text = "WEBVTT\n\n" * (kind == "vtt") + f"{answer.transcript}\n" * (kind == "text")
    for i, part in enumerate((p for p in parts if p["text"].strip() and kind != "text"), 1):
        times = " --> ".join(f"{datetime.min + timedelta(seconds=part[key]):%H:%M:%S.%f}"[:-3]
                             for key in ("start", "end"))
        head = f"{i}\n{times.replace('.', ',')}" if kind == "srt" else times
        text += f"{head}\n{part['text'].strip()}\n\n"
    return PlainTextResponse(text)


async def _error(_: Request, error: Exception) -> JSONResponse:
    """What was raised, in OpenAI's shape."""
    if isinstance(error, RequestValidationError):
        error = explain(error, Understanding, lambda at: dotted(at[1:]))  # type: ignore[arg-type]
        error = UserError(str(error).replace("Expected UploadFile, received: <class 'str'>",
                                             "must be a file with a name (curl: -F file=@NAME)"))
    if isinstance(error, UserError):
        error = HTTPException(400, str(error).replace("\n", "; "))
    told = getattr(error, "detail", "the server failed, not the request; see the log of it")
    code = getattr(error, "status_code", 500)
    return JSONResponse({"error": {
        "message": told, "type": "server_error" if code >= 500 else "invalid_request_error",
        "param": None, "code": _CODES.get(code)}}, code,
        {"Retry-After": "5"} if code in (429, 503) else None)


class _Server(uvicorn.Server):
    queue: Queue

    async def shutdown(self, *args: Any, **kwargs: Any) -> None:
        self.queue.stop()  # before it waits for what is being answered
        await super().shutdown(*args, **kwargs)


def serve(model: str, how: Serving) -> None:
    """Serve a model until a signal comes. Raises UserError: no such model, or no token."""
    token = (read_text(how.token_file) if how.token_file else
             os.environ.get("UNISLU_TOKEN", "")).strip()
    if not token and (how.token_file or how.host not in _LOCAL):
        raise UserError(f"--host {how.host} needs a token: set UNISLU_TOKEN, or give a "
                        "--token-file that holds one")
    try:  # now, and not when the model has been loaded
        socket.create_server((how.host, how.port), family=(
            socket.AF_INET6 if ":" in how.host else socket.AF_INET)).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {how.host} --port {how.port}: give others ({error})") from error
    run = find_run(model)
    loaded = load_model(run, how.precision)
    understand(loaded, (torch.zeros(audio.SAMPLE_RATE), audio.SAMPLE_RATE))  # loads a recogniser
    service = Service(loaded, how.name or run.name, how, token)
    # A client that does not take its answer must not keep the process for ever.
    server = _Server(uvicorn.Config(service.app, host=how.host, port=how.port,
                                    timeout_graceful_shutdown=120))
    server.queue = service.queue
    server.run()
