"""The prior sharded by torch's fully_shard over two real processes equals the prior whole.

Launched by path, this file is the program of one rank: `... test_sharding.py FOLDER`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from prior import AutoregressivePrior, PriorConfig

NUM_RANKS, NUM_STEPS = 2, 3
LABELS = torch.arange(4)


def new_prior() -> AutoregressivePrior:
    """A tiny prior, the same at each call and in each process, with nothing random in its training."""
    torch.manual_seed(0)
    config = PriorConfig(30, [3, 4], num_classes=4, width=16, num_layers=2, num_heads=2, dropout=0.0, class_dropout=0.0)
    return AutoregressivePrior(config)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens (4, 3, 4) and labels (4,) of a step, over all ranks."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(30, (4, 3, 4), generator=generator), torch.randint(4, (4,), generator=generator)


def train(prior: AutoregressivePrior, rank: int, num_ranks: int) -> list[float]:
    """A few steps on this rank's part of each batch; the gradient's norm at each step, over all ranks."""
    # Not Adam, which hides the scale of a gradient.
    optimizer = torch.optim.SGD(prior.parameters(), lr=0.5)
    norms = []
    for step in range(NUM_STEPS):
        tokens, labels = (part.chunk(num_ranks)[rank] for part in batch(step))
        optimizer.zero_grad()
        F.cross_entropy(prior(tokens, labels).mT, tokens.flatten(1)).backward()
        norm = torch.nn.utils.get_total_norm(parameter.grad for parameter in prior.parameters())
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        optimizer.step()
    return norms


def generate(prior: AutoregressivePrior) -> Tensor:
    """Grids (4, 3, 4) drawn by a seed."""
    return prior.generate(LABELS, generator=torch.Generator().manual_seed(0))


def run_rank(folder: Path) -> None:
    """Train sharded; the first rank writes what it saw to result.pt, and the prior gathered from all ranks."""
    distributed.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (NUM_RANKS,)), distributed.get_rank()
    prior = new_prior()
    for block in prior.transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(prior, mesh=mesh)
    result = {"elements": {}, "sharded": {}}
    for name, parameter in prior.named_parameters():
        result["sharded"][name] = isinstance(parameter, DTensor)
        result["elements"][name] = (parameter.to_local().numel(), parameter.numel())
    result["norms"] = train(prior, rank, NUM_RANKS)
    try:  # the last backward pass has left the parameters sharded, and generate enters by no forward of the prior's own
        generate(prior)
    except RuntimeError as error:
        result["refusal"] = str(error)
    prior.eval()
    with torch.no_grad():
        result["logits"] = prior(*batch(0))
    result["log_prob"] = prior.log_prob(*batch(0)).detach()
    register_fsdp_forward_method(prior, "generate")
    result["grids"] = generate(prior)
    weights = get_model_state_dict(prior, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # elsewhere the gathered weights are empty
        whole = new_prior()
        whole.load_state_dict(weights)
        whole.save_pretrained(folder / "gathered")
        torch.save(result, folder / "result.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # past the end of the interpreter, where threads of torch aborted a rank now and then


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> dict:
    """What the first rank saw, and the prior that was gathered and loaded again as `gathered`."""
    folder = tmp_path_factory.mktemp("sharded")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(NUM_RANKS)]
    command = [sys.executable, *launcher, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "result.pt") | {"gathered": AutoregressivePrior.from_pretrained(folder / "gathered")}


@pytest.fixture(scope="module")
def unsharded() -> dict:
    """The same training in one process on the joined batches."""
    prior = new_prior()
    norms = train(prior, rank=0, num_ranks=1)
    return {"prior": prior.eval(), "norms": norms}


def test_every_parameter_is_sharded_and_a_rank_holds_its_share(sharded):
    assert all(sharded["sharded"].values())
    assert sharded["sharded"].keys() == dict(new_prior().named_parameters()).keys()
    local, whole = (sum(counts) for counts in zip(*sharded["elements"].values(), strict=True))
    assert whole == sum(parameter.numel() for parameter in new_prior().parameters())
    assert 0.4 * whole < local < 0.6 * whole


def test_gradients_equal_those_of_one_process_on_the_joined_batch(sharded, unsharded):
    assert sharded["norms"] == pytest.approx(unsharded["norms"], rel=1e-4)


def test_training_ends_with_the_weights_of_one_process_on_the_joined_batch(sharded, unsharded):
    found, expected, begun = (each.state_dict() for each in (sharded["gathered"], unsharded["prior"], new_prior()))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)
        assert not torch.equal(weight, begun[name])


@torch.no_grad()
def test_a_gathered_prior_loads_in_one_process_and_gives_the_logits_of_the_sharded_one(sharded):
    torch.testing.assert_close(sharded["gathered"](*batch(0)), sharded["logits"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_log_prob_works_sharded_as_it_is(sharded):
    torch.testing.assert_close(sharded["gathered"].log_prob(*batch(0)), sharded["log_prob"], rtol=1e-4, atol=1e-4)


def test_generate_works_sharded_once_it_is_registered_as_a_forward(sharded):
    assert "DTensor" in sharded["refusal"]  # without register_fsdp_forward_method: an error, never wrong tokens
    torch.testing.assert_close(generate(sharded["gathered"]), sharded["grids"], rtol=0, atol=0)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
