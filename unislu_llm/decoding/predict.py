"""Answers to whole lists: of annotated examples beside their references, or of any speech."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import torch
from torch import Tensor
from tqdm import tqdm

from unislu_llm.config import DecodeConfig
from unislu_llm.data.audio import MAX_SECONDS
from unislu_llm.data.dataset import SpeechDataset
from unislu_llm.data.sampler import sorted_batches
from unislu_llm.decoding import hypotheses
from unislu_llm.decoding.answer import Answer, prediction
from unislu_llm.decoding.engine import Engine
from unislu_llm.decoding.inputs import One, utterances_of
from unislu_llm.decoding.long_form import join, windows
from unislu_llm.decoding.no_speech import Evidence, judge, silent
from unislu_llm.decoding.phrases import Phrases
from unislu_llm.errors import UserError
from unislu_llm.models.base import SLUModel
from unislu_llm.scoring.text import language_code
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

Predictions = list[dict[str, Any]]


def predict(model: SLUModel, examples: Sequence[Example], options: DecodeConfig | None = None, *,
            progress: str = "",
            on_predictions: Callable[[Predictions], None] = lambda _: None) -> Predictions:
    """Decode examples and lay each answer beside its reference
    (:func:`~unislu_llm.decoding.answer.prediction`).

    Examples of one utterance are decoded together: it is encoded and transcribed once. Where a
    model reads hypotheses, those that are lacking are made first. What :func:`understand` would
    take for no speech is answered like all else, and marked.

    Args:
        model: either decoder.
        examples: in any order.
        options: how to decode.
        progress: label of a progress bar; empty shows none.
        on_predictions: called with those of every batch.

    Raises:
        UserError: unreadable audio; the message names manifest line and file.
    """
    options = options or DecodeConfig()
    engine = Engine(model, options, Phrases.of(options.phrases, options.phrase_boost))
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, example in enumerate(examples):
        # The transcript alone is a request of its own: it ends where others have [T/L].
        groups.setdefault((id(example.utterance), example.task is None), []).append(i)
    members = list(groups.values())
    utterances = hypotheses.with_hypotheses(
        model, [examples[some[0]].utterance for some in members], phrases=engine.phrases,
        progress=progress and f"{progress}: hypotheses", num_beams=engine.options.num_beams)
    tasks = [[task for i in some if (task := examples[i].task) is not None] for some in members]
    predictions: Predictions = [{} for _ in examples]
    for indices, answers in _batches(engine, utterances, tasks, progress=progress):
        done = [(i, answer) for g, answer in zip(indices, answers, strict=True) for i in members[g]]
        for i, answer in done:
            language = examples[i].utterance.language or model.config.language
            predictions[i] = prediction(examples[i], answer, model.registry) | {
                "language": language}  # which scoring goes by
        on_predictions([predictions[i] for i, _ in done])
    return predictions


@overload
def understand(model: SLUModel, inputs: One, *rest: Any, **how: Any) -> Answer: ...
@overload
def understand(model: SLUModel, inputs: Iterable[One], *rest: Any, **how: Any) -> list[Answer]: ...
def understand(model: SLUModel, inputs: One | Iterable[One],
               tasks: str | Sequence[str] | None = None, options: DecodeConfig | None = None, *,
               n_best: int = 1, long_form: bool = True, language: str | None = None,
               phrases: Iterable[str] | None = None, recogniser: str = "") -> Any:
    """Transcript and annotations of speech: an answer for one input, a list for several.

    Args:
        model: either decoder.
        inputs: a path, the content of an audio file or the open file, `(array, rate)`, or several
            of them (:data:`~unislu_llm.decoding.inputs.One`); :func:`stream` takes no end of them.
        tasks: default: all of the model's; none gives transcripts alone.
        options: how to decode; the grammar and forced tasks are on unless they are turned off.
        n_best: answers to each task; needs as many beams.
        long_form: cut what is over 30 s at pauses into windows, and join their answers; False
            refuses it.
        language: Whisper language code for the model's recogniser; default: the model's own.
        phrases: names and terms that are raised; default: those of the file `options.phrases`.
        recogniser: what makes hypotheses in place of the model's own
            (:func:`~unislu_llm.decoding.hypotheses.load_recogniser`).

    Raises:
        UserError: unreadable or unusable audio, audio over 30 s without `long_form`, an unknown
            task, a language where no recogniser is told one, a model that reads reference
            transcripts, more answers than beams, or what is no phrase.
    """
    options = options or DecodeConfig()
    # What the caller set on purpose stays, also where it equals a default.
    usual = {name: True for name in ("grammar", "force_task")
             if name not in options.model_fields_set}
    listed = Phrases.of(options.phrases if phrases is None else phrases, options.phrase_boost)
    engine = Engine(model, options.model_copy(update=usual), listed)
    names = [tasks] if isinstance(tasks, str) else list(
        model.registry.names if tasks is None else tasks)
    for name in names:
        model.registry[name]  # an unknown task is named before anything is read
    if recogniser and not model.reads_hypothesis:
        raise UserError(f"recogniser '{recogniser}': this model reads no hypothesis; leave it out")
    if language and not recogniser and (
            not model.reads_hypothesis or model.config.recogniser == "ctc"):
        raise UserError(f"language '{language}': no recogniser makes hypotheses for this model, to "
                        "which it could be told; leave it out")
    own = language and getattr(hypotheses.recogniser_of(model, None, recogniser), "language", "")
    if language and own not in ("", language_code(language)):
        raise UserError(f"language '{language}': what makes hypotheses for this model was trained "
                        f"on '{own}'; leave it out, or name a Whisper as recogniser")
    given, one = utterances_of(inputs, language)
    whole = list(given)
    if not long_form and (long := next((u for u in whole if u.seconds > MAX_SECONDS), None)):
        raise UserError(f"{long.audio}: {long.seconds:.2f} s is longer than {MAX_SECONDS:g} s; "
                        "leave out long_form=False, or cut it")
    # Frozen weights may be in half precision, in which what was trained beside them is not.
    half = any(p.dtype == torch.bfloat16 for p in model.parameters())
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
        answers = _understand(engine, whole, names, n_best, long_form, recogniser)
    return answers[0] if one else answers


def stream(model: SLUModel, inputs: One | Iterable[One], tasks: str | Sequence[str] | None = None,
           options: DecodeConfig | None = None, **how: Any) -> Iterator[Answer]:
    """Answers of :func:`understand`, in order, as they come: `options.batch_size` inputs are taken
    when they are asked for. One that cannot be read ends it, behind the batches before it."""
    each, _ = utterances_of(inputs, how.get("language"))
    while some := list(islice(each, (options or DecodeConfig()).batch_size)):
        yield from understand(model, some, tasks, options, **how)


def _understand(engine: Engine, whole: Sequence[Utterance], tasks: Sequence[str], n_best: int,
                long_form: bool, recogniser: str) -> list[Answer]:
    parts = [windows(u) if long_form else [u] for u in whole]
    every = hypotheses.with_hypotheses(
        engine.model, [u for p in parts for u in p], phrases=engine.phrases, recogniser=recogniser,
        num_beams=engine.options.num_beams)
    found: dict[int, Answer] = {}
    for indices, done in _batches(engine, every, [tasks] * len(every), n_best=n_best):
        found |= zip(indices, (a.refused(engine.model.registry) if a.no_speech else a
                               for a in done), strict=True)
    ordered = iter(sorted(found.items()))
    answers = [[next(ordered)[1] for _ in some] for some in parts]
    return [join(engine.model.registry, some, its) if len(some) > 1 else its[0]
            for some, its in zip(parts, answers, strict=True)]


def _batches(engine: Engine, utterances: Sequence[Utterance], tasks: Sequence[Sequence[str]], *,
             n_best: int = 1, progress: str = "") -> Iterator[tuple[list[int], list[Answer]]]:
    """Answers to all utterances, in batches of similar length, with their indices."""
    # Examples without a task: labels take no part, and need not be there.
    blanks, collator = [Example(u, None) for u in utterances], engine.model.collator()
    dataset = SpeechDataset(blanks, listens=engine.model.listens)
    batches = sorted_batches(blanks, engine.options.batch_size)
    for indices in tqdm(batches, desc=progress, disable=not progress, unit="batch", leave=False):
        items = [dataset[i, 0] for i in indices]
        answers = engine.answer(collator(items), [tasks[i] for i in indices], n_best=n_best)
        for i, item, answer in zip(indices, items, answers, strict=True):
            # Without a recogniser, that every frame is blank to a `ctc` projector says it.
            blank = (answer.evidence, answer.hypothesis, answer.ctc_hypothesis) == (None, None, "")
            if blank or (isinstance(item.input, Tensor) and silent(item.input)):
                answer.evidence = Evidence(1.0)
            if answer.evidence is not None:
                told = utterances[i].language or engine.model.config.language
                answer.no_speech, answer.warnings = judge(
                    answer.evidence, engine.options.no_speech, told)
        yield indices, answers
