"""Whether there is speech in a clip, and in which language: by what a pass over it says anyway.

The rule is openai/whisper's (`transcribe.py`): no speech where the decoder gives `<|nospeech|>`
more than a threshold at its first position and is unsure of its words, or (which is ours: of
silence Whisper is sure that it says `you`) of the language. Where no Whisper decoder runs, digital
silence and an empty CTC text are what there is to go by. docs/decoding.md has the numbers.
"""

from __future__ import annotations

import re
import zlib
from typing import Any, NamedTuple

from torch import Tensor
from transformers.models.whisper.tokenization_whisper import LANGUAGES

LOG_PROB = -1.0  # nats a token above which words are believed
COMPRESSION = 2.4  # ratio above which a text repeats itself
KNOWN, DOUBTED = 0.7, 0.6  # probability of a language that is believed; below which it is told of
OTHER = 0.9  # probability of another language than the model's from which it is told of
_QUIET = 2.0 / 32768  # of full scale: the dither of 16 bits
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")


class Evidence(NamedTuple):
    """What a pass over a clip says besides words."""

    no_speech: float  # probability, of Whisper's `<|nospeech|>` after `<|startoftranscript|>`
    language: str = ""  # likeliest one there; empty where the checkpoint knows one alone
    language_prob: float = 0.0  # of it among all languages
    log_prob: float | None = None  # mean of the transcript's tokens with its end, nats
    compression: float = 0.0  # bytes of the transcript by those of its zlib compression

    def of_words(self, log_prob: float, text: str) -> Evidence:
        """With what is known of the transcript."""
        data = text.strip().encode()
        return self._replace(log_prob=round(log_prob, 4),
                             compression=round(len(data) / len(zlib.compress(data)), 2))


def evidence_of(tokenizer: Any, whisper: Any, logits: Tensor) -> list[Evidence]:
    """Of each row of a Whisper's logits `(rows, vocabulary)` after `<|startoftranscript|>`."""
    names, logits = tokenizer.get_vocab(), logits.float()
    none = names.get("<|nospeech|>", names.get("<|nocaptions|>"))  # the old name
    shares = logits.softmax(-1)[:, none].tolist() if none is not None else [0.0] * len(logits)
    codes = {i: match[1] for name, i in names.items() if (match := _LANGUAGE.fullmatch(name))}
    # English-only checkpoints have the tokens, and never learnt them.
    if len(codes) < 2 or not getattr(whisper.generation_config, "is_multilingual", True):
        return [Evidence(round(share, 4)) for share in shares]
    best = logits[:, list(codes)].softmax(-1).max(-1)
    return [Evidence(round(share, 4), list(codes.values())[i], round(p, 4)) for share, i, p in
            zip(shares, best.indices.tolist(), best.values.tolist(), strict=True)]


def silent(wave: Tensor) -> bool:
    """Whether samples `(S,)` are digital silence."""
    return not bool((wave.abs() > _QUIET).any())


def judge(evidence: Evidence, threshold: float, told: str) -> tuple[bool, tuple[str, ...]]:
    """Whether there is no speech by a threshold of its probability, and warnings where there is;
    `told` is the code of the language for which the words were taken."""
    above, sure = evidence.no_speech > threshold, evidence.language_prob if evidence.language else 1
    unsure = evidence.log_prob is None or evidence.log_prob < LOG_PROB  # of its words
    if above and (unsure or sure < KNOWN):
        return True, ()
    found, told = [], told.lower().split("-")[0]
    if above or (unsure and sure < DOUBTED):
        found.append(f"may be no speech (probability {evidence.no_speech:.2f}"
                     + f", no language above {sure:.2f}" * (sure < DOUBTED) + ")")
    if evidence.compression > COMPRESSION:
        found.append(f"repeats itself (compression ratio {evidence.compression:.1f})")
    if evidence.language != told and evidence.language_prob >= OTHER:
        other, own = (LANGUAGES.get(c, c).title() for c in (evidence.language, told))
        found.append(f"sounds like {other} ({evidence.language_prob:.2f}); the model was trained "
                     f"on {own} (model.language)")
    return False, tuple(found)
