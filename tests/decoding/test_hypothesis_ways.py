"""How a hypothesis becomes the transcript: rewritten in few passes, or word for word."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.decoding.common import Build, batch_of, decode, decode_ids, noise
from unislu_llm.decoding.greedy import Greedy
from unislu_llm.decoding.hypothesis_bias import HypothesisBias
from unislu_llm.decoding.loops import loop_start
from unislu_llm.models.kv_cache import State
from unislu_llm.tasks import SEPARATOR
from unislu_llm.tokenizer import UnifiedTokenizer

SAID = "the council met in paris on monday"
TEXTS = [SAID, "", "the council met in paris. " * 9, "a", "we thank anna, and [the] union. " * 9]


class Script:
    """A model that says what a function makes of the tokens before it; its cache holds these."""

    def __init__(self, tokenizer: UnifiedTokenizer,
                 follow: Callable[[list[int]], dict[int, float]]) -> None:
        self.tokenizer, self.follow, self.passes = tokenizer, follow, 0
        self.prefixes: list[list[int]] = []

    def start(self, rows: int) -> State:
        nothing = torch.zeros(rows, 1, 0, 1)
        return State(DynamicCache([(nothing, nothing)]), nothing[:, 0, :, 0].bool(),
                     self._hidden([[]] * rows))

    def _hidden(self, prefixes: Sequence[list[int]]) -> Tensor:
        self.prefixes += prefixes
        return torch.arange(len(self.prefixes) - len(prefixes), len(self.prefixes))[:, None].float()

    def step(self, state: State, ids: Tensor, valid: Tensor) -> Tensor:
        self.passes += 1
        state.append(valid)
        keys = ids[:, None, :, None].float()
        read = state.cache.update(keys, keys, 0)[0][:, 0, :, 0].long()
        found = []
        for j in range(read.shape[1] - ids.shape[1], read.shape[1]):
            found.append(self._hidden([row[:j + 1][mask[:j + 1]].tolist()
                                       for row, mask in zip(read, state.mask, strict=True)]))
        return torch.stack(found, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        scores = torch.full((hidden.numel(), len(self.tokenizer.base)), -20.0)
        for row, number in enumerate(hidden.flatten().long().tolist()):
            for token, score in self.follow(self.prefixes[number]).items():
                scores[row, token] = score
        return scores.view(*hidden.shape[:-1], -1)


def run(model: Script, hypotheses: Sequence[Sequence[int]], room: int = 40,
        bonus: float = 0.0) -> list[list[int]]:
    """What a scripted model says, `[T/L]` at its end."""
    stops = [[model.tokenizer.marker_ids[SEPARATOR], model.tokenizer.eos_id]] * len(hypotheses)

    def make() -> list[Any]:
        return [HypothesisBias(model.tokenizer, hypotheses, bonus)]

    given: Any = (model, model.start(len(hypotheses)), [room] * len(hypotheses), stops, make)
    answers, state = Greedy(*given).run()
    cache: Any = state.cache
    for answer, keys, mask in zip(answers, cache.layers[0].keys, state.mask, strict=True):
        assert keys[0, mask, 0].tolist() == answer.ids[:-1], "read but for the last one"
        assert len(answer.log_probs) == len(answer.ids)
    return [answer.ids for answer in answers]


def says(text: Sequence[int]) -> Callable[[list[int]], dict[int, float]]:
    """A script that says a text, whatever was said so far."""
    return lambda prefix: {text[len(prefix)] if len(prefix) < len(text) else 2: 0.0}


def test_agreement_needs_one_pass_and_disagreement_is_greedy(tokenizer: UnifiedTokenizer) -> None:
    stop = tokenizer.marker_ids[SEPARATOR]
    said, other = (tokenizer.text_ids(text) for text in (SAID, "anna thanks us"))
    model = Script(tokenizer, says([*said, stop]))
    assert run(model, [said, said]) == [[*said, stop]] * 2
    assert model.passes == 1
    model = Script(tokenizer, says([*other, stop]))
    assert run(model, [said, []]) == [[*other, stop]] * 2
    assert model.passes >= len(other)
    # It finds back behind a word of its own, and behind one that it leaves out.
    mixed = [*said[:3], *other[:1], *said[4:5], *said[6:], stop]
    model = Script(tokenizer, says(mixed))
    assert run(model, [said]) == [mixed]
    assert model.passes <= 5 < len(mixed)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize(("way", "bias"), [("grammar", 8.0), ("grounded", 5.0), ("free", 8.0),
                                           ("grammar", 0.0), ("model chooses", 8.0)])
def test_rewriting_is_one_token_at_a_time(build: Build, kind: str, way: str, bias: float,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token, in a batch and alone, however much of a hypothesis stands."""
    model, waves = build(kind, 3, separator=2.0, hypothesis="manifest"), noise(len(TEXTS))
    options: dict[str, Any] = {
        "grammar": way != "free", "grounded": way == "grounded", "hypothesis_bias": bias,
        "force_task": way != "model chooses", "tokens_per_second": 20.0}
    passes: list[int] = []
    step = model.step
    monkeypatch.setattr(model, "step", lambda *given: (passes.append(1), step(*given))[1])

    def ids(texts: Sequence[str], which: Sequence[Tensor]) -> list[Any]:
        passes.clear()
        tasks = [["ner", "sa"]] * len(texts)
        return [{name: d.ids for name, d in found.items()} for _, found in
                decode_ids(monkeypatch, model, which, tasks, texts, **options)]

    together, used = ids(TEXTS, waves), len(passes)
    for text, wave, answer in zip(TEXTS, waves, together, strict=True):
        assert ids([text], [wave]) == [answer]
    monkeypatch.setattr(HypothesisBias, "ahead", lambda self: [None] * len(self._row))
    assert ids(TEXTS, waves) == together
    assert used < len(passes) if bias else used <= len(passes) + 1


@pytest.mark.parametrize("free", [False, True])
def test_word_for_word(build: Build, free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops and brackets go, all else stays, and tasks are answered as behind any transcript."""
    model, waves = build("gemma3_text", 3, separator=2.0, hypothesis="manifest"), noise(len(TEXTS))
    seen: list[int] = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (
        seen.append(hidden[..., 0].numel()), logits(hidden))[1])
    said = [model.tokenizer.text_ids(text) for text in TEXTS]
    kept = [model.tokenizer.decode(ids[:loop_start(ids)]).replace("[", "") for ids in said]
    assert kept[:2] == TEXTS[:2]
    assert len(kept[2]) < len(TEXTS[2]) / 3
    assert "[" in TEXTS[4]
    assert "[" not in kept[4]
    tasks = [["ner", "sa"]] * len(TEXTS)
    options: dict[str, Any] = {"force_task": not free, "transcript": "verbatim"}
    answers = decode(model, waves, tasks, TEXTS, **options)
    for answer, text, whole in zip(answers, kept, TEXTS, strict=True):
        assert answer.transcript == text
        assert answer.hypothesis == whole
        assert "text" not in answer.confidence or not text, "nobody judged it"
    if not free:
        # Nothing but what tasks add: [T/L], [SA] and [SENT], of its labels all tokens but for the
        # first, [T/L] of the other task, and its answer.
        assert seen[0] == 3 * len(TEXTS)
        spoken = [text.replace("[", "") for text in kept]
        spoken[4] = ""  # its tokens are others where the bracket was
        drawn = decode(model, waves, tasks, spoken, hypothesis_bias=200.0)
        for answer, other in zip(answers[:4], drawn[:4], strict=True):
            if other.transcript == answer.transcript:
                assert answer.outputs == other.outputs
        assert sum(a.transcript == b.transcript for a, b in zip(answers, drawn, strict=True)) > 1


@pytest.mark.parametrize("way", ["verbatim", "rewrite"])
def test_of_a_token_with_a_bracket_the_letters_stay(
        build: Build, tokenizer_of: Callable[[str | None], Any], way: str) -> None:
    base = tokenizer_of(None)
    base.add_tokens([" [no", "[["])
    model = build("llm", tokenizer=base, separator=2.0, hypothesis="manifest", transcript=way)
    said = model.tokenizer.text_ids("3.5 [no] [[ (yes)")
    assert {" [no", "[["} <= {*base.convert_ids_to_tokens(said)}
    # The bias outweighs whatever a random model would rather say.
    answer, = decode(model, noise(1), [["ner"]], ["3.5 [no] [[ (yes)"], hypothesis_bias=500.0)
    assert re.sub(r"[^a-z0-9 ]", "", answer.transcript).split() == ["35", "no", "yes"]
    assert way != "verbatim" or answer.transcript == "3.5 no] (yes)"


def test_a_transcript_alone_needs_no_llm(build: Build) -> None:
    model = build("llama", hypothesis="manifest", transcript="verbatim")
    model.prefill = None  # type: ignore[method-assign, assignment]
    answers = decode(model, noise(2), [[], []], [SAID, ""])
    assert [(a.transcript, a.problems["asr"]) for a in answers] == [(SAID, ()), ("", ())]
    assert batch_of(model, noise(1), [SAID]).hypothesis_ids is not None
