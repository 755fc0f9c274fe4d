import gc
import weakref

import pytest
import torch

from approxconv._versioned import once_per_version


class Summary:
    """What a tensor held when the function ran; can be weakly referenced."""

    def __init__(self, tensor):
        self.values = tensor.tolist()


@pytest.fixture
def counted():
    """A remembered function and the list of what it was run on."""
    runs = []

    @once_per_version
    def summary(tensor):
        result = Summary(tensor)
        runs.append(result.values)
        return result

    return summary, runs


def no_grad_write(tensor):
    with torch.no_grad():
        tensor[1] = 9


def inference_write(tensor):
    with torch.inference_mode():
        tensor[1] = 9


WRITES = {
    "index": lambda t: t.__setitem__(1, 9),
    "method": lambda t: t.mul_(9),
    "out": lambda t: torch.add(t, 1, out=t),
    "copy": lambda t: t.copy_(torch.tensor([7, 8, 9])),
    "view": lambda t: t[1:].fill_(9),
    "view_of_a_view": lambda t: t.view(3, 1).T[0, 1:].fill_(9),
    "detached": lambda t: t.detach().fill_(9),
    "no_grad": no_grad_write,
    "inference_mode": inference_write,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_runs_once_until_written_to(counted, write):
    summary, runs = counted
    tensor = torch.tensor([1, 2, 3])
    first = summary(tensor)
    assert summary(tensor) is first
    write(tensor)
    second = summary(tensor)
    assert second.values == tensor.tolist() != first.values
    assert summary(tensor) is second
    assert runs == [[1, 2, 3], tensor.tolist()]


def test_a_view_s_own_summary_follows_writes_to_its_base(counted):
    summary, _ = counted
    base = torch.tensor([1, 2, 3])
    view = base[1:]
    assert summary(view).values == [2, 3]
    base[2] = 9
    assert summary(view).values == [2, 9]
    assert summary(base).values == [1, 2, 9]


def test_tensors_are_told_apart_by_identity_not_by_content(counted):
    summary, runs = counted
    tensors = [torch.tensor([1, 2, 3]) for _ in range(3)]
    tensors.append(tensors[0].detach())
    results = [summary(tensor) for tensor in tensors]
    assert len(set(map(id, results))) == len(runs) == 4
    assert [summary(tensor) for tensor in tensors] == results
    assert len(runs) == 4


def test_a_reused_address_is_a_new_tensor(counted):
    summary, runs = counted
    ids = set()
    for n in range(100):
        tensor = torch.tensor([n])
        ids.add(id(tensor))
        assert summary(tensor).values == [n]
        del tensor
    assert len(runs) == 100 > len(ids)


def test_the_result_dies_with_the_tensor(counted):
    summary, _ = counted
    tensor = torch.tensor([1, 2, 3])
    alive = weakref.ref(summary(tensor))
    gc.collect()
    assert alive() is not None
    del tensor
    gc.collect()
    assert alive() is None


def test_an_old_version_s_result_is_let_go(counted):
    summary, _ = counted
    tensor = torch.tensor([1, 2, 3])
    alive = weakref.ref(summary(tensor))
    tensor.add_(1)
    summary(tensor)
    gc.collect()
    assert alive() is None


def test_a_write_while_the_function_runs_is_not_missed():
    tensor = torch.tensor([1])
    writes = [2, 3]

    @once_per_version
    def value(seen):
        result = seen.item()
        if writes:
            tensor.fill_(writes.pop(0))
        return result

    assert [value(tensor) for _ in range(4)] == [1, 2, 3, 3]


@pytest.mark.parametrize("result", [None, 0, False, ()])
def test_a_false_result_is_remembered_too(result):
    runs = []

    @once_per_version
    def false(tensor):
        runs.append(tensor)
        return result

    tensor = torch.zeros(1)
    assert [false(tensor), false(tensor)] == [result, result]
    assert len(runs) == 1


def test_an_error_is_not_remembered():
    tensor, failures = torch.tensor([5]), [OSError("first"), OSError("second")]

    @once_per_version
    def value(seen):
        if failures:
            raise failures.pop(0)
        return seen.item()

    for message in ("first", "second"):
        with pytest.raises(OSError, match=message):
            value(tensor)
    assert value(tensor) == 5


def test_functions_do_not_share_what_they_remember():
    low, high = once_per_version(lambda t: t.min().item()), once_per_version(lambda t: t.max().item())
    tensor = torch.tensor([3, 1, 2])
    assert [low(tensor), high(tensor), low(tensor), high(tensor)] == [1, 3, 1, 3]


def test_gradients_are_left_out():
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    double = once_per_version(lambda t: t * 2)
    result = double(tensor)
    assert double(tensor) is result
    assert not result.requires_grad
    assert not double(tensor * 3).requires_grad


def test_inference_tensors_are_never_stale(counted):
    summary, _ = counted
    with torch.inference_mode():
        tensor = torch.tensor([1, 2, 3])
        assert summary(tensor).values == [1, 2, 3]
        tensor[0] = 9
        assert summary(tensor).values == [9, 2, 3]
    assert summary(tensor).values == [9, 2, 3]


def test_a_normal_tensor_is_remembered_within_inference_mode(counted):
    summary, runs = counted
    tensor = torch.tensor([1, 2, 3])
    with torch.inference_mode():
        inside = summary(tensor)
        assert summary(tensor) is inside
    assert summary(tensor) is inside
    assert len(runs) == 1
