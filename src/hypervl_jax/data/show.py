"""A record as the model meets it, as a picture: its tiles with the tokens each becomes, its text, what is learnt of it.

Axes: N tiles, T tile side, H W the drawing.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from hypervl_jax import image
from hypervl_jax.data.check import Shown
from hypervl_jax.data.conversations import Conversation
from hypervl_jax.plan import VisionPlan
from hypervl_jax.tokens import Tokenizer

WIDTH, MARGIN, GAP = 1000, 16, 6  # pixels
INK, PALE, FRAME = (20, 20, 20), (110, 110, 110), (70, 120, 200)
GREEN, BLUE, WHITE = (190, 232, 190), (205, 222, 250), (255, 255, 255)  # learnt, a picture's slots, read only


def draw(c: Conversation, seen: Shown, tokenizer: Tokenizer) -> UInt8[np.ndarray, "H W 3"]:
    """Each picture's tiles in their grid, the thumbnail beside them, cells that become no token greyed, the range of
    slots under each; below, every token in order: learnt ones green, the slots of a tile folded into one blue box.

    Raises `ImageError` for a picture that cannot be decoded.
    """
    font = ImageFont.load_default(14)
    blocks = [_caption(f"{c.file}:{c.line}   id {c.id}   {_counts(seen)}", font)]
    first = 0
    for picture, plan in zip(c.pictures, seen.plans, strict=True):
        blocks.append(_caption(f"{picture.name}: {plan.summary()}", font))
        blocks.append(_tiles(image.prepare(picture.load(), plan), plan, first, font))
        first += plan.n_tiles
    blocks += [_caption("green: learnt; blue: slots of a tile; the rest is read", font), _row(seen, tokenizer, font)]
    height = sum(b.height + GAP for b in blocks) + 2 * MARGIN
    out = Image.new("RGB", (max(WIDTH, *(b.width for b in blocks)) + 2 * MARGIN, height), "white")
    y = MARGIN
    for block in blocks:
        out.paste(block, (MARGIN, y))
        y += block.height + GAP
    return np.asarray(out)


def runs(seen: Shown, tokenizer: Tokenizer) -> list[tuple[str, bool, int]]:
    """(what is written, whether it is learnt, its tile or -1): every token of text, and each tile's slots as one."""
    per = seen.plans[0].policy.tokens_per_tile if seen.plans else 1
    out: list[tuple[str, bool, int]] = []
    held = -1
    for id, slot, learnt in zip(seen.prompt.ids, seen.prompt.slots, seen.prompt.loss, strict=True):
        tile = int(slot) // per if slot >= 0 else -1
        if tile >= 0 and tile == held:
            continue
        held = tile
        n = int((seen.prompt.slots // per == tile).sum()) if tile >= 0 else 0
        said = tokenizer.token(id).decode("utf-8", "backslashreplace")
        out.append((f"tile {tile}: {n} tokens" if tile >= 0 else said, bool(learnt), tile))
    return out


def _counts(seen: Shown) -> str:
    p = seen.prompt
    return f"{len(p.ids)} tokens, {int((p.slots >= 0).sum())} visual, {int(p.loss.sum())} learnt, {seen.tiles} tiles"


def _caption(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    out = Image.new("RGB", (WIDTH, 20), "white")
    ImageDraw.Draw(out).text((0, 2), text, INK, font)
    return out


def _tiles(
    tiles: UInt8[np.ndarray, "N T T 3"],
    plan: VisionPlan,
    first: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> Image.Image:
    """The tiles of one picture; its first one is tile `first` of the row."""
    rows, cols = plan.grid
    side = max(48, min(220, WIDTH // (cols + 1) - GAP))
    out = Image.new("RGB", ((cols + (plan.thumb is not None)) * (side + GAP), rows * (side + 18 + GAP)), "white")
    pen = ImageDraw.Draw(out)
    per, cells = plan.policy.tokens_per_tile, plan.policy.cells_per_side
    for i, (pixels, tile) in enumerate(zip(tiles, plan.tiles, strict=True)):
        kept = np.zeros(per, bool)
        kept[plan.cells(i)] = True
        shade = np.kron(kept.reshape(cells, cells), np.ones((plan.policy.cell, plan.policy.cell), bool))
        seen = np.where(shade[..., None], pixels, pixels // 4 + 144).astype(np.uint8)
        row, col = (0, cols) if tile.is_thumbnail else (tile.row, tile.col)
        x, y = col * (side + GAP), row * (side + 18 + GAP)
        out.paste(Image.fromarray(seen).resize((side, side)), (x, y))
        pen.rectangle((x, y, x + side - 1, y + side - 1), outline=FRAME)
        start = (first + i) * per
        pen.text((x, y + side + 1), f"{first + i}: {plan.tokens_of(i)} of {start}..{start + per - 1}", PALE, font)
    return out


def _row(seen: Shown, tokenizer: Tokenizer, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """Tokens as boxes, in lines; a line ends where the text has one."""
    boxes: list[tuple[int, int, str, tuple[int, int, int]]] = []
    x = y = 0
    for said, learnt, tile in runs(seen, tokenizer):
        text = said.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·")
        for piece in (text[i : i + 100] for i in range(0, max(len(text), 1), 100)):
            wide = int(font.getlength(piece)) + 5
            if x + wide > WIDTH:
                x, y = 0, y + 22
            boxes.append((x, y, piece, GREEN if learnt else BLUE if tile >= 0 else WHITE))
            x += wide
        if said.endswith("\n"):
            x, y = 0, y + 22
    out = Image.new("RGB", (WIDTH, y + 24), "white")
    pen = ImageDraw.Draw(out)
    for x, y, piece, colour in boxes:
        wide = int(font.getlength(piece)) + 4
        pen.rectangle((x, y, x + wide, y + 20), fill=colour, outline=(225, 225, 225))
        pen.text((x + 2, y + 2), piece, INK, font)
    return out
