"""Generated pages with large and small print, and questions about them.

A set is a folder that looks like any LLaVA-format data set: PNG files under
`images/`, conversations in `train.json` and `validation.json`, and one question
a line in `questions.jsonl`, asked about the validation pages. Every page is a
receipt, a form, a sign or a plot. Its heading is large enough to be read when the
page is shrunk to half its side; its lines are set in seven pixels with a halo as light as
the letters are dark, so that at half the side nothing is left of them: without it, a
network trained for long reads even three pixels. Questions are therefore split into those
about the small print, `HIRES_CATEGORIES`, and the others, `LOWRES_CATEGORIES`.

Chance, the best answer that ignores the page: `read_small` 0.08; `transcribe_small` 0.001;
`count_small` 0.33; `read_large` 0.13; `where_large` 0.25; `count_large` 0.33.

    python -m lmm_jax.data.documents --out=DIR --train=N --validation=M --seed=S
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import pathlib
import random
from typing import Any
import zlib

from absl import app, flags
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

VERSION = 8
SIZE = 64
MANIFEST = "manifest.json"
TURNS = 3
HIRES_CATEGORIES = ("read_small", "transcribe_small", "count_small")
LOWRES_CATEGORIES = ("read_large", "where_large", "count_large")
TITLES = ("SALE", "OPEN", "EXIT", "STOP", "TAXI", "BANK", "CAFE", "POST")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
# Keys of one kind have one length, so that a blurred line does not betray its key.
_UNITS = ("kg", "lb", "oz", "cm", "km", "ml", "hr", "pt")
_DAYS = ("mo", "tu", "we", "th", "fr", "sa", "su")
KEYS = {"receipt": _UNITS, "form": _UNITS, "sign": _UNITS, "plot": _DAYS}
# A page with a single line can be read without finding the line: the first lesson.
LINES = {"receipt": (1, 3), "form": (1, 3), "sign": (1, 3), "plot": (2, 4)}
CELL = 16
# Where small print stands in its cell; each kind fills another of the four hi-res tokens
# that lie behind a token of the whole page.
_QUARTER = {"receipt": (0, 0), "form": (0, 8), "sign": (8, 0), "plot": (8, 0)}
PRINT = 200  # contrast of small print before its halo, in grey levels
GRAIN = 4  # of the paper
_HELD_OUT = 8  # One page in so many, picked by its contents, is for validation.
_WORTH_WORKERS = 400  # Fewer pages are drawn sooner than processes start.


@dataclasses.dataclass(frozen=True)
class Page:
    """What one page says.

    `rows` are the `(key, value)` of the small lines from the top, or of a plot the
    label and the height of the bars from the left. Only a sign has a mark in a `corner`.
    """

    kind: str
    title: str
    rows: tuple[tuple[str, str], ...]
    corner: str = ""

    @property
    def held_out(self) -> bool:
        """Whether the page's contents belong to the validation split."""
        return zlib.crc32(repr(self).encode()) % _HELD_OUT == 0


def sample_page(rng: random.Random, *, held_out: bool) -> Page:
    """Draws the contents of a page of the wanted split."""
    while True:
        kind = rng.choice(tuple(KEYS))
        title = rng.choice(TITLES)
        count = rng.randint(*LINES[kind])
        keys = rng.sample(KEYS[kind], count)
        if kind == "plot":
            values = [str(v) for v in rng.sample(range(1, 7), count)]
        else:
            values = [f"{rng.randrange(100):02d}" for _ in keys]
        page = Page(kind, title, tuple(zip(keys, values)))
        if kind == "sign":
            page = dataclasses.replace(page, corner=rng.choice(CORNERS))
        if page.held_out == held_out:
            return page


def questions(page: Page) -> list[tuple[str, str, str]]:
    """Every `(category, question, answer)` about a page; each stands alone.

    The last asks for everything at once: a lesson, too long to be a test.
    """
    plot = page.kind == "plot"
    part = "bar" if plot else "line"
    how_many = "count_large" if plot else "count_small"
    found = [
        ("read_large", "What is the title?", page.title),
        (how_many, f"How many {part}s?", str(len(page.rows))),
    ]
    if page.kind == "sign":
        found.append(("where_large", "Where is the mark?", page.corner))
    printed = [key if plot else f"{key} {value}" for key, value in page.rows]
    for place, (key, value) in enumerate(page.rows, start=1):
        found.append(("read_small", f"What is the word of {part} {place}?", key))
        if not plot:
            found.append(("read_small", f"What is the number of line {place}?", value))
            found.append(
                ("transcribe_small", f"Read line {place}.", printed[place - 1])
            )
    every = " ".join([page.title, *printed])
    return [*found, ("transcribe_small", "Read all.", every)]


@functools.cache
def _font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    path = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", name)
    return ImageFont.truetype(str(path), pixels)


@functools.cache
def _seen_at_half(size: int) -> np.ndarray:
    """Projects a column of `size` pixels on what halving it keeps."""
    lines = Image.fromarray(np.eye(size, dtype=np.float32))
    halving = np.asarray(
        lines.resize((size, size // 2), Image.Resampling.BICUBIC), float
    )
    return np.linalg.pinv(halving) @ halving


def render(page: Page, rng: random.Random, size: int = SIZE) -> Image.Image:
    """Draws a page as an RGB image of `size` pixels a side.

    Small print comes two characters to a cell of 16 pixels, in one quarter of it. Hi-res
    tokens of one place are added up: there is then one word among them and not two.
    """
    scale = size / SIZE
    paper, ink = rng.randint(145, 165), rng.randint(0, 30)
    gray = (ink + 2 * paper) // 3
    image, fine = Image.new("L", (size, size), paper), Image.new("L", (size, size))
    draw, draw_fine = ImageDraw.Draw(image), ImageDraw.Draw(fine)
    large = _font("DejaVuSans-Bold.ttf", round(15 * scale))
    small = _font("DejaVuSansMono.ttf", round(7 * scale))

    def at(x: float, y: float) -> tuple[int, int]:
        return round(x * scale), round(y * scale)

    def box(x: float, y: float, right: float, bottom: float, tone: int = ink) -> None:
        draw.rectangle((*at(x, y), *at(right, bottom)), fill=tone)

    def text(x: float, y: float, words: str) -> None:
        draw_fine.text(at(x, y), words, font=small, fill=255, anchor="ls")

    # Only the heading is shaken: small print on a grid is learnt sooner.
    heading = at(3 + rng.randint(-2, 2), 14 + rng.randint(-1, 1))
    draw.text(heading, page.title, font=large, fill=ink, anchor="ls")
    if page.kind == "receipt":
        box(1, 62, 62, 62, gray)
    elif page.kind == "form":
        box(12, 18, 12, 63, gray)
    elif page.kind == "sign":
        left, top = (
            20 + 34 * ("right" in page.corner),
            20 + 32 * ("bottom" in page.corner),
        )
        box(left, top, left + 7, top + 7)
    elif page.kind == "plot":
        box(1, 47, 62, 47)
    right, down = _QUARTER[page.kind]
    down += 7  # to the baseline
    for line, (key, value) in enumerate(page.rows):
        if page.kind == "plot":
            x = CELL * line
            box(x + 3, 46 - 5 * int(value), x + 12, 46, gray)
            text(x + right, 48 + down, key)
        else:
            y = CELL * (1 + line) + down
            text(right, y, key)
            text(2 * CELL + right, y, value)
    strokes, seen = np.asarray(fine, float) / 255, _seen_at_half(size)
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, GRAIN, (size, size))
    haloed = strokes - seen @ strokes @ seen.T
    pixels = np.asarray(image, float) - PRINT * haloed + grain
    tint = np.array([1.0, rng.uniform(0.96, 1), rng.uniform(0.9, 1)])
    return Image.fromarray((pixels.clip(0, 255)[..., None] * tint).astype(np.uint8))


def conversation(
    page: Page, rng: random.Random, turns: int = TURNS
) -> list[tuple[str, str, str]]:
    """Draws the turns of a page's training conversation.

    Every other page is transcribed, which is the densest lesson in reading: each of its
    words is at the same distance from the answer. The others are asked `turns` questions
    in random order. The two never meet, as answers could be copied from a transcript.
    """
    *rest, every = questions(page)
    if rng.random() < 0.5:
        return [every]
    return rng.sample(rest, min(turns, len(rest)))


def turns(directory: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """(question, answer) pairs of the training conversations, to fit a tokenizer."""
    records = json.loads((pathlib.Path(directory) / "train.json").read_text())
    spoken = [[turn["value"] for turn in r["conversations"]] for r in records]
    return [pair for said in spoken for pair in zip(said[::2], said[1::2])]


def complete(root: pathlib.Path, wanted: dict[str, Any]) -> bool:
    """Whether a directory holds this set already.

    Raises:
      ValueError: it holds another.
    """
    manifest = root / MANIFEST
    found = json.loads(manifest.read_text()) if manifest.is_file() else wanted
    if found != wanted:
        raise ValueError(f"{root} holds the set {found}, not {wanted}: delete it")
    return manifest.is_file()


def write(path: pathlib.Path, content: bytes) -> None:
    """A file, all or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _write_page(
    index: int, *, directory: pathlib.Path, split: str, seed: int, size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Writes one image; returns its conversation and its evaluation questions."""
    rng = random.Random(f"{seed}/{split}/{index}")
    page = sample_page(rng, held_out=split == "validation")
    name, buffer = f"{split}_{index:06d}", io.BytesIO()
    render(page, rng, size).save(buffer, "PNG")
    write(directory / "images" / f"{name}.png", buffer.getvalue())
    turns = []
    for _, question, answer in conversation(page, rng):
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    image = f"images/{name}.png"
    asked = []
    for category, text, answer in questions(page)[:-1]:
        which = {"question_id": f"{name}_{len(asked)}", "image": image, "text": text}
        asked.append({**which, "category": category, "answers": [answer]})
    return {"id": name, "image": image, "conversations": turns}, asked


def generate(
    directory: str | os.PathLike[str],
    *,
    train: int,
    validation: int,
    seed: int,
    size: int = SIZE,
    workers: int | None = None,
) -> pathlib.Path:
    """Writes a set of pages into a directory, or finds it complete and leaves it.

    Args:
      directory: made when missing; also what is returned.
      train, validation: pages of each split; no contents are in both.
      seed: what the set depends on, beside its sizes.
      size: side of the pages in pixels; at half of it the small print blurs.
      workers: processes to draw with; by default one a core.

    Raises:
      ValueError: for impossible sizes, or when the directory holds another set.
      OSError: if the directory cannot be written.
    """
    if min(train, validation) < 1 or size < SIZE:
        raise ValueError(
            f"a set needs pages in both splits, {SIZE} pixels or more a side: "
            f"got train={train}, validation={validation}, size={size}"
        )
    splits = {"train": train, "validation": validation}
    wanted = {"version": VERSION, "seed": seed, "size": size, **splits}
    root = pathlib.Path(directory)
    if complete(root, wanted):
        return root
    try:
        (root / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write documents to {root}: {error}") from error
    workers = workers or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")  # forking a started JAX can hang
    few = workers == 1 or train + validation < _WORTH_WORKERS
    pool = None if few else ProcessPoolExecutor(workers, mp_context=context)
    with pool or contextlib.nullcontext():
        each = functools.partial(pool.map, chunksize=64) if pool else map
        for split, count in splits.items():
            draw = functools.partial(
                _write_page, directory=root, split=split, seed=seed, size=size
            )
            pages = list(each(draw, range(count)))
            text = json.dumps([record for record, _ in pages])
            write(root / f"{split}.json", text.encode())
    asked = [json.dumps(question) for _, found in pages for question in found]
    write(root / "questions.jsonl", "\n".join([*asked, ""]).encode())
    # Written last: its presence says that everything above is complete.
    write(root / MANIFEST, json.dumps(wanted).encode())
    return root


def main(_: list[str]) -> None:
    given = flags.FLAGS.flag_values_dict()
    names = ("train", "validation", "seed", "size")
    print(generate(given["out"], **{name: given[name] for name in names}))


if __name__ == "__main__":
    # Defined here, not above, as other commands have flags of the same names.
    flags.DEFINE_string("out", None, "Where to write the set.", required=True)
    flags.DEFINE_integer("train", 8000, "Training pages.", lower_bound=1)
    flags.DEFINE_integer("validation", 100, "Validation pages.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "What the set is drawn from.")
    flags.DEFINE_integer("size", SIZE, "Side of the pages, pixels.", lower_bound=SIZE)
    app.run(main)
