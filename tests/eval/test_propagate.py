"""Error propagation: forced transcripts, injected errors, repairs, attention, swaps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from unislu_llm.config import DecodeConfig
from unislu_llm.errors import UserError
from unislu_llm.scoring.predictions import Prediction
from unislu_llm.scoring.wer import corpus_wer
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

HOW = DecodeConfig(grammar=True, force_task=True, max_new_tokens=48, batch_size=2)


@pytest.fixture
def p(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "eval")
    names = ("propagate_attention", "propagate_errors", "propagate")
    return SimpleNamespace(**{k: v for n in names for k, v in vars(import_module(n)).items()})


@pytest.fixture(params=["mlp", "none", "whisper"])
def model(request: Any, tiny_speech_llm: Any, tiny_whisper_slu: Any) -> Any:
    return (tiny_whisper_slu() if request.param == "whisper" else
            tiny_speech_llm(hypothesis="manifest", projector=request.param))


@pytest.fixture
def clips(make_utterances: Callable[..., list[Utterance]]) -> list[Utterance]:
    made = make_utterances(seconds=(0.9, 0.5, 0.3, 0.6, 0.8, 0.4))
    return [replace(u, hypothesis=f"{u.text} too") for u in made if u.labels]


def row(i: str, text: str, said: str, ref: Any, hyp: Any) -> Prediction:
    return Prediction(id=i, corpus="c", task="ner", ref_text=text, hyp_text=said, ref=ref, hyp=hyp)


def test_behind_the_reference_no_word_is_wrong(p: Any, model: Any, clips: list[Utterance]) -> None:
    made = p.decode(model, clips, HOW, [u.text for u in clips])
    assert [q.hyp_text for q in made] == [u.text for u in clips]
    assert p.scores([made], model, "whisper")["wer"]["value"] == 0
    if model.reads_hypothesis:  # taken word for word, it is followed by the same answers
        kept = p.decode(model, clips, HOW.model_copy(update={"transcript": "verbatim"}))
        assert p.decode(model, clips, HOW, [f"{u.text} too" for u in clips]) == kept


def test_as_many_errors_are_put_in_as_are_asked_for(p: Any) -> None:
    texts = ["The council of Paris met on thirty five days, and it was glad."] * 6 + [""]
    said = "the counsel of paris on thirty five days and so it was glad"
    confusions = p.Confusions.of([row("a", texts[0], said, [], [])], "whisper")
    assert [*confusions.kinds().values()] == [1, 1, 1]
    for rate in (0.05, 0.2, 0.5):
        found = p.inject(texts, [0.02, rate], confusions, "whisper", ["en"] * 7)[1]
        scored = corpus_wer(texts, found.texts, "whisper")
        assert scored.errors == sum(found.sources.values()) == round(rate * scored.ref_words)
    assert {"substitution, own", "substitution, spelling"} < set(found.sources)
    with pytest.raises(UserError, match="lower rates"):
        p.inject(texts, [0.99], confusions, "whisper", ["en"] * 7)
    edits = {0: ("deletion", ""), 1: ("substitution", "rome"), 2: ("insertion", "we")}
    assert p.edited("So, Paris met.", [(0, 3), (4, 9), (10, 14)], edits) == "Rome we met."


def test_repairs_are_counted(p: Any) -> None:
    paris, anna = ["PLACE", "paris", 0, 5], ["PERSON", "anna", 10, 14]
    both, text = [paris, anna], "paris and anna"
    rows = [row("a", text, "ferris and anna", both, [paris[:2], anna[:2]]),  # one of each kind
            row("b", text, "ferris and hannah", both, [["PERSON", "paris"], ["PERSON", "hannah"]]),
            row("c", text, text, both, [["PLACE", "paris"]]),
            row("d", "paris or paris", "paris or ferris", [paris, ["PLACE", "paris", 9, 14]],
                [["PLACE", "paris"], ["PLACE", "paris"]])]
    counts = p.repairs(rows, "whisper")
    assert counts.matrix.tolist() == [[1, 1, 1, 1], [2, 0, 0, 0], [0, 0, 2, 1], [1, 1, 1, 1]]
    assert counts.value == 50


def test_attention_is_summed_by_part(p: Any) -> None:
    weights = torch.tensor([[[[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.2, 0.7, 0]]],
                            [[[1.0, 0, 0, 0], [0.25, 0.75, 0, 0], [0.0, 0.0, 0, 1]]]])
    parts = torch.tensor([[0, 1, 3, -1], [1, 3, -1, -1]])
    queries = torch.tensor([[False, False, True], [False, True, False]])
    shares, seen = p.attention_shares(weights, parts, queries)
    assert torch.allclose(shares, torch.tensor([[0.1, 0.2, 0, 0.7, 0], [0, 0.25, 0, 0.75, 0]]))
    assert seen.tolist() == [[1, 1, 0, 1, 0], [0, 1, 0, 1, 0]]


def test_attention_of_a_model_sums_to_one(p: Any, model: Any, clips: list[Utterance]) -> None:
    found = p.attention(model, [Example(u, t) for u in clips for t in u.labels])
    assert model.lm.config._attn_implementation == "sdpa"  # again
    for of_task in found.values():
        for layer in of_task["self"]:  # its shares are rounded
            assert sum(layer.values()) == pytest.approx(1, abs=1e-3)
            assert (layer["speech"] > 0) == (model.listens and model.kind == "speech_llm")
            assert (layer["hypothesis"] > 0) == model.reads_hypothesis
    assert ("cross_weight" in found["ner"]) == (model.kind == "whisper_slu")


def test_a_swap_with_itself_changes_nothing(p: Any, model: Any, clips: list[Utterance]) -> None:
    own, same = p.decode(model, clips, HOW), range(len(clips))
    assert p.partners(clips) != list(same)
    for what in ("speech", "hypothesis"):
        again = p.decode(model, p.swapped(clips, same, what), HOW)
        found = p.changes(own, again, model.registry)
        assert (found["clips"], found["transcripts_changed"]) == (5, 0)
        assert found["answers_changed"] == {"ner": 0, "sa": 0}
    with pytest.raises(UserError, match="no other clip"):
        p.partners(clips[:2])


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_everything_is_written(p: Any, kind: str, tiny_run: Any, tmp_path: Path) -> None:
    config = (run := tiny_run(kind)) / "config.yaml"
    config.write_text(config.read_text().replace("max_new_tokens: 12", "max_new_tokens: 48"))
    p.main(p.Options(str(run), (Path("corpus/dev.jsonl"),), (0.2,), 2, out=tmp_path))
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert (result["kind"], result["curve"][1]["wer"]["value"]) == (kind, 0)
    assert {r["swapped"] for r in result["swaps"]} == {"speech"}
    assert all(text in (tmp_path / "tiny.md").read_text() for text in result["in_words"].values())
    ElementTree.parse(tmp_path / "tiny.svg")
