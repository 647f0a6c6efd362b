"""What a run tells people: examples, what became of the scores, warnings once, all of it kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import fitted, logged
from unislu_llm.config import Config
from unislu_llm.data.manifest import read_manifest, write_manifest
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.examples import choose, show
from unislu_llm.training.log import before_and_after
from unislu_llm.training.trainer import Trainer

Make = Callable[..., Config]
REGISTRY = TaskRegistry()
SAID = "the council met in paris on monday"
PARIS, MONDAY = ["PLACE", "paris"], ["WHEN", "monday"]
SPANS = [["PLACE", "paris", 19, 24], ["WHEN", "monday", 28, 34]]


def row(name: str, task: str, ref: Any, hyp: Any, text: str = SAID, **more: Any) -> dict[str, Any]:
    return {"id": name, "corpus": "c", "task": task, "ref_text": SAID, "hyp_text": text,
            "ref": ref, "hyp": hyp, "problems": [], **more}


def test_examples_mark_words_and_name_what_became_of_outputs() -> None:
    heard = "The council meet in Paris, on on monday"
    rows = [row("a", "ner", SPANS, [PARIS, ["ORG", "council"]], "council met in paris on monday",
                hypothesis=heard),
            row("b", "sa", "Positive", "Neutral", SAID.title() + ".", ctc_hypothesis=SAID),
            row("c", "asr", None, None, "\x1b[2J" + "la " * 999), row("d", "ner", [], [], ""),
            row("e", "sa", "Neutral", None)]
    found = show(rows, [f"c/{name}" for name in ("a#ner", "gone#sa", "b#sa", "c#asr", "d#ner",
                                                 "e#sa")], REGISTRY)
    assert list(found) == ["c/a#ner", "c/b#sa", "c/c#asr", "c/d#ner", "c/e#sa"]
    assert [" ".join(line.split()) for line in found["c/a#ner"].splitlines()] == [
        f"reference: {SAID}",
        "hypothesis: The council *meet* in Paris, on *on* monday",
        "model: (the) council met in paris on monday",
        "ner: right PLACE paris; missed WHEN monday; invented ORG council"]
    assert found["c/b#sa"] == f"    reference, ctc, model: {SAID}\n    sa: Neutral, not Positive"
    assert "\x1b" not in found["c/c#asr"]
    assert found["c/c#asr"].endswith(" ...")
    assert len(found["c/c#asr"]) < 700
    assert "ner: none, right" in found["c/d#ner"]
    assert "sa: no usable answer, not Neutral" in found["c/e#sa"]


def test_examples_are_one_of_each_kind() -> None:
    right, fine = row("empty", "ner", [], []), row("full", "ner", SPANS, [PARIS, MONDAY])
    misheard = row("misheard", "ner", SPANS, [PARIS, MONDAY], "council met in paris on monday")
    wrong, none = row("wrong", "sa", "Positive", "Neutral"), row("sa", "sa", "Neutral", "Neutral")
    assert choose([right, none, fine, misheard, wrong], REGISTRY) == [
        "c/full#ner", "c/misheard#ner", "c/wrong#sa"]
    # Where there is none of a kind: others, of tasks that are not there yet.
    assert choose([right, fine, none], REGISTRY) == ["c/full#ner", "c/sa#sa", "c/empty#ner"]
    assert choose([right], REGISTRY) == ["c/empty#ner"]
    assert choose([], REGISTRY) == []


@pytest.mark.parametrize(("scores", "init", "says"), [
    ([50.0, 60.0], "", ""),
    ([50.0, 60.0, 55.0], "", ""),
    ([50.0, 50.0], "", ""),
    ([50.0, 40.0, 30.0], "saved", "training made the model worse: its score was 50.00 before and "
     "is 40.00 at best; try lower rates (train.lr), fewer train.epochs, more data, or keep saved"),
    ([50.0, 60.0, 40.0], "", "the score was 50.00 before training and is 40.00 after it; best is"),
])
def test_before_and_after_says_whether_training_did_harm(scores: list[float], init: str,
                                                         says: str) -> None:
    history = [{"score": s, "slue": s, "ner_f1": s + 1, "ner_label_f1": 1.0} for s in scores]
    best = max(scores[1:])
    text = before_and_after(history, scores.index(best, 1), best, init)
    lines = text.splitlines()
    assert lines[4].split() == ["ner_f1", "51.00", f"{best + 1:.2f}", f"{best - 50:+.2f}"]
    assert "label" not in text
    assert [line for line in lines if line.startswith("warning: ")] == lines[5:]
    assert says in "".join(lines[5:])
    assert bool(says) == bool(lines[5:])


def test_validations_show_the_same_examples_and_the_end_what_changed(
        tiny_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(train={"epochs": 4, "eval_every": 4, "batch_size": 6})
    trainer = fitted("speech_llm", config)
    printed, warned = capsys.readouterr()
    parts = printed.split("\nvalidation after ")[1:]
    assert len(parts) == 3
    keys = trainer.progress.shown
    assert len(keys) == 3
    for part in parts:
        assert [part.index(f"  {key}") for key in keys] == sorted(
            part.index(f"  {key}") for key in keys)
        assert "protocol whisper" in part
    scores = [r["score"] for r in logged(trainer.run, "dev")]
    for part, step, score in zip(parts, (0, 4, 8), scores, strict=True):
        line = next(x for x in part.splitlines() if x.startswith(f"step {step}"))
        assert line.split()[-1] == f"{score:.2f}"
    best = trainer.progress.best_step
    assert f"best (step {best})" in printed
    warned = "".join(x for x in warned.splitlines(keepends=True) if x.startswith("warning: "))
    assert warned.count("12 of 12 clips are in data.train too") == 1
    assert warned + printed == (trainer.run / "log.txt").read_text()
    # What this process does later is no part of the run.
    logging.getLogger("unislu_llm.data").warning("something else")
    assert "something else" not in (trainer.run / "log.txt").read_text()
    # A resumed run goes on with them.
    saved = json.loads((trainer.run / "last" / "trainer.json").read_text())
    assert saved["shown"] == keys


def test_an_unchanged_example_is_not_printed_again(tiny_config: Make,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(train={"max_steps": 1, "lr": dict.fromkeys(
        ("projector", "lora", "markers"), 0.0)})
    shown = fitted("speech_llm", config).progress.shown
    _, before, after = capsys.readouterr().out.split("\nvalidation after ")
    assert before.count("reference") == 1 + 3
    assert [f"  {key}: as before" in after for key in shown] == [True] * 3


def test_training_on_annotations_of_an_unknown_task_alone_is_refused(tiny_config: Make) -> None:
    config = tiny_config(data={"dev": []})
    file = Path(config.data.train[0])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(
        {("drugs" if key == "ner" else key): value for key, value in r.items() if key != "sa"}
    ) + "\n" for r in rows))
    with pytest.raises(UserError, match=r"'drugs' \(6 rows.*--data\.tasks"):
        Trainer("speech_llm", config)
    assert not Path(config.output).exists()


def test_a_corpus_with_a_share_of_nothing_is_named_and_kept_in_the_log(
        tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tiny_config().data.train[0]
    monkeypatch.setattr("unislu_llm.training.trainer.unspelled",
                        lambda some, tokenizer: [f"{tokenizer.registry.names}: {len(some)} texts"])
    write_manifest(tmp_path / "other.jsonl", read_manifest(corpus, REGISTRY)[:2])
    path = tmp_path / "other.jsonl"
    path.write_text(path.read_text().replace('"corpus": "tiny"', '"corpus": "other"'))
    trainer = fitted("speech_llm", tiny_config(train={"max_steps": 1}, data={
        "train": [corpus, str(path)], "dev": [], "weights": {"tiny": 1.0, "other": 0.0}}))
    log = (trainer.run / "log.txt").read_text()
    assert "warning: data.weights: none of the 2 examples of 'other' trains" in log
    assert log.count("warning: ('ner', 'sa'): 14 texts") == 1
    assert "dev: none; the last checkpoint is the model" in log
