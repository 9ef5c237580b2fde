"""What tokens cost: bits per token under a prior, beside the codes that know less of them."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from prior import AutoregressivePrior

from .config import UserError
from .settings import PriorRun
from .token_store import TokenStore

ROWS_AT_ONCE = 8192  # of a store


class Grids(torch.utils.data.Dataset):
    """(epoch, index) of a store's rows -> tokens and labels, a whole batch at a time."""

    def __init__(self, rows: Dataset, conditional: bool):
        self.rows, self.conditional = rows, conditional

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, samples: list[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, h*w) int64 and labels (B,) int64, or None for an unconditional prior."""
        batch = self.rows[[index for _, index in samples]]
        tokens = torch.from_numpy(batch["tokens"].astype(np.int64))
        return tokens, torch.from_numpy(batch["label"].astype(np.int64)) if self.conditional else None

    def some(self, num_grids: int, seed: int) -> np.ndarray:
        """The indices of so many rows, or of all, drawn with the seed."""
        return np.random.default_rng(seed).permutation(len(self))[:num_grids]


def as_they_are(batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """A batch that `Grids` has already put together."""
    return batch


def count_tokens(grids: Grids, vocab_size: int, num_classes: int) -> Tensor:
    """How often each token stands in the grids, (V,) int64; UserError for a token or a label out of range."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for start in range(0, len(grids), ROWS_AT_ONCE):
        rows = range(start, min(start + ROWS_AT_ONCE, len(grids)))
        tokens, labels = grids.__getitems__([(0, row) for row in rows])
        check_range("token", tokens, vocab_size)
        if labels is not None:
            check_range("label", labels, num_classes)
        counts += torch.bincount(tokens.flatten(), minlength=vocab_size)
    return counts


def check_range(name: str, values: Tensor, limit: int) -> None:
    """Raise UserError for values outside [0, limit)."""
    low, high = (value.item() for value in values.aminmax())
    if low < 0 or high >= limit:
        raise UserError(
            f"{name}s of the store run from {low} to {high} and must lie in [0, {limit}); encode the data anew"
            + (", or give conditional=false" if name == "label" else "")
        )


class UnigramCode:
    """Frequencies of training tokens, each counted half once more (Krichevsky and Trofimov 1981): none has no code."""

    def __init__(self, counts: Tensor):
        self.probabilities = (counts + 0.5).double() / (counts + 0.5).sum()  # (V,)

    def bits_per_token(self, counts: Tensor) -> float:
        """Mean length of the code of tokens with these counts (V,), in bits."""
        return -(counts.double() / counts.sum() * self.probabilities.log2()).sum().item()

    def draw(self, num_samples: int, token_shape: Sequence[int], seed: int) -> Tensor:
        """Tokens (B, *token_shape) int64 that know nothing of each other."""
        generator, num_tokens = torch.Generator().manual_seed(seed), num_samples * math.prod(token_shape)
        drawn = self.probabilities.multinomial(num_tokens, replacement=True, generator=generator)
        return drawn.view(num_samples, *token_shape)


def entropy(counts: Tensor) -> float:
    """Bits per token of the shortest unigram code, one that knew these counts (V,) beforehand."""
    return torch.special.entr(counts.double() / counts.sum()).sum().item() / math.log(2)


class Judge:
    """Measures a prior on training and validation grids, beside the codes that know less."""

    def __init__(self, config: PriorRun, accelerator: Accelerator, store: TokenStore, train_grids: Grids):
        self.config, self.accelerator = config, accelerator
        rows = store.rows("validation")
        measured = Grids(rows, False).some(config.eval_grids, config.seed)
        validation_grids = Grids(rows.select(measured), train_grids.conditional)  # all codes are charged on these
        self.parts = {"train_": train_grids, "": validation_grids}
        stamp, num_classes = store.stamp, len(store.stamp.class_names or ())
        train_counts, counts = (
            count_tokens(grids, stamp.vocab_size, num_classes) for grids in (train_grids, validation_grids)
        )
        self.unigram, self.tokens_per_image = UnigramCode(train_counts), stamp.tokens_per_image
        self.values_per_image = stamp.image_channels * stamp.image_size**2
        self.baselines = {
            "uniform_bits_per_token": math.log2(stamp.vocab_size),
            "unigram_bits_per_token": self.unigram.bits_per_token(counts),
            "validation_entropy": entropy(counts),
        }

    def measure(self, prior: AutoregressivePrior) -> dict[str, float]:
        """Bits per token of training and validation grids, without dropout; of validation also per image and value."""
        bits = {name: self.bits_per_token(prior, grids) for name, grids in self.parts.items()}
        per_image = bits[""] * self.tokens_per_image
        return {
            "bits_per_token": bits[""],
            "train_bits_per_token": bits["train_"],
            "nats_per_token": bits[""] * math.log(2),
            "bits_per_image": per_image,
            "bits_per_dimension": per_image / self.values_per_image,
            **self.baselines,
        }

    def bits_per_token(self, prior: AutoregressivePrior, grids: Grids) -> float:
        """Mean over the grids that the settings allow, shared out among the ranks."""
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        indices = grids.some(self.config.eval_grids, self.config.seed)
        total = torch.zeros((), device=self.accelerator.device)
        for batch in batched(indices[rank::num_ranks], self.config.batch_size):
            tokens, labels = grids.__getitems__([(0, index) for index in batch])
            with torch.no_grad(), self.accelerator.autocast():
                total -= prior.log_prob(tokens, labels).sum()
        nats = self.accelerator.reduce(total, "sum").item()
        return nats / (len(indices) * self.tokens_per_image) / math.log(2)


def batched(indices: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """The indices, `batch_size` at a time."""
    return (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))
