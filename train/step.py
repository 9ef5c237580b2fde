"""A step of training a model of images: batches to losses and gradients, and what these move."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tokenizer.image_model import ImageModel

from .adversarial import Adversary, last_kernel
from .checkpoint import RunFolder
from .data import Batch
from .discriminator import PatchDiscriminator
from .evaluation import Examiner
from .losses import Deviation, ReconstructionLoss
from .optimization import Optimization, Trainee
from .settings import AutoencoderRun


@dataclass
class StepOutput:
    output: Any  # what the model gave for the last batch
    images: Tensor  # that batch, float (B, C, S, S) in [0, 1]
    losses: dict[str, Tensor]  # of that batch, named, already weighted
    judgement: dict[str, Tensor]  # the discriminator's own, where it plays
    taken: bool  # False where the step was passed over


class TrainingStep:
    """The networks that learn in a run and the losses that teach them; called once for each step."""

    def __init__(self, network: ImageModel, config: AutoencoderRun, accelerator: Accelerator, folder: RunFolder):
        self.network, self.config, self.accelerator = network, config, accelerator
        beside = trained_beside(config, accelerator.device)
        self.optimization = Optimization(network, config, accelerator, folder, beside)
        sigma = beside["sigma"].model if "sigma" in beside else None
        with accelerator.local_main_process_first():  # it alone downloads
            self.reconstruction_loss = ReconstructionLoss(config.loss, sigma).to(accelerator.device)
        self.adversary = None
        if "discriminator" in beside:
            kernel = last_kernel(network.autoencoder.decoder)
            self.adversary = Adversary(config.adversarial, beside["discriminator"], kernel, accelerator)

    def __call__(self, step: int, batches: Iterable[Batch], examiner: Examiner) -> StepOutput:
        """Step 1 .. steps, from `accumulation_steps` batches; RunError where it is not finite and must be."""
        optimization, bottleneck = self.optimization, self.network.bottleneck
        optimization.begin(step)
        opponent = self.adversary if self.adversary is not None and self.adversary.plays(step) else None
        judgement: dict[str, Tensor] = {}
        for crops, labels, _ in batches:
            images = crops.float() / 255
            with self.accelerator.accumulate(*optimization.models):
                output = optimization.model(images, labels)
                losses = self.reconstruction_loss(output.reconstructions, images)
                if opponent:
                    losses |= opponent.tokenizer_loss(step, output.reconstructions, sum(losses.values()))
                losses |= output.losses
                self.accelerator.backward(sum(losses.values()))
                if opponent:
                    judgement = opponent.discriminator_losses(images, output.reconstructions)
                    self.accelerator.backward(sum(judgement.values()))
            examiner.add(output)
        taken = optimization.take(step, losses | judgement)
        if taken:
            jumped = bottleneck.step(step / self.config.steps)
            optimization.update_average(restart=jumped)
        else:
            bottleneck.discard()
        if opponent:
            opponent.step() if taken else opponent.discard()
        return StepOutput(output, images, losses, judgement, taken)

    @property
    def figures(self) -> dict[str, float]:
        """What the log says of the last step beside its losses."""
        return self.optimization.figures | (self.adversary.figures if self.adversary is not None else {})


def trained_beside(config: AutoencoderRun, device: torch.device) -> dict[str, Trainee]:
    """The networks that the settings ask for and that learn beside the model, by the names of their figures."""
    trainees, beta1, beta2 = {}, config.optimizer.beta1, config.optimizer.beta2
    if config.loss.learns_sigma:
        trainees["sigma"] = Trainee(Deviation().to(device), config.loss.sigma_learning_rate, (beta1, beta2))
    if config.adversarial.loss:
        options = config.adversarial
        network = PatchDiscriminator(config.model.image_channels, options.base_channels, options.num_layers)
        trainees["discriminator"] = Trainee(network.to(device), options.learning_rate, (options.beta1, beta2))
    return trainees
