"""Recognisers make hypotheses: first-pass transcripts that a model reads beside the speech.

Hypotheses are attached to utterances before anything is decoded; decoding itself runs no second
model. A recogniser is plain Whisper, one of our models, or the greedy text of a `ctc` projector.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, WhisperForConditionalGeneration
from transformers.generation import GenerationMixin, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.logging import disable_progress_bar

from unislu_llm import models, weights
from unislu_llm.config import DecodeConfig, ModelConfig
from unislu_llm.data import audio
from unislu_llm.data.frame_cache import load_clip
from unislu_llm.decoding.engine import Engine
from unislu_llm.decoding.loops import loop_start
from unislu_llm.decoding.no_speech import Evidence, evidence_of, silent
from unislu_llm.errors import UserError
from unislu_llm.io import is_saved_model
from unislu_llm.models.base import SLUModel
from unislu_llm.models.ctc import CTCProjector
from unislu_llm.models.encoder import SpeechEncoder
from unislu_llm.models.whisper_slu import whisper_prompt
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

log = logging.getLogger(__name__)

_STEP = 5  # seconds to a multiple of which clips are padded


class Transcript(NamedTuple):
    """What is recognised in a clip, cut where it begins to repeat itself."""

    text: str
    loop: bool = False  # whether it was cut
    evidence: Evidence | None = None  # of speech, where the recogniser has any


Recogniser = Callable[[Sequence[Tensor], str], list[Transcript]]
"""Transcripts of clips `(S,)` at 16 kHz, up to 30 s each, in a language (Whisper's code)."""


class WhisperRecogniser:
    """Plain Whisper, greedy.

    It was trained on clips padded to 30 s. Less silence saves time of the encoder and costs words
    (docs/results.md); at its natural length a clip makes it repeat itself.

    Args:
        checkpoint: a name (of some `revision`) or a folder.
        silence: seconds behind each clip at least, up to 30 s with it.

    Raises:
        UserError: no such checkpoint.
    """

    def __init__(self, checkpoint: str, revision: str | None = None,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 silence: float = 30.0) -> None:
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

    def __call__(self, waves: Sequence[Tensor], language: str) -> list[Transcript]:
        # Its decoder has no mask: clips of a batch are padded to one length, which is rounded up so
        # that it depends on the clip alone.
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for i, wave in enumerate(waves):
            seconds = math.ceil((len(wave) / audio.SAMPLE_RATE + self._silence) / _STEP) * _STEP
            groups[min(seconds * audio.SAMPLE_RATE, audio.MAX_SAMPLES)].append(i)
        found: dict[int, Transcript] = {}
        for size, some in groups.items():
            padded = [F.pad(waves[i], (0, size - len(waves[i]))) for i in some]
            bounds = [DecodeConfig().bound(len(waves[i]) / audio.SAMPLE_RATE) for i in some]
            found |= zip(some, self._transcribe(padded, bounds, language), strict=True)
        return [found[i] for i in range(len(waves))]

    @torch.inference_mode()
    def _transcribe(self, waves: Sequence[Tensor], bounds: Sequence[int],
                    language: str) -> list[Transcript]:
        """Transcripts of clips of one length, of so many tokens at most."""
        whisper, device = self._whisper, self._whisper.device
        prompt = whisper_prompt(whisper, self._tokenizer, language)
        mel, lengths = audio.batch_log_mel(waves, int(whisper.config.num_mel_bins))
        frames, _ = self._encoder(mel.to(device, whisper.dtype), lengths)
        room = int(whisper.config.max_target_positions) - len(prompt)
        bounds = [min(room, bound) for bound in bounds]
        first: list[Tensor] = []  # logits at the first position
        steps: list[Tensor] = []  # log-probability of each token that is taken, `(rows,)`

        def note(_: Tensor, scores: Tensor) -> Tensor:
            steps.append(scores.float().log_softmax(-1).amax(-1))
            return scores

        # Whisper's own `generate` adds windows, timestamps and language detection. The generic
        # one honours the checkpoint's suppressed tokens and decides nothing else. It gives out no
        # logits of the prompt, which tell speech and language without another pass: hence the hook.
        with whisper.register_forward_hook(
                lambda _, __, out: None if first else first.append(out.logits[:, 0])):
            out = GenerationMixin.generate(
                whisper, encoder_outputs=BaseModelOutput(last_hidden_state=frames),
                attention_mask=torch.ones(frames.shape[:2], dtype=torch.long, device=device),
                decoder_input_ids=torch.tensor(prompt, device=device).expand(len(frames), -1),
                logits_processor=LogitsProcessorList([note]),  # type: ignore[list-item]
                do_sample=False, max_new_tokens=max(bounds))
        end, found = int(whisper.config.eos_token_id), []
        for ids, n, log_probs, evidence in zip(
                out[:, len(prompt):].tolist(), bounds, torch.stack(steps, dim=1).tolist(),
                evidence_of(self._tokenizer, whisper, first[0]), strict=True):
            said = ids[:ids.index(end)] if end in ids[:n] else ids[:n]
            sure = log_probs[:min(len(said) + 1, n)]  # with the token that ends it
            text = str(self._tokenizer.decode(said, skip_special_tokens=True))
            evidence = evidence.of_words(sum(sure) / len(sure), text)
            found.append(cut(said, self._tokenizer, evidence))
        return found


class ModelRecogniser:
    """One of our models, whose prompt says the language: what its decoder says, or by source `ctc`
    the greedy text of its projector. One that reads hypotheses has its own recogniser make them.

    Raises:
        UserError: by `ctc`, the model has another projector.
    """

    def __init__(self, model: SLUModel, source: str = "decoder") -> None:
        if source == "ctc" and not isinstance(getattr(model, "projector", None), CTCProjector):
            raise UserError("hypotheses by `ctc` need a model with the projector 'ctc'")
        self._model: Any = model
        self._engine = None if source == "ctc" else Engine(
            model, DecodeConfig(grammar=True, force_task=True))

    @torch.inference_mode()
    def __call__(self, waves: Sequence[Tensor], language: str) -> list[Transcript]:
        model, engine = self._model, self._engine
        blanks = [Example(Utterance("", None, ""), None)] * len(waves)
        if engine is not None and model.reads_hypothesis:
            blanks = [Example(replace(blanks[0].utterance, hypothesis=made.text,
                                      evidence=made.evidence), None)
                      for made in recogniser_of(model)(waves, language)]
        batch = model.collator().from_waves(blanks, waves)
        if engine is None:  # no decoder runs
            said = [(ids, None if ids else Evidence(1.0))
                    for ids in model.ctc_transcripts(batch.to(model.device))]
        else:
            said = [(model.tokenizer.text_ids(a.transcript), a.evidence)
                    for a in engine.answer(batch, [()] * len(waves))]
        return [cut(ids, model.tokenizer.base, evidence) for ids, evidence in said]


def cut(ids: Sequence[int], tokenizer: Any, evidence: Evidence | None) -> Transcript:
    """What token ids say, up to where they begin to repeat themselves."""
    # Copied by a model that reads it, a repetition would become one of the model.
    start = loop_start(ids)
    return Transcript(str(tokenizer.decode(ids[:start], skip_special_tokens=True)),
                      start is not None, evidence)


@lru_cache(maxsize=1)
def load_recogniser(name: str, source: str = "decoder", revision: str | None = None,
                    device: torch.device | str = "cpu",
                    dtype: torch.dtype = torch.float32) -> Recogniser:
    """The recogniser that a saved model is (see :class:`ModelRecogniser` for `source`), or a plain
    Whisper, by folder or name on the hub (of some `revision`); the last one is kept.

    A saved model has `dtype` for its frozen weights, and needs autocast around its calls then.
    `ctranslate2:NAME` and the URL of a server are recognisers too
    (:mod:`unislu_llm.decoding.other_recognisers`).

    Raises:
        UserError: there is none.
    """
    from unislu_llm.decoding.other_recognisers import (  # it is made of what is here
        CTRANSLATE2,
        URLS,
        CTranslate2Recogniser,
        RemoteRecogniser,
    )

    if name.startswith(URLS):
        return RemoteRecogniser(name)
    if name.startswith(CTRANSLATE2):
        return CTranslate2Recogniser(name.removeprefix(CTRANSLATE2), revision, device)
    disable_progress_bar()  # of the base checkpoints' tensors
    if is_saved_model(found := weights.resolve(name, revision).path):
        return ModelRecogniser(models.load(found, dtype=dtype).to(device), source)
    if source == "ctc":
        raise UserError(f"{name}: hypotheses by `ctc` need a saved model with the projector 'ctc'")
    return WhisperRecogniser(name, revision, device, dtype)


def fast_type(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it fast, in which Whisper errs no more; else fp32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # what torch uses may be less than what the processor has
        fast = "AVX512" in torch.backends.cpu.get_cpu_capability() and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def recogniser_of(model: SLUModel, device: torch.device | None = None,
                  name: str = "") -> Recogniser:
    """The recogniser of a `name`, default: that of the model's configuration, on `device` or the
    model's; raises as :func:`load_recogniser`, and for a server that nobody but the model names."""
    config = model.config if not name else model.config.model_copy(update={"recogniser": name})
    if config.recogniser.startswith("http") and not name:  # a model may be anybody's
        raise UserError(f"the model has its hypotheses made by {config.recogniser}, where your "
                        "audio would go: give that address by --recogniser if you trust it, "
                        "or write hypotheses by `unislu transcribe`")
    if config.recogniser == "ctc":
        return ModelRecogniser(model, "ctc")
    base = None if config.recogniser else model.bases.get("encoder")
    device = device or model.device
    return load_recogniser(config.recogniser or config.encoder, "decoder",
                           base.revision if base else None, device, fast_type(device))


def recognise(recogniser: Recogniser, utterances: Sequence[Utterance], registry: TaskRegistry, *,
              language: str = "en", batch_size: int = 8,
              progress: str = "") -> Iterator[tuple[int, Transcript]]:
    """Index of each utterance and what is said in it, in lower case and on one line.

    Args:
        recogniser: that is asked.
        utterances: with audio of up to 30 s.
        registry: tasks whose markers a transcript must not hold.
        language: of utterances that name none.
        batch_size: clips at one time, of one language.
        progress: label of a progress bar; empty shows none.

    Raises:
        UserError: unreadable audio.
    """
    codes = [(u.language or language).lower().split("-")[0] for u in utterances]
    # The longest first: what does not fit into memory fails at once.
    order = sorted(range(len(codes)), key=lambda i: (codes[i], -utterances[i].seconds))
    with tqdm(total=len(order), desc=progress, unit="clip", disable=not progress) as bar:
        while order:
            some = [i for i in order[:batch_size] if codes[i] == codes[order[0]]]
            order = order[len(some):]
            waves = [load_clip(utterances[i]) for i in some]
            made = recogniser(waves, codes[some[0]])
            for i, wave, t in zip(some, waves, made, strict=True):
                evidence = Evidence(1.0) if silent(wave) else t.evidence
                yield i, t._replace(text=clean(t.text, registry), evidence=evidence)
            bar.update(len(some))


def clean(text: str, registry: TaskRegistry) -> str:
    """A transcript as a manifest may hold it: no marker, no control character, lower case."""
    for marker in registry.markers:
        text = text.replace(marker, " ")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split()).lower()


def with_hypotheses(model: SLUModel, utterances: Sequence[Utterance], progress: str = "",
                    device: torch.device | None = None,
                    recogniser: str = "") -> list[Utterance]:
    """Attach to utterances what a model needs before it decodes: hypotheses, where it reads them.

    Those of `model.hypothesis manifest` that are there stay; the model's recogniser makes the
    others. What comes twice stays one object. `progress` is the label of a progress bar, `device`
    and `recogniser` are in place of the model's.

    Raises:
        UserError: a reference transcript or the recogniser is lacking.
    """
    if not model.reads_hypothesis:
        return list(utterances)
    # By identity, so that the examples of one utterance still share it afterwards.
    found = {id(u): u for u in utterances}
    reference = model.config.hypothesis == "reference"
    if reference:
        found = {key: replace(u, hypothesis=u.text or None) for key, u in found.items()}
    lacking = {key: u for key, u in found.items() if u.hypothesis is None}
    if lacking and reference:
        raise UserError("this model reads reference transcripts (model.hypothesis reference), to "
                        "measure an upper bound: it can be scored on manifests with transcripts, "
                        "but not used on files; train one with model.hypothesis manifest")
    if lacking:
        made = dict(recognise(recogniser_of(model, device, recogniser), list(lacking.values()),
                              model.registry, language=model.config.language, progress=progress))
        found |= {key: replace(u, hypothesis=made[i].text, evidence=made[i].evidence)
                  for i, (key, u) in enumerate(lacking.items())}
        if looped := sum(t.loop for t in made.values()):
            log.warning("%d of %d hypotheses repeated themselves and were cut", looped, len(made))
    return [found[id(u)] for u in utterances]
