"""Train an image tokenizer: accelerate launch train/vqvae.py [preset.yaml] [key=value ...]; --help prints the keys."""

import itertools
import json
import logging
import math
import time
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from tqdm.contrib.logging import logging_redirect_tqdm

from tokenizer import ImageTokenizer, ModelCard
from tokenizer.metrics import bits_per_pixel, psnr
from train.adversarial import Adversary, last_kernel
from train.checkpoint import RunFolder
from train.config import RunError, UserError, launch, to_yaml
from train.counting import TokenCounts, num_counted, told_usage
from train.data import evaluation_batches, training_batches
from train.discriminator import PatchDiscriminator
from train.losses import Deviation, ReconstructionLoss
from train.optimization import Optimization, Trainee, make_accelerator
from train.progress import METRICS_NAME, Progress, UsageWindow, read_lines, save_sheet
from train.publishing import publish, reserve_repository
from train.settings import TokenizerRun
from train.sources import CorruptCounter, ImageSource, check_readable, open_sources

log = logging.getLogger("train.vqvae")

COLLAPSE = 0.5  # a usage below this, past a quarter of the run, is warned of
NUM_SAMPLES = 8  # validation pictures drawn into samples/, as many as fit the sheet


def main(config: TokenizerRun) -> None:
    # Whatever the settings can get wrong is found before anything is built or written.
    folder = RunFolder(config)
    folder.check()
    check_model(config)
    accelerator = make_accelerator(config)
    if config.push_to_hub and accelerator.is_main_process:
        reserve_repository(config.push_to_hub)
    if folder.finished:
        log.info("%s holds the finished run; another output_dir=... starts a new one", folder.path)
    else:
        source, eval_rows = open_sources(config)
        check_readable(source, config.data)
        if not train(config, folder, accelerator, source, eval_rows):
            return
    if config.push_to_hub and accelerator.is_main_process:
        tokenizer, card = ImageTokenizer.from_pretrained(folder.path), model_card(config, folder)
        publish(lambda repo_id: tokenizer.push_to_hub(repo_id, card), folder)
    accelerator.end_training()


def train(
    config: TokenizerRun, folder: RunFolder, accelerator: Accelerator, source: ImageSource, eval_rows: list[Any]
) -> bool:
    """Train to the end, or to a signal; whether the end was reached."""
    set_seed(config.seed)
    tokenizer = ImageTokenizer(config.model).to(accelerator.device)
    beside = trained_beside(config, accelerator.device)
    optimization = Optimization(tokenizer, config, accelerator, folder, beside)
    sigma = beside["sigma"].model if "sigma" in beside else None
    with accelerator.local_main_process_first():  # it alone downloads
        reconstruction_loss = ReconstructionLoss(config.loss, sigma).to(accelerator.device)
    adversary = None
    if "discriminator" in beside:
        kernel = last_kernel(tokenizer.autoencoder.decoder)
        adversary = Adversary(config.adversarial, beside["discriminator"], kernel, accelerator)
    window = UsageWindow(tokenizer.vocab_size)
    accelerator.register_for_checkpointing(window)

    folder.claim(accelerator)
    steps_done, kept = folder.load(accelerator)
    known_corrupt = set(kept.get("corrupt", ()))
    accelerator.init_trackers("tokengrid", config={"settings": to_yaml(config)})
    num_batches = config.optimizer.accumulation_steps  # of a step
    batches = training_batches(source, config, accelerator, steps_done * num_batches, known_corrupt)
    unreadable = CorruptCounter(config, source, known_corrupt)
    progress = Progress(folder.path, accelerator, steps_done, config.steps)
    num_images, clock, metrics = 0, time.perf_counter(), {}

    with optimization.stop.listening(), logging_redirect_tqdm():
        for step in range(steps_done + 1, config.steps + 1):
            optimization.begin(step)
            opposed, judgement = adversary is not None and adversary.plays(step), {}
            for images, corrupt in itertools.islice(batches, num_batches):
                unreadable.add(len(images), corrupt)
                images = images.float() / 255
                with accelerator.accumulate(*optimization.models):
                    output = optimization.model(images)
                    losses = reconstruction_loss(output.reconstructions, images)
                    if opposed:
                        losses |= adversary.tokenizer_loss(step, output.reconstructions, sum(losses.values()))
                    losses |= output.losses
                    accelerator.backward(sum(losses.values()))
                    if opposed:
                        judgement = adversary.discriminator_losses(images, output.reconstructions)
                        accelerator.backward(sum(judgement.values()))
                window.add(output.tokens)
                num_images += len(images) * accelerator.num_processes
            taken = optimization.take(step, losses | judgement)
            if taken:
                codes_jumped = tokenizer.quantizer.step(step / config.steps)
                optimization.update_average(restart=codes_jumped)
            else:
                tokenizer.quantizer.discard()
            if opposed:
                adversary.step() if taken else adversary.discard()

            if progress.due(step) and taken:
                values = {name: value.item() for name, value in losses.items()}
                train_psnr = psnr(output.reconstructions.detach().clamp(0, 1).cpu(), images.cpu()).mean().item()
                speed = num_images / (time.perf_counter() - clock)
                num_images, clock = 0, time.perf_counter()
                values |= {"loss": sum(values.values()), "train_psnr": train_psnr} | window.figures
                values |= {name: value.item() for name, value in judgement.items()} | optimization.figures
                values |= adversary.figures if opposed else {}
                nats = reconstruction_loss.nats(output.reconstructions, images).mean().item()
                values |= likelihood(nats, reconstruction_loss, tokenizer, config)
                progress.record(step, values | {"images_per_second": speed, "corrupt_images": len(unreadable.names)})
                progress.show(step, shown(values | metrics, speed))
            if step % config.eval_every == 0 or step == config.steps:
                metrics = evaluate(optimization.measured, reconstruction_loss, config, accelerator, source, eval_rows)
                progress.record(step, metrics)
                warn_of_collapse(step, metrics, config)
                if accelerator.is_main_process:
                    draw_samples(optimization.measured, config, folder, source, eval_rows, step)
                num_images, clock = 0, time.perf_counter()
            if step % config.save_every == 0 or step == config.steps or optimization.stopping:
                folder.save(accelerator, step, {"corrupt": sorted(unreadable.names)})
            if optimization.stopping and step < config.steps:
                log.info("stopped by a signal after step %d; the same command goes on from there", step)
                return False
    if accelerator.is_main_process:
        optimization.measured.save_pretrained(folder.path, model_card(config, folder))
    accelerator.wait_for_everyone()
    return True


def trained_beside(config: TokenizerRun, device: torch.device) -> dict[str, Trainee]:
    """The networks that the settings ask for and that learn beside the tokenizer, by the names of their figures."""
    trainees, beta1, beta2 = {}, config.optimizer.beta1, config.optimizer.beta2
    if config.loss.learns_sigma:
        trainees["sigma"] = Trainee(Deviation().to(device), config.loss.sigma_learning_rate, (beta1, beta2))
    if config.adversarial.loss:
        options = config.adversarial
        network = PatchDiscriminator(config.model.image_channels, options.base_channels, options.num_layers)
        trainees["discriminator"] = Trainee(network.to(device), options.learning_rate, (options.beta1, beta2))
    return trainees


def check_model(config: TokenizerRun) -> None:
    """Raise UserError where the model cannot be built or the crop does not fit it."""
    try:
        with torch.device("meta"):
            tokenizer = ImageTokenizer(config.model)
        tokenizer.grid_size(config.image_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.model.resize is not None and config.image_size > config.model.resize:
        raise UserError(
            f"image_size={config.image_size} is larger than model.resize={config.model.resize}, "
            f"the short side that it is cut from; lower the one or raise the other"
        )


def shown(values: dict[str, float], images_per_second: float) -> dict[str, str]:
    """What stands beside the bar; PSNR and usage of the last evaluation, before the first of the training batches."""
    if "running_usage" in values:
        values = {"usage": values["running_usage"]} | values
    return {
        "loss": f"{values['loss']:.4f}",
        "PSNR": f"{values.get('psnr', values['train_psnr']):.2f} dB",
        "usage": told_usage(values) if values.keys() & {"usage", "codes_seen"} else "...",
        "images/s": f"{images_per_second:.0f}",
    }


@torch.no_grad()
def evaluate(
    tokenizer: ImageTokenizer,
    reconstruction_loss: ReconstructionLoss,
    config: TokenizerRun,
    accelerator: Accelerator,
    source: ImageSource,
    eval_rows: list[Any],
) -> dict[str, float]:
    """PSNR of decode(encode(x)) on whole validation pictures; codes in use and perplexity on training crops, frozen.

    And what the pictures cost, where the loss is a likelihood.
    """
    rank, num_ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    totals = torch.zeros(3, device=device)  # sums over the pictures: PSNR, nats, 1
    for images in evaluation_batches(source, eval_rows[rank::num_ranks], config, tokenizer.downsample_factor):
        originals, reconstructions = images.float() / 255, tokenizer.decode(tokenizer.encode(images)).cpu()
        scores, nats = psnr(reconstructions, originals), reconstruction_loss.nats(reconstructions, originals)
        totals += torch.tensor([scores.sum(), nats.sum(), len(scores)], device=device)
    counts, num_tokens = TokenCounts(tokenizer.vocab_size), 0
    crops = training_batches(source, replace(config, seed=config.seed + 1), accelerator, 0, set())
    while num_tokens < num_counted(tokenizer.vocab_size):
        tokens = tokenizer.encode(next(crops)[0])
        counts.add(tokens)
        num_tokens += tokens.numel() * num_ranks
    totals = accelerator.reduce(totals, "sum")
    counts = sum(gather_object([counts]), TokenCounts(tokenizer.vocab_size))
    if totals[2] == 0:
        raise RunError("no validation image can be read; the log names them: mend them or choose another eval_split")
    grid = tokenizer.tokens_per_image(config.image_size)
    return {
        "psnr": (totals[0] / totals[2]).item(),
        **counts.figures(),
        "bits_per_pixel": bits_per_pixel(tokenizer.vocab_size, grid, (config.image_size, config.image_size)),
    } | likelihood((totals[1] / totals[2]).item(), reconstruction_loss, tokenizer, config)


def likelihood(
    nats: float, reconstruction_loss: ReconstructionLoss, tokenizer: ImageTokenizer, config: TokenizerRun
) -> dict[str, float]:
    """What -log p(pixels | tokens) of so many nats per dimension, a channel of a pixel, comes to; {} for other losses.

    Distortion and rate, the tokens at a uniform code, are together the length of a code for the 8-bit pixels.
    """
    if reconstruction_loss.deviation is None:
        return {}
    size, num_tokens = (config.image_size, config.image_size), tokenizer.tokens_per_image(config.image_size)
    rate = bits_per_pixel(tokenizer.vocab_size, num_tokens, size) / config.model.image_channels
    return {
        "sigma": reconstruction_loss.deviation().item(),
        "distortion_nats_per_dimension": nats,
        "distortion_bits_per_dimension": nats / math.log(2),
        "rate_bits_per_dimension": rate,
        "total_bits_per_dimension": nats / math.log(2) + rate,
    }


def warn_of_collapse(step: int, metrics: dict[str, float], config: TokenizerRun) -> None:
    """Say so where most codes are never used."""
    if metrics.get("usage", 1.0) < COLLAPSE and step >= config.steps / 4:
        log.warning(
            "codebook collapse at step %d: only %.0f%% of the codes are in use; lower learning_rate or the "
            "number of codes, or raise what model.quantizer has against it: revival_threshold or entropy_weight",
            step,
            100 * metrics["usage"],
        )


def draw_samples(
    tokenizer: ImageTokenizer, config: TokenizerRun, folder: RunFolder, source: ImageSource, rows: list[Any], step: int
) -> None:
    """samples/step_N.png: the first validation pictures above their reconstructions."""
    originals, reconstructions = [], []
    for images in evaluation_batches(source, rows[:NUM_SAMPLES], config, tokenizer.downsample_factor):
        originals += [*(images.float() / 255)]
        reconstructions += [*tokenizer.decode(tokenizer.encode(images))]
    save_sheet(folder.sample(step), [originals, reconstructions])


def model_card(config: TokenizerRun, folder: RunFolder) -> ModelCard:
    """The card of a run whose last evaluation is in its metrics.jsonl."""
    records = map(json.loads, read_lines(folder.path / METRICS_NAME))
    metrics = [record for record in records if "psnr" in record][-1]
    step = metrics.pop("step")
    seen = (
        "`usage` (share of codes seen)"
        if "usage" in metrics
        else "`codes_seen` (different codes among `num_tokens` tokens; the codes are too many to state a usage)"
    )
    costs = (
        " `distortion_bits_per_dimension`: -log2 p of the 8-bit pixels under a Gaussian of deviation `sigma` about "
        "decode(encode(x)), per channel of a pixel; `total_bits_per_dimension`: with the tokens at a uniform code."
    )
    return ModelCard(
        license=config.card.license,
        data=config.card.data or config.data,
        data_license=config.card.data_license,
        metrics=metrics,
        evaluation=(
            f"After {step} steps. `psnr`: dB, mean over whole validation pictures ({config.eval_split or 'validation'} "
            f"of `{config.data}`), of decode(encode(x)). {seen} and `perplexity`: on training crops of "
            f"{config.image_size} pixels, codebook frozen, over `tokens_per_code` tokens a code."
            f"{costs if 'sigma' in metrics else ''}"
        ),
        settings=to_yaml(config),
        sample=folder.sample(step),
    )


if __name__ == "__main__":
    launch(main, TokenizerRun)
