"""The arithmetic of benchmarks/hcd.py, on pairs without weights."""

import numpy as np
import pytest

from hypervl_jax.rescale import metrics
from hypervl_jax.rescale.hcd import Descent, HcdConfig
from hypervl_jax.rescale.irn import Irn
from hypervl_jax.rescale.pairs import Bicubic, Pair
from hypervl_jax.rescale.resample import bicubic


@pytest.fixture(scope="module")
def bench(load):
    return load("hcd")


@pytest.fixture(scope="module")
def found(bench):
    """Two pictures by two ways, and the pictures."""
    hr = np.random.default_rng(0).integers(0, 256, (2, 24, 16, 3), np.uint8)
    moved = HcdConfig(hr_steps=0, lr_steps=3, lr=Descent(start="zero"))
    ways = {"plain": HcdConfig(hr_steps=0, lr_steps=0), "LR3": moved}
    rows = bench.measure(Pair(Bicubic(2), {}), 2, hr, ways, draws=2)
    return {way: dict(zip("ab", r, strict=True)) for way, r in rows.items()}, hr


def test_plain_figures_are_those_of_bicubic(found):
    rows, hr = found
    want = metrics.psnr(bicubic(bicubic(hr[1], (12, 8)), (24, 16)), hr[1], 2)
    assert rows["plain"]["b"]["psnr_y"] == pytest.approx(want, abs=0.05)  # which rounds once more on the way
    assert rows["plain"]["b"]["lr_psnr"] == np.inf


def test_gains_and_means_are_over_pictures(bench, found, capsys):
    rows, _ = found
    by_hand = [rows["LR3"][k]["psnr_y"] - rows["plain"][k]["psnr_y"] for k in "ab"]
    assert bench.gains(rows, "LR3") == by_hand
    assert min(by_hand) > 0
    assert bench.mean(rows["plain"], "ssim_y") == pytest.approx(np.mean([rows["plain"][k]["ssim_y"] for k in "ab"]))
    bench.table("two", rows)
    assert f"{bench.mean(rows['LR3'], 'psnr_y'):.3f}" in capsys.readouterr().out


def test_missing_data_is_said(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["hcd.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="name their folder with --data"):
        bench.main()


def test_the_loop_in_pytorch_is_ours(load, capsys):
    pytest.importorskip("torch", reason="needs the parity extra")
    speed = load("hcd_speed")
    found = speed.beside_torch(speed.drawn(Irn((1,), growth=2)), speed.picture(32), 2, 1, 1e11)
    assert found["apart"] < 1e-5
    assert found["ratio"] == pytest.approx(found["rounds"][0]["torch"] / found["rounds"][0]["jax"])
    assert "times as fast" in capsys.readouterr().out
