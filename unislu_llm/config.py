"""The settings of a run: what can be set, within which bounds, and what each means.

One description serves everywhere: flags, config files, presets of LLMs, the run folder's
`config.yaml`, and the `model` section of a saved model's `config.json`. Later wins: defaults, the
preset of the LLM (`adapters/*.yaml`), the model that a run starts from (`train.init`), the config
file (`--config`), flags.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from tyro.conf import arg

from unislu_llm.errors import UserError
from unislu_llm.io import RECOGNISER
from unislu_llm.setting_types import (
    JSON,
    Common,
    Count,
    Few,
    FilePath,
    Level,
    Name,
    Names,
    Number,
    Options,
    Positive,
    Precision,
    Prompt,
    Rate,
    Share,
    Switch,
    Transcript,
)


class Section(BaseModel):
    """A group of settings; an unknown name and a value out of bounds are errors."""

    # The text below a field is its description everywhere: `--help` shows it, docs need not.
    model_config = ConfigDict(extra="forbid", validate_assignment=True,
                              use_attribute_docstrings=True)


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685)."""

    rank: Annotated[Count, Field(le=1024)] = 16
    """0 trains no adapter."""
    alpha: Rate = 32
    """The update is alpha / rank * B A."""
    target_modules: Names = ["auto"]
    """Suffixes of the linear layers to adapt; all-linear: all; auto: those usual for the LLM."""


class ModelConfig(Section):
    """Which parts are put together, and which of them train."""

    encoder: Annotated[Name, arg(aliases=["--encoder"]), Common] = "openai/whisper-base"
    """Whisper checkpoint of any size: a folder or a name."""
    encoder_mode: Literal["frozen", "lora", "top", "full"] = "frozen"
    """What trains in the encoder: nothing, adapters, the last layers, or everything."""
    encoder_top_layers: Few = 2
    """With encoder_mode top: how many of the last layers train."""
    silence: Annotated[Rate, Field(le=30.0)] = 0.0
    """Seconds of silence that Whisper hears behind a clip; 30 pads to 30 s, as it was trained."""
    llm: Annotated[Name, arg(aliases=["--llm"]), Common] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Causal LM, any of transformers: a folder or a name."""
    projector: Annotated[Name, arg(aliases=["--projector"]), Common] = "mlp"
    """linear, mlp, conv, qformer, ctc; or none: the LLM reads and does not listen."""
    projector_options: Options = {}
    """Keyword arguments of the projector, e.g. {"stack": 4}."""
    lora: LoraConfig = LoraConfig()
    """Adapters of the LLM, or with decoder_mode lora of Whisper's decoder."""
    prompt_prefix: Prompt = ""
    """Text before the speech; special tokens may be written out."""
    prompt_suffix: Prompt = ""
    """Text between the speech and hypothesis and the answer."""
    hypothesis: Annotated[Literal["none", "manifest", "reference"], Common] = "none"
    """Transcript in the LLM's prompt: the manifest's, else the recogniser's; or the reference."""
    hypothesis_prompt: Prompt = "\nDraft:"
    """Text before the hypothesis."""
    hypothesis_bias: Rate = 0.0
    """Nats by which decoding favours the next words of the hypothesis, else of the ctc text."""
    transcript: Literal["auto", "rewrite", "verbatim"] = "auto"
    """How a hypothesis becomes the transcript (docs/decoding.md); auto: validation chooses."""
    recogniser: FilePath = ""
    """What makes hypotheses: a Whisper or saved model, ctc (the projector), empty: the encoder."""
    attention: Literal["auto", "eager", "sdpa", "flash", "flex"] = "auto"
    """How the LLM computes attention; auto: what transformers takes for it."""
    quantization: Annotated[Literal["none", "8bit", "4bit"], Common] = "none"
    """Frozen LLM weights in 8 or 4 bits (bitsandbytes)."""
    language: Annotated[str, Field(pattern="^[a-z]{2,3}$")] = "en"
    """Language code of Whisper's prompt, for its decoder and where it makes hypotheses."""
    decoder_mode: Literal["full", "lora", "frozen"] = "full"
    """Whisper decoder only: what trains in it."""

    def read_from(self, folder: Path) -> Self:
        """As a saved model's file in `folder` means it: a recogniser beside it gets its path."""
        own = self.recogniser == f"./{RECOGNISER}"
        return self.model_copy(update={"recogniser": str(folder.absolute() / RECOGNISER)}
                               if own else {})


class DataConfig(Section):
    """Manifests and how they are read. Paths are relative to the config file that names them."""

    train: Annotated[Names, Common] = []
    """Training manifests (JSON lines)."""
    dev: Annotated[Names, Common] = []
    """Manifests that are scored before, during and after training; `--data.dev none`: none."""
    guard: Names = []
    """Manifests of other speech, whose WER tells beside dev what is forgotten; never of best."""
    tasks: Annotated[Name | None, arg(aliases=["--tasks-file"]), Common] = None
    """YAML list of tasks; default: those of train.init, else named entities and sentiment."""
    weights: Annotated[dict[str, Rate], JSON] = {}
    """Share of each corpus (or manifest, by its stem) in training; overrides the temperature."""
    temperature: Annotated[Number, Field(ge=0.01, le=1e9)] = 1.0
    """Draw a corpus of n samples in proportion to n ** (1 / temperature); 1 is natural mixing."""
    epoch_samples: Annotated[Count, Field(le=10**8)] = 0
    """Samples drawn an epoch; 0: as many as there are."""
    dev_limit: Count = 0
    """Score at most so many samples of each dev or guard manifest during training; 0 is all."""
    num_workers: Annotated[int, Field(ge=-1, le=256, strict=True)] = -1
    """Loader processes; 0 loads in the training process, -1 does so on a CPU and takes 4 a GPU."""
    frame_cache: FilePath = ""
    """Folder that keeps the frames of a frozen encoder for all epochs and runs; empty: none."""
    text_injection: Options = {}
    """Rates for rows without audio, over those that the ctc stage fits: {"error_rate": 0.3}."""


class AugmentConfig(Section):
    """Augmentation of training audio, on the fly; never in validation. Off by default."""

    freq_masks: Annotated[Count, Field(le=100)] = 0
    """SpecAugment: frequency masks a clip, of up to 27 mel bins (cached frames: a tenth)."""
    time_masks: Annotated[Count, Field(le=100)] = 0
    """SpecAugment: time masks a clip, of up to 0.5 s and a tenth of it (cached: 0.4 s in 5 s)."""
    speeds: Annotated[list[Annotated[Number, Field(ge=0.5, le=2.0)]], Field(max_length=100)] = []
    """Speed (and pitch) factors, drawn evenly, e.g. 0.9 1.0 1.1."""
    gain_db: Annotated[Rate, Field(le=60.0)] = 0.0
    """Loudness changes by up to so many dB, up or down."""
    noise: FilePath = ""
    """Folder of audio that is added as noise to half of the samples."""
    snr: tuple[Level, Level] = (5.0, 20.0)
    """Lowest and highest signal-to-noise ratio, dB."""
    silence_share: Share = 0.0
    """Part of the samples replaced by silence or noise with an empty transcript and no task."""

    @property
    def active(self) -> bool:
        """Whether anything is switched on."""
        return self != AugmentConfig(snr=self.snr)


class LearningRates(Section):
    """Peak learning rate of each parameter group."""

    projector: Rate = 1e-3
    lora: Annotated[Rate, Common] = 3e-4
    markers: Rate = 1e-3
    encoder: Rate = 1e-5
    decoder: Rate = 1e-5


class TrainConfig(Section):
    """Optimisation."""

    objective: Literal["unified", "ctc"] = "unified"
    """unified: transcript and task outputs. ctc: transcripts by the ctc projector, without LLM."""
    loss: Annotated[Literal["dynamic", "fixed", "uniform"], Common] = "dynamic"
    """dynamic (the paper's), fixed or uniform."""
    init: Annotated[FilePath, Common] = ""
    """Saved model (or run: its best) to start from, with its settings; what it lacks is new."""
    groups: list[Literal["projector", "lora", "markers", "encoder", "decoder"]] = []
    """Parameter groups that train; default: all."""
    hypothesis_dropout: Share = 0.0
    """Part of the samples whose hypothesis is left out, so that the model listens too."""
    hypothesis_word_dropout: Share = 0.0
    """Part of the hypotheses' words deleted or replaced; if not 0, 0.15 or more without audio."""
    epochs: Annotated[Positive, Field(le=10_000), Common] = 10
    """Passes over the training samples."""
    max_steps: Annotated[Count, Common] = 0
    """Stop after so many steps; 0 means by epochs alone."""
    batch_size: Annotated[Positive, Field(le=100_000), Common] = 16
    """Samples of a global batch, over all processes and accumulation steps."""
    batch_tokens: Count = 0
    """Tokens of a global batch, padding included, in place of batch_size; 0: batch_size counts."""
    accumulation: Annotated[Positive, Field(le=100_000), Common] = 1
    """Micro-batches that each process takes for one step; more need less memory."""
    lr: LearningRates = LearningRates()
    """Peak learning rates; the schedule is a linear warm-up and a cosine to zero."""
    warmup_steps: Count = 50
    """Steps of the warm-up."""
    max_grad_norm: Rate = 1.0
    """Gradient clipping; 0 switches it off."""
    precision: Annotated[Precision, Common] = "fp32"
    """fp32 or bf16. fp16 is not offered: activations of Whisper and of most LLMs overflow it."""
    gradient_checkpointing: Switch = False
    """Recompute activations in the backward pass: less memory, more time."""
    seed: Annotated[Count, Common] = 1
    """Of data order, initial weights and dropout."""
    eval_every: Annotated[Count, Common] = 0
    """Steps between validations by generation; 0 validates before and after training."""
    guard_limit: Rate = 0.0
    """Stop when the guard's WER is so many points over that of the first validation; 0: never."""
    save_every: Count = 0
    """Steps between checkpoints; 0: by save_minutes alone. Each validation saves as well."""
    save_minutes: Rate = 10.0
    """Minutes between checkpoints; 0: none by time."""
    keep: Annotated[Positive, Field(le=1000)] = 2
    """So many of the newest checkpoints are kept: last, last-1, ...; and best."""
    time_limit: Rate = 0.0
    """Minutes after which the run saves and ends, to be resumed (of a batch system); 0: none."""
    timeout: Annotated[Number, Field(gt=0, le=1e5)] = 10.0
    """Minutes that a process waits for the others before all end with an error."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop, or skip the step (5 in a row stop)."""
    on_oom: Literal["stop", "split"] = "stop"
    """A micro-batch that does not fit the memory: stop, or split it in halves."""
    threads: Annotated[Count, Field(le=1024)] = 0
    """CPU threads of a process; 0 shares the cores out."""
    trackers: Names = ["tensorboard"]
    """Accelerate trackers, e.g. tensorboard wandb; metrics.jsonl is always written."""


class DecodeConfig(Section):
    """How answers are decoded."""

    batch_size: Annotated[Positive, Field(le=10_000)] = 16
    """Utterances decoded at one time."""
    max_new_tokens: Annotated[Positive, Field(le=100_000)] = 256
    """Bound of any answer."""
    tokens_per_second: Rate = 12.0
    """Bound by audio length: so many new tokens a second of audio, plus 24."""
    force_task: Switch = False
    """Force the control token of the task that is asked for; the paper's models choose it."""
    grammar: Switch = False
    """Let only well-formed answers be decoded, and leave what repeats itself."""
    grounded: Switch = False
    """With the grammar: phrases of span tasks are whole words of the transcript just decoded."""
    num_beams: Few = 1
    """Beams; 1 is greedy (or sampling, with a temperature)."""
    temperature: Annotated[Rate, Field(le=100.0)] = 0.0
    """Sample at this temperature; 0 takes the likeliest token."""
    hypothesis_bias: Rate | None = None
    """In place of the model's own hypothesis_bias."""
    transcript: Transcript | None = None
    """rewrite or verbatim, in place of the model's own transcript."""
    phrases: FilePath = ""
    """File of names and terms, one a line, that are raised in transcripts (docs/decoding.md)."""
    phrase_boost: Rate = 2.0
    """Nats by which each token of these is raised."""
    no_speech: Share = 0.6
    """Whisper's probability of no speech above which nothing is answered; 1 answers all."""

    def bound(self, seconds: float) -> int:
        """New tokens for so many seconds of audio; however few, markers and labels have room."""
        return min(self.max_new_tokens, 24 + int(self.tokens_per_second * seconds))


class Sections(Section):
    """What a run and each of its stages set."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()


class Stage(Sections):
    """An entry of `stages`: a name, and sections that are laid over the rest of the config."""

    name: str


class Config(Sections):
    """One training run."""

    output: Annotated[FilePath, Common] = ""
    """Run folder, never overwritten; default: runs/<recipe>-<date-time>."""
    resume: Annotated[Switch, Common] = False
    """Go on with the run in `output` from its last checkpoint."""
    stages: Annotated[list[dict[str, Any]], Field(max_length=100), JSON] = []
    """Stages in order, each a mapping with a `name` and sections laid over this config."""


def check_together(config: Sections, processes: int = 1) -> None:
    """Raises UserError: settings that are right by themselves contradict each other."""
    model, data, augment, train = config.model, config.data, config.augment, config.train
    drops = train.hypothesis_dropout or train.hypothesis_word_dropout
    keeps, parts = data.frame_cache and model.projector != "none", processes * train.accumulation
    # Masks are laid over cached frames; all other effects are on the audio.
    audible = augment.model_copy(update={"freq_masks": 0, "time_masks": 0}).active
    _refuse((
        (not train.batch_tokens and train.batch_size < parts, f"train.batch_size: "
         f"{train.batch_size} is smaller than processes x accumulation = {parts}; raise it"),
        (augment.snr[0] > augment.snr[1], "augment.snr: the lowest comes first, then the highest"),
        (model.lora.rank and not model.lora.target_modules,
         "model.lora.target_modules: names no layer; give some, or set model.lora.rank 0"),
        (data.weights and not any(data.weights.values()),
         "data.weights: all weights are 0; give at least one corpus a share"),
        (data.guard and not data.dev, "data.guard: is scored beside data.dev, which names nothing"),
        (train.guard_limit and not (data.guard and train.eval_every), "train.guard_limit: counts "
         "at validations of a guard set; set data.guard and train.eval_every as well"),
        (keeps and audible, "data.frame_cache: augmentation gives every epoch other audio, so "
         "there is nothing to keep; switch it off, or all of augment but time_masks, freq_masks"),
        (keeps and model.encoder_mode != "frozen", "data.frame_cache: frames can be kept of a "
         "frozen encoder alone; set model.encoder_mode frozen, or leave data.frame_cache empty"),
        (model.projector == "none" and model.encoder_mode != "frozen", "model.encoder_mode: by "
         "model.projector none no encoder is heard, and none trains; leave it frozen"),
        (drops and model.hypothesis == "none", "train.hypothesis_dropout, train.hypothesis_word_"
         "dropout: the model reads no hypothesis; set model.hypothesis, or these to 0"),
        (train.hypothesis_dropout and model.projector == "none", "train.hypothesis_dropout: "
         "without a hypothesis and by model.projector none there is nothing to go by; set 0")))
    check_decoding(config.decode)


def check_decoding(decode: DecodeConfig) -> None:
    """As :func:`check_together`, for how answers are decoded."""
    _refuse((
        (decode.grounded and not decode.grammar, "decode.grounded: set decode.grammar as well"),
        (decode.temperature and decode.num_beams > 1,
         "decode.temperature: samples one answer; it takes decode.num_beams 1"),
        (0 < decode.temperature < 1e-3, "decode.temperature: 0 takes the likeliest token, and less "
         "than 0.001 does nothing else; set 0")))


def _refuse(faults: Iterable[tuple[object, str]]) -> None:
    if found := [text for wrong, text in faults if wrong]:
        raise UserError("\n".join(found))
