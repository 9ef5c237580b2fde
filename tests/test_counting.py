"""Counting the codes in use: against a plain count, in parts, and where the codes are too many to count each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import records
from tiny_runs import WITH_ANY_QUANTIZER

from tokenizer import ImageTokenizer
from tokenizer.metrics import perplexity, usage
from train import counting
from train.config import parse
from train.counting import LARGEST_WITH_USAGE, TokenCounts, num_counted, told_usage
from train.progress import UsageWindow
from train.settings import TokenizerRun
from train.vqvae import main

HUGE = ["model.quantizer={name: lfq}", "model.codebook_dim=36", "num_workers=0", "steps=2", "eval_every=1"]


@settings(max_examples=40, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), min_size=1, max_size=6),
    waiting=st.integers(1, 40),
    cut=st.integers(0, 6),
)
def test_counts_and_figures_are_those_of_a_plain_count_whatever_the_parts(batches, waiting, cut):
    usual, counting.WAITING = counting.WAITING, waiting
    try:
        parts = [TokenCounts(10), TokenCounts(10)]
        for number, batch in enumerate(batches):
            parts[number >= cut].add(torch.tensor(batch))
        total = sum(parts, TokenCounts(10))
    finally:
        counting.WAITING = usual
    plain = torch.bincount(torch.tensor(sum(batches, [])), minlength=10)
    assert total.codes.tolist() == plain.nonzero().flatten().tolist()
    assert total.counts.tolist() == plain[plain > 0].tolist()
    assert total.figures() == pytest.approx(
        {"codes_seen": len(total.codes), "num_tokens": plain.sum().item()}
        | {"perplexity": perplexity(plain), "tokens_per_code": plain.sum().item() / 10}
    )


@pytest.mark.parametrize(("num_tokens", "stated"), [(199, False), (200, True)])
def test_a_usage_is_stated_from_twenty_tokens_a_code_on(num_tokens, stated):
    counts, tokens = TokenCounts(10), torch.arange(num_tokens) % 7
    counts.add(tokens)
    assert counts.figures().get("usage") == (usage(torch.bincount(tokens, minlength=10)) if stated else None)


def test_of_more_codes_than_can_be_counted_the_different_ones_are_told_with_the_tokens_and_never_as_a_usage():
    counts = TokenCounts(2**62)
    counts.add(torch.tensor([[5, 2**62 - 1], [5, 7]]))
    figures = counts.figures()
    assert "usage" not in figures
    assert (figures["codes_seen"], figures["num_tokens"]) == (3, 4)
    assert figures["tokens_per_code"] == 4 / 2**62
    assert figures["perplexity"] == pytest.approx(2 * 2**0.5)  # probabilities 1/2, 1/4, 1/4
    assert told_usage(figures) == "3 codes in 4 tokens"
    assert told_usage({"usage": 0.1234}) == "12.3%"


def test_twenty_tokens_a_code_are_counted_up_to_2_to_the_18_codes_and_a_fixed_number_beyond():
    assert num_counted(512) == 20 * 512
    assert num_counted(LARGEST_WITH_USAGE) == 20 * 2**18
    assert num_counted(LARGEST_WITH_USAGE + 1) == num_counted(2**62) == 2**20


def test_the_window_of_the_training_batches_holds_nothing_of_so_many_codes():
    window = UsageWindow(2**62)
    for _ in range(3):
        window.add(torch.full((100,), 2**62 - 1))
    assert window.state_dict() == {"counts": None, "num_tokens": 0, "figures": {}}


def test_the_window_goes_on_where_the_tokens_are_though_a_checkpoint_gives_its_counts_back_on_the_cpu():
    window, resumed = UsageWindow(8), UsageWindow(8)
    window.add(torch.tensor([1, 1, 3]))
    resumed.load_state_dict(window.state_dict())
    resumed.add(torch.tensor([3, 7]))
    assert resumed.counts.tolist() == [0, 2, 0, 2, 0, 0, 0, 1]
    resumed.add(torch.zeros(2, dtype=torch.int64, device="meta"))  # as on a GPU, where it cannot run here
    assert resumed.counts.device.type == "meta"


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_with_2_to_the_36_codes_trains_and_says_how_many_of_them_it_saw(
    picture_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(counting, "TOKENS_WITHOUT_USAGE", 2000)
    output = tmp_path / "run"
    main(parse(TokenizerRun, [*WITH_ANY_QUANTIZER, f"data={picture_folder}", f"output_dir={output}", *HUGE]))
    first, last = (record for record in records(output) if "psnr" in record)
    assert (last["num_tokens"] >= 2000, last["codes_seen"] >= 1, "usage" in last) == (True, True, False)
    assert last["bits_per_pixel"] == 36 / 4
    assert f"usage {first['codes_seen']} codes in {first['num_tokens']:,} tokens" in capsys.readouterr().err
    card = (output / "README.md").read_text()
    assert "`codes_seen` (different codes among `num_tokens` tokens; the codes are too many to state a usage)" in card
    tokenizer = ImageTokenizer.from_pretrained(output)
    tokens = tokenizer.encode(torch.rand(2, 3, 16, 16))
    assert tokenizer.vocab_size == 2**36 > tokens.max()
    assert torch.equal(tokenizer.decode(tokens), tokenizer.decode(tokens.clone()))
    with pytest.raises(ValueError, match=r"must lie in \[0, 68719476736\)"):
        tokenizer.decode(torch.full((1, 8, 8), 2**36))
