"""How many codes the tokens use, in memory that grows with the codes seen and never with the vocabulary.

Usage is stated over at least 20 tokens a code. Of fewer tokens the number of different codes among them takes its
place, under another name: so it is above 2^18 codes, where 20 tokens for each are more than an evaluation can make.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from tokenizer.metrics import perplexity

TOKENS_PER_CODE = 20  # seen before a usage is stated
LARGEST_WITH_USAGE = 2**18  # codes, which take 5.2 million tokens
TOKENS_WITHOUT_USAGE = 2**20  # counted where there are more codes
WAITING = 2**16  # tokens, at least, that are sorted into the counts at once


def num_counted(vocab_size: int) -> int:
    """Tokens over which the codes in use are counted."""
    return TOKENS_PER_CODE * vocab_size if vocab_size <= LARGEST_WITH_USAGE else TOKENS_WITHOUT_USAGE


class TokenCounts:
    """The codes that were seen and how often each; counts of parts add up to that of the whole."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.num_tokens = 0
        self.codes = torch.empty(0, dtype=torch.int64)  # (S,) different ones, ascending
        self.counts = torch.empty(0, dtype=torch.int64)  # (S,)
        self.waiting: list[Tensor] = []  # tokens not yet sorted in; sorting them in one by one would take too long

    def add(self, tokens: Tensor) -> None:
        """Count tokens of any shape, int64 in [0, vocab_size)."""
        self.waiting.append(tokens.flatten().cpu())
        self.num_tokens += tokens.numel()
        if sum(map(len, self.waiting)) >= max(WAITING, len(self.codes)):
            self.sort_in()

    def sort_in(self) -> None:
        """Empty `waiting` into the counts."""
        if self.waiting:
            codes, counts = torch.cat(self.waiting).unique(return_counts=True)
            self.waiting = []
            self.merge(codes, counts)

    def merge(self, codes: Tensor, counts: Tensor) -> None:
        """Count each of the different codes (S,) so many times more."""
        self.codes, places = torch.cat([self.codes, codes]).unique(return_inverse=True)
        added = torch.cat([self.counts, counts])
        self.counts = torch.zeros_like(self.codes).index_add_(0, places, added)

    def __add__(self, other: Self) -> "TokenCounts":
        assert self.vocab_size == other.vocab_size
        total = TokenCounts(self.vocab_size)
        for part in (self, other):
            part.sort_in()
            total.merge(part.codes, part.counts)
            total.num_tokens += part.num_tokens
        return total

    def figures(self) -> dict[str, float]:
        """`usage`, the share of codes seen, or of too few tokens `codes_seen` and `num_tokens`; and `perplexity`."""
        self.sort_in()
        if self.num_tokens >= TOKENS_PER_CODE * self.vocab_size:
            seen = {"usage": len(self.codes) / self.vocab_size}
        else:
            seen = {"codes_seen": len(self.codes), "num_tokens": self.num_tokens}
        tokens_per_code = self.num_tokens / self.vocab_size
        return seen | {"perplexity": perplexity(self.counts), "tokens_per_code": tokens_per_code}


def told_usage(figures: Mapping[str, float]) -> str:
    """In words what the figures say of the codes in use, a percentage where there is a usage."""
    if "usage" in figures:
        return f"{figures['usage']:.1%}"
    return f"{figures['codes_seen']:,.0f} codes in {figures['num_tokens']:,.0f} tokens"
