"""benchmarks/latents.py: its figures and pictures are those of the models that it trains."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from latent_pictures import BETWEEN, ENLARGED, GAP, Space, tiled
from PIL import Image
from shapes import FACTORS, SIDE, all_shapes

from tokenizer import ImageVAE
from train.config import UserError

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "latents.py"
spec = importlib.util.spec_from_file_location("latents_program", PROGRAM)  # tests/latents.py has the other name
latents = importlib.util.module_from_spec(spec)
spec.loader.exec_module(latents)
LatentsRun = latents.LatentsRun

SMALL = (
    "steps=2 batch_size=4 speed.threads=1 loss.sigma=0.1 data_options.eval_images=4 model.latent_dim=3 "
    "model.autoencoder.base_channels=8 model.autoencoder.patch_size=32 model.autoencoder.latent_channels=8"
)
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What the program writes of two weights of the KL."""
    root = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        latents.main("few", LatentsRun(betas=[0.5, 2.0], shared=SMALL), root)
    return root


def test_the_record_has_what_a_figure_needs_and_no_path(made):
    text = (made / "benchmarks/results/latents_few.json").read_text()
    recorded = json.loads(text)
    assert recorded["command"].startswith("python benchmarks/latents.py few")
    assert str(made) not in text
    assert [row["beta"] for row in recorded["models"]] == [0.5, 2.0]
    for row in recorded["models"]:
        assert 0 <= row["mig"] <= 1
        assert row["mig"] == pytest.approx(sum(row["gap_of_each_factor"].values()) / len(FACTORS))
        assert sum(row["kl_nats_of_each"]) == pytest.approx(row["kl_nats"], rel=1e-5)
        vae = ImageVAE.from_pretrained(made / "runs/few" / f"beta_{row['beta']:g}")
        assert vae.fingerprint == row["fingerprint"]
        assert vae.config.posterior["beta"] == row["beta"]


def test_the_pictures_are_there(made):
    sizes = {}
    for path in (made / "docs").glob("few_*.png"):
        with Image.open(path) as sheet:
            sizes[path.stem] = sheet.size
    assert sizes.keys() == {"few_traversals", "few_planes", "few_interpolations", "few_scatter"}
    side, beside = ENLARGED * SIDE + GAP, 12 * 13  # of the titles
    assert sizes["few_traversals"] == (beside + 9 * side, 2 * 3 * side)  # two models, three latents
    assert sizes["few_planes"] == (beside + 9 * side, 2 * 10 * side)
    assert sizes["few_interpolations"] == (beside + 9 * side, 3 * 2 * side)  # of pixels too


def test_a_traversal_moves_one_latent_and_an_interpolation_ends_at_the_codes(made):
    shapes = all_shapes()
    vae = ImageVAE.from_pretrained(made / "runs/few/beta_0.5")
    mean, log_variance = (each.flatten(1) for each in vae.moments(shapes.pixels[:50]))
    space = Space("", vae, shapes, mean, log_variance)
    assert sorted(space.order.tolist()) == [0, 1, 2]
    codes = space.moved(mean[7], 1, torch.tensor([-1.0, 0.0, 2.0]))
    assert torch.equal(codes[:, [0, 2]], mean[7, [0, 2]].expand(3, 2))
    torch.testing.assert_close(codes[:, 1], mean[:, 1].mean() + torch.tensor([-1.0, 0.0, 2.0]) * mean[:, 1].std())
    way = torch.lerp(mean[3], mean[7], BETWEEN[:, None])
    pictures = space.decode(way[None])[0]
    torch.testing.assert_close(pictures[[0, -1]], vae.decode(mean[[3, 7]][..., None, None]))


def test_a_sheet_has_each_picture_in_its_place():
    pictures = torch.rand(2, 3, 3, 4, 4)
    sheet, side = tiled(pictures), ENLARGED * 4 + GAP
    assert sheet.shape == (3, 2 * side, 3 * side)
    for row in range(2):
        for column in range(3):
            part = sheet[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            assert torch.equal(part[:, : 4 * ENLARGED : ENLARGED, : 4 * ENLARGED : ENLARGED], pictures[row, column])
            assert (part[:, 4 * ENLARGED :] == 1).all()
            assert (part[:, :, 4 * ENLARGED :] == 1).all()


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (
            SMALL.replace("patch_size=32", "patch_size=8"),
            "makes a grid of 4 x 4 of 3 latents; a global code",
        ),
        (SMALL.replace("latent_dim=3", "latent_dim=1"), "1 x 1 of 1 latents; a global code"),
        (SMALL + " stepz=3", "did you mean 'steps'"),
    ],
)
def test_what_is_no_global_code_is_refused_before_anything_is_written(shared, message, tmp_path):
    with pytest.raises(UserError, match=message):
        latents.main("few", LatentsRun(shared=shared), tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_are_refused():
    for betas in ([], [0.0, 1.0]):
        with pytest.raises(ValueError, match="betas=.* must hold weights above 0"):
            LatentsRun(betas=betas)


def test_half_a_file_of_pictures_is_not_taken_for_one(tmp_path, monkeypatch):
    def killed(self: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(latents.datasets.Dataset, "to_parquet", killed)
    with pytest.raises(KeyboardInterrupt):
        latents.write_data(all_shapes(), tmp_path / "shapes")
    assert not list((tmp_path / "shapes").iterdir())
