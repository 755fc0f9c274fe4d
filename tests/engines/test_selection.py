"""Which engine runs: the keyword, then the innermost `use_engine` of this context, then the device."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from approxconv import EngineError, use_engine
from approxconv.engines import ENGINES, cpu, reference, select

CODES = torch.arange(18, dtype=torch.uint8).view(1, 2, 3, 3)
TABLE = torch.arange(256, dtype=torch.int32).view(16, 16)
GEOMETRY = [1, 1], [0, 0], [1, 1]
OPERATORS = {
    "lut_matmul": (CODES[0, 0], CODES[0, 1], TABLE),
    "lut_conv2d": (CODES, CODES, TABLE, *GEOMETRY, 1, 0),
    "lut_dwconv2d": (CODES, CODES.transpose(0, 1), TABLE, *GEOMETRY, 0),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS)


def call(operator, **keywords):
    return getattr(torch.ops.approxconv, operator)(*OPERATORS[operator], **keywords)


def chosen(name="auto", device="cpu"):
    return select(name, torch.device(device)).__name__.rpartition(".")[2]


@pytest.fixture
def calls(monkeypatch):
    """``(engine, operator)`` of what ran, in order."""
    seen = []
    for engine in (reference, cpu):
        for operator in OPERATORS:
            original = getattr(engine, operator)

            def run(*args, original=original, name=engine.__name__, operator=operator):
                if not seen or seen[-1][0] != name:  # an operator may call another of its own engine
                    seen.append((name, operator))
                return original(*args)

            monkeypatch.setattr(engine, operator, run)
    return seen


@every_operator
@pytest.mark.parametrize(
    ("keyword", "around", "expected"),
    [
        (None, (), cpu),
        (None, ("reference",), reference),
        (None, ("reference", "cpu"), cpu),
        (None, ("reference", "auto"), cpu),
        ("auto", ("reference",), reference),
        ("reference", (), reference),
        ("reference", ("cpu",), reference),
        ("cpu", ("reference",), cpu),
        ("cpu", ("cuda",), cpu),
    ],
)
def test_the_keyword_beats_the_context_beats_the_device(operator, keyword, around, expected, calls):
    with ExitStack() as contexts:
        for name in around:
            contexts.enter_context(use_engine(name))
        call(operator, **({} if keyword is None else {"engine": keyword}))
    assert calls == [(expected.__name__, operator)]


def test_contexts_nest_and_restore():
    seen = [chosen()]
    with use_engine("reference"):
        seen.append(chosen())
        with use_engine("cpu"):
            seen.append(chosen())
            with use_engine("auto"), use_engine("reference"):
                seen.append(chosen())
            seen.append(chosen())
        seen.append(chosen())
    seen.append(chosen())
    assert seen == ["cpu", "reference", "cpu", "reference", "cpu", "reference", "cpu"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, GeneratorExit])
def test_contexts_restore_after_an_exception(error):
    with use_engine("reference"):
        with pytest.raises(error), use_engine("cpu"):
            raise error
        assert chosen() == "reference"
        with pytest.raises(ValueError), use_engine("abacus"):
            pass
        assert chosen() == "reference"
        with pytest.raises(EngineError), use_engine("cuda"):
            call("lut_matmul")
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_a_context_is_its_thread_s_own():
    names = ("reference", "cpu", None, "reference", "cpu", None)
    entered, looked = threading.Barrier(len(names)), threading.Barrier(len(names))

    def work(name):
        if name is None:
            entered.wait()
            found = chosen()
            looked.wait()
            return found, chosen()
        with use_engine(name):
            entered.wait()
            found = chosen()
            looked.wait()
        return found, chosen()

    with ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(work, names, timeout=60))
    assert found == [(name or "cpu", "cpu") for name in names]


def test_a_context_is_its_task_s_own():
    async def work(name, own, other):
        with use_engine(name):
            own.set()
            await other.wait()
            return chosen()

    async def main():
        first, second = asyncio.Event(), asyncio.Event()
        found = await asyncio.gather(work("reference", first, second), work("cpu", second, first))
        return [*found, chosen()]

    with use_engine("reference"):
        assert asyncio.run(main()) == ["reference", "cpu", "reference"]


@pytest.mark.parametrize("name", ["abacus", "Abacus_cpu", "", None, 3])
def test_unknown_engines_are_refused_with_a_list(name):
    listing = "(?s)" + "".join(f"(?=.*{known!r})" for known in ("auto", *ENGINES, name))
    for refused in (lambda: use_engine(name).__enter__(), lambda: select(name, torch.device("cpu"))):
        with pytest.raises(ValueError, match=listing):
            refused()
    for operator in OPERATORS if isinstance(name, str) else ():
        with pytest.raises(ValueError, match=listing):
            call(operator, engine=name)


@pytest.mark.parametrize(
    ("name", "device"), [("cpu", "cuda"), ("cpu", "cuda:1"), ("cpu", "meta"), ("cuda", "cpu"), ("cuda", "meta")]
)
@pytest.mark.parametrize("by_context", [False, True])
def test_an_engine_on_the_wrong_device_says_so(name, device, by_context):
    with use_engine(name if by_context else "auto"), pytest.raises(EngineError, match=f"'{name}'.*{device}"):
        select("auto" if by_context else name, torch.device(device))


@every_operator
def test_operators_refuse_an_engine_of_another_device(operator):
    with pytest.raises(EngineError, match=r"'cuda'.*cpu"):
        call(operator, engine="cuda")
    with use_engine("cuda"), pytest.raises(EngineError, match=r"'cuda'.*cpu"):
        call(operator)


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_the_oracle_runs_on_any_device(device):
    assert chosen("reference", device) == "reference"
