"""`unislu export`: a trained model as a folder to pass on, with a model card. See docs/export.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from unislu_llm.errors import UserError


def export(run: Annotated[Path, tyro.conf.arg(metavar="RUN")], /, out: Path, dtype: Literal["fp32", "bf16", "fp16"] = "bf16",
           checkpoint: Literal["best", "last"] | None = None, licence: str = "", results: tuple[Path, ...] = (),
           data_note: str = "", encoder: str = "", llm: str = "", draft_checkpoint: str = "",
           draft_bias: float | None = None, max_mb: float = 30.0,
           no_check: bool = False, threads: int = 0) -> int:
    """Write a folder with the trained weights of a run, its configuration and a model card.

    It is used like any saved model. The base models are named, not copied. An earlier export in the folder is replaced.

    Args:
        run: Run folder of a training recipe, or its `best` or `last`.
        out: Folder to write.
        dtype: Of the stored weights; they are loaded as fp32.
        checkpoint: Default: best, or last where there is no best.
        licence: SPDX identifier of the weights' licence, for the card.
        results: Score files of eval/evaluate.py, of this checkpoint or of its export, for the card.
        data_note: Text, or a file with it: what the training data is and its licence, for the card.
        encoder: Public name of the encoder's checkpoint, where the run names a folder.
        llm: The same of the LLM.
        draft_checkpoint: The same of what makes drafts.
        draft_bias: Nats by which decoding with the export draws transcripts to their drafts; default: as the run's model.
        max_mb: Warn when the folder is larger (MB of 1,000,000 bytes).
        no_check: Do not load the model to compare it with the original.
        threads: CPU threads; 0 takes all cores this process may use.
    """
    note = _text(data_note)
    from unislu_llm.analysis.export import ExportOptions
    from unislu_llm.analysis.export import export as write
    from unislu_llm.training.plan import use_threads

    use_threads(threads)
    names = {"encoder": encoder, "llm": llm, "draft_checkpoint": draft_checkpoint}
    done = write(ExportOptions(run, out, dtype, checkpoint, licence, results, note, names, draft_bias, check=not no_check))
    for name, size in done.sizes.items():
        print(f"  {name}: {size / 1e6:.2f} MB")
    total = sum(done.sizes.values()) / 1e6
    print(f"{out}: {total:.2f} MB, {dtype}")
    if done.comparison:
        print(f"largest difference of a token's loss from the original: {done.comparison.difference:.3g} nats (mean loss "
              f"{done.comparison.mean:.3g}; three seconds of a tone)")
    for flag, given in (("--licence", licence), ("--data-note", note), ("--results", results)):
        if not given:
            print(f"no {flag}: the card says nothing of it")
    if total > max_mb:
        print(f"warning: {total:.2f} MB is over --max-mb {max_mb:g}", file=sys.stderr)
    return 0


def _text(note: str) -> str:
    """The note itself, or what is in the file that it names."""
    try:
        if note and Path(note).is_file():
            return Path(note).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--data-note {note} is not UTF-8 text: {error}") from error
    except OSError:  # a text too long for a file's name
        return note
    return note
