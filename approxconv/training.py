"""Training that survives a kill: batches that know their place, and checkpoints that hold all a run consists of.

What comes out does not depend on how often a run was cut off: batches, random numbers, optimizer, schedule and
activation ranges go on bit for bit where the last checkpoint left them. Under torchrun each process has its share of
every batch.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, TensorDataset

FORMAT, VERSION = "approxconv training", 1


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started, if it did; yields this one's rank and their number."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
        # A thread of gloo drops the last collective's tensor after telling that it is done, for which it needs an
        # interpreter: one that ends then aborts. A barrier has no tensor, and takes longer than that.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def share_buffers(model: nn.Module) -> None:
    """Give all ranks the first one's floating-point buffers, such as the statistics of batch normalisation."""
    if _is_distributed():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, 0)


def random_states(device: torch.device | None = None) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, and of a CUDA device's."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Undo what happened to the global generators since `random_states`."""
    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


class _Seeded(Dataset):
    """Samples whose random augmentation depends on seed, epoch and index alone, whichever process draws it when."""

    def __init__(self, dataset: Dataset, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> Any:
        states = random_states()
        try:
            seed = int(np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            return self.dataset[index]
        finally:
            set_random_states(states)


def _load(dataset: Dataset, picks: Sequence[Tensor], device: torch.device, workers: int) -> Iterator[Sequence[Tensor]]:
    """The samples of each pick as a batch on the device."""
    if type(dataset) is TensorDataset:  # whole batches at once
        batches = (dataset[pick.to(dataset.tensors[0].device)] for pick in picks)
    else:
        batches = DataLoader(
            dataset,
            batch_sampler=[pick.tolist() for pick in picks],
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the global one
        )
    for batch in batches:
        yield [part.to(device, non_blocking=True) for part in batch]


class Batches:
    """A dataset's samples in random batches, each iteration the rest of an epoch; its place can be saved and restored.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        Map-style, of tuples of an input and a label. Random augmentation in it is seeded for each sample, so that it
        depends neither on workers and ranks nor on interruptions.
    batch_size : int
        Samples a batch, of all ranks together. What a last, smaller batch has beyond a multiple of `ranks` is left out.
    seed : int
        Of the order and of the augmentation.
    device : torch.device
        Where batches are wanted.
    rank, ranks : int
        Which of how many shares of every batch.
    workers : int
        Processes that load samples.

    Raises
    ------
    ValueError
        The dataset is empty or has no length, or a batch has less than one sample for each rank.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
    ) -> None:
        if not isinstance(dataset, Sized) or len(dataset) < ranks:
            got = f"{len(dataset)} samples" if isinstance(dataset, Sized) else f"{type(dataset).__name__} without len()"
            raise ValueError(f"dataset must hold at least a sample for each of {ranks} ranks, got {got}")
        if batch_size < ranks:
            raise ValueError(f"batch_size must be at least 1 for each of {ranks} ranks, got {batch_size}")
        self.dataset, self.batch_size, self.seed, self.device = dataset, batch_size, seed, torch.device(device)
        self.rank, self.ranks, self.workers = rank, ranks, workers
        self.epoch = self.step = 0  # batches of this epoch handed out
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch_start = self._generator.get_state()

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest >= self.ranks)

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        self._generator.set_state(self._epoch_start)
        order = torch.randperm(len(self.dataset), generator=self._generator)
        batches = order.split(self.batch_size)[: len(self)]
        shares = [batch[: len(batch) // self.ranks * self.ranks][self.rank :: self.ranks] for batch in batches]
        dataset = self.dataset
        if type(dataset) is not TensorDataset:
            dataset = _Seeded(dataset, self.seed, self.epoch)
        for batch in _load(dataset, shares[self.step :], self.device, self.workers):
            self.step += 1
            yield batch
        self.epoch, self.step = self.epoch + 1, 0
        self._epoch_start = self._generator.get_state()

    def state_dict(self) -> dict[str, Any]:
        """The place: epoch, batches of it that are done, and the generator that ordered it."""
        return {"epoch": self.epoch, "step": self.step, "generator": self._epoch_start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a place that `state_dict` told."""
        self.epoch, self.step, self._epoch_start = state["epoch"], state["step"], state["generator"]


def in_order(
    dataset: Dataset,
    batch_size: int = 256,
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
) -> Iterator[Sequence[Tensor]]:
    """A rank's share of a dataset once, in order, in batches on a device: for `accuracy` and `approxconv.calibrate`."""
    picks = torch.arange(len(dataset))[rank::ranks].split(batch_size)
    return _load(dataset, [pick for pick in picks if len(pick)], torch.device(device), workers)


@dataclass(frozen=True)
class Score:
    """How a classifier does on some batches, of all ranks together.

    Attributes
    ----------
    loss : float
        Mean cross entropy.
    accuracy : float
        Share classified right, in percent.
    images : int
        How many inputs there were.
    images_per_second : float
        With everything around the model, such as loading them.
    """

    loss: float
    accuracy: float
    images: int
    images_per_second: float

    @classmethod
    def of(cls, figures: Tensor, seconds: float) -> Score:
        """From `_figures`, summed."""
        loss, hits, images = figures.tolist()
        return cls(loss / images, 100 * hits / images, int(images), images / seconds)


def _figures(output: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """Summed loss, hits and number of a batch: float64 ``(3,)``."""
    hits, number = (output.argmax(1) == labels).sum(), torch.full_like(loss, len(labels), dtype=torch.float64)
    return torch.stack([loss.detach() * number, hits.double(), number])


def _joint(figures: Tensor) -> Tensor:
    """Of all ranks together, in place."""
    if _is_distributed():
        dist.all_reduce(figures)
    return figures


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def score(model: nn.Module, batches: Iterable[Sequence[Tensor]]) -> Score:
    """Loss, accuracy and speed on batches ``(inputs, labels)``, of all ranks together; leaves the model in eval mode.

    Raises
    ------
    ValueError
        No batches.
    """
    model.eval()
    device = next(chain(model.parameters(), model.buffers())).device
    total, start = torch.zeros(3, dtype=torch.float64, device=device), _now(device)
    for inputs, labels in batches:
        output = model(inputs)
        total += _figures(output, labels, F.cross_entropy(output, labels))
    if _joint(total)[2] == 0:
        raise ValueError("batches must yield at least one batch, got none")
    return Score.of(total, _now(device) - start)


class Training:
    """Everything that a training run consists of, to be run, saved and resumed.

    Parameters
    ----------
    model : torch.nn.Module
        A classifier, on its device; may be wrapped by `DistributedDataParallel`.
    optimizer : torch.optim.Optimizer
        Of the model's parameters.
    batches : Batches
        To train on.
    scheduler : torch.optim.lr_scheduler.LRScheduler, optional
        Stepped after each epoch.
    settings : mapping, optional
        What else the result depends on, by name: numbers, strings and lists. A checkpoint resumes only a run with
        the same ones.

    Attributes
    ----------
    epoch, step : int
        Epochs done, and batches done of the next one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        batches: Batches,
        *,
        scheduler: LRScheduler | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.optimizer, self.batches, self.scheduler = model, optimizer, batches, scheduler
        self.settings = {**(settings or {}), "ranks": batches.ranks, "batch_size": batches.batch_size}
        self._figures, self._seconds = torch.zeros(3, dtype=torch.float64), 0.0  # of this epoch

    @classmethod
    def with_adam(
        cls, model: nn.Module, batches: Batches, *, epochs: int, lr: float, settings: Mapping[str, Any] | None = None
    ) -> Training:
        """Adam, its learning rate falling from `lr` to 0 along a cosine over so many epochs."""
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        settings = {**(settings or {}), "epochs": epochs, "lr": lr}
        return cls(model, optimizer, batches, scheduler=scheduler, settings=settings)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.batches.epoch

    @property
    def step(self) -> int:
        """Batches of this epoch done."""
        return self.batches.step

    def run(
        self,
        epochs: int,
        *,
        checkpoint: Path | None = None,
        every: int | None = None,
        after_batch: Callable[[Score], None] | None = None,
        after_epoch: Callable[[Score], None] | None = None,
    ) -> None:
        """Train on cross entropy until `epochs` epochs are done; the model is left in eval mode.

        Parameters
        ----------
        epochs : int
            In all, with those before a resumption.
        checkpoint : Path, optional
            Where to `save` after each epoch.
        every : int, optional
            Batches after which to save within an epoch, too.
        after_batch, after_epoch : callable, optional
            Get the score of the batch or the epoch, while training.
        """
        device = self.batches.device
        while self.epoch < epochs:
            self.model.train()
            start = _now(device)
            for inputs, labels in self.batches:
                self.optimizer.zero_grad()
                output = self.model(inputs)
                loss = F.cross_entropy(output, labels)
                loss.backward()
                self.optimizer.step()
                figures = _joint(_figures(output, labels, loss)).cpu()
                now = time.perf_counter()
                self._figures, self._seconds = self._figures + figures, self._seconds + now - start
                if after_batch is not None:
                    after_batch(Score.of(figures, now - start))
                start = now
                if checkpoint is not None and every and self.step % every == 0:
                    self.save(checkpoint)
            if self.scheduler is not None:
                self.scheduler.step()
            share_buffers(self.model)
            done = Score.of(self._figures, self._seconds)
            self._figures, self._seconds = torch.zeros(3, dtype=torch.float64), 0.0
            if after_epoch is not None:
                after_epoch(done)
            if checkpoint is not None:
                self.save(checkpoint)
        self.model.eval()

    def _parts(self) -> dict[str, Any]:
        """What has a state_dict of its own; the model without DistributedDataParallel's prefix."""
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        parts = {"model": model, "optimizer": self.optimizer, "scheduler": self.scheduler, "batches": self.batches}
        return {name: part for name, part in parts.items() if part is not None}

    def save(self, path: Path) -> None:
        """Write all there is to know into a file, at once or not at all; every rank calls it, the first one writes."""
        random = random_states(self.batches.device)
        if _is_distributed():
            gathered = [None] * self.batches.ranks
            dist.all_gather_object(gathered, random)
        else:
            gathered = [random]
        if self.batches.rank > 0:
            return
        content = {"format": FORMAT, "version": VERSION, "settings": self.settings, "random": gathered}
        content |= {name: part.state_dict() for name, part in self._parts().items()}
        content |= {"figures": self._figures, "seconds": self._seconds}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as file:
            torch.save(content, file)

    def resume(self, path: Path) -> bool:
        """Go on from what `save` wrote, bit for bit; False if there is no such file.

        Raises
        ------
        ValueError
            The file is no checkpoint, a newer version's, or one of a run with other settings.
        """
        if not path.exists():
            return False
        content = read_checkpoint(path)
        for name, value in self.settings.items():
            saved = content["settings"].get(name)
            if saved != value:
                raise ValueError(f"{path} holds a run with {name} = {saved!r}, this one has {name} = {value!r}")
        for name, part in self._parts().items():
            part.load_state_dict(content[name])
        self._figures, self._seconds = content["figures"], content["seconds"]
        set_random_states(content["random"][self.batches.rank], self.batches.device)
        return True


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, without running code from the file; a ValueError if that is not in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # which ones a malformed file raises is not settled
        raise ValueError(f"{path} holds no tensors of torch.save: {error}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Training.save` wrote, on the CPU; ``["model"]`` is the model's state_dict.

    Raises
    ------
    ValueError
        The file is no checkpoint, or a newer version's.
    """
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of approxconv's training")
    if content["version"] > VERSION:
        raise ValueError(
            f"{path} is of version {content['version']}, this approxconv reads up to {VERSION}: upgrade it"
        )
    return content


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is whole and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Log:
    """JSON lines, one object each; of a run that is resumed, those that it will write again are dropped first.

    Parameters
    ----------
    path : Path
        Appended to.
    epoch, step : int
        The place that the run goes on from.
    """

    def __init__(self, path: Path, epoch: int = 0, step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                    before = (entry["epoch"], entry.get("step", math.inf)) <= (epoch, step)
                except (ValueError, KeyError, TypeError):  # the last one, cut off by the kill
                    continue
                if before:
                    kept.append(line)
        with replaced(path) as file:
            file.writelines(kept)
        self.path = path

    def write(self, **entry: Any) -> None:
        """Add a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
