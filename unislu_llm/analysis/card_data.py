"""What a run was trained on, and words of its files without folders of this machine; for model cards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unislu_llm.analysis.runs import Run, find_run
from unislu_llm.data.manifest import read_manifest
from unislu_llm.data.mixture import manifest_name
from unislu_llm.errors import UserError
from unislu_llm.tasks import TaskRegistry
from unislu_llm.training.config import Config
from unislu_llm.training.stages import stage_configs
from unislu_llm.training.state import BEST, LAST

# Settings that are paths or may be; a prompt may begin with a slash as well.
_PATHS = frozenset({"train", "dev", "tasks", "encoder_cache", "noise", "init", "encoder", "llm", "draft_checkpoint"})


@dataclass(frozen=True)
class Origin:
    """Training manifests of a run and of those it starts from, with the language of rows that name none.

    `unknown`: names of models that it starts from and whose data no file tells.
    """

    manifests: dict[str, str]
    unknown: list[str]


@dataclass(frozen=True)
class TrainedOn:
    """Rows of one corpus in one manifest: how many, by task how many annotated, and how many without audio.

    Where the manifest is not there, `rows` is None and `corpus` empty.
    """

    corpus: str
    manifest: str
    rows: int | None
    annotated: Mapping[str, int]
    without_audio: int
    languages: frozenset[str]


def sources(run: Run) -> Origin:
    """What a run, its stages, and the runs that it starts from were trained on."""
    found, seen = Origin({}, []), set()
    left: list[tuple[Path, Config]] = [(run.folder, run.config)] if run.config else []
    while left:
        folder, config = left.pop(0)
        seen.add(folder.resolve())
        for part in [own for _, own in stage_configs(config, folder)] if config.stages else [config]:
            found.manifests.update({path: part.model.language for path in part.data.train if path not in found.manifests})
        for init in filter(None, (config.model.init, config.model.init_llm)):
            if Path(init).resolve() in seen:
                continue
            try:
                first = find_run(init)
            except UserError:  # the folder is gone
                first = None
            if first is None or first.config is None:
                found.unknown.append(public(init))
            elif first.folder.resolve() not in seen:
                left.append((first.folder, first.config))
    return found


def trained_on(origin: Origin, registry: TaskRegistry) -> list[TrainedOn]:
    """Rows of every training manifest, by corpus.

    Raises:
        UserError: a manifest is faulty.
    """
    return [entry for path, language in origin.manifests.items() for entry in _rows(path, language, registry)]


def _rows(path: str, language: str, registry: TaskRegistry) -> Iterator[TrainedOn]:
    name = Path(path).name
    if not Path(path).is_file():
        yield TrainedOn("", name, None, {}, 0, frozenset())
        return
    utterances = read_manifest(path, registry, corpus=manifest_name(path))
    for corpus in dict.fromkeys(u.corpus for u in utterances):
        some = [u for u in utterances if u.corpus == corpus]
        yield TrainedOn(corpus, name, len(some), Counter(task for u in some for task in u.labels),
                        sum(u.audio is None for u in some), frozenset(u.language or language for u in some))


def public(path: str | Path) -> str:
    """A path as a card shows it: in the current folder from there; outside its name alone."""
    full, here = Path(path).expanduser().absolute().resolve(), Path.cwd().resolve()
    if full.is_relative_to(here) and len(here.parts) > 1:
        return full.relative_to(here).as_posix()
    return f"{full.parent.name}/{full.name}" if full.name in (BEST, LAST) else full.name


def _public_word(word: str) -> str:
    return public(word) if Path(word).is_absolute() or word.startswith(("../", "~")) else word


def public_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings with their paths made public."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found[key] = public_settings(value)
        elif isinstance(value, list):
            found[key] = [public_settings(v) if isinstance(v, Mapping) else _public_setting(key, v) for v in value]
        else:
            found[key] = _public_setting(key, value)
    return found


def _public_setting(key: str, value: Any) -> Any:
    return _public_word(value) if key in _PATHS and isinstance(value, str) and value else value


def public_command(line: str) -> str:
    """A command line with its paths made public, also behind `--flag=`."""
    words = []
    for word in line.split(" "):
        flag, equals, rest = word.rpartition("=") if word.startswith("--") else ("", "", word)
        words.append(f"{flag}{equals}{_public_word(rest)}")
    return " ".join(words)
