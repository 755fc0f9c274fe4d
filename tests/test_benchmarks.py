import math

import pytest

from benchmarks.cpu import CASES, Case, geometric_mean, measure


def test_cases_are_the_layers_they_are_named_after():
    assert [case.macs for case in CASES[:4]] == [
        16 * s * s * c * c * 9 for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))
    ]
    assert sum(case.depthwise for case in CASES) == 10


@pytest.mark.parametrize("case", [Case("ResNet-18", 8, 6), Case("MobileNetV2 depthwise", 5, 7, 2)])
def test_a_small_case_is_measured(case):
    result = measure(case, repeats=2)
    assert min(result.seconds, result.native, result.gather) > 0
    assert result.ratio == result.native / result.seconds


def test_geometric_mean():
    assert math.isclose(geometric_mean([2.0, 8.0]), 4.0)
