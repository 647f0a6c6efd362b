"""Recognisers beside transformers' Whisper: CTranslate2's, and servers that speak OpenAI's API."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import requests
import soundfile
import torch
from filelock import FileLock
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from unislu_llm import weights
from unislu_llm.data import audio
from unislu_llm.decoding.no_speech import Evidence
from unislu_llm.decoding.phrases import Phrases
from unislu_llm.decoding.recogniser import Transcript, WhisperRecogniser, cut
from unislu_llm.errors import UserError
from unislu_llm.io import new_folder
from unislu_llm.models.whisper_decoder import whisper_prompt
from unislu_llm.weights.resolve import cache_dir, weights_hash

CTRANSLATE2, URLS = "ctranslate2:", ("http://", "https://")
"""What names of recognisers begin with that are no checkpoints of transformers."""
_TIMEOUT = 120.0  # seconds to wait for a server's answer


def _refuse(phrases: Phrases | None) -> None:
    if phrases:
        raise UserError("phrases are raised where transformers' Whisper makes hypotheses: leave "
                        "out the phrases, or the recogniser")


class CTranslate2Recogniser(WhisperRecogniser):
    """Plain Whisper in CTranslate2 with 8-bit weights, as faster-whisper runs it.

    A checkpoint is converted once, into the cache of converted checkpoints.

    Raises UserError: no such checkpoint, no Whisper, or CTranslate2 is not installed.
    """

    def __init__(self, checkpoint: str, revision: str | None = None,
                 device: torch.device | str = "cpu") -> None:
        try:
            import ctranslate2
            from ctranslate2.converters import TransformersConverter
        except ImportError as error:
            raise UserError(f"{CTRANSLATE2}{checkpoint} needs CTranslate2: pip install "
                            "'unislu_llm[fast]'") from error
        path = weights.resolve(checkpoint, revision=revision).path
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type != "whisper":
            raise UserError(f"{checkpoint} is a {config.model_type}, and {CTRANSLATE2} runs "
                            "Whisper checkpoints alone")
        folder = cache_dir() / "ctranslate2" / weights_hash(path)[:32]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                with new_folder(folder) as new:
                    TransformersConverter(str(path)).convert(
                        str(new), quantization="int8", force=True)
        gpu = torch.device(device).type == "cuda"  # it runs on no other
        self._silence = 30.0
        try:
            self._ct2 = ctranslate2.models.Whisper(
                str(folder), device="cuda" if gpu else "cpu", intra_threads=torch.get_num_threads(),
                compute_type="int8_float16" if gpu else "int8")
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{CTRANSLATE2}{checkpoint}: CTranslate2 cannot load {folder} ({error})"
                            "; if its files are damaged, remove it") from error
        self._bins, self._room = int(config.num_mel_bins), int(config.max_target_positions)
        self._tokenizer = weights.from_pretrained(AutoTokenizer, path)
        # What Whisper's prompt is made by, without its weights.
        self._facts = SimpleNamespace(
            config=config, generation_config=GenerationConfig.from_pretrained(path))

    def _transcribe(self, waves: Sequence[Tensor], bounds: Sequence[int], language: str,
                    phrases: Phrases | None, num_beams: int) -> list[Transcript]:
        import ctranslate2

        _refuse(phrases)
        prompt = whisper_prompt(self._facts, self._tokenizer, language)
        mel, _ = audio.batch_log_mel(waves, self._bins)
        frames = self._ct2.encode(ctranslate2.StorageView.from_array(mel.numpy()))
        # Its bound counts the prompt.
        most = min(self._room, len(prompt) + max(bounds))
        made = self._ct2.generate(frames, [prompt] * len(waves), beam_size=num_beams,
                                  max_length=most, return_scores=True, return_no_speech_prob=True)
        spoken = self._ct2.detect_language(frames) if self._ct2.is_multilingual else None
        found = []
        for i, (result, bound) in enumerate(zip(made, bounds, strict=True)):
            ids = result.sequences_ids[0][:bound]
            name, share = spoken[i][0] if spoken else ("", 0.0)
            evidence = Evidence(round(result.no_speech_prob, 4), name.strip("<|>"), round(share, 4))
            text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
            # Its score is a mean over the tokens without the end, of a sum with it.
            log_prob = result.scores[0] * len(ids) / (len(ids) + 1)
            found.append(cut(ids, self._tokenizer, evidence.of_words(log_prob, text)))
        return found


class RemoteRecogniser:
    """A server with OpenAI's `POST /audio/transcriptions`: audio leaves this machine.

    The key is that of the environment's `OPENAI_API_KEY`, where there is one. What the server says
    of silence and doubt (`verbose_json`) is kept where it says anything.

    Args:
        url: up to `/v1`; behind a `#`, the model that is asked for.

    Raises UserError: the server is not there, refuses, or answers something else.
    """

    def __init__(self, url: str) -> None:
        self._url, _, self._model = url.partition("#")
        key = os.environ.get("OPENAI_API_KEY", "")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def __call__(self, waves: Sequence[Tensor], language: str, phrases: Phrases | None = None,
                 num_beams: int = 1) -> list[Transcript]:
        _refuse(phrases)  # beams are the server's own matter
        with ThreadPoolExecutor(max(1, len(waves))) as pool:
            return list(pool.map(lambda wave: self._ask(wave, language), waves))

    def _ask(self, wave: Tensor, language: str) -> Transcript:
        file = io.BytesIO()
        soundfile.write(file, wave.numpy(), audio.SAMPLE_RATE, format="FLAC")
        form = {"model": self._model or "whisper-1", "language": language, "temperature": "0",
                "response_format": "verbose_json"}
        try:
            response = requests.post(
                self._url.rstrip("/") + "/audio/transcriptions", data=form, timeout=_TIMEOUT,
                headers=self._headers, files={"file": ("clip.flac", file.getvalue(), "audio/flac")},
                allow_redirects=False)  # audio goes where the user says, and nowhere else
            if response.status_code >= 300:
                raise requests.HTTPError
            said = response.json()
            text, parts = said["text"].strip(), said.get("segments") or []
            found = [(float(p["no_speech_prob"]), float(p["avg_logprob"])) for p in parts
                     if "no_speech_prob" in p and "avg_logprob" in p]
        except requests.HTTPError as error:
            told = response.headers.get("Location", "") or response.text
            other = f"; {self._url}#MODEL asks for another model than whisper-1" * (
                response.status_code == 404 and not self._model)
            raise UserError(
                f"{self._url} answers {response.status_code}: {told[:200]}{other}") from error
        except requests.JSONDecodeError as error:
            raise UserError(f"{self._url} answers no JSON: {response.text[:200]}") from error
        except requests.RequestException as error:
            raise UserError(f"{self._url} cannot be asked ({error}); is it the address up to /v1 "
                            "of a server that runs?") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self._url} answers something else than a transcription: "
                            f"{response.text[:200]}") from error
        if not found:
            return Transcript(text)
        none, sure = (sum(values) / len(found) for values in zip(*found, strict=True))
        return Transcript(text, evidence=Evidence(round(none, 4)).of_words(sure, text or " "))
