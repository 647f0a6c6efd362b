"""`unislu draft`: copies of manifests with a recogniser's transcript in each row. See docs/drafts.md."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from unislu_llm.errors import UserError


def draft(model: Annotated[str, tyro.conf.arg(metavar="MODEL_OR_CHECKPOINT")],
          manifests: Annotated[list[Path], tyro.conf.arg(metavar="MANIFEST [MANIFEST ...]")], /,
          out: Path, source: Literal["decoder", "ctc"] = "decoder", style: Literal["lower", "as-is"] = "lower",
          language: str = "en", tasks_file: Path | None = None, batch_size: int = 8, threads: int = 0,
          text_rows: Literal["skip", "copy"] = "skip", precision: Literal["fp32", "bf16"] = "fp32") -> int:
    """Write copies of manifests whose rows have a draft: the transcript that a recogniser hears.

    Models with `model.draft manifest` read it beside the speech. It can be stopped and started again. Rows over 30 s,
    and without --text-rows copy those without audio, are copied without a draft.

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
        precision: That the recogniser computes in; bf16 is several times faster on a GPU, and on a CPU made for it.
    """
    if not manifests:
        raise UserError("no manifest is named; give one or more JSON-lines files")
    if batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more, found {batch_size}")
    import torch
    from tabulate import tabulate
    from transformers.utils.logging import disable_progress_bar

    from unislu_llm.analysis.runs import find_run
    from unislu_llm.data.manifest import iter_rows
    from unislu_llm.decoding.draft_files import write_drafts
    from unislu_llm.decoding.drafts import Drafter, is_saved_model, load_recogniser
    from unislu_llm.models import weights
    from unislu_llm.scoring.wer import corpus_wer
    from unislu_llm.tasks import TaskRegistry
    from unislu_llm.training.plan import use_threads

    use_threads(threads)
    disable_progress_bar()  # of the checkpoint's tensors
    registry = TaskRegistry.from_yaml(tasks_file) if tasks_file else TaskRegistry()
    name = str(find_run(model).model) if (Path(model) / "config.yaml").is_file() else model
    recogniser, digest, device = None, "", "cuda" if torch.cuda.is_available() else "cpu"
    if text_rows == "skip" or any(row.utterance is not None and row.utterance.audio is not None
                                  for manifest in manifests for row in iter_rows(manifest, registry)):
        recogniser = load_recogniser(name, source, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        digest = weights.weights_hash(Path(name) if is_saved_model(Path(name)) else weights.resolve(name).path)
    settings = {"weights": digest, "source": source, "style": style, "markers": list(registry.markers),
                **({} if precision == "fp32" else {"precision": precision})}  # fp32 made them before there was a choice
    started = time.perf_counter()
    drafter = Drafter(recogniser, registry, style, batch_size)
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        reports = write_drafts(drafter, settings, manifests, out, registry, language=language, text_rows=text_rows)
    seconds = time.perf_counter() - started
    rows = []
    for report in reports:
        texts, made = [text for text, _ in report.pairs], [made for _, made in report.pairs]
        score = corpus_wer(texts, made, "whisper") if report.pairs else None
        rows.append({"manifest": str(report.copy), "made": report.made, "from before": report.known,
                     "from text": report.copied, "without": report.without,
                     "empty": made.count(""), "WER": f"{score.wer:.1f}" if score else "-"})
    print(tabulate(rows, headers="keys", disable_numparse=True))
    loops = recogniser.loops if recogniser else 0
    print(f"{sum(r.made for r in reports)} drafts in {seconds:.0f} s, {loops} that repeat themselves; WER in percent against the "
          "rows' transcripts, Whisper's normaliser, without drafts from text")
    return 0
