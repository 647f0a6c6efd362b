"""Between encoder and cache: what an encoder's frames follow from, and frames that a batch still lacks."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unislu_llm.data import audio
from unislu_llm.data.batching import seconds
from unislu_llm.data.cache import CacheDtype, Clip, FrameCache, load_clip
from unislu_llm.data.collate import Batch
from unislu_llm.errors import UserError
from unislu_llm.models.encoder import SpeechEncoder
from unislu_llm.utterance import Utterance


def encoder_settings(encoder: SpeechEncoder, precision: str, name: str = "") -> dict[str, Any]:
    """What the frames of a frozen encoder follow from, besides the audio: the `settings` of a :class:`FrameCache`.

    Args:
        encoder: its weights are hashed as they are in memory, in their own dtype.
        precision: fp32 or bf16, of the computation. name: of the checkpoint, for people; it does not count.

    Raises:
        UserError: the encoder trains.
    """
    if encoder.mode != "frozen" or any(p.requires_grad for p in encoder.parameters()):
        raise UserError(f"data.encoder_cache: frames can be kept of a frozen encoder alone; encoder_mode is '{encoder.mode}': "
                        "set model.encoder_mode frozen, or leave data.encoder_cache empty")
    digest = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    config: Any = encoder.whisper.config
    sizes = [config.encoder_layers, config.encoder_attention_heads, config.activation_function]
    return {"weights": digest.hexdigest(), "sizes": sizes, "dim": encoder.dim, "n_mels": int(config.num_mel_bins),
            "pad_to_30s": encoder.pad_to_30s, "precision": precision, "encoder": name}


def open_cache(folder: str | Path, encoder: SpeechEncoder, precision: str, dtype: CacheDtype, max_gib: float,
               name: str = "") -> FrameCache:
    """The cache of an encoder; see :func:`encoder_settings` and :class:`FrameCache` for arguments and errors."""
    return FrameCache(folder, encoder_settings(encoder, precision, name), dtype, max_gib)


def complete(batch: Batch, encoder: SpeechEncoder, cache: FrameCache) -> Batch:
    """Compute and store the frames that the cache lacked when the batch was made.

    Args:
        batch: on the encoder's device, made of cached samples (:class:`unislu_llm.data.collate.SpeechDataset` with a cache).

    Returns:
        A batch whose `frames` are all there, in the stored dtype: rounded alike whether they were read or computed.
    """
    if not batch.missing or batch.frames is None or batch.frame_lengths is None:
        return batch
    places = list(batch.missing)
    rows = torch.tensor(places, device=batch.mel.device)
    mel_lengths = batch.mel_lengths[rows]
    new, valid = _encode(encoder, cache, batch.mel, mel_lengths, [batch.missing[i] for i in places])
    old = batch.frames
    frames = new.new_zeros(len(batch), max(old.shape[1], new.shape[1]), cache.dim)
    if old.numel():  # where nothing was known, not even the size of a frame was
        frames[:, :old.shape[1]] = old
    frames[rows, :new.shape[1]] = new
    lengths = batch.frame_lengths.clone()
    lengths[rows] = valid
    return dataclasses.replace(batch, frames=frames, frame_lengths=lengths, missing={})


def _encode(encoder: SpeechEncoder, cache: FrameCache, mel: Tensor, mel_lengths: Tensor,
            keys: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Frames and their lengths, rounded as stored; those that have a key are put into the cache."""
    with torch.no_grad():
        frames, lengths = encoder(mel, mel_lengths)
    frames = cache.stored(frames)
    kept = [frames.shape[1]] * len(keys) if encoder.pad_to_30s else lengths.tolist()
    cache.put([Clip(n_mel, frames[i, :kept[i]], key=key)
               for i, (n_mel, key) in enumerate(zip(mel_lengths.tolist(), keys, strict=True))])
    return frames, lengths


def build(cache: FrameCache, encoder: SpeechEncoder, utterances: Sequence[Utterance], *, batch_size: int = 16,
          progress: bool = True) -> tuple[int, int]:
    """Store the frames of utterances, longest first; those that are there already are passed over, so it can be stopped.

    Returns:
        How many were computed, and how many were there.

    Raises:
        UserError: unreadable audio, more than 30 s of it, or a cache that is full.
    """
    wanted: dict[str, tuple[Utterance, float]] = {}
    present: dict[str, Clip] = {}
    for utterance in tqdm(utterances, desc="look up", unit="clip", disable=not progress, leave=False):
        key = cache.audio_key(utterance)
        if key is not None and key in cache:
            present[key.name] = Clip(0, key=key)
        else:
            wanted.setdefault(key.name if key else utterance.source, (utterance, seconds(utterance)))
    cache.put(list(present.values()))  # nothing but their files' hashes, where the files have moved
    order = [u for u, _ in sorted(wanted.values(), key=lambda item: -item[1])]
    device = next(encoder.parameters()).device
    n_mels = cache.settings["n_mels"]
    with tqdm(total=len(order), desc="encode", unit="clip", disable=not progress) as bar:
        for i in range(0, len(order), batch_size):
            clips = [_load(cache, u) for u in order[i:i + batch_size]]
            waves = [c.wave.to(device) for c in clips if c.wave is not None]
            if waves:
                mel, lengths = audio.batch_log_mel(waves, n_mels, pad_to_30s=encoder.pad_to_30s)
                with precision_context(cache, device):
                    _encode(encoder, cache, mel, lengths, [c.key for c in clips if c.wave is not None])
            if cache.full:
                raise UserError(f"stopped after {i} of {len(order)} clips: {cache.folder} has no room (see the line above)")
            bar.update(len(clips))
    return len(order), len(present)


def _load(cache: FrameCache, utterance: Utterance) -> Clip:
    where = utterance.source or utterance.id
    if utterance.audio is None:
        raise UserError(f"{where}: field 'audio': the row has no audio")
    try:
        return load_clip(cache, utterance, audio.MAX_SECONDS)
    except UserError as error:
        raise UserError(f"{where}: field 'audio': {error}") from error


@contextlib.contextmanager
def precision_context(cache: FrameCache, device: torch.device) -> Iterator[None]:
    """Compute as training does that reads this cache."""
    with torch.autocast(device.type, torch.bfloat16, enabled=cache.settings["precision"] == "bf16"):
        yield
