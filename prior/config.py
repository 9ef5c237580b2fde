"""PriorConfig: exactly what a prior's config.json holds. SIZES: the widths and depths of the field."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tokenizer.pretrained import PretrainedConfig

MAX_VOCAB_SIZE = 2**20  # tokens; each has a row of `width` numbers in the embedding and another in the head


@dataclass
class PriorConfig(PretrainedConfig):
    """What is modelled (the grid, its vocabulary, its classes, its tokenizer) and the network that models it."""

    format_version: ClassVar[int] = 3
    later_keys: ClassVar[dict[str, tuple[int, Any]]] = {
        "class_names": (3, []),
        "num_codebooks": (2, 1),
        "coarser_grids": (2, []),
    }

    vocab_size: int  # number of different tokens; they lie in [0, vocab_size)
    grid_size: list[int]  # [h, w], tokens per column and per row of the grid
    num_classes: int = 0  # labels lie in [0, num_classes); 0: unconditional
    width: int = 256  # components of the residual stream
    num_layers: int = 6
    num_heads: int = 4  # each of width / num_heads components, a multiple of 4
    dropout: float = 0.1  # in [0, 1), of the embeddings and of what each branch adds to the residual stream
    class_dropout: float = 0.1  # in [0, 1), share of labels dropped in training; 0 gives up classifier-free guidance
    tokenizer: str | None = None  # repo id of the tokenizer that made the tokens, never a path; null where it has none
    tokenizer_fingerprint: str | None = None  # its `fingerprint`, 64 hexadecimal digits
    num_codebooks: int = 1  # q, tokens at each place of the grid, one after another
    coarser_grids: list[list[int]] = field(default_factory=list)  # [h, w] of each grid before the last, grid_size
    class_names: list[str] = field(default_factory=list)  # of labels 0, 1, ...; empty where nobody has named them

    def __post_init__(self) -> None:
        super().__post_init__()
        check_vocabulary(self.vocab_size)
        if len(self.grid_size) != 2 or min(self.grid_size) < 1:
            raise ValueError(f"grid_size={self.grid_size} must be [h, w], both at least 1; see tokenizer.grid_size")
        if self.num_codebooks < 1:
            raise ValueError(f"num_codebooks={self.num_codebooks} must be at least 1; see tokenizer.num_codebooks")
        if any(len(grid) != 2 or min(grid) < 1 for grid in self.coarser_grids):
            raise ValueError(
                f"coarser_grids={self.coarser_grids} must be a list of [h, w], both at least 1; see tokenizer.grids"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must be at least 0; 0 is an unconditional prior")
        self.check_class_names()
        self.check_network()
        self.check_origin()

    @property
    def grids(self) -> list[list[int]]:
        """[h, w] of each grid in the order of its tokens."""
        return [*self.coarser_grids, self.grid_size]

    @property
    def num_tokens(self) -> int:
        """Tokens of all grids of a picture."""
        return sum(height * width for height, width in self.grids) * self.num_codebooks

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of the tokens of a picture as its tokenizer takes them: (h, w), (h, w, q) or (L,)."""
        if self.coarser_grids:
            return (self.num_tokens,)
        return (*self.grid_size, self.num_codebooks) if self.num_codebooks > 1 else tuple(self.grid_size)

    def check_class_names(self) -> None:
        """Raise ValueError unless each class has a name of its own, or none has one."""
        names = self.class_names
        if names and len(names) != self.num_classes:
            raise ValueError(f"class_names has {len(names)} names for num_classes={self.num_classes}; name all or none")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"class_names has {twice[0]!r} more than once; a name must tell its class from the others")

    def check_network(self) -> None:
        """Raise ValueError for a network that cannot be built."""
        for name in ("width", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; SIZES has whole sets that work")
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"width={self.width} is not a multiple of 4 * num_heads={4 * self.num_heads}: half of each head turns "
                f"with the row and half with the column, in pairs; change width or num_heads"
            )
        for name in ("dropout", "class_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1); 0 drops nothing")

    def check_origin(self) -> None:
        """Raise ValueError where the tokenizer is not named as it must be."""
        if self.tokenizer is not None:
            from huggingface_hub.errors import HFValidationError  # here, as they take longer to import than all of ours
            from huggingface_hub.utils import validate_repo_id

            try:
                validate_repo_id(self.tokenizer)
            except HFValidationError:
                raise ValueError(
                    f"tokenizer={self.tokenizer!r} must be a repo id such as 'org/name'; give null where the "
                    f"tokenizer is not published"
                ) from None
        fingerprint = self.tokenizer_fingerprint
        if fingerprint is not None and not re.fullmatch("[0-9a-f]{64}", fingerprint):
            raise ValueError(
                f"tokenizer_fingerprint={fingerprint!r} must be 64 hexadecimal digits; take tokenizer.fingerprint"
            )


def check_vocabulary(vocab_size: int) -> None:
    """Raise ValueError for tokens that are too few or too many to be modelled, each by an embedding of its own."""
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size} must be at least 2; take the tokenizer's vocab_size")
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} must be at most {MAX_VOCAB_SIZE}: the prior has an embedding and a logit for "
            f"each token; use a tokenizer of fewer codes"
        )


# PriorConfig(vocab_size=16384, grid_size=[16, 16], num_classes=1000, **SIZES["large"]). All but the first are those of
# LlamaGen (Sun et al. 2024, arXiv:2406.06525, table 1); the parameters are counted at the numbers of this example.
SIZES = {
    "laptop": {"width": 256, "num_layers": 6, "num_heads": 4},  # 13.8 million
    "base": {"width": 768, "num_layers": 12, "num_heads": 12},  # 111 million
    "large": {"width": 1024, "num_layers": 24, "num_heads": 16},  # 343 million
    "xlarge": {"width": 1280, "num_layers": 36, "num_heads": 20},  # 775 million
    "xxlarge": {"width": 1536, "num_layers": 48, "num_heads": 24},  # 1.41 billion
}
