"""Retrain with Hugging Face Accelerate.

    accelerate launch examples/train_accelerate.py

Needs ``pip install accelerate``.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

import approxconv
from approxconv.demo import digits, small_cnn, train
from approxconv.training import in_order, score

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--multiplier", default="trunc5_8u_8s")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--cpu", action="store_true")
arguments = parser.parse_args()

accelerator = Accelerator(cpu=arguments.cpu)
device = accelerator.device
set_seed(0)
train_data, test_data = digits()
model = small_cnn().to(device)
train(model, train_data, epochs=arguments.epochs, lr=5e-3)  # any trained model

model = approxconv.approximate(model, arguments.multiplier)
approxconv.calibrate(model, in_order(train_data, device=device))
before = score(model, in_order(test_data, device=device)).accuracy
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
loader = DataLoader(train_data, batch_size=64, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
model.train()
for _ in range(arguments.epochs):
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
after = score(accelerator.unwrap_model(model), in_order(test_data, device=device)).accuracy
accelerator.print(f"held-out digits right: {before:.1f} % converted, {after:.1f} % retrained")
