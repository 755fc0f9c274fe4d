import json
import subprocess
import sys

import numpy as np
import pytest

from approxconv import Multiplier, get_multiplier, list_multipliers, load_multiplier
from approxconv.cli import main

DIALECT = "unsigned f(unsigned a, unsigned b) { return a * b; }"
COMMANDS = ("list", "show", "convert", "compare", "evaluate", "retrain", "demo", "doctor")
CIRCUIT = """// MAE = 0.25
// PDK45_PWR = 0.425 mW
uint8_t mul2u_T(const uint8_t B, const uint8_t A) { return (A * B) & 0xE; }
"""


@pytest.fixture
def circuit(tmp_path):
    path = tmp_path / "mul2u_T.c"
    path.write_text(CIRCUIT)
    return path


@pytest.fixture
def run(capsys):
    """Run a command that must succeed without a word on stderr; return what it printed."""

    def call(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return call


def test_list(run):
    assert run("list").split() == list_multipliers()
    assert run("list", "drum?_8u").split() == [f"drum{k}_8u" for k in range(2, 9)]
    assert json.loads(run("list", "mitchell_[78]u", "--json")) == ["mitchell_7u", "mitchell_8u"]


def test_show(run, circuit):
    shown = run("show", "drum4_8u_8s").splitlines()
    assert shown[0] == "drum4_8u_8s: activation uint8 × weight int8"
    figures = dict(line.split() for line in shown[1:11])
    metrics = get_multiplier("drum4_8u_8s").metrics()
    assert list(figures) == list(metrics)
    for key, value in metrics.items():
        assert float(figures[key].replace(",", "")) == pytest.approx(value, rel=1e-4, abs=0.5 * (value == round(value)))
    assert "-128 to 127" in shown[-1]
    text = run("show", circuit)
    assert "PDK45_PWR  0.425 mW" in text
    assert "MAE        0.25" in text


def test_show_json_says_what_there_is_to_know(run, circuit):
    m = load_multiplier(circuit)
    assert json.loads(run("show", circuit, "--json")) == {
        "name": "mul2u_T",
        "activation": "uint2",
        "weight": "uint2",
        "metrics": m.metrics(),
        "power_mW": 0.425,
        "info": {"MAE": "0.25", "PDK45_PWR": "0.425 mW"},
        "content_hash": m.content_hash,
    }


def test_show_png(run, tmp_path):
    assert f"{tmp_path / 'm.png'} written" in run("show", "kulkarni_4u", "--png", tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_s_warning_is_one_line_on_stderr(tmp_path, capsys):
    path = tmp_path / "mul2u_T.c"
    path.write_text(CIRCUIT.replace("0.25", "0.75"))
    assert main(["show", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["metrics"]["MAE"] == 0.25
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"approxconv: warning: {path}: ")
    assert "0.75" in captured.err
    assert "0.25" in captured.err


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".csv", ".bin", ".h"])
def test_convert_to_each_format_and_back(run, tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    said = run("convert", "trunc2_8u_8s", out)
    assert str(out) in said
    order = ["--order", "weight_first"] if suffix == ".h" else []
    described = json.loads(run("convert", out, tmp_path / "back.npz", "--name", "renamed", "--json", *order))
    assert described["output"] == str(tmp_path / "back.npz")
    back = load_multiplier(tmp_path / "back.npz")
    assert back == get_multiplier("trunc2_8u_8s")
    assert back.name == described["name"] == "renamed"


def test_convert_options(run, fails, tmp_path):
    m = get_multiplier("bam_h2_v4_4u")
    run("convert", m.name, tmp_path / "m.txt", "--to", "approxtorch", "--to-order", "weight_first")
    assert load_multiplier(tmp_path / "m.txt", a_signed=False, w_signed=False, order="weight_first") == m
    table = tmp_path / "table"
    np.save(table.open("wb"), m.table.T.numpy())
    run("convert", table, tmp_path / "m.npz", "--format", "npy", "--order", "weight_first", "--activation", "unsigned",
        "--weight", "unsigned")  # fmt: skip
    assert load_multiplier(tmp_path / "m.npz") == m
    assert "format=" in fails("convert", m.name, tmp_path / "out.txt")
    assert "c_model" in fails("convert", m.name, tmp_path / "out.c", "--to", "c_model")
    assert not (tmp_path / "out.txt").exists()


def test_convert_swaps_a_c_model(run, tmp_path):
    path = tmp_path / "f.c"
    path.write_text("unsigned char f(unsigned char a, signed char w) { return a ^ (w & 3); }")
    run("convert", path, tmp_path / "f.npz")
    run("convert", path, tmp_path / "g.npz", "--swap")
    f = load_multiplier(tmp_path / "f.npz")
    assert (f.a_signed, f.w_signed) == (False, True)
    assert load_multiplier(tmp_path / "g.npz") == f.swap()


def test_compare(run, circuit, tmp_path):
    text = run("compare", "drum4_8u", circuit, "--png", tmp_path / "c.png")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["multiplier"] == ["multiplier", "formats", "MAE", "WCE", "EP%", "MRE%", "MSE", "bias", "mW"]
    assert rows["drum4_8u"][1] == "uint8×uint8"
    assert rows["mul2u_T"][2:4] == ["0.25000", "1"]
    assert rows["mul2u_T"][-1] == "0.425"
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    described = json.loads(run("compare", "drum4_8u", circuit, "--json"))
    assert [each["name"] for each in described] == ["drum4_8u", "mul2u_T"]
    assert [each["power_mW"] for each in described] == [None, 0.425]
    assert "WCRE%" in run("compare", "drum4_8u", "--figure", "WCRE%")


def test_names_are_shown_as_they_are(run, tmp_path):
    path = tmp_path / "m.npz"
    Multiplier(np.zeros((4, 4), int), a_signed=False, w_signed=False, name="[red]a[/b]:x:", info={"[b]": "[/]"}).save(
        path
    )
    assert "[red]a[/b]:x:" in run("show", path)
    assert "[red]a[/b]:x:" in run("compare", path)
    assert "[b]" in run("show", path)


def test_a_folder_does_not_hide_a_zoo_name(run, tmp_path, monkeypatch):
    (tmp_path / "drum4_8u").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "drum4_8u: activation uint8" in run("show", "drum4_8u")


def test_options_for_files_only(run, fails, tmp_path, circuit):
    assert "drum4_8u is a name of the zoo, not a file; it takes no --swap" in fails("show", "drum4_8u", "--swap")
    assert "order is no option of format 'c_model'" in fails("show", circuit, "--order", "weight_first")
    path = tmp_path / "lut.npy"
    np.save(path, get_multiplier("bam_h2_v4_4u").table.numpy().astype(np.uint16).T)
    described = json.loads(run("compare", "drum4_8u", circuit, path, "--order", "weight_first", "--json"))
    assert described[2]["content_hash"] == get_multiplier("bam_h2_v4_4u").content_hash
    path = tmp_path / "f.c"
    path.write_text(DIALECT)
    assert "bits=" in fails("show", path)
    assert "f: activation uint4 × weight uint3" in run("show", path, "--bits", "4,3")


def test_what_a_file_says_does_not_reach_the_terminal_raw(run, fails, tmp_path):
    path = tmp_path / "m.npz"
    hostile = "a\x1b]0;title\x07\nb"
    Multiplier.exact(2).save(path)
    m = load_multiplier(path)
    m.name, m.info = hostile, {hostile: hostile}
    m.save(path)
    for command in ("show", "compare"):
        shown = run(command, path)
        assert "\x1b" not in shown
        assert "\x07" not in shown
        assert "a�]0;title� b" in shown
    assert fails("show", tmp_path / "no\nsuch.npz").count("\n") == 1


def test_convert_says_how_to_read_back_what_does_not_tell(tmp_path, capsys):
    m = Multiplier(np.arange(16).reshape(4, 4) % 5 - 2, a_signed=False, w_signed=True, name="m")
    m.save(tmp_path / "m.npz")
    assert main(["convert", str(tmp_path / "m.npz"), str(tmp_path / "m.csv")]) == 0
    assert "read it with --activation unsigned --weight signed" in capsys.readouterr().err
    assert load_multiplier(tmp_path / "m.csv", a_signed=False, w_signed=True) == m


@pytest.mark.parametrize("command", ["show", "compare", "convert"])
def test_what_is_not_there(fails, command, tmp_path):
    out = [tmp_path / "out.npz"] if command == "convert" else []
    assert "no multiplier 'drm4_8u'; did you mean" in fails(command, "drm4_8u", *out)
    assert "no such file" in fails(command, tmp_path / "none.npz", *out)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04")
    assert str(broken) in fails(command, broken, *out)
    assert "not a regular file" in fails(command, f"{tmp_path}/", *out)
    assert list(tmp_path.iterdir()) == [broken]


def test_other_mistakes_in_the_input(fails, tmp_path):
    assert "no multiplier's name matches 'x*'" in fails("list", "x*")
    assert "No such file or directory" in fails("show", "drum4_8u", "--json", "--png", tmp_path / "no" / "m.png")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"example: approxconv {command}" in text
    assert "--json" in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nope"],
        ["show"],
        ["convert", "drum4_8u"],
        ["compare"],
        ["compare", "drum4_8u", "--figure", "MRE"],
        ["show", "drum4_8u", "--format", "pickle"],
        ["show", "drum4_8u", "--order", "rows"],
        ["list", "--nope"],
        ["show", "drum4_8u", "--bits", "8x8"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: approxconv" in captured.err


def test_a_closed_pipe_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "approxconv", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
