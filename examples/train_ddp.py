"""Retrain on several processes, each with its share of every batch.

    torchrun --nproc-per-node 2 examples/train_ddp.py

Killed at any moment and started again, it goes on from its last checkpoint and ends with the same weights, bit for bit.
"""

import argparse
import os
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import approxconv
from approxconv.demo import digits, small_cnn, train
from approxconv.training import Batches, Training, in_order, process_group, score

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--multiplier", default="trunc5_8u_8s")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--checkpoint", type=Path, default=Path("train_ddp.pt"))
parser.add_argument("--every", type=int, default=10, help="batches between checkpoints")
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
    batches = Batches(train_data, batch_size=64, device=device, rank=rank, ranks=ranks)
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    training = Training.with_adam(wrapped, batches, epochs=arguments.epochs, lr=1e-3)
    if training.resume(arguments.checkpoint) and rank == 0:
        print(f"goes on after {training.epoch} epochs and {training.step} batches")
    training.run(arguments.epochs, checkpoint=arguments.checkpoint, every=arguments.every)

    accuracy = score(model, in_order(test_data, device=device, rank=rank, ranks=ranks)).accuracy
    if rank == 0:
        print(f"retrained on {ranks} processes: {accuracy:.1f} % of the held-out digits right")
