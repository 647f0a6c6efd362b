"""The bonus that draws a transcript to its hypothesis: where in it a transcript stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoding.common import Build, batch_of, decode, noise
from unislu_llm.decoding.hypothesis_bias import HypothesisBias
from unislu_llm.decoding.vocabulary import vocabulary_of
from unislu_llm.tasks import SEPARATOR
from unislu_llm.tokenizer import UnifiedTokenizer

SAID = "the council met"


def added(tokenizer: UnifiedTokenizer, hypotheses: Sequence[str],
          answers: Sequence[Sequence[int]]) -> Tensor:
    """What each token's score gains after an answer, in units of the bonus, `(rows, tokens)`."""
    processor = HypothesisBias(tokenizer, [tokenizer.text_ids(text) if text else []
                                           for text in hypotheses], 2.0)
    width = max(map(len, answers))
    ids = [[-1] * (width - len(a)) + list(a) for a in answers]
    processor.advance(torch.tensor(ids, dtype=torch.long).view(len(answers), width))
    return processor(torch.zeros(len(answers), len(tokenizer.base))) / 2.0


def bonus(tokenizer: UnifiedTokenizer, hypotheses: Sequence[str],
          answers: Sequence[Sequence[int]]) -> list[set[int]]:
    """Tokens that have the bonus after an answer, row by row."""
    found = added(tokenizer, hypotheses, answers)
    assert set(found[found > 0].tolist()) <= {1.0}
    return [set((row > 0).nonzero().flatten().tolist()) for row in found]


def test_it_follows_the_hypothesis_and_finds_back(tokenizer: UnifiedTokenizer) -> None:
    said = tokenizer.text_ids(SAID)
    other = next(i for i in tokenizer.text_ids("zebra")[::-1] if i not in said)
    for n in range(len(said)):
        assert bonus(tokenizer, [SAID], [said[:n]]) == [{said[n]}]
    # Put in, or said instead of the first one.
    assert bonus(tokenizer, [SAID], [[other]]) == [{said[0], said[1]}]
    assert bonus(tokenizer, [SAID], [[other, *said[:2]]]) == [{said[2]}]
    assert bonus(tokenizer, [SAID], [[said[1]]]) == [{said[2]}], "the first left out"
    end, = bonus(tokenizer, [SAID], [said])
    assert {tokenizer.marker_ids[SEPARATOR], tokenizer.eos_id} <= end
    assert not end & set(said)


def test_punctuation_is_the_models_own_and_rows_are_apart(tokenizer: UnifiedTokenizer) -> None:
    said, comma = tokenizer.text_ids(SAID), tokenizer.text_ids("a,")[-1]
    separator = tokenizer.marker_ids[SEPARATOR]
    found = bonus(tokenizer, ["the, council met.", SAID, "", SAID, SAID],
                  [said[:1], [said[0], comma], [], [*said, separator], [said[0], separator]])
    assert found == [{said[1]}, {said[1]}, set(), set(), set()]


def test_to_end_costs_what_is_left(tokenizer: UnifiedTokenizer) -> None:
    said = tokenizer.text_ids(SAID)
    stops = [tokenizer.marker_ids[SEPARATOR], tokenizer.eos_id]
    comma, other = tokenizer.text_ids("a,")[-1], tokenizer.text_ids("zebra")[-1]
    n = len(said)
    found = added(tokenizer, [SAID] * (n + 1), [said[:i] for i in range(n + 1)])
    assert found[:, stops].tolist() == [[i - n] * 2 for i in range(n)] + [[1, 1]]
    below = found[:n] * (found[:n] < 0)
    assert [set(row.nonzero().flatten().tolist()) for row in below] == [set(stops)] * n
    found = added(tokenizer, [SAID] * 4 + [""],
                  [[said[0], comma], [other], [said[-1]], [said[0], stops[0]], []])
    assert found[:, stops[0]].tolist() == [1 - n, 1 - n, 1 - n, 0, 0]


@pytest.mark.parametrize(("read", "sure", "ends"), [(0, 3.5, False), (0, 4.5, True),
                                                    (2, 1.5, False), (2, 2.5, True)])
def test_the_end_gives_way_to_the_hypothesis_alone(tokenizer: UnifiedTokenizer, read: int,
                                                   sure: float, ends: bool) -> None:
    """An LLM may end the surer it is; if it may not, it goes on in the hypothesis."""
    said, separator = tokenizer.text_ids(SAID)[:3], tokenizer.marker_ids[SEPARATOR]
    other = next(i for i in tokenizer.text_ids("zebra") if i not in said)
    scores = torch.full((1, len(tokenizer.base)), -20.0)
    scores[0, separator], scores[0, said[read]], scores[0, other] = 0.0, -2.0 * sure, -0.5
    processor = HypothesisBias(tokenizer, [said], 2.0)
    processor.advance(torch.tensor([said[:read]], dtype=torch.long))
    assert processor(scores)[0].argmax().item() == (separator if ends else said[read])


def test_steps_and_beams_agree_with_reading_at_once(tokenizer: UnifiedTokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    size = len(tokenizer.base)
    said = [torch.randint(size, (n,), generator=generator).tolist() for n in (0, 3, 12)]
    pool = torch.tensor(said[1] + said[2] + torch.randint(size, (6,), generator=generator).tolist())
    for beams in (1, 3):
        rows = torch.arange(3).repeat_interleave(beams)
        walked, ids = HypothesisBias(tokenizer, said, 1.0), torch.zeros(len(rows), 0).long()
        walked.reorder(rows)
        scores = torch.zeros(len(rows), size)
        for _ in range(15):
            fresh = HypothesisBias(tokenizer, [said[i] for i in rows.tolist()], 1.0)
            fresh.advance(ids)
            assert torch.equal(walked(scores), fresh(scores))
            new = pool[torch.randint(len(pool), (len(rows), 1), generator=generator)]
            order = (torch.randint(beams, (3, beams), generator=generator)
                     + beams * torch.arange(3)[:, None]).flatten()
            walked.reorder(order)
            walked.advance(new)
            ids = torch.cat([ids[order], new], dim=1)


def test_a_step_asks_nothing_of_the_device(tokenizer: UnifiedTokenizer) -> None:
    processor = HypothesisBias(tokenizer, [tokenizer.text_ids(SAID)] * 2, 2.0, "meta")
    scores = torch.zeros(2, len(tokenizer.base), device="meta")
    for _ in range(3):
        assert processor(scores).shape == scores.shape
        processor.advance(torch.zeros(2, 2, dtype=torch.long, device="meta"))


def words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text).split()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_model_says_its_hypothesis(build: Build, beams: int) -> None:
    """However random its weights: with a great bonus in all ways to decode, with none as before."""
    model = build("llm", hypothesis="manifest")
    texts = [SAID, "we met", "the council of the union met"]

    def transcripts(**options: float) -> list[str]:
        tasks = [["ner", "sa"], ["sa"], []]
        answers = decode(model, noise(3), tasks, texts, num_beams=beams, **options)  # type: ignore
        assert [a.hypothesis for a in answers] == texts
        if options.get("hypothesis_bias"):  # every task's transcript is drawn
            assert {" ".join(words(raw.split(SEPARATOR)[0])) for raw in answers[0].raw.values()} \
                == {SAID}
        return [a.transcript for a in answers]

    alone = transcripts()
    assert alone == transcripts(hypothesis_bias=0.0) != texts
    assert [words(t) for t in transcripts(hypothesis_bias=60.0)] == [t.split() for t in texts]
    model.config.hypothesis_bias = 60.0
    assert [words(t) for t in transcripts()] == [t.split() for t in texts]
    assert transcripts(hypothesis_bias=0.0) == alone


@pytest.mark.parametrize("clips", [2, 6])
def test_without_a_hypothesis_it_keeps_to_the_projectors_own(build: Build, clips: int) -> None:
    """Each row to its own, also where more clips come than are encoded together."""
    model = build("llm", projector="ctc", projector_options={"heads": 2, "blank_bias": 0.0})
    model.learn_vocabulary(["the council met", "we thank anna"])  # type: ignore[operator]
    generator = torch.Generator().manual_seed(3)
    waves = [0.1 * torch.randn(20_000 + 3000 * (i * 5 % clips), generator=generator)
             for i in range(clips)]
    vocabulary, tokenizer = vocabulary_of(model.tokenizer), model.tokenizer
    tasks = [["ner"]] * clips
    answers = decode(model, waves, tasks, hypothesis_bias=60.0)
    with torch.no_grad():
        alone: Any = model.ctc_transcripts
        found = [alone(batch_of(model, [w]))[0] for w in waves]
    assert [a.ctc_hypothesis for a in answers] == [tokenizer.decode(ids) for ids in found]
    expected = [tokenizer.decode([i for i in ids if vocabulary.words[i]]) for ids in found]
    assert [words(a.transcript) for a in answers] == [words(text) for text in expected]
    assert len(set(expected)) > 1
    assert [a.raw for a in answers] != [a.raw for a in decode(model, waves, tasks)]
