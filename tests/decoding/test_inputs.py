"""What `understand` takes: whatever form speech has, it is the same speech; the rest is refused."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from tests.decoding.common import REGISTRY, Build
from unislu_llm import understand
from unislu_llm.config import DecodeConfig
from unislu_llm.data import audio
from unislu_llm.data.validate import validate
from unislu_llm.decoding.hypotheses import ModelRecogniser
from unislu_llm.decoding.inputs import expand, utterances_of
from unislu_llm.errors import UserError
from unislu_llm.models.speech_llm import SpeechLLM

RATE = 16_000
SHORT = DecodeConfig(max_new_tokens=24)


def tone(rate: int = RATE, seconds: float = 0.8) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * 300 * np.arange(int(seconds * rate)) / rate)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(), RATE)  # 16 bits
    return path


def samples_of(given: Any) -> torch.Tensor:
    (u,), one = utterances_of(given)
    assert one
    assert u.audio is not None
    return audio.load(u.audio, samples=u.samples)


def test_one_clip_in_all_its_forms(clip: Path) -> None:
    whole, _ = soundfile.read(clip, dtype="float32")
    sixteen, _ = soundfile.read(clip, dtype="int16")
    expected = audio.load(clip)
    with clip.open("rb") as file:
        assert torch.equal(samples_of(file), expected)
    for form in (str(clip), clip, clip.read_bytes(), bytearray(clip.read_bytes()),
                 io.BytesIO(clip.read_bytes()), (whole, RATE), (whole.astype(np.float64), RATE),
                 (torch.from_numpy(whole), float(RATE)), (torch.from_numpy(whole)[None], RATE),
                 (sixteen, RATE), (RATE, sixteen), (torch.from_numpy(sixteen), np.int64(RATE)),
                 (sixteen.astype(np.int32) << 16, RATE), (whole.tolist(), RATE),
                 (np.stack([whole, whole]), RATE), (np.stack([whole, 0 * whole], 1) * 2, RATE),
                 {"array": whole, "sampling_rate": RATE, "path": None},
                 {"bytes": clip.read_bytes(), "path": None}, {"bytes": None, "path": str(clip)}):
        assert torch.equal(samples_of(form), expected), form
    eight = np.round(whole * 128 + 128).astype(np.uint8)
    assert float((samples_of((eight, RATE)) - expected).abs().max()) < 0.01
    halved = torch.from_numpy(whole).bfloat16().requires_grad_()
    assert float((samples_of((halved, RATE)) - expected).abs().max().detach()) < 0.01


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000, 11_025.5])
def test_an_array_is_resampled_as_a_file_is(rate: float, tmp_path: Path) -> None:
    wave = tone(int(rate)).astype(np.float32)
    found = samples_of((wave, rate))
    assert len(found) == pytest.approx(0.8 * RATE, abs=2)
    if rate == int(rate):
        soundfile.write(tmp_path / "a.wav", wave, int(rate), subtype="FLOAT")
        assert torch.equal(found, audio.load(tmp_path / "a.wav"))


ONE = np.zeros(RATE)
BAD: list[tuple[Any, str]] = [
    ((np.zeros(0), RATE), "holds no samples"),
    ((np.zeros((2, 0)), RATE), "holds no samples"),
    ((np.full(RATE, np.nan), RATE), "NaN or infinite"),
    ((torch.tensor([0.1, -torch.inf, 0.1]), RATE), "NaN or infinite"),
    ((np.full(RATE, 1e300), RATE), "NaN or infinite"),
    ((np.full(RATE, 20_000.0), RATE), "divide 16-bit samples by 32768"),
    ((np.full(RATE, 5), RATE), "samples are int64; give floats"),
    ((ONE > 0, RATE), "samples are bool"),
    ((np.array([None, "x"]), RATE), "samples are object"),
    (([[0.1], [0.1, 0.2]], RATE), "is no array of samples"),
    ((np.zeros((16, RATE)), RATE), "give several clips as a list"),
    ((np.zeros((2, 2)), RATE), r"shape \(2, 2\) is not"),
    ((np.zeros((1, 1, RATE)), RATE), "is not .samples,., .samples, channels."),
    ((np.float64(0.5), RATE), "is tuple"),
    ((ONE, 16), "16 Hz is not between 1000 and 1000000; .* rate in Hz"),
    ((ONE, 0), "0 Hz is not"), ((ONE, -RATE), "-16000 Hz is not"), ((ONE, np.nan), "nan Hz"),
    (ONE, "is an array without its rate"), (torch.zeros(RATE), "is an array without its rate"),
    ((ONE, "16000"), "is tuple"), (None, "is NoneType"), (7, "is int"), ({}, "is NoneType"),
    (b"", "cannot be read as audio"), (b"no audio", "cannot be read as audio"),
    (io.StringIO("x"), "open it with mode 'rb'"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_what_is_refused_is_named(given: Any, message: str, clip: Path) -> None:
    start = "inputs[2]"
    with pytest.raises(UserError, match=message) as error:
        list(utterances_of([clip, (ONE, RATE), given])[0])
    assert str(error.value).startswith(start)
    if not isinstance(given, tuple) or len(given) != 2 or message != "is tuple":
        with pytest.raises(UserError, match=message) as error:
            list(utterances_of(given)[0])
        assert str(error.value).startswith("the input")


@pytest.mark.parametrize(("right", "cancels"), [(-1.0, True), (-0.99, True), (-0.5, False),
                                                (0.0, False), (1.0, False)])
def test_the_louder_channel_is_taken_where_channels_cancel_each_other(
        right: float, cancels: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    wave = tone()
    soundfile.write(tmp_path / "anti.flac", np.stack([wave, right * wave], 1), RATE)
    mixed = wave if cancels else (1 + right) / 2 * wave
    for given, name in ((tmp_path / "anti.flac", "anti.flac"),
                        ((np.stack([wave, right * wave]), RATE), "the input")):
        assert samples_of(given).numpy() == pytest.approx(mixed, abs=1e-4)
        told = f"{name}: its channels cancel each other out; the louder one is taken"
        assert [told in str(w.message) for w in recwarn if "cancel" in str(w.message)][-1:] == [
            True] * cancels
    (tmp_path / "m.jsonl").write_text('{"id": "a", "audio": "anti.flac", "text": "the council"}')
    page = validate([tmp_path / "m.jsonl"], audio="full").page()
    assert ("cancel each other out" in page, "silent" in page) == (cancels, False)
    for quiet in (0 * wave, 1e-6 * wave):
        recwarn.clear()
        samples_of((np.stack([quiet, quiet], 1), RATE))
        assert not recwarn


def test_bytes_are_checked_as_files_are(clip: Path, tmp_path: Path) -> None:
    ogg = tmp_path / "a.ogg"
    soundfile.write(ogg, tone(48_000, 3.0), 48_000, format="OGG", subtype="OPUS")
    assert len(samples_of(ogg.read_bytes())) == len(audio.load(ogg))
    for content in (ogg.read_bytes()[:-300], clip.read_bytes()[:9000]):
        with pytest.raises(UserError, match="the input: the file is truncated"):
            list(utterances_of(content)[0])


@pytest.mark.parametrize("kind", ["llm", "whisper"])
def test_one_input_has_one_answer_and_a_list_a_list(kind: str, build: Build, clip: Path) -> None:
    model = build(kind)
    one = understand(model, str(clip), ["sa"], SHORT)
    wave, _ = soundfile.read(clip)
    every = understand(model, (each for each in (clip, (wave, RATE), clip.read_bytes())), "sa",
                       SHORT)
    assert [(a.transcript, a.outputs, a.seconds) for a in every] == [
        (one.transcript, one.outputs, 0.8)] * 3
    assert list(understand(model, clip, options=SHORT).outputs) == list(REGISTRY.names)
    assert understand(model, []) == []
    silence = understand(model, (np.zeros(RATE), RATE), ["sa"], SHORT)
    assert silence.no_speech
    assert (silence.outputs, silence.problems) == ({"sa": None}, {"sa": ()})


def test_a_long_array_is_windowed_as_its_file(build: Build, tmp_path: Path) -> None:
    wave = (np.random.default_rng(0).standard_normal(65 * RATE) * 3000).astype(np.int16)
    soundfile.write(tmp_path / "long.wav", wave, RATE)
    model = build("whisper")
    by_file = understand(model, tmp_path / "long.wav", "sa", SHORT)
    by_array = understand(model, [(wave, RATE)], "sa", SHORT)[0]
    assert len(by_file.windows) == len(by_array.windows) >= 3
    assert [(w["start"], w["end"], w["text"]) for w in by_array.windows] == [
        (w["start"], w["end"], w["text"]) for w in by_file.windows]
    with pytest.raises(UserError, match=r"inputs\[0\]: 65\.00 s is longer than 30 s; leave out"):
        understand(model, [(wave, RATE)], long_form=False)


def test_the_recogniser_is_told_the_language(build: Build, clip: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def recogniser(waves: Any, language: str) -> list[Any]:
        from unislu_llm.decoding.recogniser import Transcript

        told.append(language)
        return [Transcript("anna met the council")] * len(waves)

    monkeypatch.setattr("unislu_llm.decoding.hypotheses.recogniser_of", lambda *_: recogniser)
    model = build("llm", projector="none", hypothesis="manifest", transcript="verbatim")
    assert understand(model, clip, "sa", SHORT, language="de").hypothesis == "anna met the council"
    understand(model, clip, "sa", SHORT)
    assert told == ["de", "en"]
    # Transcripts alone, word for word the hypothesis: there is nothing to ask the LLM.
    for name in ("prefill", "step"):
        monkeypatch.setattr(SpeechLLM, name, None)
    answer = understand(model, (tone(), RATE), tasks=[])
    assert (answer.transcript, answer.outputs) == ("anna met the council", {})
    with pytest.raises(UserError, match="language 'de': no recogniser"):
        understand(build("llm"), clip, language="de")
    # A trained model was told its language in training.
    maker = ModelRecogniser(build("whisper"))
    monkeypatch.setattr("unislu_llm.decoding.hypotheses.recogniser_of", lambda *_: maker)
    with pytest.raises(UserError, match=r"language 'de': what makes hypotheses .* on 'en'"):
        understand(model, clip, language="de")


def test_names_on_the_command_line_stand_for_files(clip: Path, monkeypatch: pytest.MonkeyPatch,
                                                   make_utterances: Callable[..., Any]) -> None:
    make_utterances()
    monkeypatch.chdir(clip.parent)
    for name in ("audio/note.txt", "audio/._u0.wav", "audio/deep/x.M4A"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    inside = [f"audio/u{i}.wav" for i in range(4)]
    assert list(expand("audio")) == list(expand("audio/")) == ["audio/deep/x.M4A", *inside]
    assert list(expand("audio/u[12].wav")) == inside[1:3]
    assert list(expand("**/*.wav")) == [*inside, "clip.wav"]
    assert list(expand("audio/**")) == ["audio/deep/x.M4A", *inside, "audio/note.txt"]
    Path("notes").mkdir()
    assert list(expand("*")) == ["audio/deep/x.M4A", *inside, "clip.wav"], "none is lost for notes"
    assert list(expand("gone.wav")) == ["gone.wav"]  # it is refused when it is read
    os.rename("clip.wav", "[clip].wav")
    assert list(expand("[clip].wav")) == ["[clip].wav"]
    os.mkdir("empty")
    for name, message in (("empty", "no audio file is in"), ("gone*.wav", "no file is named")):
        with pytest.raises(UserError, match=message):
            list(expand(name))
