"""What a run would take: FLOPs and bytes, counted where tensors have shapes and no values.

On the device `meta` the model is put together as for training, and micro-batches of the corpus go
through it, forwards and backwards. So every LLM, projector and setting is counted as it is, in
seconds, and of a checkpoint on the hub nothing is fetched but what describes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from unislu_llm.config import Config
from unislu_llm.data.audio import SAMPLE_RATE, encoder_length, mel_length
from unislu_llm.data.batch import Batch
from unislu_llm.data.dataset import Item, SpeechDataset
from unislu_llm.data.frame_cache import Frames
from unislu_llm.data.loading import load_examples
from unislu_llm.models.base import SLUModel
from unislu_llm.models.head import LOGITS_ON_GPU
from unislu_llm.tokenizer import Example
from unislu_llm.training.build import build_model, build_registry
from unislu_llm.training.data import build_dataset, build_plan
from unislu_llm.training.stages import stage_configs

PEAKS = {"A100": 312e12, "H100": 989e12}
"""Dense bf16 FLOPs a second of a GPU, from NVIDIA's data sheets."""
EFFICIENCY = 0.4
"""Share of the peak that training is taken to reach; assumed, and not measured by us."""
BITS = {"none": 16.0, "8bit": 8.0, "4bit": 4.13}
"""Of a frozen weight in a linear layer; with the scales of 4 bits (QLoRA, arXiv 2305.14314)."""
_RESERVED = 1 << 30  # bytes that CUDA and its libraries take
_SAMPLED = 4  # micro-batches of an epoch that are counted


class _Shapes(TorchDispatchMode):
    """Answers with ones where the value of a tensor without one is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(one := args[0], Tensor) and one.is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1.0
            if (func is torch.ops.aten._to_copy.default
                    and torch.device(kwargs.get("device") or "meta").type != "meta"):
                return torch.ones(one.shape, dtype=kwargs.get("dtype") or one.dtype)
        return func(*args, **kwargs)


class Cost(NamedTuple):
    """Of one micro-batch."""

    forward: float  # FLOPs
    backward: float  # FLOPs, with what gradient checkpointing computes again
    kept: int  # bytes of activations that the backward pass needs
    logits: int  # bytes of a chunk of logits, their softmax and its gradient


@contextmanager
def shapes_alone() -> Iterator[None]:
    """In this block new models have shapes and no values."""
    with torch.device("meta"), _Shapes():
        yield


def cost(model: SLUModel, batch: Batch) -> Cost:
    """Count a micro-batch through a model made in :func:`shapes_alone`, in bf16."""
    sizes: dict[StorageWeakRef, int] = {}

    def keep(value: Tensor) -> Tensor:  # a view shares the storage of what it is of
        sizes[StorageWeakRef(value.untyped_storage())] = value.untyped_storage().nbytes()
        return value

    model.to(torch.bfloat16).train()  # as autocast computes, which knows no `meta`
    weights = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    with _Shapes(), FlopCounterMode(display=False) as count:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = model(batch.to("meta")).sum()
        forward = count.get_total_flops()
        loss.backward()
        model.zero_grad()
    kept = sum(size for key, size in sizes.items() if key not in weights)
    vocabulary = int(model.lm.config.get_text_config().vocab_size)
    logits = 3 * 4 * min(LOGITS_ON_GPU, sum(batch.target_lengths) * vocabulary)
    return Cost(forward, count.get_total_flops() - forward, kept, logits)


def memory(model: SLUModel, largest: Cost, gpus: int = 1, bits: float = 16.0) -> float:
    """GiB of each of `gpus` that share the weights (FSDP2, ZeRO-3), in the largest micro-batch.

    One GPU, or each under DDP, has all. `bits` are those of frozen linear weights.
    """
    blocks = [block for part in model.modules() if isinstance(part, nn.ModuleList)
              for block in part if not any(isinstance(m, nn.ModuleList) for m in block.modules())]
    own = set(model.lm.modules())  # the encoder and the output layer stay in bf16
    inside = [_weights(block, bits if block in own else 16.0) for block in blocks]
    rest = _weights(model, 16.0) - sum(_weights(block, 16.0) for block in blocks)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Weights that train, their gradients and Adam's two moments are fp32.
    fixed = sum(inside) + rest + 16 * trained
    # Of shared weights two blocks are whole at a time, one that computes and one that comes, and
    # what is in no block (embeddings, output layer) stays.
    gathered = 2 * max(inside, default=0) + rest if gpus > 1 else 0
    return (fixed / gpus + gathered + largest.kept + largest.logits + _RESERVED) / 2**30


def _weights(part: nn.Module, bits: float) -> float:
    """Bytes of frozen weights."""
    linear = {id(m.weight) for m in part.modules() if isinstance(m, nn.Linear)}
    return sum(p.numel() * (bits if id(p) in linear else 16.0) / 8 for p in part.parameters()
               if not p.requires_grad)


def table(flops: float, largest: Cost, model: SLUModel, bits: float) -> str:
    """Memory of the `largest` micro-batch and time of all FLOPs of a run, on 1, 8 and 64 GPUs."""
    # Weights of 8 and 4 bits are not shared out (training/sharding.py refuses it).
    rows = [[gpus, memory(model, largest, 1, bits),
             memory(model, largest, gpus, bits) if bits == 16 or gpus == 1 else None,
             *(flops / (peak * EFFICIENCY * gpus * 3600) for peak in PEAKS.values())]
            for gpus in (1, 8, 64)]
    return tabulate(rows, ["GPUs", "GiB each, DDP", "GiB each, FSDP2",
                           *(f"hours, {name}" for name in PEAKS)],
                    tablefmt="github", floatfmt=".3g", missingval="-")


def plan(kind: str, config: Config) -> str:
    """What the run of a config, or each of its stages, would take, as text; raises UserError: as
    the run would."""
    # A stage begins with the model of the one before, which is not there yet.
    stages = [(name, own.model_copy(update={"train": own.train.model_copy(
        update={"init": config.train.init})})) for name, own in stage_configs(config, Path("run"))]
    return "\n\n".join(f"stage {name}: {_plan(kind, own)}" for name, own in stages) or (
        _plan(kind, config))


def _plan(kind: str, config: Config) -> str:
    if config.train.objective == "ctc":
        return "the projector alone (train.objective ctc), which is not counted"
    registry = build_registry(config)
    examples = [_with_hypothesis(e) for e in load_examples(
        config.data.train, registry, language=config.model.language)]
    with shapes_alone():
        model = build_model(kind, config, registry, (e.utterance.text for e in examples))
    # Whether cached frames are there already is not asked.
    data = config.data.model_copy(update={"frame_cache": None})
    dataset = build_dataset(config.model_copy(update={"data": data}), model, examples, None)
    batches = build_plan(config, model, dataset, 1)
    steps = batches.steps(config.train.epochs)
    steps = min(steps, config.train.max_steps) if config.train.max_steps else steps
    micro = [m for step in batches.micro_batches(0) for m in step]
    order = sorted(micro, key=lambda m: sum(dataset.seconds(examples[i]) for i, _ in m.members))
    chosen = [order[(2 * i + 1) * len(order) // (2 * _SAMPLED)] for i in range(_SAMPLED)]
    cached = bool(config.data.frame_cache)
    *costs, largest = [cost(model, _batch(model, dataset, [i for i, _ in m.members], cached))
                       for m in (*chosen, order[-1])]
    flops = sum(c.forward + c.backward for c in costs) / len(costs)
    per_step = len(micro) / batches.steps(1)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hours = sum(dataset.seconds(e) for e in examples) / 3600
    bits = BITS[config.model.quantization]
    return "\n".join([
        f"{len(examples)} samples, {hours:.2f} h; {steps} steps of {per_step:.3g} micro-batch(es)",
        f"{total / 1e9:.3f} B parameters, {trained / 1e6:.1f} M of them train; frozen linear "
        f"layers in {bits:g} bits",
        f"a micro-batch: {flops / 1e12:.3g} TFLOPs; activations {largest.kept / 2**30:.2f} GiB at "
        "most", "",
        table(flops * steps * per_step, largest, model, bits), "",
        f"Hours at {EFFICIENCY:.0%} of a GPU's peak, which is assumed; validation is not counted. "
        "More GPUs share the same work, each in micro-batches of this size."])


def _with_hypothesis(example: Example) -> Example:
    """With a hypothesis as long as the text, where there is none yet."""
    u = example.utterance
    return example if u.hypothesis is not None else replace(
        example, utterance=replace(u, hypothesis=u.text))


def _batch(model: SLUModel, dataset: SpeechDataset, rows: Sequence[int], cached: bool) -> Batch:
    """Examples with silence in the place of their audio or cached frames, which are not read."""
    def item(i: int) -> Item:
        example = dataset.examples[i]
        if (kind := dataset.kind(example)) != "audio":
            return dataset[i, 0]
        samples = math.ceil(dataset.seconds(example) * SAMPLE_RATE)
        if not cached or model.encoder is None:
            return Item(example, kind, torch.zeros(samples))
        n = encoder_length(mel_length(samples))
        return Item(example, "frames", Frames(torch.zeros(n, model.encoder.dim), n))

    return model.collator()([item(i) for i in rows])
