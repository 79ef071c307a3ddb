"""Rebuild `src/hypervl_jax/data/assets.npz` from named, pinned packages; the same versions give the same arrays.

    python scripts/build_assets.py [--cache FOLDER] [--out FILE] [--check]

Needs npm, pip, Pillow, NumPy and `resvg_py` (pinned below: another version rasterises other pixels). `--check` builds
and compares with the shipped archive instead of writing. What is in the archive is described in `NOTICE`.

Pictures: one thing drawn by several artists. The artist of `HELD_OUT` is shown in no training split; of the candidate
nouns those are kept that are drawn by every artist of `CORE` and by the held-out one, whose drawings play no other part
in the choice: concepts are ordered by how well the training artists agree (`rank`), near-doubles are dropped, the first
`CONCEPTS` stay. Not used: share-alike art (openmoji, emojione-v1), the held-out artist's other finishes (fluent-emoji).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import resvg_py  # type: ignore  # only to build the archive anew
from PIL import Image, ImageDraw, ImageFont

SIDE = 48  # pixels a side of a picture
CONCEPTS = 64
DIGIT = 40  # pixel height of a printed digit
TRAIN_DIGITS = 1400  # of 1,797 handwritten; writers follow one another in the file, so the last are by other hands
RESVG = "0.5.0"
OUT = Path(__file__).parent.parent / "src/hypervl_jax/data/assets.npz"

# family/artist -> npm package. Artists of one family (two ages of one set) are never each other's witness in `rank`.
CORE = {
    "noto/noto": "@iconify-json/noto@1.2.9",
    "noto/noto-v1": "@iconify-json/noto-v1@1.2.5",
    "twemoji/twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione/emojione": "@iconify-json/emojione@1.2.3",
}
MORE = {
    "fxemoji/fxemoji": "@iconify-json/fxemoji@1.2.2",
    "streamline/streamline-emojis": "@iconify-json/streamline-emojis@1.2.4",
    "ultimate/streamline-ultimate-color": "@iconify-json/streamline-ultimate-color@1.2.2",
    "kameleon/streamline-kameleon-color": "@iconify-json/streamline-kameleon-color@1.2.2",
}
HELD_OUT = {"fluent/fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6"}

# Candidates: the word that is answered, the code point, the name in fxemoji and in streamline-emojis where it is not
# that of noto ("-": not drawn there, or drawn as something else). One plain noun each; no faces of people, hands,
# flags, symbols; animals by their face where every artist draws one.
CANDIDATES = """
cat 1f431 cat | dog 1f436 dog | pig 1f437 pig | mouse 1f42d mouse | bear 1f43b bear | panda 1f43c pandaface
tiger 1f42f tiger | rabbit 1f430 bunny | cow 1f42e cowface | horse 1f434 horseface | frog 1f438 frog
koala 1f428 koala | monkey 1f435 monkeyface | chicken 1f414 chicken | penguin 1f427 penguin penguin-1
elephant 1f418 elephant | turtle 1f422 turtle | octopus 1f419 octopus | snail 1f40c snail | snake 1f40d snake
bee 1f41d honeybee | ladybug 1f41e ladybeetle | whale 1f433 spurtingwhale | dolphin 1f42c dolphin
fish 1f420 tropicalfish | crocodile 1f40a crocodile | bird 1f426 bird bird-1 | chick 1f424 babychick
spider 1f577 spider | ant 1f41c ant | bug 1f41b bug | rooster 1f413 rooster | shell 1f41a spiralshell
wolf 1f43a wolfface | hamster 1f439 hampster | lion 1f981 - | fox 1f98a - fox-face-1 | owl 1f989 - | crab 1f980 -
butterfly 1f98b - | duck 1f986 - | unicorn 1f984 - | shark 1f988 - | bat 1f987 - | dragon 1f432 dragonhead
apple 1f34e redapple | strawberry 1f353 strawberry strawberry-1 | banana 1f34c banana | cherry 1f352 cherries
grape 1f347 grapes | lemon 1f34b lemon | pear 1f350 pear | peach 1f351 peach | melon 1f348 melon melon-1
watermelon 1f349 watermelon watermelon-1 | pineapple 1f34d pineapple | tomato 1f345 tomato | eggplant 1f346 aubergine
corn 1f33d earofmaize | mushroom 1f344 mushroom | bread 1f35e bread | pizza 1f355 sliceofpizza pizza-1
burger 1f354 hamburger hamburger-1 | fries 1f35f frenchfries | cookie 1f36a cookie | donut 1f369 doughnut doughnut-1
cake 1f382 birthdaycake birthday-cake-1 | candy 1f36c candy | lollipop 1f36d lollipop
coffee 2615 hotbeverage hot-beverage-1 | beer 1f37a beermug | wine 1f377 wineglass | cocktail 1f378 cocktailglass
sushi 1f363 sushi | egg 1f95a - | orange 1f34a tangerine | chestnut 1f330 acorn | honey 1f36f honeypot
chocolate 1f36b chocolatebar | pepper 1f336 chilipepper | drumstick 1f357 poultryleg | carrot 1f955 -
avocado 1f951 - | croissant 1f950 - | cheese 1f9c0 - | popcorn 1f37f - | bacon 1f953 -
cone 1f366 softicecream soft-ice-cream-1 | shrimp 1f364 friedshrimp | rocket 1f680 rocket | airplane 2708 airplane
car 1f697 automobile | bus 1f68c bus | truck 1f69a deliverytruck | taxi 1f695 taxi | train 1f686 train
bicycle 1f6b2 bicycle | sailboat 26f5 sailboat | ship 1f6a2 ship | helicopter 1f681 helicopter
ambulance 1f691 ambulance | tractor 1f69c tractor | anchor 2693 anchor | house 1f3e0 housebuilding
castle 1f3f0 europeancastle | tent 26fa tent | fire 1f525 fire | sun 2600 sunrays | moon 1f319 crescentmoon
star 2b50 whitemediumstar | cloud 2601 cloud cloud-1 | rainbow 1f308 rainbow
umbrella 2614 umbrellawithraindrops umbrella-with-rain-drops | snowman 26c4 snowmanwithoutsnow snowman
tree 1f333 deciduoustree | pine 1f332 evergreen | cactus 1f335 cactus cactus-1 | rose 1f339 rose
flower 1f33c blossom | tulip 1f337 tulip | sunflower 1f33b sunflower sunflower-1 | leaf 1f341 mapleleaf
clover 1f340 fourleafclover | palm 1f334 palmtree | volcano 1f30b volcano | globe 1f30e americasglobe
fountain 26f2 fountain | factory 1f3ed factory | church 26ea church | motorcycle 1f3cd motorcycle
seedling 1f331 seedling | balloon 1f388 balloon | gift 1f381 present wrapped-gift-1 | guitar 1f3b8 guitar
trumpet 1f3ba trumpet | violin 1f3bb violin | saxophone 1f3b7 saxophone | piano 1f3b9 musicalkeyboard
bell 1f514 bell | key 1f511 key | lock 1f512 lock | hammer 1f528 hammer | wrench 1f527 wrench
scissors 2702 blackscissors | pencil 270f lowerleftpencil | book 1f4d5 closedbook | camera 1f4f7 camera
television 1f4fa television | radio 1f4fb radio | watch 231a watch | clock 23f0 alarmclock | bulb 1f4a1 lightbulb
candle 1f56f candle | crown 1f451 crown | ring 1f48d ring ring-1 | diamond 1f48e gem | glasses 1f453 glasses glasses-1
hat 1f3a9 tophat | shirt 1f455 - t-shirt | dress 1f457 dress | sneaker 1f45f mensrunner running-shoe
heel 1f460 heels high-heeled-shoe | boot 1f462 boot womans-boot | handbag 1f45c handbag | briefcase 1f4bc briefcase
trophy 1f3c6 trophy | bomb 1f4a3 bomb | telescope 1f52d telescope | microscope 1f52c microscope | pill 1f48a pill
syringe 1f489 syringe | toilet 1f6bd toilet | door 1f6aa door | envelope 2709 envelope e-mail-1
battery 1f50b battery | flashlight 1f526 electrictorch | microphone 1f3a4 microphone | headphone 1f3a7 headphone
telephone 260e blacktelephone | gear 2699 gear | hourglass 231b hourglassflowingsand
magnifier 1f50d leftmagnifyingglass | pushpin 1f4cc pushpin - | paperclip 1f4ce paperclip
floppy 1f4be blackhardshellfloppy floppy-disk | lipstick 1f484 lipstick | jeans 1f456 jeans | tie 1f454 tie necktie
ghost 1f47b ghost | skull 1f480 skull | robot 1f916 - robot-face-1 | alien 1f47d alien
heart 2764 redheart heart-suit | dice 1f3b2 gamedie game-dice | soccer 26bd soccerball | basketball 1f3c0 -
football 1f3c8 americanfootball american-football | baseball 26be baseball | tennis 1f3be tennisball tennis-1
bowling 1f3b3 bowling | ticket 1f3ab ticket | pumpkin 1f383 jackolantern jack-o-lantern | megaphone 1f4e3 megaphone
scroll 1f4dc scroll | dart 1f3af directhit direct-hit | snowflake 2744 snowflake | lightning 26a1 bolt high-voltage
drum 1f941 - | knife 1f52a hocho | bed 1f6cf - | package 1f4e6 package | backpack 1f392 schoolsatchel school-backpack
purse 1f45b purse | ribbon 1f380 - ribbon | calendar 1f4c5 calendar | palette 1f3a8 artistpalette artist-palette
eye 1f441 eye | ear 1f442 ear | lips 1f444 mouth mouth | shield 1f6e1 - | laptop 1f4bb - | cart 1f6d2 -
bathtub 1f6c1 bathtub | plug 1f50c electricplug electric-plug
"""


# Icon sets with names of their own: word=name, only where the drawing is plainly that thing. Kameleon's drawings stand
# on a coloured disc, its first path, which is left out.
NAMES = {
    "streamline-ultimate-color": """egg=animal-products-egg bread=bread-loaf beer=beer-glass bicycle bus=bus-1 car=car-4
        fries=fast-food-french-fries banana=fruit-banana cherry=fruit-cherry watermelon=fruit-watermelon gift=gift-box-1
        house=house-4 laptop moon=night-moon-begin pencil=pencil-1 radio=radio-retro umbrella=rain-umbrella-1 skull
        star=rating-star sushi=seafood-sushi scissors=scissors-2 sun=weather-sun taxi television=vintage-tv-4
        toilet=toilet-seat crown=vip-crown-queen-1 volcano=natural-disaster-volcano alien=science-fiction-alien-1
        balloon=party-balloon dice=board-game-dice-1 lipstick=make-up-lipstick microphone=microphone-1 gear=cog
        megaphone bell=alarm-bell-ring helicopter=aircraft-chopper-1""",
    "streamline-kameleon-color": """bomb bulb=light-bulb butterfly camera=camera-front-duo castle cocktail dice=dices
        coffee=coffee-paper-glass crab dart=dartboard donut drum hammer ladybug laptop pencil=pencil-2 pine=pine-tree
        popcorn rainbow robot strawberry taxi=taxi-2 truck wrench briefcase glasses=eyeglasses hat=hat-2
        microphone=microphone-2 rocket=space-shuttle""",
}
DOUBLES = 0.8  # two things that artists draw so alike on average (cosine of `feature`) count as one: the later goes

# family -> (split, pip or npm requirement, font files inside it). Whole families are held out.
FONTS = {
    "DejaVu Sans": (
        "train",
        "pip:matplotlib==3.11.2",
        "ttf/DejaVuSans.ttf ttf/DejaVuSans-Bold.ttf ttf/DejaVuSansMono.ttf",
    ),
    "DejaVu Serif": ("train", "pip:matplotlib==3.11.2", "ttf/DejaVuSerif.ttf"),
    "Roboto": ("train", "pip:font-roboto==0.0.1", "Roboto-Regular.ttf Roboto-Bold.ttf"),
    "Source Sans Pro": ("train", "pip:font-source-sans-pro==0.0.1", "SourceSansPro-Semibold.ttf"),
    "Source Serif Pro": ("train", "pip:font-source-serif-pro==0.0.1", "SourceSerifPro-Regular.ttf"),
    "Lato": ("train", "pip:font-lato==0.1.0", "Lato-Regular.ttf Lato-Bold.ttf"),
    "Caladea": ("train", "pip:font-caladea==0.0.2", "Caladea-Bold.ttf"),
    "Hanken Grotesk": ("train", "pip:font-hanken-grotesk==0.0.2", "HankenGrotesk-Medium.otf"),
    "Manrope": ("train", "pip:font-manrope==0.0.2", "Manrope-SemiBold.ttf"),
    "Inter": ("test", "npm:@expo-google-fonts/inter@0.4.2", "Inter_500Medium.ttf"),
    "Open Sans": ("test", "npm:@expo-google-fonts/open-sans@0.4.2", "OpenSans_600SemiBold.ttf"),
    "Montserrat": ("test", "npm:@expo-google-fonts/montserrat@0.4.2", "Montserrat_500Medium.ttf"),
    "Work Sans": ("test", "npm:@expo-google-fonts/work-sans@0.4.2", "WorkSans_500Medium.ttf"),
    "PT Serif": ("test", "npm:@expo-google-fonts/pt-serif@0.4.1", "PTSerif_700Bold.ttf"),
}
DIGITS = "pip:scikit-learn==1.9.1"  # sklearn/datasets/data/digits.csv.gz: 64 pixels 0..16 and the digit, a line each


class Packages:
    """Files of pinned packages, downloaded once into `cache` by pip and npm as they are configured here."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.open: dict[str, dict[str, bytes]] = {}

    def files(self, requirement: str) -> dict[str, bytes]:
        """Path -> bytes of everything in the package `pip:name==version` or `npm:name@version`."""
        if requirement not in self.open:
            kind, _, name = requirement.partition(":")
            folder = self.cache / "".join(c if c.isalnum() or c in ".-" else "_" for c in requirement)
            if not folder.exists():
                partial = folder.with_suffix(".part")
                partial.mkdir(parents=True, exist_ok=True)
                pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", name]
                subprocess.run(pip if kind == "pip" else ["npm", "pack", "--silent", name], cwd=partial, check=True)
                partial.rename(folder)
            (archive,) = folder.iterdir()
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as z:
                    self.open[requirement] = {n: z.read(n) for n in z.namelist()}
            else:
                with tarfile.open(archive) as t:
                    self.open[requirement] = {m.name: t.extractfile(m).read() for m in t if m.isfile()}  # type: ignore
        return self.open[requirement]

    def file(self, requirement: str, ending: str) -> bytes:
        """The one file whose path ends so. Raises `SystemExit` naming package and ending when it is not there."""
        found = [v for k, v in self.files(requirement).items() if k.endswith("/" + ending)]
        if len(found) != 1:
            raise SystemExit(f"{requirement}: {len(found)} files end in {ending}; is this the pinned version?")
        return found[0]


def candidates() -> list[tuple[str, str, str | None, str | None]]:
    """(word, code point, name in fxemoji or None, name in streamline-emojis or None) in the order of the table."""
    rows = [r.split() for line in CANDIDATES.strip().splitlines() for r in line.split("|")]
    return [(r[0], r[1], *[*r[2:], None, None][:2]) for r in rows]  # type: ignore


class Artist:
    """SVG text of one artist's drawings by word; `None` where the artist did not draw it."""

    def __init__(self, packages: Packages, key: str, requirement: str, by_code: dict[str, str]):
        self.family, self.name = key.split("/")
        self.files = packages.files("npm:" + requirement)
        self.by_code = by_code  # code point -> name in noto, which noto-v1 and emojione share
        self.icons = json.loads(self.files["package/icons.json"])
        chars = json.loads(self.files.get("package/chars.json", b"{}"))
        self.chars = chars if self.name in ("noto", "twemoji", "fluent-emoji-flat") else {}
        self.names = dict((e.split("=") * 2)[:2] for e in NAMES.get(self.name, "").split())

    def svg(self, word: str, code: str, fx: str | None, streamline: str | None) -> str | None:
        shared = self.chars.get(code) or self.by_code[code]
        if self.names:
            names = [self.names.get(word)]
        elif self.name == "fxemoji":
            names = [fx]
        elif self.name == "streamline-emojis":
            names = [streamline] if streamline else [shared]
        else:
            names = [shared]
        return next((self.icon(n) for n in names if n and n != "-" and self.icon(n)), None)

    def icon(self, name: str) -> str | None:
        name = self.icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = self.icons["icons"].get(name)
        if icon is None:
            return None
        left, top, width, height = (
            icon.get(k, self.icons.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        body = icon["body"]
        if self.name == "streamline-kameleon-color":
            start = body.index("<path")
            body = body[:start] + body[body.index("/>", start) + 2 :]
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
        )


def raster(svg: str) -> np.ndarray:
    """u8[SIDE SIDE 4]: the drawing cut to its visible box and fitted to the square, colour 0 where nothing is drawn."""
    data = resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIDE, height=4 * SIDE)
    image = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())  # type: ignore
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(s * scale)) for s in image.size)
    small = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")  # type: ignore
    out = Image.new("RGBA", (SIDE, SIDE))
    out.paste(small, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    levels = np.array([63, 63, 63, 15]) / 255.0  # 6 bits a colour, 4 of alpha: no visible change, half the bytes
    pixels = np.rint(np.rint(np.asarray(out) * levels) / levels).astype(np.uint8)
    pixels[pixels[..., 3] == 0] = 0
    return pixels


def feature(pixels: np.ndarray) -> np.ndarray:
    """f32[1024] of length 1: what is drawn at 16 x 16 on grey, and its outline. Colour and shape, nothing learned."""
    alpha = pixels[..., 3:] / 255.0
    rgba = np.concatenate([(pixels[..., :3] / 255.0 - 0.5) * alpha, alpha - 0.5], -1)
    small = rgba.reshape(16, SIDE // 16, 16, SIDE // 16, 4).mean((1, 3)).ravel()
    return (small / np.linalg.norm(small)).astype(np.float32)


def rank(
    features: np.ndarray, concept: np.ndarray, artist: np.ndarray, family: np.ndarray, words: list[str]
) -> list[int]:
    """Concepts, most agreeing first: the mean over a thing's drawings of (best likeness to the same thing by another
    family) - (best likeness to another thing by another family). Near-doubles (`DOUBLES`) are left out.
    """
    like = features @ features.T
    other = family[:, None] != family[None]
    same = concept[:, None] == concept[None]
    margin = np.where(other & same, like, -1).max(1) - np.where(other & ~same, like, -1).max(1)
    score = np.array([margin[concept == c].mean() for c in range(len(words))])
    by_artist = np.full((artist.max() + 1, len(words), features.shape[1]), np.nan, np.float32)
    by_artist[artist, concept] = features
    alike = np.nanmean(np.einsum("acf,abf->acb", by_artist, by_artist), 0)
    kept: list[int] = []
    for c in np.argsort(-score, kind="stable").tolist():
        twin = next((k for k in kept if alike[c, k] > DOUBLES), None)
        if twin is None:
            kept.append(c)
        else:
            print(f"left out, too like {words[twin]}: {words[c]} ({alike[c, twin]:.2f})")
    hit = (margin > 0).mean()
    print(f"{len(words)} candidates, nearest neighbour by another family is the same thing for {hit:.0%} of drawings")
    return kept


def printed(packages: Packages) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Glyphs u8[DIGIT, width] of 0..9 a font file, its name, its split. All cells of a font share the baseline."""
    glyphs, names, splits = [], [], []
    for family, (split, requirement, files) in FONTS.items():
        for file in files.split():
            data = packages.file(requirement, file)
            size = 20
            while True:  # the largest size at which no digit is taller than DIGIT
                font = ImageFont.truetype(io.BytesIO(data), size + 1)
                boxes = [font.getbbox(d) for d in "0123456789"]
                if max(b[3] for b in boxes) - min(b[1] for b in boxes) > DIGIT:
                    break
                size += 1
            font = ImageFont.truetype(io.BytesIO(data), size)
            top = min(font.getbbox(d)[1] for d in "0123456789")
            for d in "0123456789":
                width = round(font.getlength(d))  # advance: proportional spacing survives
                cell = Image.new("L", (width, DIGIT))
                ImageDraw.Draw(cell).text((0, -top), d, fill=255, font=font)
                glyphs.append(np.asarray(cell))
            names.append(f"{family}: {Path(file).stem}")
            splits.append(split)
    return glyphs, names, splits


def build(cache: Path) -> dict[str, np.ndarray]:
    """Every array of the archive."""
    packages = Packages(cache)
    noto = json.loads(packages.file("npm:" + CORE["noto/noto"], "chars.json"))
    rows = candidates()
    by_code = {code: noto[code] for _, code, _, _ in rows}
    groups = {"core": CORE, "more": MORE, "held": HELD_OUT}
    artists = {g: [Artist(packages, k, r, by_code) for k, r in group.items()] for g, group in groups.items()}
    drawn = [r for r in rows if all(a.svg(*r) for a in artists["core"] + artists["held"])]
    gone = [r[0] for r in rows if r not in drawn]
    print(f"left out, not drawn by all of {', '.join(a.name for a in artists['core'] + artists['held'])}: {gone}")
    train = artists["core"] + artists["more"]
    found = [(i, a, raster(svg)) for i, r in enumerate(drawn) for a in train if (svg := a.svg(*r))]
    order = rank(
        np.stack([feature(p) for _, _, p in found]),
        np.array([i for i, _, _ in found]),
        np.array([train.index(a) for _, a, _ in found]),
        np.array([a.family for _, a, _ in found]),
        [r[0] for r in drawn],
    )[:CONCEPTS]
    if len(order) < CONCEPTS:
        raise SystemExit(f"only {len(order)} concepts are left of {len(rows)} candidates")
    place = {c: i for i, c in enumerate(order)}
    art = [(place[i], a.name, p) for i, a, p in found if i in place]
    art += [(place[c], a.name, raster(a.svg(*drawn[c]) or "")) for c in order for a in artists["held"]]
    names = [a.name for a in train + artists["held"]]
    art.sort(key=lambda x: (names.index(x[1]), x[0]))
    lines = csv.reader(io.StringIO(gzip.decompress(packages.file(DIGITS, "data/digits.csv.gz")).decode()))
    hand = np.array([[int(float(v)) for v in line] for line in lines], np.uint8)
    glyphs, fonts, splits = printed(packages)
    return {
        "words": np.array([drawn[c][0] for c in order]),
        "artists": np.array(names),
        "artist_held_out": np.array([a in artists["held"] for a in train + artists["held"]]),
        "art": np.stack([p for _, _, p in art]),
        "art_concept": np.array([c for c, _, _ in art], np.uint8),
        "art_artist": np.array([names.index(a) for _, a, _ in art], np.uint8),
        "hand": hand[:, :64].reshape(-1, 8, 8),
        "hand_digit": hand[:, 64],
        "hand_held_out": np.arange(len(hand)) >= TRAIN_DIGITS,
        "fonts": np.array(fonts),
        "font_held_out": np.array([s == "test" for s in splits]),
        "glyphs": np.concatenate(glyphs, 1),
        "glyph_width": np.array([g.shape[1] for g in glyphs], np.uint8).reshape(-1, 10),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("--cache", type=Path, default=Path(".cache/packages"), help="where downloads are kept")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--check", action="store_true", help="compare with the archive instead of writing it")
    args = parser.parse_args()
    if resvg_py.__version__ != RESVG:
        raise SystemExit(f"resvg_py {resvg_py.__version__} rasterises other pixels; install resvg_py=={RESVG}")
    arrays = build(args.cache)
    for name, value in arrays.items():
        print(f"{name:16} {value.shape!s:18} {value.dtype!s:6} {hashlib.sha256(value.tobytes()).hexdigest()}")
    print(" ".join(arrays["words"].tolist()))
    if args.check:
        shipped = np.load(args.out)
        differ = [k for k in arrays if not np.array_equal(arrays[k], shipped[k])]
        raise SystemExit(f"differs from {args.out}: {', '.join(differ)}" if differ else 0)
    with zipfile.ZipFile(args.out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as z:  # fixed dates: same bytes
        for name, value in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, value, allow_pickle=False)
            z.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), buffer.getvalue(), zipfile.ZIP_DEFLATED)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
