"""A sample of `eval/backbones.py`: architectures and tokenizers that have to be right, and what
its tables say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unislu_llm.errors import UserError

ROOT = Path(__file__).parents[2]
# Plain, with a window, experts, scaled logits, layers that are no `Linear`, and a recurrent state.
ARCHITECTURES = ("llama", "gemma3_text", "aria_text", "granite", "gpt2", "bamba")
KINDS = ("GPT-2: one token begins, ends and fills", "no padding token", "characters",
         "T5: unigram without bytes, NFKC, an end behind each text",
         "Llama 2: blanks by the normaliser", "Gemma: blanks by the normaliser, none before",
         "byte-level BPE, NFD", "bytes, without a backend (ByT5)")
REFUSED = {
    "no end token": "no end-of-text token; name one as eos_token in the folder's tokenizer_config",
    "WordPiece": "does not keep punctuation: it gives 'O ' Neil ' s 1, 250 re - opened.' back for",
    "whole words": "does not keep capital letters: it gives '' back for 'Anna'"}


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The module; what it sets in the environment goes with this file's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(ROOT / "eval")
        import backbones
        yield backbones


@pytest.fixture(scope="module")
def found(script: Any) -> dict[str, dict[str, Any]]:
    return script.run(script.Options(only=(*ARCHITECTURES, "bert", *KINDS, *REFUSED)))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_architecture_is_right_in_every_column(script: Any, found: Any, kind: str) -> None:
    cells = {**found["architectures"][kind], "4-bit": "yes"}  # of that, CI has no package
    assert cells == dict.fromkeys(["made", *script.backbone_checks.COLUMNS], "yes")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_right_in_every_column(script: Any, found: Any, kind: str) -> None:
    assert found["tokenizers"][kind] == dict.fromkeys(script.tokenizer_kinds.COLUMNS, "yes")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_is_refused(found: Any, kind: str) -> None:
    cells = found["tokenizers"][kind]
    assert list(cells) == ["refused"]
    assert REFUSED[kind] in cells["refused"]


def test_an_encoder_is_refused(found: Any) -> None:
    assert "is no causal LM" in found["architectures"]["bert"]["refused"]


def test_an_unknown_name_is_an_error(script: Any) -> None:
    with pytest.raises(UserError, match=r"--only lama: no architecture and no kind.*llama"):
        script.run(script.Options(only=("lama",)))


def test_a_wrong_model_is_not_called_right(script: Any, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are not the model's own, and an answer that depends on the batch."""
    checks = script.backbone_checks
    bench = checks.Bench(tmp_path)
    model = checks.tiny.make_speech_llm(hypothesis="manifest", transcript="rewrite")
    checks.own_loss(bench, model)
    answers = bench.decode(model)
    checks.decodes(bench, model, answers)
    checks.rounds(bench, model)
    alone = bench.decode(model, rows=[1])
    with pytest.raises(AssertionError, match="clip 0, ner"):
        checks.same(answers[:1], alone)
    monkeypatch.setattr("unislu_llm.models.head.logits_of",
                        lambda lm, hidden: 3 * lm.lm_head(hidden))
    with pytest.raises(AssertionError, match="the model's own forward differ"):
        checks.own_loss(bench, model)


def test_rows_that_are_alike_are_one_row_and_its_cause_is_told(script: Any) -> None:
    columns = {"loads": "", "trains": ""}
    good, bad = {"loads": "yes", "trains": "yes"}, {"loads": "yes", "trains": "E: at b"}
    rows: Any = {"b": bad, "a": good, "c": good, "d": {"refused": "d is none"},
                 "e": {"loads": "yes"}}
    assert script.table("kind", rows, columns) == [
        "| kind | loads | trains |", "|---|---|---|", "| `a`, `c` (2) | yes | yes |",
        "| `e` (1) | yes | not run |", "| `b` (1) | yes | no |", "| `d` (1) | refused |  |", "",
        "The first thing that is wrong:", "", "* `d`: refused: d is none",
        "* `b`: trains: E: at b", ""]


def test_the_page_is_written_between_its_marks(script: Any, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"above\n{script.BEGIN}\nold\n{script.END}\nbelow\n")
    for text in ("new", "newer"):
        script.write_page(text, page)
        assert page.read_text() == f"above\n{script.BEGIN}\n\n{text}\n{script.END}\nbelow\n"
    page.write_text("above")
    with pytest.raises(UserError, match="lacks the lines"):
        script.write_page("new", page)
