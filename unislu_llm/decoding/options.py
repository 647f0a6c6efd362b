"""How to decode."""

from __future__ import annotations

from dataclasses import dataclass

from unislu_llm.errors import UserError


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode.

    Args:
        batch_size: utterances at one time.
        max_new_tokens: bound for any answer.
        tokens_per_second, extra_tokens: bound by audio length, `extra + rate * seconds`.
        force_task: after `[T/L]`, force the control token of the sample's task.
        num_beams: 1 is greedy.
        grammar: only well-formed answers can be decoded (:mod:`unislu_llm.decoding.grammar`). None: on in
            :func:`~unislu_llm.decoding.understand.understand`, off in :func:`~unislu_llm.decoding.generate.predict` and so
            in validation and scoring, where the paper's protocol counts what a model does on its own. With `force_task`, a
            sample without task is its transcript alone.
        grounded: with the grammar, phrases of span tasks are whole words of the transcript just decoded.
        draft_bias: nats by which a transcript is drawn to its draft (:mod:`unislu_llm.decoding.copying`), or, where a model
            reads no drafts, to what its `ctc` projector heard; None: as the model's config says, 0 is none.
        cut_loops: with the grammar, leave a transcript or phrase that repeats itself, and count it as `loop`.
        static_cache: keys and values in tensors of one size, for a GPU (transformers' `cache_implementation`);
            for `predict` and for beams: what several tasks share is a cache that grows.
        compile: with `static_cache` and on a GPU, compile the decoder's forward (transformers does, at its first step).
    """

    batch_size: int = 16
    max_new_tokens: int = 256
    tokens_per_second: float = 12.0
    extra_tokens: int = 24
    force_task: bool = False
    num_beams: int = 1
    grammar: bool | None = None
    grounded: bool = False
    cut_loops: bool = True
    draft_bias: float | None = None
    static_cache: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise UserError(f"num_beams must be 1 or more, found {self.num_beams}")
        if self.grounded and self.grammar is False:
            raise UserError("grounded needs the grammar; do not turn it off")
        if self.draft_bias is not None and self.draft_bias < 0:
            raise UserError(f"draft_bias must be 0 or more nats, found {self.draft_bias}")
        if self.compile and not self.static_cache:
            raise UserError("compile needs static_cache: a cache that grows is compiled anew at every step")

    def bound(self, duration: float) -> int:
        """New tokens allowed for `duration` seconds of audio."""
        return min(self.max_new_tokens, self.extra_tokens + int(self.tokens_per_second * duration))
