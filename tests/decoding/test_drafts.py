"""Drafts: made by recognisers, the same alone and in batches; manifests get them; models that need them make them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unislu_llm.cli import main
from unislu_llm.data.collate import SpeechDataset
from unislu_llm.data.manifest import read_manifest, write_manifest
from unislu_llm.data.targets import Sample
from unislu_llm.decoding.draft_files import write_drafts
from unislu_llm.decoding.drafts import CtcRecogniser, Drafter, ModelRecogniser, WhisperRecogniser, complete_drafts
from unislu_llm.decoding.generate import DecodeOptions, predict, understand
from unislu_llm.errors import UserError
from unislu_llm.models.speech_llm import SpeechLLM
from unislu_llm.models.tiny import make_whisper
from unislu_llm.tasks import TaskRegistry
from unislu_llm.utterance import Utterance

REGISTRY = TaskRegistry()
Build = Callable[..., SpeechLLM]


class Heard:
    """A recogniser that says how long a clip is, and notes what it was asked."""

    def __init__(self, fail_after: int = 1000) -> None:
        self.looped, self.batches, self.fail_after = [], [], fail_after

    def __call__(self, waves: Sequence[Tensor], language: str) -> list[str]:
        if len(self.batches) == self.fail_after:
            raise KeyboardInterrupt
        self.batches.append([len(wave) for wave in waves])
        self.looped = [False] * len(waves)
        return [f"  Heard {len(wave)}\n[NER] {language} " for wave in waves]


@pytest.fixture
def waves(make_utterances: Callable[..., list[Utterance]]) -> list[Tensor]:
    return [wave for _, wave in SpeechDataset([Sample(u, None) for u in make_utterances()])]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a tiny Whisper that does not say one thing to everything."""
    model, tokenizer = make_whisper(init_std=0.3)
    folder = tmp_path_factory.mktemp("whisper")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_drafts_are_the_same_alone_and_in_a_batch(whisper: str, waves: list[Tensor], tiny_speech_llm: Build) -> None:
    ctc = tiny_speech_llm(projector="ctc", projector_options={"heads": 2, "blank_bias": 0.0}, whisper_options={"init_std": 0.3})
    ctc.learn_vocabulary(["the council met", "we thank anna"])
    for recogniser in (WhisperRecogniser(whisper), CtcRecogniser(ctc),
                       ModelRecogniser(tiny_speech_llm(whisper_options={"init_std": 0.3}))):
        together = recogniser(waves, "en")
        assert together == [recogniser([wave], "en")[0] for wave in waves]
        assert len(set(together)) > 1  # it listens
    with pytest.raises(UserError, match="'ctc'"):
        CtcRecogniser(tiny_speech_llm())
    with pytest.raises(UserError, match="language 'xx'"):
        WhisperRecogniser(whisper)(waves[:1], "xx")


def test_a_drafter_styles_and_remembers(waves: list[Tensor]) -> None:
    heard = Heard()
    drafter = Drafter(heard, REGISTRY, batch_size=3)
    first = drafter([*waves, waves[0]])
    assert [len(batch) for batch in heard.batches] == [3, 1]
    assert first[0] == first[-1] == f"heard {len(waves[0])} en"
    assert drafter(waves) == first[:-1]
    assert len(heard.batches) == 2
    assert Drafter(Heard(), REGISTRY, "as-is")(waves[:1], "de") == [f"Heard {len(waves[0])} de"]
    with pytest.raises(UserError, match="style"):
        Drafter(Heard(), REGISTRY, "upper")


def test_rows_are_checked_and_kept(make_utterances: Callable[..., list[Utterance]], tmp_path: Path) -> None:
    utterances = [dataclasses.replace(u, draft=draft) for u, draft in
                  zip(make_utterances(), ("the counsel", None, "", "a  b"), strict=True)]
    write_manifest(tmp_path / "m.jsonl", utterances)
    assert [u.draft for u in read_manifest(tmp_path / "m.jsonl", REGISTRY)] == ["the counsel", None, "", "a b"]
    for bad, message in (("we [NER] it", r":1: draft: holds the marker \[NER\]"), (3, ":1: draft: must be a string"),
                         ("a\x07b", "control character")):
        (tmp_path / "bad.jsonl").write_text(json.dumps({"id": "a", "text": "b", "draft": bad}) + "\n")
        with pytest.raises(UserError, match=message):
            read_manifest(tmp_path / "bad.jsonl", REGISTRY)


def test_a_stopped_call_goes_on_and_rows_stay(make_utterances: Callable[..., list[Utterance]], tmp_path: Path) -> None:
    manifest, out = tmp_path / "corpus" / "train.jsonl", tmp_path / "far" / "out"
    utterances = make_utterances(seconds=(0.9, 1.6, 0.6, 1.2, 0.7))
    utterances[2] = dataclasses.replace(utterances[2], start=0.1, end=0.5, language="de-DE", duration=None)
    write_manifest(manifest, [*utterances, Utterance("text", None, "no audio")])
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0]["extra"] = {"audio": "metadata"}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(heard: Heard, settings: str = "a") -> Any:
        drafter = Drafter(heard, REGISTRY, batch_size=2)
        return write_drafts(drafter, {"weights": settings}, [manifest], out, REGISTRY, progress=False)[0]

    with pytest.raises(KeyboardInterrupt):
        write(Heard(fail_after=2))
    assert not (out / "train.jsonl").exists()
    heard = Heard()
    report = write(heard)
    assert sum(map(len, heard.batches)) == 5 - 3  # a batch of one language each: one German clip, then two English ones were kept
    assert (report.made, report.known, report.without) == (2, 3, 1)
    written = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k not in ("draft", "audio")} for row in written] \
        == [{k: v for k, v in row.items() if k != "audio"} for row in rows]
    again = read_manifest(out / "train.jsonl", REGISTRY, check_audio=True)
    assert [u.audio.resolve() for u in again[:-1]] == [u.audio.resolve() for u in utterances]  # type: ignore[union-attr]
    heard_all = [f"heard {n}" for n in ("14400 en", "25600 en", "6400 de", "19200 en", "11200 en")]
    assert [u.draft for u in again] == [*heard_all, None]
    assert write(Heard(fail_after=0)).known == 5
    with pytest.raises(UserError, match="exists and differs"):
        write(_Other(), "b")
    with pytest.raises(UserError, match="is the folder of"):
        write_drafts(Drafter(Heard(), REGISTRY), {}, [manifest], manifest.parent, REGISTRY)


class _Other(Heard):
    def __call__(self, waves: Sequence[Tensor], language: str) -> list[str]:
        self.looped = [False] * len(waves)
        return ["other"] * len(waves)


def test_the_command_writes_what_is_heard(whisper: str, make_utterances: Callable[..., list[Utterance]], tmp_path: Path,
                                          waves: list[Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(tmp_path / "m.jsonl", make_utterances())
    assert main(["draft", whisper, str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--threads", "1"]) == 0
    assert "4 drafts" in capsys.readouterr().out
    drafts = [u.draft for u in read_manifest(tmp_path / "out" / "m.jsonl", REGISTRY)]
    assert drafts == Drafter(WhisperRecogniser(whisper), REGISTRY)(waves)
    assert main(["draft", whisper, str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--source", "ctc"]) == 2
    assert "saved model" in capsys.readouterr().err


def test_rows_of_text_have_their_transcript_as_draft(make_utterances: Callable[..., list[Utterance]], waves: list[Tensor],
                                                     tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [Utterance("a", None, "The Council met."), Utterance("b", None, "Thanks", draft="tanks"),
             Utterance("c", None, "A Law")]
    write_manifest(tmp_path / "text.jsonl", texts)
    write_manifest(tmp_path / "both.jsonl", [*make_utterances(), *texts])

    def drafts(out: str, name: str) -> list[str | None]:
        return [u.draft for u in read_manifest(tmp_path / out / name, REGISTRY)]

    # No recogniser is loaded for text alone: none is there.
    call = ["draft", str(tmp_path / "nothing"), str(tmp_path / "text.jsonl"), "--threads", "1", "--text-rows", "copy"]
    for out, copied in (("lower", ["the council met.", "a law"]), ("as-is", ["The Council met.", "A Law"])):
        assert main([*call, "--out", str(tmp_path / out), "--style", out]) == 0
        assert drafts(out, "text.jsonl") == [copied[0], "tanks", copied[1]]
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "text.jsonl" in line]
    assert {tuple(line[1:]) for line in table} == {("0", "0", "2", "1", "0", "-")}  # copied: 2; one had a draft; no WER

    heard = [f"heard {len(wave)} en" for wave in waves]
    expected = {"skip": ([None, "tanks", None], (4, 0, 0, 3)), "copy": (["the council met.", "tanks", "a law"], (4, 0, 2, 1))}
    for text_rows, (rest, counts) in expected.items():
        report = write_drafts(Drafter(Heard(), REGISTRY), {}, [tmp_path / "both.jsonl"], tmp_path / text_rows, REGISTRY,
                              progress=False, text_rows=text_rows)[0]  # type: ignore[arg-type]
        assert drafts(text_rows, "both.jsonl") == [*heard, *rest]
        assert (report.made, report.known, report.copied, report.without) == counts
        assert [made for _, made in report.pairs] == heard


def test_models_make_the_drafts_that_they_lack(whisper: str, make_utterances: Callable[..., list[Utterance]], waves: list[Tensor],
                                               tiny_speech_llm: Build) -> None:
    model = tiny_speech_llm(draft="manifest", encoder=whisper, whisper_options={"init_std": 0.3})
    utterances = make_utterances()
    files = [u.audio for u in utterances if u.audio]
    expected = Drafter(WhisperRecogniser(whisper), REGISTRY)(waves)
    assert [r["draft"] for r in understand(model, files)] == expected
    assert complete_drafts(model, waves, [None, "given", None, ""]) == [expected[0], "given", expected[2], ""]
    options = DecodeOptions(max_new_tokens=12)
    made, given, other = (predict(model, [Sample(dataclasses.replace(u, draft=draft), None)
                                          for u, draft in zip(utterances, drafts, strict=True)], options)
                          for drafts in ([None] * 4, expected, ["we thank the european parliament"] * 4))
    assert made == given
    assert [row["draft"] for row in made] == expected
    assert [row["raw"] for row in made] != [row["raw"] for row in other]
    assert not any("draft" in name for name in model.state_dict())


def test_reference_drafts_are_for_manifests(make_utterances: Callable[..., list[Utterance]], tiny_speech_llm: Build) -> None:
    model = tiny_speech_llm(draft="gold")
    utterances = make_utterances()
    options = DecodeOptions(max_new_tokens=8)
    gold = predict(model, [Sample(u, None) for u in utterances], options)
    reading = tiny_speech_llm(draft="manifest")
    reading.load_state_dict(model.state_dict())
    same = predict(reading, [Sample(dataclasses.replace(u, draft=u.text), None) for u in utterances], options)
    assert gold == same
    with pytest.raises(UserError, match="not used on files"):
        understand(model, [u.audio for u in utterances if u.audio])


def test_own_ctc_text_as_draft(waves: list[Tensor], tiny_speech_llm: Build) -> None:
    model = tiny_speech_llm(draft="manifest", draft_checkpoint="ctc", projector="ctc", whisper_options={"init_std": 0.3},
                            projector_options={"heads": 2, "blank_bias": 0.0})
    model.learn_vocabulary(["the council met", "we thank anna"])
    with torch.no_grad():
        assert complete_drafts(model, waves) == Drafter(CtcRecogniser(model), REGISTRY)(waves)
