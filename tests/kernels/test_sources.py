"""Finding and reading the CUDA sources; needs neither a GPU nor CuPy."""

import os
import threading
from pathlib import Path

import pytest

from approxconv.kernels import sources


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    monkeypatch.delenv("APPROXCONV_CUDA_SRC", raising=False)
    with sources.use_source(None):
        yield
    sources.reload()


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A packaged folder of the tests' own."""
    monkeypatch.setattr(sources, "_PACKAGE", tmp_path / "site" / "approxconv")
    return folder(tmp_path / "site" / "approxconv" / "cuda_src", {})


def folder(path, files):
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def make_old(*paths):
    """As files are that nobody edits just now."""
    for path in paths:
        os.utime(path, (1e9, 1e9))


def read_text(packaged, text):
    folder(packaged, {"k.cu": text})
    return sources.read("k")


# Where they lie


def test_the_packaged_folder_comes_before_the_checkouts(tmp_path, packaged):
    checkout = folder(tmp_path / "site" / "cuda_src", {})
    assert sources.source_dir() == packaged
    packaged.rmdir()
    assert sources.source_dir() == checkout
    checkout.rmdir()
    with pytest.raises(FileNotFoundError, match=f"looked in {packaged}, {checkout}"):
        sources.source_dir()


def test_the_real_sources_are_found():
    assert (sources.source_dir() / "lut_conv2d.cu").is_file()


def test_the_environment_comes_before_the_packaged_folder(tmp_path, packaged, monkeypatch):
    monkeypatch.setenv("APPROXCONV_CUDA_SRC", str(tmp_path))
    assert sources.source_dir() == tmp_path
    monkeypatch.setenv("APPROXCONV_CUDA_SRC", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere, chosen by \$APPROXCONV_CUDA_SRC"):
        sources.source_dir()
    monkeypatch.setenv("APPROXCONV_CUDA_SRC", "")
    assert sources.source_dir() == packaged


def test_use_source_comes_before_the_environment(tmp_path, monkeypatch):
    mine, outer, inner = (folder(tmp_path / name, {}) for name in ("mine", "outer", "inner"))
    monkeypatch.setenv("APPROXCONV_CUDA_SRC", str(mine))
    sources.use_source(outer)
    assert sources.source_dir() == outer
    with sources.use_source(str(inner)) as used:
        assert used == sources.source_dir() == inner
        with sources.use_source(None):
            assert sources.source_dir() == mine
        assert sources.source_dir() == inner
    assert sources.source_dir() == outer
    sources.use_source(None)
    assert sources.source_dir() == mine


def test_use_source_is_undone_by_an_error_and_holds_for_all_threads(tmp_path, packaged):
    seen = []

    def run_and_fail():
        thread = threading.Thread(target=lambda: seen.append(sources.source_dir()))
        thread.start()
        thread.join()
        raise KeyError

    with pytest.raises(KeyError), sources.use_source(tmp_path):
        run_and_fail()
    assert seen == [tmp_path]
    assert sources.source_dir() == packaged


@pytest.mark.parametrize("name", ["nowhere", "file.cu"])
def test_use_source_refuses_what_is_no_folder(tmp_path, packaged, name):
    folder(tmp_path, {"file.cu": ""})
    with pytest.raises(FileNotFoundError, match=name):
        sources.use_source(tmp_path / name)
    assert sources.source_dir() == packaged


def test_missing_files_come_from_the_packaged_folder(tmp_path, packaged):
    folder(packaged, {"a.cu": "// packaged a", "b.cu": "// packaged b"})
    mine = folder(tmp_path / "mine", {"b.cu": "// my b", "c.cu": "// my c"})
    assert sources.list_sources() == ["a", "b"]
    with sources.use_source(mine):
        assert sources.list_sources() == ["a", "b", "c"]
        assert [sources.source(name) for name in "abc"] == ["// packaged a", "// my b", "// my c"]
        assert sources.source_path("a") == packaged / "a.cu"
        assert sources.read("b").path == mine / "b.cu"


@pytest.mark.parametrize("function", [sources.source, sources.source_path, sources.read])
def test_an_unknown_name_lists_those_there_are(packaged, function):
    with pytest.raises(FileNotFoundError, match=r"x\.cu in .*cuda_src; there are: none"):
        function("x")
    folder(packaged, {"a.cu": "", "b.cu": "", "c.cuh": ""})
    with pytest.raises(FileNotFoundError, match=r"there are: a, b$"):
        function("x")


def test_copy_sources(tmp_path, packaged):
    files = {"a.cu": "// a", "lib/h.cuh": "// h", "notes.txt": "", "__init__.py": ""}
    folder(packaged, files)
    mine = sources.copy_sources(tmp_path / "new" / "mine")
    assert sorted(p.relative_to(mine).as_posix() for p in mine.rglob("*.*")) == ["a.cu", "lib/h.cuh"]
    (mine / "a.cu").write_text("// edited")
    (mine / "lib" / "h.cuh").unlink()
    with pytest.raises(FileExistsError, match=r"mine holds files that differ.*: a\.cu$"):
        sources.copy_sources(mine)
    assert not (mine / "lib" / "h.cuh").exists()
    with sources.use_source(mine):
        sources.copy_sources(mine)
    assert (mine / "lib" / "h.cuh").read_text() == "// h"
    assert (mine / "a.cu").read_text() == "// edited"


# What they include


def test_includes_are_followed(packaged):
    text = '#include "one.cuh"\n  #  include   "lib/two.cuh" // says who\n#include <cuda_fp16.h>\n'
    folder(
        packaged,
        {
            "k.cu": text,
            "one.cuh": '#pragma once\n#include "lib/two.cuh"\n',
            "lib/two.cuh": '#pragma once\n#include "three.cuh"\n#include "../one.cuh"\n#include "four.cuh"\n',
            "lib/three.cuh": "",
            "four.cuh": '#include "k.cu"',
        },
    )
    k = sources.read("k")
    names = ["k.cu", "one.cuh", "lib/two.cuh", "lib/three.cuh", "four.cuh"]
    assert k.files == tuple(packaged / name for name in names)
    assert k.text == text
    assert set(k.resolved) == set(k.files)
    two = packaged / "lib" / "two.cuh"
    assert k.resolved[k.path] == (
        f'#include "{packaged / "one.cuh"}"\n#include "{two}" // says who\n#include <cuda_fp16.h>\n'
    )
    assert k.resolved[two].splitlines()[1:3] == [
        f'#include "{packaged / "lib" / "three.cuh"}"',
        f'#include "{packaged / "one.cuh"}"',
    ]


def test_what_only_looks_like_an_include_is_none(packaged):
    folder(packaged, {"real.cuh": ""})
    k = read_text(
        packaged,
        """
// #include "a.cuh" \\
#include "b.cuh"
/*
#include "c.cuh"
*/
const char* text = "/*"; const char quote = '"'; // "
const char* raw = R"x(
#include "d.cuh"
)" )x";
constexpr int MANY = 1'000; /* ' */
#include "real.cuh"
""",
    )
    assert [path.name for path in k.files] == ["k.cu", "real.cuh"]
    assert k.constants == {"MANY": 1000}


def test_the_chosen_folders_headers_come_first(tmp_path, packaged):
    folder(packaged, {"k.cu": '#include "lib/a.cuh"\n', "lib/a.cuh": '#include "b.cuh"\n', "lib/b.cuh": "// packaged"})
    mine = folder(tmp_path / "mine", {})
    with sources.use_source(mine):
        assert sources.read("k").files == tuple(packaged / name for name in ("k.cu", "lib/a.cuh", "lib/b.cuh"))
        folder(mine, {"lib/b.cuh": "// mine"})
        assert sources.read("k").files[2] == mine / "lib" / "b.cuh"
        folder(mine, {"k.cu": '#include "lib/a.cuh"\n// mine'})
        assert sources.read("k").files == (mine / "k.cu", packaged / "lib" / "a.cuh", mine / "lib" / "b.cuh")
    assert sources.read("k").files[2] == packaged / "lib" / "b.cuh"


def test_a_missing_header_names_file_and_line(packaged):
    folder(packaged, {"k.cu": '\n#include "a.cuh"\n', "a.cuh": '/*\n\n*/\n#include "gone.cuh"\n'})
    with pytest.raises(FileNotFoundError, match=r'^a\.cuh:4: error: no header "gone\.cuh" beside .*cuda_src'):
        sources.read("k")
    folder(packaged, {"gone.cuh": ""})
    assert len(sources.read("k").files) == 3


# When they change


def test_a_source_is_read_once(packaged, monkeypatch):
    folder(packaged, {"k.cu": '#include "a.cuh"', "a.cuh": ""})
    make_old(packaged / "k.cu", packaged / "a.cuh")
    k = sources.read("k")
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read again"))
    assert sources.read("k") is k


@pytest.mark.parametrize("name", ["k.cu", "a.cuh", "lib/b.cuh"])
def test_edits_are_noticed(packaged, name):
    files = {"k.cu": '#include "a.cuh"', "a.cuh": '#include "lib/b.cuh"', "lib/b.cuh": ""}
    folder(packaged, files)
    make_old(*(packaged / each for each in files))
    old = sources.read("k")
    path = packaged / name
    path.write_text(path.read_text() + "\n// edited")
    new = sources.read("k")
    assert new.fingerprint != old.fingerprint
    path.write_text(files[name])
    assert sources.read("k").fingerprint == old.fingerprint


def test_quick_edits_of_the_same_length_are_noticed(packaged):
    for number in range(200):
        assert read_text(packaged, f"constexpr int N = {number:3};").constants == {"N": number}


def test_the_same_text_gives_the_same_object(packaged):
    k = read_text(packaged, "// text")
    assert read_text(packaged, "// text") is k
    sources.reload()
    assert sources.read("k") is not k
    assert sources.read("k").fingerprint == k.fingerprint


def test_another_folder_is_noticed(tmp_path, packaged, monkeypatch):
    text = '#include "a.cuh"\n'
    folder(packaged, {"k.cu": text, "a.cuh": "// packaged"})
    mine = folder(tmp_path / "mine", {"other.cu": ""})
    make_old(packaged / "k.cu", packaged / "a.cuh")
    before = sources.read("k")
    monkeypatch.setenv("APPROXCONV_CUDA_SRC", str(mine))
    assert sources.read("k").path == packaged / "k.cu"
    folder(mine, {"a.cuh": "// mine"})
    assert sources.read("k").fingerprint != before.fingerprint
    folder(mine, {"k.cu": text, "a.cuh": "// packaged"})
    assert sources.read("k").path == mine / "k.cu"
    assert sources.read("k").fingerprint == before.fingerprint
    (mine / "k.cu").unlink()
    assert sources.read("k").path == packaged / "k.cu"


def test_contents_cannot_move_between_files_unseen(packaged):
    folder(packaged, {"k.cu": '#include "a.cuh"\n#include "b.cuh"\n', "a.cuh": "// 1\n", "b.cuh": "// 2\n"})
    before = sources.read("k").fingerprint
    folder(packaged, {"a.cuh": "// 1\n// 2\n", "b.cuh": ""})
    assert sources.read("k").fingerprint != before


def test_reload_calls_those_that_asked(monkeypatch):
    monkeypatch.setattr(sources, "_forgetters", [])
    called = []
    sources.on_reload(lambda: called.append(1))
    sources.reload()
    assert called == [1]


# What they state


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("256", 256),
        ("0x1F", 31),
        ("1'024u", 1024),
        ("A * 2 + 1", 9),
        ("(A + 1) << A % 3", 10),
        ("-7 / 2", -3),
        ("-7 % 3", -1),
        ("7 / -2", -3),
        ("+B", 16),
        ("B >> 2 /* a quarter */", 4),
        ("A *\n    A", 16),
        ("sizeof(int)", None),
        ("int(A)", None),
        ("C + 1", None),
        ("1 / 0", None),
        ("1 << 40", None),
        ("1 << -1", None),
        ("65536 * 65536", None),
        ("A ** 2", None),
        ("A == 4", None),
        ("'a'", None),
        ("1.5", None),
        ("A +", None),
    ],
)
def test_constants(packaged, expression, value):
    folder(packaged, {"a.cuh": "constexpr int A = 4;\n"})
    text = f'#include "a.cuh"\nstatic constexpr int B = A * A;\nconstexpr  int X\n= {expression};\n'
    expected = {"A": 4, "B": 16} | ({} if value is None else {"X": value})
    assert read_text(packaged, text).constants == expected


def test_only_constants_that_are_code_and_unambiguous_count(packaged):
    k = read_text(
        packaged,
        """
// constexpr int COMMENTED = 1;
const char* s = "constexpr int QUOTED = 1;";
constexpr int TWICE = 2;
struct S { static constexpr int TWICE = 1 + 1; static constexpr int OTHER = 1; };
constexpr int OTHER = 2;
constexpr unsigned UNSIGNED = 3;
const int NOT_CONSTEXPR = 4;
#if __CUDA_ARCH__ >= 900
constexpr int DEPENDS = sizeof(long);
#else
constexpr int DEPENDS = 8;
#endif
""",
    )
    assert k.constants == {"TWICE": 2}


def test_kernels(packaged):
    k = read_text(
        packaged,
        """
typedef unsigned char code;
struct Geometry { int rows, columns; };
template <typename T> __global__ void mangled(T x) {}
// extern "C" __global__ void commented(int x) {}
extern "C" __device__ void helper(int x) {}
extern "C" __global__ void plain(const code* __restrict__ x, int *y,
                                 unsigned long long n /* how many, at least 1 */) {}
extern "C" __global__ void __launch_bounds__(THREADS * (1 + 1), 2) __cluster_dims__(2, 1, 1)
    bounded(const __grid_constant__ Geometry g, Pair<int, code> p, const short *const * table, float& r) {}
extern "C"
__launch_bounds__(256)
__global__ void none() {}
extern "C" __global__ void nothing(void);
""",
    )
    parameters = {name: [(p.ctype, p.name) for p in known] for name, known in k.kernels.items()}
    assert parameters == {
        "plain": [("const code*", "x"), ("int*", "y"), ("unsigned long long", "n")],
        "bounded": [
            ("const Geometry", "g"),
            ("Pair<int, code>", "p"),
            ("const short*const*", "table"),
            ("float&", "r"),
        ],
        "none": [],
        "nothing": [],
    }


def test_kernels_of_headers_count(packaged):
    folder(packaged, {"a.cuh": 'extern "C" __global__ void in_header(int x) {}'})
    assert list(read_text(packaged, '#include "a.cuh"\n').kernels) == ["in_header"]


@pytest.mark.parametrize("parameter", ["int x[4]", "int", "void (*f)(int)"])
def test_parameters_that_cannot_be_told_are_named(packaged, parameter):
    with pytest.raises(ValueError, match=r"k\.cu: parameters of bad must be written 'type name', got"):
        read_text(packaged, f'extern "C" __global__ void bad({parameter}) {{}}')


def test_text_that_is_not_utf8_is_read(packaged):
    (packaged / "k.cu").write_bytes("constexpr int N = 1;  // größer\n".encode("latin-1"))
    assert sources.read("k").constants == {"N": 1}


def test_the_real_sources_are_read():
    for name in sources.list_sources():
        k = sources.read(name)
        assert k.kernels
        assert k.constants
        assert all(path.is_file() for path in k.files)
