"""``%load_ext approxconv``: kernels and multipliers from notebook cells. The only importer of IPython."""

from __future__ import annotations

import ast
import re
import shlex
from keyword import iskeyword
from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring
from IPython.display import display

from . import kernels
from ._display import Shown, html_table, preformatted, titled
from .formats import FormatError
from .kernels.sources import packaged_dir
from .multiplier import MAX_BITS, MIN_BITS, Multiplier

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

_KERNEL_ACTIONS = ("list", "show", "edit", "undo", "diff")
_FORMATS = {"u": False, "s": True}


class _Message(Shown):
    """A text for a terminal with its HTML for a notebook."""

    def __init__(self, text: str, html: str) -> None:
        self._text, self._html = text, html

    def __str__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        return self._html


@magics_class
class ApproxconvMagics(Magics):
    """``%%kernel``, ``%kernel`` and ``%%multiplier``."""

    @magic_arguments()
    @argument("name", help="kernel source to replace, such as lut_gemm, or a new name")
    @argument("--engine", choices=("cuda", "host_cuda"), help="where to verify it; the GPU if there is one")
    @argument("--timeout", type=float, default=120.0, help="seconds that trying it may take")
    @cell_magic("kernel")
    def replace_kernel(self, line: str, cell: str) -> None:
        """Make the cell's text the kernel: compiled, verified, timed and swapped in if it is right."""
        arguments = parse_argstring(self.replace_kernel, line)
        try:
            display(kernels.replace(arguments.name, cell, engine=arguments.engine, timeout=arguments.timeout))
        except kernels.KernelCompileError as error:
            own = error.path is not None and error.path.name == f"{arguments.name}.cu" and error.line is not None
            _show_failure(str(error), f"{arguments.name} does not compile", cell if own else None, error.line)
        except kernels.KernelRejectedError as error:
            report = "" if error.report is None else error.report._repr_html_()
            _show_failure(str(error), f"{arguments.name} is not replaced", html=report)
        except ValueError as error:
            raise UsageError(str(error)) from None

    @line_magic
    def kernel(self, line: str) -> object:
        """``%kernel list``, or ``show``, ``edit``, ``undo`` or ``diff`` and a kernel's name."""
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise UsageError(f"%kernel: {error}, got {line!r}") from None
        action, names = (words[0], words[1:]) if words else ("list", [])
        if action not in _KERNEL_ACTIONS or len(names) != (action != "list"):
            raise UsageError(
                f"%kernel takes list, or {', '.join(_KERNEL_ACTIONS[1:])} and a kernel's name, got {line!r}"
            )
        if action == "list":
            return _listed()
        try:
            return getattr(self, f"_{action}")(names[0])
        except (FileNotFoundError, ValueError) as error:
            raise UsageError(str(error)) from None

    def _show(self, name: str) -> _Message:
        return _monospaced(kernels.source(name))

    def _edit(self, name: str) -> None:
        self.shell.set_next_input(f"%%kernel {name}\n{kernels.source(name)}")

    def _undo(self, name: str) -> None:
        kernels.undo(name)
        now = "as it was replaced before" if name in kernels.replaced() else "as its file has it"
        print(f"{name} is {now}" if name in kernels.list() else f"{name} is gone")

    def _diff(self, name: str) -> object:
        return _monospaced(kernels.diff(name))

    @magic_arguments()
    @argument("name", help="of the multiplier and of the variable that holds it")
    @argument("--bits", type=int, help="width of both operands; 8 for Python, as name or types say for C")
    @argument("--formats", help="signedness of activation and weight: us (default for Python), uu, ss or su")
    @cell_magic
    def multiplier(self, line: str, cell: str) -> Multiplier | None:
        """Tabulate the cell's C, CUDA or Python function ``f(activation, weight)`` and show its error."""
        arguments = parse_argstring(self.multiplier, line)
        signs = None if arguments.formats is None else [_FORMATS.get(letter) for letter in arguments.formats]
        if signs is not None and (len(signs) != 2 or None in signs):
            raise UsageError(f"--formats must be us, uu, ss or su, got {arguments.formats!r}")
        if arguments.bits is not None and not MIN_BITS <= arguments.bits <= MAX_BITS:
            raise UsageError(f"--bits must be from {MIN_BITS} to {MAX_BITS}, got {arguments.bits}")
        if not arguments.name.isidentifier() or iskeyword(arguments.name):
            raise UsageError(f"name must be a Python identifier, got {arguments.name!r}")
        try:
            made = self._tabulate(cell, arguments.bits, signs)
        except FormatError as error:
            place, _, _ = str(error).removeprefix("<C>:").partition(":")
            _show_failure(str(error), "no multiplier", cell, int(place) if place.isdigit() else None)
            return None
        made.name = arguments.name
        self.shell.push({arguments.name: made})
        return made

    def _tabulate(self, cell: str, bits: int | None, signs: list[bool] | None) -> Multiplier:
        flags = {} if signs is None else {"a_signed": signs[0], "w_signed": signs[1]}
        try:
            tree = ast.parse(cell, "<%%multiplier>")
        except SyntaxError:
            if re.search(r"^\s*(?:async\s+)?def\s+\w+\s*\(", cell, re.MULTILINE):
                raise
            return Multiplier.from_c(cell, bits=bits, **flags)
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if not functions:
            raise UsageError("the cell must define a function of activation and weight, in Python or C")
        scope = dict(self.shell.user_ns)
        exec(compile(tree, "<%%multiplier>", "exec"), scope)
        return Multiplier.from_function(
            scope[functions[-1]], bits=8 if bits is None else bits, **flags or {"a_signed": False, "w_signed": True}
        )


def _monospaced(text: str) -> _Message:
    return _Message(text, preformatted(text))


def _show_failure(text: str, title: str, source: str | None = None, line: int | None = None, html: str = "") -> None:
    """Show what is wrong, with the lines around the wrong one where it is the cell's."""
    parts = [html or preformatted(text)]
    if source is not None and line is not None:
        parts = [preformatted(text.split("\n")[0])]
        lines = source.split("\n")
        first, last = max(line - 4, 0), min(line + 3, len(lines))
        excerpt = "\n".join(f"{number + 1:4} {lines[number]}" for number in range(first, last))
        parts.append(preformatted(excerpt, line - 1 - first))
    display(_Message(text, titled(f"✗ {title}", *parts)))


def _listed() -> _Message:
    rows = [(name, _origin(name), _first_line(name)) for name in kernels.list()]
    text = "\n".join(f"{name:<16} {where}: {about}" for name, where, about in rows)
    return _Message(text, html_table(rows, ("kernel", "from", "what it is")))


def _origin(name: str) -> str:
    if name in kernels.replaced():
        return "replaced"
    folder = kernels.source_path(name).parent
    return "packaged" if folder == packaged_dir() else str(folder)


def _first_line(name: str) -> str:
    return kernels.source(name).lstrip().split("\n")[0].strip("/* ")


def load(shell: InteractiveShell) -> None:
    """Register the magics, and have a process ready in which the first kernel is tried."""
    from .kernels.replace import prepare

    shell.register_magics(ApproxconvMagics)
    prepare()
