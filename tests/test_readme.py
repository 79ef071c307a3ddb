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
    assert {shlex.split(line)[1] for line in lines} == {"ask", "eval", "export", "rescale"}
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


def test_the_peak_of_loading_is_the_one_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "load_memory-cpu.json").read_text())["metrics"]["bfloat16"]
    page = " ".join((ROOT / "docs" / "weights.md").read_text().split())
    said = f"{found['weights'] / 1e6:,.0f} MB of bf16 weights in the shape of Qwen3-1.7B are read with a peak of"
    assert f"{said} {found['peak'] / 1e6:,.0f} MB" in page


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "scripts" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(figures := importlib.util.module_from_spec(spec))
    return figures


def test_figures_and_plot_are_those_of_the_results(figures):
    assert figures.main(["--check"]) == 0, "run python scripts/figures.py"


def test_a_check_writes_nothing_and_says_what_is_stale(figures, tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    for page in figures.PAGES:
        (tmp_path / page).write_text(f"a\n{figures.START}\nold\n{figures.END}\nb\n")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    assert figures.main(["--check"]) == 1
    names = " and ".join((*figures.PAGES, "docs/tiling.svg", "docs/picture_size.svg"))
    assert capsys.readouterr().out == f"{names}: stale, run python scripts/figures.py\n"
    assert not (tmp_path / "docs" / "tiling.svg").exists()
    assert figures.main([]) == figures.main(["--check"]) == 0
    for page in figures.PAGES:
        assert (tmp_path / page).read_text() == f"a\n{figures.figures(page)}\nb\n"


def test_runs_of_tiles_are_told_and_one_left_out_is_a_dash(figures):
    def row(side, whole):
        sizes = dict.fromkeys(figures.TILING, 2e6) | {"serial": 1e6, "whole": whole}
        over = {way: n and n / 1e6 for way, n in sizes.items() if way != "serial"}
        return {"side": side, "bytes": sizes, "over_serial": over, "seconds": {w: n and 3.0 for w, n in sizes.items()}}

    branch = {"analysis": [row(512, 3e6), row(1024, 30e6)], "measured": [row(512, 4e6), row(1024, None)]}
    told = {"metrics": {"base": branch, "large": branch}, "command": "c", "machine": {"kind": "cpu", "cores": 2}}
    lines = figures.tiling(told)
    assert "| serial tiles | 1 | 1 | 1 | 1 | 3 s, 1 | 3 s, 1 |" in lines
    assert "| whole | 3 (3.0 x) | 30 (30 x) | 3 (3.0 x) | 30 (30 x) | - | - |" in lines
    plot = figures.plot(told)
    assert [plot.count(f'class="dot {name}"') for name in ("whole", "whole run", "serial run")] == [4, 4, 8]
