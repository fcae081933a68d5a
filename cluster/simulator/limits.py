"""What an engine may hold at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine may hold; vLLM's names. Raises ValueError for an engine that could never end."""

    max_num_seqs: int
    max_num_batched_tokens: int | None = None
    """Tokens of a step: one for each decoding sequence, the rest for prompts, of which the last is cut to fit. None: no
    bound, every prompt is read in one step."""
    kv_blocks: int | None = None
    """Blocks that sequences can have: vLLM's ``num_gpu_blocks`` less one. None: no bound."""
    block_size: int = 16
    """Tokens of a block."""
    prefix_cache: bool = False
    """Whether equal prefixes are read once (vLLM: ``enable_prefix_caching``)."""
    async_scheduling: bool = False
    """Whether a step is planned while the one before it runs."""

    def __post_init__(self) -> None:
        budget = self.max_num_batched_tokens
        blocks = 1 if self.kv_blocks is None else self.kv_blocks
        if min(self.max_num_seqs, 1 if budget is None else budget, blocks, self.block_size) < 1:
            raise ValueError(f"an engine that may hold nothing never ends: {self}")
        if self.kv_blocks is not None and budget is not None and budget < self.max_num_seqs:
            raise ValueError(f"max_num_batched_tokens must be at least max_num_seqs, as for vLLM: {self}")

    @property
    def is_plain(self) -> bool:
        """Whether only seats and tokens bound it, and a step is planned when it starts."""
        return self.kv_blocks is None and not self.prefix_cache and not self.async_scheduling
