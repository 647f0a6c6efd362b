"""FSDP2: a model in shards over the processes, by what `accelerate config` has asked.

What is sharded as one unit trains as a whole or not at all: each block of the encoder and of the
LLM, the frozen rest of either, and all else that trains (LoRA, projector, markers). So frozen
weights may be bf16 beside fp32 ones that train, and only what trains has its gradients summed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin as Plugin
from accelerate.utils import parse_flag_from_env
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor

from unislu_llm.config import Config
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel

# What decoding and the objectives call beside `forward`.
METHODS = ("prefill", "step", "logits", "ctc_transcripts", "ctc_posteriors")

_ONE_WAY = ("FSDP shards weights in one way alone: set {} (fsdp_... stands in the config file of "
            "accelerate, see accelerate config)")


def sharding_of(config: Config) -> Plugin | None:
    """How the launcher says to shard a run; None: it does not, or there is one process.

    Raises UserError: a way, or a setting, that does not work.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION") != "2":  # of which Accelerate has errors of its own
        raise UserError(_ONE_WAY.format("fsdp_version: 2"))
    plugin = Plugin()
    for refused, line in (
            # The parts that are put together here are measured and tried, by every process.
            (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading: false"),
            (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "fsdp_offload_params: false"),
            (plugin.auto_wrap_policy is size_based_auto_wrap_policy,
             "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
            (plugin.ignored_modules, "no fsdp_ignored_modules"),
            (plugin.activation_checkpointing, "fsdp_activation_checkpointing: false, and "
             "train.gradient_checkpointing in its place"),
            (parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"), "no parallelism_config"),
            # Each pass is one of all processes.
            (config.train.on_oom == "split", "train.on_oom stop, and more train.accumulation"),
            (config.model.quantization != "none", "model.quantization none")):
        if refused:
            raise UserError(_ONE_WAY.format(line))
    return plugin if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def shard(model: SLUModel, plugin: Plugin, device: torch.device) -> None:
    """Shard a model in place, over all processes; its parameters are `DTensor`s from here on.

    All processes must call its methods alike: each gathers weights. Raises UserError: no layer of
    the LLM or Whisper is known that could be a unit.
    """
    how: dict[str, Any] = {"mesh": init_device_mesh(device.type, (distributed.get_world_size(),))}
    # The encoder first, which may be a part of the decoder's model.
    parts = [*([model.encoder.whisper] if model.encoder is not None else []), model.lm]
    names = set(plugin.transformer_cls_names_to_wrap or ()) - {""} or {
        name for part in parts for name in part._no_split_modules or ()}
    blocks = [m for part in parts for m in part.modules() if type(m).__name__ in names]
    if not any(block in set(model.lm.modules()) for block in blocks):
        raise UserError(f"FSDP: {type(model.lm).__name__} has no layers {sorted(names)}; name the "
                        "class of its layers in fsdp_transformer_layer_cls_to_wrap")
    whole = {p for block in blocks if all(p.requires_grad for p in block.parameters())
             for p in block.parameters()}
    # What trains beside frozen weights is gathered once a pass, as the root's. First: torch looks
    # for no parameters in what is sharded already.
    fully_shard(model, ignored_params=whole | {p for p in model.parameters()
                                               if not p.requires_grad}, **how)
    # Then inner blocks before outer ones, and at last embeddings, output layers, norms. Of those
    # some are read past their modules' own forward, and the output layer as often as a process has
    # chunks: they stay for the whole of a pass.
    for unit in (*reversed(list(dict.fromkeys(blocks))), *parts):
        apart = {p for p in unit.parameters()  # scalars cannot be sharded
                 if not p.ndim or (p.requires_grad and p not in whole)}
        fully_shard(unit, ignored_params=apart, **how, reshard_after_forward=(
            plugin.reshard_after_forward and unit not in parts))
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.to(device)
    for name in ("forward", *METHODS):
        gather_for(model, name, lambda: [part.unshard() for part in parts])


def reshard(model: nn.Module) -> None:
    """Give back what a pass without gradients has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_for(model: SLUModel, name: str, unshard: Callable[[], object]) -> None:
    """Have a method of a sharded model, where there is one, run on weights that are gathered."""
    if model.encoder is not None:
        model.encoder.in_parts = False
    if (method := getattr(model, name, None)) is None:
        return

    def gathered(*args: Any, **kwargs: Any) -> Any:
        unshard()
        found = method(*args, **kwargs)
        if name == "logits":  # by which all processes must take the same number of steps
            distributed.broadcast(found := found.contiguous(), src=0)
        return found

    setattr(model, name, gathered)
    if name != "forward":
        if isinstance(model, FSDPModule):
            register_fsdp_forward_method(model, name)
        # Weights that are gathered in inference mode could not be trained with.
        plain: Any = torch.inference_mode(False)
        setattr(model, name, plain(torch.no_grad()(getattr(model, name))))
