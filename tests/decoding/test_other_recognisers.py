"""Recognisers beside transformers' Whisper: CTranslate2's, and servers with OpenAI's API."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import soundfile

from tests.decoding.common import Build, noise
from tests.tiny import make_llm, make_tokenizer
from unislu_llm.data.audio import load
from unislu_llm.decoding.hypotheses import load_recogniser
from unislu_llm.decoding.other_recognisers import CTranslate2Recogniser
from unislu_llm.decoding.predict import understand
from unislu_llm.decoding.recogniser import WhisperRecogniser
from unislu_llm.errors import UserError

SPEECH = "tests/data_files/librivox.flac"
Serve = Callable[..., tuple[str, list[bytes]]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a server with one answer; gives its URL and the list of what it was sent."""
    servers = list[ThreadingHTTPServer]()
    monkeypatch.setenv("OPENAI_API_KEY", "key")

    def start(answer: Any, status: int = 200) -> tuple[str, list[bytes]]:
        sent = list[bytes]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                head = f"{self.path} {self.headers['Authorization']}\n".encode()
                sent.append(head + self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(status)
                if status == 307:  # to where no audio may go
                    self.send_header("Location", "/v2")
                self.end_headers()
                text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                """Of no use here."""

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1", sent

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_makes_hypotheses_where_the_user_says_so(serve: Serve,
                                                          tiny_speech_llm: Build) -> None:
    parts = [{"no_speech_prob": 0.1, "avg_logprob": -0.5}, {"no_speech_prob": 0.3,
                                                            "avg_logprob": -0.1}]
    url, sent = serve({"text": " Hello  there", "segments": parts})
    model = tiny_speech_llm(hypothesis="manifest", recogniser=url)
    clips = [(noise(1)[0].numpy(), 16_000), (noise(1)[0].numpy()[:9000], 16_000)]
    with pytest.raises(UserError, match=r"your audio would go: give that address by --recogniser"):
        understand(model, clips)
    assert not sent
    answers = understand(model, clips, recogniser=f"{url}#large")
    assert [a.hypothesis for a in answers] == ["hello there"] * 2
    assert answers[0].evidence is not None
    assert answers[0].evidence.no_speech == pytest.approx(0.2)
    assert answers[0].evidence.log_prob == pytest.approx(-0.3)
    assert len(sent) == 2
    assert sent[0].startswith(b"/v1/audio/transcriptions Bearer key\n")
    for field, value in (("model", "large"), ("language", "en")):
        assert f'name="{field}"\r\n\r\n{value}\r\n'.encode() in sent[0]
    assert sorted(soundfile.info(
        io.BytesIO(body[body.index(b"fLaC"):])).frames for body in sent) == sorted(
        len(wave) for wave, _ in clips)


@pytest.mark.parametrize(("answer", "status", "message"), [
    ({"error": "no such model"}, 404, r"answers 404: \{\"error\": \"no such model\"\}; .*#MODEL"),
    (b"<html>", 200, "answers no JSON: <html>"),
    ({"txt": "hello"}, 200, "answers something else than a transcription"),
    ([1], 200, "answers something else than a transcription"),
    ({"text": None}, 200, "answers something else than a transcription"),
    (b"[" * 99_999, 200, "answers something else than a transcription"),
    ({}, 307, "answers 307: /v2$"),
])
def test_what_a_server_does_wrong_is_one_error(answer: Any, status: int, message: str,
                                               serve: Serve) -> None:
    url, sent = serve(answer, status)
    with pytest.raises(UserError, match=f"{url} {message}"):
        load_recogniser(url)(noise(1), "en")
    assert len(sent) == 1


def test_a_server_that_is_not_there_is_one_error() -> None:
    with pytest.raises(UserError, match="`ctc` need a saved model"):
        load_recogniser("http://127.0.0.1:9/v1", "ctc")
    with pytest.raises(UserError, match=r"cannot be asked .*; is it the address up to /v1"):
        load_recogniser("http://127.0.0.1:9/v1")(noise(1), "en")


def test_ctranslate2_takes_whisper_alone_and_says_what_it_needs(
        tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ctranslate2")
    tokenizer = make_tokenizer()
    make_llm("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a llama, and ctranslate2: runs Whisper"):
        load_recogniser(f"ctranslate2:{tmp_path}")
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(UserError, match=r"pip install 'unislu_llm\[fast\]'"):
        CTranslate2Recogniser("openai/whisper-base")


@pytest.mark.weights
def test_ctranslate2_says_what_transformers_says() -> None:
    pytest.importorskip("ctranslate2")
    speech = load(SPEECH)
    clips = [speech, speech[:48_000]]
    ours, its = (kind("openai/whisper-base")(clips, "en")
                 for kind in (WhisperRecogniser, CTranslate2Recogniser))
    assert [t.text for t in its] == [t.text for t in ours]
    for mine, other in zip(ours, its, strict=True):
        assert mine.evidence is not None
        assert other.evidence is not None
        assert other.evidence.language == mine.evidence.language == "en"
        assert other.evidence.no_speech == pytest.approx(mine.evidence.no_speech, abs=0.05)
        assert other.evidence.log_prob == pytest.approx(mine.evidence.log_prob, abs=0.1)
