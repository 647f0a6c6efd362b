from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from unislu_llm.scoring.bootstrap import Counts, bootstrap, error_rate, macro_f1, micro_f1

RNG = np.random.default_rng(7)
WORDS = RNG.integers(5, 30, size=400)
ERRORS = RNG.binomial(WORDS, 0.2)


def counts(*columns: Any, corpora: list[str] | None = None) -> Counts:
    """Errors and words of utterances that are named by their row."""
    names = corpora or ["mini"] * len(columns[0])
    keys = tuple((corpus, str(i)) for i, corpus in enumerate(names))
    return Counts(keys, np.stack(columns, axis=1), error_rate)


COUNTS = counts(ERRORS, WORDS)


def test_interval_has_the_width_that_theory_gives() -> None:
    """Standard error of a ratio of means by the delta method; the interval is 2 x 1.96 wide."""
    rate = ERRORS.sum() / WORDS.sum()
    error = 100 * np.std(ERRORS - rate * WORDS, ddof=1) / (np.sqrt(len(WORDS)) * WORDS.mean())
    got = bootstrap(COUNTS, resamples=10_000)
    assert got["high"] - got["low"] == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert got["low"] < got["value"] < got["high"]
    assert got["value"] == pytest.approx(100 * rate)
    assert got == bootstrap(COUNTS, resamples=10_000) != bootstrap(COUNTS, resamples=10_000, seed=2)


def test_small_but_constant_difference_is_seen_by_the_paired_test() -> None:
    """An error more in every fourth utterance: inside the unpaired interval, certain if paired."""
    worse = counts(ERRORS + (np.arange(400) % 4 == 0), WORDS)
    got, alone = bootstrap(worse, [COUNTS]), bootstrap(COUNTS)
    assert got["value"] == pytest.approx(100 * 100 / WORDS.sum())
    assert got["low"] > 0
    assert got["p_value"] == pytest.approx(2 / 1001)
    assert got["high"] - got["low"] < (alone["high"] - alone["low"]) / 2
    assert bootstrap(COUNTS, [COUNTS]) == {"value": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}


def test_p_value_is_about_uniform_without_a_difference() -> None:
    """Two systems of equal quality: 5 % is undercut about one time in twenty."""
    words = WORDS[:100]
    pairs = ([counts(RNG.binomial(words, 0.2), words) for _ in range(2)] for _ in range(100))
    p_values = [bootstrap(pair[0], pair[1:], resamples=400)["p_value"] for pair in pairs]
    assert sum(p < 0.05 for p in p_values) <= 14


def test_statistics_on_sums() -> None:
    assert micro_f1(np.array([[2.0, 4.0, 6.0], [0.0, 0.0, 0.0]])).tolist() == [40.0, 0.0]
    assert error_rate(np.array([[3.0, 12.0], [2.0, 0.0]])).tolist() == [25.0, 200.0]
    # Two labels; the second occurs nowhere in the second row and is left out of its mean.
    sums = np.array([[1.0, 0.0, 2.0, 1.0, 2.0, 0.0], [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]])
    assert macro_f1(sums).tolist() == [25.0, 100.0]


def test_strata_are_drawn_by_themselves() -> None:
    """Each resample has exactly as many utterances of each corpus as there are."""
    corpora = ["vp", "vc", "vc", "vp", "vc"] * 10
    columns = [int(corpus == "vp") for corpus in corpora], [1] * 50
    apart, together = bootstrap(counts(*columns, corpora=corpora)), bootstrap(counts(*columns))
    assert apart["low"] == apart["value"] == apart["high"] == pytest.approx(40.0)
    assert together["low"] < 40.0 < together["high"]


def test_seeds_are_drawn_before_utterances() -> None:
    """Where utterances do not differ, the interval is that of the means of two drawn seeds."""
    def seed(errors: int) -> Counts:
        return counts([errors] * 50, [10] * 50)

    got = bootstrap([seed(1), seed(3)], [seed(1)])
    assert (got["value"], got["low"], got["high"]) == (10.0, 0.0, 20.0)
    # The difference is 0 when the equal seed is drawn twice: one time in four.
    assert got["p_value"] == pytest.approx(0.5, abs=0.1)
    # Equal seeds are one; several that differ are less certain than one of them.
    assert bootstrap([COUNTS, COUNTS]) == bootstrap(COUNTS)
    noisy = [counts(RNG.binomial(WORDS, rate), WORDS) for rate in (0.15, 0.2, 0.25)]
    spans = [bootstrap(some) for some in (noisy, noisy[1])]
    wide, narrow = (span["high"] - span["low"] for span in spans)
    assert wide > 1.5 * narrow
