"""How errors of the transcript reach the tasks, and what a model goes by when it answers them.

    python eval/propagate.py adapters/whisper-base--smollm2-135m --hypothesis
    python eval/propagate.py runs/my-run --manifest ner_dev.jsonl sa_dev.jsonl --draws 3

1. Tasks behind the model's own transcript, behind the reference, and behind references with word
   errors, drawn from the model's own confusions: task scores against WER.
2. Repairs: entities whose words are wrong in the transcript and right in the answer.
3. How much of the attention of a task's tokens goes to speech, hypothesis and transcript.
4. Swaps: the speech, or the hypothesis, of another clip put in.

Writes NAME.json, NAME.md and NAME.svg to --out; docs/scoring.md says how to read them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from propagate_attention import attention
from propagate_errors import Confusions, inject, repairs
from propagate_report import draw, markdown, sentences
from propagate_swaps import changes, partners, swapped

from unislu_llm.config import DecodeConfig
from unislu_llm.data.dataset import SpeechDataset
from unislu_llm.data.loading import load_examples
from unislu_llm.data.sampler import sorted_batches
from unislu_llm.decoding.answer import prediction
from unislu_llm.decoding.engine import Engine
from unislu_llm.decoding.hypotheses import with_hypotheses
from unislu_llm.errors import UserError, reported
from unislu_llm.io import (
    MODEL_FILE,
    WEIGHTS_FILE,
    portable,
    read_json,
    sha256,
    write_json,
    write_text,
)
from unislu_llm.models.base import SLUModel
from unislu_llm.models.kv_cache import State
from unislu_llm.run_folder import find_run, load_model, versions
from unislu_llm.scoring.bootstrap import Counts, bootstrap
from unislu_llm.scoring.predictions import Prediction, annotated, check_predictions, spoken_once
from unislu_llm.scoring.score import utterance_counts
from unislu_llm.scoring.text import Protocol
from unislu_llm.setting_types import Precision
from unislu_llm.tasks import SpanTask, Task, TaskRegistry
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

MINI = Path("recipes/data/mini")
Draws = Sequence[Sequence[Prediction]]  # predictions of the same clips, in the same order


@dataclass
class Options:
    """What is measured."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run folder, the folder of a saved model, or a name on the Hugging Face hub."""
    manifest: tuple[Path, ...] = (MINI / "entities_dev.jsonl", MINI / "sentiment_dev.jsonl")
    """Manifests with labels of the model's tasks."""
    rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    """Word errors that are put in, as shares of the reference words."""
    draws: int = 1
    """So many draws of errors for each rate; scores are means over them."""
    hypothesis: bool = False
    """For a model that reads one: beside transcripts alone, change its hypothesis as well."""
    limit: int = 0
    """Take at most so many clips of each manifest, evenly spread; 0 means all."""
    protocol: Protocol = "whisper"
    """By which texts are normalised."""
    seed: int = 0
    """Of the errors."""
    precision: Precision | None = None
    """fp32 or bf16; default: what the run was trained in, fp32 for a model folder."""
    batch_size: int = 0
    """Clips at one time, which changes no answer but by rounding; 0: as the run decodes."""
    threads: int = 0
    """CPU threads; 0 leaves it to torch."""
    out: Path = Path("eval/results/propagate")
    """Folder of the results."""
    label: str = ""
    """Added to the name of the files."""


class ForcedEngine(Engine):
    """Answers tasks behind transcripts `texts`, one for each row of a batch, whatever the model
    itself would write or read."""

    def __init__(self, model: SLUModel, options: DecodeConfig, texts: Sequence[str]) -> None:
        super().__init__(model, options.model_copy(update={"transcript": "verbatim"}))
        self._forced = [model.tokenizer.text_ids(text) for text in texts]

    def _hypotheses(self, state: State) -> list[list[int]]:
        return self._forced


def decode(model: SLUModel, clips: Sequence[Utterance], options: DecodeConfig,
           texts: Sequence[str] | None = None, *, spans_only: bool = False) -> list[Prediction]:
    """Predictions of all annotated tasks of clips, behind the model's own transcripts or `texts`.

    With `spans_only`, of tasks with spans, and of clips that have one. The order is that of the
    clips. Raises UserError: unreadable audio, or a text that does not fit.
    """
    registry, rows = model.registry, list[dict[str, Any]]()
    names = [[t.name for t in registry if t.name in u.labels
              and (isinstance(t, SpanTask) or not spans_only)] for u in clips]
    left = [i for i, some in enumerate(names) if some]
    # Examples without a task: labels take no part in decoding.
    blanks, collator = [Example(clips[i], None) for i in left], model.collator()
    dataset = SpeechDataset(blanks, listens=model.listens)
    found: dict[int, Any] = {}
    for batch in sorted_batches(blanks, options.batch_size):
        some = [left[b] for b in batch]
        engine = (Engine(model, options) if texts is None else
                  ForcedEngine(model, options, [texts[i] for i in some]))
        answers = engine.answer(collator([dataset[b, 0] for b in batch]), [names[i] for i in some])
        found |= zip(some, answers, strict=True)
    for i in left:
        language = {"language": clips[i].language or model.config.language}
        rows += [prediction(Example(clips[i], name), found[i], registry) | language
                 for name in names[i]]
    return check_predictions(rows, registry)


def scores(draws: Draws, model: SLUModel, protocol: Protocol) -> dict[str, dict[str, float]]:
    """WER and task scores with 95 % intervals; of several draws of errors the mean."""
    counts = [utterance_counts(p, model.registry, protocol) for p in draws]
    wanted = {name: name.replace("/macro_f1", "_f1").replace("/", "_") for name in counts[0]
              if name in ("wer", "cer") or name.endswith(("/f1", "/label_f1", "/macro_f1"))}
    return {short: spanned([c[name] for c in counts]) for name, short in wanted.items()}


def label_of(rate: float) -> str:
    """What transcripts with errors are called."""
    return f"errors {100 * rate:g} %"


def spanned(counts: Sequence[Counts]) -> dict[str, float]:
    """Value and 95 % interval, to two digits."""
    found = bootstrap(counts)
    return {key: round(found[key], 2) for key in ("value", "low", "high")}


def repair(draws: Draws, task: Task, protocol: Protocol) -> dict[str, Any] | None:
    """Repairs of entities with wrong words, means over draws; None where nothing is annotated:
    `wrong` and `repaired` ones, the `rate` in percent, and how many percent of the others are right
    (`kept`)."""
    counts = [repairs(known, protocol) for p in draws if (known := annotated(p, task))]
    if not counts:
        return None
    wrong, repaired, there, found = sum(c.matrix.sum(0) for c in counts) / len(draws)
    return {"task": task.name, "wrong": round(float(wrong), 1),
            "repaired": round(float(repaired), 1), "rate": spanned(counts),
            "kept": round(100.0 * float(found / max(there, 1)), 2)}


@dataclass
class Bench:
    """A model, its clips, and what is measured of them."""

    model: SLUModel
    clips: list[Utterance]
    options: Options
    how: DecodeConfig
    others: list[int]  # for each clip, the one that it is swapped with
    own: list[Prediction] = field(default_factory=list)

    def texts(self) -> list[str]:
        """The model's own transcripts."""
        said = {p.utterance: p.hyp_text for p in spoken_once(self.own, self.model.registry)}
        return [said[u.corpus, u.id] for u in self.clips]

    def curve(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
        """Rows of the curve, of the repairs, and what the errors were drawn from."""
        self.own = decode(self.model, self.clips, self.how)
        spoken = spoken_once(self.own, self.model.registry)
        confusions = Confusions.of(spoken, self.options.protocol)
        references = [u.text for u in self.clips]
        made = [inject(references, self.options.rates, confusions, self.options.protocol,
                       [u.language or self.model.config.language for u in self.clips],
                       self.options.seed + k)
                for k in range(self.options.draws)]
        cases: list[tuple[str, list[list[str]]]] = [("reference", [references])]
        cases += [(label_of(rate), [draw[n].texts for draw in made])
                  for n, rate in enumerate(sorted(self.options.rates))]
        rows = [{"transcript": "own", "changed": "nothing",
                 **scores([self.own], self.model, self.options.protocol)}]
        found = self.repaired("own", "nothing", self.clips, None, [self.own])
        both = self.options.hypothesis and self.model.reads_hypothesis
        for changed in ("transcript", "transcript and hypothesis")[:1 + both]:
            for name, draws in cases:
                print(f"{name} ({changed})", flush=True)
                inputs = [self.clips if changed == "transcript" else
                          [replace(u, hypothesis=text) for u, text in
                           zip(self.clips, texts, strict=True)] for texts in draws]
                done = [decode(self.model, clips, self.how, texts)
                        for clips, texts in zip(inputs, draws, strict=True)]
                rows.append({"transcript": name, "changed": changed,
                             **scores(done, self.model, self.options.protocol)})
                found += self.repaired(name, changed, inputs[0], draws[0], done)
        about = {"errors_of_the_model": confusions.kinds(), "words": made[0][0].words,
                 "confused_pairs": sum(map(len, confusions.pairs.values())),
                 "injected": [{"rate": rate, "errors": made[0][n].errors,
                               "sources": made[0][n].sources}
                              for n, rate in enumerate(sorted(self.options.rates))]}
        return rows, found, about

    def repaired(self, name: str, changed: str, clips: Sequence[Utterance],
                 texts: Sequence[str] | None, done: Draws) -> list[dict[str, Any]]:
        """Rows of repairs; with phrases grounded as well behind the model's own transcripts, and
        behind the first draw of the most errors."""
        tasks = [t for t in self.model.registry if isinstance(t, SpanTask)]
        if name == "reference" or not any(t.name in u.labels for t in tasks for u in clips):
            return []
        cases = {"free": done}
        if name in ("own", label_of(max(self.options.rates))):
            how = self.how.model_copy(update={"grounded": True})
            cases["grounded"] = [decode(self.model, clips, how, texts, spans_only=True)]
        return [{"transcript": name, "changed": changed, "phrases": phrases, **found}
                for task in tasks for phrases, draws in cases.items()
                if (found := repair(draws, task, self.options.protocol))]

    def swaps(self) -> list[dict[str, Any]]:
        """What changes with the speech, or the hypothesis, of another clip."""
        rows, model = list[dict[str, Any]](), self.model
        way = self.how.transcript or model.config.transcript
        for what, there in (("speech", model.listens), ("hypothesis", model.reads_hypothesis)):
            # A transcript that is the hypothesis, word for word, does not hear of other speech.
            free = not (what == "speech" and model.reads_hypothesis and way == "verbatim")
            for kept in (False, True)[not free:] if there else ():
                print(f"swap of {what}, transcript {'kept' if kept else 'anew'}", flush=True)
                done = decode(model, swapped(self.clips, self.others, what), self.how,
                              self.texts() if kept else None)
                rows.append({"swapped": what, "transcript": "kept" if kept else "anew",
                             **changes(self.own, done, model.registry),
                             **scores([done], model, self.options.protocol)})
        return rows


def measure(model: SLUModel, clips: Sequence[Utterance], options: Options,
            how: DecodeConfig) -> dict[str, Any]:
    """All of it, as plain data."""
    # Before anything is decoded: a clip that is alone should not cost minutes.
    others = partners(clips)
    bench = Bench(model, with_hypotheses(model, clips), options, how, others)
    rows, repaired, confusions = bench.curve()
    examples = [Example(u, t) for u in bench.clips for t in model.registry.names if t in u.labels]
    print("attention", flush=True)
    return {"curve": rows, "repairs": repaired, "confusions": confusions,
            "attention": attention(model, examples), "swaps": bench.swaps()}


def load_clips(options: Options, registry: TaskRegistry, language: str) -> list[Utterance]:
    """Clips that are annotated for a task; raises UserError: there is none."""
    examples = load_examples(list(map(str, options.manifest)), registry, limit=options.limit,
                             flag="manifest", scored=True, language=language)
    clips = list({id(e.utterance): e.utterance for e in examples if e.task}.values())
    if rest := sum(e.task is None for e in examples):
        print(f"{rest} rows without a label of {', '.join(registry.names)} are left out")
    if not clips:
        raise UserError(f"--manifest: no row has a label of {', '.join(registry.names)}; give "
                        "manifests with labels of the model's tasks")
    return clips


def main(options: Options) -> None:
    """Measure a model, print and write what was found."""
    if options.draws < 1 or not all(0 < rate < 1 for rate in options.rates):
        raise UserError("--draws must be 1 or more, and --rates shares between 0 and 1, as 0.05")
    if min(options.limit, options.batch_size, options.threads) < 0:
        raise UserError("--limit, --batch-size and --threads must be 0 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    run = find_run(options.model)
    description = read_json(run.model / MODEL_FILE)
    clips = load_clips(options, run.registry(), description["model"]["language"])
    own = run.config.decode if run.config else DecodeConfig()
    # Tasks are asked for by name, in answers that parse: all differences are of what is written.
    how = own.model_copy(update={"grammar": True, "force_task": True, "temperature": 0.0,
                                 "num_beams": 1, "grounded": False,
                                 "batch_size": options.batch_size or own.batch_size})
    precision = options.precision or (run.config.train.precision if run.config else "fp32")
    model = load_model(run, precision)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        found = measure(model, clips, options, how)
    result: dict[str, Any] = {
        "model": portable(run.model), "checkpoint": run.checkpoint, "step": run.step(),
        "weights_sha256": sha256(run.model / WEIGHTS_FILE), "kind": model.kind,
        "listens": model.listens, "reads_hypothesis": model.reads_hypothesis,
        "transcripts": how.transcript or model.config.transcript, "protocol": options.protocol,
        "manifests": [{"file": portable(p), "sha256": sha256(p)} for p in options.manifest],
        "clips": {t: sum(t in u.labels for u in clips) for t in model.registry.names},
        "draws": options.draws, "seed": options.seed, "decode": how.model_dump(),
        "precision": precision, **found, "command": command(sys.argv[1:]),
        "versions": {k: v for k, v in versions().items() if k != "command"}}
    result["in_words"] = sentences(result)
    write(result, options.out, "-".join(filter(None, [run.label, options.label])))


def command(words: Sequence[str]) -> str:
    """The command line, without paths of this machine."""
    return " ".join(["python eval/propagate.py", *(portable(w) if Path(w).exists() else w
                                                   for w in words)])


def write(result: Mapping[str, Any], out: Path, name: str) -> None:
    """Write the three files, and print the summary."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", result)
    text = markdown(result, name)
    write_text(out / f"{name}.md", text)
    write_text(out / f"{name}.svg", draw(result))
    print(text)


if __name__ == "__main__":
    with reported():
        main(tyro.cli(Options, description=str(__doc__)))
