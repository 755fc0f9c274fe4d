"""The cost model: rates from timings, kept on disk, and what follows from them."""

import json
import os

import pytest
import torch

from approxconv.engines import cost
from approxconv.engines.cost import Rates
from approxconv.engines.work import Work, last_seconds, record

RATES = Rates(
    call=1e-4, lookup=1e-10, table=2e-7, gather=1e-9, product=1e-11, feature=1e-10, pack=1e-9, output=1e-8,
    depthwise_lookup=3e-10, depthwise_table=1e-8, depthwise_product=2e-11, depthwise_pack=1e-10,
    depthwise_output=1e-9, byte_lookup=5e-11, byte_table=1e-7,
)  # fmt: skip


@pytest.fixture
def measurements(monkeypatch, tmp_path):
    """How often the machine was measured."""
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path))
    cost._rates.cache_clear()
    count = []

    def measure():
        count.append(torch.get_num_threads())
        return RATES

    monkeypatch.setattr(cost, "_measure", measure)
    yield count
    cost._rates.cache_clear()


def test_work_counts_what_an_operator_does():
    assert Work.matmul((5, 7), (3, 7)) == Work("lut_matmul", 1, 5, 3, 7, 35)
    assert Work.matmul((2, 5, 7), (3, 7)) == Work("lut_matmul", 1, 10, 3, 7, 70)
    assert Work.matmul((2, 1, 5, 7), (4, 3, 7)) == Work("lut_matmul", 8, 5, 3, 7, 280)
    conv = Work.conv2d((2, 6, 9, 8), (4, 3, 3, 2), (2, 1), (1, 0), (1, 2), 2)
    assert conv == Work("lut_conv2d", 2, 2 * 5 * 6, 2, 18, 2 * 6 * 72)
    assert conv.macs == 2 * 4 * 5 * 6 * 18


def test_the_machine_is_measured_once_for_each_number_of_threads(measurements):
    threads = torch.get_num_threads()
    assert cost.measured_rates() == cost.measured_rates() == RATES
    cost._rates.cache_clear()  # as in another process
    assert cost.measured_rates() == RATES
    assert measurements == [threads]
    try:
        torch.set_num_threads(threads + 1)
        cost.measured_rates()
    finally:
        torch.set_num_threads(threads)
    assert measurements == [threads, threads + 1]


def test_without_a_disk_the_rates_are_the_process_s(measurements, monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("approxconv.kernels.cache.cached_folder", refuse)
    assert cost.measured_rates() == cost.measured_rates() == RATES
    assert len(measurements) == 1


def test_broken_rates_on_disk_are_measured_anew(measurements, tmp_path):
    cost.measured_rates()
    (file,) = tmp_path.rglob("rates.json")
    file.write_text(json.dumps({"lookup": 1}))
    cost._rates.cache_clear()
    assert cost.measured_rates() == RATES
    assert len(measurements) == 2


def test_seconds_follow_from_the_rates(measurements):
    work = Work.matmul((1000, 50), (20, 50))
    assert cost.seconds("cpu", work) == pytest.approx(1e-4 + 1e6 * 1e-10 + 1000 * 2e-7)
    assert cost.seconds("factored", work, 3) == pytest.approx(
        1e-4 + 3 * (1e6 * 1e-11 + 5e4 * 1e-10 + 1000 * 1e-9) + 2e4 * 1e-8
    )
    few = Work.matmul((2, 50), (20, 50))
    assert cost.seconds("cpu", few) == pytest.approx(1e-4 + 2000 * 1e-9)
    planes = Work.conv2d((2, 4, 5, 5), (4, 1, 3, 3), (1, 1), (1, 1), (1, 1), 4, "lut_dwconv2d")
    assert cost.seconds("cpu", planes) == pytest.approx(1e-4 + 1800 * 3e-10 + 36 * 1e-8)
    assert cost.seconds("factored", planes, 2) == pytest.approx(1e-4 + 2 * (1800 * 2e-11 + 36 * 1e-10) + 200 * 1e-9)


@pytest.mark.parametrize("rates", [[2e-9, 3e-7], [2e-9, 0.0]])
def test_rates_are_found_from_exact_times(rates):
    counts = [(1000, 10), (5000, 10), (2000, 99)]
    times = [sum(count * rate for count, rate in zip(row, rates, strict=True)) for row in counts]
    assert cost._solve(counts, iter(times)) == pytest.approx(rates, abs=1e-18)


def test_rates_are_never_negative():
    assert min(cost._solve([(1000, 10), (2000, 10)], iter([1.0, 3.0]))) >= 0


def test_what_a_product_takes_is_told_from_what_a_sum_takes():
    counts, outputs, rates = [(1000, 10), (2000, 99)], [7, 30], [2e-9, 3e-7, 5e-8]
    times = [
        products * (count * rates[0] + weights * rates[1]) + sums * rates[2]
        for products in (1, 3)
        for (count, weights), sums in zip(counts, outputs, strict=True)
    ]
    assert cost._by_products(counts, outputs, iter(times)) == pytest.approx(rates)


@pytest.mark.slow
def test_a_real_machine_can_be_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("APPROXCONV_CACHE_DIR", str(tmp_path))
    rates = cost._measure()
    assert rates.lookup > 0
    assert rates.product > 0


def test_the_last_time_is_remembered_by_engine_and_work():
    work, other = Work.matmul((5, 7), (3, 7)), Work.matmul((5, 7), (4, 7))
    record("cpu", work, 0.5)
    record("cpu", work, 0.25)
    assert last_seconds("cpu", work) == 0.25
    assert last_seconds("factored", work) is None
    assert last_seconds("cpu", other) is None


def test_calls_on_the_cpu_are_timed():
    x, w = torch.zeros(3, 61, dtype=torch.uint8), torch.zeros(2, 61, dtype=torch.uint8)
    torch.ops.approxconv.lut_matmul(x, w, torch.zeros(256, 256, dtype=torch.int32), engine="reference")
    assert last_seconds("reference", Work.matmul(x.shape, w.shape)) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_does_not_wait_for_a_measurement_of_its_parent(measurements):
    with cost._lock:  # as another thread holds it while it measures
        child = os.fork()
        if child == 0:
            os._exit(0 if cost._lock.acquire(timeout=5) else 1)
        assert os.waitpid(child, 0)[1] == 0
