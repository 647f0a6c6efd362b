"""Items and batches: of one kind, padded without effect, the same whatever loads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.tiny import make_tokenizer
from unislu_llm.config import AugmentConfig, TrainConfig
from unislu_llm.data.audio import load, mel_length
from unislu_llm.data.augment import Augmenter, HypothesisDropout
from unislu_llm.data.dataset import Collator, SpeechDataset
from unislu_llm.data.frame_cache import FrameCache, Frames
from unislu_llm.data.sampler import BatchPlan, MicroBatch
from unislu_llm.data.text_injection import SimulationRates, TextInjector
from unislu_llm.errors import UserError
from unislu_llm.loss import NO_PART
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import Example, UnifiedTokenizer, make_examples
from unislu_llm.utterance import Utterance

AUGMENT: dict[str, Any] = {"freq_masks": 2, "time_masks": 2, "speeds": [0.9, 1.0, 1.1],
                           "gain_db": 6.0, "silence_share": 0.2}


@pytest.fixture
def tokenizer() -> UnifiedTokenizer:
    return UnifiedTokenizer(make_tokenizer(), TaskRegistry())


@pytest.fixture
def examples(make_utterances: Callable[..., list[Utterance]]) -> list[Example]:
    """Four with audio and two of text; all have hypotheses."""
    spoken = make_utterances()
    texts = [replace(u, id=f"t{u.id}", audio=None, duration=None) for u in spoken[:2]]
    return make_examples([replace(u, hypothesis=f"{u.text} it was") for u in (*spoken, *texts)],
                         TaskRegistry())


@pytest.fixture
def injector(tokenizer: UnifiedTokenizer) -> TextInjector:
    def classes(text: str) -> list[int]:
        return [1 + i % 30 for i in tokenizer.text_ids(text)]

    return TextInjector(SimulationRates(), classes, 30, 0.06)


def dropout(examples: list[Example]) -> HypothesisDropout:
    train = TrainConfig(hypothesis_dropout=0.2, hypothesis_word_dropout=0.3)
    return HypothesisDropout(train, examples)


def test_targets_and_hypotheses_are_padded_on_the_right(tokenizer: UnifiedTokenizer,
                                                        examples: list[Example]) -> None:
    waves = [load(e.utterance.audio) for e in examples[:4] if e.utterance.audio]
    batch = Collator(tokenizer).from_waves(examples[:4], waves)
    assert batch.kind == "audio"
    assert len(batch) == 4
    assert batch.counted
    assert batch.target_ids.shape == batch.target_parts.shape
    for i, example in enumerate(examples[:4]):
        target, n = tokenizer.target(example), batch.target_lengths[i]
        assert tuple(batch.target_ids[i, :n].tolist()) == target.ids
        assert tuple(batch.target_parts[i, :n].tolist()) == target.parts
        assert int(batch.target_ids[i, n - 1]) == tokenizer.eos_id
        assert (batch.target_ids[i, n:] == tokenizer.pad_id).all()
        assert (batch.target_parts[i, n:] == NO_PART).all()
    assert batch.speech_lengths == tuple(mel_length(len(wave)) for wave in waves)
    assert batch.mel.shape == (4, 80, max(batch.speech_lengths))
    assert batch.durations == pytest.approx([e.utterance.duration for e in examples[:4]])
    assert (batch.hypothesis_ids, batch.hypothesis_lengths, batch.ctc_targets) == (None, (), ())
    bare, empty = (Example(replace(examples[0].utterance, hypothesis=h), None) for h in (None, ""))
    vocabulary = SimpleNamespace(classes=lambda text: [1, len(text)])
    collator = Collator(tokenizer, hypothesis_prompt=[7, 8], ctc_vocabulary=vocabulary)
    batch = collator.from_waves([examples[0], bare, empty], waves[:3])
    written = tokenizer.text_ids(examples[0].utterance.hypothesis or "")
    assert batch.hypothesis_lengths == (2 + len(written), 0, 2)
    assert batch.hypothesis_ids[0].tolist() == [7, 8, *written]
    assert batch.hypothesis_ids[2].tolist() == [7, 8, *[tokenizer.pad_id] * len(written)]
    assert batch.ctc_targets == ((1, len(examples[0].utterance.text)),) * 3


def test_kinds_and_lengths_of_input(tokenizer: UnifiedTokenizer, injector: TextInjector) -> None:
    gone = Example(Utterance("s", Path("gone.wav"), "a", duration=3.0, hypothesis="a",
                             source="half.jsonl:2"), None)
    text = Example(Utterance("t", None, "abc", source="half.jsonl:1", hypothesis="b"), None)
    both, plain = (gone, text), SpeechDataset([gone, text])
    assert plain.kind(gone) == "audio"
    for i, message in enumerate((r"half\.jsonl:2: field 'audio': gone\.wav",
                                 r"half\.jsonl:1: field 'audio': the row has no audio")):
        with pytest.raises(UserError, match=message):
            plain[i, 0]
    injects = SpeechDataset([], frame_cache=FrameCache("c", {}), injector=injector)
    assert [injects.kind(e) for e in both] == ["frames", "posteriors"]
    assert [injects.seconds(e) for e in both] == [3.0, injector.seconds(text)]
    reads = SpeechDataset(both, listens=False)
    assert [reads.kind(e) for e in both] == ["text", "text"]
    assert [reads.seconds(e) for e in both] == [3.0, 3 / 15]
    collator = Collator(tokenizer, hypothesis_prompt=[7], listens=False)
    batch = collator([reads[(0, 0)], reads[(1, 0)]])
    assert (batch.kind, batch.speech_lengths, batch.durations) == ("text", (0, 0), (3.0, 0.0))
    assert batch.mel is batch.frames is batch.posterior_classes is None
    assert collator.from_waves([gone], [torch.zeros(8000)]).durations == (0.5,)


def test_batches_do_not_depend_on_what_is_beside(tokenizer: UnifiedTokenizer,
                                                 examples: list[Example],
                                                 injector: TextInjector) -> None:
    data = SpeechDataset(examples, augmenter=Augmenter(AugmentConfig(**AUGMENT)),
                         injector=injector, dropout=dropout(examples), seed=1)
    collator = Collator(tokenizer, hypothesis_prompt=[7])
    for kind, members in (("audio", [0, 1, 2, 3]), ("posteriors", [4, 5])):
        whole = collator([data[(i, 0)] for i in members])
        assert whole.kind == kind
        for row, i in enumerate(members):
            alone = collator([data[(i, 0)]])
            n = alone.speech_lengths[0]
            assert n == whole.speech_lengths[row]
            assert whole.examples[row] == alone.examples[0]
            heard: Any = [(b.mel.mT if kind == "audio" else b.posterior_shares)
                          for b in (whole, alone)]
            torch.testing.assert_close(heard[0][row, :n], heard[1][0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one kind"):
        collator([data[(0, 0)], data[(4, 0)]])
    first, again = (collator([data[(1, times)]]).mel for times in (0, 1))
    assert not torch.equal(first, again), "drawn again, heard anew"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_what_the_plan_says(workers: int, tokenizer: UnifiedTokenizer,
                                           examples: list[Example],
                                           injector: TextInjector) -> None:
    """Also with loader processes; a repeated member weighs nothing."""
    data = SpeechDataset(examples, augmenter=Augmenter(AugmentConfig(**AUGMENT)),
                         injector=injector, dropout=dropout(examples), seed=1, epoch=2)
    plan = BatchPlan([data.seconds(e) for e in examples], 6, 4,
                     kinds=[data.kind(e) for e in examples])
    collator, supervised, extra = Collator(tokenizer, hypothesis_prompt=[7]), 0, 0
    for rank in range(2):
        micro = [m for step in plan.micro_batches(2, rank, 2) for m in step]
        loader: Any = DataLoader(data, batch_sampler=micro, collate_fn=collator,
                                 num_workers=workers)
        for m, batch in zip(micro, loader, strict=True):
            assert (batch.kind, len(batch), batch.counted) == (m.kind, len(m.members), m.counted)
            direct = collator([replace(data[draw], counted=m.counted) for draw in m.members])
            assert all(torch.equal(value, getattr(direct, name)) if torch.is_tensor(value)
                       else value == getattr(direct, name) for name, value in vars(batch).items())
            assert min(batch.target_lengths) > 0
            found = int((batch.target_parts != NO_PART).sum())
            assert found == (sum(batch.target_lengths) if m.counted else 0)
            supervised, extra = supervised + found, extra + (not m.counted)
    drawn = [data[(i, 0)].example for i in range(6)]
    assert supervised == sum(len(tokenizer.target(e)) for e in drawn)
    assert extra > 0


def test_frames_take_the_place_of_audio(tmp_path: Path, tokenizer: UnifiedTokenizer,
                                        examples: list[Example]) -> None:
    cache = FrameCache(tmp_path / "c", {"weights": "w"})
    for i, e in enumerate(examples[:3]):
        cache.put(cache.name(e.utterance), Frames(torch.rand(40 + i, 8) + 1, 30 + i))
    data, collator = SpeechDataset(examples, frame_cache=cache), Collator(tokenizer)
    batch = collator([data[(i, 0)] for i in range(3)])
    assert (batch.kind, batch.speech_lengths) == ("frames", (30, 31, 32))
    assert batch.frames.shape == (3, 42, 8)
    assert batch.durations == pytest.approx([0.9, 1.6, 0.6])
    augmenter = Augmenter(AugmentConfig(time_masks=2))
    masked = collator(SpeechDataset(examples, frame_cache=cache, augmenter=augmenter).__getitems__(
        MicroBatch("frames", ((0, 0), (1, 0), (2, 0)))))
    hidden = (masked.frames == 0) & (batch.frames != 0)
    assert hidden.any()
    assert torch.equal(masked.frames, batch.frames.masked_fill(hidden, 0.0))
    with pytest.raises(UserError, match="has lost its frames"):
        data[(3, 0)]
