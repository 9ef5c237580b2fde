"""Labels of a conditional model: the class of each image, which encoder and decoder are told; and every refusal."""

from collections.abc import Sequence

import torch
from torch import Tensor

Labels = Tensor | Sequence[int] | int  # (B,), one for each image, or one for all of them


def checked_labels(labels: Labels | None, num_classes: int, num_images: int, trusted: bool = False) -> Tensor | None:
    """Labels (B,) int64, None for a model without classes; ValueError for what are none of this model's.

    Compiled code does not check that they lie in [0, num_classes), nor is it checked where they are `trusted`.
    """
    if num_classes == 0:
        if labels is not None:
            raise ValueError("labels were given to an unconditional model (num_classes=0); leave them out")
        return None
    rule = f"integers in [0, {num_classes}), one for each image or one for all"
    if labels is None:
        raise ValueError(f"labels=None; this model knows {num_classes} classes: give labels=..., {rule}")
    if not isinstance(labels, Tensor):
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"labels={labels!r}; the rule is {rule}") from None
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels of {labels.dtype}; the rule is {rule}")
    if labels.ndim and labels.shape != (num_images,):
        raise ValueError(f"labels of shape {tuple(labels.shape)} for {num_images} images; the rule is {rule}")
    if not trusted and not torch.compiler.is_compiling():
        low, high = (value.item() for value in labels.long().aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels run from {low} to {high}; the rule is {rule}")
    return labels.long().expand(num_images)
