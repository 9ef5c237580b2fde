"""Train an image tokenizer: accelerate launch train/vqvae.py [preset.yaml] [key=value ...]; --help prints the keys.

The loop is that of every model of images; what it tells of a kind of model is in that kind's examiner.
"""

import itertools
import logging
import time
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.contrib.logging import logging_redirect_tqdm

from tokenizer.metrics import psnr
from tokenizer.unfilled import unfilled
from train.checkpoint import RunFolder
from train.config import Stopped, UserError, launch, to_yaml
from train.data import training_batches
from train.evaluation import TokenizerExaminer, model_card
from train.optimization import make_accelerator
from train.progress import Progress
from train.publishing import publish, reserve_repository
from train.settings import AutoencoderRun, TokenizerRun, VAERun
from train.sources import CorruptCounter, ImageSource, check_classes, check_readable, check_unchanged, open_sources
from train.step import TrainingStep
from train.vae_evaluation import VAEExaminer

log = logging.getLogger("train.vqvae")

EXAMINERS = {TokenizerRun: TokenizerExaminer, VAERun: VAEExaminer}  # by a program's settings: its kind of model


def main(config: AutoencoderRun) -> None:
    # Whatever the settings can get wrong is found before anything is built or written.
    folder = RunFolder(config)
    folder.check()
    check_model(config)
    accelerator = make_accelerator(config)
    if config.push_to_hub and accelerator.is_main_process:
        reserve_repository(config, config.data)
    if folder.finished:
        log.info("%s holds the finished run; another output_dir=... starts a new one", folder.path)
    else:
        source, eval_rows = open_sources(config)
        check_classes(f"model.num_classes={config.model.num_classes}", config.model.num_classes, source, config.data)
        check_readable(source, config.data)
        train(config, folder, accelerator, source, eval_rows)
    if config.push_to_hub and accelerator.is_main_process:
        examiner = EXAMINERS[type(config)]
        model, card = examiner.model_class.from_pretrained(folder.path), model_card(examiner, config, folder)
        publish(lambda repo_id: model.push_to_hub(repo_id, card), folder)
    accelerator.end_training()


def train(
    config: AutoencoderRun, folder: RunFolder, accelerator: Accelerator, source: ImageSource, eval_rows: list[Any]
) -> None:
    """Train to the end; Stopped where a signal asks for an earlier one."""
    set_seed(config.seed)
    kind = EXAMINERS[type(config)]
    network = kind.model_class(config.model).to(accelerator.device)
    take_step = TrainingStep(network, config, accelerator, folder)
    optimization = take_step.optimization
    examiner = kind(network, take_step.reconstruction_loss, config, accelerator, source, eval_rows)

    folder.claim(accelerator)
    steps_done, kept = folder.load(accelerator)
    sketch = source.sketch()
    check_unchanged(sketch, kept.get("data"), config.data)
    known_corrupt = set(kept.get("corrupt", ()))
    accelerator.init_trackers("tokengrid", config={"settings": to_yaml(config)})
    num_batches = config.optimizer.accumulation_steps  # of a step
    unreadable = CorruptCounter(config, source, known_corrupt, kept.get("images_seen", 0))
    batches = training_batches(source, config, accelerator, steps_done * num_batches, known_corrupt)
    batches = unreadable.watch(batches)
    progress = Progress(folder.path, accelerator, steps_done, config.steps)
    num_images, clock, metrics = 0, time.perf_counter(), {}

    with optimization.stop.listening(), logging_redirect_tqdm():
        for step in range(steps_done + 1, config.steps + 1):
            done = take_step(step, itertools.islice(batches, num_batches), examiner)
            num_images += num_batches * len(done.images) * accelerator.num_processes

            if progress.due(step) and done.taken:
                values = {name: value.item() for name, value in done.losses.items()}
                reconstructions = done.output.reconstructions.detach().clamp(0, 1).cpu()
                train_psnr = psnr(reconstructions, done.images.cpu()).mean().item()
                speed = num_images / (time.perf_counter() - clock)
                num_images, clock = 0, time.perf_counter()
                values |= {"loss": sum(values.values()), "train_psnr": train_psnr}
                values |= examiner.figures(done.output, done.images)
                values |= {name: value.item() for name, value in done.judgement.items()} | take_step.figures
                progress.record(step, values | {"images_per_second": speed, "corrupt_images": len(unreadable.names)})
                told = examiner.shown(values | metrics) | {"images/s": f"{speed:.0f}"}
                shown_psnr = metrics.get("psnr", train_psnr)  # of the last evaluation, before the first of the batch
                progress.show(step, {"loss": f"{values['loss']:.4f}", "PSNR": f"{shown_psnr:.2f} dB"} | told)
            if step % config.eval_every == 0 or step == config.steps:
                metrics = examiner.evaluate(optimization.measured)
                progress.record(step, metrics)
                examiner.warn(step, metrics)
                if accelerator.is_main_process:
                    examiner.draw_samples(optimization.measured, folder, step)
                num_images, clock = 0, time.perf_counter()
            if step % config.save_every == 0 or step == config.steps or optimization.stopping:
                seen = {"corrupt": sorted(unreadable.names), "images_seen": unreadable.images_seen}
                folder.save(accelerator, step, seen | {"data": sketch})
            if optimization.stopping and step < config.steps:
                log.info("stopped by a signal after step %d; the same command goes on from there", step)
                raise Stopped
    if accelerator.is_main_process:
        optimization.measured.save_pretrained(folder.path, model_card(kind, config, folder))
    accelerator.wait_for_everyone()


def check_model(config: AutoencoderRun) -> None:
    """Raise UserError where the model cannot be built or the crop does not fit it."""
    try:
        model = unfilled(lambda: EXAMINERS[type(config)].model_class(config.model))
        model.grid_size(config.image_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.model.resize is not None and config.image_size > config.model.resize:
        raise UserError(
            f"image_size={config.image_size} is larger than model.resize={config.model.resize}, "
            f"the short side that it is cut from; lower the one or raise the other"
        )


if __name__ == "__main__":
    launch(main, TokenizerRun)
