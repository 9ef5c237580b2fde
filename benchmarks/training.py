"""Run a training program once, timed, and record it: python benchmarks/training.py NAME PROGRAM [arguments].

PROGRAM is a file of train/, the arguments are its own. Writes results/PROGRAM_NAME.json (command, commit, hardware,
versions, seconds, figures). With data=COPY named=HUB_ID a copy on disk is read and the Hub id recorded, with the hash
of the copy's files. Nothing else should run on the machine meanwhile.
"""

import hashlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from recording import ROOT, record
from trained_tokenizers import log_of

from train.config import UserError, parse
from train.settings import PriorRun, StoreRun, TokenizerRun, VAERun
from train.token_store import INDEX_NAME

SETTINGS = {"vqvae": TokenizerRun, "vae": VAERun, "encode_dataset": StoreRun, "token_prior": PriorRun}


def main(name: str, program: str, arguments: list[str]) -> None:
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith("named=")]
    arguments = [argument for argument in arguments if not argument.startswith("named=")]
    stem = Path(program).stem
    config = parse(SETTINGS[stem], arguments)
    folder, made = ROOT / config.output_dir, [config.output_dir]
    if stem == "token_prior" and config.tokens is None:
        made.append(StoreRun().output_dir)  # which the program writes first
    for path in (ROOT / each for each in made):
        if path.exists():
            raise UserError(f"{path} is there already; a run is timed from its start, move it away")
    data_hash = hash_of_files(config.data) if named else None
    begun = time.perf_counter()
    done = subprocess.run(["accelerate", "launch", f"train/{stem}.py", *arguments], cwd=ROOT)
    if done.returncode:
        raise UserError(f"train/{stem}.py failed (exit code {done.returncode}); its own words stand above")
    figures = {"seconds": round(time.perf_counter() - begun, 1), **READERS[stem](folder)}
    if named:
        figures |= {"data": named[0], "data_sha256": data_hash}
        arguments = [argument for argument in arguments if not argument.startswith("data=")]
    command = shlex.join(["accelerate", "launch", f"train/{stem}.py", *arguments])
    record(f"{stem}_{name}", {"command": command, **figures})


def autoencoder_figures(folder: Path) -> dict[str, object]:
    """The last evaluation of a run of a model of images, and its best speed."""
    records = log_of(folder)
    speeds = [each["images_per_second"] for each in records if "images_per_second" in each]
    return {"metrics": [each for each in records if "psnr" in each][-1], "images_per_second": max(speeds)}


def store_figures(folder: Path) -> dict[str, object]:
    """How many rows a token store has."""
    index = json.loads((folder / INDEX_NAME).read_text())
    return {"metrics": {key: index[key] for key in ("num_rows", "tokens_per_image", "vocab_size")}}


def prior_figures(folder: Path) -> dict[str, object]:
    """The best evaluation of a prior's run, which is that of the model it exports, and its best speed."""
    records = log_of(folder)
    evaluations = [each for each in records if "bits_per_token" in each]
    speeds = [each["tokens_per_second"] for each in records if "tokens_per_second" in each]
    return {"metrics": min(evaluations, key=lambda each: each["bits_per_token"]), "tokens_per_second": max(speeds)}


READERS = {
    "vqvae": autoencoder_figures,
    "vae": autoencoder_figures,
    "encode_dataset": store_figures,
    "token_prior": prior_figures,
}


def hash_of_files(data: str) -> str:
    """sha256 over a file, or over the files of a folder in the order of their names; UserError where there is none."""
    found, digest = ROOT / data, hashlib.sha256()
    paths = [found] if found.is_file() else sorted(path for path in found.rglob("*") if path.is_file())
    if not paths:
        raise UserError(f"data={data} is no file or folder of files, and named=... records the hash of one")
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    if len(sys.argv) < 3 or Path(sys.argv[2]).stem not in SETTINGS:
        sys.exit(__doc__)
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
    except UserError as error:
        sys.exit(f"error: {error}")
