"""Token stores on a Hub, published and read back by processes of their own."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hub_server import in_own_process, serve_hub
from tiny_stores import SIZE, encode

from train.config import UserError, parse
from train.settings import StoreRun
from train.token_store import TokenStore

pytestmark = pytest.mark.usefixtures("fresh_accelerator", "own_cache")


def published(token: str, config: StoreRun) -> str:
    """What comes of the program with that token."""
    os.environ["HF_TOKEN"] = token  # which the client reads at each call
    try:
        encode(config)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "published"


def publishing_story() -> dict[str, Any]:
    """Publish the store of `settings.json`: with a wrong token, to a Hub that refuses once, and again; read it back."""
    config = parse(StoreRun, json.loads(Path("settings.json").read_text()))
    seen = {"wrong token": published("wrong", config), "written": Path("store").exists()}
    return seen | {"first": published("secret", config), "second": published("secret", config)} | reading_story()


def reading_story() -> dict[str, Any]:
    """Open the published store by its id."""
    store = TokenStore.open("me/grids")
    rows = store.rows("train")[:]
    return {"index": asdict(store.index), "tokens": rows["tokens"].tolist(), "keys": rows["key"].tolist()}


def test_a_store_is_published_and_read_back_by_its_id_even_offline(tiny_tokenizer, two_classes, tmp_path):
    card = ["push_to_hub=me/grids", "card.license=mit", "card.data=small pictures", "card.data_license=cc0-1.0"]
    given = [
        f"tokenizer={tiny_tokenizer}",
        f"data={two_classes}",
        f"image_size={SIZE}",
        "num_workers=0",
        "output_dir=store",
        *card,
    ]
    (tmp_path / "settings.json").write_text(json.dumps(given))
    with serve_hub(token="secret") as hub:
        hub.fail_commits[:] = [403]
        seen = in_own_process(publishing_story, tmp_path, hub.url)
        files = hub.repos["me/grids"][-1].files
    assert seen.pop("wrong token").startswith("UserError: push_to_hub=me/grids cannot be created")
    assert not seen.pop("written")
    assert re.match("RunError: .*403.*; all is safe in store, the same command tries again", seen.pop("first"))
    assert seen.pop("second") == "published"

    store = TokenStore.open(tmp_path / "store")
    assert files.keys() - {".gitattributes"} == {path.name for path in store.folder.iterdir()} - {"run.yaml"}
    for said in ("license: mit", 'load_dataset("me/grids"', "small pictures", "cc0-1.0", "validation-*.parquet"):
        assert said in files["README.md"].decode()
    assert seen["index"] == asdict(store.index)
    assert seen["tokens"] == store.rows("train")[:]["tokens"].tolist()
    assert seen["keys"] == store.rows("train")[:]["key"].tolist()
    assert in_own_process(reading_story, tmp_path, hub.url, offline="1") == seen  # nobody listens any more


def replacing_story() -> dict[str, Any]:
    """Publish two stores of the settings of `settings.json` under one id, of different shards; read it back."""
    os.environ["HF_TOKEN"] = "secret"
    for name, rows_per_shard in (("first", 4), ("second", 100)):
        given = [
            *json.loads(Path("settings.json").read_text()),
            f"output_dir={name}",
            f"rows_per_shard={rows_per_shard}",
        ]
        encode(parse(StoreRun, given))
    return reading_story()


def test_a_store_published_again_in_other_shards_leaves_none_of_the_old_ones(tiny_tokenizer, two_classes, tmp_path):
    card = ["push_to_hub=me/grids", "card.license=mit", "card.data=small pictures", "card.data_license=cc0-1.0"]
    given = [f"tokenizer={tiny_tokenizer}", f"data={two_classes}", f"image_size={SIZE}", "num_workers=0", *card]
    (tmp_path / "settings.json").write_text(json.dumps(given))
    with serve_hub(token="secret") as hub:
        seen = in_own_process(replacing_story, tmp_path, hub.url)
    assert len(seen["keys"]) == 14
    shards = [name for name in hub.repos["me/grids"][-1].files if name.endswith(".parquet")]
    assert shards == ["train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"]
