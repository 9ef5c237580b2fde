"""Saving, strict loading, fingerprints, publishing; a story with the Hub runs in a process of its own."""

import io
import json
import os
import runpy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import error_of, in_own_process, serve_hub
from huggingface_hub import HfApi, RepoCard, hf_hub_download
from PIL import Image
from safetensors.torch import load_file, save_file

from tokenizer import ImageTokenizer, ModelCard, TokenizerConfig
from tokenizer.pretrained import holders_of

load = ImageTokenizer.from_pretrained
REPO, TOKEN = "org/tiny", "hf_right"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
ENCODER, DECODER = "autoencoder.encoder.conv_in.weight", "autoencoder.decoder.conv_in.weight"


def tiny_model(seed: int = 0, normalize: bool = False, **settings: Any) -> ImageTokenizer:
    torch.manual_seed(seed)
    autoencoder = {"name": "convolutional", "base_channels": 8, "channel_multipliers": [1, 2], "latent_channels": 8}
    quantizer = {"name": "ema_vq", "codebook_size": 16, "normalize": normalize}
    return ImageTokenizer(TokenizerConfig(codebook_dim=4, autoencoder=autoencoder, quantizer=quantizer, **settings))


def card(**changes: Any) -> ModelCard:
    stated = {"license": "mit", "data": "org/faces", "data_license": "cc0-1.0", "metrics": {"psnr": 21.5}}
    return ModelCard(**stated | {"evaluation": "64 held-out faces", "settings": "steps: 10"} | changes)


def facts(model: ImageTokenizer) -> dict[str, Any]:
    """What must survive a journey: the fingerprints, and the tokens and images of two pictures."""
    generator = torch.Generator().manual_seed(5)
    tokens = model.encode(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator))
    prints = {"fingerprint": model.fingerprint, "decoder_fingerprint": model.decoder_fingerprint}
    return prints | {"tokens": tokens.tolist(), "images": model.decode(tokens).tolist()}


def publishing_story() -> dict[str, Any]:
    """Publish, load back, run the card's code; publish another, refused once and then accepted; lose the token."""
    model, newer = tiny_model(0), tiny_model(1)
    picture = Image.radial_gradient("L").resize((16, 16)).convert("RGB")
    picture.save("picture.png")
    picture.save("picture.jpg")  # which the card's code opens
    seen = {"model": facts(model), "newer": facts(newer)}
    seen["address"] = model.push_to_hub(REPO, card(sample=Path("picture.png")))
    seen["loaded"] = facts(load(REPO))
    readme = Path(hf_hub_download(REPO, "README.md")).read_text()
    Path("example.py").write_text(readme.split("```")[1].removeprefix("python"))
    seen["example"] = runpy.run_path("example.py")["tokens"].tolist()
    seen["by hand"] = model.encode(Image.open("picture.jpg")).tolist()
    seen["refusal"] = error_of(lambda: newer.push_to_hub(REPO, card()))
    seen["refused"] = [HfApi().model_info(REPO).sha, facts(load(REPO))]
    seen["second try"] = [newer.push_to_hub(REPO, card()), facts(load(REPO))]
    seen["first commit"] = facts(load(REPO, revision=seen["address"].rpartition("/")[2]))
    seen["unknown"] = error_of(lambda: load("org/unknown"))
    seen["revision"] = error_of(lambda: load(REPO, revision="v9"))
    seen["empty"] = error_of(lambda: load(HfApi().create_repo("org/empty").repo_id))
    seen["no owner"] = error_of(lambda: model.push_to_hub("bare", card()))
    seen["wrong token"] = error_of(lambda: model.push_to_hub("org/forbidden", card(), token="hf_wrong"))
    del os.environ["HF_TOKEN"]  # which the client reads at each call
    seen["no token"] = error_of(lambda: model.push_to_hub("org/forbidden", card()))
    model.push_to_hub("org/secret", card(), private=True, token=TOKEN)
    seen["secret"] = error_of(lambda: load("org/secret"))
    seen["told"] = facts(load("org/secret", token=TOKEN, cache_dir="elsewhere"))
    seen["fetched"] = sorted(path.name for path in Path("elsewhere").rglob("snapshots/*/*"))
    return seen


def hubless_story() -> dict[str, Any]:
    """Load what the cache holds and what it does not hold; push with cards that lack something."""
    seen = {"loaded": facts(load(REPO)), "never cached": error_of(lambda: load("org/never-cached"))}
    for name in ("license", "data", "data_license"):
        seen[name] = error_of(lambda name=name: tiny_model().push_to_hub(REPO, card(**{name: None})))
    return seen


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """What the stories saw that share one Hub and one cache, and the Hub's repositories afterwards."""
    folder = tmp_path_factory.mktemp("hub")
    with serve_hub(TOKEN) as hub:
        hub.fail_commits = [None, 403]
        seen = in_own_process(publishing_story, folder, hub.url, token=TOKEN)
        hub.requests.clear()
        seen["offline"] = in_own_process(hubless_story, folder, hub.url, offline="1")
    seen["no connection"] = in_own_process(hubless_story, folder, "http://127.0.0.1:1", token=TOKEN)  # nobody listens
    return seen | {
        "private": hub.private,
        "repos": hub.repos,
        "commits": hub.repos[REPO],
        "requests offline": hub.requests,
    }


def test_a_pushed_model_loads_back_by_its_id_with_the_same_fingerprint_tokens_and_images(published):
    assert published["loaded"] == published["model"]
    assert [key for key, value in published["newer"].items() if value == published["model"][key]] == []


def test_one_commit_holds_config_weights_card_and_sample(published):
    initial, first, _ = published["commits"]
    assert first.files.keys() - initial.files.keys() == {CONFIG, WEIGHTS, "README.md", "sample.png"}
    assert published["address"].endswith(f"{REPO}/commit/{first.oid}")
    assert b"(sample.png)" in first.files["README.md"]


def test_the_card_states_licence_tags_usage_metrics_and_settings(published):
    text = published["commits"][1].files["README.md"].decode()
    data = RepoCard(text).data
    assert (data.license, data.library_name, data.tags) == ("mit", "tokengrid", ImageTokenizer.card_tags)
    for stated in (f'from_pretrained("{REPO}")', "| psnr | 21.5 |", "64 held-out faces", "steps: 10", "cc0-1.0"):
        assert stated in text


def test_the_code_on_the_card_runs_as_it_stands(published):
    assert published["example"] == published["by hand"]


def test_a_private_repository_is_created_as_one_and_read_with_the_token_into_the_cache_that_is_named(published):
    assert published["private"] == {"org/secret"}
    assert published["secret"].startswith("FileNotFoundError: 'org/secret' is neither a folder here nor")
    assert published["told"] == published["model"]


def test_of_a_repository_only_what_a_model_is_loaded_from_is_fetched(published):
    assert published["fetched"] == [CONFIG, WEIGHTS]


def test_a_failed_upload_raises_and_changes_nothing_and_a_second_try_succeeds(published):
    assert published["refusal"].startswith("HfHubHTTPError: 403")
    assert published["refused"] == [published["commits"][1].oid, published["model"]]
    assert published["second try"][1] == published["newer"]


def test_a_revision_loads_an_older_commit(published):
    assert published["first commit"] == published["model"]


@pytest.mark.parametrize(("wish", "named"), [("unknown", "org/unknown"), ("revision", "'v9'"), ("empty", "org/empty")])
def test_what_the_hub_does_not_hold_is_a_file_not_found_error_that_names_it(published, wish, named):
    assert published[wish].startswith("FileNotFoundError: ")
    assert named in published[wish]


def test_a_name_without_an_owner_is_published_as_the_users_own(published):
    assert published["no owner"] == "nothing was raised"
    assert 'from_pretrained("user/bare")' in published["repos"]["user/bare"][-1].files["README.md"].decode()


@pytest.mark.parametrize("token", ["wrong token", "no token"])
def test_pushing_without_the_right_token_is_refused(published, token):
    assert "401 Unauthorized" in published[token]
    assert "org/forbidden" not in published["repos"]


@pytest.mark.parametrize("state", ["offline", "no connection"])
def test_without_the_hub_a_cached_model_loads(published, state):
    assert published[state]["loaded"] == published["newer"]
    assert published["requests offline"] == []


@pytest.mark.parametrize("state", ["offline", "no connection"])
def test_without_the_hub_a_model_never_cached_is_a_file_not_found_error_with_both_readings(published, state):
    error = "FileNotFoundError: 'org/never-cached' is neither a folder here nor a model that could be read from the Hub"
    assert published[state]["never cached"].startswith(error)


@pytest.mark.parametrize("name", ["license", "data", "data_license"])
def test_an_incomplete_card_is_refused_before_any_request(published, name):
    refusal = published["no connection"][name]  # where any request fails, and not with a ValueError
    assert refusal.startswith(f"ValueError: a published model states its {name};")


@pytest.fixture
def saved(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_card_which_says_that_all_is_there_is_renamed_last(tmp_path, monkeypatch):
    renamed, plain = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda source, target: renamed.append(Path(target).name) or plain(source, target)
    )
    tiny_model().save_pretrained(tmp_path / "model")
    assert (sorted(renamed), renamed[-1]) == (sorted([CONFIG, WEIGHTS, "README.md"]), "README.md")


def test_kernels_of_a_loaded_model_lie_as_features_do(saved):
    kernels = [weight for weight in load(saved).autoencoder.parameters() if weight.ndim == 4]
    assert kernels
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)


def rewrite(path: Path, change: Callable[[dict], dict]) -> None:
    """Change the contents of a config.json or of a safetensors file."""
    if path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        save_file(change({name: tensor.clone() for name, tensor in load_file(path).items()}), path)


def without(values: dict, key: str) -> dict:
    return {name: value for name, value in values.items() if name != key}


BROKEN = [
    (CONFIG, lambda values: values | {"codebok_dim": 4}, "codebok_dim.*did you mean 'codebook_dim'"),
    (CONFIG, lambda values: without(values, "codebook_dim"), "lacks codebook_dim"),
    (CONFIG, lambda values: values | {"quantizer": without(values["quantizer"], "decay")}, "lacks quantizer.decay"),
    (CONFIG, lambda values: values | {"codebook_dim": "4"}, "codebook_dim='4' must be of type int"),
    (CONFIG, lambda values: values | {"format_version": 99}, "format_version 99.*upgrade"),
    (CONFIG, lambda values: values | {"format_version": "1"}, "format_version '1'"),
    (CONFIG, lambda values: values | {"model": "AutoregressivePrior"}, "model of class AutoregressivePrior"),
    (CONFIG, lambda values: ["no mapping"], "is not the config of a tokengrid model"),
    (WEIGHTS, lambda tensors: without(tensors, ENCODER), f"missing.*{ENCODER}"),
    (WEIGHTS, lambda tensors: tensors | {"surprise": torch.ones(1)}, "not expected.*surprise"),
    (WEIGHTS, lambda tensors: tensors | {ENCODER: torch.ones(8, 3, 5, 5)}, r"conv_in.weight has .*\(8, 3, 5, 5\)"),
]


@pytest.mark.parametrize(("name", "damage", "message"), BROKEN)
def test_a_file_that_is_not_what_was_saved_is_a_value_error_that_names_the_fault(saved, name, damage, message):
    rewrite(saved / name, damage)
    with pytest.raises(ValueError, match=message):
        load(saved)


@pytest.mark.parametrize(("name", "kept"), [(CONFIG, -9), (WEIGHTS, -9), (WEIGHTS, 99), (WEIGHTS, 0)])
def test_a_truncated_file_is_a_value_error_that_names_it(saved, name, kept):
    (saved / name).write_bytes((saved / name).read_bytes()[:kept])
    with pytest.raises(ValueError, match=name):
        load(saved)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_a_file_not_found_error_that_names_it(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        load(saved)


class Trap:
    """Creates the file `sprung` in the working directory when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_named_as_weights_is_never_unpickled(saved, tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    weights = saved / WEIGHTS
    torch.save(Trap(), weights, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="damaged"):
        load(saved)
    assert not Path("sprung").exists()
    torch.load(io.BytesIO(weights.read_bytes()), weights_only=False)
    assert Path("sprung").exists()  # the trap was a real one


@pytest.mark.parametrize(
    ("limit", "stated"), [(4096, {}), (400_000, {"settings": "x" * 500_000}), (None, {"sample": "no"})]
)
def test_a_save_that_fails_midway_leaves_the_old_model_and_nothing_else(saved, limit, stated):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit or limits[0], limits[1]))  # bytes; Python ignores SIGXFSZ
    try:
        with pytest.raises(Exception, match=r"(?i)file too large|no such file"):
            tiny_model(1, resize=32).save_pretrained(saved, card(**stated))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert load(saved).fingerprint == tiny_model().fingerprint


def test_whoever_may_read_the_config_may_read_the_weights(saved):
    assert (saved / CONFIG).stat().st_mode == (saved / WEIGHTS).stat().st_mode


def test_a_loaded_model_does_not_follow_its_file(saved, tmp_path):
    loaded = load(saved)
    tiny_model(1).save_pretrained(tmp_path / "other")
    with open(saved / WEIGHTS, "r+b") as file:  # overwritten in place, as cp does
        file.write((tmp_path / "other" / WEIGHTS).read_bytes())
    assert loaded.fingerprint == tiny_model().fingerprint


def test_half_precision_weights_load_as_float32(saved):
    save_file(tiny_model().half().state_dict(), saved / WEIGHTS)
    loaded = load(saved)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32, torch.int64}
    assert loaded.fingerprint == tiny_model().half().fingerprint != tiny_model().fingerprint


@pytest.mark.parametrize(("holder", "key", "value"), [(None, "image_channels", 1), ("quantizer", "normalize", True)])
def test_a_later_key_keeps_older_models_and_their_fingerprint_as_they_were(saved, monkeypatch, holder, key, value):
    """As if the next version added the key, and all models of this one had what will not be the default then."""
    path, version = saved / CONFIG, TokenizerConfig.format_version
    monkeypatch.setattr(
        TokenizerConfig, "later_keys", {f"quantizer.ema_vq.{key}" if holder else key: (version + 1, value)}
    )
    monkeypatch.setattr(TokenizerConfig, "format_version", version + 1)
    model = tiny_model(**{key: value})
    model.save_pretrained(saved)
    rewrite(path, lambda values: values | {holder: without(values[holder], key)} if holder else without(values, key))
    with pytest.raises(ValueError, match=f"lacks .*{key}"):
        load(saved)
    rewrite(path, lambda values: values | {"format_version": version})
    loaded = load(saved)
    assert asdict(loaded.config) == asdict(model.config)
    config_of_this_version = without(without(json.loads(path.read_text()), "model"), "format_version")
    assert loaded.fingerprint == model.hash_of(config_of_this_version, model.weights(of_decoder=False))


def test_a_model_of_the_first_version_loads_and_keeps_its_fingerprint(saved):
    fingerprint = load(saved).fingerprint
    first = json.loads((saved / CONFIG).read_text()) | {"format_version": 1}
    for path in TokenizerConfig.later_keys:
        holders, key = holders_of(first, path)
        for holder in holders:
            del holder[key]
    rewrite(saved / CONFIG, lambda _: first)
    loaded = load(saved)
    assert loaded.fingerprint == fingerprint
    plain = without(without(first, "model"), "format_version")
    assert fingerprint == loaded.hash_of(plain, loaded.weights(of_decoder=False))


@pytest.mark.parametrize("part", [ENCODER, "quantizer.ema_sum", "resize", DECODER])
def test_each_fingerprint_changes_with_its_own_part_alone(part):
    before, after = tiny_model(), tiny_model(resize=32 if part == "resize" else None)
    if part != "resize":
        after.state_dict()[part].view(-1)[-1].add_(1e-3)
    assert (before.fingerprint == after.fingerprint) == (part == DECODER)
    assert (before.decoder_fingerprint == after.decoder_fingerprint) == (part != DECODER)
