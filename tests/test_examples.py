"""Every example runs as its own process, as a reader would run it, and its own checks hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LINES = {
    "chat.py": (
        "3 turns, 2 pictures shown, 1 encoded",
        "from functions: the same answers",
        "sampled with seed 0: ",
    ),
    "compose.py": (
        "jit of vmap, all pictures in one program: equal",
        "lax.map, one tile at a time in constant memory: equal",
        "pmap, a picture a device: equal",
        "shard_map over a mesh: equal",
        "jit over a sharded array: equal",
        "step by step and in one program",
    ),
    "lora.py": ("right 0% -> ",),
}


def run(*args: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # the example chooses its own devices
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=300, env=env, check=False)


def test_every_example_is_tested():
    assert {p.name for p in EXAMPLES.glob("*.py")} == set(LINES)


@pytest.mark.parametrize("name", LINES)
def test_example(name):
    done = run(str(EXAMPLES / name))
    assert done.returncode == 0, done.stderr
    assert all(line in done.stdout for line in LINES[name]), done.stdout
