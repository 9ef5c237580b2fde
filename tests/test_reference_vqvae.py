"""The reference at its published sizes, its codebook against a plain computation, and the comparison end to end."""

import json
from pathlib import Path

import pytest
import reference_vqvae
import tables
import torch
from recording import num_parameters
from reference_vqvae import ReferenceQuantizer, ReferenceRun, ReferenceVQVAE, batches, main
from trained_tokenizers import folder_name

from train.config import UserError, parse


def test_the_network_has_the_published_sizes():
    model = ReferenceVQVAE()
    assert num_parameters(model) == 662_723
    reconstructions, tokens, commitment = model(torch.rand(2, 3, 32, 32))
    assert reconstructions.shape == (2, 3, 32, 32)
    assert tokens.shape == (2, 8, 8)
    assert commitment.shape == ()


def test_codes_are_the_bias_corrected_averages_of_a_plain_computation():
    torch.manual_seed(0)
    quantizer = ReferenceQuantizer()
    count, total = torch.zeros(512), torch.zeros(512, 64)
    codes = quantizer.codes.clone()
    for update in range(1, 4):
        latents = torch.randn(2, 64, 3, 3)
        vectors = [latents[b, :, y, x] for b in range(2) for y in range(3) for x in range(3)]
        nearest = [((vector - codes) ** 2).sum(1).argmin().item() for vector in vectors]
        quantized, indices, commitment = quantizer(latents)
        assert indices.flatten().tolist() == nearest
        torch.testing.assert_close(quantized, codes[indices].movedim(-1, 1))
        expected = sum(((v - codes[k]) ** 2).sum() for v, k in zip(vectors, nearest, strict=True)) / latents.numel()
        torch.testing.assert_close(commitment, 0.25 * expected)
        chosen_count, chosen_sum = torch.zeros(512), torch.zeros(512, 64)
        for vector, code in zip(vectors, nearest, strict=True):
            chosen_count[code] += 1
            chosen_sum[code] += vector
        count, total = 0.99 * count + 0.01 * chosen_count, 0.99 * total + 0.01 * chosen_sum
        unbiased_count, unbiased_sum = count / (1 - 0.99**update), total / (1 - 0.99**update)
        size = unbiased_count.sum()
        codes = unbiased_sum / ((unbiased_count + 1e-5) / (size + 512 * 1e-5) * size)[:, None]
        torch.testing.assert_close(quantizer.codes, codes, rtol=1e-4, atol=1e-4)


def test_the_gradient_passes_straight_through_and_the_codes_rest_in_eval_mode():
    quantizer = ReferenceQuantizer().eval()
    before, latents = quantizer.codes.clone(), torch.randn(1, 64, 2, 2, requires_grad=True)
    quantized, _, _ = quantizer(latents)
    weights = torch.randn_like(quantized)
    (quantized * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights)
    assert torch.equal(quantizer.codes, before)


def test_each_epoch_takes_every_picture_once_in_a_new_order():
    torch.manual_seed(0)
    made = batches(100, steps=7)
    assert [len(batch) for batch in made] == [32] * 7
    first, second = torch.cat(made[:3]), torch.cat(made[3:6])
    assert len(first.unique()) == len(second.unique()) == 96
    assert not torch.equal(first, second)


def arguments(data: Path, model: str, steps: int) -> ReferenceRun:
    settings = [f"data={data}", "named=org/colours", f'models=["{model}"]', "seeds=[3]", f"steps={steps}"]
    return parse(ReferenceRun, [*settings, "speed.threads=1"])


def test_the_comparison_trains_each_model_once_and_records_all_of_them(colours, tiny_preset, tmp_path, monkeypatch):
    model = f"{tiny_preset} learning_rate=0.002"
    main("colours", arguments(colours, model, steps=2), tmp_path)
    path = tmp_path / "benchmarks/results/reference_vqvae_colours.json"
    written = json.loads(path.read_text())
    assert [row["model"] for row in written["models"]] == ["reference steps=2", model]
    assert all(run["test_nmse"] > 0 for row in written["models"] for run in row["runs"])
    assert str(colours) not in json.dumps(written)
    settings = (tmp_path / "runs/colours" / f"{folder_name(model)}_3" / "run/run.yaml").read_text()
    assert "learning_rate: 0.002" in settings
    assert "seed: 3" in settings
    example, ours = tables.reference_rows(written)
    assert (example["model"], example["parameters"]) == ("the example steps=2", "662,723")
    assert "learning_rate=0.002" in ours["model"]
    assert ours["under the first"].endswith("%")

    def never(*arguments: object) -> None:
        raise AssertionError("it was trained already")

    monkeypatch.setattr(reference_vqvae, "train_reference", never)
    monkeypatch.setattr(reference_vqvae, "train_ours", never)
    main("colours", arguments(colours, model, steps=2), tmp_path)
    assert json.loads(path.read_text()) == written


def test_a_model_that_cannot_be_trained_is_told_of(colours, tmp_path):
    with pytest.raises(UserError, match=r"image_size=7 could not be trained"):
        main("colours", arguments(colours, "image_size=7", steps=0), tmp_path)
