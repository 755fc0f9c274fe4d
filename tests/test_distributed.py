"""Two processes end with what one has after the same batches. torchrun runs this file, too."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from approxconv import Multiplier
from approxconv.nn import ApproxConv2d, ApproxLinear
from approxconv.quantization import OperandQuantization, Quantization
from approxconv.training import Batches, process_group

RANGES = {
    "frozen": Quantization(),
    "moving": Quantization(activation=OperandQuantization(range="moving_average", momentum=0.2), freeze=False),
    "joint": Quantization(freeze=False),
    "learned": Quantization(activation=OperandQuantization(range="lsq"), weight=OperandQuantization(range="lsq")),
}
WRAPPERS = [("ddp", "frozen"), ("ddp", "moving"), ("ddp", "joint"), ("ddp", "learned")]
if torch.__version__ >= "2.13":  # gloo of older ones may sum gradients that FSDP2 wants averaged: pytorch issue 162338
    WRAPPERS.append(("fsdp", "moving"))


def net(quantization):
    """Without batch statistics, which are a rank's own."""
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    error = rng.integers(-90, 100, (256, 256))
    table = Multiplier(Multiplier.exact(8, False, True).table.numpy() + error, a_signed=False, w_signed=True, name="t")
    model = nn.Sequential(
        ApproxConv2d(2, 5, 3, multiplier=table, quantization=quantization),
        nn.ReLU(),
        ApproxConv2d(5, 5, (1, 3), groups=5, multiplier=table, quantization=quantization),
        nn.Flatten(),
        ApproxLinear(50, 3, multiplier=table, quantization=quantization),
    )
    for layer in model[::2]:
        if isinstance(layer, ApproxConv2d | ApproxLinear):
            layer.activation_scale.data.fill_(0.02)
            layer.activation_zero_point.fill_(31)
            layer.calibrated.fill_(True)
    return model


def trained(wrapper, ranges, rank, ranks):
    """The state after five steps."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net(RANGES[ranges])
    x = torch.randn(40, 2, 7, 6, generator=torch.Generator().manual_seed(2)).abs()
    batches = Batches(TensorDataset(x, torch.arange(40) % 3), 8, rank=rank, ranks=ranks)
    wrapped = model
    if ranks > 1 and wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    elif ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model[::2]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.02, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
    if wrapper == "fsdp" and ranks > 1:
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return model.state_dict()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    out = tmp_path_factory.mktemp("distributed")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(out)]
    subprocess.run([sys.executable, *command], check=True, timeout=300)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "ranges"), WRAPPERS)
def test_two_ranks_train_as_one(by_two, wrapper, ranges):
    one, *two = trained(wrapper, ranges, 0, 1), *(each[f"{wrapper} {ranges}"] for each in by_two)
    untrained = net(RANGES[ranges]).state_dict()
    for state in two:
        assert state.keys() == one.keys()
        for key, value in one.items():
            if value.is_floating_point():
                torch.testing.assert_close(
                    state[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
                )
            else:
                assert torch.equal(state[key], value), key
    if ranges in ("moving", "joint"):  # what the first layer sees does not depend on weights
        assert torch.equal(two[1]["0.activation_scale"], one["0.activation_scale"])
        assert not torch.equal(one["0.activation_scale"], untrained["0.activation_scale"])
    assert all(torch.equal(two[0][key], two[1][key]) for key in one)
    assert not torch.allclose(one["0.weight"], untrained["0.weight"], rtol=1e-2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")) as (rank, ranks):
        states = {f"{wrapper} {ranges}": trained(wrapper, ranges, rank, ranks) for wrapper, ranges in WRAPPERS}
        torch.save(states, Path(sys.argv[1]) / f"{rank}.pt")
