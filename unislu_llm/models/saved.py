"""`config.json` of a saved model: what it is made of."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from unislu_llm import weights
from unislu_llm.config import ModelConfig
from unislu_llm.errors import UserError, dotted, explain
from unislu_llm.io import MODEL_FILE, check_saved, read_json, write_saved
from unislu_llm.tasks import TaskRegistry

Kind = Literal["speech_llm", "whisper_slu"]
"""Whisper's encoder with an LLM, or with its own decoder."""


class Base(BaseModel):
    """A checkpoint that a model was built from."""

    model_config = ConfigDict(extra="forbid")

    name: str  # as the configuration names it
    revision: str | None = None  # hub commit or wheels; None for a folder
    sha256: str | None = None  # over its weight files; None where it is not known

    @classmethod
    def resolve(cls, part: str, name: str, stored: Base | None) -> tuple[Path, Base]:
        """Folder of a checkpoint, and what it is; warns where its weights are not `stored`'s."""
        if torch.get_default_device().type == "meta":
            return weights.described(name).path, cls(name=name)
        # The commit that a model was trained on, not what has become of the name since.
        found = weights.resolve(name, revision=stored.revision if stored else None)
        digest = weights.weights_hash(found.path)
        if stored and stored.sha256 and stored.sha256 != digest:
            warnings.warn(f"{part} '{name}' has other weights (SHA-256 {digest[:12]}) than this "
                          f"model was trained on ({stored.sha256[:12]}); scores will differ from "
                          "its model card", stacklevel=3)
        return found.path, cls(name=name, revision=found.revision, sha256=digest)


class Description(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model_type: Kind
    model: ModelConfig  # the `model` section of the run's configuration
    tasks: list[dict[str, Any]]  # the task registry as plain data
    bases: dict[str, Base] = {}  # by part: encoder, llm
    ctc_tokens: list[int] | None = None  # token ids that a `ctc` projector predicts
    markers: list[str]  # whose rows were trained, in order

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the file into a folder, whole or not at all, with its hash where it has one."""
        write_saved(Path(folder) / MODEL_FILE,
                    json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n")

    def registry(self, folder: str | os.PathLike[str]) -> TaskRegistry:
        """The tasks of the model in `folder`."""
        return TaskRegistry.from_dict(self.tasks, where=f"{Path(folder) / MODEL_FILE}: tasks")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Self:
        """Read and check the file; a recogniser in the folder gets its path there.

        Raises:
            UserError: it is missing or damaged, no JSON, or not of a saved model; file and field
                are named.
        """
        path = Path(folder) / MODEL_FILE
        check_saved(folder, MODEL_FILE)
        if not path.is_file():
            raise UserError(f"{path} does not exist; give the folder of a saved model")
        try:
            found = cls.model_validate(read_json(path))
        except ValidationError as error:
            raise explain(error, cls, lambda place: f"{path}: {dotted(place)}") from None
        found.model = found.model.read_from(path.parent)
        return found
