"""Audio with nothing to understand in it: the answer is well formed, bounded and quiet."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from tests.decoding.common import Build, decode
from unislu_llm.config import DecodeConfig
from unislu_llm.decoding.predict import understand
from unislu_llm.errors import UserError
from unislu_llm.tasks import ASR, SA

RATE = 16_000
BOTH = pytest.mark.parametrize("kind", ["llm", "whisper"])


def clips() -> list[Tensor]:
    noise = torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    return [torch.zeros(0), torch.full((1,), 0.5), 0.3 * noise[:1600], torch.zeros(RATE),
            1e-5 * noise, 0.3 * noise, noise.sign(), torch.ones(RATE)]


@BOTH
@pytest.mark.parametrize("beams", [1, 3])
def test_every_clip_has_a_bounded_answer(kind: str, beams: int, build: Build,
                                         caplog: pytest.LogCaptureFixture,
                                         capfd: pytest.CaptureFixture[str]) -> None:
    model, waves = build(kind), clips()
    options = {"max_new_tokens": 40, "num_beams": beams}
    bound = DecodeConfig(max_new_tokens=40).bound
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        for tasks in (["ner", "sa"], []):
            for grammar in (True, False):
                answers = decode(model, waves, [tasks] * len(waves), grammar=grammar, **options)
                for wave, answer in zip(waves, answers, strict=True):
                    for name in tasks or [ASR]:
                        assert 0 < answer.n_tokens[name] <= bound(len(wave) / RATE)
                        assert not grammar or set(answer.problems[name]) <= {"loop"}
                alone = [decode(model, [w], [tasks], grammar=grammar, **options)[0].raw
                         for w in waves[1:4]]
                assert alone == [a.raw for a in answers[1:4]], "empty clips change nothing"
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@BOTH
def test_a_minute_of_silence_is_windows_of_nothing(kind: str, build: Build, tmp_path: Path) -> None:
    path = tmp_path / "silence.wav"
    soundfile.write(path, np.zeros(61 * 8000), 8000)
    model = build(kind)
    answer, = understand(model, [path], ["sa"], DecodeConfig(max_new_tokens=24))
    assert (answer.no_speech, answer.transcript, answer.outputs) == (True, "", {"sa": None})
    assert [w["no_speech"] for w in answer.windows] == [True] * 3
    answer, = understand(model, [path], ["sa"], DecodeConfig(max_new_tokens=24, no_speech=1.0))
    assert not answer.no_speech
    assert [w["start"] for w in answer.windows[1:]] == [w["end"] for w in answer.windows[:-1]]
    assert answer.outputs["sa"] in SA.labels
    assert {p.partition(" in window ")[0] for p in answer.problems["sa"]} <= {"loop"}
    with pytest.raises(UserError, match=r"silence\.wav: 61\.00 s is longer than 30 s"):
        understand(build(kind), [path], ["sa"], long_form=False)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    with pytest.raises(UserError, match=r"empty\.wav: holds no samples"):
        understand(build(kind), [tmp_path / "empty.wav"])
