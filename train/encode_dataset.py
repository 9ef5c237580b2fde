"""Encode a data set of images into a token store: accelerate launch train/encode_dataset.py [key=value ...]

A shard gets its name when it is whole: started again after a signal or a kill, the program makes the missing ones.
"""

import logging
import os
import sys
import time
from copy import deepcopy
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from datasets import Dataset
from huggingface_hub import HfApi
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tokenizer import ImageTokenizer
from tokenizer.pretrained import CARD_NAME, written_whole
from train.checkpoint import SETTINGS_NAME, OutputFolder
from train.config import RunError, Stopped, UserError, launch
from train.cpu import tune_for_cpu
from train.progress import StopRequest
from train.publishing import publish, reserve_repository
from train.settings import StoreRun
from train.sources import CorruptCounter, check_classes, check_corrupt, check_readable, open_splits, public_name
from train.token_store import (
    INDEX_NAME,
    SPLITS,
    ShardSummary,
    ShardWriter,
    StoreIndex,
    StoreStamp,
    TokenStore,
    render_card,
)
from train.views import Shard, ShardBatch, Sources, num_views, plan_shards, shard_batches

log = logging.getLogger("train.encode_dataset")

SECONDS_BETWEEN_LINES = 5
LONGEST_WAIT = timedelta(days=30)  # of ranks that are done for those that are not


def main(config: StoreRun) -> None:
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    encode_dataset(config, accelerator)
    accelerator.end_training()


def encode_dataset(config: StoreRun, accelerator: Accelerator) -> None:
    """Make the store of the settings in `output_dir`, or what is missing of it, and publish it if they say so.

    Raises UserError before anything is written for what cannot be, RunError for what stops the work, Stopped where a
    signal did; the shards made until then are kept.
    """
    folder = StoreFolder(config)
    folder.check()
    tokenizer = open_tokenizer(config.tokenizer)
    check_image_size(tokenizer, config.image_size)
    folder.check_tokenizer(tokenizer.fingerprint)
    if config.push_to_hub and accelerator.is_main_process:
        reserve_repository(config, config.data, "dataset")
    if not folder.finished:
        tune_for_cpu(accelerator, config.speed, config.num_workers)
        sources = dict(zip(SPLITS, open_splits(config), strict=True))
        check_classes(f"tokenizer={config.tokenizer}", tokenizer.config.num_classes, sources["train"], config.data)
        check_readable(sources["train"], config.data)
        encode(config, folder, accelerator, tokenizer.to(accelerator.device), sources)
    elif accelerator.is_main_process:
        log.info("%s holds the finished token store; another output_dir=... starts a new one", folder.path)
    if config.push_to_hub and accelerator.is_main_process:
        publish(folder.upload, folder)
    accelerator.wait_for_everyone()


def encode(
    config: StoreRun, folder: "StoreFolder", accelerator: Accelerator, tokenizer: ImageTokenizer, sources: Sources
) -> None:
    """Make the missing shards, this rank its share of them; Stopped where a signal to any rank ended that."""
    stamp = stamp_of(config, tokenizer, sources["train"].class_names)
    shards = plan_shards(sources, config.rows_per_shard)
    folder.check_shards(shards, stamp)
    folder.claim(accelerator)
    share = shards[accelerator.process_index :: accelerator.num_processes]
    missing = [shard for shard in share if not (folder.path / shard.name).is_file()]
    corrupt = {split: CorruptCounter(config, source, set()) for split, source in sources.items()}
    progress, stop = ShardProgress(config, accelerator, missing, len(share)), StopRequest()

    encoder = deepcopy(tokenizer).fast() if config.fast else tokenizer  # what it makes, the tokenizer decodes
    with stop.listening(), logging_redirect_tqdm(), OpenShards(folder, encoder, stamp) as opened:
        for batch in shard_batches(missing, sources, config, tokenizer) if missing else ():
            if isinstance(batch, UserError):
                raise RunError(f"{batch}; finished shards are safe in {folder.path}, the same command goes on")
            corrupt[batch.shard.split].add(batch.num_images, batch.unreadable)
            opened.add(batch)
            progress.show(batch)
            if stop.received is not None and progress.shards_left:
                break
    stopped = torch.tensor(float(progress.shards_left > 0), device=accelerator.device)
    if accelerator.reduce(stopped, "sum") > 0:
        if accelerator.is_main_process:
            log.info("stopped by a signal; finished shards are in %s, the same command goes on", folder.path)
        raise Stopped
    if accelerator.is_main_process:
        folder.complete(shards, stamp, {split: isinstance(source.rows, Dataset) for split, source in sources.items()})
    accelerator.wait_for_everyone()


class StoreFolder(OutputFolder):
    """A token store while it is made."""

    last_file = INDEX_NAME

    @property
    def finished(self) -> bool:
        """Whether tokens.json is there with every shard; a lost one is made again, a damaged one is a UserError."""
        try:
            return super().finished and bool(TokenStore.open(self.path).splits)
        except FileNotFoundError:
            return False
        except ValueError as error:
            raise UserError(f"{error}; then give the same command again") from None

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise UserError where tokens in the folder were made by another tokenizer, such as it was before training."""
        for path in sorted(self.path.glob("*.parquet"))[:1]:  # check_shards sees the others
            made_by = read_summary(path).stamp.tokenizer_fingerprint
            if made_by != fingerprint:
                raise UserError(
                    f"the tokens in output_dir={self.path} were made by tokenizer {made_by}, and "
                    f"tokenizer={self.config.tokenizer} is now {fingerprint}; "
                    f"give another output_dir=..., or delete {self.path} to encode the data anew"
                )

    def check_shards(self, shards: list[Shard], stamp: StoreStamp) -> None:
        """Raise UserError where a shard in the folder is none of these, because the data has changed meanwhile."""
        planned = {shard.name: shard for shard in shards}
        for path in sorted(self.path.glob("*.parquet")):
            shard, summary = planned.get(path.name), read_summary(path)
            same_images = shard is not None and (shard.rows is None or len(shard.rows) == summary.num_images)
            if not same_images or not summary.stamp.means_the_same(stamp):
                raise UserError(
                    f"{path} does not fit data={self.config.data}, which has changed since; "
                    f"give another output_dir=..., or delete {self.path} to encode the data anew"
                )

    def complete(self, shards: list[Shard], stamp: StoreStamp, sized: dict[str, bool]) -> None:
        """Write the card and tokens.json; RunError where too many images were unreadable. `sized`: no stream."""
        num_rows, unreadable = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        num_images = dict.fromkeys(SPLITS, 0)
        for shard in shards:
            summary = ShardSummary.read(self.path / shard.name)
            num_rows[shard.split] += summary.num_rows
            num_images[shard.split] += summary.num_images
            unreadable[shard.split] += summary.num_unreadable
        for split in SPLITS:
            total = num_images[split]
            fraction = self.config.data_options.max_corrupt_fraction
            check_corrupt(unreadable[split], total if sized[split] else None, total, fraction)
        index = StoreIndex(**asdict(stamp), num_rows=num_rows, unreadable_images=unreadable)
        self.write_card(index, self.config.push_to_hub or self.path.resolve().name)
        with written_whole(self.path / INDEX_NAME) as part:
            part.write_text(index.to_json(), encoding="utf-8")

    def write_card(self, index: StoreIndex, source: str) -> None:
        """README.md, which tells people to load the store from `source`."""
        card, data = self.config.card, self.config.card.data or public_name(self.config.data)
        stated = {"Tokens": card.license, "Data": data, "Data licence": card.data_license}
        with written_whole(self.path / CARD_NAME) as part:
            part.write_text(render_card(index, source, stated), encoding="utf-8")

    def upload(self, repo_id: str) -> str:
        """Upload the complete store as a data set, its settings excepted; the commit's address."""
        hub = HfApi()
        repo_id = hub.create_repo(repo_id, repo_type="dataset", exist_ok=True).repo_id  # with its owner
        self.write_card(TokenStore.open(self.path).index, repo_id)
        commit = hub.upload_folder(
            repo_id=repo_id, folder_path=self.path, repo_type="dataset", commit_message="Upload token store",
            ignore_patterns=[SETTINGS_NAME, ".*"], delete_patterns="*.parquet",  # of a store that was there before
        )  # fmt: skip
        return commit.commit_url


class OpenShards:
    """The shards that this process writes at the moment; left with, unfinished ones are thrown away."""

    def __init__(self, folder: StoreFolder, tokenizer: ImageTokenizer, stamp: StoreStamp):
        self.folder, self.tokenizer, self.stamp = folder.path, tokenizer, stamp
        self.writers: dict[Shard, ShardWriter] = {}

    def __enter__(self) -> "OpenShards":
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.writers.values():
            writer.abandon()

    def add(self, batch: ShardBatch) -> None:
        """Encode a batch into its shard; RunError where the disk refuses it."""
        try:
            self.write(batch)
        except OSError as error:
            raise RunError(
                f"{self.folder / batch.shard.name} could not be written ({error}); finished shards are safe: "
                f"make room and give the same command again"
            ) from error

    def write(self, batch: ShardBatch) -> None:
        if batch.shard not in self.writers:
            self.writers[batch.shard] = ShardWriter(self.folder / batch.shard.name, self.stamp)
        writer = self.writers[batch.shard]
        writer.num_images += batch.num_images
        writer.num_unreadable += len(batch.unreadable)
        if batch.keys:
            labels = batch.labels if self.tokenizer.config.num_classes else None
            tokens = self.tokenizer.encode(batch.pictures.to(self.tokenizer.device), labels=labels)
            writer.append(tokens.flatten(1).cpu().numpy(), batch.labels, batch.keys)
        if batch.is_last:
            writer.finish()
            del self.writers[batch.shard]


class ShardProgress:
    """A bar on a terminal, else lines in a log: how far the main rank is with its own share of the work."""

    def __init__(self, config: StoreRun, accelerator: Accelerator, missing: list[Shard], num_shards: int):
        self.num_shards, self.shards_left = num_shards, len(missing)
        sizes = [len(shard.rows) * num_views(config, shard.split) for shard in missing if shard.rows is not None]
        self.total = sum(sizes) if len(sizes) == len(missing) else None  # the size of a stream shows at its end
        on_terminal = sys.stderr.isatty()
        self.prints = accelerator.is_main_process and not on_terminal
        shown = accelerator.is_main_process and on_terminal
        self.bar = tqdm(total=self.total, unit="image", dynamic_ncols=True, file=sys.stderr, disable=not shown)
        self.num_images = 0  # encoded, so that each view of an image counts
        self.begun_at = self.told_at = time.perf_counter()

    def show(self, batch: ShardBatch) -> None:
        """Advance by a batch."""
        self.num_images += len(batch.keys)
        self.shards_left -= batch.is_last
        self.bar.update(len(batch.keys))
        now = time.perf_counter()
        if self.prints and (batch.is_last or now - self.told_at >= SECONDS_BETWEEN_LINES):
            self.told_at = now
            print(self.line(now - self.begun_at), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """How far the work is after so many seconds."""
        speed = self.num_images / seconds
        told = f"{self.num_images:,} images, {speed:,.0f} images/s"
        if self.total and speed:
            told += f", {tqdm.format_interval((self.total - self.num_images) / speed)} left"
        return f"shard {self.num_shards - self.shards_left}/{self.num_shards}: {told}"


def open_tokenizer(path_or_repo: str) -> ImageTokenizer:
    """The tokenizer of a folder or a repo id; UserError where there is none."""
    try:
        if path_or_repo == StoreRun.tokenizer and not Path(path_or_repo).is_dir():  # never somebody's on the Hub
            raise FileNotFoundError("there is no such folder")
        return ImageTokenizer.from_pretrained(os.path.expanduser(path_or_repo))  # as `data` and `output_dir` are
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer={path_or_repo} cannot be opened ({error}); train one first with "
            f"`accelerate launch train/vqvae.py`, or give the folder or repo id of one: tokenizer=..."
        ) from None


def check_image_size(tokenizer: ImageTokenizer, image_size: int) -> None:
    """Raise UserError unless the tokenizer takes squares of that side."""
    try:
        tokenizer.grid_size(image_size)
    except ValueError as error:
        raise UserError(str(error)) from None


def read_summary(path: Path) -> ShardSummary:
    """What a finished shard says of itself; UserError for a damaged one."""
    try:
        return ShardSummary.read(path)
    except ValueError as error:
        raise UserError(f"{error} and give the same command again") from None


def stamp_of(config: StoreRun, tokenizer: ImageTokenizer, class_names: list[str] | None) -> StoreStamp:
    """The stamp of what these settings make."""
    return StoreStamp(
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer=repo_id_of(config.tokenizer),
        vocab_size=tokenizer.vocab_size,
        grids=[list(grid) for grid in tokenizer.grids(config.image_size)],
        tokens_per_image=tokenizer.tokens_per_image(config.image_size),
        image_size=config.image_size,
        image_channels=tokenizer.config.image_channels,
        class_names=class_names,
        num_codebooks=tokenizer.num_codebooks,
        fast=config.fast,
    )


def repo_id_of(tokenizer: str) -> str | None:
    """Where others find a tokenizer: its repo id, or the one that its folder was published to."""
    folder = Path(tokenizer).expanduser()
    if not folder.is_dir():
        return tokenizer
    settings = folder / SETTINGS_NAME
    published = yaml.safe_load(settings.read_text()).get("push_to_hub") if settings.is_file() else None
    return published if published and "/" in published else None  # without its owner nobody else finds it


if __name__ == "__main__":
    launch(main, StoreRun)
