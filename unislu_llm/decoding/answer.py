"""What is said of one utterance, from decoded token ids: outputs, problems, confidences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from unislu_llm.decoding.loops import loop_start
from unislu_llm.decoding.no_speech import Evidence
from unislu_llm.decoding.search import Decoded
from unislu_llm.decoding.vocabulary import vocabulary_of
from unislu_llm.tasks import ASR, SEPARATOR, LabelTask, SpanTask, TaskRegistry
from unislu_llm.tokenizer import Example, UnifiedTokenizer
from unislu_llm.unified import Output, Parsed, parse, reference_output


@dataclass
class Answer:
    """What an utterance says; dictionaries are by task.

    Where no task was asked for, `asr` stands for the transcript alone; it has no outputs.
    """

    transcript: str
    seconds: float  # of audio
    # `(label, phrase)` pairs, labels, or one label; None where none is usable.
    outputs: dict[str, Output | None] = field(default_factory=dict)
    problems: dict[str, tuple[str, ...]] = field(default_factory=dict)  # kinds of unified.PROBLEMS
    raw: dict[str, str] = field(default_factory=dict)  # the unified string
    n_tokens: dict[str, int] = field(default_factory=dict)  # with the end of text
    # Of each label, given that the answer is one of them, where a task with one label was answered
    # by scoring all labels (grammar and `force_task`).
    probabilities: dict[str, dict[str, float]] = field(default_factory=dict)
    # What the decoder gives to what it wrote, before grammar and bias: what the grammar forced can
    # be unlikely. `text`: geometric mean over the transcript and the token that ends it; `tokens`:
    # `[characters, probability]` of each; of a task, the product from opening to closing marker of
    # its one label, or of each output in a list.
    confidence: dict[str, Any] = field(default_factory=dict)
    hypothesis: str | None = None  # that the model read
    ctc_hypothesis: str | None = None  # greedy text of the model's `ctc` projector
    evidence: Evidence | None = None  # of speech and language, where there is any
    # Nothing was said: transcript and outputs are empty (in evaluation, what was decoded).
    no_speech: bool = False
    warnings: tuple[str, ...] = ()  # sentences: why the answer may be worth nothing
    # With several answers asked for, the best first: of each `text`, `outputs`, `problems` and
    # `score`, the geometric mean of its token probabilities.
    alternatives: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    # Of a long recording, see :func:`unislu_llm.decoding.long_form.join`; of a window `start` and
    # `end` in seconds, `text_start` and `text_end` in the transcript, and what is said in it.
    spans: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    windows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `text`, an entry a task, `problems` (each once), and what else there is."""
        problems = dict.fromkeys(p for some in self.problems.values() for p in some)
        more = ("no_speech", "warnings", "hypothesis", "ctc_hypothesis", "probabilities",
                "confidence", "alternatives", "spans", "windows")
        # An empty hypothesis is one: nothing was recognised.
        return _plain({"text": self.transcript, **self.outputs, "problems": list(problems)}
                      | {n: v for n in more if (v := getattr(self, n)) or v == ""}
                      | ({"evidence": self.evidence._asdict()} if self.evidence else {}))

    def refused(self, registry: TaskRegistry) -> Answer:
        """The answer to what holds no speech: nothing was said."""
        return replace(
            self, transcript="", no_speech=True, problems=dict.fromkeys(self.problems, ()),
            outputs={n: () if getattr(registry[n], "multi", True) else None for n in self.outputs},
            raw={}, probabilities={}, confidence={}, alternatives={})


def fill(answer: Answer, tokenizer: UnifiedTokenizer, ranked: Mapping[str, Sequence[Decoded]],
         probabilities: Mapping[str, Tensor], *, forced: bool, cut_loops: bool,
         several: bool) -> Answer:
    """Write into an answer what decoded token ids say.

    Args:
        answer: without transcript and outputs.
        tokenizer: of the model.
        ranked: by task, best first.
        probabilities: `(labels,)` of each task that has them.
        forced: control tokens were: they say nothing of a score.
        cut_loops: loops were cut while decoding: they are problems.
        several: give alternatives.
    """
    controls = {tokenizer.marker_ids[task.marker] for task in tokenizer.registry} if forced else ()
    for name, answers in ranked.items():
        read = [_read(tokenizer, decoded, name, cut_loops) for decoded in answers]
        answer.transcript = answer.transcript or read[0].transcript
        if name != ASR:
            answer.outputs[name] = read[0].outputs
        answer.problems[name] = read[0].problems
        answer.raw[name] = tokenizer.decode(answers[0].ids)
        answer.n_tokens[name] = len(answers[0].ids)
        sure = _confidence(tokenizer, answers[0], name)
        if name in probabilities:
            values = [round(value, 6) for value in probabilities[name].tolist()]
            labels = tokenizer.registry[name].labels
            answer.probabilities[name] = dict(zip(labels, values, strict=True))
            sure[name] = max(values)
        # All tasks have a transcript; `text` and `tokens` stay those of the first one's.
        answer.confidence = sure | answer.confidence
        if several:
            answer.alternatives[name] = [
                {"text": parsed.transcript, "outputs": parsed.outputs, "problems": parsed.problems,
                 "score": _geometric([p for i, p in zip(decoded.ids, decoded.log_probs, strict=True)
                                      if i not in controls and not math.isnan(p)])}
                for parsed, decoded in zip(read, answers, strict=True)]
    # Of a decoder that reads no hypothesis, the evidence is its own, and so are the words.
    if answer.hypothesis is None and answer.evidence and "text" in answer.confidence:
        sure = max(answer.confidence["text"], 1e-9)
        answer.evidence = answer.evidence.of_words(math.log(sure), answer.transcript)
    return answer


def prediction(example: Example, answer: Answer, registry: TaskRegistry) -> dict[str, Any]:
    """An answer to an example's task beside its reference, as plain data: what scoring reads."""
    u, name = example.utterance, example.task or ASR
    raw = answer.raw[name]
    reference: Any = None
    if name in u.labels:
        reference = reference_output(u, registry[name])
        if isinstance(registry[name], SpanTask):  # with their offsets, from left to right
            spans: list[Any] = sorted(u.labels[name], key=lambda span: span[1:])
            reference = [[label, u.text[a:b], a, b] for label, a, b in spans]
    found = {"id": u.id, "corpus": u.corpus, "task": name, "duration": round(answer.seconds, 3),
             "ref_text": u.text, "ref": reference,
             "hyp_text": parse(raw, registry).transcript, "hyp": answer.outputs.get(name),
             "raw": raw, "problems": answer.problems[name], "n_tokens": answer.n_tokens[name]}
    more = {"probabilities": answer.probabilities.get(name), "hypothesis": answer.hypothesis,
            "ctc_hypothesis": answer.ctc_hypothesis, "no_speech": answer.no_speech or None}
    return _plain(found | {key: value for key, value in more.items() if value is not None})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _read(tokenizer: UnifiedTokenizer, decoded: Decoded, name: str, cut_loops: bool) -> Parsed:
    """Parse an answer, with outputs for the task that was asked for alone."""
    parsed = parse(tokenizer.decode(decoded.ids), tokenizer.registry, name)
    problems = list(parsed.problems)
    if decoded.ids[-1:] != [tokenizer.eos_id]:
        problems.append("no_end")
    if cut_loops and loop_start(decoded.ids) is not None:
        problems.append("loop")
    return replace(parsed, outputs=parsed.outputs if parsed.task == name else None,
                   problems=tuple(problems))


def _confidence(tokenizer: UnifiedTokenizer, decoded: Decoded, name: str) -> dict[str, Any]:
    ids, known = decoded.ids, decoded.log_probs
    # The token that ends a transcript counts as part of it: ending too early is an error too.
    ends = {tokenizer.eos_id, tokenizer.marker_ids[SEPARATOR]}
    cut = next((n for n, i in enumerate(ids) if i in ends), len(ids))
    texts = vocabulary_of(tokenizer).texts
    found: dict[str, Any] = {}
    if not any(map(math.isnan, known[:cut + 1])):  # as those of a hypothesis kept word for word
        found = {"text": _geometric(known[:cut + 1]),
                 "tokens": [[texts[i] if i < len(texts) else "", round(math.exp(p), 6)]
                            for i, p in zip(ids[:cut], known, strict=False)]}
    if name == ASR:
        return found
    task = tokenizer.registry[name]
    closing = {tokenizer.marker_ids[a]: tokenizer.marker_ids[b] for a, b in task.pairs.items()}
    outputs: list[float] = []
    start, wanted = -1, -1
    # From an opening marker to its closing one, behind the control token. Without the grammar
    # anything may stand there: what is not closed is no output, and has no confidence.
    for n, i in enumerate(ids[cut + 2:], cut + 2):
        if wanted < 0 and i in closing:
            start, wanted = n, closing[i]
        elif i == wanted:
            outputs.append(round(math.exp(sum(known[start:n + 1])), 6))
            wanted = -1
    one = isinstance(task, LabelTask) and not task.multi
    return found | {name: (outputs[0] if outputs else None) if one else outputs}


def _geometric(log_probs: Sequence[float]) -> float:
    """Geometric mean of probabilities; 0 where there is none."""
    return round(math.exp(sum(log_probs) / len(log_probs)), 6) if log_probs else 0.0
