"""Saving, loading, fingerprinting and publishing, for any of our models; knows nothing of images.

A saved model is a folder: config.json (complete, with `format_version`), model.safetensors (float32) and README.md,
the model card. Loading is strict, and nothing is ever unpickled.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .unfilled import unfilled

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
SAMPLE_NAME = "sample.png"


def conform(value: Any, annotation: Any) -> Any:
    """The value as the type annotation wants it (an int as a float, a tuple as a list), else a TypeError."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        for option in options:
            try:
                return conform(value, option)
            except TypeError:
                continue
    elif origin is Literal:
        if value in options:
            return value
    elif origin in (list, Sequence) and isinstance(value, (list, tuple)):
        return [conform(item, options[0]) for item in value]
    elif annotation is float and type(value) in (int, float):
        return float(value)
    elif type(value) is (origin or annotation):
        return value
    raise TypeError(f"{value!r} is not {annotation}")


def checked(name: str, value: Any, annotation: Any) -> Any:
    """`conform`, with a ValueError that names the setting."""
    try:
        return conform(value, annotation)
    except TypeError:
        readable = annotation.__name__ if isinstance(annotation, type) else str(annotation).rpartition("abc.")[2]
        raise ValueError(f"{name}={value!r} must be of type {readable}") from None


def unknown_key(key: str, known: Iterable[str], where: str) -> ValueError:
    """The error for a key that nothing reads, naming the nearest right one."""
    hint = nearest(key, known) or f"the keys are {', '.join(sorted(known))}"
    return ValueError(f"unknown key {key!r} in {where}; {hint}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Whether the most alike of the known words was meant, as a question; empty where none is alike."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


@dataclass
class PretrainedConfig:
    """What config.json holds of one model class. A subclass is a dataclass whose values are plain JSON.

    A key added in a later format stands in `later_keys` with the version that added it and the value that reproduces
    the models saved before; a key of one choice of a table is written "quantizer.ema_vq.key".
    """

    format_version: ClassVar[int] = 1
    later_keys: ClassVar[dict[str, tuple[int, Any]]] = {}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for part in fields(self):
            setattr(self, part.name, checked(part.name, getattr(self, part.name), hints[part.name]))

    @classmethod
    def from_dict(cls, values: dict[str, Any], format_version: int, where: str) -> Self:
        """The config of a saved model; ValueError for an unknown or a missing key, a wrong type or a newer version."""
        if type(format_version) is not int or format_version < 1:
            raise ValueError(f"{where} has format_version {format_version!r}; the rule is a whole number from 1 on")
        if format_version > cls.format_version:
            raise ValueError(
                f"{where} has format_version {format_version} and this tokengrid reads up to {cls.format_version}; "
                f"upgrade with `pip install --upgrade tokengrid`"
            )
        values = cls.with_later_keys(values, format_version)
        known = [part.name for part in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_key(key, known, where)
        missing = [key for key in known if key not in values]
        if not missing:
            try:
                config = cls(**values)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            missing = lacking(values, asdict(config))
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}; a saved config is complete: restore or re-export it")
        return config

    @classmethod
    def with_later_keys(cls, values: dict[str, Any], format_version: int) -> dict[str, Any]:
        """A copy of saved values that has the keys of later formats."""
        values = json.loads(json.dumps(values))
        for path, (added_in, value) in cls.later_keys.items():
            holders, key = holders_of(values, path)
            for holder in holders if format_version < added_in else ():
                holder.setdefault(key, value)
        return values

    def identity(self) -> dict[str, Any]:
        """The values that tell models apart, the same in every format version that can express the model."""
        values = asdict(self)
        for path, (_, value) in self.later_keys.items():
            holders, key = holders_of(values, path)
            for holder in holders:
                if holder.get(key) == value:
                    del holder[key]
        return values


def holders_of(values: dict[str, Any], path: str) -> tuple[list[dict[str, Any]], str]:
    """The mappings that hold the key of a `later_keys` path: the choices of that name, inside one another too."""
    *outer, key = path.split(".")
    if not outer:
        return [values], key
    table, name = outer
    found, inside = [], [values.get(table)]
    while inside:
        mapping = inside.pop()
        if isinstance(mapping, dict):
            inside += mapping.values()
            found += [mapping] if mapping.get("name") == name else []
    return found, key


def lacking(values: dict[str, Any], complete: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of a complete mapping, at any depth, that `values` lacks."""
    missing = []
    for key, value in complete.items():
        if key not in values:
            missing.append(f"{prefix}{key}")
        elif isinstance(value, dict) and isinstance(values[key], dict):
            missing += lacking(values[key], value, f"{prefix}{key}.")
    return missing


@dataclass
class ModelCard:
    """What people must know of a published model. The first three are required to publish."""

    license: str | None = None  # of the weights, an identifier of the Hub such as "mit"
    data: str | None = None  # what it was trained on, a Hub id or a sentence
    data_license: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    evaluation: str = ""  # what the metrics were measured on, and how
    settings: str = ""  # YAML, every setting of the run
    sample: Path | None = None  # a PNG, copied beside the card

    def require_complete(self) -> None:
        """Raise ValueError unless licence, data and data licence are stated and the sample is there."""
        missing = [name for name in ("license", "data", "data_license") if not getattr(self, name)]
        if missing:
            raise ValueError(f"a published model states its {', '.join(missing)}; give them in its ModelCard")
        if self.sample and not Path(self.sample).is_file():
            raise ValueError(f"sample={self.sample} is no file; give the path of a PNG, or None")


class PretrainedModel(nn.Module):
    """A network with a config that can be saved, loaded, fingerprinted and published."""

    config_class: ClassVar[type[PretrainedConfig]]
    card_caption: ClassVar[str]  # of the sample picture
    card_tags: ClassVar[list[str]]
    card_usage: ClassVar[str]  # Python; {source} stands for the path or repo id

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def trusting(self) -> bool:
        """Whether values are taken as they come: in training on an accelerator, which waits for each look at them."""
        return self.training and self.device.type != "cpu"

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode inside the block: no dropout, and nothing that training gathers is touched."""
        modes = {module: module.training for module in self.modules()}  # some may be frozen in eval mode on purpose
        self.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the config and the float32 weights."""
        return self.hash_of(self.config.identity(), self.state_dict())

    @staticmethod
    def hash_of(values: dict[str, Any], tensors: dict[str, Tensor]) -> str:
        """sha256 over JSON values and the floating-point tensors, as float32, in the order of their names."""
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        for name, tensor in sorted(tensors.items()):
            if tensor.is_floating_point():
                digest.update(f"{name}{list(tensor.shape)}".encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path, card: ModelCard | None = None, source: str | None = None) -> None:
        """Write config.json, model.safetensors and README.md; all are written aside, then renamed when complete.

        `source` is what the card's example loads: a repo id, by default the folder's own name.
        """
        folder, card = Path(folder), card or ModelCard()
        folder.mkdir(parents=True, exist_ok=True)
        header = {"model": type(self).__name__, "format_version": self.config.format_version}
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        with ExitStack() as parts:  # nothing is renamed until everything is written, and the card is renamed last

            def part(name: str) -> Path:
                return parts.enter_context(written_whole(folder / name))

            part(CARD_NAME).write_text(self.render_card(card, source or folder.resolve().name), encoding="utf-8")
            if card.sample:
                shutil.copyfile(card.sample, part(SAMPLE_NAME))
            part(CONFIG_NAME).write_text(json.dumps(header | asdict(self.config), indent=2) + "\n", encoding="utf-8")
            save_file(weights, part(WEIGHTS_NAME), metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """A saved model from a folder, or from the Hub by repo id (from its cache without a connection), in eval mode.

        Raises FileNotFoundError where there is no such model, ValueError where its files are not what they must be.
        """
        folder = Path(path_or_repo).expanduser()
        if folder.is_file():
            raise FileNotFoundError(f"{path_or_repo} is a file; pass the folder of a saved model, {folder.parent}")
        if not folder.is_dir():
            folder = download(str(path_or_repo), revision, token, cache_dir)
        model, weights = cls.from_config_file(folder / CONFIG_NAME), folder / WEIGHTS_NAME
        if not weights.is_file():
            raise FileNotFoundError(f"{folder} has no {WEIGHTS_NAME}; a saved model has it beside {CONFIG_NAME}")
        tensors = read_tensors(weights)
        check_tensors(tensors, model.state_dict(), weights)
        return model.with_weights(tensors)

    def with_weights(self, tensors: dict[str, Tensor]) -> Self:
        """This model, its weights not yet there, in eval mode with copies of all of these tensors.

        Copies: safetensors maps the file, and what overwrites it in place would change the model under our hands.
        """
        own = {name: tensors[name].to(tensor.dtype, copy=True) for name, tensor in self.state_dict().items()}
        self.load_state_dict(own, assign=True)
        return self.eval()

    @classmethod
    def from_config_file(cls, path: Path) -> Self:
        """The model that a config.json describes, its weights not yet there (on the meta device)."""
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} has no {CONFIG_NAME}; pass the folder of a saved model")
        try:
            values = json.loads(path.read_text())
            name, version = values.pop("model"), values.pop("format_version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is not the config of a tokengrid model ({error!r})") from None
        if name not in [each.__name__ for each in cls.__mro__]:  # a subclass may add what changes nothing in the file
            raise ValueError(f"{path} describes a model of class {name}; load it with {name}.from_pretrained")
        config = cls.config_class.from_dict(values, version, str(path))
        return unfilled(lambda: cls(config))

    def push_to_hub(self, repo_id: str, card: ModelCard, private: bool | None = None, token: str | None = None) -> str:
        """Create the repository if it is not there and upload the model in one commit; returns the commit's address.

        The card must state licence, data and data licence. A failed upload leaves the repository as it was.
        """
        from huggingface_hub import HfApi  # here, as `download` says

        card.require_complete()
        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with its owner
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, card, source=repo_id)
            message = f"Upload {type(self).__name__}"
            return hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).commit_url

    def render_card(self, card: ModelCard, source: str) -> str:
        """README.md: the Hub's metadata, the sample, how to use it, the measured metrics, the settings."""
        from huggingface_hub import ModelCardData  # here, as `download` says

        data = [card.data] if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", card.data or "") else None
        metadata = ModelCardData(license=card.license, library_name="tokengrid", tags=self.card_tags, datasets=data)
        title = source.rpartition("/")[2]
        parts = [f"---\n{metadata.to_yaml()}\n---", f"# {title}"]
        parts.append(f"`{type(self).__name__}` of tokengrid, fingerprint `{self.fingerprint}`.")
        if card.sample:
            parts.append(f"![{self.card_caption}]({SAMPLE_NAME})")
        parts.append(f"```python\n{self.card_usage.format(source=source).strip()}\n```")
        if card.metrics:
            rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in card.metrics.items())
            parts.append(f"## Measured\n\n{card.evaluation}\n\n| measure | value |\n|---|---|\n{rows}")
        stated = {"Weights": card.license, "Trained on": card.data, "Data licence": card.data_license}
        parts.append("## Licence and data\n\n" + "\n".join(f"- {k}: {v or 'not stated'}" for k, v in stated.items()))
        if card.settings:
            parts.append(f"## Settings\n\n```yaml\n{card.settings.strip()}\n```")
        return "\n\n".join(parts) + "\n"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` once the block has ended well: a kill leaves the old file or the new."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # as the umask says; safetensors leaves its files readable by their owner alone
        yield part
        part.chmod(mode)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def download(repo_id: str, revision: str | None, token: str | None, cache_dir: str | Path | None) -> Path:
    """The folder in the Hub's cache that holds the model's files; FileNotFoundError naming both readings."""
    # Here, as the Hub's client takes longer to import than all of ours, and a model in a folder needs none.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        patterns = [CONFIG_NAME, WEIGHTS_NAME]
        folder = snapshot_download(
            repo_id, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=patterns
        )
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join([line for line in str(error).splitlines() if line][:2])  # the status, then what was missing
        where = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"{repo_id!r} is neither a folder here nor a model that could be read from the Hub{where} ({reason}); "
            f"check the spelling, the connection and the access token"
        ) from error
    if not (Path(folder) / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{repo_id!r} on the Hub has no {CONFIG_NAME}; pass the id of a tokengrid model")
    return Path(folder)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name; ValueError where it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch or save it again") from None


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError unless names and shapes agree."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its {CONFIG_NAME}: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} not expected {extra[:3]}"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(found[name].shape)} where {CONFIG_NAME} says {tuple(tensor.shape)}"
            )
