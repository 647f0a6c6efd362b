"""DeepSpeed's ZeRO-2 and ZeRO-3, by what `accelerate config` has asked.

The engine is made here, on CPUs as on GPUs: Accelerate makes one on GPUs alone, which takes its
step in the backward pass.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn

from unislu_llm.config import Config
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.training.sharding import METHODS, gather_for

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
    # The parts that are put together here are measured and tried, by every process (zero3_init).
    for name, works in (
            ("zero_stage", "2 or 3"), ("offload_optimizer_device", "none"), ("config_file", "none"),
            ("offload_param_device", "none"), ("zero3_init", "false"),
            ("gradient_accumulation_steps", "1 beside train.accumulation"),
            ("gradient_clipping", f"{train.max_grad_norm} as train.max_grad_norm")):
        flag = f"ACCELERATE_{'DEEPSPEED_' * (not name.startswith('gradient'))}{name}".upper()
        if (found := os.environ.get(flag, "").lower()) and found not in works.split():
            raise UserError(f"DeepSpeed: {name} is {found}; set {works} (see accelerate config)")
    if train.on_oom == "split" or config.model.quantization != "none":
        raise UserError("DeepSpeed: set train.on_oom stop, and model.quantization none")
    return None if world == 1 else {
        "zero_optimization": {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")),
                              "stage3_param_persistence_threshold": 0},  # see `_keep_whole`
        "train_micro_batch_size_per_gpu": 1, "train_batch_size": world,  # batches are the trainer's
        "gradient_clipping": train.max_grad_norm, "zero_allow_untested_optimizer": True,
        # Its own bf16 would cast what trains, and it would send some gradients in bf16.
        "torch_autocast": {"enabled": train.precision == "bf16", "dtype": "bfloat16",
                           "lower_precision_safe_modules": []}}


class ZeroAccelerator(Accelerator):
    """An accelerator that trains by a configuration of :func:`zero_of`, through one engine."""

    def __init__(self, zero: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.zero = zero

    def prepare(self, model: SLUModel, optimizer: Any) -> tuple[Any, Any]:  # type: ignore[override]
        """The engine, and its optimizer."""
        import deepspeed

        self.groups = [dict(group) for group in optimizer.param_groups]  # it changes those
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.zero)
        if self.zero["zero_optimization"]["stage"] == 3:
            _keep_whole(model)
        self.deepspeed_engine_wrapped = DeepSpeedEngineWrapper(self.engine)  # to be destroyed
        return self.engine, _Optimizer(self.engine.optimizer, self.groups)

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
    """Keep sharded weights, but for those of frozen layers, whole for the length of a pass."""
    from deepspeed import zero

    layers = {p for module in model.modules() if isinstance(module, nn.ModuleList)
              for p in module.parameters()}
    # What earlier stages have trained is saved as well.
    whole: list[Any] = [p for name, p in model.named_parameters()
                        if name in model._persistent or p not in layers]
    for parameter in whole:
        # Embeddings are read past their modules' own forward, the output layer as often as a
        # process has chunks, and `_idle` adds up what trains.
        zero.register_external_parameter(model, parameter)
        parameter.is_external_param = True  # else the first module that uses it would release it
    # Weights that are loaded stay until :meth:`_Optimizer.load_state_dict` gives each its part.
    for name in (*METHODS, "trained_state", "load_trained"):
        gather_for(model, name, lambda: whole[0].all_gather(whole))


class _Optimizer:
    """A ZeRO optimizer as one of whole parameters, for rates and moments, by all processes."""

    def __init__(self, zero: Any, groups: list[dict[str, Any]]) -> None:
        self.zero, self.moments, self.param_groups = zero, zero.optimizer.state, groups
        self.parameters = [p for group in groups for p in group["params"]]
        self.flats = (getattr(zero, "fp32_partitioned_groups_flat", None)
                      or zero.single_partition_of_fp32_groups)
        # Adam makes them in its first step, one group after the other, and DeepSpeed wants all
        # after the first.
        for flat in self.flats:
            self.moments[flat] = {"step": torch.tensor(0.0, device=flat.device)} | {
                key: torch.zeros_like(flat) for key in _MOMENTS}
        getattr(zero, "_lazy_init_hp_params_optimizer_state", list)()

    def state_dict(self) -> dict[str, Any]:
        return {}

    step = zero_grad = state_dict  # the engine's

    @property
    def state(self) -> dict[Any, dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state as get

        step = self.moments[self.flats[0]]["step"]
        return {p: {"step": step.clone()} | {key: get(p, key).cpu() for key in _MOMENTS}
                for p in self.parameters}

    @torch.no_grad()
    def load_state_dict(self, found: dict[str, Any]) -> None:
        from deepspeed import zero

        state = found["state"]
        for key in (*_MOMENTS, "weights"):  # by the way of weights, each lands in its process
            with zero.GatheredParameters(self.parameters, modifier_rank=0):
                for number, p in enumerate(self.parameters):
                    state[number].setdefault("weights", p.clone())
                    p.copy_(state[number][key])
            self.zero.refresh_fp32_params()
            for flat in self.flats:
                self.moments[flat]["step"].copy_(state[0]["step"])  # all are alike
                self.moments[flat].get(key, flat).copy_(flat)
