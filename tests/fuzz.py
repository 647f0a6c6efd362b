"""Fuzzing of everything that reads what others wrote, for as long as one likes:

    python tests/fuzz.py --minutes 60 [--target audio]

Each target takes bytes or text and must end in a result or in a `UserError`. What fails is printed
with its input, made small. `tests/test_fuzz.py` runs the same for seconds, on the same input.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script

from unislu_llm.config import Config
from unislu_llm.config_file import YamlFile, config_from_file
from unislu_llm.data import audio
from unislu_llm.data.manifest import iter_rows
from unislu_llm.errors import UserError
from unislu_llm.models.saved import Description
from unislu_llm.tasks import NER, SA, TaskRegistry
from unislu_llm.unified import parse

REGISTRY = TaskRegistry()
WORDS = ("id", "text", "audio", "start", "end", "duration", "ner", "sa", "label", "phrase", "PLACE",
         "Positive", "hypothesis", "segments", "a b", "", "\0", "\x1b[2J", "1e400", "../../x", "é")
_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")
FOLDER = Path(_FOLDER.name)

scalars = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
           | st.sampled_from(WORDS))
values = st.recursive(scalars, lambda some: st.lists(some, max_size=4) | st.dictionaries(
    st.sampled_from(WORDS) | st.text(max_size=5), some, max_size=4), max_leaves=12)


def written(name: str, content: bytes | str) -> Path:
    path = FOLDER / name
    path.write_bytes(content if isinstance(content, bytes) else
                     content.encode("utf-8", "surrogatepass"))
    return path


def mutated(seed: bytes) -> st.SearchStrategy[bytes]:
    """A valid file with some bytes changed, put in or left out, or cut off."""
    change = st.tuples(st.integers(0, len(seed) - 1) | st.integers(0, min(80, len(seed) - 1)),
                       st.integers(0, 4), st.binary(max_size=8))

    def apply(changes: list[tuple[int, int, bytes]], cut: int | None) -> bytes:
        content = seed
        for place, gone, new in changes:
            content = content[:place] + new + content[place + gone:]
        return content[:cut]

    return st.builds(apply, st.lists(change, min_size=1, max_size=4),
                     st.none() | st.integers(0, len(seed)))


def json_like(valid: Any) -> st.SearchStrategy[bytes | str]:
    """A valid JSON object with values exchanged, or with damaged text, or any other."""
    keys = st.sampled_from(sorted(valid))
    changed = st.dictionaries(keys | st.text(max_size=6), values, max_size=3).map(
        lambda new: json.dumps(valid | new))
    return changed | values.map(json.dumps) | mutated(json.dumps(valid).encode()) | st.binary()


@cache
def sounds() -> dict[str, bytes]:
    wave = (0.1 * np.sin(np.arange(1600))).astype("float32")
    found = {}
    for kind, subtype in (("WAV", "PCM_16"), ("RF64", "PCM_16"), ("W64", "PCM_16"),
                          ("WAVEX", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "OPUS"), ("AIFF", None),
                          ("OGG", "VORBIS"), ("MP3", None), ("AU", None), ("CAF", None)):
        stream = io.BytesIO()
        soundfile.write(stream, wave, 16_000, format=kind, subtype=subtype)
        found[f"{kind}-{subtype}"] = stream.getvalue()
    return found


def read_audio(content: bytes) -> None:
    path = written("a.audio", content)
    counted = audio.count_samples(path)
    samples = audio.load(path)
    # A header may be off by what END_SLACK lets pass, at most.
    assert abs(len(samples) - counted) <= audio.END_SLACK * 16 * 16_000 or len(samples) < counted
    assert len(samples) <= 2_000 * len(content) + 16 * 16_000
    assert bool(samples.isfinite().all())


def read_manifest(content: bytes | str) -> None:
    for row in iter_rows(written("m.jsonl", content), REGISTRY):
        assert (row.utterance is None) == bool(row.problems)
        assert not any("\x1b" in str(problem) for problem in row.problems)


def read_answer(text: str) -> None:
    for task in (None, "ner", "sa"):
        found = parse(text, REGISTRY, task)
        assert isinstance(found.transcript, str)


def read_config(content: bytes | str) -> None:
    config_from_file(written("c.yaml", content), resolve=False)


def read_yaml(content: bytes | str) -> None:
    YamlFile.read(written("y.yaml", content))


def read_tasks(content: bytes | str) -> None:
    registry = TaskRegistry.from_yaml(written("tasks.yaml", content))
    assert TaskRegistry.from_dict(registry.to_dict()).names == registry.names


def read_model(content: bytes | str) -> None:
    folder = written("config.json", content).parent
    Description.read(folder).registry(folder)


ROW = {"id": "a", "text": "we met in paris", "audio": "a.wav", "ner": [["PLACE", 10, 15]],
       "sa": "Positive", "start": 0.5, "end": 1.5}
MODEL = {"model_type": "speech_llm", "model": Config().model.model_dump(mode="json"),
         "tasks": TaskRegistry((NER, SA)).to_dict(), "bases": {"llm": {"name": "a/b"}}}
BOMB = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
yaml_text = st.lists(st.sampled_from(
    ["a: ", "- ", "[", "]", "{", "}", "\n", "  ", "&x ", "*x", "<<: ", "!!python/name:os.system ",
     "!!timestamp ", "!!binary ", "1:1", "'", "? ", "|", "train: ", "epochs: ", "name: ", "data: ",
     "1e9", "~", "\0", "é", BOMB]), max_size=25).map("".join)

TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "audio": (st.sampled_from(sorted(sounds())).flatmap(lambda kind: mutated(sounds()[kind])),
              read_audio),
    "manifest": (json_like(ROW), read_manifest),
    "parse": (st.lists(st.sampled_from([*REGISTRY.markers, "[", "]", "Positive", " "]) | st.text(),
                       max_size=12).map("".join), read_answer),
    "config": (json_like(Config().model_dump(mode="json")) | yaml_text, read_config),
    "yaml": (yaml_text | st.binary(), read_yaml),
    "tasks": (st.lists(values, max_size=3).map(json.dumps) | mutated(
        json.dumps(TaskRegistry().to_dict()).encode()) | yaml_text, read_tasks),
    "model": (json_like(MODEL), read_model),
}


def fuzz(name: str, examples: int, *, fixed: bool) -> None:
    """Run a target on so many inputs; raises what it raises on the smallest that fails."""
    strategy, target = TARGETS[name]

    @settings(max_examples=examples, derandomize=fixed, database=None, deadline=5_000,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(content: Any) -> None:
        said = "a result"
        try:
            target(content)
        except UserError as error:
            said = str(error)
        assert said
        assert "\x1b" not in said

    run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--target", choices=TARGETS, action="append")
    args = parser.parse_args()
    end, rounds, failed = time.monotonic() + 60 * args.minutes, 0, 0
    while time.monotonic() < end:
        for name in args.target or TARGETS:
            rounds += 1
            try:
                fuzz(name, 300, fixed=False)
            except Exception as error:
                failed += 1
                notes = "\n".join(getattr(error, "__notes__", ()))
                print(f"{name}: {type(error).__name__}: {error}\n{notes}\n", flush=True)
    print(f"{rounds} rounds of 300 inputs, {failed} of them with a failure")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
