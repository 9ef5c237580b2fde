"""Probabilistic PCA, a linear Gaussian model whose likelihood, posterior and ELBO have closed forms.

Tipping and Bishop 1999 (Journal of the Royal Statistical Society B 61, 611-622): x = W z + mean + noise, z from
N(0, I), noise from N(0, variance I). Shapes: N observations of d components, q latents; float64 throughout, figures in
nats per observation.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Responsibilities:
    """q(z|x) of each observation: normal, one covariance for all."""

    mean: Tensor  # (N, q)
    covariance: Tensor  # (q, q)


@dataclass
class ProbabilisticPCA:
    loadings: Tensor  # W (d, q)
    mean: Tensor  # (d,)
    variance: Tensor  # () of the noise

    @classmethod
    def at_the_maximum(cls, data: Tensor, num_latents: int) -> "ProbabilisticPCA":
        """The maximum of the likelihood in closed form: principal axes, scaled, with no rotation added."""
        centred = data - data.mean(0)
        values, axes = torch.linalg.eigh(centred.T @ centred / len(data))  # in ascending order
        variance = values[:-num_latents].mean()
        kept = (values[-num_latents:] - variance).sqrt()
        return cls(axes[:, -num_latents:] * kept, data.mean(0), variance)

    def log_likelihood(self, data: Tensor) -> float:
        """Mean over the observations of log p(x), x from N(mean, W W^T + variance I)."""
        covariance = self.loadings @ self.loadings.T + self.variance * torch.eye(len(self.mean), dtype=data.dtype)
        return torch.distributions.MultivariateNormal(self.mean, covariance).log_prob(data).mean().item()

    def e_step(self, data: Tensor) -> Responsibilities:
        """The exact posterior p(z|x) of each observation: of all q the one that maximises the ELBO."""
        precision = self.loadings.T @ self.loadings + self.variance * torch.eye(self.loadings.shape[1]).to(data)
        inverse = torch.linalg.inv(precision)  # M^-1
        return Responsibilities((data - self.mean) @ self.loadings @ inverse, self.variance * inverse)

    def m_step(self, data: Tensor, given: Responsibilities) -> "ProbabilisticPCA":
        """Of all loadings and variances those that maximise the ELBO under q (the mean is the data's)."""
        mean = data.mean(0)
        centred = data - mean
        second = given.mean.T @ given.mean / len(data) + given.covariance  # E z z^T
        cross = centred.T @ given.mean / len(data)  # E x z^T
        loadings = cross @ torch.linalg.inv(second)
        # At this W the quadratic and the cross term of E |x - W z|^2 are alike, and one of them remains.
        variance = (centred.square().sum(1).mean() - (loadings * cross).sum()) / len(mean)
        return ProbabilisticPCA(loadings, mean, variance)

    def elbo(self, data: Tensor, given: Responsibilities) -> float:
        """E_q log p(x|z) - KL(q(z|x) || N(0, I)), the mean over the observations; at most the log-likelihood."""
        (num_components, num_latents), covariance = self.loadings.shape, given.covariance
        residuals = data - self.mean - given.mean @ self.loadings.T
        spread = (self.loadings @ covariance * self.loadings).sum()  # of W z under q
        distortion = 0.5 * num_components * (2 * math.pi * self.variance).log()
        distortion = distortion + (residuals.square().sum(1).mean() + spread) / (2 * self.variance)
        kl = 0.5 * (covariance.trace() + given.mean.square().sum(1).mean() - num_latents - covariance.logdet())
        return (-distortion - kl).item()
