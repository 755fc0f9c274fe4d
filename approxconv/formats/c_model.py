"""C models of circuits as EvoApproxLib publishes them: straight-line integer C, parsed and evaluated, not compiled."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..figures import parse_quantity
from ..multiplier import (
    MAX_BITS,
    MAX_FUNCTION_BITS,
    MIN_BITS,
    Multiplier,
    check_bits,
    check_flag,
    check_operand,
    operand_range,
    operand_values,
)
from .c_arithmetic import (
    BINARY_OPERATORS,
    BOOL,
    INT,
    LONG,
    UNARY_OPERATORS,
    CType,
    UndefinedError,
    Value,
    binary,
    constant,
    convert,
    lanes,
    ternary,
    unary,
)
from .errors import FormatError
from .format import Format, line_at, named_formats, read_bytes, require_file

if TYPE_CHECKING:
    from pycparser import c_ast

_MAX_SOURCE_BYTES = 2**18  # several times the largest 16-bit circuit, and seconds of parsing
_MAX_DEPTH = 64
_MAX_OPERATIONS = 50_000
_MAX_HELD_BYTES = 2**29
_LANES = 2**16  # evaluated at a time when called as a function, as many as in a table of 8 bits
_CHECKED_FIGURES = ("MAE", "WCE", "EP%", "EP")

_CHAR, _LONG_LONG = CType(8, True, 1), CType(64, True, 5)
_SIGNED_TYPES = {"char": _CHAR, "short": CType(16, True, 2), "": INT, "long": LONG, "long long": _LONG_LONG}


def _integer_types() -> dict[tuple[str, ...], CType]:
    """The integer types by their sorted specifiers, which may stand in any order, ``int`` with all but ``char``."""
    types = {("_Bool",): BOOL}
    for name, signed in _SIGNED_TYPES.items():
        for sign in ("", "signed", "unsigned"):
            for base in ("",) if name == "char" else ("", "int"):
                specifiers = tuple(sorted(f"{sign} {name} {base}".split()))
                types[specifiers] = signed._replace(signed=sign != "unsigned")
    del types[()]
    return types


_INTEGER_TYPES = _integer_types()
_TYPEDEFS = {
    "bool": "_Bool",
    "size_t": "unsigned long",
    **{
        f"{prefix}int{kind}{bits}_t": f"{sign}{base}"
        for bits, base in ((8, "char"), (16, "short"), (32, "int"), (64, "long"))
        for prefix, sign in (("", "signed "), ("u", "unsigned "))
        for kind in ("", "_least")
    },
}
_PRELUDE = "".join(f"typedef {base} {name};" for name, base in _TYPEDEFS.items())
_COMMENT = re.compile(r"//[^\n]*|/\*")
_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*(\w*)[^\n]*", re.MULTILINE)
_CUDA_QUALIFIER = re.compile(r"\b__(?:device|host|forceinline|noinline)__\b")
_HEADER_LINE = re.compile(r"//[ \t]*([A-Za-z][\w.%]{0,40})[ \t]*=[ \t]*(\S[^\n]{0,200})")
_FOREIGN = re.compile(r"[^\w\s(){}\[\];,=&|^~!<>?:+\-*/%.]|\w{81,}", re.ASCII)
_KEYWORDS = {
    "for": "a loop (for)",
    "while": "a loop (while)",
    "do": "a loop (do)",
    "if": "an if",
    "else": "an else",
    "switch": "a switch",
    "case": "a case label",
    "default": "a default label",
    "goto": "a goto",
    "break": "a break",
    "continue": "a continue",
    "struct": "a struct",
    "union": "a union",
    "enum": "an enum",
    "sizeof": "sizeof",
    "asm": "assembly (asm)",
    "__asm__": "assembly (__asm__)",
    "__attribute__": "an attribute",
    "_Alignas": "_Alignas",
    "_Alignof": "_Alignof",
    "_Atomic": "_Atomic",
    "_Generic": "_Generic",
    "_Static_assert": "_Static_assert",
    "static_assert": "static_assert",
    "typeof": "typeof",
    "__typeof__": "typeof",
    "[": "an array",
}
_STRUCTURE = re.compile(rf"\b(?:{'|'.join(_KEYWORDS)[:-2]})\b|[\[(){{}};?]")
_UNARY_RUN = re.compile(rf"(?:[~!&*+\-]\s*){{{_MAX_DEPTH}}}")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_LITERAL = re.compile(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|0[0-7]*|[1-9][0-9]*)([uUlL]{0,3})")
_SUFFIXES = {"": (False, 3), "u": (True, 3), "l": (False, 4), "ul": (True, 4), "ll": (False, 5), "ull": (True, 5)}
_CONSTRUCTS = {
    "Label": "a label",
    "FuncCall": "a call",
    "PtrDecl": "a pointer",
    "StructRef": "a member of a struct",
    "InitList": "a list of initial values",
    "ExprList": "a comma operator",
    "Assignment": "an assignment inside an expression",
    "FuncDecl": "a function inside a function",
}


class CFunction:
    """A C model of a multiplier as a function of operand values, 2 to 16 bits an operand; see `load_function`.

    Attributes
    ----------
    name : str
        The C function's.
    bits : tuple of int
        ``(a_bits, w_bits)``.
    a_signed, w_signed : bool
        Operand signedness.
    info : dict of str to str
        The header comments ``// KEY = VALUE``, values as printed.
    """

    def __init__(
        self,
        program: _Program,
        *,
        bits: tuple[int, int],
        signed: tuple[bool, bool],
        swap: bool,
        wires: int | None,
        info: dict[str, str],
    ) -> None:
        self.name = program.name
        self.bits = bits
        self.a_signed, self.w_signed = signed
        self.info = info
        self._program, self._swap, self._wires = program, swap, wires

    def __repr__(self) -> str:
        a, w = (f"{'' if signed else 'u'}int{bits}" for bits, signed in self._formats)
        return f"CFunction({self.name!r}, a={a}, w={w})"

    def __call__(self, a: Any, w: Any) -> np.ndarray:
        """Products of operand values.

        Parameters
        ----------
        a, w : array_like
            Integers that the operands' formats have, of shapes that broadcast.

        Returns
        -------
        numpy.ndarray
            int64, of the broadcast shape.

        Raises
        ------
        ValueError
            An operand that holds no integers or values out of its range, or shapes that do not broadcast.
        """
        checked = [
            check_operand(name, operand, *operand_range(*format_))
            for name, operand, format_ in zip(("a", "w"), (a, w), self._formats, strict=True)
        ]
        pairs = np.broadcast_arrays(*checked)
        products = np.empty(pairs[0].shape, np.int64)
        flat = products.reshape(-1)
        flat_a, flat_w = (operand.reshape(-1) for operand in pairs)
        for start in range(0, flat.size, _LANES):
            part = slice(start, start + _LANES)
            flat[part] = self._evaluate(flat_a[part], flat_w[part])
        return products

    def table(self) -> np.ndarray:
        """Products of every pair of operand codes, int64, ``(2**a_bits, 2**w_bits)``."""
        a, w = (operand_values(*format_) for format_ in self._formats)
        return np.broadcast_to(self._evaluate(a[:, None], w[None, :]), (a.size, w.size))

    @property
    def content_hash(self) -> str:
        """SHA-256 of the source without its comments and of how it is read."""
        said = (self._program.digest, self.name, self._formats, self._swap, self._wires)
        return hashlib.sha256(repr(said).encode()).hexdigest()

    @property
    def _formats(self) -> tuple[tuple[int, bool], tuple[int, bool]]:
        return (self.bits[0], self.a_signed), (self.bits[1], self.w_signed)

    def _evaluate(self, a: np.ndarray, w: np.ndarray) -> np.ndarray:
        operands = [
            lanes(operand, *operand_range(*format_)) for operand, format_ in zip((a, w), self._formats, strict=True)
        ]
        result = self._program.run(operands[::-1] if self._swap else operands).exact()
        products = result.held_as(np.dtype(np.int64))
        if self._wires is not None:
            sign = 1 << self._wires - 1
            return ((products & 2 * sign - 1) ^ sign) - sign
        if result.high >= 2**63 and bool((products < 0).any()):
            raise FormatError(self._program.path, f"{self.name} must return products below 2**63")
        return products


def load_function(
    path: str | Path,
    *,
    bits: int | tuple[int, int] | None = None,
    a_signed: bool | None = None,
    w_signed: bool | None = None,
    swap: bool = False,
) -> CFunction:
    """Read a C model, such as EvoApproxLib's 12- and 16-bit ones, as a function of operand values.

    The file holds one function (or one of the file's name) of two integer parameters: declarations, assignments and a
    final return, of integer literals, casts, ``~ - + ! * & | ^ << >> < <= > >= == != && || ?:`` and parentheses. It is
    evaluated under C's integer semantics as gcc has them on 64-bit Linux (signed overflow wraps); nothing is compiled
    or executed.

    Parameters
    ----------
    path : str or Path
        The file.
    bits : int or pair of int, optional
        Operand widths ``(a_bits, w_bits)``, 2 to 16, where neither a name such as ``mul8x4u_…`` nor the parameters'
        types say them.
    a_signed, w_signed : bool, optional
        Operand signedness, likewise. A name such as ``mul8s_…`` goes before the types: some such circuits are declared
        ``uint16_t f(uint8_t, uint8_t)``, and their operands and results are two's complement all the same.
    swap : bool
        The first C parameter is the weight, not the activation.

    Returns
    -------
    CFunction

    Raises
    ------
    FormatError
        The file is no such C; the message names line and construct.
    FileNotFoundError
        There is no such regular file.
    ValueError
        Another argument of a wrong type or out of its range.
    """
    path = Path(path)
    require_file(path)
    function = _function(path, _read(path), bits=bits, a_signed=a_signed, w_signed=w_signed, swap=swap)
    function(*(np.zeros(1, int) for _ in function.bits))  # says now what in it cannot be evaluated
    return function


def _read(path: Path) -> str:
    return read_bytes(path, _MAX_SOURCE_BYTES).decode("utf-8", errors="replace")  # comments may be of any encoding


def _function(
    path: Path,
    text: str,
    *,
    bits: int | tuple[int, int] | None = None,
    a_signed: bool | None = None,
    w_signed: bool | None = None,
    swap: bool = False,
) -> CFunction:
    widths = None if bits is None else check_bits(bits, MAX_FUNCTION_BITS)
    for flag, value in (("a_signed", a_signed), ("w_signed", w_signed), ("swap", swap)):
        if value is not None:
            check_flag(flag, value)
    source, comments = _visible(path, text)
    program = _Program(path, source)
    named = named_formats(program.name) or named_formats(path.stem)
    formats = named or tuple((type_.bits, type_.signed) for _, type_ in program.parameters)
    parameters = program.parameters
    if swap:
        formats, parameters = formats[::-1], parameters[::-1]
    if widths is None:
        widths = formats[0][0], formats[1][0]
        if named is None and max(widths) > MAX_FUNCTION_BITS:
            raise FormatError(
                path,
                f"the widths of {program.name}'s operands must be said by its name, as in mul8u_…, or by bits=; its "
                f"parameters have {program.parameters[0][1].bits} and {program.parameters[1][1].bits} bits",
            )
        if not all(MIN_BITS <= width <= MAX_FUNCTION_BITS for width in widths):
            raise FormatError(
                path, f"operands must have {MIN_BITS} to {MAX_FUNCTION_BITS} bits, got {widths[0]} and {widths[1]}"
            )
    for (name, type_), width in zip(parameters, widths, strict=True):
        if type_.bits < width:
            raise FormatError(path, f"parameter {name} must hold {width} bits, its type has {type_.bits}")
    said = named is not None or a_signed or w_signed
    signed = (
        formats[0][1] if a_signed is None else a_signed,
        formats[1][1] if w_signed is None else w_signed,
    )
    # A signed circuit has as many output wires as its operands have bits, in whatever C type they come.
    cut = any(signed) and (said or not program.returns.signed)
    return CFunction(
        program,
        bits=widths,
        signed=signed,
        swap=swap,
        wires=min(sum(widths), program.returns.bits) if cut else None,
        info={match[1]: match[2].strip() for line, match in comments if line < program.line},
    )


def load_c_model(
    path: Path,
    *,
    bits: int | tuple[int, int] | None = None,
    a_signed: bool | None = None,
    w_signed: bool | None = None,
    swap: bool = False,
) -> Multiplier:
    """Tabulate a C model and hold its table against the figures in its header."""
    return tabulate(path, _read(path), bits=bits, a_signed=a_signed, w_signed=w_signed, swap=swap)


def tabulate(path: Path, text: str, **options: Any) -> Multiplier:
    """Like `load_c_model`, of a text; `path` is for messages and, where the function's does not say it, its formats."""
    function = _function(path, text, **options)
    if max(function.bits) > MAX_BITS:
        raise FormatError(
            path,
            f"a table holds {MIN_BITS} to {MAX_BITS} bits an operand, {function.name} has "
            f"{function.bits[0]} and {function.bits[1]}; approxconv.load_function takes it as a function",
        )
    table = function.table()
    try:
        multiplier = Multiplier(
            table, a_signed=function.a_signed, w_signed=function.w_signed, name=function.name, info=function.info
        )
    except ValueError as error:
        raise FormatError(path, str(error)) from None
    _compare_with_header(multiplier, path)
    return multiplier


def _compare_with_header(multiplier: Multiplier, path: Path) -> None:
    printed = {key: parse_quantity(multiplier.info.get(key)) for key in _CHECKED_FIGURES}
    printed = {key: quantity for key, quantity in printed.items() if quantity and (key != "EP" or quantity.unit == "%")}
    if not printed:
        return
    metrics = multiplier.metrics()
    for key, quantity in printed.items():
        found = metrics["EP%" if key == "EP" else key]
        if abs(found - quantity.value) > quantity.last_digit * (1 + 1e-9):
            warnings.warn(
                f"{path}: its header says {key} = {multiplier.info[key]}, its circuit has {found:.10g}",
                stacklevel=5,
            )


def _visible(path: Path, text: str) -> tuple[str, list[tuple[int, re.Match[str]]]]:
    """The source without comments and directives, lines kept, and its ``// KEY = VALUE`` comments by line."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    parts, comments, position, line = [], [], 0, 1
    while (match := _COMMENT.search(text, position)) is not None:
        line += text.count("\n", position, match.start())
        end = match.end()
        if match[0] == "/*":
            end = text.find("*/", match.end()) + 2
            if end == 1:
                raise FormatError(path, "a comment must end, got no */", line)
        elif match[0].endswith("\\"):
            raise FormatError(path, "a comment must not go on in the next line by a backslash", line)
        elif (header := _HEADER_LINE.fullmatch(match[0])) is not None:
            comments.append((line, header))
        newlines = text.count("\n", match.start(), end)
        parts += [text[position : match.start()], " ", "\n" * newlines]
        position, line = end, line + newlines
    source = "".join([*parts, text[position:]])
    for match in _DIRECTIVE.finditer(source):
        if match[1] not in ("include", "pragma"):
            got = match[0].strip()[:40]
            raise FormatError(
                path, f"a preprocessor line must be an #include, got {got!r}", line_at(source, match.start())
            )
    source = _CUDA_QUALIFIER.sub(" ", _DIRECTIVE.sub("", source))
    if (foreign := _FOREIGN.search(source)) is not None:
        raise FormatError(path, f"must be integer C, got {foreign[0][:40]!r}", line_at(source, foreign.start()))
    _check_structure(path, source)
    return source, comments


def _check_structure(path: Path, source: str) -> None:
    """Refuse what straight-line C has no use for and a parser that tries alternatives could take for ever over."""

    def refuse(position: int, got: str) -> FormatError:
        return FormatError(path, f"must be straight-line integer C, got {got}", line_at(source, position))

    deep = "an expression nested too deeply"
    if (run := _UNARY_RUN.search(source)) is not None:
        raise refuse(run.start(), deep)
    parentheses = braces = choices = 0
    for token in _STRUCTURE.finditer(source):
        got = token[0]
        if got in _KEYWORDS:
            raise refuse(token.start(), _KEYWORDS[got])
        if got == "(":
            parentheses += 1
        elif got == ")":
            parentheses -= 1
        elif got == "?":
            choices += 1
        elif got == ";":
            choices = 0
        else:
            braces += 1 if got == "{" else -1
            if braces > 1:
                raise refuse(token.start(), "a block")
        if max(parentheses, choices) > _MAX_DEPTH:
            raise refuse(token.start(), deep)


class _Program:
    """A parsed function and how to evaluate it."""

    def __init__(self, path: Path, source: str) -> None:
        self.path = path
        self.digest = hashlib.sha256(" ".join(source.split()).encode()).hexdigest()
        self.mentions = Counter(_IDENTIFIER.findall(source))
        self._types = {name: _INTEGER_TYPES[tuple(sorted(base.split()))] for name, base in _TYPEDEFS.items()}
        function = self._find_function(self._parse(source))
        declaration = function.decl
        self.name: str = declaration.name
        self.line = declaration.coord.line
        self.returns = self._type_of(declaration.type.type)
        self.parameters = self._parameters(declaration.type)
        *self._body, last = function.body.block_items or [None]
        if type(last).__name__ != "Return" or last.expr is None:
            raise self._error(last or function, f"{self.name} must end with the return of a value")
        self._result: c_ast.Node = last.expr

    def run(self, arguments: list[Value]) -> Value:
        """The function's result for arguments in the order of its parameters, in every lane."""
        return _Run(self, arguments).result(self._body, self._result)

    def _error(self, node: Any, expectation: str) -> FormatError:
        coordinate = getattr(node, "coord", None)
        return FormatError(self.path, expectation, coordinate.line if coordinate else None)

    def _unsupported(self, node: Any) -> FormatError:
        kind = type(node).__name__
        got = _CONSTRUCTS.get(kind, kind)
        if kind == "UnaryOp":
            got = {"*": "a pointer", "&": "an address"}.get(node.op, f"operator {node.op.removeprefix('p')}")
        elif kind in ("ID", "Constant", "BinaryOp", "TernaryOp", "Cast"):
            got = "an expression that assigns nothing"
        return self._error(node, f"must be straight-line integer C, got {got}")

    def _parse(self, source: str) -> c_ast.FileAST:
        from pycparser import CParser

        try:
            return CParser().parse(_PRELUDE + source)
        except RecursionError:
            raise FormatError(self.path, "must not be nested so deeply") from None
        except Exception as error:  # ParseError, or whatever else a hostile text makes the parser trip over
            match = re.match(r"[^:]*:([0-9]+)(?::[0-9]+)?: *(.*)", str(error), re.DOTALL)
            line, text = (int(match[1]), match[2]) if match else (self._line_of_error(source), str(error).strip(": "))
            raise FormatError(self.path, f"must be C ({text[:200] or 'syntax error'})", line) from None

    def _line_of_error(self, source: str) -> int | None:
        """The line up to which the parser got, for errors that it says no place of."""
        from pycparser import CParser, c_lexer

        class Lexer(c_lexer.CLexer):
            line: int | None = None

            def token(self) -> Any:
                token = super().token()
                Lexer.line = token.lineno if token is not None else Lexer.line
                return token

        try:
            CParser(lexer=Lexer).parse(_PRELUDE + source)
        except Exception:  # the same as before
            return Lexer.line
        return None

    def _find_function(self, tree: c_ast.FileAST) -> c_ast.FuncDef:
        functions = []
        for node in tree.ext[len(_TYPEDEFS) :]:
            kind = type(node).__name__
            if kind == "FuncDef":
                functions.append(node)
            elif kind == "Typedef":
                self._types[node.name] = self._type_of(node.type)
            elif kind != "Decl" or type(node.type).__name__ != "FuncDecl":
                raise self._error(node, f"only functions and typedefs may stand outside a function, got {kind}")
        named = [node for node in functions if node.decl.name == self.path.stem]
        if len(named or functions) != 1:
            names = ", ".join(node.decl.name for node in functions[:8]) or "none"
            raise FormatError(self.path, f"must hold one function, or one of the file's name, got {names}")
        return (named or functions)[0]

    def _parameters(self, declaration: c_ast.FuncDecl) -> list[tuple[str, CType]]:
        nodes = declaration.args.params if declaration.args else []
        if len(nodes) != 2 or any(type(node).__name__ != "Decl" for node in nodes):
            raise self._error(declaration, f"{self.name} must have two named integer parameters")
        if nodes[0].name == nodes[1].name:
            raise self._error(declaration, f"{self.name}'s parameters must have different names")
        self.constant_parameters = [node.name for node in nodes if "const" in node.quals]
        return [(node.name, self._type_of(node.type)) for node in nodes]

    def _type_of(self, node: Any) -> CType:
        if type(node).__name__ in ("TypeDecl", "Typename"):
            return self._type_of(node.type)
        if type(node).__name__ != "IdentifierType":
            raise self._unsupported(node)
        names = " ".join(node.names)
        type_ = self._types.get(names) or _INTEGER_TYPES.get(tuple(sorted(node.names)))
        if type_ is None:
            raise self._error(node, f"types must be integers, got {names:.60}")
        return type_


class _Run:
    """One evaluation: the variables' values in every lane."""

    def __init__(self, program: _Program, arguments: list[Value]) -> None:
        self._program = program
        self._types = dict(program.parameters)
        self._values = {
            name: convert(argument, type_)
            for (name, type_), argument in zip(program.parameters, arguments, strict=True)
        }
        # How often each name is still to come in the text: memory is used again after a variable's last use.
        self._mentions = program.mentions.copy()
        self._mentions.subtract((program.name, *self._types))
        self._constant = set(program.constant_parameters)
        self._operations = 0
        self._held = 0

    def result(self, body: list[c_ast.Node], result: c_ast.Node) -> Value:
        node = None
        try:
            for node in body:
                self._statement(node)
            node = result
            return convert(self._expression(result), self._program.returns)
        except RecursionError:
            raise self._program._error(node, "an expression must not be nested so deeply") from None

    def _statement(self, node: c_ast.Node) -> None:
        kind = type(node).__name__
        if kind == "Assignment":
            self._assign(node)
        elif kind == "Decl":
            self._declare(node)
        elif kind == "DeclList":
            for each in node.decls:
                self._declare(each)
        elif kind == "Return":
            raise self._program._error(node, "only the last statement may be a return")
        elif kind != "EmptyStatement":
            raise self._program._unsupported(node)

    def _declare(self, node: c_ast.Decl) -> None:
        if node.name in self._types:
            raise self._program._error(node, f"{node.name} must be declared once")
        if node.storage or node.funcspec or not {"const", "volatile"}.issuperset(node.quals):
            got = " ".join((*node.storage, *node.funcspec, *node.quals))
            raise self._program._error(node, f"a variable must be declared by its type alone, got {got:.60}")
        self._types[node.name] = self._program._type_of(node.type)
        if "const" in node.quals:
            self._constant.add(node.name)
        self._mentions[node.name] -= 1
        if node.init is not None:
            self._store(node.name, self._expression(node.init))

    def _assign(self, node: c_ast.Assignment) -> Value:
        """Assign, chained assignments from the right; return the value assigned."""
        if type(node.lvalue).__name__ != "ID":
            raise self._program._error(node, "an assignment must be to a variable")
        name = node.lvalue.name
        if name not in self._types:
            raise self._program._error(node, f"{name} must be declared before it is assigned")
        if name in self._constant:
            raise self._program._error(node, f"{name} must not be assigned, it is const")
        chained = type(node.rvalue).__name__ == "Assignment"
        value = self._assign(node.rvalue) if chained else self._expression(node.rvalue)
        if node.op == "=":
            self._mentions[name] -= 1
        else:
            value = self._binary(node, node.op[:-1], self._read(node.lvalue), value)
        return self._store(name, value)

    def _store(self, name: str, value: Value) -> Value:
        value = convert(value, self._types[name])
        self._forget(name)
        if self._mentions[name] > 0:
            self._values[name] = value
            self._held += 0 if value.array is None else value.array.nbytes
        if self._held > _MAX_HELD_BYTES:
            raise FormatError(self._program.path, f"its variables must fit {_MAX_HELD_BYTES >> 20} MiB")
        return value

    def _forget(self, name: str) -> None:
        value = self._values.pop(name, None)
        if value is not None and value.array is not None:
            self._held -= value.array.nbytes

    def _read(self, node: c_ast.ID) -> Value:
        value = self._values.get(node.name)
        if value is None:
            wanted = "assigned" if node.name in self._types else "declared"
            raise self._program._error(node, f"{node.name} must be {wanted} before it is read")
        self._mentions[node.name] -= 1
        if self._mentions[node.name] <= 0:
            self._forget(node.name)
        return value

    def _expression(self, node: c_ast.Node) -> Value:
        kind = type(node).__name__
        if kind == "ID":
            return self._read(node)
        if kind == "Constant":
            return self._literal(node)
        if kind == "BinaryOp":
            return self._binary(node, node.op, self._expression(node.left), self._expression(node.right))
        if kind == "UnaryOp" and node.op in UNARY_OPERATORS:
            self._count(node)
            return unary(node.op, self._expression(node.expr))
        if kind == "Cast":
            return convert(self._expression(node.expr), self._program._type_of(node.to_type))
        if kind == "TernaryOp":
            self._count(node)
            condition = self._expression(node.cond)
            return ternary(condition, self._expression(node.iftrue), self._expression(node.iffalse))
        raise self._program._unsupported(node)

    def _binary(self, node: c_ast.Node, operator: str, left: Value, right: Value) -> Value:
        if operator not in BINARY_OPERATORS:
            raise self._program._error(node, f"must be straight-line integer C, got operator {operator}")
        self._count(node)
        try:
            return binary(operator, left, right)
        except UndefinedError as error:
            raise self._program._error(node, str(error)) from None

    def _literal(self, node: c_ast.Constant) -> Value:
        match = _LITERAL.fullmatch(node.value)
        unsigned, rank = _SUFFIXES.get("".join(sorted(match[2].lower(), reverse=True)) if match else "?", (False, 0))
        if rank == 0:
            raise self._program._error(node, f"must be straight-line integer C, got the constant {node.value}")
        digits = match[1]
        base = {"0x": 16, "0b": 2}.get(digits[:2].lower(), 8 if digits[0] == "0" else 10)
        value = int(digits[2:] if base in (16, 2) else digits, base)
        for each in _INTEGER_TYPES.values():
            if (
                each.rank >= rank
                and value <= each.high
                and (each.signed != unsigned if base == 10 or unsigned else True)
            ):
                return constant(each, value)
        raise self._program._error(node, f"a constant must fit 64 bits, got {node.value}")

    def _count(self, node: c_ast.Node) -> None:
        self._operations += 1
        if self._operations > _MAX_OPERATIONS:
            raise self._program._error(node, f"must be at most {_MAX_OPERATIONS:,} operations")


def _looks_like_c(head: bytes) -> bool:
    """Whether a function of two parameters with a body seems to begin in this text."""
    return re.search(rb"\b\w{1,64}\s+\w{1,64}\s*\([^(){};]{3,400}\)\s*\{", head) is not None


FORMAT = Format("c_model", (".c",), load_c_model, _looks_like_c)
