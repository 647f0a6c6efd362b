"""A trained model as a folder to pass on: trained weights in a small dtype, configuration, model card. See docs/export.md."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from unislu_llm.analysis.model_card import CARD, Facts, model_card, read_results
from unislu_llm.analysis.runs import Run, file_hash, find_run, load_model
from unislu_llm.data.targets import Sample
from unislu_llm.data.text_rows import SIMULATION_FILE
from unislu_llm.errors import UserError
from unislu_llm.models.base import WEIGHTS_FILE, SLUModel
from unislu_llm.models.weights import HUB_NAME
from unislu_llm.tasks import LabelTask, Span, TaskRegistry
from unislu_llm.training.state import swap_folder
from unislu_llm.utterance import Utterance

Dtype = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KEPT = ("predictions", "LICENSE", "NOTICE")  # evaluation's, and the user's: they outlive a new export
_WRITTEN = {WEIGHTS_FILE, "config.json", CARD, SIMULATION_FILE, *_KEPT}
_TEXT = "the council met in paris on monday"
# Absolute paths of any system and the home folder; not `[/NER]`, `and/or`, `https://host/page`.
_MACHINE = re.compile(r"(?<![\w.:/<\[-])/[\w.~-]+/[\w.~-]+|(?<!\w)[A-Za-z]:\\\w|(?<![\w/])~/|file://|(?<![\w.])\.\./")


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and what its card says that no file knows.

    Args:
        run: run folder, or its `best` or `last`. out: folder to write. checkpoint: best or last; None: best, else last.
        dtype: of the stored weights. licence: SPDX identifier. data_note: text on data and licences, for the card.
        results: score files of eval/evaluate.py, of this model before or after the export.
        names: public names of `encoder`, `llm`, `draft_checkpoint` where the run names a folder.
        draft_bias: what decoding with the export adds for the draft's words (nats); None: as the run's model.
        check: load the model and compare.
    """

    run: Path
    out: Path
    dtype: Dtype = "bf16"
    checkpoint: str | None = None
    licence: str = ""
    results: tuple[Path, ...] = ()
    data_note: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    draft_bias: float | None = None
    check: bool = True


@dataclass(frozen=True)
class Comparison:
    """The exported model beside the original, on a tone.

    Args:
        mean: loss of a token of the original, nats. difference: largest of a token, nats. groups: trained parameters by group.
    """

    mean: float
    difference: float
    groups: dict[str, int]


@dataclass(frozen=True)
class Exported:
    """What was written: bytes by file name, and the comparison with the original, where it was made."""

    sizes: dict[str, int]
    comparison: Comparison | None


def export(options: ExportOptions) -> Exported:
    """Write the folder; an earlier export there is replaced when the new one is whole.

    Raises:
        UserError: no such run, `out` holds something else, a base that is a folder of this machine, weights that the dtype does
            not hold, scores of another model, or text that names a folder of this machine.
    """
    run, out = find_run(options.run, options.checkpoint), options.out
    if run.config is None:
        raise UserError(f"{options.run} is a saved model without its run; give the run folder (config.yaml, versions.json), "
                        "which the model card is made from")
    _check_out(out)
    config = public_config(run, options.names)
    if options.draft_bias is not None:
        config["draft_bias"] = options.draft_bias
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)
        state = write_weights(run, temporary, options.dtype)
        _write_json(temporary / "config.json", config)
        if simulation := _simulation(run):
            shutil.copyfile(simulation, temporary / SIMULATION_FILE)
        comparison = compare(run, temporary) if options.check else None
        hashes = {file_hash(run.model / WEIGHTS_FILE): False, file_hash(temporary / WEIGHTS_FILE): True}
        facts = Facts(run, config, out, options.dtype, sum(v.numel() for v in state.values()),
                      comparison.groups if comparison else {}, options.licence, options.data_note,
                      read_results(options.results, hashes), comparison.difference if comparison else None)
        (temporary / CARD).write_text(model_card(facts), encoding="utf-8")
        _refuse_paths(temporary)
        sizes = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
        for name in _KEPT:
            if (out / name).exists():
                (out / name).rename(temporary / name)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        swap_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(sizes, comparison)


def is_export(folder: Path) -> bool:
    """Whether :func:`export` wrote a folder."""
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            return "exported" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _check_out(out: Path) -> None:
    """Refuse to replace what is no export, or holds more than one."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    there = sorted(p.name for p in out.iterdir())
    if there and not is_export(out):
        raise UserError(f"--out {out} is not empty and no export ({', '.join(there[:3])}...); give a new folder")
    if strange := [name for name in there if name not in _WRITTEN]:
        raise UserError(f"--out {out} also holds {', '.join(strange[:3])}, which would be lost; move it away")


def public_config(run: Run, names: Mapping[str, str]) -> dict[str, Any]:
    """`config.json` of a run's model, its base checkpoints by names that mean the same on another machine.

    Raises:
        UserError: one of them is a folder, or a name is given for what the model does not have.
    """
    config = run.model_config()
    for key in ("encoder", "llm", "draft_checkpoint"):
        flag, given, name = f"--{key.replace('_', '-')}", names.get(key, ""), config.get(key) or ""
        if given:
            if not name and key != "draft_checkpoint":
                raise UserError(f"{flag} {given}: the model has none")
            config[key] = given
            if f"{key}_revision" in config:
                config[f"{key}_revision"] = None
        # What resolves to a folder here is one, even where it looks like a name.
        elif name and (not HUB_NAME.fullmatch(name) or Path(name).exists()):
            raise UserError(f"model.{key} '{name}' is a folder of this machine; say what it is elsewhere by {flag} NAME, e.g. "
                            "a name on the Hugging Face hub")
    return config


def write_weights(run: Run, folder: Path, dtype: Dtype) -> dict[str, torch.Tensor]:
    """Store the trained weights of a run's checkpoint in a dtype; returns them.

    Raises:
        UserError: they cannot be read, or a value is out of the dtype's range.
    """
    path = run.model / WEIGHTS_FILE
    try:
        original = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy or train it again") from error
    state = {name: value.to(_DTYPES[dtype]).contiguous() for name, value in original.items()}
    for name, value in state.items():
        if not bool(value.isfinite().all()):
            why = f"does not fit {dtype}; give --dtype bf16 or fp32" if bool(original[name].isfinite().all()) else "is not finite"
            raise UserError(f"{path}: a value of '{name}' {why}")
    # One entry: safetensors writes several in any order, and the same export should have the same hash.
    save_file(state, folder / WEIGHTS_FILE, metadata={"exported": dtype})
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors leaves it to the owner alone
    return state


@torch.no_grad()
def compare(run: Run, exported: Path) -> Comparison:
    """Losses of a run's model, and with the exported weights in their place, on three seconds of a rising tone.

    Raises:
        UserError: base weights that cannot be had.
    """
    assert run.config is not None
    half = run.config.train.precision == "bf16"
    model = load_model(run, "bf16" if half else "fp32")
    groups = {name: sum(p.numel() for _, p in named) for name, named in model.trainable_groups().items()}
    time = torch.arange(48_000) / 16_000
    wave = 0.3 * torch.sin(2 * torch.pi * (200 + 100 * time) * time)
    samples = list(_samples(model.codec.registry, model.config.draft != "none"))
    batch = model.collator()([(sample, wave) for sample in samples]).to(model.device)

    def losses(model: SLUModel) -> torch.Tensor:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            return model.losses(batch)

    before = losses(model)
    model.load_trained(exported)
    return Comparison(float(before[before > 0].mean()), float((losses(model) - before).abs().max()), groups)


def _samples(registry: TaskRegistry, drafted: bool) -> Iterator[Sample]:
    """A transcript alone, and one annotated for each task, so that every kind of token counts."""
    draft = _TEXT if drafted else None
    yield Sample(Utterance("tone", None, _TEXT, {}, draft=draft), None)
    for task in registry:
        label: Any = task.labels[0]
        if not isinstance(task, LabelTask):
            label = (Span(label, 4, 11),)
        elif task.multi:
            label = (label,)
        yield Sample(Utterance("tone", None, _TEXT, {task.name: label}, draft=draft), task.name)


def _simulation(run: Run) -> Path | None:
    """Rates by which text stands for speech (docs/ctc.md); runs that start from the export take them up."""
    return next((p for p in (run.model / SIMULATION_FILE, run.folder / SIMULATION_FILE) if p.is_file()), None)


def _refuse_paths(folder: Path) -> None:
    for path in sorted(p for p in folder.iterdir() if p.suffix != ".safetensors"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = _MACHINE.search(line)
            if found or (len(str(Path.home())) > 2 and str(Path.home()) in line):
                raise UserError(f"{path.name}, line {number}, would name a folder of this machine: {line.strip()[:120]!r}; take "
                                "it out of --data-note, or give checkpoints by name")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
