"""Wrong and odd arguments at every public door: an error that names the argument, or a right result (tests/fuzz.py)."""

import importlib
import inspect
import os

import fuzz
import pytest


def judged(count: int, seed: int) -> list[str]:
    """Cases that went wrong, in words."""
    wrong = []
    for door, argument, k in fuzz.cases(count, seed):
        verdict, detail = fuzz.run(door, argument, fuzz.odd()[k])
        if verdict not in ("error", "result"):
            wrong.append(f"{verdict}: {door.name}({argument}={' '.join(repr(fuzz.odd()[k]).split())[:60]}): {detail}")
    return wrong


def test_every_public_function_has_a_door_or_a_reason() -> None:
    """A new public function is fuzzed, or LEFT_OUT says why not."""
    known = {door.name for door in fuzz.doors()} | set(fuzz.LEFT_OUT)
    functions = {inspect.unwrap(door.function) for door in fuzz.doors()}
    missing = []
    for package in fuzz.PACKAGES:
        module = importlib.import_module(f"cvi_nb.{package}")
        for name in getattr(module, "__all__", []):
            function, label = getattr(module, name), f"{package}.{name}"
            if inspect.isfunction(function) and label not in known and inspect.unwrap(function) not in functions:
                missing += [] if name.startswith(("check_", "register")) else [label]
    assert missing == []


@pytest.mark.parametrize("seed", range(4))
def test_doors(seed: int) -> None:
    assert judged(250, seed) == []


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CVI_FUZZ"), reason="minutes: CVI_FUZZ=10000 make test PYTEST_ARGS=-kmany")
def test_many_doors() -> None:
    assert judged(int(os.environ.get("CVI_FUZZ", "10000")), 100) == []
