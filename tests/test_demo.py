import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from approxconv import Multiplier
from approxconv.cli import main
from approxconv.demo import Schedule, run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    arguments = ["demo", "--quick", "--out", str(out)]
    for name in ("drum6_8u_8s", "trunc5_8u_8s", "bam_h0_v10_8u_8s"):
        arguments += ["--multiplier", name]
    assert main(arguments) == 0
    return out, json.loads((out / "results.json").read_text())


def test_every_multiplier_has_its_row(results):
    _, report = results
    names = [row["multiplier"] for row in report["results"]]
    assert names == ["exact_8u_8s", "drum6_8u_8s", "trunc5_8u_8s", "bam_h0_v10_8u_8s"]
    for row in report["results"]:
        assert row["images_per_second"] > 0
        assert row["accuracy_8bit"] == report["results"][0]["accuracy_8bit"]
    assert report["results"][0]["error"]["MAE"] == 0
    assert report["results"][0]["accuracy_approximate"] == report["results"][0]["accuracy_8bit"]


def test_the_network_learns_and_retraining_recovers(results):
    _, report = results
    assert report["accuracy_float"] > 95
    brutal = report["results"][2:]
    assert all(row["accuracy_8bit"] - row["accuracy_approximate"] >= 5 for row in brutal)
    assert all(row["accuracy_retrained"] - row["accuracy_approximate"] >= 20 for row in brutal)


def test_the_plot_is_a_picture(results):
    import matplotlib.image

    out, _ = results
    picture = matplotlib.image.imread(out / "accuracy.png")
    assert min(picture.shape[:2]) > 400
    assert picture.std() > 0.01


def test_same_seed_same_accuracies(results, tmp_path):
    _, report = results
    arguments = ["demo", "--quick", "--out", str(tmp_path), "--multiplier", "trunc5_8u_8s"]
    assert main(arguments) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["accuracy_float"] == report["accuracy_float"]
    row, first = again["results"][1], report["results"][2]
    for key in ("multiplier", "accuracy_8bit", "accuracy_approximate", "accuracy_retrained"):
        assert row[key] == first[key]


def test_multiplier_from_a_file(tmp_path, capsys):
    path = tmp_path / "mine.npz"
    Multiplier.from_function(lambda a, w: a * w + 1, a_signed=False, w_signed=True).save(path)
    assert main(["demo", "--quick", "--multiplier", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "mine" in capsys.readouterr().out


NO_DEVICES = ("nonsense", "", "meta", "mps", "xpu", "xpu:1", "cpu:1", "cuda:-1", "cuda:x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--multiplier", "drum99_8u"], "drum99_8u"),
        (["--multiplier", "missing.npz"], "missing.npz"),
        *((["--device", name], f"--device must be cpu, cuda or cuda:N, got '{name}'") for name in NO_DEVICES),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device"),
        ),
    ],
)
def test_mistakes_are_said_without_a_traceback(arguments, message, capsys, tmp_path):
    assert main(["demo", "--quick", "--out", str(tmp_path / "out"), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_cuda_device_that_is_not_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda:2", "cuda:200"):
        assert main(["demo", "--quick", "--out", str(tmp_path / "out"), "--device", name]) == 1
        assert f"--device {name}: torch sees 2 CUDA devices" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999", "1.5", "", "x", "1" * 5000])
def test_a_wrong_seed(seed, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--quick", "--out", str(tmp_path / "out"), "--seed", seed])
    assert "argument --seed: must be an int from 0 to 4294967295" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def one_thread():
    """For work this small, OpenMP threads only wait for each other, for minutes where the cores are taken."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # rich draws progress in a thread
def test_names_are_shown_as_they_are(tmp_path, capsys):
    """Whatever they mean to rich or to matplotlib; so is the folder."""
    names = ["a[/b]", "[red]c", "$_$", "e:x:"]
    table = Multiplier.exact().table
    multipliers = [Multiplier(table, a_signed=False, w_signed=True, name=name) for name in names]
    out = tmp_path / "[" / "folder]"
    run(multipliers, device=torch.device("cpu"), out=out, seed=2**32 - 1, schedule=Schedule(train=0, retrain=0))
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    assert [row["multiplier"] for row in json.loads((out / "results.json").read_text())["results"]] == names
    assert (out / "accuracy.png").exists()


def test_wrong_usage_exits_with_2():
    result = subprocess.run([sys.executable, "-m", "approxconv", "demo", "--nope"], capture_output=True, check=False)
    assert result.returncode == 2


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert len(rows) >= 6
    lost = [row for row in rows if row["accuracy_8bit"] - row["accuracy_approximate"] >= 5]
    recovered = [row for row in lost if row["accuracy_retrained"] - row["accuracy_approximate"] >= 5]
    assert len(recovered) >= 2


def test_readme_examples_run(tmp_path):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = [block.split("```")[0] for block in readme.split("```python\n")[1:]]
    assert len(blocks) >= 2
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    subprocess.run([sys.executable, str(script)], check=True, cwd=tmp_path)
