"""The plan against the published table, golden vectors, a brute-force oracle, and its own promises on random sizes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypervl_jax import plan as plans
from hypervl_jax.config import PlanPolicy
from hypervl_jax.plan import PlanError, Tile, VisionPlan, make
from hypervl_jax.presets import hypervl_1p7b

GOLDEN = Path(__file__).parent / "golden" / "plans.json"
MODES = ("native_pad", "grid_match", "grid_pad")
SMALL = PlanPolicy(tile=64, patch=8, max_tiles=9, min_side=16)

aspects = st.floats(math.log(1 / 200), math.log(200)).map(math.exp)
sizes = st.one_of(
    st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
    st.tuples(st.integers(1, 9000), aspects).map(lambda s: (s[0], min(200_000, max(1, round(s[0] * s[1]))))),
)
ratios = st.one_of(st.just(1.0), st.floats(0.1, 1.0), st.floats(1e-6, 1.0))
policies = st.builds(
    PlanPolicy,
    tile=st.sampled_from([64, 96, 224, 256, 512]),
    patch=st.sampled_from([8, 16]),
    mode=st.sampled_from(MODES),
    max_tiles=st.integers(1, 40),
    thumbnail=st.booleans(),
    drop_pad=st.booleans(),
    min_side=st.integers(1, 600),
)

# Sequence lengths and vision FLOPs at T = 512: (width, height), ratio, size after, (cols, rows), tokens of all tile
# cells, of real cells, with a whole thumbnail, TFLOP of Base and of Large.
TABLE = [
    ((448, 448), 1.0, (448, 448), (1, 1), 256, 196, 196, 0.21, 0.72),
    ((512, 512), 1.0, (512, 512), (1, 1), 256, 256, 256, 0.21, 0.72),
    ((640, 480), 1.0, (640, 480), (2, 1), 512, 300, 556, 0.64, 2.17),
    ((640, 480), 0.5, (453, 339), (1, 1), 256, 165, 165, 0.21, 0.72),
    ((1024, 768), 1.0, (1024, 768), (2, 2), 1024, 768, 1024, 1.07, 3.62),
    ((1024, 768), 0.5, (724, 543), (2, 2), 1024, 391, 647, 1.07, 3.62),
    ((1024, 1024), 1.0, (1024, 1024), (2, 2), 1024, 1024, 1280, 1.07, 3.62),
    ((1080, 2400), 1.0, (1080, 2400), (3, 5), 3840, 2550, 2806, 3.42, 11.57),
    ((1080, 2400), 0.8, (966, 2147), (2, 5), 2560, 2108, 2364, 2.35, 7.95),
    ((1080, 2400), 0.1, (342, 759), (1, 2), 512, 264, 520, 0.64, 2.17),
    ((1920, 1080), 1.0, (1920, 1080), (4, 3), 3072, 2040, 2296, 2.78, 9.40),
    ((1920, 1080), 0.5, (1358, 764), (3, 2), 1536, 1032, 1288, 1.50, 5.06),
    ((2480, 3508), 1.0, (2480, 3508), (5, 7), 8960, 8580, 8836, 7.70, 26.03),
    ((2480, 3508), 0.1, (784, 1109), (2, 3), 1536, 875, 1131, 1.50, 5.06),
]


@pytest.mark.parametrize(("wh", "ratio", "after", "cr", "pad", "drop", "with_thumb", "base", "large"), TABLE)
def test_published_table(wh, ratio, after, cr, pad, drop, with_thumb, base, large):
    p = make(wh[::-1], ratio)
    assert (p.resized, p.grid, p.tokens) == (after[::-1], cr[::-1], with_thumb)
    assert make(wh[::-1], ratio, PlanPolicy(thumbnail=False)).tokens == drop
    assert make(wh[::-1], ratio, PlanPolicy(thumbnail=False, drop_pad=False)).tokens == pad
    model = hypervl_1p7b().model
    assert [round(p.vit_flops(model.vit(b)) / 1e12, 2) for b in ("base", "large")] == [base, large]


def golden_cases() -> list[VisionPlan]:
    """What `python tests/test_plan.py` writes down: sizes of every shape under every mode."""
    sizes = [(1, 1), (1, 4000), (4000, 1), (480, 640), (2400, 1080), (3508, 2480), (4320, 7680), (97, 193), (5000, 25)]
    sizes += [(5000, 1080), (288, 32)]
    policies = [PlanPolicy(), *(replace(SMALL, mode=m) for m in MODES), PlanPolicy(tile=96, patch=8, max_tiles=6)]
    return [make(s, r, p) for p in policies for s in sizes for r in (1.0, 0.35)]


def test_golden_vectors():
    """Plans never change by accident: phones and checkpoints hold on to them."""
    for found, expected in zip(json.loads(GOLDEN.read_text()), golden_cases(), strict=True):
        assert VisionPlan.from_json(json.dumps(found)) == expected
        assert json.dumps(found, sort_keys=True) == expected.to_json()


@settings(deadline=None)
@given(sizes, ratios, policies)
def test_promises(size, ratio, policy):
    p = make(size, ratio, policy)
    t, (rows, cols), (rh, rw) = policy.tile, p.grid, p.resized
    assert 1 <= rows * cols <= policy.max_tiles
    assert max(rows, cols) <= 8  # markers in the text end there
    assert p.n_tiles == rows * cols + (policy.thumbnail and rows * cols > 1) == len(p.patch_mask())
    assert (p.thumb is not None) == p.tiles[-1].is_thumbnail
    assert 0 <= p.offset[0] <= rows * t - rh
    assert 0 <= p.offset[1] <= cols * t - rw
    assert sum(x.height * x.width for x in p.tiles if not x.is_thumbnail) == rh * rw
    assert all(x.height > 0 and x.width > 0 and x.top + x.height <= t and x.left + x.width <= t for x in p.tiles)
    assert [(x.row, x.col) for x in p.tiles[: rows * cols]] == [(r, c) for r in range(rows) for c in range(cols)]
    assert p.patch_mask().any(axis=1).all()  # no tile without a key to attend to
    # Tokens are the kept cells, and a kept cell outside the thumbnail holds real patches.
    assert p.tokens == sum(len(p.cells(i)) for i in range(p.n_tiles)) == sum(map(p.tokens_of, range(p.n_tiles)))
    for i, mask in enumerate(p.patch_mask()):
        side, m = policy.cells_per_side, policy.merge
        cells = np.flatnonzero(mask.reshape(side, m, side, m).any(axis=(1, 3)))
        every = p.tiles[i].is_thumbnail or not policy.drop_pad
        np.testing.assert_array_equal(p.cells(i), np.arange(side * side) if every else cells)
    if policy.mode == "native_pad":
        native_promises(p)
    assert VisionPlan.from_json(p.to_json()) == p
    assert hash(VisionPlan.from_json(p.to_json())) == hash(p)


def native_promises(p: VisionPlan) -> None:
    (h, w), (rh, rw), policy = p.size, p.resized, p.policy
    assert rh <= h  # never larger
    assert rw <= w
    shrunk = [max(min(side, policy.min_side), math.floor(side * p.ratio**0.5 + 0.5)) for side in p.size]
    grid = [math.ceil(side / policy.tile) for side in shrunk]
    capped = math.prod(grid) > policy.max_tiles or max(grid) > 8
    assert capped or shrunk == [rh, rw]
    floor = min(policy.min_side, policy.tile) if capped else policy.min_side
    assert rh >= min(h, floor)
    assert rw >= min(w, floor)
    if rh > floor and rw > floor:  # no side held at the minimum: the aspect is kept to the pixel
        assert abs(rh - h * rw / w) < 1 + h / w
        assert min(abs(rh - h * rw / w), abs(rw - w * rh / h)) < 1
    if policy.drop_pad and p.thumb is None:
        cells = rh / policy.cell, rw / policy.cell
        assert math.prod(cells) <= p.tokens <= math.prod(cells) + sum(cells) + 1


@settings(deadline=None)
@given(sizes, ratios, policies, st.floats(0, 1), st.floats(0, 1), st.sampled_from([1, 100, 1000]))
def test_coordinates_round_trip(size, ratio, policy, fx, fy, coords):
    p = make(size, ratio, policy)
    h, w = size
    x, y = fx * w, fy * h
    text = p.to_text((x, y), coords)
    assert all(isinstance(v, int) and 0 <= v < coords for v in text)
    back = p.to_pixels(text, coords)
    assert abs(back[0] - x) <= w / coords / 2 + 1e-6
    assert abs(back[1] - y) <= h / coords / 2 + 1e-6
    assert p.to_text(back, coords) == text
    assert text == make(size, 0.1, policy).to_text((x, y), coords)  # the ratio leaves the text alone
    cx, cy = p.pixels_to_canvas((x, y))
    assert p.offset[1] - 1e-6 <= cx <= p.offset[1] + p.resized[1] + 1e-6
    assert p.offset[0] - 1e-6 <= cy <= p.offset[0] + p.resized[0] + 1e-6
    assert p.canvas_to_pixels((cx, cy)) == pytest.approx((x, y), abs=1e-6)
    # A whole canvas pixel names the original to half a canvas pixel.
    near = p.canvas_to_pixels((math.floor(cx) + 0.5, math.floor(cy) + 0.5))
    assert abs(near[0] - x) <= 0.5 * w / p.resized[1] + 1e-6
    assert abs(near[1] - y) <= 0.5 * h / p.resized[0] + 1e-6


def test_boxes_and_edges():
    p = make((100, 200))
    assert p.to_text((0, 0, 200, 100), 100) == (0, 0, 99, 99)
    assert p.to_text((10, 10, 20, 20), 100) == (5, 10, 10, 20)
    assert p.to_pixels((5, 10), 100) == (11.0, 10.5)
    for bad in [(), (1,), (1, 2, 3), (-1, 5), (5, 101), (math.nan, 1), (math.inf, 1), (10**400, 1)]:
        with pytest.raises(PlanError):
            p.to_text(bad)
    for bad in [(100, 0), (0, -1), (10**400, 1)]:
        with pytest.raises(PlanError):
            p.to_pixels(bad, 100)


def oracle_match(h, w, t, most):
    """InternVL's loop, in floats: grids by area, later ones win a tie if the picture covers half of them."""
    best, nearest = (1, 1), math.inf
    for r, c in sorted(((r, c) for r in range(1, 9) for c in range(1, 9) if r * c <= most), key=math.prod):
        error = abs(w / h - c / r)
        if error < nearest or (error == nearest and w * h > 0.5 * t * t * r * c):
            best, nearest = (r, c), error
    return best


def oracle_pad(h, w, t, most):
    """LLaVA-NeXT's rule, in fractions of a tile: most pixels kept, then least waste."""
    kept = {}
    for r in range(1, 9):
        for c in range(1, min(8, most // r) + 1):
            down_h, down_w = (h * c * t // w, c * t) if c * t * h <= r * t * w else (r * t, w * r * t // h)
            kept[r, c] = min(down_h * down_w, h * w), -r * c
    return kept, max(kept.values())


@settings(deadline=None)
@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), st.integers(1, 12))
def test_grid_modes_against_oracles(size, most):
    policy = replace(SMALL, max_tiles=most)
    p = make(size, 1.0, replace(policy, mode="grid_match"))
    r, c = oracle_match(*size, 64, most)
    assert math.isclose(abs(size[1] / size[0] - p.grid[1] / p.grid[0]), abs(size[1] / size[0] - c / r), rel_tol=1e-12)
    assert p.resized == (p.grid[0] * 64, p.grid[1] * 64)
    assert p.thumb in (None, (64, 64))

    p = make(size, 1.0, replace(policy, mode="grid_pad"))
    kept, best = oracle_pad(*size, 64, most)
    assert kept[p.grid] == best
    assert p.resized[0] == p.grid[0] * 64 or p.resized[1] == p.grid[1] * 64
    assert abs(p.resized[0] - size[0] * p.resized[1] / size[1]) < 1 + size[0] / size[1]
    assert p.offset == ((p.grid[0] * 64 - p.resized[0]) // 2, (p.grid[1] * 64 - p.resized[1]) // 2)


def test_hand_worked_grids():
    internvl = PlanPolicy(tile=448, patch=16, mode="grid_match", max_tiles=12)
    assert make((600, 800), policy=internvl).grid == (3, 4)
    assert make((448, 448), policy=internvl).grid == (1, 1)  # 2 x 2 ties, but the picture covers a quarter of it
    assert make((1000, 1000), policy=internvl).grid == (3, 3)
    assert make((700, 700), policy=internvl).grid == (2, 2)
    p = make((100, 350), policy=replace(SMALL, mode="grid_pad", max_tiles=4))
    assert (p.grid, p.resized, p.offset) == ((1, 4), (64, 224), (0, 16))
    assert p.tiles[0] == Tile(0, 0, 0, 16, 64, 48)
    assert p.thumb == (18, 64)
    assert p.tiles[-1] == Tile(-1, -1, 23, 0, 18, 64)


def test_extremes():
    assert make((1, 1)).resized == (1, 1)
    assert make((1, 1)).tokens == 1
    thin = make((1, 4000))
    assert (thin.resized, thin.grid, thin.thumb) == ((1, 4000), (1, 8), (1, 512))
    assert thin.tokens == 125 + 256
    eight_k = make((4320, 7680))
    assert math.prod(eight_k.grid) <= 36
    assert eight_k.resized[0] / eight_k.resized[1] == pytest.approx(4320 / 7680, rel=1e-3)
    assert make((20, 4000), 0.1).resized == (20, 1265)  # a side below min_side is left alone
    assert make((50, 4000), 0.1).resized == (32, 1265)  # ... and one above is held at it
    assert make((5000, 5000), policy=PlanPolicy(max_tiles=1, min_side=2000)).resized[0] <= 512


def test_a_long_screenshot_is_shrunk_until_every_tile_has_a_marker():
    p = make((5000, 1080))
    assert p.grid == (8, 2)  # 10 x 3 at full size: under the tile cap
    assert 0.98 * 8 * 512 <= p.resized[0] <= 8 * 512
    assert p.resized[1] == pytest.approx(1080 / 5000 * p.resized[0], abs=1)
    assert make((4096, 1080)).resized == (4096, 1080)
    nine = replace(SMALL, tile=32)  # one tile more than there are markers
    assert [make((288, 32), 1.0, replace(nine, mode=m)).grid for m in MODES] == [(8, 1)] * 3
    assert [make((32, 288), 1.0, replace(nine, mode=m)).grid for m in MODES] == [(1, 8)] * 3


def test_rigid_grids_blunt_the_ratio():
    """The reason native_pad is the default: elsewhere a smaller picture costs nearly as many tokens."""

    def saved(mode):
        policy = PlanPolicy(tile=256, mode=mode, max_tiles=12)
        return 1 - make((768, 1024), 0.5, policy).tokens / make((768, 1024), 1.0, policy).tokens

    assert saved("native_pad") > 0.3 > saved("grid_match")


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5), (5,), (5, 5, 3), (1 << 21, 5)])
def test_bad_sizes(size):
    with pytest.raises(PlanError):
        make(size)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.0001, math.nan, math.inf])
def test_bad_ratios(ratio):
    with pytest.raises(PlanError, match="ratio"):
        make((5, 5), ratio)


def test_numbers_of_other_libraries_are_welcome():
    assert make(np.zeros((48, 64, 3)).shape[:2], np.float32(0.5)) == make((np.int64(48), np.int32(64)), 0.5)
    assert make((48, 64), 1).to_json() == make((48, 64), 1.0).to_json()


# --- JSON -------------------------------------------------------------------------------------------------------------


def tampered(change) -> str:
    values = json.loads(make((480, 640)).to_json())
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(size=[480, 641]),
        lambda v: v.update(size=[True, 640]),
        lambda v: v.update(size=[480.0, 640]),
        lambda v: v.update(size=None),
        lambda v: v.update(ratio=0.5),
        lambda v: v.update(ratio="1.0"),
        lambda v: v.update(ratio=float("nan")),
        lambda v: v.update(ratio=10**400),
        lambda v: v.update(resized=[480, 639]),
        lambda v: v.update(grid=[2, 2]),
        lambda v: v.update(offset=[0, 1]),
        lambda v: v.update(thumb=None),
        lambda v: v["tiles"].pop(),
        lambda v: v["tiles"][0].__setitem__(5, 511),
        lambda v: v["tiles"][0].__setitem__(0, False),
        lambda v: v["tokens"].__setitem__(0, 0),
        lambda v: v.update(version=2),
        lambda v: v.update(extra=1),
        lambda v: v.pop("grid"),
        lambda v: v.pop("size"),
        lambda v: v["policy"].update(tile=256),
        lambda v: v["policy"].update(tile=0),
        lambda v: v["policy"].update(tile=-512),
        lambda v: v["policy"].update(patch=0),
        lambda v: v["policy"].update(mode="other"),
        lambda v: v["policy"].update(max_tiles=10**9),
        lambda v: v["policy"].update(colour="red"),
        lambda v: v["policy"].pop("tile"),
        lambda v: v.update(policy=[]),
    ],
)
def test_tampered_plans_are_refused(change):
    with pytest.raises(PlanError):
        VisionPlan.from_json(tampered(change))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '"x"', "null", "{}", "[" * 100_000, '{"size": [1, 1], "size": [1, 1]}']
)
def test_other_texts_are_refused(text):
    with pytest.raises(PlanError):
        VisionPlan.from_json(text)


def test_duplicate_keys_are_refused():
    text = make((480, 640)).to_json()
    with pytest.raises(PlanError, match="twice"):
        VisionPlan.from_json(text[:-1] + ', "version": 1}')


def test_key_order_and_whole_ratio_do_not_matter():
    p = make((480, 640))
    values = json.loads(p.to_json())
    values["ratio"] = 1
    assert VisionPlan.from_json(json.dumps(dict(reversed(values.items())), indent=1)) == p


def test_errors_are_value_errors():
    assert issubclass(plans.PlanError, ValueError)


if __name__ == "__main__":  # writes the golden vectors anew; a changed line is a change for every phone in the field
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("[\n" + ",\n".join(p.to_json() for p in golden_cases()) + "\n]\n")
