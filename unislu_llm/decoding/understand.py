"""From audio files to transcripts and annotations: the one call for use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from unislu_llm.data.batching import sorted_batches
from unislu_llm.data.collate import SpeechDataset
from unislu_llm.data.targets import Sample
from unislu_llm.decoding.batch import encode_waves
from unislu_llm.decoding.confidence import confidence, score, token_probabilities
from unislu_llm.decoding.drafts import complete_drafts
from unislu_llm.decoding.options import DecodeOptions
from unislu_llm.decoding.rows import prediction_row
from unislu_llm.decoding.shared import Answers, decode_tasks
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.utterance import Utterance


def understand(model: SLUModel, files: Sequence[str | Path], tasks: Sequence[str] = ("ner", "sa"),
               options: DecodeOptions | None = None, *, confidences: bool = False, n_best: int = 1) -> list[dict[str, Any]]:
    """Transcript and annotations of audio files.

    The encoder runs once a file, and the tasks share one transcript (:func:`~unislu_llm.decoding.shared.decode_tasks`).

    Args:
        model: either decoder. files: any soundfile format, up to 30 s each.
        tasks: names of the tasks to answer, each with its control token forced; none gives transcripts alone.
        options: how to decode; `force_task` is set here, and the grammar is on unless it is turned off.
        confidences: say how sure the decoder is; one more pass over each answer.
        n_best: alternatives to give; needs as many beams (`num_beams`).

    Returns:
        For each file `{"file", "text", <task>: outputs, "problems"}`, and

        * `draft`, by a model that reads drafts: the one made for it (:mod:`unislu_llm.decoding.drafts`).
        * `probabilities`, with the grammar: by task with one label an utterance, the probability of each label, given that
          the answer is one of them; they sum to one and the likeliest is the answer. A task with several labels has no
          such distribution (:func:`~unislu_llm.decoding.probabilities.label_probabilities`), one with more than
          64 labels is decoded without.
        * `confidence`, if asked for: see :func:`~unislu_llm.decoding.confidence.confidence`; with beams, `text` and
          `tokens` are of the first task's answer.
        * `alternatives`, with `n_best` above 1: by task (`asr` without tasks) a list, best first as the beams were ranked,
          of `{"text", "outputs", "score", "problems"}`; `score` is the geometric mean of the token probabilities. The
          first is the answer itself; in the others a label is the beam's (one that would come twice is left out).

    Raises:
        UserError: unreadable audio, an unknown task, a model that reads reference transcripts, or more alternatives than beams.
    """
    for name in tasks:
        model.codec.registry[name]  # an unknown task is named before anything is decoded
    base = options or DecodeOptions()
    how = replace(base, force_task=True, grammar=base.grammar is not False)
    if not 1 <= n_best <= how.num_beams:
        raise UserError(f"n_best={n_best} needs num_beams={n_best} or more, found {how.num_beams}" if n_best > 0
                        else f"n_best must be 1 or more, found {n_best}")
    names = list(dict.fromkeys(tasks))
    samples = [Sample(Utterance(str(i), Path(f), "", source=str(f)), None) for i, f in enumerate(files)]
    dataset, collator = SpeechDataset(samples), model.collator()
    results: list[dict[str, Any]] = [{} for _ in files]
    was_training = model.training
    model.eval()
    try:
        for indices in sorted_batches(samples, how.batch_size):
            waves = [dataset[i][1] for i in indices]
            drafts = complete_drafts(model, waves)
            encoded, durations = encode_waves(model, waves, collator, drafts), [len(w) / 16_000 for w in waves]
            answers = decode_tasks(model, encoded, durations, names, how, n_best)
            details = _details(model, encoded, answers) if confidences or n_best > 1 else {}
            for row, i in enumerate(indices):
                draft = {} if drafts[row] is None else {"draft": drafts[row]}
                results[i] = {"file": str(files[i])} | draft | _result(model, answers, row, waves[row], how, details,
                                                                       confidences=confidences, n_best=n_best)
    finally:
        model.train(was_training)
    return results


Details = dict[tuple[str | None, int, int], list[float]]
"""Token probabilities by task, utterance and rank."""


def _details(model: SLUModel, encoded: Any, answers: Answers) -> Details:
    found: Details = {}
    for name, rows in answers.ids.items():
        keys = [(name, row, rank) for row, ranked in enumerate(rows) for rank in range(len(ranked))]
        ids = [rows[row][rank] for _, row, rank in keys]
        found |= dict(zip(keys, token_probabilities(model, encoded, ids, [row for _, row, _ in keys]), strict=True))
    return found


def _result(model: SLUModel, answers: Answers, row: int, wave: Tensor, options: DecodeOptions, details: Details, *,
            confidences: bool, n_best: int) -> dict[str, Any]:
    """What is said of one utterance, its file's name apart."""
    codec = model.codec
    result: dict[str, Any] = {"text": "", "problems": []}
    probabilities: dict[str, dict[str, float]] = {}
    sure: dict[str, Any] = {}
    alternatives: dict[str, list[dict[str, Any]]] = {}
    for name, rows in answers.ids.items():
        sample = Sample(Utterance("", None, "", {}), name)
        found = [prediction_row(codec, sample, ids, len(wave) / 16_000, cut_loops=options.cut_loops and bool(options.grammar))
                 for ids in rows[row]]
        result["text"] = result["text"] or found[0]["hyp_text"]
        result["problems"] += [p for p in found[0]["problems"] if p not in result["problems"]]
        if name:
            result[name] = found[0]["hyp"]
        if name in answers.probabilities:
            values = answers.probabilities[name][row]
            labels = codec.registry[name].labels
            if values is not None:
                probabilities[name] = {label: round(float(p), 6) for label, p in zip(labels, values, strict=True)}
        if confidences:
            sure = confidence(codec, rows[row][0], details[name, row, 0], name) | sure
            if name in probabilities:
                sure[name] = max(probabilities[name].values())
        if n_best > 1:
            alternatives[name or "asr"] = [
                {"text": f["hyp_text"], "outputs": f["hyp"], "problems": f["problems"],
                 "score": round(score(codec, ids, details[name, row, rank], forced=True), 6)}
                for rank, (f, ids) in enumerate(zip(found, rows[row], strict=True))]
    result |= {"probabilities": probabilities} if probabilities else {}
    result |= {"confidence": sure} if confidences else {}
    return result | ({"alternatives": alternatives} if n_best > 1 else {})
