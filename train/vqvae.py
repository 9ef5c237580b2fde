"""Train an image tokenizer: accelerate launch train/vqvae.py [preset.yaml] [key=value ...]; --help prints the keys."""

import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import HfApi
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm.contrib.logging import logging_redirect_tqdm

from tokenizer import ImageTokenizer, ModelCard
from tokenizer.metrics import bits_per_pixel, perplexity, psnr, usage
from train.checkpoint import RunFolder
from train.config import RunError, TokenizerRun, UserError, launch, to_yaml
from train.data import CorruptCounter, ImageSource, check_readable, evaluation_batches, open_sources, training_batches
from train.losses import reconstruction_losses
from train.progress import METRICS_NAME, TOKENS_PER_CODE, Progress, StopRequest, UsageWindow, read_lines, save_samples

log = logging.getLogger("train.vqvae")

COLLAPSE = 0.5  # a usage below this, past a quarter of the run, is warned of
MAX_SKIPPED_STEPS = 50  # in a row
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
        publish(config, folder)
    accelerator.end_training()


def train(
    config: TokenizerRun, folder: RunFolder, accelerator: Accelerator, source: ImageSource, eval_rows: list[Any]
) -> bool:
    """Train to the end, or to a signal; whether the end was reached."""
    set_seed(config.seed)
    tokenizer = ImageTokenizer(config.model).to(accelerator.device)
    measured, average = tokenizer, None
    if config.average.decay:
        average = AveragedModel(tokenizer, multi_avg_fn=averaging(config.average.decay), use_buffers=True)
        measured = average.module
        accelerator.register_for_checkpointing(average)
    if config.speed.compile:
        tokenizer.compile()
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        tokenizer.parameters(), betas=(options.beta1, options.beta2), weight_decay=options.weight_decay
    )
    model, optimizer = accelerator.prepare(tokenizer, optimizer)
    window = UsageWindow(tokenizer.vocab_size)
    accelerator.register_for_checkpointing(window)

    folder.claim(accelerator)
    steps_done, known_corrupt = folder.load(accelerator)
    accelerator.init_trackers("tokengrid", config={"settings": to_yaml(config)})
    batches = training_batches(source, config, accelerator, steps_done * options.accumulation_steps, known_corrupt)
    unreadable = CorruptCounter(config, source, known_corrupt)
    progress = Progress(folder.path, accelerator, steps_done, config.steps)
    log_every = max(1, min(50, config.steps // 100))
    num_images, skipped, clock = 0, 0, time.perf_counter()
    stop, metrics = StopRequest(), {}

    with stop.listening(), logging_redirect_tqdm():
        for step in range(steps_done + 1, config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            for images, corrupt in itertools.islice(batches, options.accumulation_steps):
                unreadable.add(len(images), corrupt)
                images = images.float() / 255
                with accelerator.accumulate(model):
                    output = model(images)
                    losses = reconstruction_losses(output.reconstructions, images, config.loss) | output.losses
                    accelerator.backward(sum(losses.values()))
                window.add(output.tokens)
                num_images += len(images) * accelerator.num_processes
            gradient_norm = accelerator.clip_grad_norm_(tokenizer.parameters(), options.max_grad_norm)

            guilty = nonfinite_terms(losses, gradient_norm, accelerator)
            flags = torch.tensor([float(stop.received is not None), float(bool(guilty))], device=accelerator.device)
            stopping, broken = accelerator.reduce(flags, "sum").bool().tolist()  # every rank decides the same
            if broken and options.on_nonfinite == "stop":
                raise RunError(nonfinite_message(step, guilty, folder))
            if not broken or accelerator.scaler is not None:  # the scaler must see an overflow to lower its scale
                optimizer.step()
            if broken or accelerator.optimizer_step_was_skipped:
                tokenizer.quantizer.discard()
                skipped += 1
                log.warning("step %d skipped: %s not finite", step, ", ".join(guilty) or "a value on another rank")
                if skipped > MAX_SKIPPED_STEPS:
                    raise RunError(nonfinite_message(step, guilty, folder))
            else:
                codes_jumped = tokenizer.quantizer.step(step / config.steps)
                if average:
                    if codes_jumped:
                        average.n_averaged.zero_()
                    average.update_parameters(tokenizer)
                skipped = 0
            optimizer.zero_grad()

            if (step % log_every == 0 or step == 1) and not broken:
                values = {name: value.item() for name, value in losses.items()}
                train_psnr = psnr(output.reconstructions.detach().clamp(0, 1).cpu(), images.cpu()).mean().item()
                speed = num_images / (time.perf_counter() - clock)
                num_images, clock = 0, time.perf_counter()
                values |= {"loss": sum(values.values()), "train_psnr": train_psnr} | window.figures
                values |= {"gradient_norm": gradient_norm.item(), "learning_rate": optimizer.param_groups[0]["lr"]}
                progress.record(step, values | {"images_per_second": speed, "corrupt_images": len(unreadable.names)})
                progress.show(step, values, speed, metrics)
            if step % config.eval_every == 0 or step == config.steps:
                metrics = evaluate(measured, config, accelerator, source, eval_rows)
                progress.record(step, metrics)
                warn_of_collapse(step, metrics, config)
                if accelerator.is_main_process:
                    draw_samples(measured, config, folder, source, eval_rows, step)
                num_images, clock = 0, time.perf_counter()
            if step % config.save_every == 0 or step == config.steps or stopping:
                folder.save(accelerator, step, unreadable.names)
            if stopping and step < config.steps:
                log.info("stopped by a signal after step %d; the same command goes on from there", step)
                return False
    if accelerator.is_main_process:
        measured.save_pretrained(folder.path, model_card(config, folder))
    accelerator.wait_for_everyone()
    return True


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


def make_accelerator(config: TokenizerRun) -> Accelerator:
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
        raise UserError(f"mixed_precision={config.mixed_precision}: {error}") from None
    if accelerator.device.type == "cpu":  # accelerate launch and torchrun leave one thread to a process
        num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(config.speed.threads or max(1, num_cores // num_local_ranks))
    return accelerator


def averaging(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """The update of averaged weights and codebook statistics; the decay rises to its value as the run grows longer."""

    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + int(num_averaged)) / (10 + int(num_averaged))))
        else:
            torch._foreach_copy_(averaged, current)

    return update


def learning_rate(config: TokenizerRun, step: int) -> float:
    """Of step 1 .. steps: a linear warm-up, then a cosine down to nearly zero."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - 1 - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def nonfinite_terms(losses: dict[str, Tensor], gradient_norm: Tensor, accelerator: Accelerator) -> list[str]:
    """The names of the losses that are NaN or infinite on this rank, else the gradient where it alone is."""
    finite = torch.stack([*losses.values(), gradient_norm]).isfinite().tolist()
    guilty = [name for name, good in zip(losses, finite, strict=False) if not good]
    gradient_alone = not guilty and not finite[-1] and accelerator.scaler is None  # a scaler deals with its overflows
    return ["gradient"] if gradient_alone else guilty


def nonfinite_message(step: int, guilty: list[str], folder: RunFolder) -> str:
    """What to tell when a run cannot go on."""
    saved = folder.saved_steps()
    kept = f"the checkpoint of step {saved[-1]} is good" if saved else "there is no checkpoint yet"
    return (
        f"step {step}: {', '.join(guilty) or 'a value on another rank'} not finite; {kept}; lower learning_rate or "
        f"optimizer.max_grad_norm (in another output_dir), or pass over such steps with optimizer.on_nonfinite=skip"
    )


@torch.no_grad()
def evaluate(
    tokenizer: ImageTokenizer, config: TokenizerRun, accelerator: Accelerator, source: ImageSource, eval_rows: list[Any]
) -> dict[str, float]:
    """PSNR of decode(encode(x)) on whole validation pictures; usage and perplexity on training crops, codes frozen."""
    rank, num_ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    totals = torch.zeros(2, device=device)  # sum of the pictures' PSNR, number of pictures
    for images in evaluation_batches(source, eval_rows[rank::num_ranks], config, tokenizer.downsample_factor):
        scores = psnr(tokenizer.decode(tokenizer.encode(images)).cpu(), images.float() / 255)
        totals += torch.tensor([scores.sum(), len(scores)], device=device)
    counts = torch.zeros(tokenizer.vocab_size, device=device)
    crops = training_batches(source, replace(config, seed=config.seed + 1), accelerator, 0, set())
    num_tokens, wanted = 0, TOKENS_PER_CODE * tokenizer.vocab_size
    while num_tokens < wanted:
        tokens = tokenizer.encode(next(crops)[0])
        counts += torch.bincount(tokens.flatten(), minlength=tokenizer.vocab_size)
        num_tokens += tokens.numel() * num_ranks
    totals, counts = accelerator.reduce((totals, counts), "sum")
    if totals[1] == 0:
        raise RunError("no validation image can be read; the log names them: mend them or choose another eval_split")
    grid = tokenizer.tokens_per_image(config.image_size)
    return {
        "psnr": (totals[0] / totals[1]).item(),
        "usage": usage(counts),
        "perplexity": perplexity(counts),
        "tokens_per_code": num_tokens / tokenizer.vocab_size,
        "bits_per_pixel": bits_per_pixel(tokenizer.vocab_size, grid, (config.image_size, config.image_size)),
    }


def warn_of_collapse(step: int, metrics: dict[str, float], config: TokenizerRun) -> None:
    """Say so where most codes are never used."""
    if metrics["usage"] < COLLAPSE and step >= config.steps / 4:
        log.warning(
            "codebook collapse at step %d: only %.0f%% of the codes are in use; lower learning_rate or "
            "model.quantizer.codebook_size, or raise model.quantizer.revival_threshold",
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
    save_samples(folder.sample(step), originals, reconstructions)


def model_card(config: TokenizerRun, folder: RunFolder) -> ModelCard:
    """The card of a run whose last evaluation is in its metrics.jsonl."""
    records = map(json.loads, read_lines(folder.path / METRICS_NAME))
    metrics = [record for record in records if "psnr" in record][-1]
    step = metrics.pop("step")
    return ModelCard(
        license=config.card.license,
        data=config.card.data or config.data,
        data_license=config.card.data_license,
        metrics=metrics,
        evaluation=(
            f"After {step} steps. `psnr`: dB, mean over whole validation pictures ({config.eval_split or 'validation'} "
            f"of `{config.data}`), of decode(encode(x)). `usage` (share of codes seen) and `perplexity`: on training "
            f"crops of {config.image_size} pixels, codebook frozen, over `tokens_per_code` tokens a code."
        ),
        settings=to_yaml(config),
        sample=folder.sample(step),
    )


def reserve_repository(repo_id: str) -> None:
    """Create the repository before the hours of training; UserError where that is not allowed or not possible."""
    try:
        HfApi().create_repo(repo_id, exist_ok=True)
    except Exception as error:  # the client raises a different type for every way in which this can fail
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"push_to_hub={repo_id} cannot be created ({reason}); log in with `hf auth login`") from error


def publish(config: TokenizerRun, folder: RunFolder) -> None:
    """Upload the finished run; RunError, and nothing lost, where the Hub refuses."""
    try:
        tokenizer = ImageTokenizer.from_pretrained(folder.path)
        address = tokenizer.push_to_hub(config.push_to_hub, model_card(config, folder))
    except Exception as error:  # the client raises a different type for every way in which an upload can fail
        raise RunError(
            f"push_to_hub={config.push_to_hub}: {' '.join(str(error).split())[:300]}; "
            f"the model is safe in {folder.path}, the same command tries again"
        ) from error
    log.info("published: %s", address)


if __name__ == "__main__":
    launch(main, TokenizerRun)
