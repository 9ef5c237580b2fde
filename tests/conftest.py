"""Shared pieces of the tests: tiny real models and pictures."""

import os
import sys
from pathlib import Path

# What is tested, here and in every process that a test starts, is the code beside the tests, whatever is installed; a
# program launched by path finds its siblings, and so do its tests.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# Before any library is imported, and for every process that a test starts: no network, and threads that never fight.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # 0 in the processes that talk to a server of ours
os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import hypothesis
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from tokenizer import ImageTokenizer, TokenizerConfig, image_model

torch.set_num_threads(1)
hypothesis.settings.register_profile("without_deadline", deadline=None)  # a slow machine breaks no promise
hypothesis.settings.load_profile("without_deadline")

SQUEEZE_FILE = "squeezenet1_1-b8a52dc0.pth"  # as torchvision names it

TINY_AUTOENCODER = {
    "name": "convolutional",
    "patch_size": 1,
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "latent_channels": 8,
    "norm_groups": 4,
}


def tiny_config(**changes) -> TokenizerConfig:
    """A tokenizer of a few thousand parameters that halves the side; changes are fields of TokenizerConfig."""
    fields = {
        "codebook_dim": 4,
        "autoencoder": TINY_AUTOENCODER,
        "quantizer": {"name": "ema_vq", "codebook_size": 32},
    }
    return TokenizerConfig(**(fields | changes))


@pytest.fixture
def tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(tiny_config()).eval()


def picture(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    """A smooth colour picture, so that codes and crops mean something."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory) -> str:
    """Sixteen small PNG files in one folder."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(16):
        picture(index, width=24 + index % 3, height=20 + index % 4).save(folder / f"{index:02d}.png")
    return str(folder)


def fill(folder: Path, num_images: int, first: int = 0) -> None:
    """So many PNG files of different sizes, numbered from `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + num_images):
        picture(number, 12 + number % 5, 13).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory) -> Path:
    """Two classes, 14 training and 5 validation images."""
    folder = tmp_path_factory.mktemp("two_classes")
    for split, num_images in (("train", 7), ("validation", 2)):
        fill(folder / split / "cat", num_images)
        fill(folder / split / "dog", num_images + (split == "validation"), first=20)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> str:
    """The folder of a tokenizer, which halves the side."""
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    ImageTokenizer(tiny_config()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """A cache of `datasets` for one file of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))  # of the processes that tests start
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # 5 s for each epoch
        yield


@pytest.fixture(autouse=True)
def with_bfloat16(monkeypatch):
    """The fast mode is tested as on a processor where bfloat16 is faster, wherever this is."""
    monkeypatch.setattr(image_model, "bfloat16_is_faster", lambda: True)


@pytest.fixture(scope="module")
def one_thread():
    """Tensors of a few numbers: a second thread costs more than it does."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps its view of the process; a test that runs a program in this one starts and leaves it clean."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    """A torch home without any weights, on a machine that reaches no server."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def squeeze_home(empty_home):
    """The same with made-up weights where LPIPS looks for those of SqueezeNet."""
    import torchvision  # only the tests of losses need it

    torch.manual_seed(7)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), empty_home / SQUEEZE_FILE)
    return empty_home


@pytest.fixture(scope="session")
def mobilenet_file(tmp_path_factory) -> str:
    """Made-up weights of the MobileNetV2 that judges."""
    from torchvision.models import mobilenet_v2

    path = tmp_path_factory.mktemp("mobilenet") / "mobilenet_v2.pth"
    torch.manual_seed(7)
    network = mobilenet_v2(num_classes=1001)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # after one batch its features are neither all nought nor all saturated
    network(torch.rand(8, 3, 64, 64))
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """A folder of 40 training and 8 test pictures of 32 pixels."""
    folder = tmp_path_factory.mktemp("colours")
    for split, count in (("train", 40), ("test", 8)):
        (folder / split).mkdir()
        for index in range(count):
            picture(index, 32, 32).save(folder / split / f"{index:02d}.png")
    return folder


@pytest.fixture
def tiny_preset(tmp_path) -> Path:
    """Settings of train/vqvae.py for two steps on `colours`."""
    autoencoder = {"name": "convolutional", "base_channels": 8, "latent_channels": 8}
    model = {"autoencoder": autoencoder, "quantizer": {"name": "ema_vq", "codebook_size": 16}}
    settings = {"image_size": 32, "steps": 2, "batch_size": 4, "num_workers": 0, "model": model}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
