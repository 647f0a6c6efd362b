"""Importing this makes `transformers.pipeline("spoken-language-understanding", MODEL)` work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from transformers import AutoConfig, Pipeline, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY

from unislu_llm.config import DecodeConfig
from unislu_llm.decoding.inputs import One
from unislu_llm.decoding.predict import stream, understand
from unislu_llm.io import MODEL_TYPES
from unislu_llm.models.base import SLUModel
from unislu_llm.run_folder import load


class SpokenLanguageUnderstandingPipeline(Pipeline):
    """Speech to `Answer.to_dict()`, with inputs and options of :func:`unislu_llm.understand`.

    Of a list, a generator or a dataset `batch_size` inputs (1) are answered together; of the latter
    two answers come as they are asked for.
    """

    model: Any  # an SLUModel, and no PreTrainedModel
    # It brings its own; the factory is to load none beside it.
    _load_tokenizer = _load_feature_extractor = _load_processor = False  # type: ignore[assignment]
    _load_image_processor = _load_video_processor = False  # type: ignore[assignment]

    def _sanitize_parameters(self, **how: Any) -> tuple[dict, dict, dict]:
        return {}, how, {}

    def preprocess(self, input_: One, **_: Any) -> dict[str, Any]:
        return {"inputs": input_}

    def _forward(self, input_tensors: dict[str, Any], **how: Any) -> Any:
        return understand(self.model, input_tensors["inputs"], **how)

    def postprocess(self, model_outputs: Any, **_: Any) -> dict[str, Any]:
        return model_outputs.to_dict()

    def get_iterator(self, inputs: Iterable[One], num_workers: int, batch_size: int, _: Any,
                     how: dict[str, Any], __: Any) -> Iterator[dict[str, Any]]:
        # The engine makes batches of clips; transformers would pad tensors of a class of its own.
        options = (how.get("options") or DecodeConfig()).model_copy(
            update={"batch_size": batch_size})
        return map(self.postprocess, stream(self.model, inputs, **how | {"options": options}))

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {type(self.model).__name__} on {self.device}"


class _Load:
    @staticmethod
    def from_pretrained(name: str, dtype: Any, revision: str | None = None, **_: Any) -> SLUModel:
        name += f"@{revision}" if revision else ""
        return load(name, "fp32" if dtype == "auto" else dtype)


for _kind in MODEL_TYPES:  # the factory asks for a configuration before it looks at the task
    AutoConfig.register(_kind, type(_kind, (PreTrainedConfig,), {"model_type": _kind}),
                        exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    "spoken-language-understanding", SpokenLanguageUnderstandingPipeline, _Load, type="audio")
