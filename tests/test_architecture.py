"""Who may import whom, what an import may do, and how large a file may grow."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import tokenizer

ROOT = Path(__file__).parents[1]
PACKAGES = ["tokenizer", "prior", "train", "benchmarks"]
FILES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
OURS_ALLOWED = {
    "tokenizer": [],  # itself relatively, so that the folder can be copied under another name
    "prior": ["tokenizer.pretrained", "tokenizer.products", "tokenizer.processor", "tokenizer.kernels"],
    "train": ["tokenizer", "prior", "train"],
    "benchmarks": ["tokenizer", "prior", "train", "benchmarks"],
}
OTHERS_ALLOWED = {
    "tokenizer": {"torch", "einops", "numpy", "PIL", "safetensors", "huggingface_hub"},
    "prior": {"torch", "einops", "numpy", "safetensors", "huggingface_hub", "tqdm"},
}
NOT_NEEDED = [
    *("accelerate", "datasets", "lpips", "omegaconf", "skimage", "sklearn", "tensorboard", "torchvision", "wandb"),
    *("diffusers", "matplotlib", "pandas", "pyarrow", "scipy", "torch_fidelity", "transformers"),
]
SLOW = ["torch._dynamo", "torch._inductor", "sympy", "huggingface_hub"]  # each takes longer to import than ours


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports by their absolute names, wherever in the file; relative ones are left out."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level < len(path.parts), f"{path}: a relative import leaves the package"
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_in_the_allowed_directions(path):
    for name in imported(path):
        package = name.partition(".")[0]
        if package in PACKAGES:
            allowed = OURS_ALLOWED[path.parts[0]]
            assert any(name == each or name.startswith(f"{each}.") for each in allowed), f"{path} imports {name}"
        elif path.parts[0] in OTHERS_ALLOWED and package not in sys.stdlib_module_names:
            assert package in OTHERS_ALLOWED[path.parts[0]], f"{path} imports {name}"


def distributions_needed(name: str, found: set[str]) -> set[str]:
    """The installed distributions that this one requires, with any of its extras, all the way down."""
    for requirement in metadata.requires(name) or []:
        required = re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")
        if required not in found and any(metadata.distributions(name=required)):
            found.add(required)
            distributions_needed(required, found)
    return found


def test_no_program_bears_the_name_of_something_that_is_imported():
    needed = distributions_needed("tokengrid", set())
    taken = sys.stdlib_module_names | set(PACKAGES)
    for module, distributions in metadata.packages_distributions().items():
        if needed & {name.lower().replace("_", "-") for name in distributions}:
            taken |= {module}
    assert {"torch", "PIL", "logging", "tokenizer"} <= taken
    programs = [path for path in FILES if path.parts[0] in ("train", "benchmarks") and path.stem != "__init__"]
    assert [str(path) for path in programs if path.stem in taken] == []  # launched by path, its folder comes first


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_is_longer_than_400_lines(path):
    assert len((ROOT / path).read_text().splitlines()) <= 400


IMPORT_AND_REPORT = """
import json, random, sys

class WithoutThem:
    "A finder of modules to which those not needed look as if they were not installed."
    asked = []
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in NOT_NEEDED:
            return self.finder.find_spec(name, path, target)
        self.asked.append(name)
    def __getattr__(self, name):
        return getattr(self.finder, name)  # importlib.metadata asks finders too

library, NOT_NEEDED, SLOW = json.loads(sys.argv[1])
sys.meta_path[:] = [WithoutThem(finder) for finder in sys.meta_path]
import numpy, torch

def functions():
    owners = [torch, torch.Tensor, torch.nn.functional, torch.nn.init, torch.nn.Module]
    owners += [each for each in vars(torch.nn).values() if isinstance(each, type)]
    return {(owner.__name__, name): value for owner in owners for name, value in vars(owner).items() if callable(value)}

def generators():
    return [random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()]

numpy.random.seed(0)
before, drawn = functions(), generators()
WithoutThem.asked.clear()
__import__(library)
after = functions()
print(json.dumps({
    "asked for": sorted(set(WithoutThem.asked)),
    "slow to import": [name for name in SLOW if name in sys.modules],
    "generators moved": drawn != generators(),
    "functions replaced": [key for key, value in before.items() if after.get(key) is not value],
}))
"""


@pytest.fixture(scope="module", params=["tokenizer", "prior"])
def report(request) -> dict:
    """What importing a library did, in a process where nothing can be imported that it does not need."""
    command = [sys.executable, "-c", IMPORT_AND_REPORT, json.dumps([request.param, NOT_NEEDED, SLOW])]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_a_library_imports_without_the_extras_and_does_not_even_look_for_them(report):
    assert report["asked for"] == []


def test_importing_a_library_imports_neither_the_compiler_nor_the_client_of_the_hub(report):
    assert report["slow to import"] == []


def test_importing_a_library_leaves_the_random_generators_alone(report):
    assert not report["generators moved"]


def test_importing_a_library_leaves_torch_as_it_is(report):
    assert report["functions replaced"] == []


def test_the_public_names_are_these():
    assert sorted(tokenizer.__all__) == [
        "ImageTokenizer",
        "ImageVAE",
        "ModelCard",
        "POSTERIORS",
        "QUANTIZERS",
        "Quantizer",
        "QuantizerOutput",
        "TokenizerConfig",
        "TokenizerOutput",
        "VAEConfig",
        "VAEOutput",
    ]
    public = {name for name, value in vars(tokenizer).items() if not name.startswith("_")}
    modules = {path.stem for path in FILES if path.parent == Path("tokenizer")}
    modules |= {"kernels", "posteriors", "quantizers"}
    assert public - modules == set(tokenizer.__all__)
