"""Configuration of a run: dataclasses, filled from YAML and from flags.

Later wins: defaults, the adapter preset of the LLM (`adapters/*.yaml`), the config file (`--config`), flags. An unknown key is an
error that names the nearest known one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from unislu_llm.data.augment import AugmentConfig
from unislu_llm.data.cache import CacheDtype
from unislu_llm.data.long_audio import LongAudio
from unislu_llm.errors import UserError
from unislu_llm.loss import LossMode
from unislu_llm.models.lora import LoraOptions

Precision = Literal["fp32", "bf16", "fp16"]
Options = Annotated[dict[str, Any], tyro.conf.arg(constructor=json.loads, metavar="JSON")]
Stages = Annotated[list[dict[str, Any]], tyro.conf.arg(constructor=json.loads, metavar="JSON")]
Weights = Annotated[dict[str, float], tyro.conf.arg(constructor=json.loads, metavar="JSON")]


def _encoder_lora() -> LoraOptions:
    return LoraOptions(rank=8, alpha=16, target_modules=["q_proj", "v_proj"])


@dataclass
class ModelConfig:
    """Which parts are put together, and which of them train."""

    encoder: Annotated[str, tyro.conf.arg(aliases=["--encoder"])] = "openai/whisper-base"
    """Whisper checkpoint, any size: a folder or a name."""
    encoder_mode: Literal["frozen", "lora", "top", "full"] = "frozen"
    """What trains in the encoder."""
    encoder_top_layers: int = 2
    """With encoder_mode top: how many of the last layers train."""
    encoder_lora: LoraOptions = field(default_factory=_encoder_lora)
    """With encoder_mode lora."""
    pad_to_30s: bool = False
    """Pad every clip to 30 s, as Whisper was trained; costs about 3 times the encoder frames."""
    llm: Annotated[str, tyro.conf.arg(aliases=["--llm"])] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Causal LM, any of transformers: a folder or a name."""
    projector: Annotated[str, tyro.conf.arg(aliases=["--projector"])] = "mlp"
    """linear, mlp, conv, qformer or ctc (docs/ctc.md)."""
    projector_options: Options = field(default_factory=dict)
    """Keyword arguments of the projector, e.g. {"stack": 4}."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """Adapters of the LLM (or, with decoder_mode lora, of Whisper's decoder); rank 0 trains none."""
    prompt_prefix: str = ""
    """Text before the speech; special tokens may be written out."""
    prompt_suffix: str = ""
    """Text between the speech (and the draft) and the answer."""
    draft: Literal["none", "manifest", "gold"] = "none"
    """LLM only: a recogniser's transcript in the prompt beside the speech: the manifest's, or (upper bound) the reference."""
    draft_prompt: str = "\nDraft:"
    """Text before the draft; both stand between the speech and prompt_suffix."""
    draft_checkpoint: str = ""
    """What makes drafts where a row has none, and of files: Whisper or saved model; ctc: own projector; empty: the encoder's."""
    draft_style: Literal["lower", "as-is"] = "lower"
    """How these are written, as `unislu draft --style` wrote the manifest's."""
    draft_bias: float = 0.0
    """Nats by which decoding draws a transcript to its draft, else to the ctc projector's text; see docs/drafts.md."""
    use_speech: bool = True
    """False: the LLM reads the draft alone, without speech, and the encoder does not run (recogniser, then text LLM)."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Frozen LLM weights in 8 or 4 bits (bitsandbytes)."""
    init: str = ""
    """Folder of a saved model (or of a run: its best) that this run starts from; parts it lacks start untrained."""
    init_llm: str = ""
    """Another one, whose LoRA and markers are laid over those of `init`: e.g. an LLM that has learnt the tasks from text."""
    language: str = "en"
    """Language code of Whisper's prompt: of the Whisper decoder, and where Whisper makes drafts."""
    decoder_mode: Literal["full", "lora", "frozen"] = "full"
    """Whisper decoder only: what trains in it."""


@dataclass
class Preset(ModelConfig):
    """An adapter preset, `adapters/*.yaml`: the model section's keys for one LLM, and the precision to train it in."""

    precision: Precision = "fp32"
    """Default of train.precision."""


@dataclass
class DataConfig:
    """Manifests and how they are read. Paths are relative to the config file that names them."""

    train: list[str] = field(default_factory=list)
    """Training manifests (JSON lines)."""
    dev: list[str] = field(default_factory=list)
    """Manifests scored before, during and after training."""
    tasks: str | None = None
    """YAML list of tasks; default: named entities and sentiment."""
    weights: Weights = field(default_factory=dict)
    """Relative share of each corpus (or manifest, by its stem) in training; overrides the temperature."""
    temperature: float = 1.0
    """Draw a corpus of n samples in proportion to n ** (1 / temperature); 1 is natural mixing."""
    epoch_samples: int = 0
    """Samples drawn an epoch; 0: as many as there are."""
    max_seconds: float = 30.0
    """Longer clips are refused, or cut."""
    long_audio: LongAudio = "refuse"
    """What to do with longer clips: refuse, or cut them at the `segments` of their manifest row."""
    dev_limit: int = 0
    """Score at most this many samples of each dev manifest during training; 0 means all."""
    num_workers: int = 0
    """Loader processes; 0 loads in the training process."""
    encoder_cache: str = ""
    """Folder that keeps the frames of a frozen encoder, for all epochs and runs; see docs/cache.md. Empty: no cache."""
    cache_dtype: CacheDtype = "fp16"
    """How frames are kept: fp16, bf16 or fp32."""
    cache_gib: float = 20.0
    """Size of the folder at most; frames beyond it are computed each time."""
    simulate: Options = field(default_factory=dict)
    """How rows without audio are simulated for a ctc model, laid over the rates fitted by its ctc stage (docs/ctc.md)."""


@dataclass
class LearningRates:
    """Peak learning rate of each parameter group."""

    projector: float = 1e-3
    lora: float = 3e-4
    markers: float = 1e-3
    encoder: float = 1e-5
    decoder: float = 1e-5


@dataclass
class CtcConfig:
    """CTC training of the `ctc` projector alone (train.objective ctc); rates and sizes beside these are those of `train`."""

    min_count: int = 1
    """Tokens that the training transcripts have less often are spelt with smaller ones."""
    samples: int = 700
    """Tokens beside the batch's own in the softmax."""
    time_masks: int = 0
    """SpecAugment on encoder frames: time masks per 5 s of a clip..."""
    time_width: int = 20
    """...and frames (50 Hz) that one covers at most."""
    feature_masks: int = 0
    """SpecAugment on encoder frames: feature masks a clip..."""
    feature_width: float = 0.1
    """...and share of the features that one covers at most."""


@dataclass
class TrainConfig:
    """Optimisation."""

    objective: Literal["unified", "ctc"] = "unified"
    """unified: the unified targets. ctc: transcripts by CTC, the `ctc` projector alone, on frames of the frozen encoder."""
    ctc: CtcConfig = field(default_factory=CtcConfig)
    """With objective ctc, and for the vocabulary of a `ctc` projector."""
    loss: LossMode = "dynamic"
    """dynamic (the paper's), fixed or uniform."""
    asr_floor: float = 0.0
    """Least share of the transcript in the dynamic or fixed loss, 0 to 1; the paper has none. 0 switches it off."""
    asr_floor_steps: int = 0
    """The floor falls linearly from 1, the transcript alone, to asr_floor over so many steps; 0 is no schedule."""
    draft_dropout: float = 0.0
    """Part of the samples whose draft is left out, so that the model listens too; 0 to 1."""
    draft_word_dropout: float = 0.0
    """Part of the drafts' words deleted or replaced by other words of the drafts; 0 to 1."""
    text_draft_word_dropout: float | None = None
    """The same in rows without audio, whose drafts are often copies of the transcript; default: as draft_word_dropout."""
    groups: list[str] = field(default_factory=list)
    """Parameter groups that train (projector, lora, markers, encoder, decoder); none named: all that can."""
    epochs: int = 10
    """Passes over the training samples."""
    max_steps: int = 0
    """Stop after this many steps; 0 means by epochs alone."""
    batch_size: int = 16
    """Samples of a global batch, over all processes and accumulation steps."""
    micro_batch_size: int = 16
    """Samples a process takes at one time; the rest is accumulated."""
    batch_tokens: int = 0
    """Tokens of a global batch, padding included (speech, prompt and target), in place of batch_size; 0: batch_size counts."""
    micro_batch_tokens: int = 0
    """With batch_tokens: about as many a process takes at one time, the rest is accumulated; 0: nothing is accumulated."""
    packing: bool = False
    """Lay the samples of a micro-batch end to end for the LLM instead of padding them; pays on GPUs with flash attention."""
    compile: bool = False
    """Compile the decoder by torch.compile: minutes at the start, faster steps afterwards."""
    lr: LearningRates = field(default_factory=LearningRates)
    """Peak learning rates."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up; cosine and linear end at zero."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay, not on norms and biases."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 switches it off."""
    precision: Precision = "fp32"
    """fp16 is refused: Whisper and LLM activations overflow it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    seed: int = 1
    """Of data order, initial weights and dropout."""
    bucket: int = 16
    """Batches within whose pool samples are sorted by length."""
    eval_every: int = 0
    """Steps between validations by generation; 0 validates at the start and at the end of training."""
    eval_start: bool = True
    """Validate before the first step."""
    log_every: int = 1
    """Steps between log lines."""
    save_every: int = 0
    """Steps between resumable checkpoints; 0 saves at each validation."""
    threads: int = 0
    """CPU threads a process computes with; 0 shares the cores out (accelerate's launcher would leave one)."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Accelerate trackers, e.g. tensorboard wandb; metrics.jsonl is always written."""


@dataclass
class DecodeConfig:
    """Validation by generation."""

    batch_size: int = 16
    """Utterances decoded at one time."""
    max_new_tokens: int = 256
    """Upper bound for any answer."""
    tokens_per_second: float = 12.0
    """Bound by audio length: this many new tokens a second of audio..."""
    extra_tokens: int = 24
    """...plus this many."""
    force_task: bool = False
    """Force the control token of the task that is scored; the paper's models choose it themselves."""
    grammar: bool = False
    """Let only well-formed answers be decoded, and leave what repeats itself; the paper's protocol does without."""

    def settings(self) -> dict[str, Any]:
        """For :class:`~unislu_llm.decoding.options.DecodeOptions`, whose grammar is None where it is not asked for."""
        return dataclasses.asdict(self) | {"grammar": self.grammar or None}


@dataclass
class Config:
    """One training run."""

    output: str = ""
    """Run folder, never overwritten; default: runs/<recipe>-<date-time>."""
    resume: bool = False
    """Go on with the run in `output` from its last checkpoint."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    stages: Stages = field(default_factory=list)
    """Stages in order, each a mapping with a `name` and sections that are laid over this config; none: one run."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as YAML writes it."""
        return dataclasses.asdict(self)


def apply(target: Any, values: Mapping[str, Any], where: str) -> None:
    """Lay plain values over a dataclass in place, checking names and types.

    Raises:
        UserError: unknown key (the nearest known one is named) or a value of the wrong type; `where` names the file.
    """
    hints = typing.get_type_hints(type(target), include_extras=False)
    if isinstance(target, ModelConfig) and "projector" in values:
        _choose_projector(target, values["projector"])
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(hints)}"
            raise UserError(f"{where}: unknown key '{key}'{hint}")
        if dataclasses.is_dataclass(getattr(target, key)):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}.{key}: expected a mapping, found {value!r}")
            apply(getattr(target, key), value, f"{where}.{key}")
        elif key == "projector_options":
            setattr(target, key, getattr(target, key) | _checked(value, hints[key], f"{where}.{key}"))
        else:
            setattr(target, key, _checked(value, hints[key], f"{where}.{key}"))


def _choose_projector(model: ModelConfig, name: str) -> None:
    """Options belong to a projector: what an earlier source said of another one no longer holds."""
    if name != model.projector:
        model.projector, model.projector_options = name, {}


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    is_float = hint in (float, float | None)
    if is_float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML reads 1e-4 as a string
            return float(value)
        except ValueError:
            pass
    expected = tuple(typing.get_origin(a) or a for a in args) if origin and origin not in (list, dict) else (origin or hint,)
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        UserError: missing file, bad YAML (with its line), or not a mapping.
    """
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping at the top")
    return values


def find_preset(llm: str, folder: Path) -> Path | None:
    """The file of `folder/*.yaml` whose `llm` is this one; None when there is no preset."""
    return next((p for p in sorted(folder.glob("*.yaml")) if read_yaml(p).get("llm") == llm), None)


def apply_file(config: Config, path: Path) -> None:
    """Lay a config file over `config`; manifests, task files and the noise folder in it are relative to it."""
    values = read_yaml(path)
    stages = values.get("stages")
    for part in [values, *(stages if isinstance(stages, list) else [])]:
        if isinstance(part, dict):
            _resolve_paths(part, path.parent)
    apply(config, values, str(path))


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make the paths of a config's sections absolute, in place."""
    paths = {"data": ("train", "dev", "tasks", "encoder_cache"), "augment": ("noise",), "model": ("init", "init_llm")}
    for name, keys in paths.items():
        section = values.get(name)
        if not isinstance(section, dict):
            continue
        for key in keys:
            value = section.get(key)
            if isinstance(value, list):
                section[key] = [str((folder / str(p)).resolve()) for p in value]
            elif isinstance(value, str) and value:
                section[key] = str((folder / value).resolve())


def apply_preset(config: Config, path: Path) -> None:
    """Lay an adapter preset over `config`: its `precision` over `train.precision`, the rest over the model section.

    The precision holds with and without a GPU (bf16 computes on a CPU too, if slowly); a config file or
    `--train.precision` wins over it.

    Raises:
        UserError: as :func:`apply`.
    """
    values = read_yaml(path)
    apply(Preset(), values, str(path))  # checks names and types, `precision` among them
    if "precision" in values:
        config.train.precision = values.pop("precision")
    apply(config.model, values, str(path))


def load_config(argv: Sequence[str] | None, default_file: Path, presets: Path | None, description: str) -> Config:
    """Build the configuration of a run from a config file, an adapter preset and flags.

    Args:
        argv: command line without the program; None takes the process's own.
        default_file: config used without `--config`.
        presets: folder of adapter presets, looked up by LLM name; None where there is no LLM.
        description: shown by `--help`.

    Raises:
        UserError: as :func:`apply`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, default=default_file)
    first.add_argument("--adapter", type=Path)
    known, rest = first.parse_known_args(argv)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--llm", "--model.llm", dest="llm")
    peek.add_argument("--projector", "--model.projector", dest="projector")
    flags = peek.parse_known_args(rest)[0]
    config = Config()
    apply_file(config, known.config)
    if presets is not None:
        preset = known.adapter or find_preset(flags.llm or config.model.llm, presets)
        config = Config()
        if preset is not None:
            apply_preset(config, preset)
        apply_file(config, known.config)
        if known.adapter is not None and flags.llm is None:  # an explicit preset names its LLM
            config.model.llm = read_yaml(known.adapter).get("llm", config.model.llm)
    if flags.projector is not None:
        _choose_projector(config.model, flags.projector)
    description += f"\n\n--config FILE (default {default_file.name}) and --adapter FILE (a preset) set the defaults shown here."
    return tyro.cli(Config, args=rest, default=config, description=description)
