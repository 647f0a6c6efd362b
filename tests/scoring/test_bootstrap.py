from __future__ import annotations

import time

import numpy as np
import pytest

from unislu_llm.errors import UserError
from unislu_llm.scoring.bootstrap import (
    Counts,
    bootstrap,
    compare_counts,
    error_rate,
    macro_f1,
    micro_f1,
    paired_bootstrap,
    slue_statistic,
)
from unislu_llm.scoring.sentiment import label_counts, label_scores
from unislu_llm.tasks import SA

RNG = np.random.default_rng(7)
WORDS = RNG.integers(5, 30, size=400)
ERRORS = RNG.binomial(WORDS, 0.2)
COUNTS = np.stack([ERRORS, WORDS], axis=1)


def test_value_is_the_score_of_the_corpus() -> None:
    got = bootstrap(COUNTS, error_rate, n_resamples=200)
    assert got.value == pytest.approx(100 * ERRORS.sum() / WORDS.sum())
    assert got.low < got.value < got.high
    assert got.p_value is None


def test_interval_has_the_width_that_theory_gives() -> None:
    """Standard error of a ratio of means by the delta method; the interval is 2 x 1.96 of them wide."""
    rate = ERRORS.sum() / WORDS.sum()
    error = 100 * np.std(ERRORS - rate * WORDS, ddof=1) / (np.sqrt(len(WORDS)) * WORDS.mean())
    got = bootstrap(COUNTS, error_rate)
    assert got.high - got.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert got.mean == pytest.approx(got.value, abs=0.1 * error)


def test_resampling_is_by_utterance() -> None:
    """Utterances all wrong or all right: a resample is a share of draws, with binomial spread."""
    counts = np.array([[1, 1], [0, 1]] * 50)
    got = bootstrap(counts, error_rate)
    assert got.value == 50.0
    assert [got.low, got.high] == pytest.approx([40.0, 60.0], abs=1.01)


def test_equal_systems_do_not_differ() -> None:
    got = paired_bootstrap(COUNTS, COUNTS, error_rate, n_resamples=500)
    assert (got.value, got.mean, got.low, got.high, got.p_value) == (0.0, 0.0, 0.0, 0.0, 1.0)


def test_small_but_constant_difference_is_seen_by_the_paired_test() -> None:
    """One error more in every fourth utterance is inside the unpaired interval, but certain when paired."""
    worse = COUNTS + np.array([1, 0]) * (np.arange(400) % 4 == 0)[:, None]
    got = paired_bootstrap(worse, COUNTS, error_rate, n_resamples=2000)
    alone = bootstrap(COUNTS, error_rate, n_resamples=2000)
    assert got.value == pytest.approx(100 * 100 / WORDS.sum())
    assert got.low > 0
    assert got.p_value is not None
    assert got.p_value <= 2 / 2001 + 1e-12
    assert got.high - got.low < (alone.high - alone.low) / 2


def test_swapping_the_systems_turns_the_difference() -> None:
    other = np.stack([RNG.binomial(WORDS, 0.21), WORDS], axis=1)
    one, two = (
        paired_bootstrap(COUNTS, other, error_rate, 1000),
        paired_bootstrap(other, COUNTS, error_rate, 1000),
    )
    assert (one.value, one.low, one.high) == pytest.approx((-two.value, -two.high, -two.low))
    assert one.p_value == two.p_value


def test_p_value_is_about_uniform_without_a_difference() -> None:
    """Two systems of equal quality: 5 % is undercut about one time in twenty."""
    low = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        words = rng.integers(5, 30, size=100)
        a, b = (np.stack([rng.binomial(words, 0.2), words], axis=1) for _ in range(2))
        p = paired_bootstrap(a, b, error_rate, n_resamples=400, seed=seed).p_value
        low += p is not None and p < 0.05
    assert low <= 14


def test_seed_decides() -> None:
    assert bootstrap(COUNTS, error_rate, 300, seed=1) == bootstrap(COUNTS, error_rate, 300, seed=1)
    assert bootstrap(COUNTS, error_rate, 300, seed=1) != bootstrap(COUNTS, error_rate, 300, seed=2)


def test_chunks_do_not_show() -> None:
    """More resamples than fit a chunk: the first ones are the same draws, so that the mean moves little."""
    assert bootstrap(COUNTS, error_rate, 1234).mean == pytest.approx(
        bootstrap(COUNTS, error_rate, 500).mean, abs=0.2
    )


def test_statistics_on_sums() -> None:
    assert micro_f1(np.array([[2.0, 4.0, 6.0], [0.0, 0.0, 0.0]])).tolist() == [40.0, 0.0]
    assert error_rate(np.array([[3.0, 12.0], [2.0, 0.0]])).tolist() == [25.0, 200.0]
    # Two labels; the second occurs nowhere in the second row and is left out of its mean.
    sums = np.array([[1.0, 0.0, 2.0, 1.0, 2.0, 0.0], [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]])
    assert macro_f1(sums).tolist() == [25.0, 100.0]


def test_macro_f1_of_all_utterances_is_the_scorers() -> None:
    rng = np.random.default_rng(3)
    refs, hyps = ([str(x) for x in rng.choice(SA.labels, size=60)] for _ in range(2))
    got = bootstrap(label_counts(refs, hyps, SA, "slue"), macro_f1, n_resamples=50)
    assert got.value == pytest.approx(label_scores(refs, hyps, SA, "slue").macro_f1)


def test_compare_pairs_rows_by_key() -> None:
    keys = tuple(f"mini/{i}" for i in range(400))
    one, same = Counts(keys, COUNTS, error_rate), Counts(keys[::-1], COUNTS[::-1], error_rate)
    assert compare_counts(one, same, n_resamples=100).p_value == 1.0
    with pytest.raises(UserError, match="'mini/399'"):
        compare_counts(one, Counts(keys[:-1], COUNTS[:-1], error_rate))


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="same utterances"):
        paired_bootstrap(COUNTS, COUNTS[1:], error_rate)
    with pytest.raises(UserError, match="one utterance or more"):
        bootstrap(np.zeros((0, 2)), error_rate)
    with pytest.raises(UserError, match="n_resamples=0"):
        bootstrap(COUNTS, error_rate, n_resamples=0)
    with pytest.raises(UserError, match="400 utterances with 1 strata"):
        bootstrap(COUNTS, error_rate, strata=["a"])


def test_strata_are_drawn_by_themselves() -> None:
    """Each resample has exactly as many utterances of each corpus as there are; drawn together it has not."""
    corpora = ["vp", "vc", "vc", "vp", "vc"] * 10
    is_vp = np.array([[corpus == "vp", 1] for corpus in corpora])
    apart, together = bootstrap(is_vp, error_rate, 200, strata=corpora), bootstrap(is_vp, error_rate, 200)
    assert (apart.low, apart.value, apart.high) == pytest.approx((40.0, 40.0, 40.0))
    assert together.low < 40.0 < together.high


def test_interval_of_the_slue_score_is_that_of_its_independent_parts() -> None:
    """NER right throughout, SA too: the two corpora's error rates, halved, add up in squares; the score has a third of them."""
    half = COUNTS[:200], COUNTS[200:] * np.array([1, 2])
    counts = np.zeros((400, 2 + 2 + 3 + 9))
    counts[:200, 0:2], counts[200:, 2:4] = half
    counts[:200, 4:7] = 1
    counts[200:, 7::3] = 1
    corpora = ["vp"] * 200 + ["vc"] * 200
    rates = [bootstrap(c, error_rate) for c in half]
    got = bootstrap(counts, slue_statistic(2), strata=corpora)
    assert got.value == pytest.approx((300 - (rates[0].value + rates[1].value) / 2) / 3)
    widths = [r.high - r.low for r in rates]
    assert got.high - got.low == pytest.approx(np.hypot(*widths) / 2 / 3, rel=0.05)


def test_ten_thousand_resamples_of_two_thousand_utterances_take_seconds() -> None:
    """Of the costliest score, the SLUE score, of two systems."""
    counts = RNG.integers(0, 5, size=(2000, 16))
    start = time.perf_counter()
    paired_bootstrap(counts, counts[::-1], slue_statistic(2), n_resamples=10_000, strata=["vp", "vc"] * 1000)
    assert time.perf_counter() - start < 5.0
