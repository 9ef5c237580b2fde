"""The measurements of speed end to end, at tiny sizes, their tables, and the stopwatch."""

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import datasets
import floors
import pytest
import speed_agreement
import speed_codec
import speed_dataset
import speed_generation
import speed_large
import speed_search
import speed_start
import speed_tables
import speed_training
import stopwatch
import tables
import torch
from conftest import tiny_config
from speed_agreement import AgreementRun
from speed_codec import CodecRun
from speed_dataset import DatasetRun
from speed_generation import GenerationRun
from speed_large import LargeRun
from speed_search import SearchRun
from speed_start import StartRun
from speed_training import TrainingSpeedRun, clocked

from tokenizer import ImageTokenizer
from tokenizer.kernels import LANES, LIBRARY
from tokenizer.normalisation import activated
from tokenizer.products import product
from tokenizer.winograd import WinogradConv2d
from train.config import UserError, parse
from train.token_store import TokenStore


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """What tells the rates of the machine is not what these tests are about, nor what it has instructions for."""
    monkeypatch.setattr(floors, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(floors, "PRODUCT", 16)
    monkeypatch.setattr(floors, "COPIED", 2**20)


def recorded(root: Path, name: str) -> dict:
    """What was written, whichever kind of processor it is of."""
    (path,) = (root / "benchmarks/results").iterdir()
    assert path.stem in (name, name.replace("speed", "speed_avx2"))
    return json.loads(path.read_text())


def test_the_search_is_measured_beside_its_peers_and_put_into_the_table(tmp_path):
    settings = ["codebook_sizes=[16,64]", "codebook_dims=[4]", "max_vectors=256", "rounds=5", "seconds=0.0"]
    speed_search.main(parse(SearchRun, settings), tmp_path)
    written = recorded(tmp_path, "speed_search")
    assert written["command"].startswith("python benchmarks/speed.py search ")
    assert [(row["codebook_size"], row["vectors"]) for row in written["rows"]] == [(16, 256), (64, 256)]
    for row in written["rows"]:
        assert min(row["same_codes"].values()) > 0.99
        assert row["search"].keys() == row["training"].keys() == {"ours", *speed_search.PEERS}
        assert row["alone"].keys() == {"ours", "product"}
        for figures in (row["search"]["ours"], row["alone"]["product"]):
            speed = figures["vectors_per_second"]
            assert 0 < speed["low"] <= speed["median"] <= speed["high"]
    rows = speed_tables.search_rows(written)
    assert tables.markdown(rows).count("\n") == 3


@pytest.mark.parametrize("worth_bfloat16", [True, False])
def test_the_codec_is_measured_on_equal_tokens_and_put_into_the_table(worth_bfloat16, tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "multiplies_bfloat16", lambda: worth_bfloat16)
    tiny = speed_codec.Architecture(16, (32, 32), 1, True, latent_channels=8, codebook_dim=4, codebook_size=32)
    monkeypatch.setitem(speed_codec.ARCHITECTURES, "tiny", tiny)
    settings = ["models=[tiny]", "max_pixels=512", "compiled=false"]  # a compiler may not be there
    speed_codec.main(parse(CodecRun, settings), tmp_path)
    written = recorded(tmp_path, "speed_codec")
    (row,) = written["rows"]
    assert row["batch"] == 2
    assert row["tokens_that_differ"] == 0
    assert row["largest_difference_of_pixels"] < 1e-4
    for part in ("encode", "decode"):
        assert len(row[part]["each"]) == (6 if worth_bfloat16 else 4)
        assert (row[part]["bfloat16"] is not None) == worth_bfloat16
        assert row[part]["fastest"]["peer"].startswith("diffusers")
    work = {name: mode.get("operations_per_image") for name, mode in row["decode"]["each"].items()}
    assert work["ours"] < work["diffusers"]  # upsampling
    assert [cells["what"] for cells in speed_tables.codec_rows(written)] == ["encode 2 of 16 px", "decode 2 of 16 px"]
    assert [len(cells) for cells in speed_tables.lesser_rows(written)] == [4, 4]


def test_the_agreement_of_the_fast_mode_is_measured_and_put_into_the_table(tokenizer, colours, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tiny")
    settings = [f"tokenizers=[{tmp_path / 'tiny'}]", f"data={colours}", "image_size=16", "images=3"]
    speed_agreement.main(parse(AgreementRun, settings), tmp_path)
    written = recorded(tmp_path, "speed_agreement")
    (row,) = written["rows"]
    assert (row["tokenizer"], row["images"], row["tokens"]) == ("tiny", 3, 3 * 8 * 8)
    for mode in ("fast", "bfloat16", "float64"):
        assert 0.5 < row[mode]["tokens_that_agree"] <= 1
        assert 0 < row[mode]["difference_of_pixels"] < 10
    assert row["float64"]["difference_of_pixels"] < 1e-3 < row["bfloat16"]["difference_of_pixels"]
    assert 0 < row["difference_from_photographs"] < 255
    assert tables.markdown(speed_tables.agreement_rows(written)).count("\n") == 2


@pytest.mark.parametrize("dtypes", [["float32", "bfloat16"], ["float32"]])
def test_generation_is_measured_beside_a_llama_and_put_into_the_table(dtypes, tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "multiplies_bfloat16", lambda: len(dtypes) == 2)
    settings = ["width=32", "num_layers=1", "num_heads=2", "vocab_size=16", "grid_sides=[2]", "batch_sizes=[1,2]"]
    speed_generation.main(parse(GenerationRun, settings), tmp_path)
    written = recorded(tmp_path, "speed_generation")
    assert [(row["dtype"], row["batch"]) for row in written["rows"]] == list(itertools.product(dtypes, (1, 2)))
    for row in written["rows"]:
        assert row["each"].keys() == {"ours", "ours, guided", *speed_generation.CACHES}
        assert row["against_peer"]["peer"] in speed_generation.CACHES
        assert min(row["floor_tokens_per_second"].values()) > 0
    for rows in (speed_tables.generation_rows(written), speed_tables.lesser_rows(written)):
        assert tables.markdown(rows).count("\n") == 1 + 2 * len(dtypes)


def test_the_peer_generates_as_many_tokens_as_ours_whatever_it_draws():
    config = GenerationRun(width=32, num_layers=1, num_heads=2, vocab_size=2)
    peer = speed_generation.llama(config, side=4).eval()
    for cache in speed_generation.CACHES.values():
        assert speed_generation.generating(peer, 3, 16, cache)().shape == (3, 17)


def test_large_pictures_are_measured_in_tiles_and_as_a_whole_and_put_into_the_table(tokenizer, colours, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tiny")
    settings = [f"tokenizer={tmp_path / 'tiny'}", f"data={colours}", "photograph_size=24", "image_sizes=[64,128]"]
    settings += ["tile_size=32", "tile_overlaps=[0,16]", "largest_whole=64"]
    speed_large.main(parse(LargeRun, settings), tmp_path)
    written = recorded(tmp_path, "speed_large")
    assert [(row["image_size"], row.get("tile_overlap")) for row in written["rows"]] == [
        *((64, None), (64, 0), (64, 16)),
        (128, 16),
    ]
    for row in written["rows"][1:3]:
        assert 0 < row["tokens_that_differ"] < 1
        assert row["error_at_seams"] > 0
    assert tables.markdown(speed_tables.large_rows(written)).count("\n") == 5


def test_a_mosaic_is_made_of_whole_photographs_from_the_first_again_where_they_do_not_suffice():
    photographs = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(-1, -1, 2, 2)
    assert speed_large.mosaic(photographs, 5)[0].tolist() == [
        *[[0, 0, 1, 1, 2]] * 2,
        *[[0, 0, 1, 1, 2]] * 2,
        [0, 0, 1, 1, 2],
    ]


def test_a_start_is_timed_in_a_process_of_its_own(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    torch_alone, library, load = speed_start.started("ours", str(tmp_path))
    assert torch_alone > library > 0  # the slow part of importing ours is torch
    assert load > 0
    with pytest.raises(RuntimeError, match="ours did not start:\n(?s:.*)has no config.json"):
        speed_start.started("ours", str(tmp_path / ".."))


def test_starts_are_summed_up_beyond_torch_round_by_round_and_put_into_the_table():
    seconds = {"ours": [[9.0, 1.0, 1.0], [3.0, 0.5, 0.5]], "diffusers": [[9.0, 3.0, 1.0], [3.0, 3.0, 3.0]]}
    each = speed_start.summaries(seconds)
    assert each["ours"]["beyond_torch"] == {"median": 1.5, "low": 1.0, "high": 2.0}
    assert each["diffusers"]["ours_is_faster"] == {"median": 4.0, "low": 2.0, "high": 6.0}
    rows = speed_tables.start_rows({"parameters": 70_000_000, "each": each})
    assert [row["ours is faster"] for row in rows] == ["-", "4x (2 to 6)"]


@pytest.mark.parametrize(("keep", "name"), [("true", "speed_codec_kept_memory"), ("false", "speed_codec")])
def test_the_codec_with_freed_memory_kept_has_a_record_of_its_own(keep, name, tmp_path, monkeypatch):
    kept = []  # here, or the tests after this one would keep theirs too
    monkeypatch.setattr(speed_codec, "keep_freed_memory", lambda: kept.append("asked for"))
    monkeypatch.setattr(speed_codec, "row_of", lambda *_: {})
    speed_codec.main(parse(CodecRun, [f"keep_memory={keep}"]), tmp_path)
    assert recorded(tmp_path, name)["settings"]["keep_memory"] == bool(kept) == (keep == "true")
    assert len(list((tmp_path / "benchmarks/results").iterdir())) == 1


@pytest.mark.parametrize("worth_bfloat16", [True, False])
def test_a_training_step_is_measured_beside_its_peer_and_put_into_the_table(
    worth_bfloat16, tmp_path, monkeypatch, fresh_accelerator
):
    monkeypatch.setattr(floors, "multiplies_bfloat16", lambda: worth_bfloat16)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model = "image_size=16 batch_size=4 num_workers=0 steps=10 model.autoencoder.base_channels=8"
    settings = [f"models=['{model}','{model} mixed_precision=bf16']", "images=8", "profiled_steps=2"]
    speed_training.main(parse(TrainingSpeedRun, [*settings, "seconds=0"]), tmp_path)
    written = recorded(tmp_path, "speed_training")
    assert [row["mixed_precision"] for row in written["rows"]] == ["no", "bf16"]
    for row in written["rows"]:
        peers = [name for name in speed_training.PEER_MODES if worth_bfloat16 or "bfloat16" not in name]
        assert row["images_per_second"].keys() == {"ours", *peers}
        assert row["fastest"]["median"] > 0
        assert sum(row["shares_of_time"].values()) == pytest.approx(1, abs=0.01)
        assert min(row["shares_of_time"].values()) > 0
    assert written["rows"][0]["operations_per_image"] == written["rows"][1]["operations_per_image"] > 0
    cells = speed_tables.training_rows(written)
    assert len(cells) == len(speed_tables.lesser_rows(written)) == 2
    assert "decoder" in cells[0]["share of time"]


def test_a_data_set_becomes_tokens_in_a_process_of_its_own_whose_time_is_told(tmp_path):
    settings = ["images=6", "side=24", "image_size=16", "batch_size=2", "rows_per_shard=3", "num_workers=0"]
    config = parse(DatasetRun, settings)
    ImageTokenizer(tiny_config()).save_pretrained(tmp_path / "tokenizer")
    speed = speed_dataset.end_to_end(speed_dataset.settings_of(config, tmp_path), 1, "cpu")
    assert 0 < speed < math.inf
    (store,) = (path.parent for path in tmp_path.glob("*/tokens.json"))
    assert TokenStore.open(store).index.num_rows == {"train": 3, "validation": 3}


@torch.no_grad()
def test_what_convolutions_hold_beside_their_weights_is_counted():
    convolution = WinogradConv2d(32, 16)
    assert speed_codec.second_kernels(convolution) == 0  # it has met no picture
    if LIBRARY is not None:
        convolution(torch.randn(1, 32, 16, 16))
        assert 36 * 32 * 16 * 4 <= speed_codec.second_kernels(convolution) <= 36 * (32 * 16 + LANES) * 4


def test_what_is_left_of_the_tokenizers_speed_is_put_into_the_table():
    share = stopwatch.ratio([9.0, 8.0], [10.0, 10.0])
    speeds = {name: stopwatch.spread([10.0]) for name in ("encode alone", "1 rank", "2 ranks")}
    written = {"settings": asdict(DatasetRun()), "images_per_second": speeds, "parameters": 11e6, "cores": 2}
    (cells,) = speed_tables.dataset_rows(written | {"share_of_encode_alone": share, "ranks_against_one": share})
    assert cells["share"] == "85% (80% to 90%)"


def test_the_work_of_a_call_is_its_products_by_type_and_all_that_it_reads_and_writes(monkeypatch):
    left, right = torch.randn(4, 6), torch.randn(6, 8)
    for times in (torch.matmul, product):  # of which the second is an operation of oneDNN's
        work = floors.work_of(lambda times=times: times(left, right).relu())
        assert work.operations == {torch.float32: 2 * 4 * 6 * 8}
        assert work.bytes == 4 * ((4 * 6 + 6 * 8 + 4 * 8) + (4 * 8 + 4 * 8))
    if LIBRARY is not None:
        convolution, norm = WinogradConv2d(LANES, 2 * LANES), torch.nn.GroupNorm(4, LANES)
        features = torch.randn(1, LANES, 16, 16, requires_grad=True)
        convolution(activated(norm, features.detach()))  # once for its kernel
        with torch.no_grad():
            work = floors.work_of(lambda: convolution(activated(norm, features)))
        of_kernel, of_picture = 36 * LANES * 2 * LANES, 256 * LANES
        assert work.operations == {torch.float32: 2 * 16 * of_kernel}
        assert work.bytes >= 4 * (of_kernel + 2 * of_picture + 3 * of_picture)
        both_ways = floors.work_of(lambda: convolution(features).sum().backward())
        assert both_ways.operations == {torch.float32: 3 * 2 * 16 * of_kernel}
    layer, inputs = torch.nn.Linear(6, 8, bias=False).bfloat16(), torch.randn(4, 6).bfloat16()
    both_ways = floors.work_of(lambda: layer(inputs).sum().backward())
    assert both_ways.operations == {torch.bfloat16: 2 * 2 * 4 * 6 * 8}  # the inputs need no gradient
    assert floors.work_of(lambda: left.T.reshape(24)[:3]).bytes == 2 * 4 * 24  # of views alone nothing is read
    table, chosen = torch.randn(100, 8), torch.tensor([3, 5])
    assert floors.work_of(lambda: table[chosen]).bytes == 2 * 4 * 2 * 8 + 8 * 2  # of a table what is looked up


def test_floors_are_what_the_rates_make_of_the_work():
    products = {"product, float32": [1.0, 0.5], "product, bfloat16": [0.25, 0.25]}
    rates, count = floors.machine_rates({"copy": [2.0, 1.0]} | products), 2 * 16**3
    expected = {"float32": count / 0.5, "bfloat16": count / 0.25, "bytes": 2 * 2**20}
    assert rates == pytest.approx(expected, 1e-3)
    work = floors.Work()
    work.operations.update({torch.float32: count, torch.bfloat16: 2 * count})
    work.bytes = 2**20
    allowed = floors.floors(work, rates, 3)
    assert allowed == pytest.approx({"arithmetic": 3 / 1.0, "memory": 3 / 0.5}, 1e-3)
    assert speed_tables.of_floors({"median": 1.0}, allowed) == "33%, 17%"


def test_methods_are_clocked_inside_the_block_alone():
    layer = torch.nn.Linear(2, 2)
    with clocked({"layer": [(layer, "forward")]}) as seconds:
        layer(torch.zeros(1, 2))
    told = dict(seconds)
    layer(torch.zeros(1, 2))
    assert seconds == told
    assert told["layer"] > 0


@pytest.mark.parametrize("kind", [CodecRun, DatasetRun, GenerationRun, LargeRun, SearchRun, StartRun, TrainingSpeedRun])
def test_fewer_rounds_than_a_median_needs_are_refused(kind):
    with pytest.raises(UserError, match="rounds=4 must be at least 5"):
        parse(kind, ["rounds=4"])


def test_all_are_called_in_turns_and_every_other_round_backwards():
    called: list[str] = []
    calls = {name: (lambda name=name: called.append(name)) for name in "abc"}
    found = stopwatch.interleaved(calls, rounds=3, seconds=0.0)
    assert "".join(called) == "aabbcc" + "abc" + "cba" + "abc"
    assert {name: len(each) for name, each in found.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize(("capability", "name"), [("AVX2", "speed_avx2_codec"), ("AVX512", "speed_codec")])
def test_a_processor_without_avx512_has_records_of_its_own(capability, name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    stopwatch.record_speed("codec", {}, tmp_path)
    assert [path.stem for path in (tmp_path / "benchmarks/results").iterdir()] == [name]


def test_a_speedup_is_of_each_round_and_stands_with_its_spread():
    assert stopwatch.speedup([1.0, 2.0, 1.0], [2.0, 6.0, 8.0]) == {"median": 3.0, "low": 2.0, "high": 8.0}


@pytest.mark.skipif(not stopwatch.CLEAR_REFS.exists(), reason="the system does not tell")
def test_the_peak_of_memory_is_what_a_call_adds_even_where_it_gives_it_back():
    size = 64 * 2**20
    added = stopwatch.peak_memory(lambda: torch.zeros(size // 4).add_(1).sum(), "cpu")
    assert 0.98 * size < added < 1.25 * size  # pages that others give back meanwhile count against it
    assert stopwatch.peak_memory(lambda: None, "cpu") < size / 16
