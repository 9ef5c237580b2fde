"""EM as two ways to raise one bound: python benchmarks/em_view.py [picture.png].

Fits probabilistic PCA to generated data and prints, after each half-step, the ELBO and the log-likelihood. An E step
moves q alone: the ELBO rises until it touches the log-likelihood, which stays. An M step moves the model alone: both
rise, and a gap opens. A VAE climbs the same ELBO with both halves at once, by gradient, with an encoder for q. With a
path the two curves are drawn (pip install -e ".[bench]").
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from ppca import ProbabilisticPCA
from recording import save_plot
from torch import Tensor

NUM_OBSERVATIONS, NUM_COMPONENTS, NUM_LATENTS = 500, 8, 2
NUM_ROUNDS = 8


@dataclass
class HalfStep:
    name: str  # of the step just made: E or M
    elbo: float  # nats per observation
    log_likelihood: float  # the same


def generated(seed: int = 0) -> Tensor:
    """Observations (N, d) float64 of a linear Gaussian model with random loadings."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    loadings = torch.randn(NUM_LATENTS, NUM_COMPONENTS, **draw)
    latents, noise = (
        torch.randn(NUM_OBSERVATIONS, NUM_LATENTS, **draw),
        torch.randn(NUM_OBSERVATIONS, NUM_COMPONENTS, **draw),
    )
    return latents @ loadings + 0.5 * noise + 1


def half_steps(data: Tensor, num_rounds: int = NUM_ROUNDS, seed: int = 1) -> list[HalfStep]:
    """EM from random loadings: the bound and what it bounds after each half-step."""
    generator = torch.Generator().manual_seed(seed)
    loadings = torch.randn(data.shape[1], NUM_LATENTS, generator=generator, dtype=torch.float64)
    model, told = ProbabilisticPCA(loadings, data.mean(0), torch.ones((), dtype=torch.float64)), []
    for _ in range(num_rounds):
        given = model.e_step(data)
        told.append(HalfStep("E", model.elbo(data, given), model.log_likelihood(data)))
        model = model.m_step(data, given)
        told.append(HalfStep("M", model.elbo(data, given), model.log_likelihood(data)))
    return told


def table(told: list[HalfStep]) -> str:
    """A line for each half-step."""
    lines = ["step         ELBO   log-likelihood          gap"]
    for number, each in enumerate(told):
        gap = each.log_likelihood - each.elbo
        lines.append(f"{number // 2 + 1:3d} {each.name}  {each.elbo:11.6f}  {each.log_likelihood:15.6f}  {gap:11.2e}")
    return "\n".join(lines)


def draw(path: Path, told: list[HalfStep], best: float) -> None:
    """A PNG of both curves over the half-steps, and the maximum of the likelihood."""
    from matplotlib.figure import Figure  # not pyplot: it would look for a screen

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    places = [index / 2 + 0.5 for index in range(len(told))]  # a round is one apart, its E step first
    axes.plot(places, [each.log_likelihood for each in told], ".-", label="log-likelihood")
    axes.plot(places, [each.elbo for each in told], ".-", label="ELBO")
    axes.axhline(best, color="grey", linestyle=":", label="maximum of the likelihood")
    axes.set(xlabel="round: E step, then M step", ylabel="nats per observation")
    axes.legend()
    save_plot(path, figure, 100)


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].endswith(".png"):
        sys.exit(__doc__)
    observations = generated()
    followed = half_steps(observations)
    highest = ProbabilisticPCA.at_the_maximum(observations, NUM_LATENTS).log_likelihood(observations)
    print(table(followed))
    print(f"maximum of the likelihood {highest:.6f}")
    if len(sys.argv) > 1:
        draw(Path(sys.argv[1]), followed, highest)
