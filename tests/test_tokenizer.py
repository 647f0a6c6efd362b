"""Target ids: one id a marker, decoded to the unified string; phrases keep their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from unislu_llm import weights
from unislu_llm.errors import UserError
from unislu_llm.loss import ASR_PART, TASK_PART
from unislu_llm.tasks import NER, SA, LabelTask, Span, TaskRegistry
from unislu_llm.tokenizer import Example, UnifiedTokenizer, make_examples
from unislu_llm.unified import encode, find_marker, parse, render
from unislu_llm.utterance import Utterance

ACTS = LabelTask("acts", "[DA]", ("yes", "thank you", "naïve 東"), "[A]", "[/A]", multi=True)
REGISTRY = TaskRegistry([NER, SA, ACTS])
BYTE_LEVEL: dict[str, dict[str, Any]] = {
    "byte-level": {},
    "byte-level, bos": {"add_bos": True},
    "byte-level, pad is eos": {"pad": None}}
SENTENCEPIECE = {
    "sentencepiece, prefix (Llama 2)": "first",
    "sentencepiece, no prefix (Gemma)": "never"}
CHARACTERS = st.one_of(
    st.sampled_from("abcde   .,'?-[]<>/é東🙂"),
    st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp", "Zs"), exclude_characters="▁"))
TEXTS = (
    st.text(CHARACTERS, min_size=1, max_size=30)
    .map(lambda text: " ".join(text.split()))
    .filter(lambda text: text and find_marker(text, REGISTRY) is None))


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """A SentencePiece BPE with byte fallback; with `first`, any text starts with a blank."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = [chr(c) for c in range(33, 127)]
    trained.train_from_iterator(
        ["the council met in paris on monday", "we thank the council"],
        trainers.BpeTrainer(vocab_size=200, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<pad>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [tuple(m) for m in model["merges"]],
                   byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if scheme == "first" else steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>")


@pytest.fixture(scope="module", params=[*BYTE_LEVEL, *SENTENCEPIECE])
def tokenizer(request: pytest.FixtureRequest,
              tiny_tokenizer: Callable[..., Any]) -> UnifiedTokenizer:
    name = request.param
    made = (tiny_tokenizer(**BYTE_LEVEL[name]) if name in BYTE_LEVEL
            else sentencepiece_like(SENTENCEPIECE[name]))
    return UnifiedTokenizer(made, REGISTRY)


def test_every_marker_is_one_id_and_ids_are_contiguous(tokenizer: UnifiedTokenizer) -> None:
    ids = list(tokenizer.marker_ids.values())
    assert list(tokenizer.marker_ids) == list(REGISTRY.markers)
    assert ids == list(range(ids[0], ids[0] + len(REGISTRY.markers)))
    assert len(tokenizer.base) == ids[-1] + 1
    for marker, i in tokenizer.marker_ids.items():
        assert tokenizer.base(marker, add_special_tokens=False)["input_ids"] == [i]
        assert tokenizer.base(f"a{marker}b", add_special_tokens=False)["input_ids"].count(i) == 1
        assert tokenizer.base.decode([i], skip_special_tokens=True) == marker, (
            "a marker must survive decoding")


def test_adding_markers_again_changes_nothing(tiny_tokenizer: Callable[..., Any]) -> None:
    base = tiny_tokenizer()
    first = UnifiedTokenizer(base, REGISTRY).marker_ids
    size, text = len(base), "the council met in paris"
    ids = base(text)["input_ids"]
    assert UnifiedTokenizer(base, REGISTRY).marker_ids == first
    assert len(base) == size
    assert base(text)["input_ids"] == ids


def test_text_is_tokenised_as_before(tiny_tokenizer: Callable[..., Any]) -> None:
    text = "the council met, it's [ NER ] or /ORG or T/L"
    ids = UnifiedTokenizer(tiny_tokenizer(), REGISTRY).text_ids(text)
    assert ids == tiny_tokenizer()(" " + text)["input_ids"]


def test_a_marker_that_the_tokenizer_knows_otherwise_is_refused(
    tiny_tokenizer: Callable[..., Any],
) -> None:
    base = tiny_tokenizer()
    base.add_tokens([AddedToken("[ORG]")])
    with pytest.raises(UserError, match=r"already has a token '\[ORG\]'"):
        UnifiedTokenizer(base, REGISTRY)


def test_markers_in_another_order_are_refused(tiny_tokenizer: Callable[..., Any]) -> None:
    base = tiny_tokenizer()
    UnifiedTokenizer(base, TaskRegistry([NER, SA]))
    with pytest.raises(UserError, match="another order"):
        UnifiedTokenizer(base, TaskRegistry([SA, NER]))


def test_a_tokenizer_without_end_of_text_is_refused(tiny_tokenizer: Callable[..., Any]) -> None:
    base = tiny_tokenizer()
    end, base.eos_token = base.eos_token_id, None
    with pytest.raises(UserError, match="end-of-text"):
        UnifiedTokenizer(base, REGISTRY)
    assert UnifiedTokenizer(base, REGISTRY, eos_id=end).eos_id == end


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
    return Utterance("u", None, text,
                     {"ner": tuple(spans), "sa": draw(st.sampled_from(SA.labels)), "acts": acts})


@settings(deadline=None, max_examples=60)
@given(utterances())
def test_ids_decode_to_the_unified_string(tokenizer: UnifiedTokenizer,
                                          utterance: Utterance) -> None:
    for task in (None, *REGISTRY):
        target = tokenizer.target(Example(utterance, None if task is None else task.name))
        unified = render(encode(utterance, task))
        assert tokenizer.decode(target.ids) == unified
        assert tokenizer.decode(target.ids[:-1]) == unified, "the end of text adds nothing"
        assert tokenizer.decode([*target.ids, *target.ids]) == unified, (
            "what follows the end of text does not count")
        assert parse(unified, REGISTRY, task.name if task else None).problems == ()


@settings(deadline=None, max_examples=60)
@given(utterances())
def test_parts_and_the_end_of_text(tokenizer: UnifiedTokenizer, utterance: Utterance) -> None:
    markers = set(tokenizer.marker_ids.values())
    for task in (None, *REGISTRY):
        target = tokenizer.target(Example(utterance, None if task is None else task.name))
        assert len(target) == len(target.ids) == len(target.parts)
        assert target.ids[-1] == tokenizer.eos_id
        assert target.ids.count(tokenizer.eos_id) == 1
        assert list(target.parts) == sorted(target.parts), "the transcript comes first"
        if task is None:
            assert set(target.parts) == {ASR_PART}
            assert not markers & set(target.ids)
            continue
        transcript = target.ids[:target.parts.index(TASK_PART)]
        control = tokenizer.marker_ids["[T/L]"], tokenizer.marker_ids[task.marker]
        assert transcript == (*tokenizer.text_ids(utterance.text), *control)
        assert sum(i in markers for i in target.ids) == sum(
            piece.marker for piece in encode(utterance, task))


def contains(ids: tuple[int, ...], phrase: tuple[int, ...]) -> bool:
    return any(ids[i:i + len(phrase)] == phrase for i in range(len(ids)))


WORDS = st.lists(st.text("abcdeéo'", min_size=1, max_size=6), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(WORDS, st.data())
def test_a_phrase_has_the_tokens_that_it_has_in_the_transcript(
    tokenizer: UnifiedTokenizer, words: list[str], data: Any
) -> None:
    """Also as the first word, so that copying a phrase is copying tokens."""
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    # A byte-level pre-tokenizer may cut before an apostrophe but never joins two words.
    text, start = " ".join(words), len(" ".join([*words[:first], ""]))
    phrase = " ".join(words[first:last + 1])
    assert text[start:start + len(phrase)] == phrase
    spans = (Span("ORG", start, start + len(phrase)),)
    target = tokenizer.target(Example(Utterance("u", None, text, {"ner": spans}), "ner"))
    split = target.parts.index(TASK_PART)
    inside = target.ids[split + 1:-2]
    assert target.ids[split] == tokenizer.marker_ids["[ORG]"]
    assert target.ids[-2:] == (tokenizer.marker_ids["[/ORG]"], tokenizer.eos_id)
    assert inside
    assert contains(target.ids[:split], inside)


@pytest.mark.parametrize("special", ["</s>", "<s>", "<pad>"])
def test_a_special_token_typed_in_a_transcript_is_text(tokenizer: UnifiedTokenizer,
                                                       special: str) -> None:
    """An end of text in the middle of a target would teach the model to stop there."""
    utterance = Utterance("u", None, f"he typed {special} and left", {"sa": "Neutral"})
    target = tokenizer.target(Example(utterance, "sa"))
    assert target.ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(target.ids) == f"he typed {special} and left[T/L][SA][S]Neutral[/S]"


def test_prompts_may_hold_special_tokens(tokenizer: UnifiedTokenizer) -> None:
    assert tokenizer.prompt_ids("") == []
    assert tokenizer.prompt_ids("</s>") == [tokenizer.eos_id]
    assert tokenizer.prompt_ids("[ORG]") == [tokenizer.marker_ids["[ORG]"]]


def test_an_utterance_with_two_tasks_is_two_examples() -> None:
    both = Utterance("1", None, "a", {"sa": "Neutral", "ner": ()})
    none = Utterance("2", None, "b")
    examples = make_examples([both, none], REGISTRY)
    assert [(s.utterance.id, s.task) for s in examples] == [("1", "ner"), ("1", "sa"), ("2", None)]
    assert [s.key for s in examples] == ["default/1#ner", "default/1#sa", "default/2#asr"]
    unknown = Utterance("1", None, "a", {"sa": "Neutral"})  # to this registry
    assert [s.task for s in make_examples([unknown], TaskRegistry([NER]))] == [None]


@pytest.mark.weights
@pytest.mark.parametrize(
    "name", ["openai/whisper-base", "HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-3-270m"])
def test_real_tokenizers_spell_targets_back(name: str) -> None:
    tokenizer = UnifiedTokenizer(AutoTokenizer.from_pretrained(weights.resolve(name).path),
                                 REGISTRY)
    for text in ("europe's 27 members , don 't they ?", "Zürich, naïve 東京: 5 o'clock.",
                 "he typed <eos> <|endoftext|>"):
        end = text.index(" ")
        for start, stop in ((0, end), (end + 1, len(text))):
            u = Utterance("u", None, text,
                          {"ner": (Span("ORG", start, stop),), "acts": ACTS.labels})
            for task in (NER, ACTS):
                ids = tokenizer.target(Example(u, task.name)).ids
                assert tokenizer.decode(ids) == render(encode(u, task))
                assert ids.count(tokenizer.eos_id) == 1
            entity = tokenizer.target(Example(u, "ner"))
            split = entity.parts.index(TASK_PART)
            assert contains(entity.ids[:split], entity.ids[split + 1:-2])
