"""The wheel has what an installed copy needs, and nothing of the clone has to be beside it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hypervl_jax.needs import DEFAULT

ROOT = Path(__file__).parents[1]


def test_the_wheel_answers_by_itself(tmp_path):
    pytest.importorskip("hatchling", reason="building a wheel needs the dev extra")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 16e6
    files = zipfile.ZipFile(wheel)
    names = files.namelist()
    weights = [n for n in names if n.startswith("hypervl_jax/weights/")]
    assert 0 < sum(files.getinfo(n).file_size for n in weights) <= 8e6
    assert any(n.endswith("licenses/NOTICE") for n in names)
    files.extractall(tmp_path / "site")
    code = "import sys, hypervl_jax.cli as c; assert sys.argv[1] in c.__file__; c.main(['ask', sys.argv[2], 'q'])"
    argv = [sys.executable, "-c", code, str(tmp_path), str(ROOT / "examples" / "screen.png")]
    said = subprocess.run(
        argv, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path, capture_output=True
    )
    assert said.returncode == 0, said.stderr.decode()
    assert said.stdout.strip()
    assert any(n.startswith(f"hypervl_jax/weights/{DEFAULT}/") for n in names)
