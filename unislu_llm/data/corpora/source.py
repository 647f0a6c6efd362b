"""What a source is: what it is asked for, and what it gives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from unislu_llm.tasks import TaskRegistry

Rows = Iterator[tuple[str, dict[str, Any]]]
"""What a source's `rows` gives: rows as a manifest has them, each with its place `file:line`."""

Dropped = defaultdict[str, list[str]]
"""By reason the places of what is not in the manifest: nothing is dropped uncounted."""


class Source:
    """A corpus in some layout. The fields of each kind are the flags of its subcommand."""

    own: ClassVar[bool] = False  # the user's: what is wrong is an error; no row is dropped for it

    def rows(self, registry: TaskRegistry, dropped: Dropped, clips: Path) -> Rows:
        """The rows one by one; what is left out is named in `dropped`, clips go to a folder."""
        raise NotImplementedError


@dataclass(frozen=True)
class FileSource(Source):
    """A corpus in one file or folder.

    Args:
        file: The file.
        audio: Folder of the audio files; where a row names none it is <audio>/<id>.wav, .flac, ...
    """

    file: Path
    audio: Path | None = None
