"""Audio with nothing to understand in it: the answer is well formed, bounded and quiet, whichever way it is decoded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from unislu_llm.data.targets import Sample
from unislu_llm.decoding.generate import DecodeOptions, decode_batch, prediction_row, understand
from unislu_llm.decoding.loops import has_loop
from unislu_llm.decoding.windows import understand_long
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.tasks import SA
from unislu_llm.utterance import Utterance

Build = Callable[..., SLUModel]
RATE = 16_000
OPTIONS = DecodeOptions(max_new_tokens=40)
BOTH = pytest.mark.parametrize("kind", ["llm", "whisper"])


def clips() -> dict[str, Tensor]:
    noise = torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    return {"empty": torch.zeros(0), "one sample": torch.full((1,), 0.5), "short": 0.3 * noise[:1600],
            "silence": torch.zeros(RATE), "faint": 1e-5 * noise, "noise": 0.3 * noise, "clipped": noise.sign(),
            "offset": torch.ones(RATE)}


@pytest.fixture
def build(tiny_speech_llm: Build, tiny_whisper_slu: Build) -> Callable[[str], SLUModel]:
    return lambda kind: (tiny_speech_llm if kind == "llm" else tiny_whisper_slu)(whisper_options={"init_std": 0.3})


@BOTH
@pytest.mark.parametrize("beams", [1, 3])
def test_every_clip_has_a_bounded_answer(kind: str, beams: int, build: Callable[[str], SLUModel],
                                         caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    model, options = build(kind), replace(OPTIONS, num_beams=beams, force_task=True)
    waves = list(clips().values())
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        for task in ("ner", "sa", None):
            samples = [Sample(Utterance(name, None, "", {}), task) for name in clips()]
            for grammar in (True, None):
                answers = decode_batch(model, samples, waves, replace(options, grammar=grammar))
                for sample, wave, ids in zip(samples, waves, answers, strict=True):
                    assert 0 < len(ids) <= options.bound(len(wave) / RATE)
                    row = prediction_row(model.codec, sample, ids, len(wave) / RATE, cut_loops=bool(grammar))
                    if grammar:
                        assert set(row["problems"]) <= {"loop"}
                        assert ("loop" in row["problems"]) == has_loop(ids)
                alone = [decode_batch(model, [s], [w], replace(options, grammar=grammar))[0]
                         for s, w in zip(samples[1:4], waves[1:4], strict=True)]
                assert alone == answers[1:4], "empty clips change nothing for their batch"
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@BOTH
@pytest.mark.parametrize("beams", [1, 3])
def test_files_of_nothing_are_understood(kind: str, beams: int, build: Callable[[str], SLUModel], tmp_path: Path,
                                         capfd: pytest.CaptureFixture[str]) -> None:
    model = build(kind)
    files = []
    for name, wave in clips().items():
        if len(wave):
            files.append(tmp_path / f"{name}.wav")
            soundfile.write(files[-1], wave.numpy(), RATE, subtype="FLOAT")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = understand(model, files, options=replace(OPTIONS, num_beams=beams))
    for file, result in zip(files, results, strict=True):
        assert result["file"] == str(file)
        assert set(result["problems"]) <= {"loop"}
        assert isinstance(result["ner"], list)
        assert result["sa"] in SA.labels
    assert capfd.readouterr() == ("", "")
    empty = tmp_path / "empty.wav"
    soundfile.write(empty, np.zeros(0), RATE)
    with pytest.raises(UserError, match=r"empty\.wav: holds no samples"):
        understand(model, [empty])


@BOTH
def test_a_minute_of_silence_is_windows_of_nothing(kind: str, build: Callable[[str], SLUModel], tmp_path: Path) -> None:
    path = tmp_path / "silence.wav"
    soundfile.write(path, np.zeros(61 * 8000), 8000)
    result = understand_long(build(kind), [path], ["sa"], replace(OPTIONS, max_new_tokens=16))[0]
    assert [w["start"] for w in result["windows"][1:]] == [w["end"] for w in result["windows"][:-1]]
    assert result["sa"] in SA.labels
    assert {p.partition(" in window ")[0] for p in result["problems"]} <= {"loop"}


def test_a_loop_in_the_answer_is_cut_and_counted(build: Callable[[str], SLUModel]) -> None:
    """A decoder that is made to repeat one word is stopped long before its bound; on its own it goes on to the end."""
    model = build("whisper")
    word = model.codec.text_ids("the")[-1]
    generate = model.generate

    def stuck(*args: object, **kwargs: object) -> Tensor:
        kwargs["logits_processor"].insert(0, lambda ids, scores: torch.zeros_like(scores).index_fill(  # type: ignore[attr-defined]
            1, torch.tensor([word]), 9.0))
        return generate(*args, **kwargs)  # type: ignore[arg-type]

    model.generate = stuck  # type: ignore[method-assign, assignment]
    sample, wave = Sample(Utterance("u", None, "", {}), "sa"), clips()["silence"]
    options = replace(OPTIONS, max_new_tokens=200, extra_tokens=200, force_task=True)
    for grammar, problems in ((True, ["loop"]), (None, ["missing_separator", "no_end"])):
        ids = decode_batch(model, [sample], [wave], replace(options, grammar=grammar))[0]
        assert (len(ids) < 60) == bool(grammar)
        assert prediction_row(model.codec, sample, ids, 1.0, cut_loops=bool(grammar))["problems"] == problems
