"""A server's answers to a merged folder's prompts are compared, and what is wrong with it named."""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from unislu_llm.cli import main

ROWS: list[Any] = [
    {"id": "a", "task": None, "prompt": "p", "answer": "yes", "max_tokens": 9, "margin": 3},
    {"id": "b", "task": "sa", "prompt": "q", "answer": "[S]Good", "max_tokens": 8, "margin": 0.2}]


def text(said: str) -> Any:
    return {"choices": [{"text": said}]}


def right(body: Any) -> Any:
    return text(ROWS["pq".index(body["prompt"])]["answer"])


def serve(answer: Any) -> str:
    """Address of a server of the completions API; an `answer` that is a number is a status."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"] or 0)
            said = answer(json.loads(self.rfile.read(size))) if size else {"data": [{"id": "m"}]}
            self.send_response(said if isinstance(said, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())
        do_GET = do_POST  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # of a client that has gone
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "grammar").mkdir()
    for name in ("all", "sa-outputs"):
        (tmp_path / "grammar" / f"{name}.gbnf").write_text(name)
    (tmp_path / "parity.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return str(tmp_path)


def test_answers_are_compared(folder: str, capsys: Any) -> None:
    asked: list[Any] = []
    assert main(["parity", folder, "--url", serve(lambda x: asked.append(x) or right(x))]) == 0
    assert "2 prompts: 0 answers differ" in capsys.readouterr().out
    assert [(x["temperature"], x["max_tokens"]) for x in asked] == [(0, 9), (0, 8)]
    command = ["parity", folder, "--url", serve(lambda x: text("[S]Great"))]
    assert main(command) == 1
    *rows, last = capsys.readouterr().out.splitlines()
    assert [(json.loads(x)["id"], json.loads(x)["from"]) for x in rows] == [("a", 0), ("b", 4)]
    assert "2 answers differ {'transcript': 1, 'sa': 1}, 0 of them at" in last
    assert main([*command, "--allowed", "1", "--close", "0.2"]) == 0
    assert main([*command, "--allowed", "1", "--close", "0.1"]) == 1


def test_each_server_has_a_field_for_grammars(folder: str) -> None:
    seen: list[Any] = []
    url = serve(lambda x: seen.append(x) or (right(x) if seen[1:] else text("no")))
    assert main(["parity", folder, "--url", url, "--grammar"]) == 0
    assert [x["grammar"] for x in seen] == ['root ::= "no"', "all", "sa-outputs"]
    assert all(x["grammar"] == x["ebnf"] == x["structured_outputs"]["grammar"] for x in seen)


@pytest.mark.parametrize(("command", "answer", "said"), [
    ("{0} --url {1}", lambda x: {"choices": []}, "not the API of OpenAI"),
    ("{0} --url {1}", lambda x: 500, "answers 500: b'500'"),
    ("{0} --url {1} --grammar", right, "told to say 'no', it says 'yes'"),
    ("{0} --url {1} --model n", right, "serves m; name one"),
    ("{0} --url {1} --timeout 0.2", lambda x: time.sleep(1), "--timeout enough"),
    ("{0} --url http://127.0.0.1:9/v1", right, "is a server there"),
    ("{0} --model m", right, "add its --url"),
    ("{0} --close nan", right, "--close must be 0 or more"),
    ("missing", right, "unislu export MODEL --out FOLDER --merged")])
def test_faults_are_named(command: str, answer: Any, said: str, folder: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["parity", *command.format(folder, serve(answer)).split()])
    assert said in capsys.readouterr().err


def test_a_row_that_is_none_is_named(folder: str, capsys: Any) -> None:
    Path(folder, "parity.jsonl").write_text(f"{json.dumps(ROWS[0])}\n\n[]\n")
    with pytest.raises(SystemExit, match="2"):
        main(["parity", folder, "--url", serve(right)])
    assert "parity.jsonl, row 2: TypeError: " in capsys.readouterr().err
