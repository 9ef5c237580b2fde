"""What every training program does around its forward pass: the machine, the schedule, guarded steps, averaged weights.

A program calls, for each step, `begin`, its own forward and backward passes, and `take`.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tokenizer import Quantizer
from tokenizer.processor import multiplies_bfloat16

from .checkpoint import RunFolder
from .config import RunError, UserError
from .cpu import tune_for_cpu
from .muon import MuonAdamW
from .progress import StopRequest
from .settings import TrainingRun

log = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 50  # in a row


def make_accelerator(config: TrainingRun) -> Accelerator:
    """Accelerate's view of the machine; UserError for what this machine or installation cannot do."""
    if config.log_with and find_spec(config.log_with) is None:
        raise UserError(f"log_with={config.log_with} is not installed; `pip install {config.log_with}`")
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.optimizer.accumulation_steps,
            log_with=config.log_with,
            project_dir=config.output_dir,
        )
    except ValueError as error:
        raise UserError(f"mixed_precision={config.mixed_precision} or how it was launched: {error}") from None
    on_cpu = accelerator.device.type == "cpu"
    if config.mixed_precision == "fp16" and on_cpu:
        raise UserError("mixed_precision=fp16 changes nothing on a CPU, which has no such arithmetic; bf16, or no")
    if config.mixed_precision == "bf16" and on_cpu and not multiplies_bfloat16():
        log.warning("mixed_precision=bf16 is slower than no on this processor, which has no products in bfloat16")
    tune_for_cpu(accelerator, config.speed)
    return accelerator


@dataclass
class Trainee:
    """A network that learns, and how its optimizer may move it."""

    network: nn.Module  # without Accelerate's wrapping
    learning_rate: float  # highest, after the warm-up
    betas: tuple[float, float]
    weight_decay: float = 0.0  # of matrices and kernels, but for a quantizer's
    orthogonal: bool = False  # Muon moves these, but for embeddings and quantizers, in place of AdamW
    model: nn.Module | None = None  # as Accelerate wraps it, once an Optimization has taken it on
    gradient_norm: Tensor | None = None  # of the last step, before clipping; None where no loss reached it

    @cached_property
    def weights(self) -> list[nn.Parameter]:
        """All that may learn, as they are once it has been prepared: gathered once, not at every step."""
        return list(self.network.parameters())

    def groups(self) -> list[dict[str, Any]]:
        """Its parameters as groups of the optimizer: matrices and kernels, embeddings, and what nothing should shrink.

        That is biases, norms, and all that belongs to a quantizer: codes lie where the latents are.
        """
        modules, weights = list(self.network.modules()), list(self.network.parameters())
        embeddings = {id(each.weight) for each in modules if isinstance(each, nn.Embedding)}
        codes = {id(weight) for each in modules if isinstance(each, Quantizer) for weight in each.parameters()}
        kept = [weight for weight in weights if weight.ndim < 2 or id(weight) in codes]
        decayed = [weight for weight in weights if weight.ndim > 1 and id(weight) not in codes]
        decay = {"weight_decay": self.weight_decay}
        groups = [
            decay | {"params": [weight for weight in decayed if id(weight) not in embeddings]},
            decay | {"params": [weight for weight in decayed if id(weight) in embeddings], "orthogonal": False},
            {"params": kept, "weight_decay": 0.0, "orthogonal": False},
        ]
        return [{"betas": self.betas, "orthogonal": self.orthogonal} | group for group in groups if group["params"]]


class Optimization:
    """The optimizer of a network and of those trained beside it, and all that guards, schedules and averages its steps.

    `model` is what a program calls in training, `network` the same without Accelerate's wrapping, `measured` the one to
    evaluate and to keep: the averaged weights where there are some. `beside` are networks that learn with it, by name,
    each with a learning rate, moments and clipping of its own; `models` is `model` and then theirs. A step is taken by
    all or by none. AdamW treats each parameter by itself: one object with groups for each network equals an optimizer
    for each, and a loss scaler need know no other.
    """

    def __init__(
        self,
        network: nn.Module,
        config: TrainingRun,
        accelerator: Accelerator,
        folder: RunFolder,
        beside: dict[str, Trainee] | None = None,
    ):
        self.network, self.config, self.accelerator, self.folder = network, config, accelerator, folder
        self.average, self.measured = None, network
        if config.average.decay:
            self.average = AveragedModel(network, multi_avg_fn=averaging(config.average.decay), use_buffers=True)
            self.measured = self.average.module
            accelerator.register_for_checkpointing(self.average)
        if config.speed.compile:
            network.compile()
        options = config.optimizer
        betas, orthogonal = (options.beta1, options.beta2), options.name == "muon"
        main = Trainee(network, config.learning_rate, betas, options.weight_decay, orthogonal)
        self.trainees = {"": main} | (beside or {})
        groups = [(trainee.learning_rate, group) for trainee in self.trainees.values() for group in trainee.groups()]
        self.highest_rates = [rate for rate, _ in groups]
        networks = [trainee.network for trainee in self.trainees.values()]
        fused = True if accelerator.device.type == "cpu" else None  # in one pass over each parameter
        optimizer = MuonAdamW([group for _, group in groups], fused=fused)
        *self.models, self.optimizer = accelerator.prepare(*networks, optimizer)
        for trainee, model in zip(self.trainees.values(), self.models, strict=True):
            trainee.model = model
        self.model = main.model
        self.stop = StopRequest()
        self.stopping = False  # a rank has been asked to end
        self.step = 0  # the one that `begin` has begun
        self.num_skipped = 0  # steps in a row

    def begin(self, step: int) -> None:
        """Set the learning rates of a step."""
        self.step = step
        for group, rate in zip(self.optimizer.param_groups, self.highest_rates, strict=True):
            group["lr"] = learning_rate(self.config, step, rate)

    def take(self, step: int, losses: dict[str, Tensor]) -> bool:
        """Clip, check and apply the gradients that `losses` left behind; whether the step was really taken.

        RunError where a loss or gradient is not finite and the settings do not say to skip such steps.
        """
        accelerator, options = self.accelerator, self.config.optimizer
        self.clip_gradients()
        guilty = self.nonfinite_terms(losses)
        flags = [float(self.stop.received is not None), float(bool(guilty))]
        flags = accelerator.reduce(torch.tensor(flags, device=accelerator.device), "sum")
        self.stopping, broken = flags.bool().tolist()  # every rank decides the same
        elsewhere = "a value on another rank" if broken else "a gradient at the scale of the loss"
        culprit = ", ".join(guilty) or elsewhere  # where the step is not taken
        if broken and options.on_nonfinite == "stop":
            raise RunError(self.nonfinite_message(step, culprit))
        if not broken or accelerator.scaler is not None:  # the scaler must see an overflow to lower its scale
            self.optimizer.step()
        taken = not (broken or accelerator.optimizer_step_was_skipped)
        self.optimizer.zero_grad()
        self.num_skipped = 0 if taken else self.num_skipped + 1
        if not taken:
            log.warning("step %d skipped: %s not finite", step, culprit)
            if self.num_skipped > MAX_SKIPPED_STEPS:
                raise RunError(self.nonfinite_message(step, culprit))
        return taken

    def clip_gradients(self) -> None:
        """Clip the gradient of each network that has one, by itself."""
        clip = self.accelerator.clip_grad_norm_  # unscales, once and for all networks
        for trainee in self.trainees.values():
            weights = trainee.weights
            reached = any(weight.grad is not None for weight in weights)
            trainee.gradient_norm = clip(weights, self.config.optimizer.max_grad_norm) if reached else None
            clip = nn.utils.clip_grad_norm_

    def update_average(self, restart: bool = False) -> None:
        """Let the averaged weights, if there are some, take in those of a step, or start anew from them."""
        if self.average:
            if restart:
                self.average.n_averaged.zero_()
            self.average.update_parameters(self.network)

    @property
    def figures(self) -> dict[str, float]:
        """What the log says of the last step beside its losses."""
        values = {}
        for name, trainee in self.trainees.items():
            if trainee.gradient_norm is not None:
                values[f"{name}_gradient_norm".strip("_")] = trainee.gradient_norm.item()
                rate = learning_rate(self.config, self.step, trainee.learning_rate)
                values[f"{name}_learning_rate".strip("_")] = rate
        return values

    def nonfinite_terms(self, losses: dict[str, Tensor]) -> list[str]:
        """The names of the losses that are NaN or infinite on this rank, else of the gradients where they alone are."""
        norms = {f"{name} gradient".strip(): trainee.gradient_norm for name, trainee in self.trainees.items()}
        scalars = losses | {name: norm for name, norm in norms.items() if norm is not None}
        finite = torch.stack([*scalars.values()]).isfinite().tolist()
        guilty = [name for name, good in zip(scalars, finite, strict=True) if not good]
        scaled = self.accelerator.scaler is not None  # a scaler deals with its overflows
        return [name for name in guilty if name in losses] or ([] if scaled else guilty)

    def nonfinite_message(self, step: int, culprit: str) -> str:
        """What to tell when a run cannot go on."""
        saved = self.folder.saved_steps()
        kept = f"the last checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint yet"
        stops = self.config.optimizer.on_nonfinite == "stop"
        passing = ", or pass over such steps with optimizer.on_nonfinite=skip" if stops else ""
        return (
            f"step {step}: {culprit} not finite; {kept}; lower learning_rate or optimizer.max_grad_norm "
            f"(in another output_dir){passing}"
        )


def averaging(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """The update of averaged weights and codebook statistics; the decay rises to its value as the run grows longer."""

    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + int(num_averaged)) / (10 + int(num_averaged))))
        else:
            torch._foreach_copy_(averaged, current)

    return update


def learning_rate(config: TrainingRun, step: int, highest: float) -> float:
    """Of step 1 .. steps: a linear warm-up to the highest, then a cosine down to nearly zero."""
    if step <= config.warmup_steps:
        return highest * step / config.warmup_steps
    progress = (step - 1 - config.warmup_steps) / (config.steps - config.warmup_steps)
    return highest * 0.5 * (1 + math.cos(math.pi * progress))
