"""The folder that a program makes: who may use it, and checkpoints that a kill at any moment cannot spoil.

run.yaml            every setting
checkpoints/step_N  what Accelerate saves (weights, optimizer, scaler, RNG, averaged weights), state_RANK.json
checkpoints/best_N.safetensors   the weights of the best evaluation, where a program keeps them
config.json, model.safetensors, README.md   the finished model
"""

import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml
from accelerate import Accelerator
from safetensors import SafetensorError

from tokenizer.pretrained import CARD_NAME, PretrainedConfig, written_whole

from .config import RunError, UserError, differences, layered, to_yaml
from .settings import PublishedOutput, TrainingRun

SETTINGS_NAME = "run.yaml"
TELLING_SETTINGS = ("model", "views", "tokens")  # by which the settings of one program differ from those of another


class OutputFolder:
    """What one program makes; `check` before anything is built, `claim` once everything else is known to be right."""

    last_file: ClassVar[str]  # its presence says that the program has come to its end

    def __init__(self, config: PublishedOutput):
        self.config, self.path = config, Path(config.output_dir).expanduser()

    def check(self) -> None:
        """Raise UserError where the folder holds something made with other settings, or things that are not ours."""
        if not (self.path / SETTINGS_NAME).is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(f"output_dir={self.path} exists and is no run of ours; choose another output_dir=...")
            return
        found = differences(asdict(self.config), asdict(self.recorded())).items()
        changed = [f"{key}={a!r} (there {b!r})" for key, (a, b) in found if not self.is_free(key)]
        if changed:
            raise UserError(
                f"output_dir={self.path} holds a run with other settings: {', '.join(changed)}; "
                f"start this one elsewhere with output_dir=..., or repeat the settings of that one"
            )

    def recorded(self) -> PublishedOutput:
        """The settings in the folder; one that its version did not know yet has the value that it stood for."""
        known = {part.name for part in fields(self.config)}
        try:
            theirs = yaml.safe_load((self.path / SETTINGS_NAME).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            theirs = None
        if not isinstance(theirs, dict) or any((key in theirs) != (key in known) for key in TELLING_SETTINGS):
            raise UserError(f"output_dir={self.path} holds what another program made; choose another output_dir=...")
        theirs = {key: value for key, value in theirs.items() if key in known}
        model = getattr(self.config, "model", None)
        if isinstance(model, PretrainedConfig):
            theirs["model"] = model.with_later_keys(theirs["model"], format_version=1)
        try:
            return layered(type(self.config), [theirs])
        except ValueError as error:
            raise UserError(
                f"output_dir={self.path} holds a run that this version cannot go on with ({error}); "
                f"start this one elsewhere with output_dir=..."
            ) from None

    def is_free(self, key: str) -> bool:
        """Whether a dotted key, or a group that it is in, leaves the result as it is."""
        return any(f"{key}.".startswith(f"{free}.") for free in self.config.free_settings)

    def claim(self, accelerator: Accelerator) -> None:
        """Make the folder this run's own, without what a killed one was writing; UserError where that cannot be."""
        if accelerator.is_main_process:
            try:
                for leftover in self.path.rglob(".*.part"):
                    leftover.unlink()
                self.path.mkdir(parents=True, exist_ok=True)
                with written_whole(self.path / SETTINGS_NAME) as part:
                    part.write_text(to_yaml(self.config))
            except OSError as error:
                raise UserError(f"output_dir={self.path} cannot be made ({error.strerror}); choose another") from None
        accelerator.wait_for_everyone()

    @property
    def finished(self) -> bool:
        """Whether the program has come to its end."""
        return (self.path / self.last_file).is_file()


class RunFolder(OutputFolder):
    """One training run on disk, with its checkpoints."""

    last_file = CARD_NAME

    def __init__(self, config: TrainingRun):
        super().__init__(config)
        self.checkpoints = self.path / "checkpoints"

    def claim(self, accelerator: Accelerator) -> None:
        """Make the folder this run's own, without the checkpoint that a killed one was saving."""
        super().claim(accelerator)
        if accelerator.is_main_process:
            self.checkpoints.mkdir(exist_ok=True)
            for leftover in self.checkpoints.glob(".*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        accelerator.wait_for_everyone()

    def sample(self, step: int) -> Path:
        """Where the sample pictures of a step are drawn."""
        return self.path / "samples" / f"step_{step:06d}.png"

    def saved_steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.checkpoints.glob("step_*"))

    def save(self, accelerator: Accelerator, step: int, kept: dict[str, Any]) -> None:
        """Write a checkpoint aside, rename it when it is whole on every rank, and delete those that are too old.

        `kept` is what this rank must know besides to go on, as JSON.
        """
        part, whole = self.checkpoints / f".step_{step}", self.checkpoints / f"step_{step}"
        try:
            accelerator.save_state(str(part))
            state = {"step": step, "kept": kept}
            (part / rank_file(accelerator)).write_text(json.dumps(state))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                flush_to_disk(part)
                os.replace(part, whole)
                for old in self.saved_steps()[: -self.config.keep_checkpoints]:
                    discarded = self.checkpoints / f".old_{old}"  # a kill here leaves no half-deleted checkpoint
                    os.replace(self.checkpoints / f"step_{old}", discarded)
                    shutil.rmtree(discarded)
        except (OSError, RuntimeError, SafetensorError) as error:
            good = f"step_{self.saved_steps()[-1]} is the last good one" if self.saved_steps() else "there is none yet"
            raise RunError(
                f"the checkpoint of step {step} could not be written ({' '.join(str(error).split())[:200]}); {good}; "
                f"make room in {self.checkpoints} and give the same command again"
            ) from error
        accelerator.wait_for_everyone()

    def kept(self, accelerator: Accelerator) -> dict[str, Any]:
        """What this rank kept with the newest checkpoint, which is not restored; {} where there is none."""
        steps = self.saved_steps()
        path = self.checkpoints / f"step_{steps[-1]}" / rank_file(accelerator) if steps else None
        return json.loads(path.read_text())["kept"] if path and path.is_file() else {}

    def load(self, accelerator: Accelerator) -> tuple[int, dict[str, Any]]:
        """Restore the newest checkpoint: the number of steps done and what was kept besides; (0, {}) without one."""
        steps = self.saved_steps()
        if not steps:
            return 0, {}
        newest = self.checkpoints / f"step_{steps[-1]}"
        saved_by = len(list(newest.glob("state_*.json")))
        if saved_by != accelerator.num_processes:
            raise UserError(
                f"{newest} was saved by {saved_by} processes and this run has {accelerator.num_processes}; "
                f"the order of the data depends on it: give the same number, or another output_dir=..."
            )
        accelerator.load_state(str(newest))
        state = json.loads((newest / rank_file(accelerator)).read_text())
        return state["step"], state["kept"]

    def best(self, step: int) -> Path:
        """Where the weights of an evaluation that was the best so far are kept."""
        return self.checkpoints / f"best_{step}.safetensors"

    def forget_best_but(self, step: int) -> None:
        """Delete the weights of earlier best evaluations, once a checkpoint names that of a step as the best."""
        for path in self.checkpoints.glob("best_*.safetensors"):
            if path != self.best(step):
                path.unlink()


def rank_file(accelerator: Accelerator) -> str:
    """Where a rank keeps its own state."""
    return f"state_{accelerator.process_index}.json"


def flush_to_disk(folder: Path) -> None:
    """fsync every file, so that a rename never precedes the data on a crash of the machine."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
