"""The programs with tokens of every shape: a tokenizer trained, resumed and loaded, its token store, and the prior."""

import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from processes import TWO_RANKS, assert_close_runs, assert_equal_runs, records, run
from test_token_prior import TINY as TINY_PRIOR
from test_vqvae import PROGRAM
from tiny_runs import WITH_ANY_QUANTIZER

from prior import AutoregressivePrior
from tokenizer import ImageTokenizer
from train import token_prior
from train.config import parse
from train.encode_dataset import encode_dataset
from train.evaluation import TokenizerExaminer
from train.settings import PriorRun, StoreRun, TokenizerRun
from train.token_store import TokenStore
from train.vqvae import main

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

STRUCTURES = {
    "residual": ["depth=3", "quantizer_dropout=0.5"],
    "grouped": ["groups=2", "each.name=residual", "each.depth=2", "each.each.codebook_size=8"],
    "multiscale": ["scales=[1,2,5,8]", "num_convolutions=2"],
    "hierarchical": ["width=8"],
}
SHAPES = {"residual": (8, 8, 3), "grouped": (8, 8, 4), "multiscale": (1 + 4 + 25 + 64,), "hierarchical": (16 + 64,)}


def settings(name: str, folder: str, output: object, *more: str) -> list[str]:
    own = [f"model.quantizer.{each}" for each in (f"name={name}", *STRUCTURES[name])]
    size = [] if name == "grouped" else ["model.quantizer.each.codebook_size=8"]
    return [*WITH_ANY_QUANTIZER, *own, *size, f"data={folder}", f"output_dir={output}", "num_workers=0", *more]


def train(arguments: list[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    main(parse(TokenizerRun, arguments))


@pytest.fixture(scope="module", params=STRUCTURES)
def trained(request, picture_folder, tmp_path_factory):
    """The name of a structure and the folder of a run of three steps."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train(settings(request.param, picture_folder, folder, "steps=3", "eval_every=3"))
    return request.param, folder


def test_a_run_trains_saves_loads_encodes_and_decodes(trained):
    name, folder = trained
    tokenizer, images = ImageTokenizer.from_pretrained(folder), torch.rand(2, 3, 16, 16)
    assert tokenizer.quantizer.placed
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, *SHAPES[name])
    assert torch.equal(tokenizer.decode(tokens), tokenizer(images).reconstructions.clamp(0, 1))
    (evaluated,) = (record for record in records(folder) if "psnr" in record)
    assert evaluated["bits_per_pixel"] == tokens[0].numel() * 3 / 256  # of 8 codes each
    assert evaluated["tokens_per_code"] >= 20
    assert 0 < evaluated["usage"] <= 1
    logged = [record for record in records(folder) if "loss" in record]
    assert all("commitment" in record for record in logged)
    assert ("pyramid" in logged[-1]) == (name == "multiscale")


def test_an_interrupted_run_goes_on_to_the_same_end(trained, picture_folder, tmp_path, monkeypatch):
    name, folder = trained

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    arguments = settings(name, picture_folder, tmp_path / "run", "steps=3", "eval_every=3")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(TokenizerExaminer, "evaluate", interrupt)  # after the last step was taken, before its checkpoint
        train(arguments)
    train(arguments)
    assert_equal_runs(folder, tmp_path / "run")


def test_two_ranks_equal_one_with_twice_the_batch(picture_folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alike = ["steps=3", "eval_every=3", "model.quantizer.each.placement=0.5"]  # a step before, with idle parameters
    train(settings("multiscale", picture_folder, one, *alike, "batch_size=8"))
    done = run([sys.executable, *TWO_RANKS, PROGRAM, *settings("multiscale", picture_folder, two, *alike)])
    assert done.returncode == 0, done.stderr
    assert_close_runs(one, two)


def test_its_tokens_go_through_a_store_and_a_prior_back_into_pictures(trained, picture_folder, tmp_path, monkeypatch):
    name, folder = trained
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = ImageTokenizer.from_pretrained(folder)
    given = [f"tokenizer={folder}", f"data={picture_folder}", f"output_dir={tmp_path / 'tokens'}", "image_size=16"]
    AcceleratorState._reset_state(reset_partial_state=True)
    encode_dataset(parse(StoreRun, [*given, "num_workers=0", "eval_split=train"]), Accelerator(cpu=True))
    store = TokenStore.open(tmp_path / "tokens")
    assert store.stamp.token_shape == SHAPES[name]
    assert store.stamp.num_codebooks == tokenizer.num_codebooks
    assert store.stamp.grids == [list(grid) for grid in tokenizer.grids(16)]
    rows = store.rows("train")[:4]
    for tokens, key in zip(torch.tensor(rows["tokens"].astype(int)), rows["key"], strict=True):
        with Image.open(Path(picture_folder, key)) as original:
            expected = tokenizer.encode(original, resize=16)
        assert torch.equal(tokens.view(1, *store.stamp.token_shape), expected)

    network = [each for each in TINY_PRIOR if not each.startswith(("steps=", "eval_every=", "save_every="))]
    given = [f"tokens={tmp_path / 'tokens'}", f"tokenizer={folder}", f"output_dir={tmp_path / 'prior'}", "steps=2"]
    AcceleratorState._reset_state(reset_partial_state=True)
    token_prior.main(parse(PriorRun, [*network, *given]))
    prior = AutoregressivePrior.from_pretrained(tmp_path / "prior")
    drawn = prior.generate(num_samples=2, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (2, *SHAPES[name])
    assert tokenizer.decode(drawn).shape == (2, 3, 16, 16)
