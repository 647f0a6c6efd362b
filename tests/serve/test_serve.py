"""The server: OpenAI's shape, answers as `understand` gives them, batches, limits, its end."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from unislu_llm import Answer, cli, understand
from unislu_llm.config import DecodeConfig
from unislu_llm.data.audio import from_bytes
from unislu_llm.decoding.files import as_json
from unislu_llm.decoding.phrases import Phrases
from unislu_llm.errors import UserError
from unislu_llm.serve import Serving
from unislu_llm.tasks import TaskRegistry

for extra in ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "httpx2"):
    pytest.importorskip(extra)

import httpx2  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from unislu_llm.serve import app as serve  # noqa: E402

SPEECH, TASKS = "/v1/audio/transcriptions", "/v1/understand"
WINDOWS = [{"start": 0.0, "end": 21.57, "text": ""},
           {"start": 3625.0, "end": 3630.5, "text": "in paris"}]
MODEL: Any = SimpleNamespace(registry=TaskRegistry(), config=SimpleNamespace(language="en"))


def sound(value: float = 0.1, seconds: float = 0.5, kind: str = "WAV") -> bytes:
    """A file of one value."""
    file = io.BytesIO()
    soundfile.write(file, np.full(int(16_000 * seconds), value), 16_000, format=kind)
    return file.getvalue()


def files(*contents: bytes) -> list[Any]:
    return [("file", (f"{i}.wav", content)) for i, content in enumerate(contents)]


class Stub:
    """Stands for `understand`: an answer is the clip's value, unless it is 0.5 or 0.6."""

    during: Callable[[], object] = int  # is called while it answers

    def __init__(self) -> None:
        self.batches: list[tuple[list[float], Any]] = []  # and the tasks of each

    def __call__(self, _: Any, inputs: Any, *, tasks: Any, **how: Any) -> list[Answer]:
        values = [round(float(samples[0]), 3) for samples, _ in inputs]
        self.batches.append((values, tasks))
        self.how = how
        self.during()
        if 0.5 in values or 0.6 in values:
            raise UserError("not this one") if 0.5 in values else RuntimeError("secret")
        return [Answer(str(value), 3630.5, windows=WINDOWS if value == 0.7 else [])
                for value in values]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    made = Stub()
    monkeypatch.setattr(serve, "understand", made)
    return made


def start(model: Any = MODEL, token: str = "", **how: Any) -> serve.Service:
    return serve.Service(model, "tiny", Serving(**how), token)


def client(service: serve.Service) -> TestClient:
    return TestClient(service.app, raise_server_exceptions=False)


def at_once(service: serve.Service, values: list[float]) -> list[httpx2.Response]:
    """Replies to requests that are made together."""
    async def ask() -> Any:
        async with httpx2.AsyncClient(base_url="http://x", timeout=60, transport=(
                httpx2.ASGITransport(service.app, raise_app_exceptions=False))) as its:
            return await asyncio.gather(*(its.post(TASKS, files=files(sound(v))) for v in values))

    return asyncio.run(ask())


def test_answers_are_those_of_understand(tiny_speech_llm: Callable[..., Any]) -> None:
    model, clips = tiny_speech_llm(), [sound(), sound(0.2, 0.8, "FLAC")]
    reply = client(start(model)).post(TASKS, files=files(*clips), data={
        "num_beams": "2", "n_best": "2", "tasks": "sa,ner", "confidences": "true"})
    answers = understand(model, clips, ["sa", "ner"], DecodeConfig(num_beams=2), n_best=2)
    assert reply.json()["answers"] == [json.loads(as_json(f"{i}.wav", answer, confidences=True))
                                       for i, answer in enumerate(answers)]


@pytest.mark.parametrize(("kind", "expected"), [
    ("text", "0.7\n"), ("json", {"text": "0.7"}),
    ("srt", "1\n01:00:25,000 --> 01:00:30,500\nin paris\n\n"),
    ("vtt", "WEBVTT\n\n01:00:25.000 --> 01:00:30.500\nin paris\n\n"),
    ("verbose_json", {
        "task": "transcribe", "language": "english", "duration": 3630.5, "text": "0.7",
        "segments": [{"id": i, **part} for i, part in enumerate(WINDOWS)], "warnings": []})])
def test_formats_are_openai_s(kind: str, expected: Any, stub: Stub) -> None:
    reply = client(start()).post(SPEECH, files=files(sound(0.7)), data={
        "model": "tiny", "response_format": kind, "prompt": "Names"})
    assert (reply.json() if "json" in kind else reply.text) == expected
    assert stub.batches == [([0.7], ())]


def test_phrases_are_raised(stub: Stub) -> None:
    client(start()).post(TASKS, files=files(sound()), data={
        "phrases": ["# names\r\n\n Paris", '["Dawit Isaak"]'], "phrase_boost": "3"})
    assert Phrases.of(stub.how["phrases"], stub.how["options"].phrase_boost) == (
        ("Paris", "Dawit Isaak"), 3.0)


def test_openai_s_client_transcribes(stub: Stub) -> None:
    openai = pytest.importorskip("openai")
    its = openai.OpenAI(api_key="secret", base_url="http://testserver/v1",
                        http_client=client(start(token="secret")))
    said = its.audio.transcriptions.create(model="tiny", file=("a.wav", sound(0.3)))
    assert (said.text, [model.id for model in its.models.list()]) == ("0.3", ["tiny"])


@pytest.mark.parametrize(("path", "content", "form", "status", "message"), [
    (TASKS, b"no audio", {}, 400, "0.wav: cannot be read as audio (Format not recognised.)"),
    (TASKS, sound()[:-99], {}, 400, "truncated"), (TASKS, sound(0.5), {}, 400, "not this one"),
    (TASKS, sound(0.6), {}, 500, "see the log"), ("/v1/x", sound(), {}, 404, "Not Found"),
    (TASKS, sound(), {"tasks": "nerr"}, 400, "unknown task 'nerr'"),
    (TASKS, sound(), {"num_beams": "9", "beams": "2"}, 400, "beams: unknown key"),
    (SPEECH, sound(), {"model": "tiny", "stream": "true"}, 400, "stream"),
    (SPEECH, sound(), {"model": "whisper-1"}, 404, "the model here is 'tiny'"),
    (SPEECH, [sound(), sound()], {"model": "tiny"}, 400, "file: is there more than once"),
    (TASKS, "a.wav", {}, 400, "file[0]: must be a file with a name (curl: -F file=@NAME)"),
    (TASKS, sound(), {"phrases": '["Paris", 1]'}, 400, "phrases: is no list of strings"),
    (TASKS, sound(), {"phrases": "[" * 9999}, 400, "phrases: recursion limit exceeded"),
    (TASKS, sound(), {"phrases": "Paris\n!"}, 400, "phrases: phrases[1]: a phrase has a letter"),
    (TASKS, bytes(1_000_001), {}, 413, "over 1 MB"),
    (TASKS, iter([b"--x\r\n", bytes(1_000_001)]), {}, 413, "Too Large"),
    (TASKS, sound(0.0, 21, "FLAC"), {}, 413, "has 21 s, over 20")])
def test_what_is_wrong_is_one_sentence(path: str, content: Any, form: Any, status: int,
                                       message: str, stub: Stub) -> None:
    # An iterator is a body whose length nobody says.
    sent: Any = {"data": {**form, "file": content}} if isinstance(content, str) else {
        "files": files(*content if isinstance(content, list) else [content]), "data": form}
    if isinstance(content, Iterator):
        sent = {"content": content, "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    reply = client(start(max_mb=1, max_seconds=20)).post(path, **sent)
    error = reply.json()["error"]
    assert (reply.status_code, message in error["message"]) == (status, True), error
    assert error["type"] == ("server_error" if status == 500 else "invalid_request_error")


def test_a_token_is_wanted_where_there_is_one() -> None:
    own = client(start(token="geheim-ü"))
    for given in ("", "Bearer x", "Bearer"):
        reply = own.get("/metrics", headers={"Authorization": given})
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert own.get("/health").is_success
    assert own.get("/metrics", headers={"Authorization": "Bearer geheim-ü".encode()}).is_success


def test_requests_are_decoded_together_and_answered_apart(stub: Stub) -> None:
    service, values = start(batch_size=8), [i / 1000 for i in range(1, 201)]
    replies = at_once(service, values)
    assert [reply.json()["answers"][0]["text"] for reply in replies] == [*map(str, values)]
    sizes = [len(batch) for batch, _ in stub.batches]
    assert (sum(sizes), max(sizes)) == (200, 8)
    text = client(service).get("/metrics").text
    for line in ('requests_total{code="200",path="/v1/understand"} 200.0', "waiting 0.0",
                 f"batch_size_count {len(sizes)}.0", "audio_seconds_total 100.0"):
        assert f"unislu_{line}\n" in text
    faulty = at_once(service, [0.2, 0.5, 0.3, 0.6, 0.4])  # take no other with them
    assert [reply.status_code for reply in faulty] == [200, 400, 200, 500, 200]


def test_batches_are_of_equal_options_and_like_lengths(stub: Stub) -> None:
    queue, gate = start(batch_size=2).queue, threading.Event()
    stub.during = gate.wait
    for n, tasks in ((1, ()), (1, ("sa",)), (4, ("sa",)), (2, ("ner",)), (2, ("sa",))):
        last, = queue.submit([from_bytes(sound(n / 10, n / 10), "")], {"tasks": tasks})
        if tasks == ("ner",):
            last.cancel()
        while not stub.batches:  # the first one is being decoded
            time.sleep(0.01)
    assert len(queue) == 3
    gate.set()
    last.result(20)
    while len(stub.batches) < 3:
        time.sleep(0.01)
    assert stub.batches == [([0.1], ()), ([0.1, 0.2], ("sa",)), ([0.4], ("sa",))]


def test_who_goes_away_is_not_decoded(stub: Stub) -> None:
    service, gate = start(), threading.Event()
    stub.during = gate.wait
    first, = service.queue.submit([from_bytes(sound(), "")], {"tasks": ()})
    request = httpx2.Request("POST", f"http://x{TASKS}", files=files(sound(0.2)))
    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": request.read()}]
    scope = {"type": "http", "method": "POST", "path": TASKS, "query_string": b"",
             "headers": [(key.lower(), value) for key, value in request.headers.raw]}

    async def channel(*sent: Any) -> Any:
        return None if sent else messages.pop()

    asyncio.run(service.app(scope, channel, channel))
    gate.set()
    first.result(20)
    assert 'code="499"' in client(service).get("/metrics").text
    assert [batch for batch, _ in stub.batches] == [[0.1]]


def test_it_takes_so_many_and_ends_with_those_in_decoding(stub: Stub) -> None:
    service = start(max_requests=2, batch_size=1)

    def stop() -> None:
        while not len(service.queue):  # the second one
            time.sleep(0.01)
        service.queue.stop()

    stub.during = stop
    replies = at_once(service, [0.1, 0.2, 0.3])
    assert sorted(reply.status_code for reply in replies) == [200, 429, 503]
    assert all(int(reply.headers["Retry-After"]) > 0 for reply in replies if reply.is_error)
    assert len(stub.batches) == 1
    assert client(service).get("/health").status_code == 503


@pytest.mark.parametrize(("args", "message"), [
    (["--host", "0.0.0.0"], "needs a token"),
    (["--port", "65536"], "--host 127.0.0.1 --port 65536: give"),
    ([], "pip install 'unislu_llm[serve]'"), (["--batch-size", "0"], "1 or more"),
    (["--token-file", "x"], "x cannot be read")])
def test_the_command_refuses_before_it_loads(args: list[str], message: str, capsys: Any,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    if not args:  # as if something were not installed
        monkeypatch.delattr("unislu_llm.serve.app")
        monkeypatch.setitem(sys.modules, "unislu_llm.serve.app", None)
    assert cli.main(["serve", "nowhere", *args]) == 2
    assert message in capsys.readouterr().err
