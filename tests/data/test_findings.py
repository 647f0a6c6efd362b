"""What is odd about data is said, in one exact line, and only where it is so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from unislu_llm.data.findings import run_findings, unspelled
from unislu_llm.data.loading import load_examples
from unislu_llm.data.mixture import Mixture
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import Example, UnifiedTokenizer
from unislu_llm.utterance import Utterance

REGISTRY = TaskRegistry()
DRUG = {"drugs": [{"label": "DOSE", "start": 0, "end": 3}]}


def manifest(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps({"id": f"r{i}", "text": f"the council met {i}"} | row) + "\n"
                            for i, row in enumerate(rows)))
    return str(path)


@pytest.mark.parametrize(("rows", "said"), [
    ([{"ner": []}, DRUG, {"drugs": []}, {"sa": "Neutral"}],
     ["the field 'drugs' (2 rows, the first {}:2) is no known task (ner, sa)"]),
    ([{"ner": []}, {"slots": [["drink", 0, 3]]}], ["'slots' (1 row, the first {}:2)"]),
    # Phrases, and the forms of other tools.
    ([{"ner": []}, {"drugs": {"BODY": ["Council", "board"]}}, {"drugs": {}}],
     ["not read: 'drugs' (2 rows"]),
    ([{"ner": []}, {"drugs": [["BODY", "council"]]}, {"d": [[4, 11, "ORG"]]}],
     ["'drugs' (1 row", "'d' (1 row"]),
    ([{"ner": [], "at": {"room": "four"}, "tags": [["split", "train"]], "more": {"k": ["v"]}}],
     ["not read: 'at' (1 row, the first {0}:1), 'tags' (1 row, the first {0}:1), 'more'"]),
    ([{"intent": "order"}, {"intent": "cancel"}, {"intent": "order"}],
     ["nothing is annotated for a known task (ner, sa), so that transcripts alone train; not read: "
      "'intent' (3 rows, the first {}:1)"]),
    ([{"da": ["thanks"]}, {"da": []}], ["not read: 'da' (2 rows"]),
    # Metadata.
    ([{"sa": "Neutral", "gender": "f"}, {"gender": "m"}, {"condition": "clean"}],
     ["data.train: not read: 'gender' (2 rows, the first {}:1)"]),
    ([{"words": [{"word": "the", "start": 0.0}], "rate": 16000, "split": "train"}],
     ["transcripts alone train; not read: 'words' (1 row, the first {0}:1), 'rate'"]),
    ([{"align": [["the", 0, 120], ["council", 120, 480]], "sa": "Neutral"}], ["not read: 'align'"]),
])
def test_annotations_that_no_task_reads_are_named_once(
        rows: list[dict[str, Any]], said: list[str], tmp_path: Path,
        caplog: pytest.LogCaptureFixture) -> None:
    path = manifest(tmp_path / "m.jsonl", *rows)
    for _ in range(2):
        assert load_examples([path], REGISTRY)
    assert len(caplog.records) == len(said)
    for text in said:
        assert text.format(path) in caplog.text


def test_training_on_unknown_annotations_alone_is_refused(tmp_path: Path) -> None:
    paths = [manifest(tmp_path / "a.jsonl", {}), manifest(tmp_path / "b.jsonl", {}, DRUG)]
    with pytest.raises(UserError, match=r"'drugs' \(1 row, the first .*b\.jsonl:2\).*--data\.tas"):
        load_examples(paths, REGISTRY)
    assert load_examples([*paths, manifest(tmp_path / "c.jsonl", {"sa": "Neutral"})], REGISTRY)
    assert load_examples(paths, TaskRegistry(()))  # of no tasks, transcripts are wanted


def test_ids_that_come_twice_are_named_before_anything_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "u.wav").write_bytes(b"")
    rows = {"audio": "u.wav", "duration": 1.0, "corpus": "one", "ner": []}
    paths = [manifest(tmp_path / f"{name}.jsonl", rows) for name in "ab"]
    assert len(load_examples(paths, REGISTRY)) == 2
    with pytest.raises(UserError, match=r"a\.jsonl:1, .*b\.jsonl:1: field 'id': one/r0#ner .*2 ti"):
        load_examples(paths, REGISTRY, flag="data.dev", scored=True)


def examples(file: str, *tasks: str | None) -> list[Example]:
    return [Example(Utterance(str(i), Path(f"{file}{i}.wav"), "text", corpus=file,
                              source=f"{file}.jsonl:{i + 1}"), task)
            for i, task in enumerate(tasks)]


def again(some: list[Example], source: str) -> list[Example]:
    return [Example(replace(e.utterance, source=source), e.task) for e in some]


TRAIN = examples("train", "ner", "sa")
DEV = examples("dev", "ner", "sa")


@pytest.mark.parametrize(("train", "dev", "said"), [
    (TRAIN, DEV, []),
    (TRAIN, [], []),
    (examples("asr", None), examples("dev", None), []),
    (TRAIN[:1], DEV, ["task 'sa': 1 example in data.dev and none in data.train"]),
    (TRAIN, DEV[:1], ["task 'sa': 1 example in data.train and none in data.dev"]),
    (TRAIN, DEV + examples("read", None, None),
     ["read.jsonl has none of the trained tasks (ner, sa); of its 2 examples"]),
    (TRAIN[:1], examples("read", None), ["task 'ner': 1 example in data.train and none in data.d"]),
    (TRAIN, DEV + TRAIN[1:], ["1 of 3 clips are in data.train too, the first train.jsonl:2"]),
    (TRAIN + again(TRAIN[:1], "b.jsonl:7"), DEV,
     ["1 example more than once there, the first as train.jsonl:1 and b.jsonl:7"]),
])
def test_what_train_and_dev_lack_is_said(train: list[Example], dev: list[Example],
                                         said: list[str]) -> None:
    found = run_findings(train, dev, None, 100)
    assert len(found) == len(said), found
    assert all(text in line for text, line in zip(said, found, strict=True))


def test_texts_that_the_tokenizer_does_not_keep_are_counted(
        tiny_tokenizer: Callable[..., Any]) -> None:
    base = tiny_tokenizer()
    base.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer = UnifiedTokenizer(base, REGISTRY)
    kept = [Example(Utterance(str(i), None, text), None) for i, text in enumerate(
        ("Zürich", "Zu\u0308rich", "a  b", "東京", "he said </s>"))]
    assert not list(unspelled(kept, tokenizer))
    lost = [Example(Utterance(text, None, text, source=f"m.jsonl:{i}"), None)
            for i, text in enumerate(("so " * 30 + "½ a cup", "½ a cup", "½ a cup", "①"), 1)]
    line, = unspelled([*kept, *lost], tokenizer)
    assert line.startswith("data.train: the tokenizer cannot write 3 texts of 7 as they are")
    assert "; in m.jsonl:1, the first, '½ a cup' becomes '1" in line


@pytest.mark.parametrize(("share", "samples", "says"), [
    (0.0, 100, "none of the 2 examples of 'read' trains: its share is 0 % of 100"),
    (0.001, 100, "its share is 0.1 % of 100 samples"), (0.001, 2000, "")])
def test_a_corpus_that_is_never_drawn_is_named(share: float, samples: int, says: str) -> None:
    train = [*TRAIN[:1], *examples("read", "sa", "sa")]
    mixture = Mixture([e.utterance.corpus for e in train], {"train": 1 - share, "read": share})
    found = run_findings(train, DEV, mixture, samples)
    # Its task does not train either.
    assert len(found) == (2 if says else 0)
    assert says in "".join(found[:1])
    assert not says or "'sa': 1 example in data.dev and none" in found[1]
