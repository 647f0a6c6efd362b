"""The answer over HTTP: a queue that decodes requests together, and the routes before it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Serving:
    """How a model is served."""

    host: str = "127.0.0.1"  # Address to listen at; one that others can reach needs a token.
    port: int = 8000  # Port to listen at; 0: any that is free.
    token_file: Path | None = None  # Holds the token of requests; default: UNISLU_TOKEN has it.
    name: str = ""  # Of the model in requests; default: its folder's.
    batch_size: int = 16  # Clips decoded at one time.
    max_requests: int = 256  # Requests at one time; further ones are refused (429).
    max_mb: int = 25  # Size of a request; over it: 413.
    max_seconds: int = 600  # Length of a file; over it: 413.
    precision: Literal["fp32", "bf16"] = "fp32"  # Of frozen weights; bf16 is faster on a GPU.
