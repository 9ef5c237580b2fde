"""What is special to the EMA codebook; what it shares with others is in test_placement.py."""

import pytest
import torch
from latents import DIM, latents_of, trained
from sklearn.cluster import KMeans

from tokenizer.quantizers.ema_vq import EMAVectorQuantizer, smoothed


def ema(**hyperparameters) -> EMAVectorQuantizer:
    torch.manual_seed(0)
    return EMAVectorQuantizer(DIM, **({"codebook_size": 16} | hyperparameters)).train()


@pytest.mark.parametrize("normalize", [False, True])
def test_each_code_is_the_sum_over_the_smoothed_count_after_every_kind_of_step(normalize):
    quantizer = ema(normalize=normalize, revival_threshold=0.5)
    for seed in range(6):  # placement, then moves and revivals
        quantizer(latents_of(seed, 4, DIM, 8, 8))
        quantizer.step()
        expected = quantizer.ema_sum / smoothed(quantizer.ema_count)[:, None]
        if normalize:
            expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(quantizer.codebook, expected)
        assert quantizer.ema_count.min() > 0


def test_the_update_is_that_of_the_paper():
    quantizer = trained(ema(decay=0.9, revival_threshold=0.0))
    latents = latents_of(5, 2, DIM, 4, 4)
    count, total = quantizer.ema_count.clone(), quantizer.ema_sum.clone()
    indices = quantizer(latents).indices
    quantizer.step()
    for code in range(16):  # equations 6 to 8 of the appendix, a code at a time
        members = latents.movedim(1, -1)[indices == code]
        torch.testing.assert_close(quantizer.ema_count[code], 0.9 * count[code] + 0.1 * len(members))
        torch.testing.assert_close(quantizer.ema_sum[code], 0.9 * total[code] + 0.1 * members.sum(0))


def test_the_decay_rises_to_its_value():
    quantizer = trained(ema(decay=0.99, revival_threshold=0.0))
    for num_steps, decay in [(1, 1 - 1 / 10.1), (500, 1 - 1 / 60), (2000, 0.99)]:
        quantizer.num_steps.fill_(num_steps)
        before = quantizer.ema_count.clone()
        indices = quantizer(latents_of(5, 2, DIM, 4, 4)).indices
        quantizer.step()
        expected = decay * before + (1 - decay) * torch.bincount(indices.flatten(), minlength=16)
        torch.testing.assert_close(quantizer.ema_count, expected)


def test_one_step_at_decay_zero_is_one_step_of_lloyds_algorithm():
    data = torch.cat([latents_of(seed, 200, DIM) + 3 * seed for seed in range(4)])
    quantizer = trained(ema(decay=0.0, codebook_size=8, revival_threshold=0.0))
    start = data[::100].clone()
    quantizer.ema_count.fill_(1.0)
    quantizer.ema_sum.copy_(start * smoothed(quantizer.ema_count)[:, None])
    quantizer(data.T[None, :, :, None])
    quantizer.step()
    lloyd = KMeans(8, init=start.numpy(), n_init=1, max_iter=1).fit(data.numpy())
    torch.testing.assert_close(quantizer.codebook, torch.from_numpy(lloyd.cluster_centers_), rtol=1e-4, atol=1e-4)


def test_gradients_of_the_commitment_reach_the_latents_alone_and_scale_with_its_weight():
    latents = latents_of(1)
    gradients = []
    for weight in (0.25, 0.5):
        quantizer = trained(ema(commitment_weight=weight))
        given_latents = latents.clone().requires_grad_()
        output = quantizer(given_latents)
        output.losses["commitment"].backward()
        expected = 2 * weight * (latents - output.quantized.detach()) / latents.numel()
        torch.testing.assert_close(given_latents.grad, expected)
        gradients.append(given_latents.grad)
        assert not any(parameter.requires_grad for parameter in quantizer.parameters())
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


def test_a_decay_at_which_nothing_would_move_is_refused():
    with pytest.raises(ValueError, match=r"decay=1.0 must lie in \[0, 1\)"):
        ema(decay=1.0)
