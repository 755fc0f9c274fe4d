"""Every engine, op, function and layer against the oracle, on the reference circuits and on the zoo."""

import re
import shutil

import numpy as np
import pytest
import torch

from approxconv import EngineError, factorize, get_multiplier, list_multipliers, use_engine
from approxconv.engines import work
from approxconv.engines.residual import known_split
from approxconv.nn import ApproxConv2d, ApproxLinear
from approxconv.operators import (
    ApproxConv2dOp,
    ApproxDWConv2dOp,
    ApproxGeMMOp,
    Conv2dArgs,
    FastApproxConv2dOp,
    FastApproxGeMMOp,
)

ENGINES = ("cpu", "factored", "residual", "auto")
STRIDE, PADDING, DILATION = [2, 1], [1, 2], [1, 2]
CONV = Conv2dArgs(4, 12, (3, 2), (2, 1), (1, 2), (1, 2), groups=2)
DEPTHWISE = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


@pytest.fixture(autouse=True)
def weigh_small_calls(monkeypatch):
    """So that "auto" has two engines to choose from for operands as small as these."""
    monkeypatch.setattr(work, "_SMALL", 0)


def _operand(random, shape, bits, seed):
    """`random` rows of random bytes, of which the low bits count, and a row of each end of a signed and an unsigned."""
    rows = torch.randint(0, 256, (random, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    ends = (2 ** (bits - 1), 2**bits - 1, 0, 2 ** (bits - 1) - 1)
    return torch.cat([rows, *(torch.full((1, *shape), end, dtype=torch.uint8) for end in ends)])


def _values(codes, bits, signed):
    codes = codes.long() & 2**bits - 1
    return (codes - (codes >> bits - 1 << bits) if signed else codes).float()


class _Operands:
    """x and w of every operator: each of the ends meets each."""

    def __init__(self, multiplier):
        a, w = multiplier.a_bits, multiplier.w_bits
        self.multiplier = multiplier
        self.pad_code = 2**a - 1
        self.matmul = _operand(3, (67,), a, 0), _operand(3, (67,), w, 1)
        images, filters = _operand(1, (4, 6, 5), a, 2), _operand(2, (2, 3, 2), w, 3)
        self.conv2d = images, filters.repeat(2, 1, 1, 1)
        self.dwconv2d = images, _operand(1, (4, 1, 3, 2), w, 4).transpose(0, 1).flatten(0, 1)

    def sums(self, engine, pad_code):
        """int32, of the three ops."""
        ops, table = torch.ops.approxconv, self.multiplier.table
        geometry = STRIDE, PADDING, DILATION
        return (
            ops.lut_matmul(*self.matmul, table, engine=engine),
            ops.lut_conv2d(*self.conv2d, table, *geometry, CONV.groups, pad_code, engine=engine),
            ops.lut_dwconv2d(*self.dwconv2d, table, *geometry, pad_code, engine=engine),
        )

    def values(self, operator):
        m = self.multiplier
        x, w = getattr(self, operator)
        return _values(x, m.a_bits, m.a_signed), _values(w, m.w_bits, m.w_signed)

    def looked_up(self, out_dims):
        """float32, of the three functions."""
        return (
            ApproxGeMMOp.apply(*self.values("matmul"), self.multiplier),
            ApproxConv2dOp.apply(*self.values("conv2d"), CONV, out_dims, self.multiplier),
            ApproxDWConv2dOp.apply(*self.values("dwconv2d"), self.multiplier, DEPTHWISE),
        )

    def modelled(self):
        """float32, of the functions with a fast model."""
        model = self.multiplier.fast_model()
        return (
            FastApproxGeMMOp.apply(*self.values("matmul"), model),
            FastApproxConv2dOp.apply(*self.values("conv2d"), model, CONV.backward_args()),
            FastApproxConv2dOp.apply(*self.values("dwconv2d"), model, {**DEPTHWISE, "groups": 4}),
        )

    def layers(self, engine):
        """float32, of layers whose padding is a zero point."""
        (x, w), (images, filters), (_, each) = (self.values(name) for name in ("matmul", "conv2d", "dwconv2d"))
        conv = {"bias": False, "multiplier": self.multiplier, "engine": engine, **DEPTHWISE}
        layers = (
            (ApproxLinear(67, len(w), bias=False, multiplier=self.multiplier, engine=engine), x, w),
            (ApproxConv2d(4, len(filters), (3, 2), groups=2, **conv), images, filters),
            (ApproxConv2d(4, len(each), (3, 2), groups=4, **conv), images, each),
        )
        results = []
        for layer, operand, weight in layers:
            layer.calibrated.fill_(True)
            layer.activation_zero_point.fill_(self.multiplier.a_range[1] // 2)
            with torch.no_grad():
                layer.weight.copy_(weight)
                results.append(layer(operand - self.multiplier.a_range[1] // 2))
        return tuple(results)


def _agree(found, expected):
    return all(torch.equal(y, sums) for y, sums in zip(found, expected, strict=True))


def _check(multiplier):
    """By every engine; by "factored" exactly where there are factors, by "residual" where a byte holds the rest."""
    has_factors = factorize(multiplier) is not None
    refusals = {} if has_factors else {"factored": "no factorisation"}
    if known_split(multiplier.table) is None:
        refusals["residual"] = "beside the exact product"
    operands = _Operands(multiplier)
    hostile = operands.sums("reference", operands.pad_code)
    zero_padded = operands.sums("reference", 0)
    rounded = [sums.float() for sums in zero_padded]
    if has_factors:
        assert _agree(operands.modelled(), rounded), f"{multiplier}, fast model"
    layers = operands.layers("reference")
    for engine in ENGINES:
        if engine in refusals:
            with pytest.raises(EngineError, match=refusals[engine]):
                operands.sums(engine, 0)
            continue
        assert _agree(operands.sums(engine, operands.pad_code), hostile), f"{multiplier}, {engine}"
        with use_engine(engine):
            assert _agree(operands.looked_up(zero_padded[1].shape[2:]), rounded), f"{multiplier}, functions, {engine}"
        assert _agree(operands.layers(engine), layers), f"{multiplier}, layers, {engine}"


def _error_rank(multiplier):
    table, product = multiplier.table.numpy(), np.multiply.outer(*multiplier.operand_values())
    return min(np.linalg.matrix_rank(table - scale * product.astype(float)) for scale in (0, 1))


def test_reference_circuits(reference_multipliers):
    for name, multiplier in reference_multipliers.items():
        factors, rank = factorize(multiplier), _error_rank(multiplier)
        assert (factors is None) == (rank > 64), name
        assert rank <= 4 or not multiplier.a_signed, name
        _check(multiplier)


def _members(formats):
    """The zoo's names in these formats, by family: circuits that differ in numbers only."""
    families = {}
    for name in list_multipliers():
        parameters, of = re.fullmatch(r"(.+?)_(\d[us](?:_\d[us])?)", name).groups()
        if of in formats:
            families.setdefault((re.sub(r"\d", "", parameters), of), []).append(name)
    return families


def test_every_family_of_the_zoo():
    middles = {family: names[len(names) // 2] for (family, _), names in _members(("8u_8s", "8s", "5u_5s")).items()}
    assert len(middles) == 20
    for name in middles.values():
        _check(get_multiplier(name))


@pytest.mark.slow
@pytest.mark.parametrize("formats", ["8u", "8s", "8u_8s", "4u", "4s", "4u_4s"])
def test_the_zoo_at_large(formats):
    for names in _members((formats,)).values():
        for name in {*names[:: max(1, len(names) // 2)], names[-1]}:
            _check(get_multiplier(name))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run CUDA sources on the CPU")
@pytest.mark.parametrize("engine", ["host_cuda", "host_factored"])
def test_by_the_gpu_s_kernels_on_the_host(reference_multipliers, engine):
    middles = [names[len(names) // 2] for names in _members(("8u_8s",)).values()]
    for multiplier in (*reference_multipliers.values(), *map(get_multiplier, middles)):
        if engine == "host_cuda" or factorize(multiplier) is not None:
            operands = _Operands(multiplier)
            expected = operands.sums("reference", operands.pad_code)
            assert _agree(operands.sums(engine, operands.pad_code), expected), multiplier


@pytest.mark.parametrize("bits", [(8, 5), (3, 8), (6, 2)])
@pytest.mark.parametrize("flags", [(False, True), (True, False)])
@pytest.mark.parametrize("scale", [0, 1])
def test_hostile_factors_of_different_widths(low_rank, bits, flags, scale):
    _check(low_rank(3, bits, flags, scale))
