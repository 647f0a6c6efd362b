"""Whether a merged folder's parity prompts are answered as by the model that it was made of. It has
a copy of this file, which imports nothing of unislu_llm for that."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def parity(argv: Sequence[str] | None = None, prog: str | None = "unislu parity") -> int:
    """Ask a server, or transformers, a merged folder's parity prompts, and count what differs."""
    parser = argparse.ArgumentParser(prog=prog, description=parity.__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="of `unislu export --merged`")
    add("--url", help="OpenAI-compatible server: http://127.0.0.1:8000/v1 (default: transformers)")
    add("--model", help="its name there (default: the only one that there is)")
    add("--grammar", action="store_true", help="have the server keep to the tasks' grammar")
    add("--allowed", type=int, default=0, help="answers that may differ; exit status 1 above (0)")
    add("--close", type=float, default=0.001, help="count none of a margin up to this (0.001 nats)")
    add("--timeout", type=float, default=120, help="seconds for an answer (120)")
    args = parser.parse_args(argv)
    if (args.grammar or args.model) and not args.url:
        parser.error("--grammar and --model are of a server; add its --url")
    if args.allowed < 0 or not (args.close >= 0 and args.timeout > 0):  # NaN neither
        parser.error("--allowed and --close must be 0 or more, --timeout above 0")
    differ, file, far, n = [], args.folder / "parity.jsonl", 0, 0
    try:
        rows = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line.strip()]
        ask = (_server if args.url else _transformers)(args, rows[0], parser.error)
        for n, row in enumerate(rows, 1):  # noqa: B007  the message needs it
            if (found := ask(row)) != row["answer"]:
                place = len(os.path.commonprefix([found, row["answer"]]))  # noqa: RUF071
                differ.append(row)
                far += row["margin"] > args.close
                # As JSON: no text of a server steers a terminal.
                print(json.dumps({key: row[key] for key in ("id", "task", "margin", "answer")}
                                 | {"found": found, "from": place}), flush=True)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        parser.error(f"{file}{f', row {n}' * bool(n)}: {type(error).__name__}: {error}; `unislu "
                     "export MODEL --out FOLDER --merged` writes it")
    tasks = dict(Counter(row["task"] or "transcript" for row in differ))
    print(f"{len(rows)} prompts: {len(differ)} answers differ{f' {tasks}' * bool(tasks)}, "
          f"{len(differ) - far} of them at a call of at most {args.close:g} nats")
    return int(far > args.allowed)


def _transformers(args: Any, *_: Any) -> Callable[[Any], str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(args.folder)
    llm: Any = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)

    def ask(row: Any) -> str:
        prompt = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        answer = llm.generate(prompt, max_new_tokens=row["max_tokens"])[0, prompt.shape[1]:]
        return str(tokenizer.decode(answer, skip_special_tokens=True,
                                    clean_up_tokenization_spaces=False))
    return ask


def _server(args: Any, first: Any, fail: Callable[[str], Any]) -> Callable[[Any], str]:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    def call(what: str, read: Callable[[Any], Any], body: Any = None) -> Any:
        url = f"{args.url.rstrip('/')}/{what}"
        try:
            request = Request(url, body and json.dumps(body).encode(), {
                "Content-Type": "application/json"})
            request.add_unredirected_header(  # no other server is to have the key
                "Authorization", f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}")
            with urlopen(request, timeout=args.timeout) as reply:
                return read(json.loads(reply.read(1 << 20)))
        except HTTPError as error:
            fail(f"{url} answers {error.code}: {error.read(300)!r}; --url ends in /v1")
        except (OSError, HTTPException) as error:
            fail(f"{url}: {error}; is a server there, and --timeout enough?")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            fail(f"{url}: {error!r}: not the API of OpenAI; its address ends in /v1")

    def ask(row: Any, grammar: str = "") -> str:
        # llama-cpp-python penalises what is repeated unless it is told not to.
        body = {"model": name, "prompt": row["prompt"], "max_tokens": row["max_tokens"],
                "temperature": 0, "repeat_penalty": 1.0}
        if args.grammar:  # in the fields of llama.cpp, SGLang and vLLM, which pass over the others'
            stem = f"{row['task']}-outputs" if row["task"] else "all"
            text = grammar or (args.folder / f"grammar/{stem}.gbnf").read_text("utf-8")
            body |= {"grammar": text, "ebnf": text, "structured_outputs": {"grammar": text}}
        return str(call("completions", lambda said: said["choices"][0]["text"] + "", body))

    names = call("models", lambda said: [model["id"] for model in said["data"]])
    name = args.model or "".join(names)  # of several it is no name
    if name not in names:
        fail(f"--model {args.model or ''}: {args.url} serves {', '.join(names)}; name one")
    # A server that takes no grammar passes over that in silence.
    if args.grammar and (said := ask(first, 'root ::= "no"')) != "no":
        fail(f"{args.url} keeps to no grammar: told to say 'no', it says {said!r}")
    return ask


if __name__ == "__main__":
    raise SystemExit(parity(prog=None))
