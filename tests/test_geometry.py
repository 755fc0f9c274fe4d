import itertools
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from approxconv.geometry import conv_output_size, pair

# One axis: size, kernel, stride, padding, dilation.
AXES = list(itertools.product(range(1, 7), range(1, 5), range(1, 4), range(3), range(1, 4)))


def torch_output_size(size, kernel, stride, padding, dilation):
    """(H', W') by torch on tensors without data, or None where torch refuses."""
    x, w = torch.empty(1, 1, *size, device="meta"), torch.empty(1, 1, *kernel, device="meta")
    try:
        return tuple(F.conv2d(x, w, None, stride, padding, dilation).shape[2:])
    except RuntimeError:
        return None


def test_output_size_is_torch_s():
    columns = AXES.copy()
    random.Random(0).shuffle(columns)
    refused = 0
    for row, column in zip(AXES, columns, strict=True):
        arguments = list(zip(row, column, strict=True))
        expected = torch_output_size(*arguments)
        if expected is None:
            refused += 1
            with pytest.raises(ValueError, match="larger than the input"):
                conv_output_size(*arguments)
        else:
            assert conv_output_size(*arguments) == expected, arguments
    assert 0 < refused < len(AXES) / 2


@pytest.mark.parametrize("axis", [0, 1])
def test_output_size_counts_windows(axis):
    for case in AXES:
        size, kernel, stride, padding, dilation = case
        span = range(size + 2 * padding)
        windows = sum(start + dilation * (kernel - 1) in span for start in span[::stride])
        arguments = [[other, other] for other in (5, 3, 2, 1, 1)]
        for argument, value in zip(arguments, case, strict=True):
            argument[axis] = value
        if windows:
            expected = [3, 3]
            expected[axis] = windows
            assert conv_output_size(*arguments) == tuple(expected), arguments
        else:
            with pytest.raises(ValueError, match="larger than the input"):
                conv_output_size(*arguments)


def test_an_impossible_size_names_all_that_makes_it_so():
    with pytest.raises(ValueError) as caught:
        conv_output_size((7, 20), (3, 5), (1, 1), (0, 1), (4, 6))
    for numbers in ("(7, 20)", "(3, 5)", "(0, 1)", "(4, 6)"):
        assert numbers in str(caught.value)


@pytest.mark.parametrize("kernel", [(0, 1), (1, 0), (3, -1)])
def test_an_empty_kernel(kernel):
    with pytest.raises(ValueError, match=rf"kernel size must be at least 1, got \({kernel[0]}, {kernel[1]}\)"):
        conv_output_size((5, 5), kernel, (1, 1), (2, 2), (1, 1))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, (3, 3)),
        ((2, 5), (2, 5)),
        ([5, 2], (5, 2)),
        (torch.Size([2, 5]), (2, 5)),
        ((4,), (4, 4)),
        ([4], (4, 4)),
        (1, (1, 1)),
        (np.int64(3), (3, 3)),
        (np.array([2, 5]), (2, 5)),
    ],
)
def test_pair(value, expected):
    got = pair("stride", value, 1)
    assert got == expected
    assert isinstance(got, tuple)


@pytest.mark.parametrize(("least", "value"), [(0, 0), (0, (0, 3)), (1, (1, 7)), (-2, -2)])
def test_the_least_is_allowed_and_one_below_is_not(least, value):
    numbers = pair("padding", value, least)
    assert min(numbers) == least
    for axis in range(2):
        below = list(numbers)
        below[axis] = least - 1
        with pytest.raises(ValueError, match=f"padding must be .*at least {least}, got .*{least - 1}"):
            pair("padding", below, least)
    with pytest.raises(ValueError, match=f"padding must be .*at least {least}, got {least - 1}$"):
        pair("padding", least - 1, least)


@pytest.mark.parametrize(
    "value",
    [
        (),
        (1, 2, 3),
        True,
        (True, 2),
        (2, False),
        2.0,
        (2.0, 2),
        (1, float("nan")),
        "2",
        ("2", "2"),
        None,
        (2, None),
    ],
    ids=repr,
)
def test_what_is_no_pair_of_ints_is_a_value_error_that_names_it(value):
    with pytest.raises(ValueError, match="dilation must be an int or a pair of ints, each at least 1, got "):
        pair("dilation", value, 1)
