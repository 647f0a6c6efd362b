"""DeepSpeed's ZeRO-2 and ZeRO-3, by what `accelerate config` has asked.

The engine is made here, on CPUs (gloo) as on GPUs: Accelerate makes one on GPUs alone, which takes
its step in the backward pass.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedEngineWrapper, parse_flag_from_env
from torch import Tensor, distributed
from torch.nn.functional import pad

from unislu_llm.config import Config
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.training.sharding import METHODS, gather_for, layers_of

_MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


def zero_of(config: Config) -> dict[str, Any] | None:
    """DeepSpeed's configuration for a run; None: it was not asked for, or there is one process.

    Raises UserError: it is not installed, or a setting does not work.
    """
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed: pip install 'unislu_llm[deepspeed]'")
    train, world = config.train, int(os.environ.get("WORLD_SIZE", "1"))
    for name, fine, line in (
            ("DEEPSPEED_ZERO_STAGE", "2 3", "zero_stage: 2 or 3"),
            ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none", "offload_optimizer_device: none"),
            ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none", "offload_param_device: none"),
            ("DEEPSPEED_CONFIG_FILE", "none", "no deepspeed_config_file"),
            # The parts that are put together here are measured and tried, by every process.
            ("DEEPSPEED_ZERO3_INIT", "false", "zero3_init_flag: false"),
            ("GRADIENT_ACCUMULATION_STEPS", "1 auto", "train.accumulation in its place"),
            ("GRADIENT_CLIPPING", f"auto {train.max_grad_norm}", "train.max_grad_norm in its place")):
        if os.environ.get(f"ACCELERATE_{name}", fine.split()[0]).lower() not in fine.split():
            raise UserError(f"DeepSpeed: {name.lower()} works in one way alone: set {line} (see "
                            "accelerate config)")
    if train.on_oom == "split" or config.model.quantization != "none":
        raise UserError("DeepSpeed: set train.on_oom stop, and model.quantization none")
    # The batches are the trainer's; DeepSpeed only has to know that they are whole.
    return None if world == 1 else {
        "zero_optimization": {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))},
        "train_micro_batch_size_per_gpu": 1, "train_batch_size": world,
        "gradient_clipping": train.max_grad_norm, "zero_allow_untested_optimizer": True,
        # Its own bf16 would cast what trains, and it would send some gradients in bf16.
        "torch_autocast": {"enabled": train.precision == "bf16", "dtype": "bfloat16",
                           "lower_precision_safe_modules": []}}


def in_shards(zero: dict[str, Any] | None) -> bool:
    """Whether a process has but a part of the weights: then no pass is one of its own."""
    return zero is not None and zero["zero_optimization"]["stage"] == 3


class ZeroAccelerator(Accelerator):
    """An accelerator that trains by a configuration of :func:`zero_of`."""

    def __init__(self, zero: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.zero = zero

    def prepare(self, model: SLUModel, optimizer: Any) -> tuple[Any, Any]:  # type: ignore[override]
        """The engine, and its optimizer."""
        import deepspeed

        self.groups = [dict(group) for group in optimizer.param_groups]  # it changes those
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.zero)
        if in_shards(self.zero):
            _keep_whole(model)
        self.engine, self.deepspeed_engine_wrapped = engine, DeepSpeedEngineWrapper(engine)
        return engine, ZeroOptimizer(engine.optimizer, self.groups)

    @contextlib.contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        """Inside, a backward pass is not the last of its step."""
        self.engine.set_gradient_accumulation_boundary(False)
        yield
        self.engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add gradients up, over processes as well."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> Any:
        """Clip, and take the step; a norm that is not finite leaves all as it is."""
        for own, its in zip(self.groups, self.engine.optimizer.param_groups, strict=True):
            its["lr"] = own["lr"]
        self.engine.step()
        return self.engine.get_global_grad_norm()


def _keep_whole(model: SLUModel) -> None:
    """Keep all weights in shards but frozen layers whole for the length of a pass."""
    from deepspeed import zero

    layers = {p for layer in layers_of(model)[1] for p in layer.parameters() if not p.requires_grad}
    whole: list[Any] = [p for p in model.parameters() if p not in layers]
    for parameter in whole:
        # Embeddings are read past their modules' own forward, the output layer as often as a
        # process has chunks, and `_idle` adds up what trains.
        zero.register_external_parameter(model, parameter)
        parameter.is_external_param = True  # else the first module that uses it would release it
    for name in (*(n for n in METHODS if hasattr(model, n)), "trained_state"):
        gather_for(model, name, lambda: whole[0].all_gather(whole))
    load = model.load_trained

    def load_trained(*args: Any, **kwargs: Any) -> list[str]:
        with zero.GatheredParameters(whole, modifier_rank=0):
            return load(*args, **kwargs)

    model.load_trained = load_trained  # type: ignore[method-assign]


class ZeroOptimizer:
    """A ZeRO optimizer as one of whole parameters, for rates and moments; all processes have to ask
    for those. The engine takes its steps."""

    def __init__(self, zero: Any, groups: list[dict[str, Any]]) -> None:
        self.zero, self.param_groups = zero, groups
        self.flats = (getattr(zero, "fp32_partitioned_groups_flat", None)
                      or zero.single_partition_of_fp32_groups)
        # Adam makes moments in its first step, group by group; DeepSpeed wants them all after the
        # first group.
        for flat in self.flats:
            zero.optimizer.state[flat] = {"step": torch.tensor(0.0, device=flat.device), **{
                key: torch.zeros_like(flat) for key in _MOMENTS}}

    def step(self) -> None:
        """Nothing."""

    zero_grad = step

    @property
    def state(self) -> dict[Any, dict[str, Tensor]]:
        """Moments of each parameter, on the CPU."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self.zero.optimizer.state[self.flats[0]]["step"]
        return {p: {"step": step.clone(), **{
            key: safe_get_full_optimizer_state(p, key).cpu() for key in _MOMENTS}}
            for group in self.param_groups for p in group["params"]}

    def state_dict(self) -> dict[str, Any]:
        """What torch's optimizers have beside moments: nothing here."""
        return {}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Go on with moments by number, and with weights that were loaded."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self.zero.refresh_fp32_params()  # its own copies
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-2
            self.zero._lazy_init_hp_params_optimizer_state()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, moments in found["state"].items():
            p, steps = parameters[number], moments["step"]
            for key in _MOMENTS:
                if not hasattr(p, "ds_tensor"):
                    safe_set_full_optimizer_state(p, moments[key], key)
                    continue
                # DeepSpeed would cut whole ones without the zeros at the end of the last part.
                size = p.ds_tensor.ds_numel
                whole = pad(moments[key].flatten(), (0, size * distributed.get_world_size()))
                own = whole[size * distributed.get_rank():][:size]
                safe_set_local_optimizer_state(p, own, key)
        for flat in self.flats:
            self.zero.optimizer.state[flat]["step"].fill_(float(steps))  # all are alike
