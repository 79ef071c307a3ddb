"""What the README tells a newcomer to type works, and its figures are those that a script wrote.

Blocks marked ```sh and ```python are run, with these words replaced: `quickstart/model` by a model folder of the tiny
preset, `examples/screen.png` by its path, `phone` by a folder of this test. Unmarked blocks
may name `make` targets only.
"""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from hypervl_jax import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture(scope="module")
def typed(tiny_folder, tmp_path_factory):
    """The words of a README line -> words to run here."""
    here = {
        "examples/screen.png": ROOT / "examples" / "screen.png",
        "quickstart/model": tiny_folder,
        "phone": tmp_path_factory.mktemp("readme") / "phone",
    }
    return lambda text: re.sub("|".join(map(re.escape, here)), lambda m: str(here[m[0]]), text)


def test_commands_run(typed, tmp_path, monkeypatch, capsys):
    pytest.importorskip("litert_converter", reason="the LiteRT converter has no wheel here")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert {shlex.split(line)[1] for line in lines} == {"ask", "eval", "export"}
    for line in lines:
        program, *argv = shlex.split(typed(line))
        assert program == "hypervl"
        cli.main(argv)
        assert capsys.readouterr().out, line


def test_python_runs(typed, capsys):
    [code] = blocks("python")
    exec(compile(typed(code), "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join([*blocks(""), *re.findall(r"`([^`\n]+)`", README)])))
    assert {"quickstart", "test", "lint"} <= named
    assert named <= targets


def test_files_named_exist():
    words = " ".join(re.findall(r"`([^`\n]+)`", README)).split()
    made = ("quickstart/", "src/hypervl_jax/weights")
    paths = [w for w in words if re.fullmatch(r"[\w./-]+/[\w./-]*", w) and not w.startswith((".venv", *made))]
    assert paths
    assert not [p for p in paths if not (ROOT / p).exists()]
    for page in ("architecture", "decisions", "data", "training", "weights", "export"):
        assert (ROOT / "docs" / f"{page}.md").is_file()


def test_memory_figures_are_those_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "tiling_memory-cpu.json").read_text())
    assert found["command"] in README
    rows = {r["tiles"]: r for r in found["metrics"]["hypervl_1p7b"]}
    said = re.search(r"sizes (\S+) MB .* at (\d+) tiles and at (\d+), .* takes (\S+) GB and (\S+) GB", README)
    assert said, "the row about memory reads differently"
    few, many = (rows[int(n)] for n in said.group(2, 3))
    assert {f"{r['serial'] / 1e6:.1f}" for r in (few, many)} == {said[1]}
    assert (f"{few['whole'] / 1e9:.1f}", f"{many['whole'] / 1e9:.1f}") == said.group(4, 5)


def test_the_peak_of_loading_is_the_one_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "load_memory-cpu.json").read_text())["metrics"]["bfloat16"]
    page = " ".join((ROOT / "docs" / "weights.md").read_text().split())
    said = f"{found['weights'] / 1e6:,.0f} MB of bf16 weights in the shape of Qwen3-1.7B are read with a peak of"
    assert f"{said} {found['peak'] / 1e6:,.0f} MB" in page


def test_figures_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "scripts" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(figures := importlib.util.module_from_spec(spec))
    assert figures.figures() in README, "run python scripts/figures.py"
