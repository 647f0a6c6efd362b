"""The stage that trains the CTC projector alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unislu_llm.errors import UserError
from unislu_llm.models.ctc import CTCProjector
from unislu_llm.training import ctc_stage
from unislu_llm.training.ctc_stage import CtcData, CtcOptions, mask_frames, train_ctc

D, H = 16, 16
WORDS = ["", "alpha", "bravo", "charlie", "delta", "echo"]
TARGETS = [[1, 2, 3], [4, 4, 5, 1], [2], [5, 3, 2, 1, 4]]


def decode(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def parts() -> tuple[CTCProjector, CtcData]:
    torch.manual_seed(0)
    projector = CTCProjector(D, H, 1.0, stack=2, layers=1, heads=2, hidden=32, dropout=0.1, blank_bias=1.0)
    projector.attach(nn.Embedding(6, H).requires_grad_(False), [1, 2, 3, 4, 5])
    lengths = [30, 40, 20, 47]
    frames = [torch.randn(n, D) for n in lengths]
    return projector, CtcData(frames, lengths, TARGETS, [decode(row) for row in TARGETS])


def test_four_clips_are_learned_to_the_word(tmp_path: Path) -> None:
    projector, data = parts()
    history = train_ctc(projector, data, data, decode, tmp_path, CtcOptions(epochs=60, batch_size=4, lr=1e-2))
    assert min(row["wer"] for row in history) == 0
    assert history[-1]["loss"] < 0.1 * history[0]["loss"]
    assert projector.ctc_ids(data.frames[3][None], torch.tensor([47])) == [TARGETS[3]]  # the best epoch's weights


def test_an_interrupted_run_goes_on_as_if_it_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = CtcOptions(epochs=4, batch_size=2, lr=1e-2, time_masks=1, feature_masks=1, samples=1)
    whole, data = parts()
    expected = train_ctc(whole, data, None, decode, tmp_path / "whole", options)

    broken, _ = parts()
    finish: Any = ctc_stage._Run.finish

    def stop(self: Any, row: dict[str, Any]) -> None:
        finish(self, row)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ctc_stage._Run, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        train_ctc(broken, data, None, decode, tmp_path / "broken", options)
    monkeypatch.undo()
    resumed, _ = parts()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.normal_()
    history = train_ctc(resumed, data, None, decode, tmp_path / "broken", options)
    assert [row["loss"] for row in history] == [row["loss"] for row in expected]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert len((tmp_path / "broken" / ctc_stage.LOG).read_text().splitlines()) == 4
    with pytest.raises(UserError, match="other options"):
        train_ctc(resumed, data, None, decode, tmp_path / "broken", CtcOptions(epochs=5))


def test_masks_zero_stretches_inside_the_clip() -> None:
    options = CtcOptions(time_masks=2, time_width=5, feature_masks=1, feature_width=0.25)
    frames, lengths = torch.ones(2, 300, D), torch.tensor([300, 20])
    masked = mask_frames(frames, lengths, options, torch.Generator().manual_seed(0))
    gone = masked == 0
    assert gone.any()
    assert gone.all(-1).sum() <= 15
    assert (gone.all(1)).sum(-1).max() <= 4
    assert torch.equal(mask_frames(frames, lengths, CtcOptions(), torch.Generator()), frames)
