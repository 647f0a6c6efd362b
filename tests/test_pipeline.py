"""Python at home: transformers' pipeline, `from_pretrained`, streams, and a base held once."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import pipeline

import unislu_llm.pipeline  # noqa: F401 - which registers the task
from unislu_llm import SpeechLLM, WhisperSLU, load, stream, understand
from unislu_llm.config import DecodeConfig
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel

TASK, SHORT = "spoken-language-understanding", DecodeConfig(max_new_tokens=24, batch_size=2)
CLIPS = [Path(f"corpus/audio/u{i}.wav") for i in range(4)]


@pytest.mark.parametrize("kind", ["speech_llm", "whisper_slu"])
def test_a_pipeline_answers_as_python_does(kind: str, tiny_run: Callable[..., Path]) -> None:
    pipe, model = pipeline(TASK, str(tiny_run(kind) / "best"), options=SHORT), load("runs/tiny")
    assert pipe(CLIPS[0]) == pipe(CLIPS[0].read_bytes()) == understand(
        model, CLIPS[0], options=SHORT).to_dict()
    expected = [answer.to_dict() for answer in stream(model, CLIPS, options=SHORT)]
    assert pipe(CLIPS, batch_size=2) == expected
    assert "ner" not in pipeline(TASK, model, tasks="sa", options=SHORT)(CLIPS[0])
    rest = iter(CLIPS)
    answers = pipe((clip for clip in rest), batch_size=2)
    assert (next(answers), list(rest)) == (expected[0], CLIPS[2:])


def test_a_stream_takes_what_is_asked_for(tiny_run: Callable[..., Path]) -> None:
    model = load(tiny_run())
    answers = stream(model, iter([*CLIPS[:3], Path("none.wav")]), options=SHORT)
    assert [next(answers), next(answers)] == understand(model, CLIPS[:2], options=SHORT)
    with pytest.raises(UserError, match=r"none\.wav"):
        next(answers)
    with pytest.raises(UserError, match=r"^inputs\[3\]: is int"):
        list(stream(model, [*CLIPS[:3], 7], options=SHORT))  # type: ignore[list-item]


def test_from_pretrained_knows_its_kind(tiny_run: Callable[..., Path]) -> None:
    for own, other in ((SpeechLLM, WhisperSLU), (WhisperSLU, SpeechLLM)):
        run = tiny_run(own.kind)
        assert type(own.from_pretrained(run)) is type(SLUModel.from_pretrained("runs/tiny")) is own
        with pytest.raises(UserError, match=f"is a {own.__name__}, and no {other.__name__}"):
            other.from_pretrained(run)


def test_equal_frozen_weights_of_two_models_are_held_once(tiny_run: Callable[..., Path]) -> None:
    one = load(tiny_run())
    other = next(p for p in one.parameters() if not p.requires_grad)
    other.data += 1
    two = load("runs/tiny", base=one)
    for name, p in one.named_parameters():
        shared = two.get_parameter(name).data_ptr() == p.data_ptr()
        assert shared == (not p.requires_grad and p is not other), name
