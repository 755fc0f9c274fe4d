"""The magics in an IPython shell as notebooks have it, and what is shown in notebooks and terminals."""

import atexit
import builtins
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

pytest.importorskip("IPython", reason="needs IPython")

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.lib.pretty import pretty
from IPython.utils.capture import capture_output
from traitlets.config import Config

from approxconv import Multiplier, kernels
from approxconv.kernels import KernelCompileError, KernelRejectedError, Replacement, sources
from approxconv.kernels.compile import KernelInfo, KernelInfos
from approxconv.kernels.verify import BenchmarkReport, Case, Failure, Timing, VerificationReport

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run CUDA sources on the CPU")

CASE = Case("lut_gemm", (2, 3), (4, 3))
RIGHT = VerificationReport("my_gemm", "host_cuda", 29)
WRONG = VerificationReport("my_gemm", "host_cuda", 1, (Failure(CASE, 1, 8, (0, 1), 5, 6),))
TIMED = BenchmarkReport("my_gemm", "a machine", (Timing(CASE, 0.5, 0.25),), "the kernel before")
INFO = KernelInfo(40, 1024, 8, 4, 16, 256, source="my_gemm", kernel="my_gemm_int16", arch="sm_90")
HOSTILE = "<script>alert('&')</script>"


@pytest.fixture(scope="module")
def replacing():
    module = sys.modules["approxconv.kernels.replace"]  # the package's attribute is the function
    assert module._session is None
    yield module
    if module._session is not None:
        module._session._close()
        module._session = None
    sources.set_overlay(None)
    sources.reload()


@pytest.fixture(scope="module")
def shell(replacing, tmp_path_factory):
    """The only shell of this process while these tests run: `display` looks for it."""
    assert not InteractiveShell.initialized()
    kept = {name: getattr(sys, name) for name in ("displayhook", "excepthook")}
    main, names = sys.modules["__main__"], dict(vars(builtins))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        config = Config()
        config.HistoryManager.enabled = False
        shell = InteractiveShell.instance(config=config)
        assert shell.run_cell("%load_ext approxconv").success
        yield shell
    shell.restore_sys_module_state()
    shell.atexit_operations()
    atexit.unregister(shell.atexit_operations)
    InteractiveShell.clear_instance()
    sys.modules["__main__"] = main
    for name, value in kept.items():
        setattr(sys, name, value)
    for name in vars(builtins).keys() - names.keys():
        delattr(builtins, name)


@pytest.fixture(autouse=True)
def _as_it_was(replacing, monkeypatch):
    monkeypatch.delenv("APPROXCONV_CUDA_SRC", raising=False)
    with sources.use_source(None):
        yield
        while names := kernels.replaced():
            kernels.undo(names[0])


class Shown:
    """What running a cell showed."""

    def __init__(self, shell, cell):
        with capture_output() as captured:
            self.result = shell.run_cell(cell, store_history=False)
        self.error = self.result.error_before_exec or self.result.error_in_exec
        self.printed = captured.stdout
        shown = [output.data for output in captured.outputs]
        if self.result.result is not None:
            shown.append(shell.display_formatter.format(self.result.result)[0])
        self.html, self.text = ("".join(data.get(f"text/{kind}", "") for data in shown) for kind in ("html", "plain"))

    @property
    def marked(self):
        """The line of the cell that is marked."""
        (line,) = re.findall(r'<strong style="border-left[^"]*">(.*?)</strong>', self.html)
        return unescape(line)


@pytest.fixture
def run(shell):
    """``run(cell)``: a cell without errors."""

    def without_errors(cell):
        shown = Shown(shell, cell)
        assert shown.error is None
        return shown

    return without_errors


@pytest.fixture
def refused(shell):
    """``refused(cell)``: the message of a cell that IPython answers by one line."""

    def message(cell):
        shown = Shown(shell, cell)
        assert type(shown.error) is UsageError
        assert not shown.html
        return str(shown.error)

    return message


@pytest.fixture
def replacement(monkeypatch):
    """``replacement(outcome)``: what is said of the next texts, which are returned in a list with the options."""

    def answer_by(outcome):
        asked = []

        def replace(name, text, **options):
            asked.append((name, text, options))
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(kernels, "replace", replace)
        return asked

    return answer_by


@pytest.fixture
def swapped(replacing):
    """``swapped(name, text)``: puts a text in its place untried."""
    return replacing._get_session().put


def looks_right(html):
    """Whether it is readable on light and dark themes, and no tag is open."""
    colors = re.findall(r"(?<![\w-])((?:background|border)(?:-color)?|color|fill)\s*:\s*([^;\"]+)", html)
    assert all(re.fullmatch(r"transparent|currentColor|0|collapse", value.strip()) for _, value in colors), colors
    named = r"#[0-9a-fA-F]{3,8}\b|rgb|hsl|bgcolor|<font|<style|<script|class="
    assert not re.search(named, re.sub(r"base64,[^\"]*", "", html))
    opened = [tag for tag in re.findall(r"<(\w+)", html) if tag not in ("img", "br")]
    assert sorted(opened) == sorted(re.findall(r"</(\w+)", html))
    return True


# %%kernel


def test_a_cell_becomes_the_kernel(run, replacement):
    asked = replacement(Replacement("my_gemm", RIGHT, TIMED))
    shown = run("%%kernel my_gemm\n// text\n")
    assert asked == [("my_gemm", "// text\n", {"engine": None, "timeout": 120.0})]
    assert looks_right(shown.html)
    for said in ("my_gemm replaced", "✓ my_gemm on host_cuda: 29 of 29 cases right", "speed to the kernel before"):
        assert said in shown.html
    assert shown.result.result is None


def test_its_options(run, replacement):
    asked = replacement(Replacement("my_gemm", RIGHT, TIMED))
    run("%%kernel my_gemm --engine host_cuda --timeout 2.5\n// text")
    assert asked[0][2] == {"engine": "host_cuda", "timeout": 2.5}


@pytest.mark.parametrize(
    "text",
    [
        "// {x} $x $$ %x %%x !x ?x\n%time 1\n",
        '  indented\n\t"\\n" R"(\\)" \\\n',
        "\n\n// Σ 語 🙂\n\n\n",
        "'''\n\"\"\"\n",
        "// no newline",
    ],
)
def test_the_text_arrives_as_it_is(shell, run, replacement, text):
    shell.push({"x": "expanded"})
    asked = replacement(Replacement("my_gemm", RIGHT, TIMED))
    run(f"%%kernel my_gemm\n{text}")
    assert asked[0][1].rstrip("\n") == text.rstrip("\n")
    assert asked[0][1].startswith(text.rstrip("\n"))


def test_a_compile_error_marks_the_line(run, replacement):
    replacement(KernelCompileError(f"k.cu:6: error: {HOSTILE}", path=Path("/gone/k.cu"), line=6))
    lines = [f"line {number} of <b>&amp;" for number in range(1, 13)]
    shown = run("\n".join(["%%kernel k", *lines]))
    assert shown.marked.split() == ["6", *["line", "6", "of", "<b>&amp;"]]
    assert shown.text == f"k.cu:6: error: {HOSTILE}"
    assert "✗ k does not compile" in shown.html
    assert HOSTILE in unescape(shown.html)
    assert looks_right(shown.html)
    for line in lines:
        assert (line in unescape(shown.html)) == (line in lines[2:9])


@pytest.mark.parametrize("line", [1, 2, 3])
def test_an_error_at_the_edge_of_the_cell(run, replacement, line):
    replacement(KernelCompileError("k.cu: error", path=Path("/gone/k.cu"), line=line))
    assert run("%%kernel k\na 1\na 2\na 3").marked.split() == [str(line), "a", str(line)]


@pytest.mark.parametrize(
    ("path", "line"), [("/some/header.cuh", 2), ("/gone/k.cu", None), (None, 2), ("/gone/k.cu", 99), ("/gone/k.cu", 0)]
)
def test_an_error_elsewhere_marks_nothing(run, replacement, path, line):
    replacement(KernelCompileError("where: error: what", path=path and Path(path), line=line))
    shown = run("%%kernel k\n// first\n// second\n")
    assert "border-left" not in shown.html
    assert "where: error: what" in shown.html
    assert looks_right(shown.html)


def test_a_wrong_kernel_shows_its_first_wrong_element(run, replacement):
    replacement(KernelRejectedError(f"{WRONG}\nthe kernel in use stays", WRONG))
    shown = run("%%kernel my_gemm\n// wrong")
    assert looks_right(shown.html)
    for said in ("✗ my_gemm is not replaced", "first wrong element", "y[0, 1]", "1 of 8"):
        assert said in shown.html
    assert "first y[0, 1] = 5, expected 6" in shown.text


def test_a_crash_shows_what_it_said(run, replacement):
    replacement(KernelRejectedError(f"k crashed with status -11: {HOSTILE}"))
    shown = run("%%kernel k\n// crashes")
    assert looks_right(shown.html)
    assert HOSTILE in unescape(shown.html)
    assert shown.text == f"k crashed with status -11: {HOSTILE}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "required: name"),
        ("a b", "unrecognized arguments: b"),
        ("a --engine cpu", "invalid choice"),
        ("a --timeout soon", "invalid float"),
        ("../x", "name must be an identifier such as lut_gemm, got '../x'"),
        ("1x", "name must be an identifier"),
    ],
)
def test_kernel_cells_that_are_none(shell, line, said):
    shown = Shown(shell, f"%%kernel {line}\n// text")
    assert type(shown.error) is UsageError
    assert said in str(shown.error) + shown.printed
    assert kernels.replaced() == []


@pytest.mark.slow
@needs_compiler
def test_a_cell_is_really_tried(run, replacing):
    """A wrong edit, then a right one."""
    text = kernels.source("lut_dwconv2d")
    wrong = text.replace("g.pad_code);", "g.pad_kode);")
    number = next(n for n, line in enumerate(wrong.split("\n"), 1) if "pad_kode" in line)
    shown = run(f"%%kernel lut_dwconv2d --engine host_cuda\n{wrong}")
    assert shown.marked.split()[0] == str(number)
    assert "g.pad_kode" in shown.marked
    assert kernels.replaced() == []
    shown = run(f"%%kernel lut_dwconv2d --engine host_cuda\n{text}\nconstexpr int MARK = 1;\n")
    assert "✓ lut_dwconv2d on host_cuda: 25 of 25 cases right" in shown.html
    assert looks_right(shown.html)
    assert kernels.read("lut_dwconv2d").constants["MARK"] == 1
    assert "+constexpr int MARK = 1;" in run("%kernel diff lut_dwconv2d").text
    assert run("%kernel undo lut_dwconv2d").printed == "lut_dwconv2d is as its file has it\n"
    assert kernels.source("lut_dwconv2d") == text


# %kernel


@pytest.mark.parametrize("line", ["", "list", " list "])
def test_list(run, swapped, tmp_path, line):
    (tmp_path / "mine.cu").write_text("/* <b>mine</b> & yours */\n// more\n")
    (tmp_path / "empty.cu").write_text("")
    swapped("my_gemm", "// my gemm\n")
    with kernels.use_source(tmp_path):
        shown = run(f"%kernel {line}")
    assert [row.split()[0] for row in shown.text.split("\n")] == sorted(
        ["empty", "mine", "my_gemm", *(path.stem for path in (Path(__file__).parents[1] / "cuda_src").glob("*.cu"))]
    )
    assert re.search("^my_gemm +replaced: my gemm$", shown.text, re.MULTILINE)
    assert re.search(f"^mine +{tmp_path}: <b>mine</b> & yours$", shown.text, re.MULTILINE)
    assert "&lt;b&gt;mine&lt;/b&gt; &amp; yours" in shown.html
    assert looks_right(shown.html)


def test_show(run, swapped):
    text = kernels.source("lut_gemm")
    shown = run("%kernel show lut_gemm")
    assert shown.text == text
    assert "#include &quot;row_tables.cuh&quot;\n" in shown.html
    assert "font-family:monospace" in shown.html
    assert looks_right(shown.html)


def test_edit_brings_the_text_that_a_cell_takes_back(shell, run, swapped, replacement):
    text = f"// Σ {HOSTILE}\n{kernels.source('lut_gemm')}"
    swapped("my_gemm", text)
    run("%kernel edit my_gemm")
    edited, shell.rl_next_input = shell.rl_next_input, None
    assert edited == f"%%kernel my_gemm\n{text}"
    asked = replacement(Replacement("my_gemm", RIGHT, TIMED))
    run(edited)
    assert asked[0][:2] == ("my_gemm", text)


def test_undo(run, refused, swapped):
    swapped("lut_gemm", "// first")
    swapped("lut_gemm", "// second")
    swapped("my_gemm", "// mine")
    assert run("%kernel undo lut_gemm").printed == "lut_gemm is as it was replaced before\n"
    assert kernels.source("lut_gemm") == "// first"
    assert run("%kernel undo lut_gemm").printed == "lut_gemm is as its file has it\n"
    assert run("%kernel undo my_gemm").printed == "my_gemm is gone\n"
    assert refused("%kernel undo my_gemm") == "'my_gemm' was not replaced; replaced: none"


def test_diff(run, swapped):
    assert run("%kernel diff lut_gemm").text == ""
    swapped("my_gemm", "// <b> ```\n")
    shown = run("%kernel diff my_gemm")
    assert shown.text.endswith("\n+// <b> ```\n")
    assert "+// &lt;b&gt; ```\n" in shown.html


@pytest.mark.parametrize("action", ["show", "edit", "undo", "diff"])
def test_kernels_that_are_not_there(refused, action):
    assert "nowhere" in refused(f"%kernel {action} nowhere")


@pytest.mark.parametrize(
    "line", ["show", "list lut_gemm", "show a b", "drop lut_gemm", "lut_gemm", '"show', "show 'lut_gemm", "__init__ x"]
)
def test_lines_that_are_none(refused, line):
    message = refused(f"%kernel {line}")
    assert message.startswith("%kernel")
    assert repr(line) in message


# %%multiplier

PYTHON = """
def truncated(a, w):
    return a * w // 16 * 16
"""
C = "#include <stdint.h>\n\nuint16_t mul4u_made(uint8_t a, uint8_t w) {\n    return a * w & ~1;\n}\n"


def test_a_multiplier_of_python(shell, run):
    shown = run(f"%%multiplier made\n{PYTHON}")
    made = shell.user_ns["made"]
    assert shown.result.result is made
    assert (made.name, made.a_format, made.w_format) == ("made", "uint8", "int8")
    expected = Multiplier.from_function(lambda a, w: a * w // 16 * 16, a_signed=False, w_signed=True)
    assert made.table.equal(expected.table)
    assert looks_right(shown.html)
    assert "data:image/png;base64," in shown.html
    assert shown.text == "Multiplier('made', a=uint8, w=int8)"
    assert "truncated" not in shell.user_ns


@pytest.mark.parametrize(
    ("options", "formats"),
    [
        ("--bits 4", ("uint4", "int4")),
        ("--formats uu", ("uint8", "uint8")),
        ("--bits 3 --formats su", ("int3", "uint3")),
        ("--formats=ss", ("int8", "int8")),
    ],
)
def test_its_formats(shell, run, options, formats):
    run(f"%%multiplier made {options}\n{PYTHON}")
    assert (shell.user_ns["made"].a_format, shell.user_ns["made"].w_format) == formats


def test_python_that_uses_the_notebook(shell, run):
    shell.push({"step": 32, "np": __import__("numpy")})
    run("%%multiplier made\nimport math\n\ndef helper(p):\n    return p // step * step\n\n"
        "def f(a, w):\n    return np.sign(helper(a * w)) * abs(helper(a * w)) * math.gcd(1, 1)\n")  # fmt: skip
    assert shell.user_ns["made"].table.remainder(32).eq(0).all()
    assert "helper" not in shell.user_ns
    assert "math" not in shell.user_ns


@pytest.mark.parametrize("qualifiers", ["", "__device__ ", "static inline ", "__device__ __forceinline__ "])
def test_a_multiplier_of_c(shell, run, qualifiers):
    shown = run(f"%%multiplier made\n{C.replace('uint16_t mul', f'{qualifiers}uint16_t mul')}")
    made = shell.user_ns["made"]
    assert (made.name, made.a_format, made.w_format) == ("made", "uint4", "uint4")
    expected = Multiplier.from_function(lambda a, w: a * w // 2 * 2, bits=4, a_signed=False, w_signed=False)
    assert made.table.equal(expected.table)
    assert "data:image/png;base64," in shown.html
    assert looks_right(shown.html)


def test_what_is_no_multiplier_leaves_the_variable(shell, run):
    shell.push({"made": "before"})
    shown = run(f"%%multiplier made\n{C.replace('return', 'for (;;) return')}")
    assert shown.marked.split()[:2] == ["4", "for"]
    assert "✗ no multiplier" in shown.html
    assert shown.text.startswith("<C>:4: ")
    assert looks_right(shown.html)
    assert shown.result.result is None
    assert shell.user_ns["made"] == "before"


@pytest.mark.parametrize("cell", [HOSTILE, "{", "int f(", "int f(int a) { return a; }", "__device__ x"])
def test_cells_of_neither_language(shell, run, cell):
    shell.push({"made": "before"})
    shown = run(f"%%multiplier made\n{cell}\n")
    assert "✗ no multiplier" in shown.html
    assert looks_right(shown.html)
    assert shell.user_ns["made"] == "before"


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("def f(a, w):\n    return a *\n", SyntaxError),
        ("def f(a, w):\n    raise ZeroDivisionError\n", ZeroDivisionError),
        ("def f(a, w):\n    return nowhere\n", NameError),
        ("def f(a, w):\n    return a * w + 0.5\n", ValueError),
        ("def f(a):\n    return a\n", TypeError),
        ("raise KeyError\ndef f(a, w):\n    return a\n", KeyError),
    ],
)
def test_python_that_fails(shell, cell, error):
    shell.push({"made": "before"})
    shown = Shown(shell, f"%%multiplier made\n{cell}")
    assert isinstance(shown.error, error)
    assert shell.user_ns["made"] == "before"


@pytest.mark.parametrize(
    ("line", "cell", "said"),
    [
        ("1x", PYTHON, "name must be a Python identifier, got '1x'"),
        ("a.b", PYTHON, "name must be a Python identifier, got 'a.b'"),
        ("class", PYTHON, "name must be a Python identifier, got 'class'"),
        ("made --formats u", PYTHON, "--formats must be us, uu, ss or su, got 'u'"),
        ("made --formats xx", PYTHON, "--formats must be us, uu, ss or su, got 'xx'"),
        ("made --formats uss", PYTHON, "--formats must be us, uu, ss or su, got 'uss'"),
        ("made --formats=", PYTHON, "--formats must be us, uu, ss or su, got ''"),
        ("made", "x = 1\n", "the cell must define a function of activation and weight"),
        ("made", "\n", "the cell must define a function of activation and weight"),
        ("made --bits 0", PYTHON, "--bits must be from 2 to 8, got"),
        ("made --bits 99", PYTHON, "--bits must be from 2 to 8, got"),
        ("made --bits 0", C, "--bits must be from 2 to 8, got"),
    ],
)
def test_multiplier_cells_that_are_none(refused, line, cell, said):
    assert said in refused(f"%%multiplier {line}\n{cell}")


# What is shown

DISPLAYS = [
    Replacement(HOSTILE, RIGHT, TIMED),
    RIGHT,
    WRONG,
    VerificationReport(HOSTILE, HOSTILE, 0, (Failure(CASE, 1, 8, (0, 1), 5, 6),) * 3),
    TIMED,
    BenchmarkReport(HOSTILE, HOSTILE, (Timing(CASE, 0.5, None),), HOSTILE),
    INFO,
    KernelInfos({HOSTILE: INFO, "other": INFO}),
    KernelInfos(),
]


@pytest.mark.parametrize("shown", DISPLAYS, ids=lambda shown: type(shown).__name__)
def test_displays(shown):
    assert looks_right(shown._repr_html_())
    assert not re.search(r"</?(div|td|strong)|object at 0x", str(shown))


@pytest.mark.parametrize("shown", DISPLAYS, ids=lambda shown: type(shown).__name__)
def test_a_terminal_shows_the_text(shown):
    assert pretty(shown) == str(shown)


def test_displays_say_what_is_known():
    html = INFO._repr_html_()
    for cell in (INFO.kernel, "my_gemm.cu for sm_90", "40", "1024", "256", f"{INFO.occupancy(256):.0%}"):
        assert cell in html
    assert KernelInfos({"k": INFO}) == {"k": INFO}
    assert "y[0, 1]" in WRONG._repr_html_()
    assert "✗ my_gemm on host_cuda: 1 of 2 cases right" in WRONG._repr_html_()
    assert "500.000" in TIMED._repr_html_()


# Loading


def test_loading_again(run, shell):
    run("%load_ext approxconv")
    run("%reload_ext approxconv")
    assert shell.find_cell_magic("kernel")
    assert shell.find_line_magic("kernel")
    assert shell.find_cell_magic("multiplier")


def test_a_process_waits_for_the_first_kernel(shell, replacing):
    assert replacing._session._waiting.poll() is None


def test_importing_the_library_does_not_import_ipython():
    code = "import sys, approxconv.kernels; sys.exit('IPython' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_in_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    cells = [
        "%load_ext approxconv",
        "display(get_ipython().run_line_magic('kernel', 'list'))",
        "display(get_ipython().run_cell_magic('multiplier', 'made', 'def f(a, w): return a * w'))",
    ]
    command = [sys.executable, "-m", "IPython", "--colors=nocolor", "--no-banner", "-c", "\n".join(cells)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search("^lut_gemm +packaged: Matrix product", done.stdout, re.MULTILINE)
    assert "Multiplier('made', a=uint8, w=int8)" in done.stdout
    assert "<div" not in done.stdout


@pytest.mark.slow
@needs_compiler
def test_in_a_notebook(tmp_path, monkeypatch):
    """End to end: a kernel is edited wrongly and rightly, a multiplier is made, all by Jupyter's own means."""
    nbclient, nbformat = (pytest.importorskip(each, reason="needs nbclient") for each in ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    text = kernels.source("lut_dwconv2d")
    cells = [
        "%load_ext approxconv",
        f"%%kernel lut_dwconv2d --engine host_cuda\n{text.replace('sums[k] = g.bias;', 'sums[k] = g.bias + 1;')}",
        f"%%kernel lut_dwconv2d --engine host_cuda\n{text}// edited\n",
        "%kernel edit lut_dwconv2d",
        "%kernel diff lut_dwconv2d",
        "%kernel undo lut_dwconv2d",
        f"%%multiplier made\n{C}",
        "from approxconv import kernels; made.name, kernels.replaced()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    (wrong,), (right,), _, (diff,), (undone,), (made,), (last,) = outputs[1:]
    assert "✗ lut_dwconv2d is not replaced" in wrong.data["text/html"]
    assert "first wrong element" in wrong.data["text/html"]
    assert "✓ lut_dwconv2d on host_cuda: 25 of 25 cases right" in right.data["text/html"]
    assert "\n+// edited\n" in diff.data["text/html"]
    assert undone.text == "lut_dwconv2d is as its file has it\n"
    assert "image/png" in made.data
    assert last.data["text/plain"] == "('made', [])"
    for output in (wrong, right, made):
        assert looks_right(output.data["text/html"])
