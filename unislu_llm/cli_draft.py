"""`unislu draft`: copies of manifests with a recogniser's transcript in each row. See docs/drafts.md."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from unislu_llm.errors import UserError

if TYPE_CHECKING:
    from unislu_llm.decoding.draft_files import Report
    from unislu_llm.decoding.fill_text import FillReport


def draft(model: Annotated[str, tyro.conf.arg(metavar="MODEL_OR_CHECKPOINT")],
          manifests: Annotated[list[Path], tyro.conf.arg(metavar="MANIFEST [MANIFEST ...]")], /,
          out: Path, source: Literal["decoder", "ctc"] = "decoder", style: Literal["lower", "as-is"] = "lower",
          language: str = "en", tasks_file: Path | None = None, batch_size: int = 8, threads: int = 0,
          text_rows: Literal["skip", "copy"] = "skip", fill_text: bool = False,
          precision: Literal["fp32", "bf16"] = "fp32") -> int:
    """Write copies of manifests whose rows have a draft: the transcript that a recogniser hears.

    Models with `model.draft manifest` read it beside the speech. It can be stopped and started again. Rows over 30 s,
    and without --text-rows copy those without audio, are copied without a draft. With --fill-text, rows without a transcript get
    what is heard as one, and no row gets a draft.

    Args:
        model: Whisper checkpoint (name or folder), or run folder or folder of a saved model.
        manifests: JSON-lines files.
        out: Folder of the copies; it remembers drafts for the next call.
        source: Of a saved model: its decoder's transcript, or the greedy text of its ctc projector.
        style: lower writes drafts in lower case; as-is leaves them as they were heard.
        language: Whisper language code of rows that name none.
        tasks_file: YAML list of tasks; default: named entities and sentiment.
        batch_size: Clips at one time.
        threads: CPU threads; 0 takes all cores this process may use.
        text_rows: Of rows without audio: skip leaves them as they are; copy makes their own transcript their draft, if they have
            none, to be spoilt in training (train.text_draft_word_dropout).
        fill_text: Rows with audio that lack `text` get the transcript as `text`, and `text_source` names its recogniser; rows
            with a transcript stay. Rows in which nothing is heard, that repeat themselves or are over 30 s are left out.
        precision: That the recogniser computes in; bf16 is several times faster on a GPU, and on a CPU made for it.
    """
    if not manifests:
        raise UserError("no manifest is named; give one or more JSON-lines files")
    if batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more, found {batch_size}")
    if fill_text and text_rows == "copy":
        raise UserError("--fill-text writes transcripts and --text-rows drafts; call it twice, the second time on the copies")
    import torch
    from transformers.utils.logging import disable_progress_bar

    from unislu_llm.analysis.runs import find_run
    from unislu_llm.data.manifest import iter_rows
    from unislu_llm.decoding import fill_text as filling
    from unislu_llm.decoding.draft_files import write_drafts
    from unislu_llm.decoding.drafts import Drafter, is_saved_model, load_recogniser
    from unislu_llm.models import weights
    from unislu_llm.tasks import TaskRegistry
    from unislu_llm.training.plan import use_threads

    use_threads(threads)
    disable_progress_bar()  # of the checkpoint's tensors
    registry = TaskRegistry.from_yaml(tasks_file) if tasks_file else TaskRegistry()
    name = str(find_run(model).model) if (Path(model) / "config.yaml").is_file() else model
    recogniser, digest, device = None, "", "cuda" if torch.cuda.is_available() else "cpu"
    rows = (row for manifest in manifests for row in iter_rows(manifest, registry, without_text=fill_text))
    if any(map(filling.lacks_text, rows)) if fill_text else text_rows == "skip" or any(
            row.utterance is not None and row.utterance.audio is not None for row in rows):
        recogniser = load_recogniser(name, source, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        digest = weights.weights_hash(Path(name) if is_saved_model(Path(name)) else weights.resolve(name).path)
    settings = {"weights": digest, "source": source, "style": style, "markers": list(registry.markers),
                **({} if precision == "fp32" else {"precision": precision})}  # fp32 made them before there was a choice
    started = time.perf_counter()
    drafter = Drafter(recogniser, registry, style, batch_size)
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        if fill_text:
            _print_filled(filling.fill_text(drafter, settings, manifests, out, registry, _source_name(model), language=language))
            return 0
        reports = write_drafts(drafter, settings, manifests, out, registry, language=language, text_rows=text_rows)
    _print_drafts(reports, time.perf_counter() - started, drafter.loops)
    return 0


def _source_name(model: str) -> str:
    """A recogniser as `text_source` names it: a checkpoint by its name, a folder by its last part."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _print_drafts(reports: list[Report], seconds: float, loops: int) -> None:
    from tabulate import tabulate

    from unislu_llm.scoring.wer import corpus_wer

    rows = []
    for report in reports:
        texts, made = [text for text, _ in report.pairs], [made for _, made in report.pairs]
        score = corpus_wer(texts, made, "whisper") if report.pairs else None
        rows.append({"manifest": str(report.copy), "made": report.made, "from before": report.known,
                     "from text": report.copied, "without": report.without,
                     "empty": made.count(""), "WER": f"{score.wer:.1f}" if score else "-"})
    print(tabulate(rows, headers="keys", disable_numparse=True))
    print(f"{sum(r.made for r in reports)} drafts in {seconds:.0f} s, {loops} that repeat themselves; WER in percent against the "
          "rows' transcripts, Whisper's normaliser, without drafts from text")


def _print_filled(reports: list[FillReport]) -> None:
    from tabulate import tabulate

    print(tabulate([{"manifest": str(r.copy), "rows": r.tally.read, "with text": r.given, "filled": r.filled, "heard now": r.made,
                     "left out": r.tally.dropped.total()} for r in reports], headers="keys", disable_numparse=True))
    for r in reports:
        told = [(n, "rows" if n > 1 else "row", f"left out ({why})", why) for why, n in r.tally.dropped.items()]
        told += [(n, "filled rows" if n > 1 else "filled row", f"without '{task}': a phrase is not in what was heard", task)
                 for task, n in r.tally.notes.items()]
        for n, what, why, key in told:
            places = r.tally.named[key]
            more = f", and {n - len(places)} more" if n > len(places) else ""
            print(f"{n} {what} {why}: {', '.join(places)}{more}")
