"""How often a training step waits for its device.

A GPU works behind the host, which must not ask it for a number: each answer waits for all that was
asked of it before. Here `meta` stands for the device, whose tensors have no values: what is read of
one is counted, and what needs one in another way (a mask as an index, `.item()` in transformers)
is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.conftest import CTC
from unislu_llm.config import Config
from unislu_llm.data.manifest import read_manifest, write_manifest
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.log import Window
from unislu_llm.training.optim import build_optimizer
from unislu_llm.training.trainer import Trainer

META = torch.device("meta")


class Waits(TorchDispatchMode):
    """Counts what is read from the device, and answers with ones."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        one = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if one is not None and one.device == META:
            name = func.name().partition(".")[0]
            if name == "aten::_local_scalar_dense":
                self.seen["number"] += 1
                return 1.0
            if name == "aten::_to_copy" and kwargs.get("device", META) != META:
                self.seen["tensor"] += 1
                return torch.ones(one.shape, dtype=kwargs.get("dtype") or one.dtype)
            if name in ("aten::equal", "aten::is_nonzero"):
                self.seen["comparison"] += 1
                return True
        return func(*args, **kwargs)


CASES: dict[str, dict[str, Any]] = {
    "mlp": {"projector": "mlp"}, "conv": {"projector": "conv", "projector_options": {}},
    "qformer": {"projector": "qformer", "projector_options": {"heads": 2, "hidden": 16}},
    "ctc": CTC | {"hypothesis": "manifest", "hypothesis_prompt": "read"},
    "encoder": {"encoder_mode": "lora"}, "padded": {"silence": 30.0},
    "whisper": {"decoder_mode": "full"}}


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_the_device_twice_at_most(
        case: str, tiny_config: Callable[..., Config]) -> None:
    """For the norm of its gradient, which says whether it may be taken, and for its losses."""
    config = tiny_config(model=CASES[case], train={"accumulation": 2})
    rows = read_manifest(config.data.train[0], TaskRegistry())
    write_manifest(config.data.train[0], [replace(u, hypothesis=u.text) for u in rows])
    config.data.dev = []
    trainer = Trainer("whisper_slu" if case == "whisper" else "speech_llm", config)
    trainer.model.to(META)
    trainer.wrapped, trainer.device = trainer.model, META
    trainer.optimizer = build_optimizer(trainer.model.trainable_groups(), config.train)
    trainer.window = Window(trainer.objective, META)
    micro = next(trainer.batches(0))
    assert len(micro) == 2
    with Waits() as waits:
        trainer.step(micro)
        row = trainer.window.read(trainer.accelerator)
    assert trainer.progress.nonfinite == 0
    assert row["loss"] == 1.0  # read from the device, not made up by the host
    # A `ctc` projector drops frames by what it hears: once in each of two micro-batches.
    assert waits.seen.total() <= 2 + 2 * (case == "ctc"), waits.seen


def test_a_wait_is_counted() -> None:
    value = torch.ones(3, device=META)
    with Waits() as waits:
        float(value.sum())
        value.tolist()
        value.cpu()
    assert waits.seen == {"number": 1, "tensor": 2}
    with pytest.raises(NotImplementedError):
        value[value > 0]
