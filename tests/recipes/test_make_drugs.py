"""The example of own labels: 20 clips and 5 others, read with the tasks that it names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from unislu_llm.data.manifest import read_manifest
from unislu_llm.tasks import Span, TaskRegistry

TASKS = Path(__file__).parents[2] / "recipes" / "configs" / "tasks_drugs.yaml"


def test_the_clips_fit_their_tasks(recipe: Callable[[str], ModuleType], tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    drugs = recipe("make_drugs")
    tone = np.sin(np.arange(8000) / 9).astype(np.float32)
    monkeypatch.setattr(drugs.PiperVoice, "speak", lambda self, text: tone)
    drugs.build(tmp_path)
    registry = TaskRegistry.from_yaml(TASKS)
    train, dev = (read_manifest(tmp_path / f"{name}.jsonl", registry, check_audio=True)
                  for name in ("train", "dev"))
    assert (len(train), len(dev)) == (20, 5)
    assert not {u.text for u in train} & {u.text for u in dev}
    spans: list[Any] = [span for u in (*train, *dev) for span in u.labels["drugs"]]
    assert Counter(span.label for span in spans).keys() == {"DRUG", "DOSE"}
    assert dev[0].labels["drugs"] == (Span("DOSE", 9, 20), Span("DRUG", 24, 35))
    assert all(word not in u.text for u in (*train, *dev) for word in ("DRUG", "(", ")"))
