"""Plain Whisper makes hypotheses: first-pass transcripts that a model reads beside the speech."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, WhisperForConditionalGeneration
from transformers.generation import GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.logging import disable_progress_bar

from unislu_llm import weights
from unislu_llm.config import DecodeConfig, ModelConfig
from unislu_llm.data import audio
from unislu_llm.decoding.loops import loop_start
from unislu_llm.decoding.no_speech import Evidence, evidence_of
from unislu_llm.decoding.phrases import PhraseBias, Phrases
from unislu_llm.decoding.search import padded
from unislu_llm.errors import UserError
from unislu_llm.models.encoder import SpeechEncoder
from unislu_llm.models.whisper_decoder import whisper_prompt

_STEP = 5  # seconds to a multiple of which clips are padded


class Transcript(NamedTuple):
    """What is recognised in a clip, cut where it begins to repeat itself."""

    text: str
    loop: bool = False  # whether it was cut
    evidence: Evidence | None = None  # of speech, where the recogniser has any


Recogniser = Callable[..., list[Transcript]]
"""Of clips `(S,)` at 16 kHz, up to 30 s, a language (Whisper's code) and, where they are asked for,
`phrases` that are raised and `num_beams` over 1: their transcripts."""


class WhisperRecogniser:
    """Plain Whisper. With phrases, clips in which some may be said are decoded once more from the
    same frames, greedily; the better text stands.

    It was trained on clips padded to 30 s. Less silence saves time of the encoder and costs words
    (docs/results_decoding.md); at its natural length a clip makes it repeat itself.

    Args:
        checkpoint: a name (of some `revision`) or a folder.
        silence: seconds behind each clip at least, up to 30 s with it.

    Raises:
        UserError: no such checkpoint.
    """

    def __init__(self, checkpoint: str, revision: str | None = None,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 silence: float = 30.0) -> None:
        disable_progress_bar()  # of its tensors
        path = weights.resolve(checkpoint, revision=revision).path
        try:
            whisper: Any = weights.from_pretrained(WhisperForConditionalGeneration, path,
                                                   dtype=dtype, attn_implementation="sdpa")
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{checkpoint} cannot make hypotheses: it is no Whisper checkpoint "
                            f"({error})") from error
        whisper.generation_config.max_length = None  # new tokens are bounded; both would warn
        self._whisper, self._silence = whisper.eval().to(device), silence
        self._encoder = SpeechEncoder(whisper.model.encoder, ModelConfig()).eval()
        self._tokenizer = weights.from_pretrained(AutoTokenizer, path)

    def __call__(self, waves: Sequence[Tensor], language: str, phrases: Phrases | None = None,
                 num_beams: int = 1) -> list[Transcript]:
        # Its decoder has no mask: clips of a batch are padded to one length, which is rounded up so
        # that it depends on the clip alone.
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for i, wave in enumerate(waves):
            seconds = math.ceil((len(wave) / audio.SAMPLE_RATE + self._silence) / _STEP) * _STEP
            groups[min(seconds * audio.SAMPLE_RATE, audio.MAX_SAMPLES)].append(i)
        found: dict[int, Transcript] = {}
        for size, some in groups.items():
            clips = [F.pad(waves[i], (0, size - len(waves[i]))) for i in some]
            bounds = [DecodeConfig().bound(len(waves[i]) / audio.SAMPLE_RATE) for i in some]
            found |= zip(some, self._transcribe(clips, bounds, language, phrases, num_beams),
                         strict=True)
        return [found[i] for i in range(len(waves))]

    @torch.inference_mode()
    def _transcribe(self, waves: Sequence[Tensor], bounds: Sequence[int], language: str,
                    phrases: Phrases | None, num_beams: int) -> list[Transcript]:
        """Transcripts of clips of one length, of so many tokens at most."""
        whisper, tokenizer = self._whisper, self._tokenizer
        prompt = whisper_prompt(whisper, tokenizer, language)
        mel, lengths = audio.batch_log_mel(waves, int(whisper.config.num_mel_bins))
        frames, _ = self._encoder(mel.to(whisper.device, whisper.dtype), lengths)
        room = int(whisper.config.max_target_positions) - len(prompt)
        bounds = [min(room, bound) for bound in bounds]
        first: list[Tensor] = []  # logits at the first position
        # `generate` gives no logits of the prompt, which tell speech and language: hence the hook.
        with whisper.register_forward_hook(
                lambda _, __, out: None if first else first.append(out.logits[:, 0])):
            said = self._decode(frames, prompt, bounds, num_beams)
        found = []
        starts = first[0][::num_beams]  # beams of a clip begin alike
        for (ids, sure), evidence in zip(said, evidence_of(tokenizer, whisper, starts),
                                         strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            found.append(cut(ids, tokenizer, evidence.of_words(sum(sure) / len(sure), text)))
        raised: list[tuple[str, ...]] = []
        if phrases and phrases.boost:
            read = padded([[*prompt, *ids] for ids, _ in said], frames.device).clamp(min=0)
            logits = self._logits(frames, read)[:, len(prompt) - 1:].unbind(1)
            raised = phrases.maybe_said(tokenizer, [t.text for t in found],
                                        [len(ids) for ids, _ in said], logits)
        if phrases and (rows := [i for i, some in enumerate(raised) if some]):
            again = self._decode(frames[rows], prompt, [bounds[i] for i in rows], bias=PhraseBias(
                tokenizer, [raised[i] for i in rows], phrases.boost))
            for i, new in zip(rows, again, strict=True):
                both = PhraseBias(tokenizer, [raised[i]] * 2, phrases.boost)
                both.advance(padded([said[i][0], new[0]], frames.device))
                # The bonus counts twice: a greedy search seldom finds the best text with a phrase.
                old, better = (sum(sure) + 2 * gain for (_, sure), gain in
                               zip((said[i], new), both.gains(), strict=True))
                made = cut(new[0], tokenizer, found[i].evidence)  # of speech: the first pass's
                found[i] = made if better >= old and not made.loop else found[i]
        return found

    def _decode(self, frames: Tensor, prompt: Sequence[int], bounds: Sequence[int],
                num_beams: int = 1, bias: PhraseBias | None = None
                ) -> list[tuple[list[int], list[float]]]:
        """Of each row the ids behind the prompt, and log-probabilities of these and the end. A
        `bias` does not follow beams."""
        whisper, device = self._whisper, frames.device
        steps: list[Tensor] = []  # log-probability of each token that is taken, `(rows,)`

        def note(ids: Tensor, scores: Tensor) -> Tensor:
            log_probs = scores.float().log_softmax(-1)
            if bias is not None:
                bias.advance(ids[:, max(len(prompt), ids.shape[1] - 1):])
                scores = bias(scores)
            steps.append(log_probs.gather(1, scores.argmax(-1, keepdim=True))[:, 0])
            return scores

        def full(ids: Tensor, _: Any) -> Tensor:  # what beams find must not depend on other rows
            done = ids.shape[1] - len(prompt) >= torch.tensor(bounds)
            return done.repeat_interleave(len(ids) // len(bounds)).to(device)

        # Whisper's own `generate` adds windows, timestamps and language detection. The generic
        # one honours the checkpoint's suppressed tokens and decides nothing else.
        out = GenerationMixin.generate(
            whisper, encoder_outputs=BaseModelOutput(last_hidden_state=frames),
            attention_mask=torch.ones(frames.shape[:2], dtype=torch.long, device=device),
            decoder_input_ids=torch.tensor(prompt, device=device).expand(len(frames), -1),
            logits_processor=LogitsProcessorList(
                [note] if num_beams == 1 else []),  # type: ignore[list-item]
            stopping_criteria=StoppingCriteriaList([full]),  # type: ignore[list-item]
            do_sample=False, max_new_tokens=max(bounds), num_beams=num_beams)
        known = torch.stack(steps, dim=1) if steps else self._logits(
            frames, out[:, :-1])[:, len(prompt) - 1:].float().log_softmax(-1).gather(
                2, out[:, len(prompt):, None])[..., 0]
        end, found = int(whisper.config.eos_token_id), []
        for ids, n, log_probs in zip(out[:, len(prompt):].tolist(), bounds,
                                     known.tolist(), strict=True):
            said = ids[:ids.index(end)] if end in ids[:n] else ids[:n]
            found.append((said, log_probs[:min(len(said) + 1, n)]))
        return found

    def _logits(self, frames: Tensor, ids: Tensor) -> Tensor:
        """Logits `(rows, n, vocabulary)` behind each of these ids `(rows, n)`."""
        encoded = BaseModelOutput(last_hidden_state=frames)
        logits: Tensor = self._whisper(encoder_outputs=encoded, decoder_input_ids=ids).logits
        return logits


def cut(ids: Sequence[int], tokenizer: Any, evidence: Evidence | None) -> Transcript:
    """What token ids say, up to where they begin to repeat themselves."""
    # Copied by a model that reads it, a repetition would become one of the model.
    start = loop_start(ids)
    return Transcript(str(tokenizer.decode(ids[:start], skip_special_tokens=True)),
                      start is not None, evidence)
