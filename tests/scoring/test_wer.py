from __future__ import annotations

import random

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unislu_llm.scoring.text import PROTOCOLS, Protocol, normalise_transcript
from unislu_llm.scoring.wer import WER, corpus_wer, edit_counts

WORDS = st.sampled_from(["the", "council", "of", "uh", "isn't", "2", "twenty,", "colour!"])
SENTENCES = st.lists(WORDS, max_size=8).map(" ".join)
PAIRS = st.lists(st.tuples(SENTENCES, SENTENCES), max_size=6)


def test_counts_of_a_hand_made_pair() -> None:
    got = corpus_wer(["a b c d", "e f"], ["a x c", "e f g h"], "slue")
    assert got._asdict() == {"wer": pytest.approx(100 * 4 / 6), "errors": 4, "substitutions": 1,
                             "deletions": 1, "insertions": 2, "hits": 4, "ref_words": 6}
    # Marks are stripped on both sides; case and the comma count in one protocol.
    assert corpus_wer(["yes. no, madam?"], ["yes no, madam!"], "slue").errors == 0
    assert corpus_wer(["yes, madam"], ["yes Madam"], "slue").errors == 2
    assert corpus_wer(["yes, madam"], ["yes Madam"], "whisper").errors == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_empty_sides(protocol: Protocol) -> None:
    got = corpus_wer(["", "one word"], ["two extra", "one word"], protocol)
    assert (got.insertions, got.errors) == (2, 2)
    assert corpus_wer([""], ["two extra"], protocol).wer == 200.0
    assert corpus_wer(["a word"], [""], protocol).deletions == 2
    assert corpus_wer([""], [""], protocol).wer == corpus_wer([], [], protocol).wer == 0.0
    assert corpus_wer(["uh um"], ["hello"], "whisper").insertions == 1  # fillers alone


@given(PAIRS, st.sampled_from(PROTOCOLS), st.randoms(use_true_random=False))
def test_sums_order_bounds_and_jiwers_rate(pairs: list[tuple[str, str]], protocol: Protocol,
                                           rng: random.Random) -> None:
    alone = [edit_counts([r], [h], protocol)[0].tolist() for r, h in rng.sample(pairs, len(pairs))]
    refs, hyps = ([pair[side] for pair in pairs] for side in (0, 1))
    got = corpus_wer(refs, hyps, protocol)
    assert got == WER.of(np.array(alone, dtype=np.int64).reshape(-1, 4))
    refs, hyps = ([normalise_transcript(text, protocol) for text in side] for side in (refs, hyps))
    hyp_words = sum(len(h.split()) for h in hyps)
    assert hyp_words == got.hits + got.substitutions + got.insertions
    assert abs(got.ref_words - hyp_words) <= got.errors <= got.ref_words + hyp_words
    if got.ref_words:
        assert got.wer == pytest.approx(100 * jiwer.wer(refs, hyps))
