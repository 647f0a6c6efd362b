"""From a checkpoint's name to a folder on this machine."""

from unislu_llm.weights.resolve import Found, resolve, weights_hash

__all__ = ["Found", "resolve", "weights_hash"]
