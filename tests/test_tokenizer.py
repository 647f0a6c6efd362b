"""Target ids: one id a marker, decoded to the unified string; phrases keep their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import unified_string
from unislu_llm import weights
from unislu_llm.errors import UserError
from unislu_llm.loss import ASR_PART, TASK_PART
from unislu_llm.tasks import NER, SA, LabelTask, Span, TaskRegistry
from unislu_llm.tokenizer import Example, UnifiedTokenizer, make_examples
from unislu_llm.unified import encode, find_marker, parse
from unislu_llm.utterance import Utterance

ACTS = LabelTask("acts", "[DA]", ("yes", "thank you", "naïve 東"), "[A]", "[/A]", multi=True)
REGISTRY = TaskRegistry([NER, SA, ACTS])
KINDS: dict[str, dict[str, Any]] = {
    "byte-level": {}, "byte-level, bos": {"add_bos": True}, "byte-level, pad is eos": {"pad": None},
    "sentencepiece, prefix (Llama 2)": {"metaspace": "first"},
    "sentencepiece, no prefix (Gemma)": {"metaspace": "never"}}
CHARACTERS = st.one_of(
    st.sampled_from("abcde   .,'?-[]<>/é東🙂"),
    st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp", "Zs"), exclude_characters="▁"))
TEXTS = (
    st.text(CHARACTERS, min_size=1, max_size=30)
    .map(lambda text: " ".join(text.split()))
    .filter(lambda text: text and find_marker(text, REGISTRY) is None))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest,
              tiny_tokenizer: Callable[..., Any]) -> UnifiedTokenizer:
    made = tiny_tokenizer(**KINDS[request.param])
    if "Llama 2" in request.param:
        made.backend_tokenizer.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0)])
    return UnifiedTokenizer(made, REGISTRY)


def test_every_marker_is_one_id_and_ids_are_contiguous(tokenizer: UnifiedTokenizer) -> None:
    ids = list(tokenizer.marker_ids.values())
    assert list(tokenizer.marker_ids) == list(REGISTRY.markers)
    assert ids == list(range(ids[0], ids[0] + len(REGISTRY.markers)))
    assert len(tokenizer.base) == ids[-1] + 1
    for marker, i in tokenizer.marker_ids.items():
        assert tokenizer.base(marker, add_special_tokens=False)["input_ids"] == [i]
        assert tokenizer.base(f"a{marker}b", add_special_tokens=False)["input_ids"].count(i) == 1
        assert tokenizer.base.decode([i], skip_special_tokens=True) == marker
    # Adding them again changes nothing.
    assert UnifiedTokenizer(tokenizer.base, REGISTRY).marker_ids == tokenizer.marker_ids
    assert len(tokenizer.base) == ids[-1] + 1


def test_text_is_tokenised_as_before(tiny_tokenizer: Callable[..., Any]) -> None:
    text = "the council met, it's [ NER ] or /ORG or T/L"
    ids = UnifiedTokenizer(tiny_tokenizer(), REGISTRY).text_ids(text)
    assert ids == tiny_tokenizer()(" " + text)["input_ids"]


def test_a_tokenizer_that_does_not_fit_is_refused(tiny_tokenizer: Callable[..., Any]) -> None:
    known, other, endless = (tiny_tokenizer() for _ in range(3))
    known.add_tokens([AddedToken("[ORG]")])
    with pytest.raises(UserError, match=r"already has a token '\[ORG\]'"):
        UnifiedTokenizer(known, REGISTRY)
    UnifiedTokenizer(other, TaskRegistry([NER, SA]))
    with pytest.raises(UserError, match="another order"):
        UnifiedTokenizer(other, TaskRegistry([SA, NER]))
    end, endless.eos_token = endless.eos_token_id, None
    with pytest.raises(UserError, match="end-of-text"):
        UnifiedTokenizer(endless, REGISTRY)
    assert UnifiedTokenizer(endless, REGISTRY, eos_id=end).eos_id == end


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
def test_ids_decode_to_the_unified_string_and_have_their_parts(
        tokenizer: UnifiedTokenizer, utterance: Utterance) -> None:
    for task in (None, *REGISTRY):
        target = tokenizer.target(Example(utterance, None if task is None else task.name))
        unified = unified_string(utterance, task)
        # The end of text adds nothing, and what follows it does not count.
        for ids in (target.ids, target.ids[:-1], [*target.ids, *target.ids]):
            assert tokenizer.decode(ids) == unified
        assert parse(unified, REGISTRY, task.name if task else None).problems == ()
        assert len(target) == len(target.ids) == len(target.parts)
        assert target.ids[-1] == tokenizer.eos_id
        assert target.ids.count(tokenizer.eos_id) == 1
        assert list(target.parts) == sorted(target.parts), "the transcript comes first"
        if task is None:
            assert set(target.parts) == {ASR_PART}
            assert target.ids[:-1] == tuple(tokenizer.text_ids(utterance.text))
            continue
        # Without any entity the end of text alone is the task part.
        transcript = target.ids[:target.parts.index(TASK_PART)]
        control = tokenizer.marker_ids["[T/L]"], tokenizer.marker_ids[task.marker]
        assert transcript == (*tokenizer.text_ids(utterance.text), *control)
        markers = sum(i in tokenizer.marker_ids.values() for i in target.ids)
        assert markers == sum(piece.marker for piece in encode(utterance, task))


def check_phrase(tokenizer: UnifiedTokenizer, utterance: Utterance) -> None:
    """The one entity has the tokens that it has in the transcript."""
    target = tokenizer.target(Example(utterance, "ner"))
    split = target.parts.index(TASK_PART)
    before, phrase = target.ids[:split], target.ids[split + 1:-2]
    assert target.ids[split] == tokenizer.marker_ids["[ORG]"]
    assert target.ids[-2:] == (tokenizer.marker_ids["[/ORG]"], tokenizer.eos_id)
    assert phrase
    assert any(before[i:i + len(phrase)] == phrase for i in range(split))


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
    check_phrase(tokenizer, Utterance("u", None, text, {"ner": spans}))


@pytest.mark.parametrize("special", ["</s>", "<s>", "<pad>"])
def test_a_special_token_typed_in_a_transcript_is_text(tokenizer: UnifiedTokenizer,
                                                       special: str) -> None:
    """An end of text in the middle of a target would teach the model to stop there."""
    utterance = Utterance("u", None, f"he typed {special} and left", {"sa": "Neutral"})
    target = tokenizer.target(Example(utterance, "sa"))
    assert target.ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(target.ids) == f"he typed {special} and left[T/L][SA][S]Neutral[/S]"


def test_pieces_of_a_unigram_model_are_text_as_well() -> None:
    """They are found in a text whatever they are called; of unknown letters nothing is the end."""
    pieces = ["</s>", "<pad>", "<unk>", "▁", "▁he", *"<>/sabcdeéo'ANR.,-0123459Wzrihtwnpu"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0))
    backend.pre_tokenizer, backend.decoder = (
        kind.Metaspace(prepend_scheme="first") for kind in (pre_tokenizers, decoders))
    base = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer = UnifiedTokenizer(base, REGISTRY)
    for text in ("he is </s> there", "</s>", "a <pad></s>", "he 東 is"):
        ids = tokenizer.text_ids(text)
        assert not {0, 1} & {*ids}, "</s> is the token of unknown letters too"
        assert tokenizer.decode(ids) == text or "東" in text


LOSSY = {"capital letters": normalizers.Lowercase(), "blanks": normalizers.Replace(" ", ""),
         "digits": normalizers.Replace(Regex("[0-9]"), "0"),
         "punctuation": normalizers.Replace("'", " ' "),
         "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
         "letters of other scripts": normalizers.BertNormalizer(False, True, False, False)}


@pytest.mark.parametrize("kept", LOSSY)
def test_what_changes_texts_is_refused(tiny_tokenizer: Callable[..., Any], kept: str) -> None:
    base = tiny_tokenizer()
    base.backend_tokenizer.normalizer = LOSSY[kept]
    with pytest.raises(UserError, match=f"^X: its tokenizer does not keep {kept}: it gives '"):
        UnifiedTokenizer(base, REGISTRY).check("X")


def test_what_is_spelled_otherwise_is_composed_and_what_is_lacking_does_not_refuse(
        tokenizer: UnifiedTokenizer, tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer.check("X")
    apart, english, other = (tiny_tokenizer() for _ in range(3))
    apart.backend_tokenizer.normalizer = normalizers.NFD()
    composed = UnifiedTokenizer(apart, TaskRegistry([ACTS]))
    composed.check("X")
    assert composed.decode(composed.text_ids("in Zürich")) == "in Zürich"
    # No letter beyond ASCII: transcripts in English can be right, and such a label cannot.
    for base in (english, other):
        base.backend_tokenizer.normalizer = normalizers.Replace(Regex("[^ -~]"), "")
    UnifiedTokenizer(english, TaskRegistry([SA])).check("X")
    with pytest.raises(UserError, match="'acts': the tokenizer gives label 'naïve 東' back as"):
        UnifiedTokenizer(other, TaskRegistry([ACTS])).check("X")


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
                assert tokenizer.decode(ids) == unified_string(u, task)
                assert ids.count(tokenizer.eos_id) == 1
            check_phrase(tokenizer, u)
