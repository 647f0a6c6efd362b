"""A dry run of an experiment on SLUE: a small corpus in its layout, tiny random models, two steps.

The commands are those of a real run, each in a forked process: what all of them import is imported
once, and `accelerate launch` is left out. The systems' first seeds run.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from unislu_llm.config import Config
from unislu_llm.config_file import merge
from unislu_llm.errors import UserError, quiet_libraries
from unislu_llm.io import read_json_lines, write_text

Values = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {"fine-tune": ("train", slice(0, 6)), "dev": ("dev", slice(0, 3)),
          "test": ("dev", slice(3, 6))}
"""The clips of the mini corpus that a split has."""
TSV = {"slue-voxpopuli": "id raw_text normalized_text speaker_id split raw_ner normalized_ner",
       "slue-voxceleb": "id normalized_text speaker_id split sentiment start_second end_second"}
RAW = {"PLACE": "GPE", "WHEN": "DATE", "QUANT": "CARDINAL"}  # labels before they are combined
SMALL: Values = {
    "data": {"dev_limit": 2, "num_workers": 0},
    "train": {"max_steps": 2, "batch_size": 4, "accumulation": 1, "eval_every": 0, "threads": 1},
    "decode": {"max_new_tokens": 24, "batch_size": 4}}
begun = False
"""Whether commands are forked, as in a dry run."""


def begin(folder: Path) -> None:
    """Write corpus and models into the folder, anew; raises UserError: it holds something else."""
    global begun
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "dry-run.txt").is_file():
        raise UserError(f"--dry-run {folder}: holds something else; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    write_text(folder / "dry-run.txt", "Made by `run_experiments.py --dry-run`, emptied by it.\n")
    quiet_libraries()
    # Loaded here for all processes.
    import torch
    from transformers.utils.logging import disable_progress_bar

    import unislu_llm.decoding.transcribe
    import unislu_llm.evaluate
    import unislu_llm.training.stages  # noqa: F401

    torch.set_num_threads(1)
    disable_progress_bar()
    # In a process of its own: threads that torch had started here would be missed by the others.
    making = multiprocessing.get_context("fork").Process(target=_make, args=(folder,))
    making.start()
    making.join()
    if making.exitcode:
        raise UserError(f"--dry-run {folder}: its corpus and models could not be made")
    begun = True


def _make(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))  # for the tests' tiny models
    from tests import tiny

    tokenizer = tiny.make_tokenizer()
    for name, (model, own) in {"encoder": tiny.make_whisper(), "llm": (
            tiny.make_llm("qwen2", tokenizer), tokenizer)}.items():
        model.save_pretrained(folder / "models" / name)
        own.save_pretrained(folder / "models" / name)
    for split in SPLITS:
        _write_split(folder / "data", split)


def _write_split(data: Path, split: str) -> None:
    """TSV and audio of both corpora as SLUE has them."""
    import numpy as np
    import soundfile

    from unislu_llm.data.audio import SAMPLE_RATE, load

    names, part = SPLITS[split]
    mini, silence = ROOT / "recipes" / "data" / "mini", np.zeros(SAMPLE_RATE, np.float32)
    lines: dict[str, list[list[str]]] = {name: [columns.split()] for name, columns in TSV.items()}
    for corpus, audio in (("entities", f"slue-voxpopuli/{split}/{{}}.ogg"),
                          ("sentiment", f"slue-voxceleb/{split}_raw/{{}}.flac")):
        for row in read_json_lines(mini / f"{corpus}_{names}.jsonl")[part]:
            wave, text = load(mini / row["audio"]).numpy(), row["text"]
            if corpus == "entities":  # rows can come rightmost entity first
                spans = str([[RAW.get(e["label"], e["label"]), e["start"], e["end"] - e["start"]]
                             for e in reversed(row["ner"])] or None)
                lines["slue-voxpopuli"].append([row["id"], text, text, "None", split, spans, spans])
            else:
                end = f"{1 + len(wave) / SAMPLE_RATE:.3f}"
                lines["slue-voxceleb"].append([row["id"], text, "id1", split, row["sa"], "1", end])
                wave = np.concatenate([silence, wave, silence])
            file = data / audio.format(row["id"])
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(file, wave, SAMPLE_RATE)
    lines["slue-voxceleb"].append([*lines["slue-voxceleb"][-1][:4], "Disagreement", "1", end])
    for name, rows in lines.items():
        write_text(data / name / f"{name}_{split}.tsv", "\n".join(map("\t".join, rows)) + "\n")


def shrunk(values: Mapping[str, Any], folder: Path) -> Values:
    """An experiment file's values with tiny models and two steps, all of it in the folder."""
    systems = []
    for system in values["systems"]:
        config = merge(Config, system.get("config", {}), SMALL)
        if "stages" in config:
            config["stages"] = [merge(Config, stage, SMALL) for stage in config["stages"]]
        kept = {key: value for key, value in system.items() if key != "launch"}
        systems.append(kept if "of" in system else kept | {
            "config": config, "seeds": system.get("seeds", [1])[:1]})
    models = [values.get("common", {}).get("model", {}), *(
        s["config"]["model"] for s in systems if "model" in s.get("config", {}))]
    title = f"DRY RUN, whose numbers mean nothing: random models, few clips. {values['title']}"
    text = yaml.safe_dump({**values, "systems": systems, "title": title,
                           "output": str(folder / "runs"), "results": str(folder / "results")},
                          sort_keys=False)
    for key, name in {(key, m[key]) for m in models for key in ("encoder", "llm") if m.get(key)}:
        text = text.replace(name, str((folder / "models" / key).resolve()))
    return dict(yaml.safe_load(text))


def forked(command: Sequence[str], log: TextIO) -> int:
    """Run a command of the experiment in a forked process; returns its exit status."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code: Any = 1
    try:
        import torch

        # After a fork torch makes its pool anew when it is first used, and fails if two threads of
        # a loading model are the first.
        torch.set_num_threads(1)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        at = next(i for i, w in enumerate(command) if w == "unislu_llm.cli" or w.endswith(".py"))
        sys.argv, name = list(command[at:]), command[at]
        if name.endswith(".py"):
            sys.path.insert(0, str(Path(name).parent))
            runpy.run_path(name, run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code)
    except BaseException:
        traceback.print_exc()
    log.flush()
    os._exit(code if isinstance(code, int) else 1)
