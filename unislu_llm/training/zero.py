"""DeepSpeed's ZeRO-2 and ZeRO-3, by what `accelerate config` has asked.

The engine is made here of DeepSpeed's part of that file, on CPUs (gloo) as on GPUs; Accelerate
itself makes one on GPUs alone, and one that steps when it should only go backward.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin, parse_flag_from_env
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from unislu_llm.config import Config, TrainConfig
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.training.checkpoint import read_moments
from unislu_llm.training.sharding import METHODS, gather_for, layers_of

USE_ZERO = "ACCELERATE_USE_DEEPSPEED"

# What may stand in DeepSpeed's own file: all else would be a second setting of the trainer's, or
# has not been tried.
_OWN = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping", "steps_per_print", "zero_optimization"}
_OF_ZERO = {"stage", "overlap_comm", "reduce_scatter", "contiguous_gradients", "reduce_bucket_size",
            "allgather_partitions", "allgather_bucket_size", "sub_group_size", "offload_optimizer",
            "offload_param", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
            "stage3_max_live_parameters", "stage3_max_reuse_distance",
            "stage3_gather_16bit_weights_on_model_save"}
_MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's
_REFUSED = "DeepSpeed: set {} in the config file of accelerate (see accelerate config)"


def zero_of(config: Config) -> dict[str, Any] | None:
    """DeepSpeed's configuration for a run; None: it was not asked for, or there is one process.

    Raises UserError: it is not installed, or a setting does not work.
    """
    if not parse_flag_from_env(USE_ZERO):
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed; pip install 'unislu_llm[deepspeed]', or launch "
                        "with accelerate's FSDP (version 2) or MULTI_GPU (DDP)")
    plugin = DeepSpeedPlugin()
    found: dict[str, Any] = plugin.deepspeed_config
    zero, train = found.get("zero_optimization", {}), config.train
    for refused, line in (
            (zero.get("stage") not in (2, 3), "zero_stage: 2 or 3"),
            (plugin.offload_optimizer_device != "none", "offload_optimizer_device: none"),
            (plugin.offload_param_device != "none", "offload_param_device: none"),
            # The parts that are put together here are measured and tried, by every process.
            (parse_flag_from_env("ACCELERATE_DEEPSPEED_ZERO3_INIT"), "zero3_init_flag: false"),
            (found.get("gradient_accumulation_steps") not in ("auto", 1),
             "gradient_accumulation_steps: 1, and train.accumulation"),
            (found.get("gradient_clipping", "auto") not in ("auto", train.max_grad_norm),
             "no gradient_clipping, and train.max_grad_norm"),
            *((True, f"no {key}") for key in [*(found.keys() - _OWN), *(zero.keys() - _OF_ZERO)]),
            (train.on_oom == "split", "train.on_oom stop, and more train.accumulation"),
            (config.model.quantization != "none", "model.quantization none")):
        if refused:
            raise UserError(_REFUSED.format(line))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    # Batches are ours; the sizes only have to agree.
    return found | {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "train_batch_size": int(os.environ["WORLD_SIZE"]),
        "gradient_clipping": train.max_grad_norm, "zero_allow_untested_optimizer": True,
        # Its own bf16 would cast what trains. No module may send gradients in half precision.
        "torch_autocast": {"enabled": train.precision == "bf16", "dtype": "bfloat16",
                           "lower_precision_safe_modules": []}}


def engine_of(model: SLUModel, optimizer: Optimizer, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine over a model and its optimizer; `engine.optimizer` takes its place."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    _start(engine.optimizer)
    if shards_weights(config):
        _open(model)
    return engine


def _open(model: SLUModel) -> None:
    """Keep weights of a model in shards whole for the length of a pass, but for frozen layers."""
    from deepspeed import zero

    _, layers = layers_of(model)
    closed = {p for layer in layers for p in layer.parameters() if not p.requires_grad}
    whole: list[Any] = [p for p in model.parameters() if p not in closed]
    for parameter in whole:
        # Embeddings are read past their modules' own forward, the output layer as often as a
        # process has chunks, and `_idle` adds up what trains.
        zero.register_external_parameter(model, parameter)
        parameter.is_external_param = True  # else the first module that uses it would release it
    load = model.load_trained

    def load_trained(*args: Any, **kwargs: Any) -> list[str]:
        with zero.GatheredParameters(whole, modifier_rank=0):
            return load(*args, **kwargs)

    model.load_trained = load_trained  # type: ignore[method-assign]
    for name in (*(n for n in METHODS if hasattr(model, n)), "trained_state"):
        gather_for(model, name, lambda: whole[0].all_gather(whole))


def shards_weights(config: Mapping[str, Any]) -> bool:
    """Whether a process has but a part of the weights: then each pass is one of all processes."""
    return bool(config["zero_optimization"]["stage"] == 3)


def _flats(optimizer: Any) -> list[Tensor]:
    """What this process steps: a part of all that trains, flat, one tensor a group."""
    flats: list[Tensor] = (optimizer.fp32_partitioned_groups_flat
                           if hasattr(optimizer, "fp32_partitioned_groups_flat")
                           else optimizer.single_partition_of_fp32_groups)
    return flats


def _start(optimizer: Any) -> None:
    """Begin with moments of zero."""
    # Adam would make them in its first step, group by group; DeepSpeed looks at all of them after
    # that of the first group, and would not find the others'.
    for flat in _flats(optimizer):
        optimizer.optimizer.state[flat] = {
            "step": torch.tensor(0.0, device=flat.device),
            **{key: torch.zeros_like(flat) for key in _MOMENTS}}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-2
        optimizer._lazy_init_hp_params_optimizer_state()


def moments_of(optimizer: Any, model: nn.Module) -> dict[str, Tensor]:
    """As `checkpoint.moments`, of a ZeRO optimizer; all processes call this."""
    from deepspeed.utils import safe_get_full_optimizer_state

    step = optimizer.optimizer.state[_flats(optimizer)[0]]["step"].cpu()
    return {f"{name}/{key}": (safe_get_full_optimizer_state(p, key).cpu().contiguous()
                              if key in _MOMENTS else step.clone())
            for name, p in model.named_parameters() if p.requires_grad
            for key in ("step", *_MOMENTS)}


def load_moments(folder: Path, optimizer: Any, model: nn.Module) -> None:
    """Go on with the moments of a checkpoint, and with its weights, which have been loaded; raises
    as `checkpoint.read_moments`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = read_moments(folder, trained)
    optimizer.refresh_fp32_params()  # its own copies
    step = max(float(of["step"]) for of in found.values())  # all alike
    for flat in _flats(optimizer):
        optimizer.optimizer.state[flat]["step"].fill_(step)
    for name, of in found.items():
        for key in _MOMENTS:
            _set_moment(trained[name], of[key], key)


def _set_moment(parameter: Any, value: Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(parameter, "ds_tensor"):  # ZeRO-2
        safe_set_full_optimizer_state(parameter, value, key)
        return
    # DeepSpeed cuts whole values without the zeros at the end of the last part.
    size = parameter.ds_tensor.ds_numel
    padded = nn.functional.pad(value.flatten(), (0, size * distributed.get_world_size()))
    start = size * distributed.get_rank()
    safe_set_local_optimizer_state(parameter, padded[start:start + size], key)
