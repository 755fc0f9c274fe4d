"""Retrain with Lightning.

    python examples/train_lightning.py

Needs ``pip install lightning``.
"""

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import approxconv
from approxconv.demo import digits, small_cnn, train
from approxconv.training import in_order, score


class Classifier(lightning.LightningModule):
    """An approximate layer is an ordinary module: nothing here knows of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Cross entropy."""
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--multiplier", default="trunc5_8u_8s")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--accelerator", default="auto")
arguments = parser.parse_args()

lightning.seed_everything(0)
train_data, test_data = digits()
model = small_cnn()
train(model, train_data, epochs=arguments.epochs, lr=5e-3)  # any trained model

model = approxconv.approximate(model, arguments.multiplier)
approxconv.calibrate(model, in_order(train_data))
before = score(model, in_order(test_data)).accuracy
trainer = lightning.Trainer(
    max_epochs=arguments.epochs, accelerator=arguments.accelerator, devices=1, logger=False, enable_checkpointing=False
)
trainer.fit(Classifier(model.train()), DataLoader(train_data, batch_size=64, shuffle=True))
after = score(model.cpu(), in_order(test_data)).accuracy
print(f"held-out digits right: {before:.1f} % converted, {after:.1f} % retrained")
