"""C models: the demonstration circuits, generated gate-level ones, C semantics by hand and by gcc, hostile files."""

import contextlib
import ctypes
import random
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from approxconv import load_function, load_multiplier
from approxconv.formats import CFunction, FormatError
from approxconv.multiplier import Multiplier, operand_values

MODELS = Path(__file__).with_name("c_models")
TABLES = dict(np.load(MODELS / "tables.npz"))
FORMATS = {"mul4u_DEMO": ("uint4", "uint4"), "mul8x4u_DEMO": ("uint8", "uint4"), "mul8s_DEMO": ("int8", "int8")}
FIGURES = ("MAE%", "MAE", "WCE%", "WCE", "WCRE%", "EP%", "MRE%", "MSE", "PDK45_PWR", "PDK45_AREA", "PDK45_DELAY")

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to compare C semantics with")


def text_of(demo):
    return (MODELS / f"{demo}.c").read_text()


@pytest.fixture
def write(tmp_path):
    def write_file(source, name="circuit.c"):
        path = tmp_path / name
        path.write_bytes(source if isinstance(source, bytes) else source.encode())
        return path

    return write_file


@pytest.fixture
def load(write):
    """Write a source and load it as a multiplier."""
    return lambda source, file="circuit.c", **options: load_multiplier(write(source, file), **options)


@pytest.fixture
def function(write):
    """Write a source and load it as a function."""
    return lambda source, file="circuit.c", **options: load_function(write(source, file), **options)


@pytest.fixture
def refused(write):
    """Write a source, expect a FormatError of either loader that names the file, the line and matches."""

    def check(source, match="", line=None, loaders=(load_function, load_multiplier), file="circuit.c", **options):
        path = write(source, file)
        for loader in loaders:
            with pytest.raises(FormatError) as caught:
                loader(path, **options)
            message = str(caught.value)
            assert message.startswith(f"{path}:" if line is None else f"{path}:{line}: "), message[:500]
            assert message.count(str(path)) == 1, message[:500]
            assert re.search(match, message.removeprefix(str(path)), re.IGNORECASE), message[:500]
            assert len(message) < 1000

    return check


@contextlib.contextmanager
def within(seconds):
    """Fail where the block does not end in time."""

    def stop(*_):
        pytest.fail(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def body(statements, *, returns="int64_t", a="uint8_t", b="uint8_t", name="f"):
    return f"#include <stdint.h>\n#include <stdbool.h>\n{returns} {name}({a} a, {b} b)\n{{\n{statements}\n}}\n"


# ---- the demonstration circuits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("demo", FORMATS)
def test_demos_are_their_tables(demo):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m = load_multiplier(MODELS / f"{demo}.c")
    np.testing.assert_array_equal(m.table.numpy(), TABLES[demo])
    assert (m.a_format, m.w_format) == FORMATS[demo]
    assert m.name == demo
    assert tuple(m.info) == FIGURES
    assert m.info["PDK45_PWR"] == "0.100 mW"
    assert m.power == 0.1
    printed = re.findall(r"^// (\S+) = (.*?) *$", text_of(demo), re.MULTILINE)
    assert m.info == dict(printed)


@pytest.mark.parametrize("demo", FORMATS)
def test_swap_makes_the_first_parameter_the_weight(demo):
    m = load_multiplier(MODELS / f"{demo}.c", swap=True)
    np.testing.assert_array_equal(m.table.numpy(), TABLES[demo].T)
    assert (m.w_format, m.a_format) == FORMATS[demo]
    assert m.info == load_multiplier(MODELS / f"{demo}.c").info
    assert load_multiplier(MODELS / f"{demo}.c", swap=False) == load_multiplier(MODELS / f"{demo}.c")


def test_widths_and_signs_speak_of_the_operands_after_swap(load):
    source = "long f(long x, long y) { return x * 4 + y; }"
    m = load(source, bits=(3, 5), a_signed=True, w_signed=False)
    assert (m.a_format, m.w_format) == ("int3", "uint5")
    assert m.table[0b111, 31] == -4 + 31
    m = load(source, bits=(3, 5), a_signed=True, w_signed=False, swap=True)
    assert (m.a_format, m.w_format) == ("int3", "uint5")
    assert m.table[0b111, 31] == 4 * 31 - 1


def test_types_say_widths_and_signs_before_a_swap(load):
    source = "long f(int8_t x, uint8_t y) { return x * 1000 + y; }"
    m = load(source)
    assert (m.a_format, m.w_format, m.table[255, 255]) == ("int8", "uint8", -1000 + 255)
    m = load(source, swap=True)
    assert (m.a_format, m.w_format, m.table[255, 255]) == ("uint8", "int8", -1000 + 255)


@pytest.mark.parametrize("demo", FORMATS)
@pytest.mark.parametrize("name", ["renamed.c", "ünïcödé file.c", "circuit.C", "-.c", "circuit.txt", "circuit"])
def test_a_renamed_file_is_the_same_circuit(load, demo, name):
    m = load(text_of(demo), name)
    np.testing.assert_array_equal(m.table.numpy(), TABLES[demo])
    assert (m.a_format, m.w_format) == FORMATS[demo]
    assert load(text_of(demo), name, name="given").name == "given"


def recoded(text):
    """Ways to write the same file."""
    lines = text.splitlines()
    directives = [line for line in lines if line.startswith("#")]
    code = [line for line in lines if line[:1] not in "#/*"]
    return {
        "crlf": text.replace("\n", "\r\n").encode(),
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "latin1": b"// Zden\xeck Va\xb9\xed\xe8ek, 25 \xb0C\n/* \xff\xfe */\n" + text.encode(),
        "utf8": f"// Zdeněk Vašíček 🙂\n/* ∀ */{text}".encode(),
        "tabs": text.replace(" ", "\t").encode(),
        "form feeds": text.replace("   ", "\f\v ").encode(),
        "no newline at the end": text.rstrip().encode(),
        "one line": "\n".join([*directives, " ".join(code)]).encode(),
        "no includes": re.sub("(?m)^#.*$", "", text).encode(),
        "indented": re.sub("(?m)^", "    ", text).encode(),
        "trailing blanks": re.sub("(?m)$", " \t ", text).encode(),
    }


@pytest.mark.parametrize("how", recoded(""))
def test_ways_to_write_the_same_file(load, how):
    for demo in FORMATS:
        m = load(recoded(text_of(demo))[how], f"{demo}.c")
        np.testing.assert_array_equal(m.table.numpy(), TABLES[demo])
        if how != "one line":
            assert tuple(m.info) == FIGURES
            assert m.power == 0.1


@pytest.mark.parametrize(
    "comment",
    [
        "/**/",
        "/* // */",
        "/* /* */",
        "// /*\n",
        "// */ x\n",
        "/*\n\n*/",
        "/***/",
        "/*/ */",
        "//\n",
        "/* \\*/",
        '/*"*/',
        "//'\n",
    ],
)
def test_comments_stand_between_any_two_tokens(load, comment):
    head, code = text_of("mul4u_DEMO").split("#include <stdlib.h>")
    head = re.sub(r"(?s)/\*.*?\*/\n", "", head)
    spread = re.sub(r"(0[xX][0-9a-fA-F]+|\w+|<<|>>|\|=|[^\w\s])", lambda t: t[0] + comment, code)
    m = load(f"{comment}\n{head}#include <stdlib.h>\n{comment}\n{spread}", "mul4u_DEMO.c")
    np.testing.assert_array_equal(m.table.numpy(), TABLES["mul4u_DEMO"])


@pytest.mark.parametrize(
    ("comments", "line"),
    [
        ("/* one\ntwo\nthree */", 8),
        ("// a\n// b\n", 8),
        ("/*\n\n\n\n// */", 10),
        ("// /*\n", 7),
        ("\r\n\r\n", 8),
        ("/*\r\n\r\n*/", 8),
    ],
)
def test_comments_leave_the_line_of_an_error_right(refused, comments, line):
    source = f"#include <stdint.h>\nint f(uint8_t a, uint8_t b)\n{{\n  int c = 1; {comments}\n  c = a;\n  c = what;\n"
    refused(source + "  return c;\n}\n", "what", line)


def test_a_comment_is_a_blank_and_glues_nothing(refused, load):
    refused(body("return a+/**/+b;").replace("+/**/+", "+/**/=") + "", line=5)
    assert load(body("int/**/x/**/=/**/a/**/</**/b;return x;")).table[1, 2] == 1
    refused(body("in/**/t x = 1; return x;"), line=5)
    refused(body("return a </**/< b;"), line=5)


@pytest.mark.parametrize(
    "includes",
    [
        "#include <stdint.h>",
        "# include <stdint.h>",
        "  #  include   <stdint.h>  ",
        '#include "stdint.h"',
        "#include <stdint.h> // why",
        "#include <stdint.h> /* why */",
        "#include<stdint.h>\n\n#include<stdlib.h>\n",
        "#include <stdint.h> /* begun here,\nended there */",
        "/* ended\n  here */ #include <stdint.h>",
        "",
    ],
)
def test_includes(load, includes):
    m = load(f"{includes}\nuint16_t mul8u_X(uint8_t a, uint8_t b) {{ return a * b; }}")
    assert m == Multiplier.exact(8, False, False)


@pytest.mark.parametrize(
    "signature",
    [
        "uint16_t f(uint8_t a, uint8_t b)",
        "unsigned short f(unsigned char a, unsigned char b)",
        "short unsigned int f(char unsigned a, const unsigned char b)",
        "int f(uint8_t const a, register uint8_t b)",
        "static uint16_t f(uint8_t a, uint8_t b)",
        "static inline uint16_t f(uint8_t a, uint8_t b)",
        "inline const unsigned f(uint8_t a, uint8_t b)",
        "long long unsigned f(uint8_t a, uint8_t b)",
    ],
)
def test_ways_to_declare_the_same_function(load, signature):
    assert load(f"{signature} {{ return a * b; }}") == Multiplier.exact(8, False, False)


def test_names_that_mean_something_to_python_or_numpy_are_only_names(load):
    names = ["lambda", "None", "True", "__import__", "np", "print", "def", "exec", "self", "__class__", "_", "__", "O0"]
    lines = "".join(f"  {name} = a + {i};\n" for i, name in enumerate(names))
    m = load(body(f"  int {', '.join(names)};\n{lines}  return {' + '.join(names)};"))
    assert m.table[3, 0] == 3 * len(names) + sum(range(len(names)))


def test_a_file_on_disk_is_left_as_it_is_and_alone(tmp_path):
    shutil.copy(MODELS / "mul4u_DEMO.c", tmp_path)
    load_multiplier(tmp_path / "mul4u_DEMO.c")
    assert [path.name for path in tmp_path.iterdir()] == ["mul4u_DEMO.c"]
    assert (tmp_path / "mul4u_DEMO.c").read_text() == text_of("mul4u_DEMO")


# ---- generated circuits ----------------------------------------------------------------------------------------------

# (C expression, meaning on words that hold one bit a row); all = the word of ones.
GATES = {
    "and": ("{x}&{y}", lambda x, y, ones: x & y),
    "or": ("{x}|{y}", lambda x, y, ones: x | y),
    "xor": ("{x}^{y}", lambda x, y, ones: x ^ y),
    "nand": ("~({x}&{y})", lambda x, y, ones: ones & ~(x & y)),
    "nor": ("~({x}|{y})", lambda x, y, ones: ones & ~(x | y)),
    "xnor": ("~({x}^{y})", lambda x, y, ones: ones & ~(x ^ y)),
    "not": ("~({x})", lambda x, y, ones: ones & ~x),
    "pass": ("{x}", lambda x, y, ones: x),
    "zero": ("0", lambda x, y, ones: 0),
    "one": ("1", lambda x, y, ones: ones),
}


class Circuit:
    """An array multiplier out of half and full adders; Baugh and Wooley's if signed."""

    def __init__(self, a_bits, w_bits, signed):
        self.a_bits, self.w_bits, self.signed = a_bits, w_bits, signed
        self.inputs = [("A", i) for i in range(a_bits)] + [("W", j) for j in range(w_bits)]
        self.gates = []  # (gate, x, y); wires are numbered on from the inputs
        columns = [[] for _ in range(a_bits + w_bits)]
        for i in range(a_bits):
            for j in range(w_bits):
                inverted = signed and (i == a_bits - 1) != (j == w_bits - 1)
                columns[i + j].append(self.gate("nand" if inverted else "and", i, a_bits + j))
        if signed:
            for column in (a_bits - 1, w_bits - 1, a_bits + w_bits - 1):
                columns[column].append(self.gate("one", 0, 0))
        self.outputs = []
        for column in range(len(columns)):
            wires = columns[column]
            while len(wires) > 1:
                x, y = wires.pop(0), wires.pop(0)
                total, carry = self.gate("xor", x, y), self.gate("and", x, y)
                if wires:
                    z = wires.pop(0)
                    carry = self.gate("or", carry, self.gate("and", total, z))
                    total = self.gate("xor", total, z)
                wires.append(total)
                if column + 1 < len(columns):
                    columns[column + 1].append(carry)
            self.outputs.append(wires[0] if wires else self.gate("zero", 0, 0))

    def gate(self, name, x, y):
        self.gates.append((name, x, y))
        return len(self.inputs) + len(self.gates) - 1

    def perturbed(self, chance, count):
        for k in chance.sample(range(len(self.gates)), count):
            name, x, y = self.gates[k]
            self.gates[k] = chance.choice([key for key in GATES if key != name]), x, y
        return self

    def table(self):
        """What it computes, by codes: one Python integer a wire, one bit of it an operand pair."""
        rows = 2 ** (self.a_bits + self.w_bits)
        ones = 2**rows - 1
        a, w = np.divmod(np.arange(rows), 2**self.w_bits)
        wires = [
            int.from_bytes(np.packbits((a if which == "A" else w) >> i & 1, bitorder="little").tobytes(), "little")
            for which, i in self.inputs
        ]
        for name, x, y in self.gates:
            wires.append(GATES[name][1](wires[x], wires[y], ones))
        bits = [
            np.unpackbits(np.frombuffer(wires[o].to_bytes(rows // 8 or 1, "little"), np.uint8), bitorder="little")[
                :rows
            ]
            for o in self.outputs
        ]
        products = sum(bit.astype(np.int64) << k for k, bit in enumerate(bits))
        if self.signed:
            products -= (products >> len(bits) - 1) << len(bits)
        return products.reshape(2**self.a_bits, 2**self.w_bits)

    def source(self, dialect, name, first="A", second="B", chance=random):
        """The circuit as C, in one of the dialects published."""
        inputs = [f"(({first if which == 'A' else second} >> {i})&1)" for which, i in self.inputs]
        prefix = {"uint64": "dout_", "uint8": "n", "rows": "S_"}[dialect]
        wires = inputs + [f"{prefix}{k}" for k in range(len(self.gates))]
        statements = [
            f"{wires[len(inputs) + k]}={GATES[gate][0].format(x=wires[x], y=wires[y])};"
            for k, (gate, x, y) in enumerate(self.gates)
        ]
        names = wires[len(inputs) :]
        if dialect == "uint64":
            head = (
                f"uint64_t {name}(const uint64_t {first},const uint64_t {second})\n{{\n"
                f"   uint64_t O, {', '.join(names)};   int avg=0;\n"
            )
            tail = ["O = 0;", *(f"O |= ({wires[o]}&1) << {k};" for k, o in enumerate(self.outputs)), "return O;"]
        elif dialect == "uint8":  # the high bits of ~ stay in the wires and, in the last one, are cut by O alone
            width = len(self.outputs)
            small = "8" if width <= 8 else "16"
            head = f"uint{small}_t {name}(uint8_t {first}, uint8_t {second})\n{{\n   uint{small}_t O;\n"
            head += f"   uint8_t {','.join(names)},{','.join(f'O{k}' for k in range(width))};\n"
            tail = [
                chance.choice([f"O{k}={wires[o]}&1;", f"O{k}={wires[o]};O{k}&=1;"]) for k, o in enumerate(self.outputs)
            ]
            if width in (8, 16):
                tail[-1] = f"O{width - 1}={wires[self.outputs[-1]]};"
            tail += ["O = " + "|".join(f"(O{k} << {k})" for k in range(width)) + ";", "return O;"]
        else:
            head = f"uint32_t {name}(uint16_t {first}, uint16_t {second})\n{{\n uint32_t P, P_;\n uint16_t tmp, "
            head += ", ".join(names) + ";\n"
            statements = [re.sub("=(.*);", r" = (\1);", statement) for statement in statements]
            half = len(self.outputs) // 2
            terms = [f"(((uint32_t)({wires[o]} & 1)) << {k})" for k, o in enumerate(self.outputs)]
            tail = [f"P_ = {' | '.join(terms[half:])};", f"P = {' + '.join(terms[:half])};", "P += P_;", "return P;"]
        space = "\n" if dialect == "rows" or chance.random() < 0.5 else "\n   "
        return f"#include <stdint.h>\n#include <stdlib.h>\n\n{head}{space}{space.join(statements + tail)}\n}}\n"


def circuit_name(circuit):
    widths = f"{circuit.a_bits}" if circuit.a_bits == circuit.w_bits else f"{circuit.a_bits}x{circuit.w_bits}"
    return f"mul{widths}{'s' if circuit.signed else 'u'}_T0"


SIZES = [(2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8), (8, 2), (2, 8), (3, 5), (7, 4), (8, 7)]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", SIZES)
def test_the_circuits_are_exact_before_they_are_perturbed(bits, signed):
    a, w = (operand_values(n, signed) for n in bits)
    np.testing.assert_array_equal(Circuit(*bits, signed).table(), np.multiply.outer(a, w))


@pytest.mark.parametrize("dialect", ["uint64", "uint8", "rows"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", SIZES)
def test_generated_circuits(load, bits, signed, dialect):
    chance = random.Random(f"{bits}{signed}{dialect}")
    for count in (0, 1, 6):
        circuit = Circuit(*bits, signed)
        circuit.perturbed(chance, min(count, len(circuit.gates) // 2))
        first, second = chance.choice([("A", "B"), ("B", "A"), ("x", "y")])
        name = circuit_name(circuit)
        source = circuit.source(dialect, name, first, second, chance)
        m = load(source, f"{name}.c")
        np.testing.assert_array_equal(m.table.numpy(), circuit.table())
        assert m.bits == bits
        assert (m.a_signed, m.w_signed) == (signed, signed)
        swapped = load(source, chance.choice(["other.c", f"{name}.c"]), swap=True)
        assert swapped == m.swap()


@pytest.mark.parametrize("name", ["mul8s_1L2H", "mul8s_1L1G", "mul8s_1L2D"])
def test_the_name_decides_on_signs_whatever_the_types(load, name):
    circuit = Circuit(8, 8, True).perturbed(random.Random(name), 4)
    m = load(circuit.source("uint8", name), f"{name}.c")
    assert (m.a_format, m.w_format) == ("int8", "int8")
    np.testing.assert_array_equal(m.table.numpy(), circuit.table())


def test_a_result_without_masks_is_cut_by_the_return_type(load):
    m = load("uint8_t mul4u_X(uint8_t a, uint8_t b) { return ~(a * b) << 1; }")
    a = np.arange(16)
    np.testing.assert_array_equal(m.table.numpy(), (~np.multiply.outer(a, a) << 1) & 255)
    m = load("uint64_t mul4u_X(uint64_t a, uint64_t b) { return a * b << 9; }")  # an unsigned result is taken as it is
    np.testing.assert_array_equal(m.table.numpy(), np.multiply.outer(a, a) << 9)


def test_a_signed_circuit_has_its_low_bits_sign_extended(load):
    a = operand_values(4, True)
    exact = np.multiply.outer(a, a)
    for source in (
        "int64_t mul4s_X(int8_t a, int8_t b) { return a * b; }",
        "uint64_t mul4s_X(int8_t a, int8_t b) { return a * b; }",
        "uint32_t mul4s_X(int8_t a, int8_t b) { return (a * b) & 0xff; }",
        "uint32_t mul4s_X(int8_t a, int8_t b) { return (a * b) | 0x4000; }",
    ):
        m = load(source)
        assert (m.a_format, m.w_format) == ("int4", "int4")
        np.testing.assert_array_equal(m.table.numpy(), exact, source)


def test_signs_by_option_and_by_type(load):
    eight = operand_values(8, True)
    exact = np.multiply.outer(eight, eight)
    unsigned = "uint16_t f(uint8_t a, uint8_t b) { return (uint16_t)((int8_t)a * (int8_t)b); }"
    np.testing.assert_array_equal(load(unsigned, a_signed=True, w_signed=True).table.numpy(), exact)
    np.testing.assert_array_equal(load(unsigned).table.numpy(), exact & 0xFFFF)
    typed = "uint16_t f(int8_t a, int8_t b) { return a * b; }"
    m = load(typed)
    assert (m.a_format, m.w_format) == ("int8", "int8")
    np.testing.assert_array_equal(m.table.numpy(), exact)
    wide = "int f(int8_t a, int8_t b) { return a * b * 4; }"  # signed already: nothing is cut
    np.testing.assert_array_equal(load(wide).table.numpy(), exact * 4)


@pytest.mark.parametrize("options", [{}, {"bits": (4, 8)}, {"bits": 8}])
def test_the_name_says_widths_and_may_be_overruled(load, options):
    m = load("uint64_t mul8x4u_X(uint64_t B, uint64_t A) { return B * A; }", **options)
    wanted = options.get("bits", (8, 4))
    assert m.bits == (wanted if isinstance(wanted, tuple) else (wanted, wanted))


def test_widths_that_nothing_says(refused, load):
    source = "uint64_t f(uint64_t a, uint64_t b) { return a * b; }"
    refused(source, "bits", loaders=[load_multiplier])
    refused(source, "bits")
    assert load(source, bits=3) == Multiplier.exact(3, False, False)
    for bits in (1, 9, 0, -1, (8, 9), (2, 2, 2), "8", 8.0, True):
        with pytest.raises(ValueError, match="bits"):
            load(source, bits=bits)


def test_options_that_a_c_model_does_not_take(load):
    with pytest.raises(ValueError, match="order"):
        load(text_of("mul4u_DEMO"), order="weight_first")
    with pytest.raises(ValueError, match="swap"):
        load_multiplier(MODELS / "mul4u_DEMO.c", swap="yes")
    with pytest.raises(ValueError, match="a_signed"):
        load_multiplier(MODELS / "mul4u_DEMO.c", a_signed=3)


# ---- C semantics -----------------------------------------------------------------------------------------------------

# Statements of int64_t f(uint8_t a, uint8_t b), and what f(200, 3) is on 64-bit Linux.
SEMANTICS = {
    # promotion
    "return ~a;": -201,
    "return (uint8_t)~a;": 55,
    "return a + a;": 400,
    "uint8_t c = a + a; return c;": 144,
    "uint8_t c = ~a; return c >> 1;": 27,
    "return ~a >> 1;": -101,
    "return (uint8_t)a << 8;": 51200,
    "return -b;": -3,
    "return -(unsigned)b;": 4294967293,
    "return -(uint8_t)b;": -3,
    "return +(int8_t)a;": -56,
    "return !a;": 0,
    "return !(a & 0);": 1,
    "return ~!a;": -1,
    "return !!a << 5;": 32,
    "return (char)a;": -56,
    "return (signed char)a;": -56,
    "return (unsigned char)-1;": 255,
    "return (bool)a + (_Bool)256;": 2,
    "bool c = 2; return c + c;": 2,
    "bool c = a; c ^= 3; return c;": 1,
    "return ~(bool)a;": -2,
    "return (short)(a << 8);": -14336,
    # usual arithmetic conversions
    "return -1 < 1u;": 0,
    "return (int8_t)-1 < (uint8_t)1;": 1,
    "return -1 < (uint64_t)1;": 0,
    "return -1L < 1u;": 1,
    "return -1 < (uint16_t)1;": 1,
    "return -1 == 0xffffffff;": 1,
    "return -1L == 0xffffffff;": 0,
    "return -1 == 0xffffffffffffffff;": 1,
    "return (uint8_t)255 == (int8_t)-1;": 0,
    "return 0 ? -1 : 0u - 1;": 4294967295,
    "return 1 ? -1 : 1u;": 4294967295,
    "return a ? -1 : 1l;": -1,
    "return a ? (int8_t)-1 : (uint8_t)1;": -1,
    "return (a ? -1 : 1u) > 0;": 1,
    "return (int)(a - b - 300u);": -103,
    "return (long)(a - b - 300u);": 4294967193,
    "return a - b - 300;": -103,
    "return -1 - 0u >> 28;": 15,
    "return (uint16_t)-1 * (uint16_t)-1;": -131071,
    "return (uint16_t)-1 * (unsigned)(uint16_t)-1;": 4294836225,
    "return 65536u * 65536;": 0,
    "return 65536l * 65536;": 4294967296,
    "return 65536ul * 65536 == 1ull << 32;": 1,
    "return 2147483647 + 1;": -2147483648,
    "return -2147483647 - 2;": 2147483647,
    "return -(-2147483647 - 1);": -2147483648,
    "return 9223372036854775807 + 1;": -(2**63),
    "return -9223372036854775807 - 2 == 9223372036854775807;": 1,
    "return (-9223372036854775807 - 1) >> 63;": -1,
    "return (0xffffffffffffffff * 0xffffffffffffffff) + 6;": 7,
    "return (int64_t)0x8000000000000000;": -(2**63),
    "return (uint64_t)-1 > 9223372036854775807;": 1,
    "return (int)0x123456789abcdef0;": -1698898192,
    "return (uint32_t)0x123456789abcdef0;": 0x9ABCDEF0,
    "return (int8_t)0x1ff;": -1,
    "return 0x80000000 > -1;": 0,
    "return 2147483648 > -1;": 1,
    "return -2147483648;": -2147483648,
    "return -0x80000000;": 2147483648,
    # shifts
    "return 1 << 31;": -2147483648,
    "return (uint64_t)(1 << 31) >> 32;": 4294967295,
    "return 1u << 31;": 2147483648,
    "return 1 << 31ull;": -2147483648,
    "return 1ll << 31;": 2147483648,
    "return -1 >> 1;": -1,
    "return -1u >> 1;": 2147483647,
    "return (int8_t)a >> 3;": -7,
    "return (uint64_t)0 - 1 >> 60;": 15,
    "return 3 << 31;": -2147483648,
    "return a << b << b;": 12800,
    "return a >> (a & 7) + b;": 25,
    "return 1ull << 63 >> 62;": 2,
    "return (uint16_t)(a << 9);": 36864,
    "return a >> 31;": 0,
    # literals
    "return 010 + 0x10 + 0b10 + 10;": 36,
    "return 0X1fU + 1Ull + 2llu + 3lu + 0B11L;": 40,
    "return 00 + 0 + 0x0 + 0b0;": 0,
    "return 037777777777 == 4294967295;": 1,
    "return 037777777777 > -1;": 0,
    "return 4294967295 > -1;": 1,
    "return 0xffffffffffffffff > -1;": 0,
    "return 0x7fffffffffffffff + 1 < 0;": 1,
    "return 0x00000000000000000000ffu;": 255,
    "return 0b11111111;": 255,
    # precedence and grouping
    "return a & 15 == 8;": 0,
    "return a | b ^ b & 1;": 202,
    "return 1 + 2 << 3;": 24,
    "return a - b - b;": 194,
    "return 1 << 2 << 3;": 32,
    "return 100 >> 2 >> 1;": 12,
    "return a < b < 1;": 1,
    "return a > b > b;": 0,
    "return 5 > 4 > 3;": 0,
    "return a != b == 1;": 1,
    "return 0 && 1 || 1;": 1,
    "return 1 || 0 && 0;": 1,
    "return 0 ? 1 : 0 ? 2 : 3;": 3,
    "return 1 ? 0 ? 1 : 2 : 3;": 2,
    "return a > 3 ? b > 3 ? 1 : 2 : 3;": 2,
    "return - - -b;": -3,
    "return ~~~b;": -4,
    "return -~-~b;": 5,
    "return a+-+b;": 197,
    "return (((((a)))));": 200,
    "return (uint8_t)a + 100;": 300,
    "return (uint8_t)(a + 100);": 44,
    "return (uint8_t)-(int8_t)~a;": 201,
    "return (int8_t)(uint8_t)(int)a;": -56,
    "return a && b == 3;": 1,
    "return (a & 128) && 1;": 1,
    "return !a == b;": 0,
    "return 3 - 2 * 2;": -1,
    # assignments
    "uint8_t c = 200; c += 100; return c;": 44,
    "uint8_t c = 3; c -= 5; return c;": 254,
    "uint8_t c = 100; c *= 3; return c;": 44,
    "uint8_t c = 0x81; c <<= 1; return c;": 2,
    "int8_t c = 0x81; c >>= 1; return c;": -64,
    "uint8_t c = 0x81; c >>= 1; return c;": 64,
    "int8_t c = 1; c &= 3; c |= 0x80; c ^= 1; return c;": -128,
    "int8_t c = -1; c += 4000000000u; return c;": -1,
    "int8_t c = 200, d = c, e; e = d + 1; return e;": -55,
    "int x; x = 1; { } return x;": None,
    "a = a & 15; return a;": 8,
    "a += b; b = a; a = 0; return b;": 203,
    "a = 300; return a;": 44,
    "int c = 1; c = c + 1; c = c + c; return c;": 4,
    "unsigned c = 1, d = c + 1, e = d - 3; return e;": 4294967295,
    "int c, d; c = d = 5; return c + d;": 10,
    "uint8_t c; int d; d = c = 300; return d;": 44,
    "const int c = a; return c;": 200,
    "int const unsigned long c = -1; return c >> 60;": 15,
    "; ; int c = 1;;; return c;": 1,
    "a; return b;": None,
    "long int c = a; short d = -1; long unsigned int long e = 1; signed s = -1; return c + d + e + s;": 199,
    "return a\n;": 200,
    "return(a);": 200,
}


@pytest.mark.parametrize("statements", SEMANTICS)
def test_c_semantics_by_hand(function, statements):
    expected = SEMANTICS[statements]
    if expected is None:  # C, but beyond the dialect: refused or right
        with contextlib.suppress(FormatError):
            function(body(statements))
        return
    f = function(body(statements))
    result = f(np.array([200]), np.array([3]))
    assert result.dtype == np.int64
    assert result.tolist() == [expected]
    assert f(200, 3) == expected


@needs_gcc
def test_the_expectations_are_gcc_s(tmp_path):
    cases = {s: e for s, e in SEMANTICS.items() if e is not None}
    calls = compiled([body(s, name=f"f{i}") for i, s in enumerate(cases)], tmp_path)
    for (statements, expected), call in zip(cases.items(), calls, strict=True):
        assert call([200], [3]).tolist() == [expected], statements


def compiled(sources, folder):
    """What gcc makes of functions ``f0, f1, …``, compiled at once: callables of two lists of operands."""
    heads = [re.search(r"\w+ f\d+\((\w+) a, (\w+) b\)", source) for source in sources]
    loops = [
        f"void run{i}(const long *a, const long *b, long *r, long n)"
        f"{{ for (long k = 0; k < n; k++) r[k] = (long)f{i}(({head[1]})a[k], ({head[2]})b[k]); }}"
        for i, head in enumerate(heads)
    ]
    (folder / "all.c").write_text("\n".join([*sources, *loops]))
    command = [
        "gcc",
        "-w",
        "-O0",
        "-fwrapv",
        "-std=gnu11",
        "-shared",
        "-fPIC",
        "-o",
        folder / "all.so",
        folder / "all.c",
    ]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "all.so"))

    def caller(i):
        def call(a, b):
            a, b = (np.ascontiguousarray(x, np.int64) for x in (a, b))
            result = np.empty(a.shape, np.int64)
            pointers = [ctypes.c_void_p(x.ctypes.data) for x in (a, b, result)]
            getattr(library, f"run{i}")(*pointers, ctypes.c_long(a.size))
            return result

        return call

    return [caller(i) for i in range(len(sources))]


EXACT_TYPES = [f"{u}int{n}_t" for n in (8, 16, 32, 64) for u in ("u", "")]
TYPES = [*EXACT_TYPES, "char", "signed char", "short", "unsigned", "int", "long long", "unsigned long", "bool"]
EDGES = [
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    127,
    128,
    255,
    256,
    0x7FFF,
    0x8000,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
]
SUFFIXES = ["", "", "", "", "u", "U", "l", "L", "ul", "UL", "lU", "ll", "LL", "ull", "ULL", "llu", "LLU"]


class RandomProgram:
    """A straight-line program over every integer type, without undefined behaviour but overflow."""

    def __init__(self, chance, index, *, wide=False):
        self.chance = chance
        self.names = ["a", "b"]
        a, b = (chance.choice(EXACT_TYPES[:4] if not wide else EXACT_TYPES) for _ in "ab")
        self.bits = tuple(min(16, int(re.sub(r"\D", "", t))) for t in (a, b))
        self.signed = tuple(t[0] != "u" for t in (a, b))
        # Signed parameters with an unsigned result are read as two's complement: not what this compares.
        returns = chance.choice(EXACT_TYPES[1::2] if any(self.signed) else EXACT_TYPES)
        lines = [self.statement(i) for i in range(chance.randint(0, 8))]
        result = self.expression(4)
        if returns == "uint64_t":  # so that it is below 2**63
            result = f"(uint64_t)({result}) >> 1"
        self.source = body("\n".join([*lines, f"return {result};"]), returns=returns, a=a, b=b, name=f"f{index}")

    def statement(self, i):
        kind, name, depth = self.chance.choice(TYPES), f"v{i}", 4
        if self.chance.random() < 0.5:
            text = f"{kind} {name} = {self.expression(depth)};"
        else:
            update = self.chance.choice(["|=", "&=", "^=", "+=", "-=", "*="])
            text = f"{kind} {name}, u{i} = {self.literal()}; {name} = {self.expression(depth)};"
            text += f" {name} {update} {self.expression(2)};"
            if self.chance.random() < 0.3:
                text += f" {name} {self.chance.choice(['<<=', '>>='])} {self.chance.randint(0, 31)};"
            self.names.append(f"u{i}")
        self.names.append(name)
        return text

    def literal(self):
        value = self.chance.choice([*EDGES, self.chance.getrandbits(self.chance.randint(1, 63))])
        return self.chance.choice(["{}", "0x{:x}", "0X{:X}", "0{:o}", "0b{:b}"]).format(value) + self.chance.choice(
            SUFFIXES
        )

    def expression(self, depth):
        kind = self.chance.random()
        if depth <= 0 or kind < 0.12:
            return self.chance.choice(self.names) if self.chance.random() < 0.75 else self.literal()
        x, y, z = (self.expression(depth - 1) for _ in range(3))
        if kind < 0.24:
            return f"{self.chance.choice('~-+!')}({x})"
        if kind < 0.34:
            return f"({self.chance.choice(TYPES)})({x})"
        if kind < 0.44:
            return f"(({x}) ? ({y}) : ({z}))"
        if kind < 0.56:
            return f"(({x}) {self.chance.choice(['<<', '>>'])} {self.chance.randint(0, 31)})"
        if kind < 0.62:
            return f"(({x}) {self.chance.choice(['<<', '>>'])} (({y}) & {self.chance.choice([7, 15, 31])}))"
        gates = ["&", "|", "^"] * 2 + ["+", "-", "*", "<", "<=", ">", ">=", "==", "!=", "&&", "||"]
        return f"({x} {self.chance.choice(gates)} {y})"


@needs_gcc
@pytest.mark.parametrize("seed", range(3))
def test_random_programs_are_what_gcc_makes_of_them(tmp_path, function, seed):
    chance = random.Random(seed)
    programs = [RandomProgram(chance, i, wide=i % 3 == 0) for i in range(100)]
    generator = np.random.default_rng(seed)
    for program, call in zip(programs, compiled([p.source for p in programs], tmp_path), strict=True):
        values = [operand_values(n, s) for n, s in zip(program.bits, program.signed, strict=True)]
        a, b = (np.concatenate([v[[0, 1, -1, len(v) // 2, len(v) // 2 - 1]], generator.choice(v, 500)]) for v in values)
        swap = chance.random() < 0.5
        f = function(program.source, bits=program.bits[::-1] if swap else program.bits, swap=swap)
        result = f(b, a) if swap else f(a, b)
        np.testing.assert_array_equal(result, call(a, b), program.source)


@needs_gcc
def test_generated_circuits_are_what_gcc_makes_of_them(tmp_path, load):
    circuits = [Circuit(*bits, False).perturbed(random.Random(str(bits)), 3) for bits in ((4, 4), (8, 3), (8, 8))]
    sources = [
        c.source(dialect, f"f{3 * i + k}", "a", "b", random.Random(i)).replace("const ", "").replace(",uint", ", uint")
        for i, c in enumerate(circuits)
        for k, dialect in enumerate(("uint64", "uint8", "rows"))
    ]
    for k, (source, call) in enumerate(zip(sources, compiled(sources, tmp_path), strict=True)):
        m = load(source, bits=(circuits[k // 3].a_bits, circuits[k // 3].w_bits))
        a, b = (x.ravel() for x in np.indices(m.table.shape))
        np.testing.assert_array_equal(m.table.numpy().ravel(), call(a, b))


def test_a_shift_in_a_branch_that_is_not_taken_does_not_count(function):
    f = function(body("return b < 32 ? 1u << b : 0;"))
    try:
        result = f(0, np.arange(256))
    except FormatError:
        return
    np.testing.assert_array_equal(result, [1 << b if b < 32 else 0 for b in range(256)])


@pytest.mark.parametrize(
    "statements",
    [
        "return 1 << 32;",
        "return 1ull << 64;",
        "return 1 << -1;",
        "return a >> 40;",
        "return a << b;",
        "return (uint64_t)a >> b;",
        "return a >> (int8_t)b;",
        "int c = a; c <<= 32; return c;",
        "int c = a; c >>= b; return c;",
        "return 1ull << 0xffffffffffffffff;",
    ],
)
def test_a_shift_out_of_range_is_refused(refused, statements):
    refused(body(f"int d = 1;\n{statements}"), "shift", 6, loaders=[load_multiplier])


def test_products_that_no_table_or_int64_holds(write):
    for statements in ("return 1l << 31;", "return -1l << 40;", "return (long)a << 40;"):
        with pytest.raises(FormatError, match=r"circuit\.c.*int32"):
            load_multiplier(write(body(statements)))
    assert load_function(write(body("return (long)a << 40;")))(255, 0) == 255 << 40
    path = write(body("return -(uint64_t)a;", returns="uint64_t"))
    with pytest.raises(FormatError, match=r"circuit\.c.*63|int64"):
        load_function(path)(np.arange(4), 1)
    with pytest.raises(FormatError, match=r"circuit\.c"):
        load_multiplier(path)


@pytest.mark.parametrize(
    ("returns", "value", "expected"),
    [
        ("uint8_t", "300", 44),
        ("int8_t", "300", 44),
        ("int8_t", "200", -56),
        ("uint16_t", "-1", 65535),
        ("int16_t", "0x18000", -32768),
        ("uint32_t", "-1", 2**32 - 1),
        ("int", "0xffffffff", -1),
        ("_Bool", "300", 1),
        ("bool", "0", 0),
        ("char", "200", -56),
        ("unsigned char", "-1", 255),
        ("long", "-1u", 2**32 - 1),
    ],
)
def test_the_return_type_converts(function, returns, value, expected):
    assert function(body(f"return {value};", returns=returns))(0, 0) == expected


# ---- what is refused -------------------------------------------------------------------------------------------------

# Statements and what the message must name; @ marks the line to be named.
REFUSED = {
    "for (;;) @\n a = 1;": "for",
    "for (int i = 0; i < 3; i++) { @\n a = 1; }": "for",
    "while (a) @\n a = 1;": "while",
    "do @ a = 1; while (a);": "do",
    "if (a) @\n b = 1;": "if",
    "if (a) @ b = 1; else b = 2;": "if",
    "switch (a) { @ case 1: b = 2; }": "switch",
    "goto out; @\n out: b = 1;": "goto|label",
    "out: b = 1; @": "label",
    "break; @": "break",
    "continue; @": "continue",
    "case 1: b = 1; @": "case",
    "default: b = 1; @": "default",
    "{ @\n int c = 1; }": "block|compound|brace|{",
    "b = g(a); @": "call|g",
    "g(); @": "call|g",
    'system("rm -rf /"); @': 'call|system|string|"',
    "int *p; @": "pointer",
    "int *p = &a; @": "pointer|&",
    "uint8_t **p; @": "pointer",
    "b = *&a; @": r"pointer|address|\*|&",
    "b = &a; @": "address|pointer|&",
    "b = *(int*)0; @": r"pointer|\*",
    "b = (int*)a; @": "pointer",
    "int c[3]; @": "array",
    "int c[3] = {1, 2, 3}; @": "array|{",
    "b = a[0]; @": "array|index|subscript",
    "int c = {1}; @": "a block",
    "struct s { int x; } c; @": "struct",
    "struct s c; @": "struct",
    "b = a.x; @": r"struct|member|\.",
    "b = a->x; @": "struct|member|->",
    "union u { int x; } c; @": "union",
    "enum { X, Y }; @": "enum",
    "enum e c; @": "enum",
    "typedef int T; @": "typedef",
    "b = 1.0; @": "float|1.0",
    "b = 1.; @": "float|1\\.",
    "b = .5; @": "float|\\.5",
    "b = 1e3; @": "float|1e3",
    "b = 1.0f; @": "float|1.0f",
    "b = 0x1p3; @": "float|0x1p3",
    "float c = 1; @": "float",
    "double c; @": "double",
    "long double c = 1; @": "double",
    "b = (float)a; @": "float",
    "b = 'a'; @": "char|'",
    "b = '\\n'; @": "char|'",
    'b = "a"; @': 'string|"',
    "b++; @": r"\+\+",
    "++b; @": r"\+\+",
    "b--; @": "--",
    "--b; @": "--",
    "b = a++ + 1; @": r"\+\+",
    "b = a / 2; @": "/",
    "b = a % 2; @": "%",
    "b /= 2; @": "/",
    "b %= 2; @": "%",
    "b = sizeof a; @": "sizeof",
    "b = sizeof(int); @": "sizeof",
    "b = _Alignof(int); @": "_Alignof|alignof",
    "b = a, a; @": "comma|,",
    "b = (a, a); @": "comma|,",
    "a = 1, b = 2; @": "comma|,",
    "return a; @\n b = 1;": "return",
    "return; @": "return",
    "int f(int x); @": "function|declar",
    "void c; @": "void",
    "b = (void)a; @": "void",
    "b = c; @": "c",
    "c = 1; @": "c",
    "c |= 1; @": "c",
    "int c; b = c; @": "c",
    "int c; c |= 1; @": "c",
    "int c = c; @": "c",
    "int c; int c; @": "c",
    "int c, c; @": "c",
    "int a; @": "a",
    "int c = d, d = 1; @": "d",
    "int __attribute__((aligned(8))) c; @": "an attribute",
    'asm("nop"); @': 'asm|"',
    '__asm__ volatile ("nop"); @': 'asm|"',
    "_Complex c; @": "_Complex|complex",
    "double _Complex c; @": "complex|_Complex|double",
    "__int128 c = 1; @": "__int128",
    "unsigned __int128 c = 1; @": "__int128",
    "foo_t c = 1; @": "foo_t|must be C",
    "b = (foo_t)a; @": "foo_t|a",
    "int c : 3; @": "bit|:",
    "b = ({ int c = 1; c; }); @": "{|block",
    "b = a ?: 1; @": r"\?|:|expression",
    "a + b = 1; @": "assign|=",
    "1 = a; @": "assign|=",
    "(a) ? b : b = 1; @": "assign|=",
    "(uint8_t)a = 1; @": "assign|=",
    "b =; @": "invalid expression",
    "b = a b; @": "b",
    "b = a +; @": "invalid expression",
    "b = (a; @": r"\)|;",
    "b = a); @": r"\)",
    "b = a ? 1; @": ";|:",
    "b = 09; @": "09|octal|integer",
    "b = 0xg; @": "0xg|xg|integer",
    "b = 0x; @": "0x|x|integer",
    "b = 0b2; @": "0b2|b2|integer",
    "b = 1uu; @": "integer|must be C",
    "b = 1lul; @": "integer|must be C",
    "b = 1lL; @": "integer|must be C",
    "b = 12abc; @": "12abc|abc|integer",
    "b = 18446744073709551616; @": "18446744073709551616|large|64",
    "b = 0x10000000000000000u; @": "0x10000000000000000|large|64",
    "unsigned signed c = 1; @": "unsigned|signed|type",
    "long long long c = 1; @": "long|type",
    "short long c = 1; @": "short|long|type",
    "unsigned uint8_t c = 1; @": "type|must be C",
    "int int c = 1; @": "int|type",
    "unsigned bool c = 1; @": "type|must be C",
    "static int c = 1; @": "static",
    "extern int c; @": "extern",
    "const int c = 1; c = 2; @": "const",
    "int if = 1; @": "if|declaration",
    "int 1c = 1; @": "1c|integer|declaration",
    "b = a # 1; @": "#",
    "b = a $ 1; @": r"\$",
    "b = \\ 1; @": r"\\",
    "#define X 1 @\n": "define|#",
    "#if 0 @\n": "#if|if",
    "#undef X @": "undef|#",
    "#line 100 @": "line|#",
    "#include_next <a> @": "include|#",
    "b = defined(a); @": "call|defined",
    '_Static_assert(1, "no"); @': 'assert|"',
    '_Pragma("once"); @': 'pragma|"',
    "b = _Generic(a, int: 1); @": "_Generic|Generic",
    "int (*g)(int); @": "pointer|function|declar",
    "int g() { @ return 1; }": "a block",
    "else b = 1; @": "else",
    "int; @": "int|declar|name|empty|;",
}


def marked(statements):
    """The source with its mark removed, and the line it marks."""
    source = body(f"int first = 1;\n{statements}\nreturn a;")
    return source.replace("@", " "), source[: source.index("@")].count("\n") + 1


@pytest.mark.parametrize("statements", REFUSED)
def test_constructs_refused_by_line_and_name(refused, statements):
    source, line = marked(statements)
    refused(source, REFUSED[statements], line)


@pytest.mark.parametrize(
    ("source", "match", "line"),
    [
        ("int f(int8_t a, int8_t b)\n{\n int c = 1;\n}", "return", None),
        ("int f(int8_t a, int8_t b)\n{\n}", "return", None),
        ("int f(int8_t a, int8_t b);", "function", None),
        ("", "function", None),
        ("\n\n// only a comment\n", "function", None),
        ("#include <stdint.h>\n", "function", None),
        ("\nint f(int8_t a)\n{ return a; }", "two|parameter", 2),
        ("\nint f()\n{ return 1; }", "two|parameter", 2),
        ("\nint f(void)\n{ return 1; }", "two|parameter", 2),
        ("\nint f(int8_t a, int8_t b, int8_t c)\n{ return a; }", "two|parameter", 2),
        ("\nint f(int8_t a, ...)\n{ return a; }", r"two|parameter|\.\.\.", 2),
        ("\nint f(int8_t a, int8_t b, ...)\n{ return a; }", r"two|parameter|\.\.\.", 2),
        ("\nint f(int8_t, int8_t b)\n{ return b; }", "name", 2),
        ("\nint f(int8_t, int8_t)\n{ return 1; }", "name", 2),
        ("\nint f(int8_t a, int8_t a)\n{ return a; }", "a", 2),
        ("\nint f(a, b) int a, b; { return a; }", "parameter|type|name", 2),
        ("\nint f(int8_t *a, int8_t b)\n{ return 1; }", "pointer", 2),
        ("\nint f(int8_t a[3], int8_t b)\n{ return 1; }", "array", 2),
        ("\nint f(float a, int8_t b)\n{ return 1; }", "float", 2),
        ("\nint f(int8_t a,\n double b)\n{ return 1; }", "double", 3),
        ("\nint f(foo a, int8_t b)\n{ return 1; }", "foo|must be C", 2),
        ("\nint f(struct s a, int8_t b)\n{ return 1; }", "struct", 2),
        ("\nint *f(int8_t a, int8_t b)\n{ return 1; }", "pointer", 2),
        ("\nvoid f(int8_t a, int8_t b)\n{ return 1; }", "void", 2),
        ("\nfloat f(int8_t a, int8_t b)\n{ return 1; }", "float", 2),
        ("\nfoo f(int8_t a, int8_t b)\n{ return 1; }", "foo|must be C", 2),
        ("\nint x;\nint f(int8_t a, int8_t b)\n{ return 1; }", "x|function|global", 2),
        ("\nint x = 1;\nint f(int8_t a, int8_t b)\n{ return 1; }", "x|function|global", 2),
        ("int f(int8_t a, int8_t b)\n{ return 1; }\nint x = 1;", "x|function|global", 3),
        ("struct s { int x; };\nint f(int8_t a, int8_t b)\n{ return 1; }", "struct|outside", 1),
        ("int f(int8_t a, int8_t b)\n{ return 1; }\nint g(int8_t a, int8_t b)\n{ return 1; }", "function|g|one", None),
        ("int f(int8_t a, int8_t b)\n{ return 1; }\nint f(int8_t a, int8_t b)\n{ return 1; }", "function|f|one", None),
        ("#define X 1\nint f(int8_t a, int8_t b)\n{ return X; }", "define", 1),
        ("\n#if 0\n#endif\nint f(int8_t a, int8_t b)\n{ return 1; }", "#|if", 2),
        ("\n#ifdef X\n#endif\nint f(int8_t a, int8_t b)\n{ return 1; }", "#|ifdef", 2),
        ("\n#error no\nint f(int8_t a, int8_t b)\n{ return 1; }", "#|error", 2),
        ("int f(int8_t a, int8_t b)\n{ return 1;\n", "}|end|closed", None),
        ("int f(int8_t a, int8_t b)\n{ return 1; }\n}", "}", 3),
        ("int f(int8_t a, int8_t b)\n{ return 1; }\nwhat", "what|end|must be C", 3),
        ("int f(int8_t a, int8_t b)\n\n{ return 1; /* open\n\n", "comment", 3),
        ("/*\nint f(int8_t a, int8_t b)\n\n{ return 1; }\n\n", "comment", 1),
        ("int f(int8_t a, int8_t b)\n{ return 1; }\n/* open *", "comment", 3),
        ("int f(int8_t a, int8_t b)\n\n{ return 'a;\n }", "'|char", 3),
        ('int f(int8_t a, int8_t b)\n\n{ return "a;\n }', '"|string', 3),
        ("int f(int8_t a, int8_t b)\n\n{ ünï = 1;\n }", "ü", 3),
        ("int f(int8_t a, int8_t b)\n\n{ return 1 − 1;\n }", "−", 3),
        ("int f(int8_t a, int8_t b)\n\n{ return\xa01;\n }", "xa0|\xa0", 3),
        ("int f(int8_t a, int8_t b)\n\n{ return \x001;\n }", "NUL|x00", 3),
        ("int f(int8_t a, int8_t b)\n\n{ return \x011;\n }", "x01", 3),
        (b"int f(int8_t a, int8_t b)\n\n{ return \xff1;\n }", "xff|\xff|\ufffd", 3),
        ("def f(a, b):\n    return a * b\n", "", 1),
        ("int main(int argc, char **argv)\n{ return 0; }", "pointer", 1),
    ],
)
def test_files_refused_by_line_and_name(refused, source, match, line):
    refused(source, match, line, bits=4)


def test_what_is_defined_beside_the_function_of_the_file_s_name(load, refused):
    """Two functions are refused, unless it is clear which one is meant."""
    source = "int g(int8_t a, int8_t b)\n{ return 1; }\nint f(int8_t a, int8_t b)\n{ return 2; }"
    refused(source, "function", file="h.c")


def test_a_line_that_goes_on_after_a_backslash(load):
    """A backslash at the end of a line joins the next one, in a comment too: right, or refused."""
    for statements, expected in (
        ("a = 1; // comment \\\n a = 2;\nreturn a;", 1),
        ("a = 1; /\\\n/ a = 2;\nreturn a;", 1),
        ("a = 1 \\\n + 2;\nreturn a;", 3),
        ("a = 1\\\n2;\nreturn a;", 12),
    ):
        try:
            m = load(body(statements))
        except FormatError:
            continue
        assert m.table[0, 0] == expected, statements


@pytest.mark.parametrize("spelling", ["%:include <stdint.h>", "??=include <stdint.h>"])
def test_digraphs_and_trigraphs_are_refused(refused, spelling):
    refused(f"{spelling}\nint f(int8_t a, int8_t b)\n{{ return 1; }}", "", 1)


# ---- hostile files ---------------------------------------------------------------------------------------------------

MIB = 2**20
HEAD = "#include <stdint.h>\nuint64_t mul8u_X(uint8_t a, uint8_t b) {\n"
TAIL = "return a; }\n"

# What stands before, what is repeated, in the middle, repeated as often, and behind.
REPEATED = {
    "blanks": ("", " ", "", "", ""),
    "zeros": ("", "\0", "", "", ""),
    "newlines": ("", "\n", "", "", ""),
    "words": ("", "a", "", "", ""),
    "digits": ("", "1", "", "", ""),
    "slashes": ("", "/", "", "", ""),
    "stars": ("", "*", "", "", ""),
    "parentheses": ("", "(", "", "", ""),
    "parentheses in an expression": (f"{HEAD}return ", "(", "", "", ""),
    "balanced parentheses": (f"{HEAD}return ", "(", "a", ")", "; }"),
    "braces": (HEAD, "{", "", "", ""),
    "balanced braces": (HEAD, "{", "", "}", TAIL),
    "brackets": (f"{HEAD}a = a", "[", "", "", ""),
    "comment starts": ("", "/*", "", "", ""),
    "comment starts and a function": ("", "/*", "", "", HEAD + TAIL),
    "comments": (HEAD, "/**/", "", "", TAIL),
    "comment lines": (HEAD, "//\n", "", "", TAIL),
    "quotes": ("", "\"'", "", "", ""),
    "quotes in code": (f"{HEAD}a = ", '"', "", "", ";" + TAIL),
    "backslashes": ("", "\\", "", "", ""),
    "backslash newlines": (f"{HEAD}a = ", "\\\n", "", "", "b;" + TAIL),
    "hashes": ("", "#", "", "", ""),
    "hashes in lines": ("", "#\n", "", "", ""),
    "includes": ("", "#include <a.h>\n", "", "", ""),
    "includes without end": ("#include <", "a", "", "", ""),
    "blanks before an include": ("", " ", "", "", "#include <a.h>"),
    "lines of blanks": ("", " " * 1000 + "x\n", "", "", ""),
    "a=a": (HEAD, "a=a;", "", "", TAIL),
    "a|=b": (HEAD, "a|=b;", "", "", TAIL),
    "a=a without semicolons": (HEAD, "a=a ", "", "", ""),
    "a=a=a": (HEAD, "a=", "", "", "a; return a; }"),
    "conversions": (f"{HEAD}uint64_t c = a * -1ull; int8_t d;", "d=c;c=d*c;", "", "", "return c >> 8; }"),
    "wide products": (f"{HEAD}uint64_t c = a;", "c=c*c+b;", "", "", "return c >> 40; }"),
    "wide shifts": (f"{HEAD}uint64_t c = a;", "c=(c<<(b&63))^~c;", "", "", "return c >> 40; }"),
    "wide choices": (f"{HEAD}uint64_t c = a;", "c=c>b?-c*c:~b;", "", "", "return c >> 40; }"),
    "long name": (f"{HEAD}int ", "x", "", "", " = 1; return a; }"),
    "long undeclared name": (f"{HEAD}return ", "x", "", "", "; }"),
    "long function name": ("int f", "f", "", "", "(int8_t a, int8_t b) { return 1; }"),
    "long number": (f"{HEAD}return ", "9", "", "", "; }"),
    "long hexadecimal number": (f"{HEAD}return 0x", "f", "", "", "; }"),
    "long octal number": (f"{HEAD}return 0", "7", "", "", "; }"),
    "long zero": (f"{HEAD}return ", "0", "", "", "; }"),
    "long float": (f"{HEAD}return 1", "1", "", "", ".0; }"),
    "long exponent": (f"{HEAD}return 1e", "1", "", "", "; }"),
    "long suffix": (f"{HEAD}return 1", "u", "", "", "; }"),
    "casts that nest": (f"{HEAD}return ", "(int(", "a", "))", "; }"),
    "parameters that nest": (f"{HEAD}a = (int (", "int (", "", "", ""),
    "functions of functions": ("int f(int (", "*g(int (", "x", "))", ")) { return 1; }"),
    "compound literals": (f"{HEAD}a = ", "(int){", "1", "}", ";" + TAIL),
    "statement expressions": (f"{HEAD}a = ", "({", "1;", "})", ";" + TAIL),
    "initialisers that nest": (f"{HEAD}int c = ", "{", "1", "}", ";" + TAIL),
    "names in parentheses": (f"{HEAD}return a", "(a)", "", "", "; }"),
    "names in deep parentheses": (f"{HEAD}return ", "((a)", "", ")", "; }"),
    "calls that nest": (f"{HEAD}return ", "a(", "a", ")", "; }"),
    "sizeofs": (f"{HEAD}return ", "sizeof(int)*", "", "", "a; }"),
    "sizeofs that nest": (f"{HEAD}return ", "sizeof(", "a", ")", "; }"),
    "casts": (f"{HEAD}return ", "(int)", "", "", "a; }"),
    "tildes": (f"{HEAD}return ", "~", "", "", "a; }"),
    "minuses": (f"{HEAD}return ", "- ", "", "", "a; }"),
    "pluses": (f"{HEAD}a = ", "+ + + b;a=", "", "", "b;" + TAIL),
    "stars before a name": (f"{HEAD}return ", "*", "", "", "a; }"),
    "ampersands": (f"{HEAD}return ", "& ", "", "", "a; }"),
    "ternaries": (f"{HEAD}return ", "a?b:", "", "", "a; }"),
    "ternaries in the middle": (f"{HEAD}return ", "a?", "a", ":b", "; }"),
    "sums": (f"{HEAD}return ", "a^", "", "", "a; }"),
    "sums to the right": (f"{HEAD}return ", "a+(", "a", ")", "; }"),
    "commas": (HEAD, "a,", "", "", "a; return a; }"),
    "ifs": (HEAD, "if(a) ", "", "", "a=1; return a; }"),
    "else ifs": (HEAD, "if(a) a=1; else ", "", "", "a=1; return a; }"),
    "labels": (HEAD, "a: ", "", "", "a=1; return a; }"),
    "stars in a declaration": (f"{HEAD}int ", "*", "", "", "c; return a; }"),
    "consts": (HEAD, "const ", "", "", "int c = 1; return a; }"),
    "longs": (HEAD, "long ", "", "", "c = 1; return a; }"),
    "semicolons": (HEAD, ";", "", "", TAIL),
    "top-level semicolons": ("", ";", "", "", ""),
    "prototypes": ("", "int f(int a, int b);", "", "", ""),
    "functions": ("", "int f(int a, int b) {return a;}", "", "", ""),
    "typedefs": ("", "typedef int a;", "", "", ""),
    "parameters": ("int f(", "int a, ", "", "", "int b) { return a; }"),
    "structs": (HEAD, "struct s {", "", "", ""),
    "strings": (f"{HEAD}a = ", '""', "", "", ";" + TAIL),
    "headers": ("", "// A = 1\n", "", "", HEAD + TAIL),
    "equals signs": ("//", "=", "", "", "\n" + HEAD + TAIL),
    "blanks in a header": ("// MAE ", " ", "", "", "= 1\n" + HEAD + TAIL),
    "blanks after a header": ("// MAE = 1", " ", "", "", "x\n" + HEAD + TAIL),
    "digits in a header": ("// MAE = ", "1", "", "", "\n" + HEAD + TAIL),
}


def repeated(what, size):
    """About `size` characters of it."""
    before, left, middle, right, behind = REPEATED[what]
    count = (size - len(before + middle + behind)) // len(left + right)
    return before + left * count + middle + right * count + behind


def nested(text, count, middle="int"):
    """`text` with itself in place of its %, `count` times."""
    for _ in range(count):
        middle = text.replace("%", middle)
    return middle


# What a parser may read twice a level, and other small or made-up files.
OTHERS = {
    "literals in types": f"{HEAD}a = ({nested('int[(%){1}]', 40)}){{1}}; return a; }}",
    "literals in literals' types": f"{HEAD}a = (int){{({nested('int[(%){1}]', 40)}){{1}}}}; return a; }}",
    "sizeofs in types": f"{HEAD}a = sizeof({nested('int[sizeof(%){1}]', 40)}); return a; }}",
    "casts in types": f"{HEAD}a = ({nested('int[(%)1]', 40)})1; return a; }}",
    "types in typeofs": f"{HEAD}a = ({nested('typeof((%){1})', 40)}){{1}}; return a; }}",
    "types in _Alignas": f"{HEAD}a = ({nested('_Alignas(sizeof((%){1})) int', 40)}){{1}}; return a; }}",
    "types in _Atomic": f"{HEAD}a = ({nested('_Atomic(%)', 40)}){{1}}; return a; }}",
    "types in _Generic": f"{HEAD}a = {nested('_Generic(%, int: %, long: 1)', 6, 'a')}; return a; }}",
    "types in parameters": f"{HEAD}a = ({nested('int (*)(%)', 60)}){{1}}; return a; }}",
    "types in structs": f"{HEAD}a = ({nested('struct { % c; }', 60)}){{1}}; return a; }}",
    "functions of long functions": f"int f(int ({nested('*g(int (%))', 60, 'z ' + 'x ' * 200_000)})) {{ return 1; }}",
    "names in many parentheses": f"int {'(' * 300}x{' x' * 200_000}",
    "casts that nest": f"{HEAD}return {'(int(' * 60}a{'))' * 60}; }}",
    "casts": f"{HEAD}return {'(uint8_t)' * 60}a; }}",
    "casts in parentheses": f"{HEAD}return {'((int)' * 60}a{')' * 60}; }}",
    "types in parentheses": f"{HEAD}int {'(' * 60}c{')' * 60} = 1; return c; }}",
    "pointers in parentheses": f"{HEAD}a = (int {'(*' * 60}; return a; }}",
    "declarators that nest": f"int {'(*' * 200}f{')' * 200}(int8_t a, int8_t b) {{ return 1; }}",
    "ternaries": f"{HEAD}return {'a?b:' * 5000}a; }}",
    "sums": f"{HEAD}return {'a+' * 5000}a; }}",
    "a=a": f"{HEAD}{'a=a;' * 100_000}{TAIL}",
    "declarations": f"{HEAD}int {', '.join(f'v{i}' for i in range(100_000))}; return a; }}",
    "declarations with values": f"{HEAD}int {', '.join(f'v{i}=a' for i in range(80_000))}; return a; }}",
    "headers that differ": "".join(f"// K{i} = {i}\n" for i in range(60_000)) + HEAD + TAIL,
    "exponents in a header": f"// MAE = 1e{'9' * 20}\n// WCE = 1e-999999999\n// EP% = 1e999999999\n{HEAD}{TAIL}",
    "64 MiB": " " * 64 * MIB,
}


def survive(path, seconds=5):
    """Load a file that may hold anything, in time: its multiplier, or None if that ended in a proper FormatError."""
    message = ""
    with within(seconds), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            m = load_multiplier(path, format="c_model")
        except FormatError as error:
            m, message = None, str(error)
    assert isinstance(m, Multiplier) or message.startswith(f"{path}:")
    assert len(message) < 1000
    return m


@pytest.mark.parametrize("size", [2**16, MIB - 100, 2 * MIB])
@pytest.mark.parametrize("what", REPEATED)
def test_what_is_repeated_for_long_ends_in_time(write, what, size):
    survive(write(repeated(what, size)))


@pytest.mark.parametrize("what", OTHERS)
def test_what_tempts_a_parser_ends_in_time(write, what):
    survive(write(OTHERS[what]))


@pytest.mark.parametrize("unit", ["a", "1", "a ", " ", "(", "a(", "a b(", "a b(c)", "int f(int a, ", "/*", "\t\n"])
@pytest.mark.parametrize("file", ["circuit.c", "table.txt", "none"])
def test_what_a_file_holds_is_recognised_in_time(write, unit, file):
    path = write(unit * (MIB // len(unit)), file)
    with within(5), pytest.raises(FormatError):
        load_multiplier(path)


def test_some_of_them_are_right(write):
    a = np.indices((256, 256))[0]
    for source, expected in {
        OTHERS["casts"]: a,
        OTHERS["casts in parentheses"]: a,
        f"{HEAD}return {'a+' * 100}a; }}": a * 101,
        f"{HEAD}{'a=a;' * 5000}{TAIL}": a,
        f"{HEAD}return {'~' * 60}a; }}": a,
        f"{HEAD}return {'(' * 60}a{')' * 60}; }}": a,
        f"{HEAD}return {'a?a:' * 60}a; }}": a,
    }.items():
        np.testing.assert_array_equal(survive(write(source)).table.numpy(), expected)


@pytest.mark.slow
def test_a_recursion_limit_that_was_raised_changes_nothing(write):
    """Frames of Python beyond what the C stack holds would end the process."""
    code = (
        "import sys; sys.setrecursionlimit(10**5); from approxconv.formats import FormatError, load_multiplier\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_multiplier(path, format='c_model')\n"
        "    except FormatError: pass\n"
    )
    deep = ("balanced parentheses", "tildes", "ternaries", "sums to the right", "a=a=a", "sums", "casts", "braces")
    paths = [str(write(repeated(what, 2**17), f"{i}.c")) for i, what in enumerate(deep)]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]


def test_memory_is_bounded_however_many_variables_live(write):
    count = 1100  # of half a MiB each
    lines = "".join(f"uint64_t v{i} = ((uint64_t)a << {i % 40}) * (b + {i}ull) + {i};\n" for i in range(count))
    total = "uint64_t s = 0;\n" + "".join(f"s = s + v{i};\n" for i in range(count))
    path = write(f"{HEAD}{lines}{total}return s >> 40; }}")
    tracemalloc.start()
    try:
        with within(30):
            m = load_multiplier(path)
    except FormatError:
        pass
    else:
        wanted = sum((a := 201 << i % 40) * (77 + i) + i for i in range(count)) % 2**64 >> 40
        assert m.table[201, 77] == wanted, a
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**30


SMALL = text_of("mul4u_DEMO").encode()
FUZZED = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FUZZED
@given(st.binary(max_size=400))
def test_random_bytes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "random.c"
    path.write_bytes(data)
    survive(path)


@FUZZED
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SMALL)),
            st.integers(0, 40),
            st.binary(max_size=5) | st.sampled_from([b"(", b"/*", b"\0"]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([len(SMALL), 2000, 1000, 500]),
)
def test_mutations_of_a_file(tmp_path_factory, changes, length):
    data = SMALL[:length]
    for position, removed, inserted in changes:
        data = data[:position] + inserted + data[position + removed :]
    path = tmp_path_factory.getbasetemp() / "mutated.c"
    path.write_bytes(data)
    survive(path)


VOCABULARY = [
    "\n",
    *re.findall(
        r"\S+",
        r"""
    ( ( ( ) ) { } [ ] ; ; , ? : ~ ! + - * / % & | ^ << >> < > <= >= == != && || = |= &= ^= <<= >>= += ++ -- . -> ...
    # ## " ' \ a b c d f 0 1 7 8 1u 0xff 0777 1.5 1e9 "s" 'c' int long unsigned signed short char void float double bool
    _Bool uint8_t int8_t uint64_t int64_t const static struct union enum typedef sizeof return if else for while do
    switch case default goto break continue // /* */ asm _Generic _Alignas _Atomic __int128 _Static_assert #include
    """,
    ),
]


@FUZZED
@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 3), st.lists(st.sampled_from(VOCABULARY), max_size=4)), max_size=6
    )
)
def test_mutations_of_tokens(tmp_path_factory, changes):
    tokens = re.findall(
        r"\S+",
        "int f ( uint8_t a , int8_t b ) { int c = a + 1 , d ; d = ( uint8_t ) ( c << 2 ) ; c ^= ~ d & ( b ? 3 : a ) ; "
        "return ( c | 0x10u ) - d ; }",
    )
    for position, removed, inserted in changes:
        tokens[position : position + removed] = inserted
    path = tmp_path_factory.getbasetemp() / "tokens.c"
    path.write_text(" ".join(tokens))
    survive(path)


@pytest.mark.parametrize("demo", FORMATS)
def test_truncated_files(write, demo):
    data = text_of(demo).encode()
    for length in range(0, len(data.rstrip()) - 1, 127):
        path = write(data[:length])
        with pytest.raises(FormatError, match=re.escape(str(path))):
            load_multiplier(path, format="c_model")


def test_nothing_in_a_file_is_executed_or_read(write, tmp_path):
    secret = tmp_path / "secret.h"
    secret.write_text(f"int leaked = {'7' * 30};")
    for line in (
        f'#include "{secret}"',
        '#include "/dev/zero"',
        "#include </dev/stdin>",
        '#include "/nonexistent"',
    ):
        with within(5), contextlib.suppress(FormatError):
            m = load_multiplier(write(f"{line}\nint mul4u_X(int a, int b) {{ return a * b; }}"))
            assert m == Multiplier.exact(4, False, False)
    with pytest.raises(FormatError, match="leaked"):
        load_multiplier(write(f'#include "{secret}"\nint mul4u_X(int a, int b) {{ return leaked; }}'))


def test_paths_that_hold_no_source(tmp_path):
    (tmp_path / "folder.c").mkdir()
    for name in ("folder.c", "missing.c"):
        for loader in (load_multiplier, load_function):
            with pytest.raises((FormatError, FileNotFoundError, IsADirectoryError), match=name):
                loader(tmp_path / name)


# ---- header figures --------------------------------------------------------------------------------------------------

# Clears the lowest bit: wrong by one for a quarter of the pairs.
NO_LSB = "#include <stdint.h>\nuint16_t mul8u_LSB(uint8_t a, uint8_t b)\n{\n  return a * b & ~1;\n}\n"
MANY = (
    "uint64_t mul8u_BIG(uint64_t a, uint64_t b)\n{\n  return a * b + 7282910;\n}\n"  # MAE = WCE = 7282910, EP = 100 %
)


@pytest.fixture
def warned(load):
    """Load a source behind header lines; the warnings as one text each."""

    def check(*lines, source=NO_LSB, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            m = load("".join(f"// {line}\n" for line in lines) + source, **options)
        assert all(issubclass(each.category, UserWarning) for each in caught)
        for line in lines:
            key, _, value = line.partition("=")
            assert m.info[key.strip()] == value.strip()
        return [str(each.message) for each in caught]

    return check


@pytest.mark.parametrize(
    "line",
    [
        "MAE = 0.25",
        "MAE = 0.250",
        "MAE = 0.26",  # by one unit of the last digit
        "MAE = 0.24",
        "MAE = 0.2",
        "MAE = 0.3",
        "MAE = 0",
        "MAE = 1",
        "MAE = 1.",
        "MAE=0.25",
        "MAE   =   0.25   ",
        "MAE = .25",
        "MAE = 25e-2",
        "MAE = 2.5E-1",
        "MAE = 2.4e-1",
        "MAE = 0.0e2",
        "MAE = +0.25",
        "WCE = 1",
        "WCE = 2",
        "WCE = 0",
        "WCE = 1.0",
        "WCE = 1.1",
        "WCE = 0.1e1",
        "EP% = 25.00 %",
        "EP% = 25.01 %",
        "EP% = 24.99 %",
        "EP% = 25 %",
        "EP% = 26%",
        "EP% = 25",
        "EP = 25.00 %",
        "EP = 25 %",
    ],
)
def test_figures_within_a_unit_of_the_last_digit(warned, line):
    assert warned(line) == []


@pytest.mark.parametrize(
    ("line", "actual"),
    [
        ("MAE = 0.27", "0.25"),
        ("MAE = 0.23", "0.25"),
        ("MAE = 0.252", "0.25"),
        ("MAE = 0.4", "0.25"),
        ("MAE = 2", "0.25"),
        ("MAE = 27e-2", "0.25"),
        ("MAE = 2.7e-1", "0.25"),
        ("MAE = -0.25", "0.25"),
        ("MAE = 72829.102e2", "0.25"),
        ("WCE = 3", "1"),
        ("WCE = 1.2", "1"),
        ("WCE = 0.8", "1"),
        ("WCE = -1", "1"),
        ("EP% = 25.02 %", "25"),
        ("EP% = 24.98 %", "25"),
        ("EP% = 27 %", "25"),
        ("EP% = 23", "25"),
        ("EP = 25.02 %", "25"),
    ],
)
def test_figures_beyond_a_unit_of_the_last_digit(warned, line, actual):
    (message,) = warned(line)
    key, _, printed = line.partition(" = ")
    assert re.search(rf"\b{key.rstrip('%')}\b", message)
    assert printed.rstrip(" %") in message
    assert re.search(rf"(?<![\d.]){actual}(?!\d)", message)
    assert "circuit.c" in message or "mul8u_LSB" in message


@pytest.mark.parametrize(
    "printed", ["7282910", "72829.100e2", "72829.101e2", "72829.1e2", "7.3e6", "728291e1", "7282911"]
)
def test_scientific_notation_counts_units_of_its_last_digit(warned, printed):
    assert warned(f"MAE = {printed}", f"WCE = {printed}", "EP% = 100.00 %", source=MANY) == []


@pytest.mark.parametrize("printed", ["72829.102e2", "7.5e6", "7282912", "728289e1", "7282908.0"])
def test_scientific_notation_beyond(warned, printed):
    (message,) = warned(f"MAE = {printed}", source=MANY)
    assert printed in message
    assert "7282910" in message  # 7.28291e+06 would not tell what differs


def test_every_wrong_figure_is_told(warned):
    text = " ".join(warned("MAE = 12.34", "WCE = 77", "EP% = 99.99 %"))
    for part in ("MAE", "12.34", "0.25", "WCE", "77", "EP", "99.99", "25"):
        assert part in text


def test_figures_do_not_depend_on_swap_and_count_signed_products(warned):
    signed = "uint16_t mul8s_X(uint8_t a, uint8_t b) { return (int8_t)a * (int8_t)b & ~1; }"
    for swap in (False, True):
        assert warned("MAE = 0.25", "WCE = 1", "EP% = 25.00 %", source=signed, swap=swap) == []
    rectangular = "uint64_t mul8x4u_X(uint64_t a, uint64_t b) { return (a * b) & ~(uint64_t)1; }"
    assert warned("MAE = 0.25", "WCE = 1", "EP% = 25.00 %", source=rectangular, swap=True) == []


def test_no_header_no_warning(warned):
    assert warned() == []
    assert warned("PDK45_PWR = 0.425 mW", "Note = none", "MSE = 12345") == []


@pytest.mark.parametrize(
    "value",
    ["", "nan", "NaN", "inf", "-inf", "1e999999999", "1e-999999999", "twelve", "0x10", "1,5", "..", "1.2.3", "1e", "∞"],
)
@pytest.mark.parametrize("key", ["MAE", "WCE", "EP%", "PDK45_PWR"])
def test_nonsense_in_a_header_is_kept_or_told_but_never_an_error(load, key, value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        m = load(f"// {key} = {value}\n{NO_LSB}")
    np.testing.assert_array_equal(m.table.numpy(), np.multiply.outer(np.arange(256), np.arange(256)) & ~1)
    assert m.power is None


def test_a_thousand_header_lines(load):
    lines = "".join(f"// KEY{i} = {i} mW\n" for i in range(1000))
    m = load(f"{lines}// WCE = 1\n{NO_LSB}")
    np.testing.assert_array_equal(m.table[255, 255], 65024)
    assert all(m.info[key] == f"{key[3:]} mW" for key in m.info if key.startswith("KEY"))
    assert m.info.get("KEY0") == "0 mW"


def test_header_lines_in_their_other_forms(load):
    m = load(f"//MAE=0.25\r\n//\tPDK45_PWR\t=\t0.425 mW\t\r\n//   FPGA_POWER = 0.28\n// not a figure\n// = 3\n{NO_LSB}")
    assert m.info["MAE"] == "0.25"
    assert m.info["PDK45_PWR"] == "0.425 mW"
    assert m.info["FPGA_POWER"] == "0.28"
    assert m.power == 0.425


def test_info_survives_a_round_trip(load, tmp_path):
    m = load(f"// PDK45_PWR = 301 uW\n// Ω = ∞ „“\n{NO_LSB}")
    m.save(tmp_path / "m.npz")
    again = load_multiplier(tmp_path / "m.npz")
    assert again == m
    assert again.info == m.info
    assert again.power == pytest.approx(0.301)


# ---- functions -------------------------------------------------------------------------------------------------------

MUL12 = """
// FPGA_POWER = 0.28
#include <stdint.h>
uint32_t mul12u_33H(uint16_t A, uint16_t B)
{
 return (A & 0xFC0) * (B & 0xFC0);
}
"""
MUL16 = "uint32_t mul16u_X(uint16_t A, uint16_t B)\n{\n return ((A >> 3) * (B >> 3)) << (2*3);\n}\n"


def test_a_12_bit_function(function):
    f = function(MUL12)
    assert isinstance(f, CFunction)
    assert (f.name, f.bits, f.a_signed, f.w_signed) == ("mul12u_33H", (12, 12), False, False)
    assert f.info == {"FPGA_POWER": "0.28"}
    a = np.arange(0, 4096, 7)
    result = f(a[:, None], a)
    assert result.dtype == np.int64
    np.testing.assert_array_equal(result, np.multiply.outer(a & 0xFC0, a & 0xFC0))


def test_a_16_bit_function(function):
    f = function(MUL16)
    assert f.bits == (16, 16)
    a = np.array([0, 1, 8, 4095, 65535, 43981])
    expected = np.multiply.outer(a >> 3, a >> 3) << 6
    # As int: (8191 * 8191) << 6 wraps, and is uint32_t in the end.
    np.testing.assert_array_equal(f(a[:, None], a), expected & 0xFFFFFFFF)


def test_a_16_bit_signed_function(function):
    f = function("uint32_t mul16s_X(uint16_t A, uint16_t B) { return (int16_t)A * (int16_t)B; }")
    assert (f.bits, f.a_signed, f.w_signed) == ((16, 16), True, True)
    a = np.array([-32768, -1, 0, 1, 32767])
    np.testing.assert_array_equal(f(a[:, None], a), np.multiply.outer(a, a))


@pytest.mark.parametrize("bits", [(12, 12), (9, 16), (16, 2), (11, 8)])
@pytest.mark.parametrize("signed", [False, True])
def test_gate_level_functions(function, bits, signed):
    circuit = Circuit(*bits, signed)
    f = function(circuit.source("rows", circuit_name(circuit)))
    assert f.bits == bits
    generator = np.random.default_rng(5)
    a, w = (generator.choice(operand_values(n, signed), 3000) for n in bits)
    np.testing.assert_array_equal(f(a, w), a * w)


def test_a_function_swapped(function):
    f = function("int mul12x6s_X(int16_t x, int8_t y) { return x * 100 + y; }", swap=True)
    assert (f.bits, f.a_signed, f.w_signed) == ((6, 12), True, True)
    assert f(-32, -2048) == -204800 - 32 + (1 << 18)  # of 18 bits as any signed circuit's
    f = function("int f(int x, int y) { return x * 100 + y; }", swap=True, bits=(6, 12), a_signed=False, w_signed=True)
    assert (f.bits, f.a_signed, f.w_signed) == ((6, 12), False, True)
    assert f(63, -2048) % 2**18 == (-204800 + 63) % 2**18


@pytest.mark.parametrize(
    ("a", "w", "shape"),
    [
        ((), (), ()),
        ((0,), (), (0,)),
        ((0,), (1,), (0,)),
        ((3, 1), (1, 4), (3, 4)),
        ((2, 3), (3,), (2, 3)),
        ((1,), (), (1,)),
    ],
)
def test_operands_broadcast(function, a, w, shape):
    generator = np.random.default_rng(3)
    for source in (MUL12, "int mul12u_C(int a, int b) { return 7; }", "int mul12u_A(int a, int b) { return a; }"):
        f = function(source)
        x, y = (generator.integers(0, 4096, s) for s in (a, w))
        result = f(x, y)
        assert isinstance(result, np.ndarray | np.int64)
        assert result.shape == shape
        assert result.dtype == np.int64
        expected = (x & 0xFC0) * (y & 0xFC0) if source == MUL12 else 7 if "_C" in source else np.broadcast_to(x, shape)
        np.testing.assert_array_equal(result, np.broadcast_to(expected, shape))
        if shape:
            result[...] = 0  # its own, writable memory


def test_operands_that_are_not_contiguous_or_of_other_dtypes(function):
    f = function(MUL12)
    base = np.random.default_rng(4).integers(0, 4096, (8, 10))
    expected = (base & 0xFC0) * (base & 0xFC0)
    before = base.copy()
    for view in (np.s_[::2, ::3], np.s_[::-1, ::-1], np.s_[:, 3]):
        np.testing.assert_array_equal(f(base[view], base[view]), expected[view])
    np.testing.assert_array_equal(f(base.T, np.asfortranarray(base.T)), expected.T)
    for dtype in ("u2", ">u2", "i4", ">i8", "u8"):
        np.testing.assert_array_equal(f(base.astype(dtype), base.astype(dtype)), expected)
    np.testing.assert_array_equal(f(base.tolist(), base), expected)
    np.testing.assert_array_equal(f(base.astype("u8")[0], 4095), (base[0] & 0xFC0) * 0xFC0)
    np.testing.assert_array_equal(base, before)
    assert f(4095, 4095) == 0xFC0**2


def test_operands_are_not_written_to(function):
    f = function(body("a = 0; b += 1; return a + b;"))
    a, b = np.arange(3), np.arange(3)
    a.setflags(write=False)
    np.testing.assert_array_equal(f(a, b), [1, 2, 3])
    assert b.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("a", "w", "match"),
    [
        (4096, 0, "4096"),
        (-1, 0, "-1"),
        (0, 4096, "4096"),
        (0, [1, 2, -7], "-7"),
        ([[0, 1], [70000, 3]], 0, "70000"),
        (2**62, 0, str(2**62)),
        (2**63, 0, str(2**63)),
        (2**64, 0, str(2**64)),
        (np.array([2**64 - 1], np.uint64), 0, str(2**64 - 1)),
        (1.5, 0, "integer|float"),
        ("1", 0, "integer|<U1|str"),
        (None, 0, "integer|object|None"),
        ([1, 2], [1, 2, 3], "broadcast|shape"),
        ([[1], [1, 2]], 0, "shape|rectangular|integers"),
    ],
)
def test_operands_out_of_range(function, a, w, match):
    f = function(MUL12)
    with pytest.raises(ValueError, match=match) as caught:
        f(a, w)
    assert len(str(caught.value)) < 1000


def test_operands_out_of_a_signed_range(function):
    f = function("int mul4s_X(int8_t a, int8_t b) { return a * b; }")
    assert f(-8, 7) == -56
    for a, w, shown in ((8, 0, "8"), (-9, 0, "-9"), (0, 8, "8"), (0, 15, "15")):
        with pytest.raises(ValueError, match=f"{shown}\\b"):
            f(a, w)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("demo", FORMATS)
def test_a_tabulated_function_is_the_multiplier(demo, swap):
    path = MODELS / f"{demo}.c"
    f = load_function(path, swap=swap)
    m = load_multiplier(path, swap=swap)
    tabulated = Multiplier.from_function(f, bits=f.bits, a_signed=f.a_signed, w_signed=f.w_signed)
    assert tabulated == m
    assert f.info == m.info
    assert f.name == demo


def test_a_multiplier_of_more_than_8_bits_is_a_function(refused):
    for source in (MUL12, MUL16):
        refused(source, "load_function", loaders=[load_multiplier], file="m.c")
    for bits in (17, 1, (12, 17), 0):
        with pytest.raises(ValueError, match="bits"):
            load_function(MODELS / "mul4u_DEMO.c", bits=bits)


def test_a_name_beyond_16_bits(refused):
    refused("uint64_t mul32u_X(uint32_t a, uint32_t b) { return (uint64_t)a * b; }", "16|bits")
    refused("uint64_t mul1u_X(uint32_t a, uint32_t b) { return a * b; }", "2|bits")


def test_a_function_does_not_care_how_it_is_called(function):
    """Value by value, by table, by large arrays: the same."""
    circuit = Circuit(8, 8, True).perturbed(random.Random(8), 5)
    f = function(circuit.source("uint8", "mul8s_X"))
    table, values = circuit.table(), operand_values(8, True)
    chance = random.Random(2)
    for a, w in [(chance.randrange(-128, 128), chance.randrange(-128, 128)) for _ in range(20)]:
        assert f(a, w) == table[a % 256, w % 256]
    np.testing.assert_array_equal(f(values[:, None], values), table)
    a, w = (np.random.default_rng(i).integers(-128, 128, 300_000) for i in (0, 1))
    np.testing.assert_array_equal(f(a, w), table[a % 256, w % 256])
    np.testing.assert_array_equal(f(values[:, None], 5), table[:, 5:6])
    np.testing.assert_array_equal(
        f(np.zeros((3, 1, 2), int), values[:, None]), np.broadcast_to(table[0][:, None], (3, 256, 2))
    )


def test_a_text_without_a_file():
    m = Multiplier.from_c("uint16_t f(uint8_t a, int8_t w) { return (a * w) & ~1; }")
    assert (m.name, m.a_format, m.w_format) == ("f", "uint8", "int8")
    exact = np.multiply.outer(*m.operand_values()) & ~1
    np.testing.assert_array_equal(m.table.numpy(), exact)
    device = "__device__ __forceinline__ uint32_t mul4s_g(uint16_t A, uint16_t B) { return A * B; }"
    m = Multiplier.from_c(device, name="given", swap=True)
    assert (m.name, m.bits, m.a_signed) == ("given", (4, 4), True)
    assert m == Multiplier.exact(4, True, True)
    with pytest.raises(FormatError, match=r"^<C>:2: must be straight-line integer C, got a loop \(for\)"):
        Multiplier.from_c("int f(char a, char b) {\n for (;;) ; return 0; }")
    with pytest.raises(ValueError, match="text must be the source as a str, got bytes"):
        Multiplier.from_c(b"")
