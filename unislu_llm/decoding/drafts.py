"""Drafts: a recogniser's transcript for the prompt of an LLM that listens as well (`model.draft`). See docs/drafts.md.

A recogniser is plain Whisper, one of our trained models, or the greedy CTC text of a `ctc` projector, which needs no decoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer, StoppingCriteriaList, WhisperForConditionalGeneration
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from unislu_llm.data import audio
from unislu_llm.data.targets import Sample
from unislu_llm.decoding.loops import has_loop
from unislu_llm.decoding.options import DecodeOptions
from unislu_llm.errors import UserError
from unislu_llm.models import weights
from unislu_llm.models.base import WEIGHTS_FILE, SLUModel
from unislu_llm.models.ctc import CTCProjector
from unislu_llm.models.whisper_slu import whisper_prompt
from unislu_llm.tasks import TaskRegistry
from unislu_llm.utterance import Utterance

Style = Literal["lower", "as-is"]
Source = Literal["decoder", "ctc"]

_KINDS = ("speech_llm", "whisper_slu")


class Recogniser(Protocol):
    """Speech to text.

    Attributes:
        looped: of each clip of the last call, whether its transcript repeats itself (or was cut for it).
    """

    looped: list[bool]

    def __call__(self, waves: Sequence[Tensor], language: str) -> list[str]:
        """Transcripts of clips `(S,)` at 16 kHz, up to 30 s each, in a Whisper language code."""
        ...


class WhisperRecogniser:
    """Plain Whisper, greedy, every clip padded to 30 s as it was trained (at natural length it repeats itself).

    Args:
        checkpoint: name or folder. revision: of a name. device: where it runs. dtype: what it computes in.

    Attributes:
        path: folder of the weights.

    Raises:
        UserError: no such checkpoint.
    """

    def __init__(self, checkpoint: str, revision: str | None = None, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32) -> None:
        self.path = weights.resolve(checkpoint, revision=revision).path
        try:
            whisper: Any = WhisperForConditionalGeneration.from_pretrained(self.path, dtype=dtype,
                                                                           attn_implementation="sdpa")
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{checkpoint} cannot make drafts: it is no Whisper checkpoint ({error})") from error
        whisper.generation_config.max_length = None  # new tokens are bounded instead; both would warn
        self.whisper = whisper.eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.looped: list[bool] = []

    @torch.inference_mode()
    def __call__(self, waves: Sequence[Tensor], language: str) -> list[str]:
        from unislu_llm.decoding.batch import LengthBound  # batch.py asks for drafts

        whisper, device = self.whisper, self.whisper.device
        prompt = whisper_prompt(whisper, self.tokenizer, language)
        mel, _ = audio.batch_log_mel(waves, int(whisper.config.num_mel_bins), pad_to_30s=True)
        frames = whisper.model.encoder(mel.to(device, whisper.dtype)).last_hidden_state
        room = int(whisper.config.max_target_positions) - len(prompt)
        bounds = [min(room, DecodeOptions().bound(len(wave) / audio.SAMPLE_RATE)) for wave in waves]
        stop = LengthBound(torch.tensor(bounds, device=device), len(prompt))
        # As in WhisperSLU: the generic `generate`, which honours the checkpoint's suppressed tokens and decides nothing else.
        out = GenerationMixin.generate(
            whisper, encoder_outputs=BaseModelOutput(last_hidden_state=frames),
            attention_mask=torch.ones(frames.shape[:2], dtype=torch.long, device=device),
            decoder_input_ids=torch.tensor(prompt, device=device).expand(len(frames), -1), do_sample=False,
            max_new_tokens=max(bounds), stopping_criteria=StoppingCriteriaList([stop]))
        found = [ids[:bound] for ids, bound in zip(out[:, len(prompt):].tolist(), bounds, strict=True)]
        end = int(whisper.config.eos_token_id)
        found = [ids[:ids.index(end)] if end in ids else ids for ids in found]
        self.looped = [has_loop(ids) for ids in found]
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]


class ModelRecogniser:
    """One of our models; its own prompt says the language.

    Args:
        model: either decoder.
    """

    def __init__(self, model: SLUModel) -> None:
        self.model = model
        self.looped: list[bool] = []

    @torch.inference_mode()
    def __call__(self, waves: Sequence[Tensor], language: str) -> list[str]:
        from unislu_llm.decoding.batch import decode_batch
        from unislu_llm.decoding.rows import prediction_row

        blank = Sample(Utterance("", None, ""), None)
        options = DecodeOptions(grammar=True, force_task=True)
        answers = decode_batch(self.model, [blank] * len(waves), waves, options)
        rows = [prediction_row(self.model.codec, blank, ids, 0.0, cut_loops=True) for ids in answers]
        self.looped = ["loop" in row["problems"] for row in rows]
        return [str(row["hyp_text"]) for row in rows]


class CtcRecogniser:
    """The greedy text of a model's `ctc` projector.

    Raises:
        UserError: the model has another projector.
    """

    def __init__(self, model: SLUModel) -> None:
        if not isinstance(getattr(model, "projector", None), CTCProjector):
            raise UserError("drafts by `ctc` need a model with the projector 'ctc'; this one has none")
        self.model: Any = model
        self.looped: list[bool] = []

    @torch.inference_mode()
    def __call__(self, waves: Sequence[Tensor], language: str) -> list[str]:
        model = self.model
        mel, lengths = audio.batch_log_mel(waves, model.n_mels, pad_to_30s=model.config.pad_to_30s)
        frames, lengths = model.encoder(mel.to(model.device), lengths.to(model.device))
        found = model.projector.ctc_ids(frames[:, : int(lengths.max())], lengths)
        self.looped = [has_loop(ids) for ids in found]
        return [model.codec.decode(ids) for ids in found]


def load_recogniser(name: str, source: Source = "decoder", *, revision: str | None = None,
                    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Recogniser:
    """The recogniser in a folder of a saved model, or a Whisper checkpoint by name or folder.

    Args:
        dtype: of a Whisper checkpoint, and of a saved model's frozen weights, which needs autocast around its calls then.

    Raises:
        UserError: there is none, or `source` is ctc and it has no such projector.
    """
    if is_saved_model(Path(name)):
        model = SLUModel.from_pretrained(name, dtype=dtype)
        model.to(device)  # type: ignore[arg-type]
        return CtcRecogniser(model.eval()) if source == "ctc" else ModelRecogniser(model.eval())
    if source == "ctc":
        raise UserError(f"{name}: drafts by `ctc` need a saved model with the projector 'ctc'")
    return WhisperRecogniser(name, revision, device, dtype)


def is_saved_model(folder: Path) -> bool:
    """Whether a folder holds one of our models."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return (folder / WEIGHTS_FILE).is_file() and config.get("model_type") in _KINDS
    except (OSError, ValueError, AttributeError):
        return False


class Heard(NamedTuple):
    """A styled transcript, and whether it repeats itself (:mod:`unislu_llm.decoding.loops`)."""

    text: str
    loop: bool


class Drafter:
    """A recogniser whose transcripts are styled, and remembered by what was heard.

    Args:
        recogniser: of the transcripts; None where drafts are styled alone. registry: tasks whose markers a draft must not hold.
        style: `lower` puts them in lower case (as VoxPopuli's and SLUE's transcripts are), `as-is` leaves them.
        batch_size: clips at one time.

    Attributes:
        loops: transcripts so far that repeat themselves.
    """

    def __init__(self, recogniser: Recogniser | None, registry: TaskRegistry, style: str = "lower", batch_size: int = 8) -> None:
        if style not in ("lower", "as-is"):
            raise UserError(f"draft style '{style}' is not one of lower, as-is")
        self.recogniser, self.registry, self.style, self.batch_size = recogniser, registry, style, batch_size
        self._known: dict[bytes, Heard] = {}
        self.loops = 0

    def __call__(self, waves: Sequence[Tensor], language: str = "en") -> list[str]:
        """Drafts of clips `(S,)` at 16 kHz."""
        return [heard.text for heard in self.hear(waves, language)]

    def hear(self, waves: Sequence[Tensor], language: str = "en") -> list[Heard]:
        """The same, and whether they repeat themselves."""
        keys = [hashlib.sha256(language.encode() + wave.cpu().numpy().tobytes()).digest() for wave in waves]
        new = {key: wave for key, wave in zip(keys, waves, strict=True) if key not in self._known}
        order = sorted(new, key=lambda key: -len(new[key]))  # similar lengths together
        for i in range(0, len(order), self.batch_size):
            some = order[i:i + self.batch_size]
            assert self.recogniser is not None
            texts = self.recogniser([new[key] for key in some], language)
            self._known |= {key: Heard(self.styled(text), loop)
                            for key, text, loop in zip(some, texts, self.recogniser.looped, strict=True)}
            self.loops += sum(self.recogniser.looped)
        return [self._known[key] for key in keys]

    def styled(self, text: str) -> str:
        """A transcript as a manifest may hold it."""
        for marker in self.registry.markers:
            text = text.replace(marker, " ")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text.lower() if self.style == "lower" else text


def given_draft(sample: Sample, mode: str) -> str | None:
    """The draft that a sample brings along, where a model's `draft` is `mode`; None where it has to be made."""
    u = sample.utterance
    return {"gold": u.text or None, "manifest": u.draft}.get(mode)


def complete_drafts(model: SLUModel, waves: Sequence[Tensor], given: Sequence[str | None] | None = None) -> list[str | None]:
    """A draft for each clip `(S,)`, as the model's configuration says; those given stay. None for a model that reads none.

    The recogniser is loaded when first needed, stays with the model, and remembers what it has heard.

    Raises:
        UserError: the model reads reference transcripts, and there is none; or its recogniser cannot be had.
    """
    config: Any = model.config
    drafts: list[str | None] = list(given) if given is not None else [None] * len(waves)
    if config.draft == "none":
        return [None] * len(waves)
    lacking = [i for i, draft in enumerate(drafts) if draft is None]
    if lacking and config.draft == "gold":
        raise UserError("this model reads reference transcripts as drafts (model.draft gold), to measure an upper bound: it can "
                        "be scored on manifests with transcripts, but not used on files; train one with model.draft manifest")
    if lacking:
        made = drafter_of(model)([waves[i] for i in lacking], config.draft_language)
        for i, draft in zip(lacking, made, strict=True):
            drafts[i] = draft
    return drafts


def drafts_of(model: SLUModel, samples: Sequence[Sample], waves: Sequence[Tensor]) -> list[str | None]:
    """The draft of each sample, its own or made now; None for a model that reads none."""
    return complete_drafts(model, waves, [given_draft(s, model.config.draft) for s in samples])


def drafter_of(model: SLUModel) -> Drafter:
    """The drafter that a model's configuration names, loaded once."""
    config: Any = model.config
    kept = model.__dict__.get("_drafter")  # no submodule: it is not saved, trained or moved with the model
    if kept is None or kept[0] != model.device:
        name = config.draft_checkpoint or config.encoder
        revision = None if config.draft_checkpoint else config.encoder_revision
        half = any(p.dtype == torch.bfloat16 for p in model.parameters())  # as the model computes
        recogniser: Recogniser = (
            CtcRecogniser(model) if name == "ctc" else
            load_recogniser(name, revision=revision, device=model.device, dtype=torch.bfloat16 if half else torch.float32))
        kept = model.device, Drafter(recogniser, model.codec.registry, config.draft_style)
        model.__dict__["_drafter"] = kept
    drafter: Drafter = kept[1]
    return drafter
