"""Kinds of values that settings have, each within bounds."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from tyro.conf import arg

Precision = Literal["fp32", "bf16"]
Transcript = Literal["rewrite", "verbatim"]  # as ModelConfig.transcript says
JSON = arg(constructor=json.loads, metavar="JSON")  # a flag whose value is JSON


class Common:
    """Mark of a setting that most users set: `--help` shows those, `--help-all` the others too."""


# Bounds are wider than anybody needs, and such that no value exhausts the memory by itself, never
# ends, or overflows where it is used. Strict: otherwise `"5"` and `true` would pass for numbers.
Count = Annotated[int, Field(ge=0, le=10**9, strict=True)]
Positive = Annotated[int, Field(ge=1, le=10**9, strict=True)]
Few = Annotated[int, Field(ge=1, le=128, strict=True)]  # layers, heads, frames that are stacked
Width = Annotated[int, Field(ge=0, le=32_768, strict=True)]  # of a layer
Switch = Annotated[bool, Field(strict=True)]
# Pydantic takes `.inf` and `.nan` of YAML for numbers; as a rate they would end in NaN losses.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Rate = Annotated[Number, Field(ge=0.0, le=1e6)]
Share = Annotated[Number, Field(ge=0.0, le=1.0)]
Level = Annotated[Number, Field(ge=-100.0, le=100.0)]  # dB


def _file_name(text: str) -> str:
    # The system would answer such names with errors of its own, wherever they are used first.
    if any(c < " " for c in text) or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError(f"is too long for a name, or has a control character: {text!r:.60}")
    return text


def _no_text(value: Any) -> Any:
    # What else an option may be only its owner knows, who has no file and line to name.
    items = value if isinstance(value, list) else [value]
    if type(value) is not bool and (len(items) > 100 or not all(
            type(i) in (int, float) and abs(i) <= 1e9 for i in items)):
        raise ValueError("must be a number, a list of numbers, true or false, found "
                         f"{value!r:.80}")
    return value


FilePath = Annotated[str, Field(max_length=4096), AfterValidator(_file_name)]
"""File, folder or checkpoint; empty where there need be none."""
Name = Annotated[FilePath, Field(min_length=1)]
Names = Annotated[list[Name], Field(max_length=1000)]
Prompt = Annotated[str, Field(max_length=10_000)]
Options = Annotated[dict[str, Annotated[Any, AfterValidator(_no_text)]], JSON]
"""Further arguments of what a setting chooses."""
