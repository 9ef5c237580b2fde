"""Token stores of a few small pictures, made by the program in this process."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from train.encode_dataset import encode_dataset
from train.settings import StoreRun
from train.token_store import TokenStore

SIZE = 8  # pixels


def settings(tokenizer: str, data: Path | str, output: Path, **changes: Any) -> StoreRun:
    changes = {"image_size": SIZE, "batch_size": 3, "rows_per_shard": 4, "num_workers": 0} | changes
    return StoreRun(tokenizer=tokenizer, data=str(data), output_dir=str(output), **changes)


def encode(config: StoreRun) -> TokenStore:
    """The store that the program makes in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    encode_dataset(config, Accelerator(cpu=True))
    return TokenStore.open(config.output_dir)


def by_key(store: TokenStore, split: str) -> dict[str, list[int]]:
    rows = store.rows(split)[:]
    assert len(set(rows["key"])) == len(rows["key"])
    return dict(zip(rows["key"], rows["tokens"].tolist(), strict=True))
