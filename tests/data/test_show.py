"""What is drawn is what the model meets: its tiles, its slots, its loss mask."""

import io

import numpy as np
from PIL import Image

from hypervl_jax import image
from hypervl_jax.data import check, show
from hypervl_jax.data.conversations import Conversation, Picture


def sample(cfg, tokenizer, sides=((50, 40), (20, 30))):
    pictures = []
    for n, (h, w) in enumerate(sides):
        pixels = np.random.default_rng(n).integers(0, 256, (h, w, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        pictures.append(Picture(f"{n}.png", buffer.getvalue()))
    messages = [
        {"role": "user", "content": [*[{"type": "image"}] * len(sides), {"type": "text", "text": "what is\nthis?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "an anchor 🙂"}]},
    ]
    c = Conversation("x", messages, pictures, "set.jsonl", 3)
    return c, check.shown(c, list(sides), 1.0, cfg.model.policy, cfg.model.text, tokenizer)


def test_its_text_is_the_row_with_the_slots_of_a_tile_as_one(tiny_config, tiny_tokenizer):
    _, seen = sample(tiny_config, tiny_tokenizer)
    runs = show.runs(seen, tiny_tokenizer)
    told = [t for _, _, t in runs if t >= 0]
    assert told == list(range(seen.tiles))
    counts = [p.tokens_of(i) for p in seen.plans for i in range(p.n_tiles)]
    assert [said for said, _, t in runs if t >= 0] == [f"tile {t}: {n} tokens" for t, n in enumerate(counts)]
    assert sum(learnt for _, learnt, _ in runs) == seen.prompt.loss.sum()
    learnt = tiny_tokenizer.decode(seen.prompt.ids[seen.prompt.loss])
    assert learnt == "an anchor 🙂<|im_end|>"
    assert "".join(said for said, on, _ in runs if on and said.isascii()).startswith("an anchor")


def test_the_drawing_holds_the_tiles_and_paints_what_is_learnt(tiny_config, tiny_tokenizer):
    c, seen = sample(tiny_config, tiny_tokenizer)
    drawn = show.draw(c, seen, tiny_tokenizer)
    assert drawn.dtype == np.uint8
    assert drawn.shape[2] == 3
    for colour in (show.GREEN, show.BLUE, show.FRAME):
        assert (drawn == colour).all(-1).any(), colour
    # The first tile of the first picture, as it was resized for the drawing, is in there to the pixel.
    plan = seen.plans[0]
    tile = image.prepare(c.pictures[0].load(), plan)[0]
    assert plan.tokens_of(0) == plan.policy.tokens_per_tile  # nothing of it is greyed
    side = next(s for s in range(220, 47, -1) if (_at(drawn, _big(tile, s)) is not None))
    assert side == 220


def _big(tile, side):
    return np.asarray(Image.fromarray(tile).resize((side, side)))[1:-1, 1:-1]  # the frame covers its edge


def _at(drawn, block):
    """Where `block` is in the drawing, by its first row."""
    h, w = block.shape[:2]
    for y, x in np.argwhere((drawn[: -h or None, : -w or None] == block[0, 0]).all(-1)):
        if (drawn[y : y + h, x : x + w] == block).all():
            return y, x
    return None


def test_text_alone_and_more_text_than_a_line_are_drawn(tiny_config, tiny_tokenizer):
    c, seen = sample(tiny_config, tiny_tokenizer, ())
    assert not (show.draw(c, seen, tiny_tokenizer) == show.BLUE).all(-1).any()
    c.messages[0]["content"][0]["text"] = "wide " * 2000
    long = check.shown(c, [], 1.0, tiny_config.model.policy, tiny_config.model.text, tiny_tokenizer)
    drawn = show.draw(c, long, tiny_tokenizer)
    assert drawn.shape[1] == show.WIDTH + 2 * show.MARGIN
    assert drawn.shape[0] > 500
