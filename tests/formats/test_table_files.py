import itertools
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from approxconv.formats import FormatError, list_formats, load_multiplier, save_multiplier
from approxconv.multiplier import Multiplier
from approxconv.zoo import get_multiplier, list_multipliers

FLAGS = list(itertools.product([False, True], repeat=2))
ORDERS = ["activation_first", "weight_first", None]
SUFFIXES = {"tfapprox": ".bin", "adapt": ".h", "approxtorch": ".txt", "gradient_txt": ".txt", "csv": ".csv"}
RECTANGULAR = ("adapt", "csv")
BITS = {name: [(2, 2), (4, 4), (8, 8)] + [(3, 5), (8, 4)] * (name in RECTANGULAR) for name in SUFFIXES}
BITS["tfapprox"] = [(8, 8)]
TITLES = (
    "LUT for approximate multiplier:",
    "LUT for the gradient of the approximate multiplier w.r.t. the first operand:",
    "LUT for the gradient of the approximate multiplier w.r.t. the second operand:",
)

# References work on one pair of Python ints at a time.


def value_of(code, bits, signed):
    return code - 2**bits if signed and code >= 2 ** (bits - 1) else code


def odd_product(a, w):
    """Neither commutative nor zero-preserving, within int16 for 8-bit operands of any signedness but both unsigned."""
    return a * w // 2 + 3 * a - 5 * w + 7


def by_code(product, bits, a_signed, w_signed):
    return [
        [product(value_of(a, bits[0], a_signed), value_of(w, bits[1], w_signed)) for w in range(2 ** bits[1])]
        for a in range(2 ** bits[0])
    ]


def hostile(bits=(8, 8), flags=(True, True), gradients=False, seed=3):
    """Over all of int16, or uint16 where nothing is signed."""
    rng = np.random.default_rng(seed)
    shape = 2 ** bits[0], 2 ** bits[1]
    low, high = (-(2**15), 2**15) if any(flags) else (0, 2**16)
    table = rng.integers(low, high, shape)
    table[0, 0] = high - 1
    table[-1, -1] = low
    slopes = tuple(rng.integers(-(2**15), 2**15, shape) / 16 for _ in range(2)) if gradients else None
    return Multiplier(table, a_signed=flags[0], w_signed=flags[1], gradients=slopes)


def load(path, **options):
    """Without the warning that a .h leaves the order open."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*order=")
        return load_multiplier(path, **options)


def c_rows(table, separator=", ", between="},\n{"):
    return "{{" + between.join(separator.join(map(str, row)) for row in table) + "}}"


def triples(table):
    return "".join(f"{a} {b} {value}\n" for a, row in enumerate(table) for b, value in enumerate(row))


def lines_of(table, separator):
    return "".join(separator.join(map(str, row)) + "\n" for row in table)


@pytest.fixture
def write(tmp_path):
    def to(name, contents):
        path = tmp_path / name
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        return path

    return to


# Every format keeps a table.


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(("name", "bits"), [(name, bits) for name in SUFFIXES for bits in BITS[name]])
def test_round_trip(tmp_path, name, bits, flags, order):
    m = hostile(bits, flags, gradients=name == "gradient_txt")
    path = tmp_path / f"table{SUFFIXES[name]}"
    options = {} if order is None else {"order": order}
    save_multiplier(m, path, format=name, **options)
    signs = dict(zip(("a_signed", "w_signed"), flags, strict=True))
    loaded = load(path, **signs, **options)
    assert loaded == m
    assert loaded.name == "table"
    if m.gradients is not None:
        for found, expected in zip(loaded.gradients, m.gradients, strict=True):
            np.testing.assert_array_equal(found.numpy(), expected.numpy())

    by_default = {"adapt": "weight_first"}.get(name, "activation_first")
    other = {"activation_first": "weight_first", "weight_first": "activation_first"}[order or by_default]
    swapped = load(path, a_signed=flags[1], w_signed=flags[0], order=other)
    assert swapped == m.swap()
    if m.gradients is not None:
        for found, expected in zip(swapped.gradients, m.swap().gradients, strict=True):
            np.testing.assert_array_equal(found.numpy(), expected.numpy())


@pytest.mark.parametrize("name", [name for name in SUFFIXES if name != "tfapprox"])
def test_text_keeps_the_whole_of_int32(tmp_path, name):
    table = np.random.default_rng(4).integers(-(2**31), 2**31, (16, 16))
    table[3, 4], table[5, 6] = -(2**31), 2**31 - 1
    m = Multiplier(table, a_signed=True, w_signed=True)
    path = tmp_path / f"wide{SUFFIXES[name]}"
    save_multiplier(m, path, format=name)
    assert load(path) == m


@pytest.mark.parametrize("name", SUFFIXES)
def test_a_file_says_an_unsigned_table_is_unsigned(tmp_path, name):
    m = hostile((8, 8), (False, False))
    path = tmp_path / f"table{SUFFIXES[name]}"
    save_multiplier(m, path, format=name)
    assert load(path) == m


@pytest.mark.parametrize("name", SUFFIXES)
def test_the_file_name_says_the_signedness(tmp_path, name):
    for sign, flags in (("s", (True, True)), ("u", (False, False))):
        m = Multiplier(np.arange(2**16).reshape(256, 256) % 2**15, a_signed=flags[0], w_signed=flags[1])
        path = tmp_path / f"mul8{sign}_ABC{SUFFIXES[name]}"
        save_multiplier(m, path, format=name)
        assert load(path) == m
        given = load(path, w_signed=not flags[1])
        assert (given.a_signed, given.w_signed) == (flags[0], not flags[1])


def test_the_formats_are_listed_with_their_suffixes():
    formats = list_formats()
    for name, suffix in SUFFIXES.items():
        assert formats[name] == (suffix,)
    assert [name for name in formats if name in SUFFIXES] == list(SUFFIXES)


@pytest.mark.parametrize("name", SUFFIXES)
def test_an_order_that_there_is_not(tmp_path, name):
    path = tmp_path / f"table{SUFFIXES[name]}"
    with pytest.raises(ValueError, match="order must be"):
        save_multiplier(hostile(), path, format=name, order="rows")
    assert not path.exists()
    save_multiplier(hostile(), path, format=name)
    with pytest.raises(ValueError, match="order must be"):
        load_multiplier(path, order="rows")


def test_a_txt_is_written_by_name_only(tmp_path):
    with pytest.raises(ValueError, match=r"approxtorch.*gradient_txt"):
        save_multiplier(hostile(), tmp_path / "table.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "m", "match"),
    [
        ("tfapprox", hostile((4, 4)), "8×8"),
        ("tfapprox", hostile((8, 4)), "8×8"),
        ("tfapprox", Multiplier(np.full((256, 256), -1), a_signed=False, w_signed=False), "uint16"),
        ("tfapprox", Multiplier(np.full((256, 256), 2**16), a_signed=False, w_signed=False), "uint16"),
        ("tfapprox", Multiplier(np.full((256, 256), 2**15), a_signed=False, w_signed=True), "int16"),
        ("approxtorch", hostile((8, 4)), "square"),
        ("gradient_txt", hostile((8, 4)), "square"),
        (
            "gradient_txt",
            Multiplier(
                np.zeros((4, 4), int),
                a_signed=False,
                w_signed=False,
                gradients=(np.zeros((4, 4)), np.full((4, 4), 2048.0)),
            ),
            "int16",
        ),
    ],
)
def test_what_a_format_does_not_hold_is_not_written(tmp_path, name, m, match):
    path = tmp_path / f"table{SUFFIXES[name]}"
    with pytest.raises(ValueError, match=match):
        save_multiplier(m, path, format=name)
    assert not path.exists()


# TFApprox


@pytest.mark.parametrize("flags", FLAGS)
def test_tfapprox_is_indexed_by_activation_then_weight(write, flags):
    table = by_code(odd_product if any(flags) else lambda a, w: a * w + min(a, 5), (8, 8), *flags)
    entries = list(itertools.chain(*table))
    path = write("lut.bin", struct.pack(f"<65536{'h' if any(flags) else 'H'}", *entries))
    m = load_multiplier(path, a_signed=flags[0], w_signed=flags[1])
    assert m.table.tolist() == table
    assert load_multiplier(path, a_signed=flags[1], w_signed=flags[0], order="weight_first") == m.swap()


def test_tfapprox_is_unsigned_by_default(write):
    table = by_code(lambda a, w: a * w, (8, 8), False, False)
    m = load_multiplier(write("lut.bin", struct.pack("<65536H", *itertools.chain(*table))))
    assert m == get_multiplier("exact_8u")


@pytest.mark.parametrize("length", [0, 1, 2**17 - 1, 2**17 + 1, 2**18])
def test_tfapprox_of_another_length(write, length):
    with pytest.raises(FormatError, match=r"lut\.bin.*131,072"):
        load_multiplier(write("lut.bin", bytes(length)))


# AdaPT, TransAxx


def converter(product, declaration="const int16_t lut [256][256] = {"):
    """A file as LUT_convert.ipynb of AdaPT and TransAxx writes it."""
    rows = [", ".join(str(product(i, j)) for j in range(256)) for i in range(256)]
    return (
        "#include <stdint.h>\n\n" + declaration + "".join(f"{{{row}}},\n" for row in rows[:-1]) + f"{{{rows[-1]}}}}};\n"
    )


def signed_byte(code):
    return value_of(code, 8, True)


@pytest.mark.parametrize(
    "declaration", ["const int16_t lut [256][256] = {", "const __device__  int16_t lut [256][256] = {"]
)
def test_a_file_of_the_converter(write, declaration):
    path = write("lut.h", converter(lambda i, j: odd_product(signed_byte(i), signed_byte(j)), declaration))
    expected = by_code(odd_product, (8, 8), True, True)
    m = load_multiplier(path, order="activation_first")
    assert (m.a_signed, m.w_signed, m.table.tolist()) == (True, True, expected)
    assert load_multiplier(path, order="weight_first") == m.swap()
    with pytest.warns(UserWarning, match=r'lut\.h.*AdaPT.*order="weight_first" or order="activation_first"') as caught:
        assert load_multiplier(path) == m.swap()
    assert [Path(each.filename).name for each in caught] == ["test_table_files.py"]


def test_a_symmetric_table_needs_no_order(write):
    path = write("lut.h", converter(lambda i, j: signed_byte(i) * signed_byte(j)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_multiplier(path) == get_multiplier("exact_8s")


SUFFIX_OF = ["L", "u", "LL", "uLL"]
SMALL = by_code(odd_product, (2, 2), True, True)
C_FILES = {
    "flat": f"int8_t t[16] = {{{', '.join(str(v) for row in SMALL for v in row)}}};",
    "flat with no length": f"int t[] = {{{','.join(str(v) for row in SMALL for v in row)},}};",
    "flat of two dimensions": f"short t[4][4] = {{{','.join(str(v) for row in SMALL for v in row)}}}",
    "first length left out": f"static const int32_t my_LUT_2[][4]={c_rows(SMALL, ',')};",
    "lengths of macros": f"#define N 4\nint t[N][N] = {c_rows(SMALL)};",
    "hexadecimal lengths": f"int t[0x4][4u] = {c_rows(SMALL)};",
    "trailing commas": "int t[4][4] = " + c_rows(SMALL, between=",},\n{").replace("}}", ", } , }") + " ;",
    "comments": "/* a */ // {1, 2}\n/* int x[2] = {1}; ﻿ö */\nint /**/ t[4][4] = "
    + c_rows(SMALL, ", /* c, } */ ", between="}, // {\n{")
    + "; // done\n/* and */",
    "directives": "#ifndef LUT_H\n#define LUT_H \\\n  int x[2] = {1};\n#include <stdint.h>\n  # pragma once\n"
    + f"int t[4][4] = {c_rows(SMALL)};\n#endif // LUT_H\n",
    "hexadecimal": f"int t[4][4] = {c_rows([[('-' if v < 0 else '') + hex(abs(v)) for v in row] for row in SMALL])};",
    "bit patterns": f"int8_t t[4][4] = {c_rows([[hex(v & 255) for v in row] for row in SMALL])};",
    "wide bit patterns": f"int t[4][4] = {c_rows([[f'0X{v & 0xFFFFFFFF:08X}U' for v in row] for row in SMALL])};",
    "suffixes": f"long t[4][4] = {c_rows([[f'{v}{SUFFIX_OF[v % 4]}' for v in row] for row in SMALL])};",
    "octal": f"int t[4][4] = {c_rows([[('-0' if v < 0 else '0') + oct(abs(v))[2:] for v in row] for row in SMALL])};",
    "plus signs": f"int t[4][4] = {c_rows([[f'{v:+d}' for v in row] for row in SMALL])};",
    "carriage returns": f"#include <stdint.h>\nint t[4][4] =\n{c_rows(SMALL)};\n".replace("\n", "\r\n"),
    "byte order mark": f"\ufeffint t[4][4] = {c_rows(SMALL)};",
    "C++": f"static constexpr std::int16_t t[4][4] = {c_rows(SMALL)};",
}


@pytest.mark.parametrize("text", C_FILES.values(), ids=C_FILES)
def test_ways_to_write_an_array(write, text):
    path = write("lut.h", text)
    m = load_multiplier(path, order="activation_first")
    assert (m.a_signed, m.w_signed, m.table.tolist()) == (True, True, SMALL)
    assert load_multiplier(write("lut.dat", text), order="activation_first") == m


@pytest.mark.parametrize("element", ["uint8_t", "uint16_t", "unsigned", "unsigned short", "ushort", "std::uint32_t"])
def test_an_unsigned_element_type_means_unsigned_operands(write, element):
    path = write("lut.h", f"const {element} t[4][4] = {c_rows(by_code(lambda a, w: a * w, (2, 2), False, False))};")
    assert load_multiplier(path) == get_multiplier("exact_2u")
    assert load_multiplier(path, w_signed=True).w_format == "int2"


BAD_C = {
    "empty": ("", 1, "array"),
    "no array": ("#include <stdint.h>\nint x;\n", 3, "array"),
    "a long head": (f"int t[4][4] = {' ' * 2000}x {{1, 2}};", 1, "array"),
    "a function": ("int f(int a)\n{ return a; }", 2, "array"),
    "two arrays": ("int t[4] = {1};\nint u[4] = {2};", None, "commas|only array"),
    "something behind": ("int t[2][2] = {{1,2},{3,4}};\n\nint x;", 3, "only array"),
    "no end": ("int t[4][4] = {\n1, 2,", 2, "only array"),
    "no end of a comment": ("int t[4][4] = {1, 2, 3 /* };", 1, "only array"),
    "three dimensions": ("int t[4][4][4] = {{{1}}};", 1, "array"),
    "three levels": ("int t[4][4] = {\n{{1}, {2}}};", 1, "rows"),
    "deep": ("int t[4][4] = " + "{" * 10**5 + "}" * 10**5, 1, "rows"),
    "an empty row": ("int t[4][4] = {{}, {}, {}, {}};", 1, "none|one separator|integer"),
    "no entries": ("int t[4][4] = {};", 1, "none"),
    "short row": ("int t[4][4] = {{1,2,3,4},\n{1,2,3},\n{1,2,3,4},{1,2,3,4}};", 2, "4 numbers a row, got 3"),
    "rows too few": ("int t[4][4] = {{1,2,3,4},{1,2,3,4}};", 1, "declares"),
    "a row outside": ("int t[4][4] = {{1,2,3,4},5,6,7,8,{1,2,3,4},{1,2,3,4}};", 1, "rows"),
    "no comma": ("int t[4][4] = {1,2,\n3 4,5};", 2, "separator"),
    "no comma between rows": ("int t[4][4] = {{1,2}{3,4}};", 1, "rows"),
    "two commas": ("int t[4][4] = {1,\n2,,3};", 2, "separator"),
    "an operator": ("int t[4][4] = {1,\n2+3};", 2, "'2\\+3'"),
    "a name": ("int t[4][4] = {1,\nA, 2};", 2, "'A'"),
    "a float": ("int t[4][4] = {1,\n2.5};", 2, "'\\.'"),
    "a string": ('int t[4][4] = {"1"};', 1, "integer"),
    "a wrong octal": ("int t[4][4] = {1,\n089};", 2, "'089'"),
    "a wrong suffix": ("int t[4][4] = {1,\n8lul};", 2, "'8lul'"),
    "a cast": ("int t[4][4] = {(int)1};", 1, "integer"),
    "too many digits": ("int t[4][4] = {1,\n" + "9" * 5000 + "};", 2, "int32"),
    "too many hexadecimal digits": ("int t[4][4] = {1,\n0x" + "f" * 5000 + "};", 2, "integer"),
    "beyond int32": ("int t[4][4] = {1,\n2147483648};", 2, "int32"),
    "beyond its type": (f"int8_t t[4][4] = {{{'1,' * 15}\n128}};", 2, "int8_t"),
    "a pattern beyond its type": (f"int8_t t[4][4] = {{{'1,' * 15}\n0x100}};", 2, "int8_t"),
    "a decimal pattern": (f"int16_t t[4][4] = {{{'1,' * 15}\n65535}};", 2, "int16_t"),
    "below its type": (f"uint8_t t[4][4] = {{{'1,' * 15}\n-1}};", 2, "uint8_t"),
    "no square": ("int t[15] = {" + "1," * 15 + "};", None, "4\\*\\*bits"),
    "no side of a table": (f"int t[5][5] = {c_rows([[1] * 5] * 5)};", None, "shape"),
    "another length": (f"int t[16][16] = {c_rows([[1] * 4] * 4)};", 1, "declares"),
    "another flat length": ("int t[4] = {" + "1," * 16 + "};", 1, "declares"),
    "length zero": ("int t[4][0] = {" + "1," * 16 + "};", 1, "declares"),
    "rows of a flat array": (f"int t[4] = {c_rows([[1] * 4] * 4)};", 1, "declares"),
    "other digits": ("int t[4][4] = {1,\n٣};", 2, "'٣'"),
    "NUL": ("int t[4][4] = {1,\n\0};", 2, "NUL"),
    "too many": ("int t[] = {" + "1," * 65536 + "1};", 1, "65,536"),
}


@pytest.mark.parametrize(("text", "line", "match"), BAD_C.values(), ids=BAD_C)
def test_an_array_that_is_none(write, text, line, match):
    path = write("hostile.h", text)
    with pytest.raises(FormatError, match=match) as caught:
        load_multiplier(path, format="adapt", order="weight_first")
    assert str(caught.value).startswith(f"{path}:{line}: must" if line else f"{path}:")


def mistaken(table):
    """What the converter makes of a circuit: two negative operands enter by magnitude, read as codes again."""
    return [
        [table[256 - a & 255][256 - w & 255] if a > 127 and w > 127 else table[a][w] for w in range(256)]
        for a in range(256)
    ]


def warned_of_quadrant(write, table):
    path = write("mul8s_X.h", converter(lambda i, j: table[i][j]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_multiplier(path, order="weight_first")
    return [bool(re.search(r"mul8s_X\.h.*negative operands", str(each.message))) for each in caught] == [True]


def test_the_converters_quadrant_is_warned_of(write, reference_multipliers):
    tables = {name: m.table.tolist() for name, m in reference_multipliers.items() if m.a_signed}
    assert len(tables) == 6
    for table in tables.values():
        assert not warned_of_quadrant(write, table)
        assert warned_of_quadrant(write, mistaken(table))
    # As in the file that AdaPT ships.
    assert mistaken(tables["mul8s_1L2H"])[128][126:132] == [-16128, -16128, 16384, -16128, -16128, -15872]


def test_the_converters_quadrant_is_warned_of_where_the_circuit_is_exact(write):
    exact = by_code(lambda a, w: a * w, (8, 8), True, True)
    assert not warned_of_quadrant(write, exact)
    assert warned_of_quadrant(write, mistaken(exact))


@pytest.mark.parametrize("k", [1, 4, 7])
def test_twos_complement_truncation_is_not_taken_for_mistaken(write, k):
    operands = by_code(lambda a, w: (a >> k << k) * (w >> k << k), (8, 8), True, True)
    product = by_code(lambda a, w: a * w >> k << k, (8, 8), True, True)
    for table in (operands, product):
        assert not warned_of_quadrant(write, table)
    if k < 7:  # −128 times nothing but itself and 0 is left
        assert warned_of_quadrant(write, mistaken(operands))
    assert warned_of_quadrant(write, mistaken(product))


def test_no_signed_multiplier_of_the_zoo_is_taken_for_mistaken(tmp_path):
    path = tmp_path / "table.h"
    names = [name for name in list_multipliers("*_8s") if name.count("_8") == 1]
    assert len(names) > 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in names[::5]:
            m = get_multiplier(name)
            save_multiplier(m, path, order="weight_first")
            assert load_multiplier(path, order="weight_first", a_signed=True, w_signed=True) == m


def test_the_quadrant_matters_only_where_both_operands_are_signed(write):
    path = write("x.h", converter(lambda i, j: mistaken_exact[i][j]))
    for flags in FLAGS[:3]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_multiplier(path, a_signed=flags[0], w_signed=flags[1], order="weight_first")


mistaken_exact = mistaken(by_code(lambda a, w: a * w, (8, 8), True, True))


# ApproxTorch


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("separator", ["\t", " ", "   "])
def test_approxtorch_is_in_order_of_value(write, bits, flags, separator):
    ranges = [range(-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else range(2**bits) for signed in flags]
    text = lines_of([[odd_product(a, w) for w in ranges[1]] for a in ranges[0]], separator)
    path = write("lut.txt", " " + text)
    m = load_multiplier(path, a_signed=flags[0], w_signed=flags[1])
    assert m.table.tolist() == by_code(odd_product, (bits, bits), *flags)
    assert load_multiplier(path, a_signed=flags[1], w_signed=flags[0], order="weight_first") == m.swap()


def test_approxtorch_signedness_by_the_entries(write):
    signed = [[a * w for w in range(-8, 8)] for a in range(-8, 8)]
    unsigned = [[a * w for w in range(16)] for a in range(16)]
    assert load_multiplier(write("s.txt", lines_of(signed, " "))) == get_multiplier("exact_4s")
    assert load_multiplier(write("u.txt", lines_of(unsigned, " "))) == get_multiplier("exact_4u")
    mixed = load_multiplier(
        write("m.txt", lines_of([[a * w for w in range(-8, 8)] for a in range(16)], " ")), a_signed=False
    )
    assert mixed == get_multiplier("exact_4u_4s")


@pytest.mark.parametrize("end", [" ", "\n"])
def test_approxtorch_as_numpy_reshapes_it(write, end):
    entries = [a * w for a in range(16) for w in range(16)]
    assert load_multiplier(write("u.txt", end.join(map(str, entries)))) == get_multiplier("exact_4u")


# AppMult-Aware-Retraining


def gradient_file(table, *gradients):
    remarks = "Warning: Constant-0 drivers added\n$true\nINFO: Error rate: 0.81 of LUT for approximate multiplier: 1\n"
    return remarks + "".join(f"{t}\n{triples(rows)}" for t, rows in zip(TITLES, (table, *gradients), strict=False))


def test_gradients_are_sixteenths_by_operand(write):
    table = by_code(lambda a, b: a * b + a, (3, 3), False, False)
    by_a = by_code(lambda a, b: 16 * b + a - 20, (3, 3), False, False)
    by_b = by_code(lambda a, b: 16 * a - 3 * b, (3, 3), False, False)
    path = write("x_lutfp+bp_avg_2_2.txt", gradient_file(table, by_a, by_b))
    m = load_multiplier(path)
    assert (m.a_signed, m.w_signed, m.bits) == (False, False, (3, 3))
    assert m.table.tolist() == table
    for found, expected in zip(m.gradients, (by_a, by_b), strict=True):
        assert found.tolist() == [[value / 16 for value in row] for row in expected]
    swapped = load_multiplier(path, order="weight_first")
    assert swapped == m.swap()
    assert [g.tolist() for g in swapped.gradients] == [g.tolist() for g in m.swap().gradients]
    alone = load_multiplier(write("x_lutfp.txt", gradient_file(table)))
    assert alone == m
    assert alone.gradients is None


def test_gradients_are_rounded_to_sixteenths(tmp_path):
    slopes = np.random.default_rng(5).normal(0, 50, (2, 8, 8))
    m = Multiplier(np.zeros((8, 8), int), a_signed=False, w_signed=False, gradients=tuple(slopes))
    save_multiplier(m, tmp_path / "g.txt", format="gradient_txt")
    assert set((tmp_path / "g.txt").read_text().splitlines()) >= set(TITLES)
    for found, exact in zip(load_multiplier(tmp_path / "g.txt").gradients, slopes, strict=True):
        assert np.abs(found.numpy() - exact).max() <= 1 / 32 + 1e-5


def test_lines_of_a_table_may_be_in_any_order(write):
    table = by_code(odd_product, (2, 2), True, True)
    lines = triples(table).splitlines()
    np.random.default_rng(6).shuffle(lines)
    path = write("x.txt", f"{TITLES[0]}\n" + "\n\n".join(lines))
    assert load_multiplier(path).table.tolist() == table


GOOD = triples(by_code(lambda a, b: a * b, (2, 2), False, False))
BAD_GRADIENTS = {
    "empty": ("", 1, "LUT for approximate"),
    "no title": (GOOD, 1, "LUT for approximate"),
    "no lines": (TITLES[0], 1, "integers"),
    "one gradient": (f"\n{TITLES[0]}\n{GOOD}{TITLES[1]}\n{GOOD}", 2, "both"),
    "gradients only": (f"{TITLES[1]}\n{GOOD}{TITLES[2]}\n{GOOD}", 1, "LUT for approximate"),
    "twice": (f"{TITLES[0]}\n{GOOD}" * 2, 1, "titles"),
    "another order": (f"{TITLES[0]}\n{GOOD}{TITLES[2]}\n{GOOD}{TITLES[1]}\n{GOOD}", 1, "titles"),
    "a line missing": (f"{TITLES[0]}\n" + GOOD.replace("1 2 2\n", ""), None, "entries"),
    "a line twice": (f"{TITLES[0]}\n" + GOOD.replace("1 2 2\n", "1 1 2\n"), 8, "1 1 again"),
    "a code too large": (f"{TITLES[0]}\n" + GOOD.replace("1 2 2\n", "1 4 2\n"), 8, "0 to 3.*1 and 4"),
    "a negative code": (f"{TITLES[0]}\n" + GOOD.replace("1 2 2\n", "-1 2 2\n"), 8, "-1 and 2"),
    "two numbers": (f"{TITLES[0]}\n" + GOOD.replace("1 2 2\n", "1 2\n"), 8, "3 integers a line.*got 2"),
    "four numbers": (f"{TITLES[0]}\n" + GOOD.replace("1 2 2\n", "1 2 2 2\n"), 8, "3 integers a line.*got 4"),
    "cut": (f"{TITLES[0]}\n" + GOOD[:-4], 17, "3 integers a line"),
    "a float": (f"{TITLES[0]}\n{GOOD}{TITLES[1]}\n{GOOD}{TITLES[2]}\n" + GOOD.replace("1 2 2", "1 2 2.5"), 42, "'\\.'"),
    "words": (f"{TITLES[0]}\n" + GOOD.replace("1 2 2", "one 2 2"), 8, "'o'"),
    "another width": (f"{TITLES[0]}\n{GOOD}{TITLES[1]}\n{triples([[0] * 8] * 8)}{TITLES[2]}\n{GOOD}", None, "shape"),
    "other digits": (f"{TITLES[0]}\n" + GOOD.replace("1 2 2", "1 2 ٢"), 8, "'٢'"),
    "too many": (f"{TITLES[0]}\n" + "1 1 1\n" * 65537, 65538, "196,608"),
    "too large": (f"{TITLES[0]}\n" + " " * 2**22, None, "at most"),
}


@pytest.mark.parametrize(("text", "line", "match"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_a_gradient_file_that_is_none(write, text, line, match):
    path = write("hostile.txt", text)
    with pytest.raises(FormatError, match=match) as caught:
        load_multiplier(path, format="gradient_txt")
    assert str(caught.value).startswith(f"{path}:{line}: must" if line else f"{path}: must")


# CSV

VALUES = {True: [0, 1, 2, 3, -4, -3, -2, -1], False: list(range(8))}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("separator", [",", ";", "\t", " ", " , ", "  "])
@pytest.mark.parametrize("labels", ["none", "header", "index", "both", "both, no corner", "both, text"])
def test_csv_with_labels_of_values(write, flags, separator, labels):
    rows, columns = (VALUES[signed] for signed in flags)
    table = [[odd_product(a, w) for w in columns] for a in rows]
    if labels == "both, text" and separator.isspace() and separator != "\t":
        corner = ["a\\w"]
    else:
        corner = {"both": [-99], "both, text": ["a\\w"]}.get(labels, [""] if not separator.isspace() else [])
    lines = [[*([a] if labels not in ("none", "header") else []), *row] for a, row in zip(rows, table, strict=True)]
    if labels not in ("none", "index"):
        lines.insert(0, [*(corner if labels != "header" else []), *columns])
    path = write("lut.csv", lines_of(lines, separator))
    m = load_multiplier(path, a_signed=flags[0], w_signed=flags[1])
    assert m.table.tolist() == table
    assert (m.a_signed, m.w_signed) == flags
    assert load_multiplier(path, a_signed=flags[1], w_signed=flags[0], order="weight_first") == m.swap()
    if any(flags) and labels.startswith("both"):
        assert load_multiplier(path) == m


def test_csv_labels_sort_the_table(write):
    a_order, w_order = [-4, -3, -2, -1, 0, 1, 2, 3], [3, 0, 2, 1]
    lines = [["", *w_order], *([a, *(odd_product(a, w) for w in w_order)] for a in a_order)]
    m = load_multiplier(write("lut.csv", lines_of(lines, ",")))
    assert m.table.tolist() == by_code(odd_product, (3, 2), True, False)
    assert (m.a_format, m.w_format) == ("int3", "uint2")


def test_csv_labels_may_not_be_contradicted(write):
    path = write("mul3u_X.csv", lines_of([[a, *(a * w for w in range(8))] for a in VALUES[True]], ","))
    assert load_multiplier(path) == get_multiplier("exact_3s") or load_multiplier(path).a_signed
    with pytest.raises(FormatError, match="a_signed is True by the file's labels"):
        load_multiplier(path, a_signed=False)
    with pytest.raises(FormatError, match="w_signed is True by the file's labels"):
        load_multiplier(path, w_signed=False, order="weight_first")


def test_csv_signedness_by_the_entries(write):
    assert load_multiplier(write("u.csv", lines_of(by_code(odd_product, (2, 2), False, False), ","))).a_signed
    table = by_code(lambda a, w: a * w, (2, 3), False, False)
    m = load_multiplier(write("u.csv", lines_of(table, ",")))
    assert (m.a_signed, m.w_signed, m.table.tolist()) == (False, False, table)


@pytest.mark.parametrize("text", ["\ufeff{}", "\n{}\n\n", "{}".replace("{}", "{}\n \t\n")])
def test_csv_with_blank_lines_and_ends_of_lines(write, text):
    table = by_code(odd_product, (2, 2), True, True)
    body = lines_of(table, ",").replace("\n", ",\r\n")
    assert load_multiplier(write("lut.csv", text.format(body))).table.tolist() == table


CSV = [["1"] * 4 for _ in range(4)]
BAD_CSV = {
    "empty": ("", None, "at least 4 lines"),
    "too few lines": ("1,2\n" * 3, None, "at least 4 lines"),
    "too many lines": ("1,2\n" * 300, 258, "at most 257 lines"),
    "an uneven line": ("1,2,3,4\n\n1,2,3,4\n1,2,3\n1,2,3,4\n", 4, "4 integers a line.*got 3"),
    "an empty cell": ("1,2,3,4\n1,,3,4\n1,2,3,4\n1,2,3,4\n", 2, "separator"),
    "an empty first cell": ("1,2,3,4\n,2,3,4\n1,2,3,4\n1,2,3,4\n", 2, "separator"),
    "no separator": ("1,2,3,4\n1,2,3 4\n1,2,3,4\n1,2,3,4\n", 2, "separator"),
    "two kinds of separator": ("1;2;3;4\n1;2,5;3;4\n1;2;3;4\n1;2;3;4\n", 2, "one kind of separator"),
    "a float": ("1,2,3,4\n1,2.0,3,4\n1,2,3,4\n1,2,3,4\n", 2, "'\\.'"),
    "an exponent": ("1,2,3,4\n1,2e3,3,4\n1,2,3,4\n1,2,3,4\n", 2, "'e'"),
    "an underscore": ("1,2,3,4\n1,2_0,3,4\n1,2,3,4\n1,2,3,4\n", 2, "'_'"),
    "a bad sign": ("1,2,3,4\n1,2-3,3,4\n1,2,3,4\n1,2,3,4\n", 2, "'2-3'"),
    "a lone sign": ("1,2,3,4\n1,-,3,4\n1,2,3,4\n1,2,3,4\n", 2, "'-'"),
    "text above no index": ("x,2,3,4\n1,2,3,4\n1,2,3,4\n1,2,3,4\n", 1, "integer, got 'x'"),
    "text labels": (",a,b,c,d\n0,1,2,3,4\n1,1,2,3,4\n2,1,2,3,4\n3,1,2,3,4\n", 1, "'a'"),
    "no labels": ("1,2,3,4\n" * 5, 1, "label its columns"),
    "labels beyond": (lines_of([[a, 1, 1, 1, 1] for a in (1, 2, 3, 4)], ","), 1, "label its rows"),
    "labels of both kinds": (lines_of([[a, 1, 1, 1, 1] for a in (-1, 0, 2, 3)], ","), 1, "label its rows"),
    "no table": ("1,2,3,4,5,6\n" * 6, None, "6 × 6"),
    "beyond int32": ("1,2,3,4\n1,2,3,-2147483649\n1,2,3,4\n1,2,3,4\n", 2, "int32"),
    "huge": ("1,2,3,4\n1,2,3," + "1" + "0" * 5000 + "\n1,2,3,4\n1,2,3,4\n", 2, "int32"),
    "other digits": ("1,2,3,4\n1,2,3,٣\n1,2,3,4\n1,2,3,4\n", 2, "'٣'"),
    "another minus": ("1,2,3,4\n1,2,3,−3\n1,2,3,4\n1,2,3,4\n", 2, "'−'"),
    "NUL": ("1,2,3,4\n1,2,3,\0\n", 2, "NUL"),
    "a vertical tab": ("1,2,3,4\n1,2,3,\v4\n1,2,3,4\n1,2,3,4\n", 2, "integer"),
    "too large": ("1 " * 2**20 + "1", None, "at most"),
}


@pytest.mark.parametrize(("text", "line", "match"), BAD_CSV.values(), ids=BAD_CSV)
def test_a_csv_that_is_none(write, text, line, match):
    path = write("hostile.csv", text)
    with pytest.raises(FormatError, match=match) as caught:
        load_multiplier(path, format="csv")
    assert str(caught.value).startswith(f"{path}:{line}: must" if line else f"{path}: must")


BAD_TXT = {
    "empty": (b"", 1, "got none"),
    "blank": (b" \n\t\n", 1, "got none"),
    "a comma": (b"1 2\n3, 4\n", 2, "','"),
    "an uneven line": (b"1 2 3 4\n" * 3 + b"1 2 3\n", 4, "4 integers a line.*got 3"),
    "no square": (b"1 2 3 4\n" * 5, None, "4\\*\\*bits"),
    "a float": (b"1 2 3 4\n1 2 3.0 4\n", 2, "'\\.'"),
    "bytes": (b"1 2 3 4\n1 2 \xff 4\n", 2, "0xff"),
    "NUL": (b"1 2 3 4\n1 2 \0 4\n", 2, "NUL"),
    "other digits": ("1 2 3 4\n1 2 ٣ 4\n".encode(), 2, "'٣'"),
    "huge": (b"1 2 3 4\n1 2 " + b"9" * 5000 + b" 4\n", 2, "int32.*5,000"),
    "beyond int32": (b"1 2 3 4\n1 2 2147483648 4\n", 2, "int32"),
    "too many": (b"1 " * 65537, 1, "65,536"),
    "too large": (b"1 " * 2**20 + b"1", None, "at most"),
}


@pytest.mark.parametrize(("data", "line", "match"), BAD_TXT.values(), ids=BAD_TXT)
def test_an_approxtorch_file_that_is_none(write, data, line, match):
    path = write("hostile.txt", data)
    with pytest.raises(FormatError, match=match) as caught:
        load_multiplier(path, format="approxtorch")
    assert str(caught.value).startswith(f"{path}:{line}: must" if line else f"{path}: must")


# Contents decide.


@pytest.mark.parametrize("name", SUFFIXES)
def test_contents_are_known_under_another_suffix(tmp_path, name):
    m = get_multiplier("drum3_8u")
    saved = tmp_path / f"table{SUFFIXES[name]}"
    save_multiplier(m, saved, format=name)
    for suffix in (".npz", ".bin", ".h", ".c", ".txt", ".csv", ".dat", ""):
        path = tmp_path / f"copy{suffix}"
        path.write_bytes(saved.read_bytes())
        assert load(path, a_signed=False, w_signed=False) == m


def test_both_formats_of_txt_are_told_apart(tmp_path):
    m = hostile((4, 4), gradients=True)
    for name in ("approxtorch", "gradient_txt"):
        save_multiplier(m, tmp_path / f"{name}.txt", format=name)
        loaded = load_multiplier(tmp_path / f"{name}.txt", a_signed=True, w_signed=True)
        assert loaded == m
        assert (loaded.gradients is not None) == (name == "gradient_txt")
        other = {"approxtorch": "gradient_txt", "gradient_txt": "approxtorch"}[name]
        with pytest.raises(FormatError):
            load_multiplier(tmp_path / f"{name}.txt", format=other)


def test_a_table_between_blanks_is_read_as_its_suffix_says(write):
    """By value in ApproxTorch's ``.txt``, by code in a ``.csv``."""
    text = lines_of([[odd_product(a, w) for w in range(4)] for a in range(4)], " ").replace("7", "-7")
    txt, csv = (load_multiplier(write(f"lut{suffix}", text)).table for suffix in (".txt", ".csv"))
    assert csv.tolist() == [[int(cell) for cell in line.split()] for line in text.splitlines()]
    assert txt.tolist() == np.roll(csv.numpy(), (2, 2), (0, 1)).tolist()
    assert (load_multiplier(write("lut.txt", text), format="csv").table == csv).all()


def test_a_format_is_forced(tmp_path):
    path = tmp_path / "table.bin"
    save_multiplier(hostile((8, 8), (False, False)), path)
    for name in SUFFIXES:
        if name == "tfapprox":
            assert load_multiplier(path, format=name) == hostile((8, 8), (False, False))
        else:
            with pytest.raises(FormatError, match=r"table\.bin"):
                load_multiplier(path, format=name)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(2**17),
        np.random.default_rng(7).bytes(2**17),
        b"\x7fELF" + bytes(range(256)) * 512,
        b"uint64_t mul4u(uint64_t A, uint64_t B)\n{\n  int t[2] = {1, 2};\n  return A & B;\n}\n",
        b"static const int t[4] = {0, 1, 2, 3};\nint mul(int a, int b) { return t[a & 3] * b; }\n",
        b"struct s { int x; };\n",
        b"name,value\na,1\nb,2\n",
        b"1\n2\n3\n",
        b"12 13\n",
        "ein Text über 4 × 4 Zahlen\n".encode(),
        b"\xef\xbb\xbf",
    ],
)
def test_what_is_no_table_is_recognised_by_none(data):
    from approxconv.formats import _FORMATS

    assert [name for name in SUFFIXES if _FORMATS[name].recognise(data[: 2**16])] == []


# Whatever the bytes: a multiplier or a FormatError.


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    data = {}
    for name, suffix in SUFFIXES.items():
        bits = (8, 8) if name == "tfapprox" else (2, 2)
        save_multiplier(hostile(bits, gradients=name == "gradient_txt"), folder / f"seed{suffix}", format=name)
        data[name] = (folder / f"seed{suffix}").read_bytes()
    return folder, data


def check(path, data, name):
    path.write_bytes(data)
    for forced in (name, None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                found = load_multiplier(path, format=forced)
            except FormatError as error:
                found = str(error)
        assert isinstance(found, Multiplier) or str(path) in found


fuzzed = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
WORDS = "{ } , ; - + 0x 0 7 255 -1 999999999999 ٣ /* */ // # \\ [4] [4][4] }; u LL .5 e9 int16_t"
BLANKS = [" ", "\t", "\n", "\0", "\r", "\ufeff"]
PIECES = st.sampled_from([*WORDS.split(" "), *BLANKS, '"', "int16_t lut[4][4] = {", "0 0 0\n", *TITLES])
TEXTS = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=200).map(str.encode),
    st.lists(PIECES, max_size=40).map(lambda pieces: "".join(pieces).encode()),
)


@fuzzed
@given(data=TEXTS, name=st.sampled_from(list(SUFFIXES)))
def test_arbitrary_contents(seeds, data, name):
    check(seeds[0] / f"any{SUFFIXES[name]}", data, name)


@settings(fuzzed, max_examples=300)
@given(
    name=st.sampled_from(list(SUFFIXES)),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 12), st.one_of(st.binary(max_size=4), PIECES.map(str.encode))),
        min_size=1,
        max_size=5,
    ),
)
def test_mutated_files(seeds, name, edits):
    folder, valid = seeds
    data = valid[name]
    for where, removed, inserted in edits:
        at = round(where * len(data))
        data = data[:at] + inserted + data[at + removed :]
    check(folder / f"mutated{SUFFIXES[name]}", data, name)
