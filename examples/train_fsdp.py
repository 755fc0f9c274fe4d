"""Retrain with weights, gradients and optimizer sharded over several processes (FSDP2).

    torchrun --nproc-per-node 2 examples/train_fsdp.py

On the CPU it needs torch 2.13: gloo of older ones may sum gradients that are to be averaged (pytorch issue 162338).
"""

import argparse
import os
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import approxconv
from approxconv.demo import digits, small_cnn, train
from approxconv.nn import approx_layers
from approxconv.training import Batches, in_order, process_group, score, share_buffers

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--multiplier", default="trunc5_8u_8s")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--out", type=Path, default=Path("train_fsdp.pt"))
arguments = parser.parse_args()

gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
with process_group(device) as (rank, ranks):
    torch.manual_seed(0)
    train_data, test_data = digits()
    model = small_cnn().to(device)
    train(model, train_data, epochs=arguments.epochs, lr=5e-3)  # any trained model

    model = approxconv.approximate(model, arguments.multiplier)
    approxconv.calibrate(model, in_order(train_data, device=device))
    mesh = init_device_mesh(device.type, (ranks,))
    for layer in approx_layers(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = Batches(train_data, batch_size=64, device=device, rank=rank, ranks=ranks)
    for _ in range(arguments.epochs):
        model.train()
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    share_buffers(model)  # batch statistics are each rank's own
    # Every rank runs the model on all images: a sharded layer's forward pass is a collective.
    accuracy = score(model, in_order(test_data, device=device)).accuracy
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(state, arguments.out)  # what an unsharded model loads
        print(f"retrained on {ranks} processes: {accuracy:.1f} % of the held-out digits right")
