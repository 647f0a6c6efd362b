"""The model card of an exported model: what files say of it, and nothing else. See docs/export.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from tabulate import tabulate

from unislu_llm.analysis.card_data import Origin, TrainedOn, public, public_command, public_settings, sources, trained_on
from unislu_llm.analysis.runs import Run, checkpoint_step, training_versions
from unislu_llm.errors import UserError
from unislu_llm.models import wheels
from unislu_llm.tasks import LabelTask
from unislu_llm.training import state
from unislu_llm.training.config import Config

CARD = "README.md"


@dataclass(frozen=True)
class Result:
    """A score file. `exported`: it is of the exported weights, not of those in the run."""

    values: Mapping[str, Any]
    exported: bool


@dataclass(frozen=True)
class Facts:
    """What the card is made from.

    Args:
        run: that was trained. config: `config.json` of the export. out: its folder. dtype: of its weights.
        parameters: stored. groups: of these by group, where the model was loaded.
        licence, data_note: of the user. results: scores. difference: largest of a token's loss, nats, where it was compared.
    """

    run: Run
    config: Mapping[str, Any]
    out: Path
    dtype: str
    parameters: int
    groups: Mapping[str, int]
    licence: str
    data_note: str
    results: Sequence[Result]
    difference: float | None


def read_results(paths: Sequence[Path], hashes: Mapping[str, bool]) -> list[Result]:
    """Score files of eval/evaluate.py.

    Args:
        hashes: SHA-256 of weights that they may be of, and whether these are the exported ones.

    Raises:
        UserError: no score file, or one of another model.
    """
    found = []
    for path in paths:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            digest = values["weights_sha256"]
            for key in ("scores", "command", "manifests", "samples", "decode"):
                values[key]
            values["scores"]["protocols"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--results {path}: cannot be read as a score file of eval/evaluate.py ({type(error).__name__}: "
                            f"{error})") from error
        if digest not in hashes:
            raise UserError(f"--results {path}: scores of other weights (SHA-256 {str(digest)[:12]}), neither of this checkpoint "
                            "nor of its export; score this one")
        found.append(Result(values, hashes[digest]))
    return found


def model_card(facts: Facts) -> str:
    """The card, YAML front matter and Markdown.

    Raises:
        UserError: the licence is no SPDX identifier, or a training manifest is faulty.
    """
    if facts.licence and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", facts.licence):
        raise UserError(f"--licence '{facts.licence}' is no SPDX identifier; give one such as Apache-2.0 or CC-BY-4.0")
    origin = sources(facts.run)
    data = trained_on(origin, facts.run.registry())
    sections = {
        "What it is": _what(facts), "How to use it": _use(facts), "Training data": _data(facts, origin, data),
        "Training settings": _settings(facts), "Scores": _scores(facts), "Limits": _limits(facts, data),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{_front_matter(facts, data)}---\n\n# {facts.out.name}\n\n{body}\n"


def _bases(facts: Facts) -> dict[str, str]:
    """Base checkpoints by key of the configuration."""
    return {key: str(facts.config[key]) for key in ("encoder", "llm") if facts.config.get(key)}


def _front_matter(facts: Facts, data: Sequence[TrainedOn]) -> str:
    registry = facts.run.registry()
    values: dict[str, Any] = {
        "language": sorted({code for d in data for code in d.languages}) or None, "license": facts.licence.lower() or None,
        "base_model": list(_bases(facts).values()), "datasets": list(dict.fromkeys(d.corpus for d in data if d.corpus)) or None,
        "library_name": "unislu_llm", "pipeline_tag": "automatic-speech-recognition",
        "tags": ["spoken-language-understanding", "speech", *registry.names],
    }
    if facts.config.get("lora"):
        values["base_model_relation"] = "adapter"
    results = [entry for result in facts.results for entry in _index(facts, result)]
    if results:
        values |= {"metrics": list(dict.fromkeys(entry.metric_type for entry in results)), "model_name": facts.out.name,
                   "eval_results": results}
    return str(ModelCardData(**values).to_yaml()) + "\n"


def _index(facts: Facts, result: Result) -> list[EvalResult]:
    names = "+".join(Path(m["file"]).stem for m in result.values["manifests"])
    label_tasks = {t.name for t in facts.run.registry() if isinstance(t, LabelTask)}
    entries = []
    for protocol in result.values["scores"]["protocols"]:
        for title, key, value in figures(result.values["scores"], protocol):
            task = key.partition("/")[0]
            if task in ("malformed", "slue_score"):
                continue
            kind = ("automatic-speech-recognition" if task == "wer" else
                    "audio-classification" if task in label_tasks else "token-classification")
            entries.append(EvalResult(kind, names, names, "wer" if task == "wer" else "f1", round(value, 2),
                                      metric_name=f"{title} ({protocol})"))
    return entries


def figures(scores: Mapping[str, Any], protocol: str) -> list[tuple[str, str, float]]:
    """Title, key (as in :func:`~unislu_llm.scoring.slue.utterance_counts`) and value of a protocol's scores, in percent."""
    block = scores["protocols"][protocol]
    found = [(f"WER {corpus}", f"wer/{corpus}", wer["wer"]) for corpus, wer in block["wer"]["by_corpus"].items()]
    found.append(("WER all", "wer", block["wer"]["overall"]["wer"]))
    for name, task in block["tasks"].items():
        if "entity" in task:
            found += [(f"{name.upper()} F1", f"{name}/f1", task["entity"]["f1"]),
                      (f"{name.upper()} label-F1", f"{name}/label_f1", task["label"]["f1"])]
            if name in scores.get("position", {}):
                found.append((f"{name.upper()} position-F1", f"{name}/position_f1", scores["position"][name]["f1"]))
        else:
            found.append((f"{name.upper()} macro-F1", f"{name}/macro_f1", task["macro_f1"]))
    if block.get("slue_score") is not None:
        found.append(("SLUE score", "slue_score", block["slue_score"]))
    return [*found, ("malformed", "malformed", scores["malformed"]["share"])]


def _what(facts: Facts) -> str:
    config, registry = facts.config, facts.run.registry()
    encoder, llm = config["encoder"], config.get("llm")
    if llm:
        draft = "" if config.get("draft", "none") == "none" else (
            f"; a draft transcript by `{config.get('draft_checkpoint') or encoder}` stands in the prompt")
        heard = f"`{encoder}` -> `{config['projector']}` projector -> `{llm}`" if config.get("use_speech", True) else f"`{llm}`"
        parts = f"{heard}{' with LoRA' if config.get('lora') else ''}{draft}"
    else:
        parts = f"`{encoder}` with its own decoder ({config.get('decoder_mode')})"
    tasks = "\n".join(f"* `{t.name}`: {', '.join(t.labels)}" for t in registry)
    groups = f" ({', '.join(f'{name} {n:,}' for name, n in facts.groups.items())})" if facts.groups else ""
    return (f"Trained weights of unislu_llm (UniSLU, [arXiv 2507.12951](https://arxiv.org/abs/2507.12951)): {parts}. Speech in, "
            "transcript and annotations out, as one sequence. The folder holds what was trained, "
            f"{facts.parameters:,} parameters{groups} in {facts.dtype}; the base models are not in it.\n\nTasks:\n\n{tasks}")


def _use(facts: Facts) -> str:
    folder = public(facts.out)
    tasks = json.dumps(list(facts.run.registry().names))
    return f"""```bash
unislu predict {folder} clip.wav
unislu predict {folder} clip.wav --json
python eval/evaluate.py {folder} --manifest test.jsonl
```

```python
from unislu_llm.decoding.generate import understand
from unislu_llm.models import load

model = load("{folder}")
print(understand(model, ["clip.wav"], tasks={tasks}))
```

Training goes on from it with `--model.init {folder}` and the model settings below; weights become fp32 when they are loaded."""


def _data(facts: Facts, origin: Origin, data: Sequence[TrainedOn]) -> str:
    parts = []
    if data:
        tasks = facts.run.registry().names
        rows = [[d.corpus, d.manifest, *([None] * (len(tasks) + 2) if d.rows is None else
                                         [d.rows, *(d.annotated[t] for t in tasks), d.without_audio])] for d in data]
        headers = ["corpus", "manifest", "rows", *tasks, "without audio"]
        parts.append(tabulate(rows, headers=headers, tablefmt="github", missingval="", disable_numparse=True))
        parts.append("Rows, and how many are annotated for each task, of the manifests the run names; counted at the export.")
    if any(d.rows is None for d in data):
        parts.append("Manifests without numbers were not there to be counted.")
    parts += [f"It starts from the model `{name}`, whose training data is not known here." for name in origin.unknown]
    if facts.data_note:
        parts.append(facts.data_note.strip())
    return "\n\n".join(parts)


def _settings(facts: Facts) -> str:
    run, config = facts.run, facts.run.config
    assert config is not None
    finished, step = state.read_finished(run.folder), checkpoint_step(run)
    versions = training_versions(run)
    stages = [str(s["name"]) for s in config.stages]
    rows: list[tuple[str, Any]] = [
        ("run", run.name), ("checkpoint", f"{run.checkpoint}{'' if step is None else f', step {step}'}"),
        ("stages", ", ".join(stages)), ("seed", config.train.seed),
        ("epochs", "" if stages else config.train.epochs), ("most steps", config.train.max_steps or ""),
        ("steps", finished.get("step")),
        ("minutes of training", f"{finished['train_seconds'] / 60:.1f}" if "train_seconds" in finished else ""),
        ("precision", config.train.precision), ("device", versions.get("device")),
        ("git revision", "" if versions.get("git") == "unknown" else versions.get("git")),
        ("versions", ", ".join(f"{name} {v}" for name, v in versions.get("packages", {}).items())),
        ("command", f"`{public_command(versions['command'])}`" if versions.get("command") else ""),
    ]
    table = tabulate([row for row in rows if row[1] not in ("", None)], headers=["setting", "value"], tablefmt="github",
                     disable_numparse=True)
    return (f"{table}\n\nThe run's `config.yaml` where it differs from the defaults, paths as names:\n\n"
            f"```yaml\n{_config(facts)}```")


def _config(facts: Facts) -> str:
    assert facts.run.config is not None
    changed = _changed(facts.run.config.to_dict(), Config().to_dict())
    for key in ("output", "resume"):
        changed.pop(key, None)
    model = changed.get("model", {})
    model |= {key: facts.config[key] for key in ("encoder", "llm", "draft_checkpoint") if key in model and key in facts.config}
    text: str = yaml.safe_dump(public_settings(changed), sort_keys=False, allow_unicode=True)
    return text


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping) and default:
            if inner := _changed(value, default):
                found[key] = inner
        elif value != default:
            found[key] = value
    return found


def _scores(facts: Facts) -> str:
    if not facts.results:
        return "None are given with this export."
    tables = "\n\n".join(_table(result) for result in facts.results)
    return f"In percent. The rules of both protocols are in docs/scoring.md of unislu_llm.\n\n{tables}"


def _table(result: Result) -> str:
    values = result.values
    protocols = list(values["scores"]["protocols"])
    cells: dict[str, dict[str, str]] = {}
    for protocol in protocols:
        intervals = values.get("intervals", {}).get(protocol, {})
        for title, key, value in figures(values["scores"], protocol):
            span = intervals.get(key)
            cells.setdefault(title, {})[protocol] = f"{value:.2f}" + (
                f" [{span['low']:.2f}, {span['high']:.2f}]" if span else "")
    table = tabulate([[title, *(row.get(p) for p in protocols)] for title, row in cells.items()], headers=["score", *protocols],
                     tablefmt="github", missingval="-", disable_numparse=True)
    names = ", ".join(f"`{Path(m['file']).name}`" for m in values["manifests"])
    samples = ", ".join(f"{n} {task}" for task, n in values["samples"].items())
    limit = f"; at most {values['limit']} of each manifest" if values.get("limit") else ""
    decode = ", ".join(f"{key} {value}" for key, value in values["decode"].items())
    weights = "these weights" if result.exported else "the run's weights, before they were stored in the dtype of this folder"
    facts = {"command": f"`{public_command(values['command'])}`", "data": f"{names}; samples: {samples}{limit}",
             "scored": weights, "decoding": decode, "date": values.get("date"),
             "git revision": values.get("versions", {}).get("git")}
    listed = "\n".join(f"* {key}: {value}" for key, value in facts.items() if value)
    note = "\n\nIn brackets: interval as the score file has it." if values.get("intervals") else ""
    return f"### {values.get('run', names)}\n\n{table}{note}\n\n{listed}"


def _limits(facts: Facts, data: Sequence[TrainedOn]) -> str:
    config = facts.run.config
    assert config is not None
    points = []
    for key, name in _bases(facts).items():
        digest, revision = facts.config.get(f"{key}_hash"), facts.config.get(f"{key}_revision")
        source = wheels.SOURCES.get(name)
        points.append(f"It needs the weights of `{name}`, and was trained on those"
                      f"{f' of revision `{revision}`' if revision else ''}"
                      f"{f' with SHA-256 `{digest}`' if digest else ''}"
                      f"{f' ({source.note})' if source and source.revision == revision else ''}; loading warns of others, "
                      "with which scores differ. "
                      f"{f'Their licence: {source.license}.' if source else 'They have a licence of their own.'}")
    if facts.difference is not None:
        points.append(f"Stored in {facts.dtype}, the loss of a token differs from the run's model by at most "
                      f"{facts.difference:.2g} nats, on three seconds of a tone.")
    points.append(f"Training took clips of up to {config.data.max_seconds:g} s; `unislu predict` takes files over 30 s with "
                  "`--long-audio windows` alone.")
    if languages := sorted({code for d in data for code in d.languages}):
        points.append(f"Languages of the training data: {', '.join(languages)}.")
    points.append("It knows the tasks and labels above and no others.")
    worst = max((r.values["scores"]["malformed"]["share"] for r in facts.results), default=0.0)
    if worst:
        points.append(f"Up to {worst:.1f} % of the scored answers were malformed, as decoded above.")
    if not facts.results:
        points.append("How good it is was not measured for this card.")
    return "\n".join(f"* {point}" for point in points)
