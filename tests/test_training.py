import copy
import itertools
import json
import os
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from approxconv import Multiplier, training
from approxconv.nn import ApproxConv2d, ApproxLinear
from approxconv.quantization import OperandQuantization, Quantization
from approxconv.training import Batches, Log, Training, in_order, read_checkpoint, score

MOVING = Quantization(activation=OperandQuantization(range="moving_average", momentum=0.1), freeze=False)
LEARNED = Quantization(activation=OperandQuantization(range="lsq"), weight=OperandQuantization(range="lsq"))


class Noisy(Dataset):
    """Augmented by all three global generators, one of which a sample may leave unused."""

    def __len__(self):
        return 26

    def __getitem__(self, index):
        noise = torch.rand(1, 5, 4) + random.random() + np.random.random()
        return noise + index, index % 3


def hostile_table():
    rng = np.random.default_rng(3)
    return Multiplier(rng.integers(-40, 300, (16, 16)), a_signed=False, w_signed=True, name="hostile")


def make(quantization=MOVING, batches=None, settings=None):
    """A run with everything that has a state: dropout, batch statistics, moving or learned ranges, momentum."""
    torch.manual_seed(1)
    table = hostile_table()
    model = nn.Sequential(
        ApproxConv2d(1, 4, (3, 2), multiplier=table, quantization=quantization),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        ApproxLinear(36, 3, multiplier=table, quantization=quantization),
    )
    for layer in (model[0], model[5]):
        layer.calibrated.fill_(True)
    batches = batches or Batches(Noisy(), 4, seed=5)
    return Training.with_adam(model, batches, epochs=3, lr=0.01, settings=settings)


class KilledError(Exception):
    pass


def run_until(run, batches, path, every):
    """Run until so many batches are done, then stop as if killed: nothing is saved at the end."""
    done = []

    def after_batch(result):
        done.append(result)
        if len(done) == batches:
            raise KilledError

    with pytest.raises(KilledError):
        run.run(3, checkpoint=path, every=every, after_batch=after_batch)
    return done


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("quantization", [MOVING, LEARNED], ids=["moving", "learned"])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, quantization):
    whole, epochs = make(quantization), []
    whole.run(3, checkpoint=tmp_path / "whole.pt", after_epoch=epochs.append)
    path, resumed = tmp_path / "run" / "checkpoint.pt", []
    for kill_after in (3, 1, 6, 2, 9):  # before the first checkpoint, within epochs, right after one
        run = make(quantization)
        if path.exists():
            torch.manual_seed(kill_after)  # what it was does not matter
        run.resume(path)
        run_until(run, kill_after, path, every=2)
    run = make(quantization)
    assert run.resume(path)
    run.run(3, checkpoint=path, after_epoch=resumed.append)
    assert (run.epoch, run.step) == (3, 0)
    a, b = read_checkpoint(tmp_path / "whole.pt"), read_checkpoint(path)
    del a["seconds"], b["seconds"]
    assert same(a, b)
    assert [(each.loss, each.accuracy, each.images) for each in resumed] == [
        (each.loss, each.accuracy, each.images) for each in epochs[-len(resumed) :]
    ]
    assert os.listdir(path.parent) == ["checkpoint.pt"]
    assert not same(make(quantization).model.state_dict(), run.model.state_dict())


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path, run = tmp_path / "checkpoint.pt", make()
    assert not run.resume(path)
    run.save(path)
    before = path.read_bytes()

    def dies(content, file):
        file.write(b"half")
        raise KilledError

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KilledError):
        run.save(path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    run.save(path)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_what_does_not_resume(tmp_path):
    path = tmp_path / "checkpoint.pt"
    make(settings={"lr": 1, "multiplier": "a"}).save(path)
    with pytest.raises(ValueError, match="multiplier = 'a', this one has multiplier = 'b'"):
        make(settings={"multiplier": "b"}).resume(path)
    with pytest.raises(ValueError, match="batch_size = 4, this one has batch_size = 5"):
        make(batches=Batches(Noisy(), 5)).resume(path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "version": 99}, path)
    with pytest.raises(ValueError, match="version 99"):
        make().resume(path)
    torch.save(content["model"], path)
    with pytest.raises(ValueError, match="is no checkpoint"):
        make().resume(path)
    path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=f"{path.name} holds no tensors"):
        make().resume(path)


def chained(lists):
    return list(itertools.chain.from_iterable(lists))


def epochs_of(batches, number):
    return [[(x.clone(), y.tolist()) for x, y in batches] for _ in range(number)]


def test_batches_are_the_dataset_in_another_order_each_epoch():
    data = TensorDataset(torch.arange(26.0), torch.arange(26))
    first, second = epochs_of(Batches(data, 4, seed=2), 2)
    assert [len(y) for _, y in first] == [4, 4, 4, 4, 4, 4, 2]
    orders = [chained(y for _, y in epoch) for epoch in (first, second)]
    assert orders[0] != orders[1]
    assert all(sorted(order) == list(range(26)) for order in orders)
    assert [y for _, y in epochs_of(Batches(data, 4, seed=2), 1)[0]] == [y for _, y in first]
    assert [y for _, y in epochs_of(Batches(data, 4, seed=3), 1)[0]] != [y for _, y in first]


def test_ranks_share_the_batches_of_one():
    data = TensorDataset(torch.arange(29.0), torch.arange(29))
    whole = epochs_of(Batches(data, 7, seed=2), 2)
    shares = [epochs_of(Batches(data, 7, seed=2, rank=rank, ranks=3), 2) for rank in range(3)]
    for epoch, *parts in zip(whole, *shares, strict=True):
        assert len(parts[0]) == 4  # of the last one, with a single sample, there is none for each
        for (_, labels), *pieces in zip(epoch, *parts, strict=False):
            assert sorted(chained(y for _, y in pieces)) == sorted(labels[:6])
            assert {len(y) for _, y in pieces} == {2}


def test_augmentation_depends_on_nothing_but_seed_epoch_and_sample():
    torch.manual_seed(0)
    states = training.random_states()
    plain = epochs_of(Batches(Noisy(), 4, seed=5), 2)
    assert same(training.random_states(), states)
    random.random()
    torch.rand(1)
    np.random.random()
    by_workers = epochs_of(Batches(Noisy(), 4, seed=5, workers=2), 2)
    assert same(by_workers, plain)
    assert not same(epochs_of(Batches(Noisy(), 4, seed=6), 2), plain)
    first, second = ({int(x.min()): x for batch, _ in epoch for x in batch} for epoch in plain)
    assert not any(torch.equal(first[key], second[key]) for key in first.keys() & second.keys())


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "dataset must hold at least a sample for each of 1 ranks, got 0 samples"),
        (iter(()), {}, "dataset must hold at least a sample .* without len"),
        ([(1, 2)] * 8, {"batch_size": 0}, "batch_size must be at least 1 for each of 1 ranks, got 0"),
        ([(1, 2)] * 8, {"batch_size": 2, "ranks": 3}, "batch_size must be at least 1 for each of 3 ranks, got 2"),
    ],
)
def test_batches_that_cannot_be(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        Batches(dataset, **{"batch_size": 4, **options})


def test_a_derived_tensor_dataset_keeps_its_own_samples():
    class Doubled(TensorDataset):
        def __getitem__(self, index):
            assert isinstance(index, int)
            return 2 * self.tensors[0][index], self.tensors[1][index]

    data = Doubled(torch.arange(9.0), torch.arange(9))
    for batches in (Batches(data, 4), in_order(data, 4)):
        assert all(torch.equal(x, 2.0 * y) for x, y in batches)


def test_score_is_that_of_the_whole():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Dropout(), nn.Linear(6, 3)), torch.randn(23, 6), torch.arange(23) % 3
    result = score(model.train(), in_order(TensorDataset(x, y), 5))
    output = model(x)  # left in eval mode
    assert result.images == 23
    assert result.accuracy == pytest.approx(100 * (output.argmax(1) == y).float().mean().item())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(output, y).item(), rel=1e-5)
    assert result.images_per_second > 0
    with pytest.raises(ValueError, match="batches must yield at least one batch"):
        score(model, [])


def test_shares_in_order_are_the_dataset():
    data = TensorDataset(torch.arange(11.0), torch.arange(11))
    assert chained(y.tolist() for _, y in in_order(data, 4)) == list(range(11))
    assert chained(y.tolist() for rank in range(3) for _, y in in_order(data, 2, rank=rank, ranks=3)) == [
        0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8,
    ]  # fmt: skip
    assert list(in_order(data, rank=12, ranks=13)) == []


def test_a_log_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    log = Log(path)
    for epoch in range(2):
        for step in (1, 2):
            log.write(epoch=epoch, step=step)
        log.write(epoch=epoch, loss=0.5)
    with path.open("a") as file:
        file.write('{"epoch": 0, "st')
    lines = [json.loads(line) for line in path.read_text().splitlines()[:-1]]
    Log(path, 1, 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:4]
    Log(path, 1, 0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:3]
    Log(path)
    assert path.read_text() == ""


def test_random_states_come_back():
    states = copy.deepcopy(training.random_states())
    first = random.random(), np.random.random(), torch.rand(3).tolist(), random.gauss(0, 1), np.random.normal()
    training.set_random_states(states)
    again = random.random(), np.random.random(), torch.rand(3).tolist(), random.gauss(0, 1), np.random.normal()
    assert first == again
