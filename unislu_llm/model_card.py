"""The model card of an exported model: what files say of it, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from unislu_llm.config_file import config_of_run
from unislu_llm.data.manifest import manifest_name, read_manifest
from unislu_llm.errors import UserError
from unislu_llm.io import portable, read_json, write_text
from unislu_llm.models.saved import Description
from unislu_llm.run_folder import Run, read_finished
from unislu_llm.scoring.score import flat_scores, interval_of
from unislu_llm.tasks import TaskRegistry

CARD = "README.md"
Values = dict[str, Any]

_TEMPLATE = Path(__file__).with_name("card.jinja")
_NEEDED = ("weights_sha256", "scores", "command", "manifests", "decode")


def read_results(paths: Sequence[Path], hashes: Mapping[str, str]) -> list[tuple[Values, str]]:
    """Score files of `unislu evaluate`, each with what the card calls its weights.

    `hashes` says what these are, by SHA-256; a file of other weights is a `UserError`.
    """
    found = []
    for path in paths:
        values = read_json(path)
        if lacking := set(_NEEDED) - set(values):
            raise UserError(f"--results {path}: is no score file of `unislu evaluate` (it has no "
                            f"{', '.join(sorted(lacking))})")
        digest = str(values["weights_sha256"])
        if digest not in hashes:
            raise UserError(f"--results {path}: scores of other weights (SHA-256 {digest[:12]}), "
                            "neither of this checkpoint nor of its export; score this one")
        found.append((values, hashes[digest]))
    return found


def read_note(path: Path | None) -> str:
    """Text of --data-note; raises UserError: no such file, not text, or nothing in it."""
    try:
        note = path.read_text(encoding="utf-8").strip() if path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data-note {path} cannot be read: {error}") from error
    if path and not note:
        raise UserError(f"--data-note {path} is empty; say what the training data is")
    return note


def write_card(path: Path, run: Run, saved: Description, results: Sequence[tuple[Values, str]],
               note: str, *, out: Path, published: str, licence: str, **facts: Any) -> None:
    """Write the card, YAML front matter and Markdown; raises as :func:`export`, which calls it.

    `note` says what the data is; the examples name `out`, the final folder, or the `published`
    name; `facts` are what else the template shows.
    """
    if licence and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", licence):
        raise UserError(f"--licence '{licence}' is no SPDX identifier; give one such as Apache-2.0 "
                        "or CC-BY-4.0")
    assert run.config is not None
    registry = TaskRegistry.from_dict(saved.tasks)
    manifests, starts = _sources(run.folder)
    corpora = [corpus for name in sorted(manifests)
               for corpus in _corpora(name, saved.model.language, registry)]
    languages = sorted({code for corpus in corpora for code in corpus.get("languages", ())})
    settings = run.config.model_dump(mode="json", exclude_defaults=True,
                                     exclude={"output", "resume"})
    # The export's own, in which checkpoints have their public names.
    settings["model"] = saved.model.model_dump(mode="json", exclude_defaults=True)
    versions = run.versions()
    front = ModelCardData(
        language=languages or None, license=licence.lower() or None, library_name="unislu_llm",
        base_model=[base.name for base in saved.bases.values()],
        datasets=list(dict.fromkeys(c["name"] for c in corpora if "name" in c)) or None,
        pipeline_tag="automatic-speech-recognition",
        tags=["spoken-language-understanding", "speech", *registry.names])
    card = ModelCard.from_template(
        front, template_path=str(_TEMPLATE), name=published.partition("@")[0] or out.name,
        folder=published or _name(out), corpora=corpora, tasks=list(registry), languages=languages,
        starts=sorted(starts), data_note=note, run=run, saved=saved,
        finished=read_finished(run.folder), versions=versions,
        command=_public(versions.get("command", "")),
        settings=_public(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)),
        scores=[{**_scores(values), "scored": what} for values, what in results], **facts)
    write_text(path, str(card).rstrip() + "\n")


def _sources(folder: Path) -> tuple[set[str], set[str]]:
    """Training manifests of a run and its stages, and the models that it starts from."""
    manifests, starts = set[str](), set[str]()
    for file in (folder / "config.yaml", *folder.glob("*/config.yaml")):
        config = config_of_run(file.parent)
        manifests.update(config.data.train)
        init = Path(config.train.init)
        # A stage starts from the one before.
        if config.train.init and not init.resolve().is_relative_to(folder.resolve()):
            starts.add(_name(init))
    return manifests, starts


def _corpora(path: str, language: str, registry: TaskRegistry) -> Iterator[Values]:
    """Rows of each corpus in a manifest; of a manifest that is gone, its name alone."""
    manifest = Path(path).name
    if not Path(path).is_file():
        yield {"manifest": manifest}
        return
    # Counted now: a manifest that was changed since the training shows here.
    utterances = read_manifest(path, registry, corpus=manifest_name(path), language=language)
    for name in dict.fromkeys(u.corpus for u in utterances):
        some = [u for u in utterances if u.corpus == name]
        yield {"manifest": manifest, "name": name, "rows": len(some),
               "annotated": [sum(task in u.labels for u in some) for task in registry.names],
               "languages": {str(u.language) for u in some}}


def _scores(values: Values) -> Values:
    """The table of a score file, and what it says of itself."""
    cells: dict[str, dict[str, str]] = {}
    for protocol in values["scores"]["protocols"]:
        spans = values.get("intervals", {}).get(protocol, {})
        for key, value in flat_scores(values["scores"], protocol).items():
            span = spans.get(interval_of(key, spans))
            cells.setdefault(key, {})[protocol] = f"{value:.2f}" + (
                f" [{span['low']:.2f}, {span['high']:.2f}]" if span else "")
    return {"values": values, "cells": cells, "command": _public(values["command"]),
            "manifests": [Path(m["file"]).name for m in values["manifests"]]}


def _public(text: str) -> str:
    """A command or YAML with names in place of folders elsewhere, which tell of a machine."""
    # A path begins a word, a quoted word or the value of `--flag=`; within one, `/` is no start.
    return re.sub(r"(?<![^\s='\"])(/|~|\.\./)[^\s='\"]+", lambda m: _name(Path(m[0])), text)


def _name(path: Path) -> str:
    return portable(path) if path.absolute().is_relative_to(Path.cwd()) else path.name
