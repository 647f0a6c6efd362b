"""Encoders, projectors and the two decoders."""

from __future__ import annotations

import os
from typing import Any


def load(folder: str | os.PathLike[str], **options: Any) -> Any:
    """Load a saved model of either kind, in eval mode; see :meth:`unislu_llm.models.base.SLUModel.from_pretrained`."""
    from unislu_llm.models.base import SLUModel  # here, so that importing the package stays quick

    return SLUModel.from_pretrained(folder, **options)
