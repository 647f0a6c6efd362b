"""From a checkpoint's name to a folder on this machine."""

from unislu_llm.weights.pretrained import from_pretrained
from unislu_llm.weights.resolve import Found, described, fetch_model, resolve, weights_hash

__all__ = ["Found", "described", "fetch_model", "from_pretrained", "resolve", "weights_hash"]
