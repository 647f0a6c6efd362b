"""What sources have in common: the rows that they make, and tables."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unislu_llm.errors import UserError

Rows = Iterator[tuple[str, dict[str, Any]]]
"""What a source's `rows` gives: rows as a manifest has them, each with its place `file:line`."""

Dropped = defaultdict[str, list[str]]
"""By reason the places of what is not in the manifest: nothing is dropped uncounted."""


def read_table(path: Path, needed: Sequence[str], **dialect: Any) -> Iterator[
        tuple[str, dict[str, str]]]:
    """Rows of a CSV file, each with its place `file:line`; `dialect` is that of `csv.DictReader`.

    Raises:
        UserError: no such file, a `needed` column is missing or any is there twice, or a row has
            another number of cells.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, **dialect)
            header = list(reader.fieldnames or ())
            for name in (*needed, *header):
                if header.count(name) != 1:
                    raise UserError(f"{path}:1: needs one column '{name}', has "
                                    f"{', '.join(header) or 'none'}")
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if None in cells or None in cells.values():  # so `csv` marks too many and too few
                    raise UserError(f"{where}: another number of cells than the header; is there a "
                                    "separator inside of one?")
                yield where, cells
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a table in UTF-8: {error}") from error
