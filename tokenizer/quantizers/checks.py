"""The rules of hyperparameters that several quantizers share; each is a ValueError with the value and the rule."""


def check_codebook_dim(codebook_dim: int) -> None:
    """At least one component."""
    if codebook_dim < 1:
        raise ValueError(f"codebook_dim={codebook_dim} must be at least 1")


def check_codebook(codebook_dim: int, codebook_size: int) -> None:
    """At least one component and two codes."""
    check_codebook_dim(codebook_dim)
    if codebook_size < 2:
        raise ValueError(f"codebook_size={codebook_size} must be at least 2: one code carries no information")


def check_not_negative(**weights: float) -> None:
    """Weights of losses, by name."""
    for name, weight in weights.items():
        if weight < 0:
            raise ValueError(f"{name}={weight} must not be negative")


def check_positive(**temperatures: float) -> None:
    """Temperatures, by name."""
    for name, temperature in temperatures.items():
        if temperature <= 0:
            raise ValueError(f"{name}={temperature} must be greater than 0: logits are divided by it")
