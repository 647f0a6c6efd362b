"""From a checkpoint's name to a folder on this machine."""

from unislu_llm.weights.pretrained import fast_type, from_pretrained
from unislu_llm.weights.resolve import described, fetch_model, resolve, weights_hash

__all__ = ["described", "fast_type", "fetch_model", "from_pretrained", "resolve", "weights_hash"]
