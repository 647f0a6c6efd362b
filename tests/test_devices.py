"""What other systems lack is not asked for: float64 on Apple GPUs, modules on Windows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unislu_llm.data.audio import load
from unislu_llm.decoding.predict import understand
from unislu_llm.tokenizer import make_examples
from unislu_llm.training.process import peak_memory


class NoDoubles(TorchDispatchMode):
    """Refuses operations of torch that give float64, as an Apple GPU does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        assert torch.float64 not in [getattr(t, "dtype", None) for t in tree_leaves(found)], func
        return found


def test_no_float64_is_made_to_train_or_to_decode(tiny_speech_llm: Callable[..., Any],
                                                  make_utterances: Callable[..., Any]) -> None:
    model = tiny_speech_llm(projector="ctc", projector_options={
        "stack": 2, "layers": 1, "heads": 2, "hidden": 16})
    examples = make_examples(make_utterances(), model.registry)
    model.learn_vocabulary(e.utterance.text for e in examples)
    clips = [e.utterance.audio for e in examples if e.utterance.audio]
    with NoDoubles():
        for objective in ("unified", "ctc"):
            batch = model.collator().from_waves(examples, [load(clip) for clip in clips])
            model.train()(batch, objective).sum().backward()
        understand(model.eval(), clips[:2])


def test_windows_has_no_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert 0.01 < peak_memory(gpu=False) < 100
