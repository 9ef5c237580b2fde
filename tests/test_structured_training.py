"""The programs with tokens of every shape: a tokenizer trained, resumed and loaded, its token store, and the prior."""

import pytest
import torch
from accelerate.state import AcceleratorState
from processes import assert_equal_runs, records
from test_vqvae import TINY

from tokenizer import ImageTokenizer
from train.config import parse
from train.settings import TokenizerRun
from train.vqvae import main

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

BESIDE_THE_QUANTIZER = [each for each in TINY if not each.startswith(("model.quantizer.", "steps=", "eval_every="))]
STRUCTURES = {
    "residual": ["depth=3", "quantizer_dropout=0.5"],
    "grouped": ["groups=2", "each.name=residual", "each.depth=2", "each.each.codebook_size=8"],
    "multiscale": ["scales=[1,2,5,8]", "num_convolutions=2"],
}
SHAPES = {"residual": (8, 8, 3), "grouped": (8, 8, 4), "multiscale": (1 + 4 + 25 + 64,)}


def settings(name: str, folder: str, output: object, *more: str) -> list[str]:
    own = [f"model.quantizer.{each}" for each in (f"name={name}", *STRUCTURES[name])]
    size = [] if name == "grouped" else ["model.quantizer.each.codebook_size=8"]
    return [*BESIDE_THE_QUANTIZER, *own, *size, f"data={folder}", f"output_dir={output}", "num_workers=0", *more]


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
    from train import vqvae

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    arguments = settings(name, picture_folder, tmp_path / "run", "steps=3", "eval_every=3")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(vqvae, "evaluate", interrupt)  # after the last step was taken, before its checkpoint
        train(arguments)
    train(arguments)
    assert_equal_runs(folder, tmp_path / "run")
