from __future__ import annotations

import random

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unislu_llm.errors import UserError
from unislu_llm.scoring.text import PROTOCOLS, Protocol, normalise_transcript
from unislu_llm.scoring.wer import WER, corpus_wer, utterance_errors

SENTENCES = st.lists(
    st.sampled_from(["the", "council", "of", "europe", "uh", "isn't", "2", "twenty,", "colour!"]), max_size=8
).map(" ".join)
PAIRS = st.lists(st.tuples(SENTENCES, SENTENCES), max_size=6)


def test_counts_of_a_hand_made_pair() -> None:
    got = corpus_wer(["a b c d", "e f"], ["a x c", "e f g h"], "slue")
    assert got == WER(substitutions=1, deletions=1, insertions=2, hits=4, ref_words=6)
    assert got.wer == pytest.approx(100 * 4 / 6)


def test_marks_are_stripped_on_both_sides_and_case_and_comma_count() -> None:
    assert corpus_wer(["yes. no?"], ["yes no!"], "slue").errors == 0
    assert corpus_wer(["yes, madam"], ["yes Madam"], "slue").errors == 2
    assert corpus_wer(["yes, madam"], ["yes Madam"], "whisper").errors == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_empty_reference_counts_insertions(protocol: Protocol) -> None:
    got = corpus_wer(["", "one word"], ["two extra", "one word"], protocol)
    assert (got.insertions, got.errors) == (2, 2)
    assert corpus_wer([""], ["two extra"], protocol).wer == 200.0
    assert corpus_wer(["a word"], [""], protocol).deletions == 2
    assert corpus_wer([""], [""], protocol).wer == 0.0
    assert corpus_wer([], [], protocol).wer == 0.0


def test_reference_of_fillers_alone_is_empty_under_whisper() -> None:
    assert corpus_wer(["uh um"], ["hello"], "whisper") == WER(0, 0, 1, 0, 0)


@given(PAIRS, st.sampled_from(PROTOCOLS))
def test_wer_equals_jiwer_on_the_normalised_text(pairs: list[tuple[str, str]], protocol: Protocol) -> None:
    spoken = [(r, h) for r, h in pairs if normalise_transcript(r, protocol)]
    if not spoken:
        return
    refs, hyps = zip(*spoken, strict=True)
    words = [[normalise_transcript(t, protocol) for t in side] for side in (refs, hyps)]
    assert corpus_wer(refs, hyps, protocol).wer == pytest.approx(100 * jiwer.wer(words[0], words[1]))


@given(PAIRS, st.sampled_from(PROTOCOLS), st.randoms(use_true_random=False))
def test_order_of_utterances_does_not_matter(
    pairs: list[tuple[str, str]], protocol: Protocol, rng: random.Random
) -> None:
    shuffled = rng.sample(pairs, len(pairs))
    assert corpus_wer(*_sides(pairs), protocol) == corpus_wer(*_sides(shuffled), protocol)


@given(PAIRS, st.sampled_from(PROTOCOLS))
def test_utterance_errors_sum_to_the_corpus(pairs: list[tuple[str, str]], protocol: Protocol) -> None:
    counts = utterance_errors(*_sides(pairs), protocol)
    whole = corpus_wer(*_sides(pairs), protocol)
    assert counts.shape == (len(pairs), 2)
    assert tuple(counts.sum(axis=0)) == (whole.errors, whole.ref_words)
    alone = [corpus_wer([r], [h], protocol) for r, h in pairs]
    np.testing.assert_array_equal(counts, np.array([(w.errors, w.ref_words) for w in alone]).reshape(-1, 2))


@given(PAIRS, st.sampled_from(PROTOCOLS))
def test_bounds(pairs: list[tuple[str, str]], protocol: Protocol) -> None:
    got = corpus_wer(*_sides(pairs), protocol)
    hyp_words = sum(len(normalise_transcript(h, protocol).split()) for _, h in pairs)
    assert got.ref_words == got.hits + got.substitutions + got.deletions
    assert hyp_words == got.hits + got.substitutions + got.insertions
    assert abs(got.ref_words - hyp_words) <= got.errors <= max(got.ref_words + hyp_words, 0)


@given(st.integers(0, 20), st.randoms(use_true_random=False))
def test_k_replaced_words_are_k_errors(k: int, rng: random.Random) -> None:
    refs = [[f"w{i}x{j}" for j in range(4)] for i in range(5)]
    hyps = [list(words) for words in refs]
    for n in rng.sample(range(20), k):
        hyps[n // 4][n % 4] = "wrong"
    got = corpus_wer([" ".join(w) for w in refs], [" ".join(w) for w in hyps], "slue")
    assert (got.errors, got.substitutions) == (k, k)
    assert got.wer == pytest.approx(5.0 * k)


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="2 reference transcripts but 1"):
        corpus_wer(["a", "b"], ["a"], "slue")


def _sides(pairs: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [r for r, _ in pairs], [h for _, h in pairs]
