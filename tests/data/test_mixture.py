"""Mixtures: asked shares at every step, walks without repetition, everything from seed and epoch; long rows refused or cut."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from unislu_llm.data.batching import BatchPlan
from unislu_llm.data.long_audio import handle_long
from unislu_llm.data.manifest import read_manifest
from unislu_llm.data.mixture import Mixture, Tally, corpus_of, describe_mixture, group_samples, manifest_name, target_shares
from unislu_llm.data.targets import Sample
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span, TaskRegistry
from unislu_llm.utterance import Utterance


def sample(corpus: str, manifest: str = "m", task: str | None = None) -> Sample:
    """A sample of a corpus, read from `<manifest>.jsonl`."""
    return Sample(Utterance("u", None, "a", {}, corpus=corpus, source=f"data/{manifest}.jsonl:1"), task)


def groups_of(**sizes: int) -> list[str]:
    """Group names of corpora one after another."""
    return [name for name, n in sizes.items() for _ in range(n)]


# Shares


def test_temperature_goes_from_natural_to_equal() -> None:
    sizes = {"a": 900, "b": 100}
    assert target_shares(sizes) == {"a": 0.9, "b": 0.1}
    assert target_shares(sizes, temperature=2) == pytest.approx({"a": 0.75, "b": 0.25})
    assert target_shares(sizes, temperature=float("inf")) == {"a": 0.5, "b": 0.5}


def test_weights_are_relative_and_override_the_temperature() -> None:
    assert target_shares({"a": 900, "b": 100}, {"a": 1, "b": 3}, temperature=5) == {"a": 0.25, "b": 0.75}


def test_a_corpus_is_named_by_its_rows_or_by_its_manifest() -> None:
    samples = [sample("slue", "x"), sample("default", "asr")]
    assert [corpus_of(s) for s in samples] == ["slue", "asr"]
    assert group_samples(samples, {"x": 1, "asr": 2}) == ["x", "asr"], "a stem groups also rows that name a corpus"
    assert group_samples(samples, {"slue": 1, "asr": 2}) == ["slue", "asr"]


@pytest.mark.parametrize(("weights", "message"), [
    ({"slu": 1, "asr": 1}, r"'slu'; did you mean 'slue'\?.*known: slue, x, asr"),
    ({"qqqqq": 1}, r"'qqqqq'; known: slue, x, asr"),
    ({"slue": 1}, r"no weight for asr"),
    ({"slue": 1, "x": 1, "asr": 1}, r"'slue' and 'x' both"),
])
def test_bad_names_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        group_samples([sample("slue", "x"), sample("default", "asr")], weights)


@pytest.mark.parametrize(("options", "message"), [
    ({"weights": {"a": -1, "b": 1}}, r"data\.weights\.a"),
    ({"weights": {"a": float("nan"), "b": 1}}, r"data\.weights\.a"),
    ({"weights": {"a": "much", "b": 1}}, r"data\.weights\.a.*'much'"),
    ({"weights": {"a": 0, "b": 0}}, r"all weights are 0"),
    ({"temperature": 0}, r"data\.temperature"),
    ({"temperature": float("nan")}, r"data\.temperature"),
])
def test_bad_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        target_shares({"a": 2, "b": 2}, **options)


# What is drawn


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 60), st.integers(0, 5), st.data())
def test_walks_do_not_repeat_and_shares_add_up(sizes: list[int], per_epoch: int, seed: int, data: st.DataObject) -> None:
    weights = {str(i): data.draw(st.floats(0.05, 1)) for i in range(len(sizes))}
    groups = groups_of(**{str(i): n for i, n in enumerate(sizes)})
    shares = target_shares(Counter(groups), weights)
    mixture = Mixture(groups, shares, per_epoch, seed)
    seen: Counter[int] = Counter()
    for epoch in range(6):
        drawn = mixture.epoch(epoch)
        assert len(drawn) == per_epoch == len(mixture)
        seen.update(drawn.tolist())
        for name, members in zip(mixture.names, mixture.members, strict=True):
            times = [seen[i] for i in members.tolist()]
            assert max(times) - min(times) <= 1, "no sample comes again before all others of its corpus"
            assert abs(sum(times) - shares[name] * per_epoch * (epoch + 1)) < len(sizes) + 1


def test_an_epoch_follows_from_seed_and_number_alone() -> None:
    groups = groups_of(a=50, b=7)
    asked = {"a": 0.5, "b": 0.5}
    mixture, later = Mixture(groups, asked, 30, 3), Mixture(groups, asked, 30, 3)
    for epoch in range(4):
        mixture.epoch(epoch)
    assert np.array_equal(later.epoch(4), mixture.epoch(4)), "also when it is the first that is asked for"
    assert not np.array_equal(Mixture(groups, asked, 30, 4).epoch(4), later.epoch(4))
    assert not np.array_equal(later.epoch(5), later.epoch(4))


def test_weight_zero_leaves_a_corpus_out() -> None:
    mixture = Mixture(groups_of(a=5, b=9), {"a": 1.0, "b": 0.0})
    assert sorted(mixture.epoch(0).tolist()) == [0, 1, 2, 3, 4]
    assert len(mixture) == 5


@pytest.mark.parametrize("bucket", [0, 1, 16, 100])
def test_realised_shares_over_200_steps_are_within_one_percent(bucket: int) -> None:
    """The worst case: corpora differ so much in length that most batches hold one corpus only; wherever 200 steps begin."""
    rng = np.random.default_rng(0)
    groups = groups_of(short=4000, medium=700, long=90)
    lengths = np.concatenate([rng.uniform(*r, n) for r, n in (((1, 3), 4000), ((5, 9), 700), ((15, 29), 90))])
    asked = target_shares(Counter(groups), {"short": 0.5, "medium": 0.3, "long": 0.2})
    plan = BatchPlan(lengths.tolist(), 8, seed=1, bucket=bucket, mixture=Mixture(groups, asked, 2500, 1))
    steps = [batch for epoch in range(3) for batch in plan.epoch(epoch)]
    for first in (0, 57, 300, 700):
        drawn = Counter(groups[i] for batch in steps[first:first + 200] for i in batch)
        for name, share in asked.items():
            assert drawn[name] / drawn.total() == pytest.approx(share, abs=0.01), (first, name)


def test_batches_keep_their_length_buckets_and_their_randomness() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.uniform(1, 30, 1000)
    plan = BatchPlan(lengths.tolist(), 8, bucket=16, mixture=Mixture(groups_of(a=900, b=100), {"a": 0.5, "b": 0.5}))
    batches = plan.epoch(0)
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 3, "free shuffling gives about 22"
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_same_draws(world: int) -> None:
    mixture = Mixture(groups_of(a=30, b=3), {"a": 0.5, "b": 0.5}, 48, 2)
    whole = BatchPlan(list(range(33)), 8, 4, seed=2, mixture=mixture).draws(1)
    ranks = [BatchPlan(list(range(33)), 8, 4, seed=2, mixture=mixture).draws(1, rank, world) for rank in range(world)]
    assert [[draw for steps in ranks for micro in steps[i] for draw in micro] for i in range(len(whole))] \
        == [[draw for micro in step for draw in micro] for step in whole]
    draws = [draw for step in whole for micro in step for draw in micro]
    assert len(set(draws)) == len(draws) == 48, "a sample drawn again is told from its first draw"
    assert max(times for _, times in draws) == 7, "3 samples drawn 24 times"


def test_tally_and_table() -> None:
    samples = [sample("a", task="ner"), sample("a", task="sa"), sample("b")]
    mixture = Mixture(["a", "a", "b"], {"a": 0.25, "b": 0.75}, 8)
    tally = Tally(mixture, samples)
    tally.add([0, 2])
    tally.add([1, 2])
    assert tally.shares() == {"share_corpus_a": 0.5, "share_corpus_b": 0.5,
                              "share_task_ner": 0.25, "share_task_sa": 0.25, "share_task_asr": 0.5}
    assert tally.shares([2])["share_corpus_b"] == 1
    table = describe_mixture(mixture, samples)
    assert "2 corpora, 8 samples an epoch" in table
    assert "75.0 %" in table
    assert "asr 75.0 %" in table
    assert "6.00" in table, "passes of b an epoch"


# Long rows


def write_long(folder: Path, **row: Any) -> Path:
    """A manifest of a short row and one of 50 s."""
    soundfile.write(folder / "long.wav", np.zeros(50 * 8000, dtype=np.float32), 8000)
    rows = [{"id": "s", "audio": "long.wav", "text": "short", "end": 3.0}, {"id": "t", "audio": "long.wav", "text": "all", **row}]
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


SEGMENTS = [{"start": 0.0, "end": 12.0, "text": "in paris", "ner": [{"label": "PLACE", "start": 3, "end": 8}]},
            {"start": 12.0, "end": 25.0, "text": "and rome", "ner": [{"label": "PLACE", "start": 4, "end": 8}]},
            {"start": 25.0, "end": 40.0, "text": "it was late", "ner": []},
            {"start": 44.0, "end": 50.0, "text": "good night", "sa": "Positive"}]


def test_long_rows_are_refused_together(tmp_path: Path) -> None:
    utterances = read_manifest(write_long(tmp_path), TaskRegistry())
    with pytest.raises(UserError, match=r"1 row is longer than 30 s.*data\.long_audio(.|\n)*m\.jsonl:2: 't' has 50\.0 s"):
        handle_long(utterances, TaskRegistry(), 30)
    many = [Utterance(f"u{i}", None, "a", duration=31.0) for i in range(13)]
    with pytest.raises(UserError, match=r"13 rows are longer(.|\n)*'u9'(.|\n)*and 3 more"):
        handle_long(many, TaskRegistry(), 30)


def test_long_rows_are_cut_at_segments(tmp_path: Path) -> None:
    utterances = read_manifest(write_long(tmp_path, corpus="talks", segments=SEGMENTS), TaskRegistry())
    short, first, second, third = handle_long(utterances, TaskRegistry(), 30, "cut")
    assert short.id == "s"
    assert (first.id, first.start, first.end, first.text) == ("t-000", 0.0, 25.0, "in paris and rome")
    assert first.labels["ner"] == (Span("PLACE", 3, 8), Span("PLACE", 13, 17))
    assert [first.text[s[1]:s[2]] for s in first.labels["ner"]] == ["paris", "rome"]
    assert (second.start, second.end, second.labels) == (25.0, 40.0, {"ner": ()}), "a third would pass 30 s"
    assert (third.start, third.end, third.labels) == (44.0, 50.0, {"sa": "Positive"})
    assert {p.corpus for p in (first, second, third)} == {"talks"}


@pytest.mark.parametrize(("change", "message"), [
    ({"segments": None}, r"m\.jsonl:2: segments: is missing"),
    ({"segments": {}}, r"segments: is missing"),
    ({"segments": [{"start": 0, "end": 31, "text": "a"}]}, r"segments\[0\]: has 31\.0 s"),
    ({"segments": [{"start": 0, "text": "a"}]}, r"segments\[0\]\.end: is missing"),
    ({"segments": [{"start": 0, "end": 9, "text": "a", "ner": [["ORGG", 0, 1]]}]}, r"segments\[0\]\.ner\[0\]\.label.*ORG"),
    ({"segments": [SEGMENTS[1], SEGMENTS[0]]}, r"segments\[1\]\.start: 0 s is before"),
    ({"segments": [{"start": 45, "end": 55, "text": "a"}]}, r"segments\[0\].*outside the row"),
])
def test_rows_that_cannot_be_cut_say_why(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    utterances = read_manifest(write_long(tmp_path, **change), TaskRegistry())
    with pytest.raises(UserError, match=message):
        handle_long(utterances, TaskRegistry(), 30, "cut")


def test_a_corpus_is_called_after_its_manifest_or_its_folder(tmp_path: Path) -> None:
    assert manifest_name(tmp_path / "voices" / "train.jsonl") == "voices"
    assert manifest_name(tmp_path / "voices" / "calls_train.jsonl") == "calls_train"
