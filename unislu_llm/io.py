"""Files: written whole or not at all, hashed, and recognised."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from unislu_llm.errors import UserError, hint
from unislu_llm.text_files import read_text

# Of a saved model: what was trained, what it was trained on, the rates of text injection.
WEIGHTS_FILE, MODEL_FILE, RATES_FILE = "model.safetensors", "config.json", "simulation.json"
# Of a checkpoint: where the run stood, which is written last; the hash of every other file.
TRAINER_FILE, SUMS_FILE = "trainer.json", "SHA256SUMS"
RECOGNISER = "recogniser"  # within a saved model: the one that makes its hypotheses
MODEL_TYPES = ("speech_llm", "whisper_slu")  # `models.KINDS` has their classes
BEST, LAST = "best", "last"  # folders of a run's checkpoints, which are saved models
RUN_CONFIG, RUN_BEGAN = "config.yaml", "began.json"  # a run's settings; its kind, and its files


def git_revision() -> str:
    """Commit of the checkout that runs, `+dirty` where files have changed; empty if it is none."""
    root = Path(__file__).resolve().parents[1]
    # Tags are excluded, for they are no commits.
    git = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40",
           "--dirty=+dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        # An installed package may lie inside a checkout of something else, whose commit says
        # nothing.
        if (root / ".git").exists():
            return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return ""


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Give errors of the disk the name of the file that is written, which an open one lacks."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under its name when the block ends well, and not at all otherwise.
    Its folder is made where it is missing. Text is UTF-8 with `\\n` line ends."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Machines that share a disk may give two processes one number.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with named(path), open(partial, mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())  # a rename may reach the disk before the contents do
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic(path) as handle:
        handle.write(text)


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def append_text(path: Path, text: str) -> None:
    """Append to a text file, which is made where it is missing."""
    with named(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def append_json(path: Path, row: Mapping[str, Any]) -> None:
    append_text(path, json.dumps(row, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object; a file that is missing or anything else is a `UserError`."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; raises UserError with file and line: it is none."""
    rows = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise UserError(f"{path}:{number}: expected a JSON object, found "
                                        f"{type(rows[-1]).__name__}")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {why}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}:{number}: not JSON ({getattr(error, 'msg', 'too deep')}); write "
                        "one object a line") from error
    return rows


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal; one that cannot be read is a `UserError`."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write, which takes the place of `final` when the block ends, and only then."""
    final.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    new, old = room / "new", room / "old"
    try:
        new.mkdir()
        yield new
        if final.exists():
            final.rename(old)  # no system exchanges two folders at once
        new.rename(final)
    finally:
        if final.exists() or not old.exists():
            shutil.rmtree(room, ignore_errors=True)


def write_sums(folder: Path, names: Sequence[str] = ()) -> None:
    """Write `SHA256SUMS` of a folder's files (default: all) as `sha256sum -c` reads it."""
    # Not of `trainer.json`, which changes after a validation and has a hash of its own.
    files = [folder / name for name in names] or sorted(folder.rglob("*"))
    _write_sums(folder, {path.relative_to(folder).as_posix(): [sha256(path)] for path in files
                         if path.is_file() and path.name not in (SUMS_FILE, TRAINER_FILE)})


def renew_sums(folder: Path) -> None:
    """Write `SHA256SUMS` anew of the files that it lists, if there is one."""
    if sums := _read_sums(folder):
        write_sums(folder, [*sums])


def _write_sums(folder: Path, sums: Mapping[str, Sequence[str]]) -> None:
    lines = "".join(f"{digest}  {name}\n" for name, digests in sums.items() for digest in digests)
    # A comment to `sha256sum`. It guards the other lines, of which a torn file would lack some.
    write_text(folder / SUMS_FILE, f"# {_digest(lines)}\n{lines}")


def _read_sums(folder: Path, instead: str = "") -> dict[str, list[str]]:
    """Hashes by file, nothing where there are none; raises UserError: the list is damaged."""
    path, sums = folder / SUMS_FILE, dict[str, list[str]]()
    if not path.is_file():
        return sums
    text = path.read_text(encoding="utf-8", errors="replace")
    head, _, lines = text.partition("\n") if text.startswith("#") else ("", "", text)
    found = [re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\].*)", line) for line in lines.splitlines()]
    for line in found:
        if line:
            sums.setdefault(line[2], []).append(line[1])
    # A list that somebody else wrote names nothing outside its folder.
    outside = any(".." in Path(name).parts for name in sums)
    if not all(found) or not sums or outside or head not in ("", f"# {_digest(lines)}"):
        raise UserError(f"{path} is damaged{instead}")
    return sums


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_saved(folder: str | os.PathLike[str], *names: str) -> None:
    """Compare the files of a saved model (default: all) with its `SHA256SUMS`, if it has one.
    Raises UserError: one is missing or damaged; it is named, and of a run what to use instead."""
    folder = Path(folder)
    last = folder.with_name(LAST)
    instead = f"; use {last}" if folder.name == BEST and is_saved_model(last) else ""
    sums = _read_sums(folder, instead)
    for path in [folder / name for name in sums if not names or name in names]:
        if not path.is_file():
            raise UserError(f"{path} is missing{instead}")
        if sha256(path) not in sums[path.relative_to(folder).as_posix()]:
            raise UserError(f"{path} is damaged: {SUMS_FILE} has another hash{instead}")
    if not names and (folder / TRAINER_FILE).is_file():
        read_signed(folder / TRAINER_FILE)


def write_saved(path: Path, text: str) -> None:
    """Write a text file of a saved model, and renew its line in `SHA256SUMS`, if there is one."""
    sums, digest = _read_sums(path.parent), _digest(text)
    if path.name in sums:  # a kill between the writes leaves the file one of two that are right
        _write_sums(path.parent, sums | {path.name: [*sums[path.name], digest]})
    write_text(path, text)
    if sums:
        _write_sums(path.parent, sums | {path.name: [digest]})


def write_signed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object that holds the SHA-256 of its own text."""
    text = json.dumps({"sha256": "", **value}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text.replace('""', f'"{_digest(text)}"', 1))


def read_signed(path: Path) -> dict[str, Any]:
    """What :func:`write_signed` wrote; raises UserError: it cannot be read, or is damaged."""
    value = read_json(path)
    found = value.pop("sha256", None)
    text = path.read_text(encoding="utf-8").replace(f'"{found}"', '""', 1)
    # Earlier versions wrote no hash, and no list of hashes beside it.
    listed = (path.parent / SUMS_FILE).is_file()
    if found and not listed:
        raise UserError(f"{path.parent / SUMS_FILE} is missing")
    if listed and found != _digest(text):
        raise UserError(f"{path} is damaged: its SHA-256 is not what it says")
    return value


def is_saved_model(folder: str | Path) -> bool:
    """Whether a folder holds a model that :meth:`SLUModel.save_pretrained` wrote."""
    folder = Path(folder)
    # Ours, damaged or not: who loads it is told, and gets no other model in its place.
    if (folder / TRAINER_FILE).is_file():
        return True
    with contextlib.suppress(UserError):
        return ((folder / WEIGHTS_FILE).is_file()
                and read_json(folder / MODEL_FILE).get("model_type") in MODEL_TYPES)
    return False


def checkpoint_folder(run: Path, name: str) -> Path:
    """Where a run's checkpoint `name` is."""
    # A save is two renames, and a kill may come between them.
    final, *others = (run / f"{name}{end}" for end in ("", ".new", ".old"))
    return next((path for path in others
                 if not final.exists() and (path / TRAINER_FILE).is_file()), final)


def find_model(folder: str | Path) -> Path | None:
    """The folder itself, or a run's best, else its last: the first that is a saved model."""
    folder = Path(folder)
    places = (folder, checkpoint_folder(folder, BEST), checkpoint_folder(folder, LAST))
    return next((path for path in places if is_saved_model(path)), None)


def kind_of_run(folder: Path) -> str:
    """`speech_llm` or `whisper_slu`; empty for a run that does not say so yet."""
    if (began := folder / RUN_BEGAN).is_file():
        return str(read_json(began)["kind"])
    model = find_model(folder)
    return str(read_json(model / MODEL_FILE)["model_type"]) if model else ""


def near_models(path: str | Path) -> str:
    """The end of a message: the nearest name of a model on this machine, or nothing."""
    places = (Path(path).parent, Path("."), Path("runs"), Path("adapters"))
    return hint(path, (str(p) for place in places if place.is_dir() for p in sorted(place.iterdir())
                       if find_model(p)))


def is_hub_name(text: str, folder: str | Path = ".") -> bool:
    """Whether a model that is not there, seen from a folder, may be one of the Hugging Face hub:
    `user/model`, or `user/model@revision`."""
    # A mistyped `runs/mine` should be asked of nobody: the name may be somebody's by chance.
    return (re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", text) is not None
            and not (Path(folder) / text.partition("/")[0]).exists())


def is_shown(c: str) -> bool:
    """Whether a character is a part of text: also the joiners inside words of some scripts."""
    return c.isprintable() or c in "\u200c\u200d"


def printable(text: str) -> str:
    """A text as a terminal may show it."""
    # Byte-level models can emit any character, and some of them steer a terminal.
    return "".join(c if is_shown(c) else "\ufffd" for c in text)


def portable(path: str | Path) -> str:
    """A path as results store it: relative to the current folder, or its last two parts."""
    # Results are shared, and the way to a folder says more of a machine than of a result.
    full, here = Path(os.path.abspath(path)), Path.cwd()
    if full.is_relative_to(here):
        return full.relative_to(here).as_posix()
    return Path(*full.parts[-2:]).as_posix() if len(full.parts) > 2 else full.name
