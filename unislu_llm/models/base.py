"""What both decoders share: the interface, parameter groups, saving and loading.

`SpeechLLM` and `WhisperSLU` answer one interface, so that training, decoding and comparison have no
branch on the kind of decoder. A saved model is a folder with what was trained, the tokenizer and
the configuration; frozen weights are named (with revision and hash), not copied.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from unislu_llm.config import ModelConfig
from unislu_llm.data.batch import Batch
from unislu_llm.data.dataset import Collator
from unislu_llm.errors import UserError, hint
from unislu_llm.io import WEIGHTS_FILE, check_saved, find_model, is_hub_name, renew_sums
from unislu_llm.models.encoder import SpeechEncoder
from unislu_llm.models.head import logits_of, places, token_losses
from unislu_llm.models.kv_cache import State
from unislu_llm.models.saved import Base, Description, Kind
from unislu_llm.tasks import TaskRegistry
from unislu_llm.tokenizer import UnifiedTokenizer
from unislu_llm.weights import fetch_model

Objective = Literal["unified", "ctc"]


def gathered(tensor: Tensor) -> Tensor:
    """A tensor as a whole; of a sharded one all processes have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(own: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, which every process has, in shards where `own` is."""
    if not isinstance(own, DTensor):
        return value
    value = value.to(own.device)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


class SLUModel(nn.Module, ABC):
    """A speech encoder with some decoder that emits the unified format."""

    kind: ClassVar[Kind]
    encoder: SpeechEncoder | None  # None where the decoder does not listen
    n_mels: int = 80  # mel bins of the encoder
    room: int | None = None  # new tokens that fit after the prompt; None: no bound
    positions: int | None = None  # of prompt and answer together; None: no bound
    reads_hypothesis: bool = False  # whether a recogniser's transcript is part of the prompt
    listens: bool = True  # whether speech is
    recomputes: bool = False  # activations, by gradient checkpointing
    ctc_tokens: tuple[int, ...] | None = None  # ids that a `ctc` projector predicts, once known

    def __init__(self, config: ModelConfig, tokenizer: UnifiedTokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer, self.registry = config, tokenizer, tokenizer.registry
        self.bases: dict[str, Base] = {}  # what it was built from, by part (`encoder`, `llm`)
        self._frozen: tuple[nn.Module, ...] = ()  # a decoder of which nothing but markers trains

    # ---- the interface ----------------------------------------------------------------------

    @property
    @abstractmethod
    def lm(self) -> Any:
        """The transformers model with the decoder's output layer."""

    @abstractmethod
    def forward(self, batch: Batch, objective: Objective = "unified") -> Tensor:
        """What training minimises, in nats, fp32.

        `unified`: teacher-forced cross-entropy of every target token, `(batch, L)`, zero at
        padding. `ctc`: the CTC loss of each transcript by a `ctc` projector, `(batch,)`, zero where
        it has more tokens than its frames hold.

        Raises:
            UserError: a target that does not fit, or an objective that this model has not.
        """

    @abstractmethod
    def prefill(self, batch: Batch) -> State:
        """Read speech and prompt; the targets of the batch are not looked at."""

    def hypotheses(self, batch: Batch) -> list[list[int]] | None:
        """Ids of the hypotheses in the prompt, by row; None where it has none."""
        return None

    @abstractmethod
    def _read(self, state: State, valid: Tensor, **inputs: Tensor) -> Tensor:
        """:meth:`step` by `input_ids`."""

    @abstractmethod
    def token_counts(self, n_samples: int, n_target: int, n_hypothesis: int = 0) -> tuple[int, int]:
        """Tokens of speech and of text that a clip is for the decoder: batches are planned by them.

        Of samples at 16 kHz, ids of the target, and ids of the hypothesis and its prompt.
        """

    @classmethod
    @abstractmethod
    def build(cls, config: ModelConfig, registry: TaskRegistry,
              dtype: torch.dtype = torch.float32, ctc_tokens: Sequence[int] | None = None,
              bases: Mapping[str, Base] | None = None) -> Self:
        """Resolve the checkpoints that `config` names and put the model together, untrained.

        Frozen weights are of `dtype`, what trains is fp32. `bases` are the checkpoints that weights
        to be loaded were trained on: others are warned of.
        """

    # ---- shared -----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def losses(self, batch: Batch) -> Tensor:
        """:meth:`forward` with the objective `unified`."""
        return self(batch)

    def step(self, state: State, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Read tokens `(rows, n)`, of which `valid` (all) count, into `state`.

        Returns hidden states `(rows, n, dim)`, for :meth:`logits`.
        """
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        return self._read(state, valid, input_ids=ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `(..., dim)` to `(..., vocabulary)`."""
        return logits_of(self.lm, hidden)

    def fits(self, state: State, need: Sequence[int]) -> list[int]:
        """New tokens of each row for which there are positions; UserError: fewer than it needs."""
        if self.positions is None:
            return [1 << 30] * len(need)
        prompts: list[int] = state.mask.sum(-1).tolist()
        self.check_fit(max(map(sum, zip(prompts, need, strict=True)), default=0), "answer")
        return [self.positions - n for n in prompts]

    def check_fit(self, need: int, what: str) -> None:
        """Raises UserError: more positions are needed than there are."""
        if self.positions and need > self.positions:
            raise UserError(f"prompt, speech and {what} need {need} positions or more, and the LLM "
                            f"has {self.positions}; give less, or take an LLM with more")

    def collator(self) -> Collator:
        """Collator that makes this model's batches."""
        return Collator(self.tokenizer, self.n_mels, self.config.silence)

    def _frames(self, batch: Batch) -> tuple[Tensor, tuple[int, ...]]:
        """Encoder frames of a batch of audio, or those that it brings, and their lengths."""
        if batch.kind == "audio" and self.encoder is not None:
            return self.encoder(batch.mel, batch.speech_lengths)
        if batch.frames is None:
            raise ValueError(f"a batch of {batch.kind} has no encoder frames")
        return batch.frames, batch.speech_lengths

    def _target_losses(self, hidden: Tensor, starts: Sequence[int], batch: Batch) -> Tensor:
        """Cross-entropy `(batch, L)` of the targets by hidden states `(batch, positions, dim)`."""
        # `starts` are the positions that foretell the first tokens. Gathered by indices made on the
        # CPU: a mask would make the device say how many there are.
        ids, lengths = batch.target_ids, batch.target_lengths
        index = places(lengths, hidden.shape[1], hidden.device, starts)
        supervised = places(lengths, ids.shape[1], hidden.device)
        losses = token_losses(self.lm, hidden.flatten(0, 1).index_select(0, index),
                              ids.flatten().index_select(0, supervised))
        losses = losses.new_zeros(ids.numel()).index_copy(0, supervised, losses)
        losses = losses.view(ids.shape).clone()  # FSDP puts a hook on what is returned, not a view
        return losses if batch.kind in ("audio", "frames") else self._idle(losses)

    def _idle(self, losses: Tensor) -> Tensor:
        """Losses plus zero times every trainable parameter."""
        # DDP waits until every parameter has a gradient, but a micro-batch without audio does not
        # use the encoder, and the objective `ctc` not the LLM. FSDP waits for nothing, and its
        # sharded parameters cannot be added to plain tensors. Each sum has a zero of its own: the
        # gradients of `0 * sum` are views of one number, which two parameters would share.
        sums = [0.0 * p.sum() for p in self.parameters()
                if p.requires_grad and not hasattr(p, "placements")]
        return losses + torch.stack(sums).sum() if sums else losses

    def parameter_group(self, name: str) -> str:
        """Group of a parameter by its name: projector, encoder, markers, lora or decoder."""
        part = name.removeprefix("whisper.model.").partition(".")[0]
        if part in ("projector", "encoder"):
            return part
        return "markers" if name.endswith(".rows") else "lora" if ".lora_" in name else "decoder"

    def trainable_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters by group, each parameter once."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(self.parameter_group(name), []).append((name, parameter))
        return groups

    def select_groups(self, names: Sequence[str]) -> None:
        """Freeze groups that are not named (no name: none); UserError: a name that none has."""
        groups = self.trainable_groups()
        if unknown := [name for name in names if name not in groups]:
            raise UserError(f"train.groups: '{unknown[0]}' does not train in this model; groups: "
                            f"{', '.join(groups)}{hint(unknown[0], groups)}")
        for group, named in groups.items():
            for _, parameter in named:
                parameter.requires_grad_(not names or group in names)

    def train(self, mode: bool = True) -> Self:
        """Train mode, but for what is frozen."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.train(mode)
        for part in self._frozen:
            # transformers computes activations again in train mode alone.
            if not any(getattr(m, "gradient_checkpointing", False) for m in part.modules()):
                part.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass, not keep them; UserError: it cannot."""
        parts, self.recomputes = [self.lm], True
        if self.encoder is not None and self.encoder.mode != "frozen":
            parts.append(self.encoder.whisper)
        for part in parts:
            if not part.supports_gradient_checkpointing:
                raise UserError(f"train.gradient_checkpointing: {type(part).__name__} cannot "
                                "do it; leave it off")
            # transformers has renamed it. Only the non-reentrant kind lets frozen inputs in and
            # works under DDP.
            enable = getattr(part, "activation_checkpointing_enable", None)
            (enable or part.gradient_checkpointing_enable)({"use_reentrant": False})

    def _finish(self) -> None:
        """Last step of a constructor: note what can train, and give it fp32 on any base."""
        self._persistent = frozenset(n for n, p in self.named_parameters() if p.requires_grad)
        for parameter in self.parameters():
            if parameter.requires_grad:  # PEFT gives adapters the dtype of what they adapt
                parameter.data = parameter.data.float()

    # ---- saving and loading -----------------------------------------------------------------

    def trained_state(self) -> dict[str, Tensor]:
        """What was trained, whether or not a stage has frozen it since, by name, on the CPU; of a
        sharded model all processes call this."""
        return {n: gathered(p.detach()).cpu().contiguous() for n, p in self.named_parameters()
                if n in self._persistent}

    def save_pretrained(self, folder: str | os.PathLike[str],
                        state: Mapping[str, Tensor] | None = None) -> None:
        """Write a folder; `state` is :meth:`trained_state`, where it was gathered before."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.trained_state() if state is None else dict(state)
        save_file(weights, partial := folder / f".{WEIGHTS_FILE}", metadata={"format": "pt"})
        partial.replace(folder / WEIGHTS_FILE)
        Description(
            model_type=self.kind, model=self.config, tasks=self.registry.to_dict(),
            bases=self.bases, ctc_tokens=list(self.ctc_tokens or ()) or None,
            markers=list(self.tokenizer.marker_ids)).write(folder)
        self.tokenizer.base.save_pretrained(folder)
        renew_sums(folder)

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str],
                        dtype: torch.dtype = torch.float32) -> Self:
        """The saved model of this kind (`SLUModel`: of either) in a folder, a run's best, or of a
        name on the hub, on the CPU in eval mode; frozen weights are of `dtype`. Raises UserError:
        it is lacking, damaged or of the other kind, or a base checkpoint cannot be had."""
        hub = isinstance(model, str) and not Path(model).exists() and is_hub_name(model)
        folder = fetch_model(str(model)) if hub else find_model(Path(model)) or Path(model)
        check_saved(folder)
        saved = Description.read(folder)
        own = next(kind for kind in SLUModel.__subclasses__() if kind.kind == saved.model_type)
        if not issubclass(own, cls):
            raise UserError(f"{model}: is a {own.__name__}, and no {cls.__name__}; use the former")
        found = own.build(saved.model, saved.registry(folder), dtype, saved.ctc_tokens, saved.bases)
        found.load_trained(folder)
        return found.eval()

    def load_trained(self, folder: str | os.PathLike[str], *, partial: bool = False) -> list[str]:
        """Load trained weights; returns the parameters that the file lacks, which `partial` allows.

        Marker rows are taken by the names of their markers. With `partial` the file may have other
        markers: rows that it lacks stay as they are.

        Raises:
            UserError: the file is missing or damaged, or its parameters are not this model's.
        """
        path = Path(folder) / WEIGHTS_FILE
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); copy or train it again") from error
        # Files of earlier versions hold scalars where there is now a dimension of one.
        state = {n: value if value.ndim else value.reshape(1) for n, value in state.items()}
        own = dict(self.named_parameters())
        for name in [n for n in state if n in own and self.parameter_group(n) == "markers"]:
            state[name] = self._named_rows(state[name], own[name], folder, partial)
        missing, extra = self._persistent - set(state), set(state) - set(own)
        shapes = [n for n in state if n in own and own[n].shape != state[n].shape]
        if (missing and not partial) or extra or shapes:
            raise UserError(f"{path} does not fit its config.json: missing {sorted(missing)[:3]}, "
                            f"unknown {sorted(extra)[:3]}, other shape {shapes[:3]}")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(like(own[name], value))
        return sorted(missing)

    def _named_rows(self, saved: Tensor, own: Tensor, folder: str | os.PathLike[str],
                    partial: bool) -> Tensor:
        """Saved marker rows `(n, dim)` in the order of this model's markers."""
        there = Description.read(folder).markers
        rows, wanted = dict(zip(there, saved, strict=False)), list(self.tokenizer.marker_ids)
        if len(rows) != len(saved) or len(rows) != len(there):
            raise UserError(f"{Path(folder) / WEIGHTS_FILE} does not fit its config.json: it has "
                            f"{len(saved)} marker rows, and {len(there)} markers are named")
        if there == wanted or saved.shape[1:] != own.shape[1:]:  # of which there is an error
            return saved
        if not partial and rows.keys() != set(wanted):
            raise UserError(f"{Path(folder) / WEIGHTS_FILE} has rows of other markers than this "
                            f"model: {', '.join(sorted(rows.keys() ^ set(wanted)))}")
        return torch.stack([rows.get(marker, start.cpu()).to(saved.dtype)
                            for marker, start in zip(wanted, own.detach(), strict=True)])
