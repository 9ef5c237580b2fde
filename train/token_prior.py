"""Train a prior on token grids: accelerate launch train/token_prior.py [preset.yaml] [key=value ...]; --help.

Nothing is encoded while it trains: it reads a token store, and first writes the default one if there is none.
"""

import itertools
import json
import logging
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.contrib.logging import logging_redirect_tqdm

from prior import AutoregressivePrior, PriorConfig
from prior.config import check_vocabulary
from tokenizer import ImageTokenizer, ModelCard
from tokenizer.pretrained import written_whole
from tokenizer.unfilled import unfilled
from train.checkpoint import RunFolder
from train.config import Stopped, UserError, differences, launch, public_yaml, to_yaml
from train.cpu import tune_for_cpu
from train.data import dealt_batches
from train.encode_dataset import encode_dataset, open_tokenizer, repo_id_of
from train.likelihood import Grids, Judge, UnigramCode, as_they_are
from train.optimization import Optimization, make_accelerator
from train.progress import METRICS_NAME, Progress, read_lines, save_sheet
from train.publishing import publish, reserve_repository
from train.settings import PriorRun, StoreRun
from train.sources import public_name
from train.token_store import SPLITS, StoreStamp, TokenStore

log = logging.getLogger("train.token_prior")

SAMPLE_COLUMNS = 10  # of samples/step_N.png, one a class where there are classes
SAMPLE_ROWS = 3  # drawn from the prior, above one drawn from the unigram code
OVERFITTING = 0.02  # a validation loss so much above its lowest, as a share of it, is warned of


def main(config: PriorRun) -> None:
    # Whatever the settings can get wrong is found before anything is built or written.
    folder = RunFolder(config)
    folder.check()
    accelerator = make_accelerator(config)
    if config.push_to_hub and accelerator.is_main_process:
        reserve_repository(config, config.tokens or StoreRun().data)
    if folder.finished:
        log.info("%s holds the finished run; another output_dir=... starts a new one", folder.path)
    else:
        tokenizer = open_tokenizer(config.tokenizer)
        if tokenizer.config.num_classes and not config.conditional:
            raise UserError(
                f"tokenizer={config.tokenizer} decodes by the class of a picture, and conditional=false would draw "
                f"tokens of no class; leave it out"
            )
        store = open_store(config, tokenizer, accelerator)
        tune_for_cpu(accelerator, config.speed)  # again: writing the store left some to its workers
        train(config, folder, accelerator, store, tokenizer.to(accelerator.device))
    if config.push_to_hub and accelerator.is_main_process:
        prior, card = AutoregressivePrior.from_pretrained(folder.path), model_card(config, folder)
        publish(lambda repo_id: prior.push_to_hub(repo_id, card), folder)
    accelerator.end_training()


def train(
    config: PriorRun, folder: RunFolder, accelerator: Accelerator, store: TokenStore, tokenizer: ImageTokenizer
) -> None:
    """Train to the end; Stopped where a signal asks for an earlier one."""
    set_seed(config.seed)
    prior = build_prior(config, store.stamp).to(accelerator.device)
    prior.transformer.activation_checkpointing = config.speed.activation_checkpointing
    set_seed(config.seed, device_specific=True)  # what is dropped differs from rank to rank
    optimization = Optimization(prior, config, accelerator, folder)
    grids = Grids(store.rows("train"), conditional=bool(prior.config.num_classes))
    judge = Judge(config, accelerator, store, grids)

    folder.claim(accelerator)
    identity = replace(store.stamp, tokenizer=None).identity() | {"num_rows": store.index.num_rows}
    check_same_store(folder.kept(accelerator), identity, folder)  # before weights of another shape are loaded
    steps_done, kept = folder.load(accelerator)
    best = kept.get("best", {"step": 0, "bits_per_token": math.inf})
    accelerator.init_trackers("tokengrid", config={"settings": to_yaml(config)})
    num_batches = config.optimizer.accumulation_steps  # of a step
    done = steps_done * num_batches
    batches = dealt_batches(grids, config.batch_size, config.seed, accelerator, done, collate_fn=as_they_are)
    progress = Progress(folder.path, accelerator, steps_done, config.steps)
    num_tokens, clock, metrics = 0, time.perf_counter(), {}

    with optimization.stop.listening(), logging_redirect_tqdm():
        for step in range(steps_done + 1, config.steps + 1):
            optimization.begin(step)
            for tokens, labels in itertools.islice(batches, num_batches):
                with accelerator.accumulate(optimization.model):
                    logits = optimization.model(tokens, labels)
                    losses = {"cross_entropy": F.cross_entropy(logits.mT, tokens)}
                    accelerator.backward(losses["cross_entropy"])
                num_tokens += tokens.numel() * accelerator.num_processes
            taken = optimization.take(step, losses)
            if taken:
                optimization.update_average()

            if progress.due(step) and taken:
                speed = num_tokens / (time.perf_counter() - clock)
                num_tokens, clock = 0, time.perf_counter()
                values = {"cross_entropy": losses["cross_entropy"].item()} | optimization.figures
                progress.record(step, values | {"tokens_per_second": speed})
                progress.show(step, shown(values | metrics, speed))
            if step % config.eval_every == 0 or step == config.steps:
                metrics = judge.measure(optimization.measured)
                progress.record(step, metrics)
                if metrics["bits_per_token"] < best["bits_per_token"]:
                    best = {"step": step, "bits_per_token": metrics["bits_per_token"]}
                    keep_best(optimization.measured, folder.best(step), accelerator)
                warn_of_overfitting(step, metrics, best)
                if accelerator.is_main_process:
                    log.info("step %d: %s", step, ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
                    save_sheet(folder.sample(step), drawn(optimization.measured, tokenizer, judge.unigram, config.seed))
                num_tokens, clock = 0, time.perf_counter()
            if step % config.save_every == 0 or step == config.steps or optimization.stopping:
                folder.save(accelerator, step, {"best": best, "store": identity})
                if accelerator.is_main_process:
                    folder.forget_best_but(best["step"])
            if optimization.stopping and step < config.steps:
                log.info("stopped by a signal after step %d; the same command goes on from there", step)
                raise Stopped
    if accelerator.is_main_process:
        optimization.measured.load_state_dict(load_file(folder.best(best["step"])))
        optimization.measured.save_pretrained(folder.path, model_card(config, folder))
    accelerator.wait_for_everyone()


def open_store(config: PriorRun, tokenizer: ImageTokenizer, accelerator: Accelerator) -> TokenStore:
    """The token store of the settings, written first where none is named."""
    try:
        check_vocabulary(tokenizer.vocab_size)  # before hours may go into a store
    except ValueError as error:
        raise UserError(f"tokenizer={config.tokenizer}: {error}") from None
    default = StoreRun(tokenizer=config.tokenizer)
    try:
        if config.tokens is None:
            encode_dataset(default, accelerator)
        store = TokenStore.open(config.tokens or default.output_dir)
        store.check_tokenizer(tokenizer.fingerprint)
        for split in SPLITS:
            if split not in store.splits:
                raise ValueError(f"it has no {split} rows; encode data that has some, split=... and eval_split=...")
        unfilled(lambda: build_prior(config, store.stamp))
        return store
    except UserError as error:
        raise type(error)(f"the default token store: {error}; or give tokens=... to train on another one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"tokens={config.tokens or default.output_dir}: {error}") from None


def build_prior(config: PriorRun, stamp: StoreStamp) -> AutoregressivePrior:
    """A prior of what the store holds; ValueError where it cannot be."""
    class_names = (stamp.class_names or []) if config.conditional else []
    return AutoregressivePrior(
        PriorConfig(
            vocab_size=stamp.vocab_size,
            grid_size=list(stamp.grids[-1]),
            coarser_grids=stamp.grids[:-1],
            num_codebooks=stamp.num_codebooks,
            num_classes=len(class_names),
            class_names=class_names,
            tokenizer=stamp.tokenizer or repo_id_of(config.tokenizer),  # published since the store was written
            tokenizer_fingerprint=stamp.tokenizer_fingerprint,
            **asdict(config.model),
        )
    )


def check_same_store(kept: dict[str, Any], identity: dict[str, Any], folder: RunFolder) -> None:
    """Raise UserError where the run's checkpoint was trained on another store than the one of that identity."""
    found = differences(kept.get("store", identity), identity)
    if found:
        changed = ", ".join(f"{key}={before!r} (now {now!r})" for key, (before, now) in found.items())
        raise UserError(
            f"output_dir={folder.path} was trained on a token store with {changed}; "
            f"give that store again, or start anew with another output_dir=..."
        )


def keep_best(prior: AutoregressivePrior, path: Path, accelerator: Accelerator) -> None:
    """Write the weights aside, to be exported if no later ones are better."""
    if accelerator.is_main_process:
        with written_whole(path) as part:
            save_file({name: tensor.contiguous() for name, tensor in prior.state_dict().items()}, part)
    accelerator.wait_for_everyone()


def warn_of_overfitting(step: int, metrics: dict[str, float], best: dict[str, float]) -> None:
    """Say so where validation has turned upwards."""
    if metrics["bits_per_token"] > (1 + OVERFITTING) * best["bits_per_token"]:
        log.warning(
            "overfitting at step %d: %.3f bits per validation token, %.3f per training token; the best, %.3f at step "
            "%d, is what is kept; more data, a smaller model or more model.dropout would help",
            step,
            metrics["bits_per_token"],
            metrics["train_bits_per_token"],
            best["bits_per_token"],
            best["step"],
        )


def drawn(prior: AutoregressivePrior, tokenizer: ImageTokenizer, unigram: UnigramCode, seed: int) -> list[list[Tensor]]:
    """Rows of pictures: from the prior, a class a column where it has some, and last from the unigram code."""
    prior.check_tokenizer(tokenizer.fingerprint)
    num_classes = prior.config.num_classes
    num_columns = min(num_classes, SAMPLE_COLUMNS) or SAMPLE_COLUMNS
    classes = torch.arange(num_columns) if num_classes else None
    labels = None if classes is None else classes.repeat(SAMPLE_ROWS)
    generator = torch.Generator().manual_seed(seed)
    tokens = prior.generate(labels, num_columns * SAMPLE_ROWS, generator=generator)
    rows = [*tokens.split(num_columns), unigram.draw(num_columns, prior.config.token_shape, seed)]
    told = classes if tokenizer.config.num_classes else None
    return [[*tokenizer.decode(row, labels=told).cpu()] for row in rows]


def shown(values: dict[str, float], tokens_per_second: float) -> dict[str, str]:
    """What stands beside the bar."""
    validation = f"{values['bits_per_token']:.3f}" if "bits_per_token" in values else "..."
    return {
        "bits/token": f"{values['cross_entropy'] / math.log(2):.3f}",
        "validation": validation,
        "tokens/s": f"{tokens_per_second:.0f}",
    }


def model_card(config: PriorRun, folder: RunFolder) -> ModelCard:
    """The card of a run whose evaluations are in its metrics.jsonl."""
    records = map(json.loads, read_lines(folder.path / METRICS_NAME))
    metrics = min((record for record in records if "bits_per_token" in record), key=lambda each: each["bits_per_token"])
    step = metrics.pop("step")
    return ModelCard(
        license=config.card.license,
        data=config.card.data or public_name(config.tokens or StoreRun().data),
        data_license=config.card.data_license,
        metrics=metrics,
        evaluation=(
            f"The best of the run, after {step} of {config.steps} steps. `bits_per_token`: of validation grids; "
            f"`bits_per_dimension`: the same per pixel and channel. Beside it the uniform code, the unigram code of "
            f"the training tokens, and the entropy of the validation tokens, which no unigram code can go below."
        ),
        settings=public_yaml(config),
        sample=folder.sample(step),
    )


if __name__ == "__main__":
    launch(main, PriorRun)
