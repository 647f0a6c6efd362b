from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unislu_llm.scoring.text import ner_text, ner_tokens, normalise_phrase, normalise_transcript


@pytest.mark.parametrize(("text", "expected"), {
    "europe's": "europe 's", "don't": "don 't", "": "", " ' ": "", "''": "", "'s": "'s",
    "'''em": "'em", "countries' rights": "countries rights", "countries'.": "countries",
    "o'neil's": "o neil 's", "rock'n'roll": "rock n 'roll", "europe.'s": "europe 's",
    "mr. president, thank you!": "mr president thank you", "a . b": "a b", "3.5 %": "35 %",
    "what?!": "what", 'e-mail: me; "two-thirds"': 'e-mail: me "two-thirds"',
    "\tthe  EU's\nline ": "the EU 's line", "the '90s": "the '90s", ".'.": "",
    "l'europe d'aujourd'hui": "l 'europe d aujourd 'hui", "'tis, 'twas": "'tis 'twas",
}.items())
def test_ner_text(text: str, expected: str) -> None:
    assert ner_text(text) == expected


@given(st.text(alphabet="ab'.,!?; -", max_size=30))
def test_ner_tokens_lie_in_the_text_in_order_without_overlap(text: str) -> None:
    behind = 0
    for token in ner_tokens(text):
        assert behind <= token.start < token.end <= len(text)
        kept = "".join(c for c in text[token.start:token.end] if c not in ".,!?;")
        assert kept == token.text
        behind = token.end
    assert ner_text(ner_text(text)) == ner_text(text)


def test_transcripts_and_phrases_of_both_protocols() -> None:
    for text, expected in (("Thank you, madam. Why? Yes; no!", "Thank you, madam Why Yes no"),
                           ("two  blanks ", "two blanks"), ("europe's 3.5", "europe's 35"),
                           ("...", "")):
        assert normalise_transcript(text, "slue") == expected
    text = "Mr. Smith's colour, uh, TWENTY one"
    assert normalise_transcript(text, "whisper") == "mister smith is color 21"
    assert normalise_phrase("The Council's", "whisper") == "the council is"
    assert normalise_phrase("The Council's.", "slue") == "The Council 's"
