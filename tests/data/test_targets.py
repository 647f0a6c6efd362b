"""Target ids: one id a marker, ids that decode to the unified string, and phrases that keep their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from unislu_llm.data.collate import Collator
from unislu_llm.data.targets import Sample, TextCodec, add_markers, make_samples
from unislu_llm.errors import UserError
from unislu_llm.loss import ASR_PART, NO_PART, TASK_PART
from unislu_llm.models import weights
from unislu_llm.tasks import NER, SA, LabelTask, Span, SpanTask, TaskRegistry
from unislu_llm.unified import check_text, encode, parse, render
from unislu_llm.utterance import Utterance

ACTS = LabelTask("acts", "[DA]", ("yes", "thank you", "naïve 東"), "[A]", "[/A]", multi=True)
REGISTRY = TaskRegistry([NER, SA, ACTS])
BYTE_LEVEL: dict[str, dict[str, Any]] = {
    "byte-level": {},
    "byte-level, bos": {"add_bos": True},
    "byte-level, pad is eos": {"pad": None},
}
SENTENCEPIECE = {"sentencepiece, prefix (Llama 2)": "first", "sentencepiece, no prefix (Gemma)": "never"}
CHARACTERS = st.one_of(st.sampled_from("abcde   .,'?-[]<>/é東🙂"),
                       st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp", "Zs"), exclude_characters="▁"))
TEXTS = st.text(CHARACTERS, min_size=1, max_size=30).map(lambda text: " ".join(text.split())).filter(
    lambda text: text and check_text(text, REGISTRY) is None)


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """What transformers makes of a SentencePiece BPE with byte fallback; with `first`, any text starts with a blank."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = [chr(c) for c in range(33, 127)]
    trained.train_from_iterator(["the council met in paris on monday", "we thank the council"],
                                trainers.BpeTrainer(vocab_size=200, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<pad>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [tuple(m) for m in model["merges"]],
                                     byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if scheme == "first" else steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module", params=[*BYTE_LEVEL, *SENTENCEPIECE])
def codec(request: pytest.FixtureRequest, tiny_tokenizer: Callable[..., Any]) -> TextCodec:
    name = request.param
    made = tiny_tokenizer(**BYTE_LEVEL[name]) if name in BYTE_LEVEL else sentencepiece_like(SENTENCEPIECE[name])
    return TextCodec(made, REGISTRY)


# Markers


def test_every_marker_is_one_id_and_ids_are_contiguous(codec: TextCodec) -> None:
    ids = list(codec.marker_ids.values())
    assert list(codec.marker_ids) == list(REGISTRY.markers)
    assert ids == list(range(ids[0], ids[0] + len(REGISTRY.markers)))
    assert len(codec.tokenizer) == ids[-1] + 1
    for marker, i in codec.marker_ids.items():
        assert codec.tokenizer(marker, add_special_tokens=False)["input_ids"] == [i]
        assert codec.tokenizer(f"a{marker}b", add_special_tokens=False)["input_ids"].count(i) == 1
        assert codec.tokenizer.decode([i], skip_special_tokens=True) == marker, "a marker must survive decoding"


def test_adding_markers_again_changes_nothing(tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer()
    first = add_markers(tokenizer, REGISTRY)
    size, text = len(tokenizer), "the council met in paris"
    ids = tokenizer(text)["input_ids"]
    assert add_markers(tokenizer, REGISTRY) == first
    assert len(tokenizer) == size
    assert tokenizer(text)["input_ids"] == ids


def test_text_is_tokenised_as_before(tiny_tokenizer: Callable[..., Any]) -> None:
    text = "the council met, it's [ NER ] or /ORG or T/L"
    assert TextCodec(tiny_tokenizer(), REGISTRY).text_ids(text) == tiny_tokenizer()(" " + text)["input_ids"]


def test_a_marker_that_the_tokenizer_knows_otherwise_is_refused(tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("[ORG]")])
    with pytest.raises(UserError, match=r"already has a token '\[ORG\]'"):
        add_markers(tokenizer, REGISTRY)


def test_markers_in_another_order_are_refused(tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer()
    add_markers(tokenizer, TaskRegistry([NER, SA]))
    with pytest.raises(UserError, match="another order"):
        add_markers(tokenizer, TaskRegistry([SA, NER]))


def test_a_tokenizer_without_end_of_text_is_refused(tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer()
    end, tokenizer.eos_token = tokenizer.eos_token_id, None
    with pytest.raises(UserError, match="end-of-text"):
        TextCodec(tokenizer, REGISTRY)
    assert TextCodec(tokenizer, REGISTRY, eos_id=end).eos_id == end


# Text to ids and back


@st.composite
def utterances(draw: st.DrawFn) -> Utterance:
    """Text with whole-word entities, a sentiment and a set of acts."""
    text = draw(TEXTS)
    bounds = [0, *(i + 1 for i, c in enumerate(text) if c == " "), len(text) + 1]
    spans = []
    for _ in range(draw(st.integers(0, 3))):
        first = draw(st.integers(0, len(bounds) - 2))
        last = draw(st.integers(first, len(bounds) - 2))
        spans.append(Span(draw(st.sampled_from(NER.labels)), bounds[first], bounds[last + 1] - 1))
    acts = tuple(draw(st.lists(st.sampled_from(ACTS.labels), unique=True)))
    return Utterance("u", None, text, {"ner": tuple(spans), "sa": draw(st.sampled_from(SA.labels)), "acts": acts})


@settings(deadline=None, max_examples=60)
@given(utterances())
def test_ids_decode_to_the_unified_string(codec: TextCodec, utterance: Utterance) -> None:
    for task in (None, *REGISTRY):
        target = codec.target(Sample(utterance, None if task is None else task.name))
        unified = render(encode(utterance, task))
        assert codec.decode(target.ids) == unified
        assert codec.decode(target.ids[:-1]) == unified, "the end of text adds nothing"
        assert codec.decode([*target.ids, *target.ids]) == unified, "what follows the end of text does not count"
        assert parse(codec.decode(target.ids), REGISTRY, task.name if task else None).problems == ()


@settings(deadline=None, max_examples=60)
@given(utterances())
def test_parts_and_the_end_of_text(codec: TextCodec, utterance: Utterance) -> None:
    markers = set(codec.marker_ids.values())
    for task in (None, *REGISTRY):
        target = codec.target(Sample(utterance, None if task is None else task.name))
        assert len(target) == len(target.ids) == len(target.parts)
        assert target.ids[-1] == codec.eos_id
        assert target.ids.count(codec.eos_id) == 1
        assert list(target.parts) == sorted(target.parts), "the transcript comes first"
        if task is None:
            assert set(target.parts) == {ASR_PART}
            assert not markers & set(target.ids)
            continue
        transcript = target.ids[:target.parts.index(TASK_PART)]
        control = codec.marker_ids["[T/L]"], codec.marker_ids[task.marker]
        assert transcript == (*codec.text_ids(utterance.text), *control)
        assert sum(i in markers for i in target.ids) == sum(piece.marker for piece in encode(utterance, task))


def contains(ids: tuple[int, ...], phrase: tuple[int, ...]) -> bool:
    return any(ids[i:i + len(phrase)] == phrase for i in range(len(ids)))


WORDS = st.lists(st.text("abcdeéo'", min_size=1, max_size=6), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(WORDS, st.data())
def test_a_phrase_has_the_tokens_that_it_has_in_the_transcript(codec: TextCodec, words: list[str], data: Any) -> None:
    """Also as the first word, so that copying a phrase is copying tokens."""
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    # A byte-level pre-tokenizer may cut before an apostrophe but never joins two words.
    text, start = " ".join(words), len(" ".join([*words[:first], ""]))
    phrase = " ".join(words[first:last + 1])
    assert text[start:start + len(phrase)] == phrase
    spans = (Span("ORG", start, start + len(phrase)),)
    target = codec.target(Sample(Utterance("u", None, text, {"ner": spans}), "ner"))
    split = target.parts.index(TASK_PART)
    inside = target.ids[split + 1:-2]
    assert target.ids[split] == codec.marker_ids["[ORG]"]
    assert target.ids[-2:] == (codec.marker_ids["[/ORG]"], codec.eos_id)
    assert inside
    assert contains(target.ids[:split], inside)


@pytest.mark.parametrize("special", ["</s>", "<s>", "<pad>"])
def test_a_special_token_typed_in_a_transcript_is_text(codec: TextCodec, special: str) -> None:
    """An end of text in the middle of a target would teach the model to stop there."""
    utterance = Utterance("u", None, f"he typed {special} and left", {"sa": "Neutral"})
    target = codec.target(Sample(utterance, "sa"))
    assert target.ids.count(codec.eos_id) == 1
    assert codec.decode(target.ids) == f"he typed {special} and left[T/L][SA][S]Neutral[/S]"


def test_prompts_may_hold_special_tokens(codec: TextCodec) -> None:
    assert codec.prompt_ids("") == []
    assert codec.prompt_ids("</s>") == [codec.eos_id]
    assert codec.prompt_ids("[ORG]") == [codec.marker_ids["[ORG]"]]


# Samples and batches


def test_an_utterance_with_two_tasks_is_two_samples() -> None:
    both = Utterance("1", None, "a", {"sa": "Neutral", "ner": ()})
    none = Utterance("2", None, "b")
    samples = make_samples([both, none], REGISTRY)
    assert [(s.utterance.id, s.task) for s in samples] == [("1", "ner"), ("1", "sa"), ("2", None)]
    assert [s.key for s in samples] == ["default/1#ner", "default/1#sa", "default/2#asr"]


def test_annotations_of_tasks_that_are_not_registered_make_no_sample() -> None:
    samples = make_samples([Utterance("1", None, "a", {"sa": "Neutral"})], TaskRegistry([NER]))
    assert [s.task for s in samples] == [None]


def test_the_last_supervised_label_is_the_end_of_text_in_a_batch(codec: TextCodec) -> None:
    """Also when the tokenizer pads with its end-of-text token."""
    texts = ("the council met in paris", "a", "we thank the council")
    samples = [Sample(Utterance("u", None, text, {"sa": "Neutral"}), task)
               for text, task in zip(texts, ("sa", None, "sa"), strict=True)]
    batch = Collator(codec)([(sample, torch.zeros(8000)) for sample in samples])
    assert batch.target_ids.shape == batch.target_parts.shape
    assert len(batch) == 3
    for sample, ids, parts in zip(samples, batch.target_ids, batch.target_parts, strict=True):
        target = codec.target(sample)
        supervised = parts != NO_PART
        assert tuple(ids[supervised].tolist()) == target.ids
        assert tuple(parts[supervised].tolist()) == target.parts
        assert int(ids[supervised][-1]) == codec.eos_id
        assert (ids[~supervised] == codec.pad_id).all()
        assert supervised.tolist() == sorted(supervised.tolist(), reverse=True), "padding is on the right"
    used = int(batch.mel_lengths.sum()) + sum(len(codec.target(s)) for s in samples)
    assert batch.padding_share == pytest.approx(1 - used / (3 * (batch.mel.shape[-1] + batch.target_ids.shape[1])))
    assert batch.padding_share > 0


def test_a_span_task_of_ones_own_round_trips(tiny_tokenizer: Callable[..., Any]) -> None:
    codec = TextCodec(tiny_tokenizer(), TaskRegistry([SpanTask("slots", "[SL]", ("from-city", "to_city"))]))
    u = Utterance("u", None, "oslo to rome", {"slots": (Span("to_city", 8, 12), Span("from-city", 0, 4))})
    text = codec.decode(codec.target(Sample(u, "slots")).ids)
    assert text == "oslo to rome[T/L][SL][from-city]oslo[/from-city][to_city]rome[/to_city]"


@pytest.mark.weights
@pytest.mark.parametrize("name", ["openai/whisper-base", "HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-3-270m"])
def test_real_tokenizers_spell_targets_back(name: str) -> None:
    codec = TextCodec(AutoTokenizer.from_pretrained(weights.resolve(name).path), REGISTRY)
    for text in ("europe's 27 members , don 't they ?", "Zürich, naïve 東京: 5 o'clock.", "he typed <eos> <|endoftext|>"):
        end = text.index(" ")
        for start, stop in ((0, end), (end + 1, len(text))):
            u = Utterance("u", None, text, {"ner": (Span("ORG", start, stop),), "acts": ACTS.labels})
            for task in (NER, ACTS):
                ids = codec.target(Sample(u, task.name)).ids
                assert codec.decode(ids) == render(encode(u, task))
                assert ids.count(codec.eos_id) == 1
            entity = codec.target(Sample(u, "ner"))
            split = entity.parts.index(TASK_PART)
            assert contains(entity.ids[:split], entity.ids[split + 1:-2])
