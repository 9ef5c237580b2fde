"""AutoregressivePrior: p(tokens | class) of a picture, token after token: grid after grid, row-major, then by codebook.

A class-conditional transformer over the tokens of a VQ-VAE (Esser et al. 2020, arXiv:2012.09841, section 3.2), as
LlamaGen has it (Sun et al. 2024, arXiv:2406.06525, section 2.2).
Shapes: B batch, h w grid sides, q num_codebooks, T tokens of a picture, V vocab_size, W width, n tokens of a prefix.
Tokens are (B, h, w); (B, h, w, q) with several codebooks; (B, T) where the grids of a picture differ in size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tokenizer.pretrained import PretrainedModel, nearest

from .config import PriorConfig
from .decoding import Decoder
from .fused import decoder_of
from .sampling import guidance_scales, guide, sample
from .transformer import Linear, Transformer, initialize

Labels = Tensor | Sequence[int | str]  # (B,), numbers or, in a sequence, names of classes

USAGE = """
from prior import AutoregressivePrior
from tokenizer import ImageTokenizer

prior = AutoregressivePrior.from_pretrained("{source}")
tokenizer = ImageTokenizer.from_pretrained(TOKENIZER)
prior.check_tokenizer(tokenizer.fingerprint)
tokens = prior.generate(REQUEST)  # int64 SHAPE
pictures = tokenizer.decode(tokensLABELS)  # float (1, C, H, W) in [0, 1]
"""


class AutoregressivePrior(PretrainedModel):
    """A transformer whose input i is token i - 1, and input 0 the class; its output i is the logits of token i.

    Each input also says which place of the grid it predicts: from rotary positions alone that is learned slowly.

    Class labels are dropped at random in training (`class_dropout`): the null class that stands for them, the last row
    of the class embedding, is what guidance moves away from, and the only class of an unconditional prior.
    """

    config_class = PriorConfig
    card_caption = "samples"
    card_tags: ClassVar[list[str]] = ["image-generation", "autoregressive", "image-tokens"]

    def __init__(self, config: PriorConfig):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)
        self.place_embedding = nn.Embedding(config.num_tokens, config.width)  # of the token that an input predicts
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = Transformer(config.width, config.num_layers, config.num_heads, config.dropout)
        self.head = Linear(config.width, config.vocab_size)
        for module in (self.token_embedding, self.class_embedding, self.place_embedding, self.head):
            initialize(module)

    def forward(self, tokens: Tensor, labels: Labels | None = None) -> Tensor:
        """Tokens of the tokenizer's shape, or flat (B, T), and labels (B,) to logits (B, T, V) float32.

        Labels are numbers in [0, num_classes), or names of the config's `class_names`.

        Raises ValueError for tokens or labels that the config does not describe (once compiled, for their shapes only).
        """
        tokens = self.sequences(tokens)
        classes = self.classes(labels, len(tokens))
        if self.training:
            classes = self.drop_labels(classes)
        hidden = self.embed(classes, tokens[:, :-1])
        return self.head(self.transformer(hidden, self.coordinates())).float()

    def log_prob(self, tokens: Tensor, labels: Labels | None = None) -> Tensor:
        """log p(tokens | label) in nats, (B,) float32; arguments as in `forward`, never with dropout."""
        with self.evaluating():
            logits = self(tokens, labels)
        return -F.cross_entropy(logits.mT, self.sequences(tokens), reduction="none").sum(dim=1)

    @torch.no_grad()
    def generate(
        self,
        labels: Labels | None = None,
        num_samples: int | None = None,
        *,
        prefix: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | tuple[float, float] = 1.0,
        generator: torch.Generator | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> Tensor:
        """Draw tokens int64 of the tokenizer's shape, by default from the model's own distribution.

        B is the number of labels, of prefixes, or `num_samples`, which must agree where several are given. Labels are
        as in `forward`. `prefix` holds the first tokens of each, (B, n), or the first rows of a grid, (B, rows, w) or
        (B, rows, w, q), and the rest is drawn given them.
        `temperature`, `top_k`, `top_p` as in sampling.py. `guidance_scale`: 1 is off, 0 leaves the class out, above 1
        strengthens it; a pair changes linearly from the first position to the last.
        Memory grows with batch_size, not with B, and the same generator state gives the same grids at every batch_size
        (up to the rounding of the network). Raises ValueError for arguments that the model cannot follow.
        """
        labels = listed(labels)
        num_samples = number_of_samples(labels, num_samples, prefix)
        classes, prefix = self.classes(labels, num_samples), self.prefixes(prefix, num_samples)
        scales = self.guidance(guidance_scale)
        if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be at least 1; it bounds memory, not the number of grids")
        # Drawn at once, one number per token: see sampling.draw.
        device = "cpu" if generator is None else generator.device
        shape = (num_samples, self.config.num_tokens)
        uniforms = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
        if self.device.type != "mps":  # which has no float64; elsewhere moved at once, or each step would wait for it
            uniforms = uniforms.to(self.device)
        choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p)
        batches = zip(*(part.split(batch_size) for part in (classes, prefix, uniforms)), strict=True)
        num_steps = num_samples * (self.config.num_tokens - prefix.shape[1])
        with self.evaluating(), tqdm(total=num_steps, unit="token", disable=not progress) as bar:
            decoder = decoder_of(self.transformer, self.head, self.coordinates())
            grids = torch.cat([self.complete(*batch, decoder, scales, choose, bar) for batch in batches])
        return grids.unflatten(1, self.config.token_shape)

    @torch.inference_mode()
    def complete(
        self,
        classes: Tensor,
        prefix: Tensor,
        uniforms: Tensor,
        decoder: Decoder,
        scales: list[float],
        choose: Callable[[Tensor, Tensor], Tensor],
        bar: tqdm,
    ) -> Tensor:
        """Continue the prefixes (B, n) of one batch to whole sequences (B, T); `uniforms` (B, T), scales per token.

        With guidance a single pass takes the batch twice: first with its classes, then with the null class.
        """
        batch, start = prefix.shape
        if start == self.config.num_tokens:
            return prefix
        tokens = torch.cat([prefix, prefix.new_empty(batch, self.config.num_tokens - start)], dim=1)
        guided = any(scale != 1 for scale in scales)
        if guided:
            classes = torch.cat([classes, torch.full_like(classes, self.null_class)])
        copies = 1 + guided
        hidden = self.embed(classes, prefix.repeat(copies, 1))  # (copies * B, n + 1, W)
        caches = decoder.caches(len(hidden))
        if start:
            self.transformer(hidden[:, :-1], self.coordinates()[:start], caches)
        newest = hidden[:, -1]  # (copies * B, W)
        for position in range(start, self.config.num_tokens):
            logits = decoder.logits(newest, position, caches)  # (copies * B, V)
            if guided:
                logits = guide(*logits.chunk(2), scales[position])
            tokens[:, position] = choose(logits, uniforms[:, position])
            if position + 1 < self.config.num_tokens:
                known = tokens[:, position].clamp(max=self.config.vocab_size - 1)  # one beyond is told below
                embedded = self.token_embedding(known.repeat(copies))
                newest = embedded + self.place_embedding.weight[position + 1]
            bar.update(batch)
        if (tokens == self.config.vocab_size).any():  # what is drawn where probabilities are not numbers
            raise ValueError("the prior's logits are not finite: its weights are damaged, or their type is too narrow")
        return tokens

    def embed(self, classes: Tensor, tokens: Tensor) -> Tensor:
        """Classes (B,) and the tokens (B, n) after them to inputs (B, n + 1, W)."""
        inputs = torch.cat([self.class_embedding(classes)[:, None], self.token_embedding(tokens)], dim=1)
        return self.dropout(inputs + self.place_embedding.weight[: inputs.shape[1]])

    def coordinates(self) -> Tensor:
        """Row and column (T, 2) of each input: the class at the origin, the tokens but the last from (1, 1) on.

        No token shares the place of the class, so that its offset to the class tells where in the grid it is. Tokens of
        one place share its coordinates, and those of a coarser grid lie where their middles lie on the last grid.
        """
        places = torch.cat([self.middles(height, width) for height, width in self.config.grids])
        tokens = places.repeat_interleave(self.config.num_codebooks, dim=0)  # (T, 2)
        return torch.cat([torch.zeros_like(tokens[:1]), tokens[:-1]])

    def middles(self, height: int, width: int) -> Tensor:
        """Row and column (h*w, 2) of the middles of a grid's places, where those of the last grid are 1, 2, ..."""
        sides = zip((height, width), self.config.grid_size, strict=True)
        middles = (
            (torch.arange(side, device=self.device) + 0.5) * whole / side + 0.5 for side, whole in sides
        )  # exact where side == whole
        return torch.cartesian_prod(*middles)

    def drop_labels(self, classes: Tensor) -> Tensor:
        """Classes (B,) with a random share of `class_dropout` replaced by the null class."""
        dropped = torch.rand(len(classes), device=classes.device) < self.config.class_dropout
        return torch.where(dropped, self.null_class, classes)

    def guidance(self, guidance_scale: float | tuple[float, float]) -> list[float]:
        """The guidance scale of each token; ValueError where there is no trained null class to move away from."""
        scales = guidance_scales(guidance_scale, self.config.num_tokens)
        if any(scale != 1 for scale in scales):
            if not self.config.num_classes:
                raise ValueError(
                    f"guidance_scale={guidance_scale} needs classes; leave it at 1 for an unconditional prior"
                )
            if not self.config.class_dropout:
                raise ValueError(
                    f"guidance_scale={guidance_scale} needs a prior trained with class_dropout above 0, this one "
                    f"has 0; leave it at 1"
                )
        return scales

    def classes(self, labels: Labels | None, num_samples: int) -> Tensor:
        """Labels as (B,) int64 on the model's device, without classes the null class; ValueError if wrong."""
        num_classes = self.config.num_classes
        if not num_classes:
            if labels is not None:
                raise ValueError("labels were given to an unconditional prior (num_classes=0); leave them out")
            return torch.full((num_samples,), self.null_class, device=self.device)
        if labels is None:
            raise ValueError(f"labels=None; this prior has {num_classes} classes, give one label per grid")
        labels = listed(labels)
        if isinstance(labels, list):
            labels = [self.number_of(label) if isinstance(label, str) else label for label in labels]
        labels = whole_numbers("labels", labels, num_classes, self.trusting)
        if labels.shape != (num_samples,):
            raise ValueError(f"labels of shape {tuple(labels.shape)}; the rule is one per grid, ({num_samples},)")
        return labels.to(self.device)

    def number_of(self, name: str) -> int:
        """The label of the class with this name; ValueError with the nearest name where there is none."""
        names = self.config.class_names
        if name in names:
            return names.index(name)
        hint = nearest(name, names) or "prior.config.class_names lists them"
        if not names:
            hint = f"its classes have none, give numbers in [0, {self.config.num_classes})"
        raise ValueError(f"label {name!r} is no name of a class of this prior; {hint}")

    def sequences(self, tokens: Tensor) -> Tensor:
        """Whole pictures as (B, T) int64 on the model's device; ValueError if wrong."""
        expected, num_tokens = self.config.token_shape, self.config.num_tokens
        tokens = tensor_of("tokens", tokens)
        shape = tuple(tokens.shape)
        if shape[1:] not in (expected, (num_tokens,)) or not shape[0]:
            rules = dict.fromkeys((f"(B, {', '.join(map(str, expected))})", f"(B, {num_tokens})"))
            raise ValueError(
                f"tokens of shape {shape}; the rule is {' or '.join(rules)}, the grids that the prior was made for, "
                f"with B at least 1; use the tokenizer that it was trained with, at its image_size"
            )
        return whole_numbers("tokens", tokens, self.config.vocab_size, self.trusting).flatten(1).to(self.device)

    def prefixes(self, prefix: Tensor | None, num_samples: int) -> Tensor:
        """The first tokens of each picture as (B, n) int64 on the model's device; ValueError if wrong."""
        row, num_tokens = self.config.token_shape[1:], self.config.num_tokens  # of a row; () where grids differ in size
        if prefix is None:
            return torch.empty(num_samples, 0, dtype=torch.int64, device=self.device)
        prefix = whole_numbers("prefix tokens", prefix, self.config.vocab_size)
        shape = tuple(prefix.shape)
        if len(shape) < 2 or (len(shape) > 2 and (not row or shape[2:] != row)):
            rows = f" or first rows (B, n, {', '.join(map(str, row))})" if row else ""
            raise ValueError(f"prefix of shape {shape}; the rule is first tokens (B, n){rows}")
        prefix = prefix.flatten(1)
        if prefix.shape[1] > num_tokens:
            sizes = " x ".join(map(str, self.config.token_shape))
            raise ValueError(
                f"prefix of {prefix.shape[1]} tokens is longer than the grid, {sizes} = {num_tokens}; "
                f"give only the first ones"
            )
        return prefix.to(self.device)

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise ValueError unless the prior was trained on tokens of the tokenizer with this fingerprint."""
        expected = self.config.tokenizer_fingerprint
        if fingerprint != expected:
            raise ValueError(
                f"the tokenizer has fingerprint {fingerprint} and this prior was trained on tokens of {expected}; "
                f"load that tokenizer ({self.config.tokenizer or 'its repo id is not stated'})"
            )

    @property
    def null_class(self) -> int:
        """The row of the class embedding that stands for no class."""
        return self.config.num_classes

    @property
    def card_usage(self) -> str:
        named = "prior.config.tokenizer" if self.config.tokenizer else '"folder/of/its/tokenizer"'
        request, told = "num_samples=1", ""
        if self.config.num_classes:  # whether the tokenizer is told them as well is known to the tokenizer alone
            first = repr(self.config.class_names[0]) if self.config.class_names else "0"
            request = f"labels=[{first}]".replace("{", "{{").replace("}", "}}")  # the whole is a format
            told = ", labels=[0] if tokenizer.config.num_classes else None"
        shape = f"(1, {', '.join(map(str, self.config.token_shape))})"
        filled = USAGE.replace("TOKENIZER", named).replace("SHAPE", shape).replace("LABELS", told)
        return filled.replace("REQUEST", request)  # the last, as a name may be any word


def tensor_of(name: str, values: Tensor | Sequence[int]) -> Tensor:
    """The values as a tensor; ValueError for what can be none."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}={values!r}; the rule is integers, in a tensor or a list") from None


def whole_numbers(name: str, values: Tensor | Sequence[int], limit: int, trusted: bool = False) -> Tensor:
    """The values as int64; ValueError where they are not integers in [0, limit).

    Compiled code does not check that they lie there, nor is it checked where they are `trusted`.
    """
    values = tensor_of(name, values)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} of {values.dtype}; the rule is integers in [0, {limit})")
    values = values.long()
    if values.numel() and not trusted and not torch.compiler.is_compiling():
        low, high = (value.item() for value in values.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(
                f"{name} run from {low} to {high}; they must lie in [0, {limit}), as the prior's config says"
            )
    return values


def listed(labels: Labels | None) -> Tensor | list[int | str] | int | None:
    """Labels in a list, but a tensor, a single number or None as they are; ValueError for a name by itself."""
    if isinstance(labels, str):
        raise ValueError(f"labels={labels!r}; the rule is one per grid, in a tensor or a list: give [{labels!r}]")
    try:
        return labels if labels is None or isinstance(labels, Tensor) else list(labels)
    except TypeError:
        return labels


def number_of_samples(labels: Labels | None, num_samples: int | None, prefix: Tensor | None) -> int:
    """How many grids the arguments of `generate` ask for, by default 1; ValueError where they disagree."""
    counts = {
        "labels": None,
        "num_samples": num_samples,
        "prefix": None if prefix is None else len(torch.atleast_1d(tensor_of("prefix", prefix))),
    }
    if labels is not None:
        counts["labels"] = len(labels) if isinstance(labels, list) else tensor_of("labels", labels).numel()
    counts = {name: count for name, count in counts.items() if count is not None}
    asked = ", ".join(f"{count} by {name}" for name, count in counts.items())
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"different numbers of grids are asked for: {asked}; give the same number, or only one of them"
        )
    num_samples = next(iter(counts.values()), 1)
    if isinstance(num_samples, bool) or not isinstance(num_samples, Integral) or num_samples < 1:
        raise ValueError(f"{asked}: at least one grid must be asked for, by a whole number")
    return num_samples


PRIORS = {"autoregressive": AutoregressivePrior}
