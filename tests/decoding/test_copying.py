"""The bonus that draws a transcript to its draft: where in the draft a transcript stands, and what decoding makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from unislu_llm.data.audio import batch_log_mel
from unislu_llm.data.targets import Sample, TextCodec
from unislu_llm.decoding.batch import encode_waves
from unislu_llm.decoding.copying import DraftBias, _aligned
from unislu_llm.decoding.generate import DecodeOptions, decode_batch
from unislu_llm.decoding.shared import decode_tasks
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import SEPARATOR, TaskRegistry
from unislu_llm.utterance import Utterance

DRAFT = "the council met"
OPTIONS = DecodeOptions(force_task=True, grammar=True, extra_tokens=60)
Build = Callable[..., SLUModel]


@pytest.fixture
def codec(tiny_tokenizer: Callable[..., Any], registry: TaskRegistry) -> TextCodec:
    return TextCodec(tiny_tokenizer(), registry)


def added(codec: TextCodec, drafts: Sequence[str], answers: Sequence[Sequence[int]]) -> Tensor:
    """What is added to the scores of each token after an answer, in units of the bonus, `(rows, vocabulary)`."""
    processor = DraftBias(codec, [torch.tensor(codec.text_ids(d) if d else [], dtype=torch.long) for d in drafts], 2.0)
    width = max(map(len, answers))
    ids = torch.tensor([[-1] * (width - len(a)) + list(a) for a in answers], dtype=torch.long).view(len(answers), width)
    return processor(ids, torch.zeros(len(drafts), len(codec.tokenizer))) / 2.0


def bonus(codec: TextCodec, drafts: Sequence[str], answers: Sequence[Sequence[int]]) -> list[set[int]]:
    """Tokens that have it after an answer, row by row."""
    found = added(codec, drafts, answers)
    assert set(found[found > 0].tolist()) <= {1.0}
    return [set((row > 0).nonzero().flatten().tolist()) for row in found]


def test_it_follows_the_draft_and_finds_back(codec: TextCodec) -> None:
    draft = codec.text_ids(DRAFT)
    other = next(i for i in codec.text_ids("zebra")[::-1] if i not in draft)
    for n in range(len(draft)):
        assert bonus(codec, [DRAFT], [draft[:n]]) == [{draft[n]}]
    assert bonus(codec, [DRAFT], [[other]]) == [{draft[0], draft[1]}]  # put in, or said instead of the first
    assert bonus(codec, [DRAFT], [[other, *draft[:2]]]) == [{draft[2]}]
    assert bonus(codec, [DRAFT], [[draft[1]]]) == [{draft[2]}]  # the first left out
    end, = bonus(codec, [DRAFT], [draft])
    assert {codec.marker_ids[SEPARATOR], codec.eos_id} <= end
    assert not end & set(draft)


def test_punctuation_is_the_models_own_and_rows_are_apart(codec: TextCodec) -> None:
    draft = codec.text_ids(DRAFT)
    comma = codec.text_ids("a,")[-1]
    separator = codec.marker_ids[SEPARATOR]
    found = bonus(codec, ["the, council met.", DRAFT, "", DRAFT, DRAFT],
                  [draft[:1], [draft[0], comma], [], [*draft, separator], [draft[0], separator]])
    assert found == [{draft[1]}, {draft[1]}, set(), set(), set()]


def test_to_end_costs_what_is_left_of_the_draft(codec: TextCodec) -> None:
    draft, stops = codec.text_ids(DRAFT), [codec.marker_ids[SEPARATOR], codec.eos_id]
    comma, other = codec.text_ids("a,")[-1], codec.text_ids("zebra")[-1]
    n = len(draft)
    found = added(codec, [DRAFT] * (n + 1), [draft[:i] for i in range(n + 1)])
    assert found[:, stops].tolist() == [[i - n] * 2 for i in range(n)] + [[1, 1]]
    assert [set(row.nonzero().flatten().tolist()) for row in found[:n] * (found[:n] < 0)] == [set(stops)] * n
    found = added(codec, [DRAFT] * 4 + [""], [[draft[0], comma], [other], [draft[-1]], [draft[0], stops[0]], []])
    assert found[:, stops[0]].tolist() == [1 - n, 1 - n, 1 - n, 0, 0]


@pytest.mark.parametrize(("read", "sure", "ends"), [(0, 3.5, False), (0, 4.5, True), (2, 1.5, False), (2, 2.5, True)])
def test_the_end_gives_way_to_the_draft_alone(codec: TextCodec, read: int, sure: float, ends: bool) -> None:
    """An LLM may end the surer it is; if it may not, it goes on in the draft whatever else it would say."""
    draft, separator = codec.text_ids(DRAFT)[:3], codec.marker_ids[SEPARATOR]
    other = next(i for i in codec.text_ids("zebra") if i not in draft)
    scores = torch.full((1, len(codec.tokenizer)), -20.0)
    scores[0, separator], scores[0, draft[read]], scores[0, other] = 0.0, -2.0 * sure, -0.5
    out = DraftBias(codec, [torch.tensor(draft)], 2.0)(torch.tensor([draft[:read]], dtype=torch.long), scores)
    assert out[0].argmax().item() == (separator if ends else draft[read])


def test_steps_and_beams_agree_with_reading_from_the_start(codec: TextCodec) -> None:
    generator = torch.Generator().manual_seed(0)
    drafts = [torch.randint(0, len(codec.tokenizer), (n,), generator=generator) for n in (0, 3, 12)]
    pool = torch.cat([*drafts, torch.randint(0, len(codec.tokenizer), (6,), generator=generator)])
    for beams in (1, 3):
        walked, ids = DraftBias(codec, drafts, 1.0), torch.zeros(3 * beams, 0, dtype=torch.long)
        scores = torch.zeros(3 * beams, len(codec.tokenizer))
        for _ in range(15):
            assert torch.equal(walked(ids, scores), DraftBias(codec, drafts, 1.0)(ids, scores))
            ids = torch.cat([ids, pool[torch.randint(0, len(pool), (3 * beams, 1), generator=generator)]], dim=1)


def test_a_step_asks_nothing_of_the_device(codec: TextCodec) -> None:
    processor = DraftBias(codec, [torch.tensor(codec.text_ids(DRAFT))] * 2, 1.0)
    scores = torch.zeros(2, len(codec.tokenizer), device="meta")
    for length in range(3):
        assert processor(torch.zeros(2, length, dtype=torch.long, device="meta"), scores).shape == scores.shape


@pytest.mark.parametrize("beams", [1, 3])
def test_a_model_says_its_draft(build: Build, beams: int) -> None:
    """However random its weights: with a great bonus in all ways to decode, with none as before."""
    model = build("llm", draft="manifest")
    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(16_000 + 4000 * i, generator=generator) for i in range(3)]
    texts = [DRAFT, "we met", "the council of the union met"]
    samples = [Sample(Utterance(str(i), None, "", {}, draft=text), "ner") for i, text in enumerate(texts)]
    how = replace(OPTIONS, num_beams=beams)

    def transcripts(options: DecodeOptions) -> list[str]:
        return [model.codec.decode(ids[:ids.index(model.codec.marker_ids[SEPARATOR])])
                for ids in decode_batch(model, samples, waves, options)]

    def words(text: str) -> list[str]:
        return "".join(c if c.isalnum() else " " for c in text).split()

    alone = transcripts(how)
    assert alone == transcripts(replace(how, draft_bias=0.0)) != texts
    assert [words(t) for t in transcripts(replace(how, draft_bias=60.0))] == [t.split() for t in texts]
    model.config.draft_bias = 60.0
    assert [words(t) for t in transcripts(how)] == [t.split() for t in texts]
    assert transcripts(replace(how, draft_bias=0.0)) == alone


@pytest.mark.parametrize("clips", [2, 6])
def test_without_a_draft_it_keeps_to_what_the_projector_heard(build: Build, clips: int) -> None:
    """Each row to its own, also where more clips come than are encoded together."""
    model = build("llm", projector="ctc", projector_options={"heads": 2, "blank_bias": 0.0})
    model.learn_vocabulary(["the council met", "we thank anna"])
    generator = torch.Generator().manual_seed(3)
    waves = [0.1 * torch.randn(20_000 + 3000 * (i * 5 % clips), generator=generator) for i in range(clips)]
    samples = [Sample(Utterance(str(i), None, "", {}), "ner") for i in range(clips)]
    plain = _aligned(model.codec)

    def words(ids: Sequence[int]) -> list[int]:
        return [i for i in ids if plain[i]]

    found = decode_batch(model, samples, waves, replace(OPTIONS, draft_bias=60.0))
    heard = [words(model.projector.ctc_ids(*model.encoder(*_mel(model, wave)))[0]) for wave in waves]
    separator = model.codec.marker_ids[SEPARATOR]
    assert [words(ids[:ids.index(separator)]) for ids in found] == heard
    assert len(set(map(tuple, heard))) > 1
    assert found != decode_batch(model, samples, waves, OPTIONS)


def _mel(model: SLUModel, wave: Tensor) -> tuple[Tensor, Tensor]:
    return batch_log_mel([wave], model.n_mels, pad_to_30s=False)


def test_tasks_share_the_drawn_transcript(build: Build) -> None:
    model = build("llm", draft="manifest", draft_bias=60.0)
    wave: Tensor = 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(1))
    encoded = encode_waves(model, [wave], None, [DRAFT])
    separator = model.codec.marker_ids[SEPARATOR]
    heads = set()
    for tasks in (["ner", "sa"], ["sa"], []):
        for answers in decode_tasks(model, encoded, [1.0], tasks, OPTIONS).ids.values():
            ids = [*answers[0][0], separator]
            heads.add("".join(c for c in model.codec.decode(ids[:ids.index(separator)]) if c.isalnum() or c == " ").strip())
    assert heads == {DRAFT}
