"""Training a prior: real processes for kills and ranks, the rest in this one; the unigram code against plain sums."""

import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from hub_server import serve_hub
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from processes import TWO_RANKS, assert_equal_runs, interrupt, records, run
from safetensors.torch import load_file
from tiny_priors import TINY, fill_with_a_store, settings, store_of, train_prior
from tiny_runs import assert_resumes_to_the_bit
from torch.utils.checkpoint import checkpoint

from prior import AutoregressivePrior, transformer
from tokenizer import ImageTokenizer
from train.checkpoint import RunFolder
from train.config import UserError, launch, parse
from train.likelihood import Grids, Judge, UnigramCode, entropy
from train.settings import PriorRun, StoreRun
from train.token_prior import OVERFITTING, main, warn_of_overfitting
from train.token_store import TokenStore

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

ROOT = Path(__file__).parents[1]
PROGRAM = str(ROOT / "train" / "token_prior.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a tokenizer, pictures of two classes and the token store made of them."""
    return fill_with_a_store(tmp_path_factory.mktemp("made"))


def command(made: Path, output: Path, *more: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, PROGRAM, *settings(made, output, *more)]


def evaluations(output: Path) -> list[dict]:
    return [record for record in records(output) if "bits_per_token" in record]


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(command(made, output, launcher=("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")))
    assert done.returncode == 0, done.stderr
    assert all(word in done.stderr for word in ("step 10/10: bits/token", "validation", "tokens/s", "left"))
    told = done.stderr.partition("step 10: ")[2]
    assert all(name in told for name in ("train_bits_per_token", "unigram_bits_per_token", "validation_entropy"))
    return output


def test_a_run_leaves_the_promised_folder(undisturbed, made):
    names = {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "README.md", "run.yaml", "metrics.jsonl"} <= names
    assert {"samples/step_000005.png", "samples/step_000010.png"} <= names
    assert [record["step"] for record in evaluations(undisturbed)] == [5, 10]
    prior = AutoregressivePrior.from_pretrained(undisturbed)
    tokenizer = ImageTokenizer.from_pretrained(made / "tokenizer")
    prior.check_tokenizer(tokenizer.fingerprint)
    assert (prior.config.num_classes, prior.config.grid_size, prior.config.vocab_size) == (2, [4, 4], 32)
    assert prior.config.class_names == TokenStore.open(made / "tokens").stamp.class_names
    pictures = tokenizer.decode(prior.generate(labels=[0, 1], generator=torch.Generator().manual_seed(0)))
    assert pictures.shape == (2, 3, 8, 8)
    with Image.open(undisturbed / "samples" / "step_000010.png") as sheet:
        assert sheet.size == (2 * 128, 4 * 128)  # a column a class; three rows of the prior, one of the unigram code


def test_the_card_names_no_folder_that_the_run_lay_in_or_read(undisturbed, made):
    card = (undisturbed / "README.md").read_text()
    assert "\ntokens: tokens\n" in card
    assert "\ntokenizer: tokenizer\n" in card
    assert not any(str(place) in card for place in (undisturbed.parent, made, Path.home()))


def test_the_figures_are_those_of_the_exported_prior(undisturbed, made):
    prior = AutoregressivePrior.from_pretrained(undisturbed)
    rows = TokenStore.open(made / "tokens").rows("validation")[:]
    tokens, labels = torch.tensor(rows["tokens"].astype(int)), torch.tensor(rows["label"])
    nats = -prior.log_prob(tokens, labels).sum().item() / tokens.numel()
    figures = min(evaluations(undisturbed), key=lambda record: record["bits_per_token"])
    assert figures["nats_per_token"] == pytest.approx(nats, rel=1e-4)
    assert figures["bits_per_token"] == pytest.approx(nats / math.log(2), rel=1e-4)
    assert figures["bits_per_image"] == pytest.approx(16 * nats / math.log(2), rel=1e-4)
    assert figures["bits_per_dimension"] == pytest.approx(16 * nats / math.log(2) / (3 * 8 * 8), rel=1e-4)
    assert figures["uniform_bits_per_token"] == 5
    train, validation = (TokenStore.open(made / "tokens").rows(split)[:] for split in ("train", "validation"))
    counts = [torch.tensor(np.bincount(rows["tokens"].flatten(), minlength=32)) for rows in (train, validation)]
    assert figures["unigram_bits_per_token"] == pytest.approx(UnigramCode(counts[0]).bits_per_token(counts[1]))
    assert figures["validation_entropy"] == pytest.approx(entropy(counts[1]))
    tokens, labels = torch.tensor(train["tokens"].astype(int)), torch.tensor(train["label"])
    bits = -prior.log_prob(tokens, labels).sum().item() / tokens.numel() / math.log(2)
    assert figures["train_bits_per_token"] == pytest.approx(bits, rel=1e-4)
    assert f"{figures['bits_per_token']:.6g}" in (undisturbed / "README.md").read_text()


def test_a_run_killed_at_any_moment_and_started_again_equals_an_undisturbed_one(undisturbed, made, tmp_path):
    arguments = command(made, tmp_path / "run")
    code, _ = interrupt(arguments, signal.SIGKILL, at="step 6/10")
    assert code == -signal.SIGKILL
    assert RunFolder(parse(PriorRun, [f"output_dir={tmp_path / 'run'}"])).saved_steps()[-1] < 10
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(undisturbed, tmp_path / "run")


def test_sigterm_saves_and_the_same_command_goes_on(undisturbed, made, tmp_path):
    arguments = command(made, tmp_path / "run", "save_every=10")
    code, told = interrupt(arguments, signal.SIGTERM, at="step 6/10")
    assert code == 130, told
    assert "the same command goes on from there" in told
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(undisturbed, tmp_path / "run")


def test_two_ranks_equal_one_with_twice_the_batch(made, tmp_path):
    certain = ["model.dropout=0", "model.class_dropout=0"]  # what is dropped differs from rank to rank
    one, two = tmp_path / "one", tmp_path / "two"
    train_prior(made, one, "batch_size=8", *certain)
    done = run(command(made, two, *certain, launcher=TWO_RANKS))
    assert done.returncode == 0, done.stderr
    assert (two / "checkpoints/step_10/state_1.json").is_file()  # there really were two
    left, right = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-3, atol=1e-5, msg=key)
    for ours, theirs in zip(evaluations(one), evaluations(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_accumulated_batches_equal_one_batch(made, tmp_path):
    certain = ["model.dropout=0", "model.class_dropout=0"]
    whole = train_prior(made, tmp_path / "whole", "batch_size=8", *certain)
    halves = train_prior(made, tmp_path / "halves", "batch_size=4", "optimizer.accumulation_steps=2", *certain)
    for key in whole:
        torch.testing.assert_close(whole[key], halves[key], rtol=1e-3, atol=1e-5, msg=key)


def test_activation_checkpointing_is_really_on_and_changes_nothing(undisturbed, made, tmp_path, monkeypatch):
    plain, used = load_file(undisturbed / "model.safetensors"), []

    def counted(*arguments, **options):
        used.append(None)
        return checkpoint(*arguments, **options)

    monkeypatch.setattr(transformer, "checkpoint", counted)
    tensors = train_prior(made, tmp_path / "run", "speed.activation_checkpointing=true")
    assert len(used) == 10 * 2  # steps, blocks
    for key in plain:
        torch.testing.assert_close(tensors[key], plain[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("variant", [["average.decay=0.9"], ["mixed_precision=bf16"]])
def test_variants_resume_to_the_bit(variant, made, tmp_path, monkeypatch):
    assert_resumes_to_the_bit(made, variant, tmp_path, monkeypatch, train_prior)


def test_the_best_evaluation_is_what_is_exported_and_a_worse_end_is_told(made, tmp_path, caplog):
    ever_faster = ["steps=40", "warmup_steps=40", "learning_rate=1", "eval_every=5", "save_every=40"]
    train_prior(made, tmp_path / "run", *ever_faster)  # until it knows less than before
    best = min(evaluations(tmp_path / "run"), key=lambda record: record["bits_per_token"])
    assert best["step"] < 40
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").glob("best_*")]
    assert kept == [f"best_{best['step']}.safetensors"]
    figures = [record["bits_per_token"] for record in evaluations(tmp_path / "run")]
    worse = [5 * n for n in range(1, 9) if figures[n - 1] > (1 + OVERFITTING) * min(figures[:n])]
    assert [int(step) for step in re.findall(r"overfitting at step (\d+)", caplog.text)] == worse != []
    assert f"the best, {best['bits_per_token']:.3f} at step {best['step']}, is what is kept" in caplog.text
    prior = AutoregressivePrior.from_pretrained(tmp_path / "run")
    rows = TokenStore.open(made / "tokens").rows("validation")[:]
    tokens, labels = torch.tensor(rows["tokens"].astype(int)), torch.tensor(rows["label"])
    bits = -prior.log_prob(tokens, labels).sum().item() / tokens.numel() / math.log(2)
    assert bits == pytest.approx(best["bits_per_token"], rel=1e-4)


def test_a_little_above_the_best_is_no_overfitting(caplog):
    metrics = {"bits_per_token": 1.01, "train_bits_per_token": 0.9}
    warn_of_overfitting(5, metrics, {"step": 3, "bits_per_token": 1.0})
    assert not caplog.text


@pytest.mark.slow
def test_without_a_store_it_is_written_first(tmp_path):
    torch.manual_seed(0)
    ImageTokenizer(tiny_config()).save_pretrained(tmp_path / "runs" / "vqvae")
    short = ["steps=1", "eval_grids=2", "batch_size=2", "model.width=16", "model.num_layers=1", "model.num_heads=2"]
    for _ in range(2):  # the second time it is there and so is the run
        done = run([sys.executable, PROGRAM, *short], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "holds the finished run" in done.stderr
    store = TokenStore.open(tmp_path / "tokens")
    assert len(store.rows("train")) == 9 * StoreRun().num_crops
    assert (tmp_path / "runs" / "prior" / "model.safetensors").is_file()


def test_an_unconditional_prior_of_a_store_with_classes(made, tmp_path):
    train_prior(made, tmp_path / "run", "conditional=false", "steps=2", "eval_every=1")
    prior = AutoregressivePrior.from_pretrained(tmp_path / "run")
    assert prior.config.num_classes == 0
    assert prior.generate(num_samples=3).shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["tokens=./nowhere"], "tokens=./nowhere"),
        (["tokenizer=./nowhere"], "train one first with `accelerate launch train/vqvae.py`"),
        (["model.num_heads=3"], "width=16 is not a multiple of 4 * num_heads=12"),
        (["model.dropout=1"], "dropout=1.0 must lie in [0, 1)"),
        (["model.depth=3"], "unknown key 'model.depth'"),
        (["eval_grids=0"], "eval_grids=0 must be >= 1"),
        (["log_with=wandb"], "log_with=wandb is not installed"),
        (["push_to_hub=a/b"], "card.license=..."),
        (["push_to_hub=a/b", "card.license=mit", "card.data_license=mit"], "must come with card.data=..."),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_2_before_anything_is_written(
    wrong, message, made, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", [PROGRAM, *settings(made, tmp_path / "run", *wrong)])
    with pytest.raises(SystemExit) as exit_:
        launch(main, PriorRun)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_the_store_of_another_tokenizer_is_refused_with_both_fingerprints(made, tmp_path):
    torch.manual_seed(1)
    other = ImageTokenizer(tiny_config())
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError) as error:
        train_prior(made, tmp_path / "run", f"tokenizer={tmp_path / 'other'}")
    assert other.fingerprint in str(error.value)
    assert ImageTokenizer.from_pretrained(made / "tokenizer").fingerprint in str(error.value)


@pytest.mark.parametrize("empty", [("train",), ("validation",), ("train", "validation")])
def test_a_store_with_an_empty_split_is_refused(made, tmp_path, empty):
    shutil.copytree(made / "tokens", tmp_path / "tokens")
    index = json.loads((tmp_path / "tokens" / "tokens.json").read_text())
    for split in empty:
        index["num_rows"][split] = 0
        for shard in (tmp_path / "tokens").glob(f"{split}-*.parquet"):
            shard.unlink()
    (tmp_path / "tokens" / "tokens.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="holds no tokens" if len(empty) == 2 else f"no {empty[0]} rows"):
        train_prior(made, tmp_path / "run", f"tokens={tmp_path / 'tokens'}")


@pytest.fixture
def stopped(made, tmp_path) -> Path:
    """A folder of its own with a run that stopped before its end."""
    shutil.copytree(made, tmp_path / "made")
    train_prior(tmp_path / "made", tmp_path / "made" / "run")
    (tmp_path / "made" / "run" / "README.md").unlink()
    shutil.rmtree(tmp_path / "made" / "tokens")
    return tmp_path / "made"


@pytest.mark.parametrize("codebook_size", [32, 64])
def test_a_run_whose_store_was_made_anew_by_another_tokenizer_is_refused(stopped, codebook_size):
    before = ImageTokenizer.from_pretrained(stopped / "tokenizer").fingerprint
    torch.manual_seed(1)
    other = ImageTokenizer(tiny_config(quantizer={"name": "ema_vq", "codebook_size": codebook_size}))
    other.save_pretrained(stopped / "tokenizer")
    store_of(stopped, "tokens", f"tokenizer={stopped / 'tokenizer'}")
    with pytest.raises(UserError, match=f"{before}.*{other.fingerprint}.*start anew") as error:
        train_prior(stopped, stopped / "run")
    assert ("vocab_size=32 (now 64)" in str(error.value)) == (codebook_size == 64)


@pytest.mark.parametrize(
    ("change", "told"), [("image_size=16", "grids=.*now"), ("views=flip", "num_rows.train=18 .now 36")]
)
def test_a_run_whose_store_was_made_anew_of_other_pictures_is_refused(stopped, change, told):
    store_of(stopped, "tokens", f"tokenizer={stopped / 'tokenizer'}", change)
    with pytest.raises(UserError, match=f"trained on a token store with .*{told}.*start anew"):
        train_prior(stopped, stopped / "run")


def test_the_config_names_the_repository_of_a_tokenizer_published_before_or_after_the_store(made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    (tmp_path / "made" / "tokenizer" / "run.yaml").write_text("push_to_hub: org/tiny\n")
    train_prior(tmp_path / "made", tmp_path / "after", "steps=1")
    store_of(tmp_path / "made", "named", f"tokenizer={tmp_path / 'made' / 'tokenizer'}")
    train_prior(tmp_path / "made", tmp_path / "before", "steps=1", f"tokens={tmp_path / 'made' / 'named'}")
    for run_folder in (tmp_path / "before", tmp_path / "after"):
        prior = AutoregressivePrior.from_pretrained(run_folder)
        assert prior.config.tokenizer == "org/tiny"
        assert prior.config.tokenizer_fingerprint == ImageTokenizer.from_pretrained(made / "tokenizer").fingerprint


def test_a_default_folder_of_tokens_with_other_settings_is_refused_with_the_way_out(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "tokens", tmp_path / "tokens")
    with pytest.raises(UserError, match=r"the default token store: .*other settings.*or give tokens=\.\.\."):
        main(parse(PriorRun, [*TINY, f"tokenizer={made / 'tokenizer'}", f"output_dir={tmp_path / 'run'}"]))


def test_a_network_that_cannot_be_built_is_refused_before_any_store_is_written():
    with pytest.raises(UserError, match=r"width=128 is not a multiple of 4 \* num_heads=12"):
        parse(PriorRun, ["model.num_heads=3"])


def test_the_compile_switch_reaches_the_prior_and_changes_nothing(undisturbed, made, tmp_path, monkeypatch):
    plain, compiled, compile_ = load_file(undisturbed / "model.safetensors"), [], torch.nn.Module.compile

    def compile_traced(self):
        compiled.append(type(self))
        compile_(self, backend="eager")  # traced as ever, without the C++ compiler that a machine may lack

    monkeypatch.setattr(torch.nn.Module, "compile", compile_traced)
    tensors = train_prior(made, tmp_path / "run", "speed.compile=true")
    assert compiled == [AutoregressivePrior]
    for key in plain:
        torch.testing.assert_close(tensors[key], plain[key], rtol=1e-3, atol=1e-5, msg=key)


def test_rows_without_a_class_and_tokens_out_of_range_are_refused(made):
    class Rows(dict):
        def __len__(self):
            return 2

        def __getitem__(self, indices):
            return {key: value[indices] for key, value in self.items()}

    store = TokenStore.open(made / "tokens")
    good = store.rows("validation")[:2]
    config = parse(PriorRun, [])
    for name, changed, conditional in [("label", good["label"] * 0 - 1, True), ("token", good["tokens"] + 32, False)]:
        key = "label" if name == "label" else "tokens"
        grids = Grids(Rows(good | {key: changed}), conditional)
        with pytest.raises(UserError, match=f"{name}s of the store run from"):
            Judge(config, Accelerator(cpu=True), store, grids)


def test_a_prior_is_published(made, tmp_path):
    publish = ["push_to_hub=me/prior", "card.license=mit", "card.data=small pictures", "card.data_license=cc0-1.0"]
    arguments = command(made, tmp_path / "run", "steps=2", "warmup_steps=0", "eval_every=1", *publish)
    with serve_hub(token="secret") as hub:
        connection = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = run(arguments, **connection, HF_TOKEN="secret")
        assert done.returncode == 0, done.stderr
        card = hub.repos["me/prior"][-1].files["README.md"].decode()
        load = "import prior; print(prior.AutoregressivePrior.from_pretrained('me/prior').fingerprint)"
        loaded = run([sys.executable, "-c", load], cwd=ROOT, **connection)
    assert loaded.stdout.split() == [AutoregressivePrior.from_pretrained(tmp_path / "run").fingerprint]
    for said in ("license: mit", 'from_pretrained("me/prior")', "check_tokenizer", "small pictures", "bits_per_token"):
        assert said in card


tokens_of_two_splits = st.integers(2, 9).flatmap(
    lambda size: st.tuples(
        st.just(size), *(st.lists(st.integers(0, size - 1), min_size=1, max_size=30) for _ in range(2))
    )
)


@given(tokens_of_two_splits)
def test_the_unigram_code_against_plain_sums(case):
    size, train, validation = case
    counts = [torch.tensor([tokens.count(token) for token in range(size)]) for tokens in (train, validation)]
    code = UnigramCode(counts[0])
    plain = [-math.log2((train.count(token) + 0.5) / (len(train) + size / 2)) for token in validation]
    assert code.bits_per_token(counts[1]) == pytest.approx(sum(plain) / len(plain))
    shares = [validation.count(token) / len(validation) for token in validation]
    assert entropy(counts[1]) == pytest.approx(sum(-math.log2(share) for share in shares) / len(shares), abs=1e-9)
    assert entropy(counts[1]) <= code.bits_per_token(counts[1]) + 1e-9


def test_what_the_unigram_code_draws_has_its_frequencies():
    counts = torch.tensor([0, 10, 30, 60])
    drawn = UnigramCode(counts).draw(500, [8, 8], seed=0)
    assert drawn.shape == (500, 8, 8)
    frequencies = torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()
    torch.testing.assert_close(frequencies, UnigramCode(counts).probabilities.float(), atol=0.01, rtol=0)


def test_settings_that_follow_the_length_and_those_of_the_family():
    config = parse(PriorRun, ["steps=2"])
    assert (config.warmup_steps, config.eval_every, config.save_every) == (0, 1, 1)
    assert json.dumps(config.optimizer.__dict__)  # plain values
    assert (config.optimizer.beta2, config.optimizer.weight_decay) == (0.95, 0.05)
    assert parse(PriorRun, ["optimizer.max_grad_norm=2"]).optimizer.beta2 == 0.95


def test_a_tokenizer_of_more_codes_than_a_prior_can_model_is_refused_before_a_store_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quantizer = {"name": "bsq"}
    ImageTokenizer(tiny_config(codebook_dim=36, quantizer=quantizer)).save_pretrained(tmp_path / "huge")
    with pytest.raises(UserError, match="tokenizer=huge: vocab_size=68719476736 must be at most 1048576"):
        main(parse(PriorRun, ["tokenizer=huge", "output_dir=run"]))
    assert [path.name for path in tmp_path.iterdir()] == ["huge"]
