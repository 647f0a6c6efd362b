from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unislu_llm.errors import UserError
from unislu_llm.scoring.text import ner_text, ner_tokens, normalise_phrase, normalise_transcript

HANDWRITTEN = [
    ("europe's", "europe 's"),
    ("don't", "don 't"),
    ("europe", "europe"),
    ("", ""),
    (" ", ""),
    ("'", ""),
    ("''", ""),
    (" ' ", ""),
    ("'s", "'s"),
    ("'em", "'em"),
    ("'''em", "'em"),
    ("countries'", "countries"),
    ("countries' rights", "countries rights"),
    ("countries'.", "countries"),
    ("countries.'", "countries"),
    ("countries''", "countries"),
    ("o'neil", "o 'neil"),
    ("o'neil's", "o neil 's"),
    ("rock'n'roll", "rock n 'roll"),
    ("europe's.", "europe 's"),
    ("europe.'s", "europe 's"),
    ("mr. president, thank you!", "mr president thank you"),
    ("yes ; no", "yes no"),
    ("a . b", "a b"),
    ("a.b", "ab"),
    ("3.5 %", "35 %"),
    ("10,000", "10000"),
    ("what?!", "what"),
    ("two-thirds", "two-thirds"),
    ("e-mail: me", "e-mail: me"),
    ('"quoted"', '"quoted"'),
    ("the  european   union", "the european union"),
    ("\tnext\nline ", "next line"),
    ("it's the union's aim", "it 's the union 's aim"),
    ("The EU's", "The EU 's"),
    ("l'europe d'aujourd'hui", "l 'europe d aujourd 'hui"),
    ("...", ""),
    (".'.", ""),
    ("'tis, 'twas", "'tis 'twas"),
    ("the '90s", "the '90s"),
]
WORDS = ["europe", "council", "the", "30", "two-thirds"]
CLITICS = ["s", "t", "ll", "re", "ve", "d", "m"]
MARKS = ["", ".", ",", "!", "?", ";"]
# Every word with every clitic and mark: the mark goes, the clitic stands alone with its apostrophe.
GENERATED = [(f"{w}'{c}{m}", f"{w} '{c}") for w, c, m in product(WORDS, CLITICS, MARKS)]
# A word before and after a mark that stands anywhere: only the mark goes.
GENERATED += [(f"{w}{m} {m}{w}' {w}", f"{w} {w} {w}") for w, m in product(WORDS, MARKS)]


@pytest.mark.parametrize(("text", "expected"), HANDWRITTEN + GENERATED)
def test_ner_text(text: str, expected: str) -> None:
    assert ner_text(text) == expected


@given(st.text(alphabet="ab'.,!?; -", max_size=30))
def test_ner_text_of_its_own_result_is_the_same(text: str) -> None:
    assert ner_text(ner_text(text)) == ner_text(text)


@given(st.text(alphabet="ab'.,!?; -", max_size=30))
def test_ner_tokens_lie_in_the_text_in_order_without_overlap(text: str) -> None:
    behind = 0
    for token in ner_tokens(text):
        assert behind <= token.start < token.end <= len(text)
        kept = "".join(c for c in text[token.start : token.end] if c not in ".,!?;")
        assert kept == token.text
        behind = token.end


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Thank you, madam. Why? Yes; no!", "Thank you, madam Why Yes no"),
        ("two  blanks ", "two blanks"),
        ("europe's 3.5", "europe's 35"),
        ("...", ""),
    ],
)
def test_slue_transcript_loses_marks_but_not_the_comma(text: str, expected: str) -> None:
    assert normalise_transcript(text, "slue") == expected


def test_whisper_normaliser_is_used_for_transcripts_and_phrases() -> None:
    assert normalise_transcript("Mr. Smith's colour, uh, TWENTY one", "whisper") == "mister smith is color 21"
    assert normalise_phrase("The Council's", "whisper") == "the council is"


def test_unknown_protocol_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="slue, whisper"):
        normalise_transcript("a", "toolkit")  # type: ignore[arg-type]
