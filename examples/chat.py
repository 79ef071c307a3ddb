"""Asking about pictures, twice: with the object that holds a conversation, and with the functions it is made of.

    python examples/chat.py                      the weights that ship, about examples/screen.png
    python examples/chat.py MODEL PICTURE        a model directory, or the name of weights that ship

Both ways must say the same; what the object saves by remembering is counted.
"""

import sys
from pathlib import Path

from hypervl_jax import Chat, ask, generate, image, load_model, text

QUESTION, THEN = "what is the number?", "what is at the top left?"
PICTURE = Path(__file__).parent / "screen.png"


def main(name: str = "nano", picture: str | Path = PICTURE) -> None:
    model = load_model(name)

    # --- a conversation ----------------------------------------------------------------------------------------------
    chat = Chat(model, branch="base", max_tokens=16)
    said = []
    for images, question in ((picture, QUESTION), ((), THEN), (picture, THEN)):
        before = chat.fed
        said.append("".join(chat.ask(images, question)))  # or print the pieces as they come
        print(f"{question} -> {said[-1]}   ({chat.fed - before} tokens read)", flush=True)
    print(f"{chat.turns} turns, {len(chat.pictures)} pictures shown, {chat.encoded} encoded", flush=True)
    assert chat.encoded == 1

    # --- the same from functions: view, encode, read, say ------------------------------------------------------------
    pixels = image.load(picture)
    view = ask.view(model, pixels, branch="base")  # VRC and the plan: what it will cost
    print(f"ratio {view.plan.ratio:.2f}, {view.plan.n_tiles} tiles, {view.plan.tokens} visual tokens", flush=True)
    seen = ask.encode(model, pixels, view)  # f32[F D]
    shown = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    talk: list = [{"role": "user", "content": shown}]
    prompt = text.render(talk, [seen.plan], model.tokenizer, model.config.text)
    pieces = list(ask.say(model, ask.read(model, prompt, [seen], new=16), new=16))
    first, read = "".join(piece for piece, _ in pieces), pieces[-1][1]  # only the latest `Read` may be used again
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": THEN}]
    prompt = text.render(talk, [seen.plan], model.tokenizer, model.config.text)
    again = ask.read(model, prompt, [seen], new=16, before=read)  # what was read before stays in the cache
    second = "".join(piece for piece, _ in ask.say(model, again, new=16))
    assert [first, second] == said[:2], "both ways must say the same"
    print(f"from functions: the same answers; the second prompt has {len(prompt.ids)} tokens, {again.fed} were read")

    # --- another way to choose tokens --------------------------------------------------------------------------------
    sampler = generate.Sampler(temperature=0.8, top_p=0.9, penalty=1.1)
    drawn = {"".join(ask.answer(model, [seen], QUESTION, 16, sampler, seed)) for seed in (0, 0)}
    assert len(drawn) == 1, "a seed repeats an answer"
    print(f"sampled with seed 0: {drawn.pop()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
