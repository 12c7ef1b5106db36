"""The built-in benchmark digits-dg: handwritten digits rendered in four domains, for domain generalisation.

The 1,797 digits of 8 x 8 pixels that ship inside scikit-learn (UCI "Optical recognition of handwritten digits") are
dealt to four domains, class by class, and every digit is rendered once, in its own domain only, as 3 x 32 x 32 uint8:

- `plain`: the grey digit, smoothly enlarged, light on dark or dark on light;
- `sketch`: only the outline of the strokes, a thin dark line on paper;
- `texture`: the digit in one colour over stripes, checks or blobs of two other colours;
- `thick`: fattened strokes in flat colours, rotated by up to 25 degrees.

Everything random is drawn from one generator per digit, seeded by constants, so that the pixels depend neither on the
order of rendering nor on the machine.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.data.protocol import Collection, DataConfig, Split, TensorImages, split_collection
from secateur.errors import DataError

SIZE = 32
DOMAINS = ("plain", "sketch", "texture", "thick")
CLASSES = tuple(str(digit) for digit in range(10))
DEFAULT_UNSEEN = "thick"

_SEED = 20250417
_FINE = 3
"""Shapes are drawn three times finer than the final pixels and averaged down, which gives smooth edges."""

Floats = NDArray[np.float64]


def digits_dg(config: DataConfig) -> Split:
    """Returns digits-dg split as `config` asks; the unseen domain is `thick` unless another one is named.

    Images are float32, 3 x 32 x 32 (or 3 x `config.image_size` squared, resized bilinearly), normalised with mean and
    standard deviation 0.5 unless configured. Train images are shifted at random if `config.augment`. Ids have the
    form `domain/class/source`, where `source` is the number of the digit in scikit-learn.

    Raises `InputError` for an unknown unseen domain, `DataError` if scikit-learn is not installed.
    """
    return split_collection(collect_digits(config), config)


def collect_digits(config: DataConfig) -> Collection:
    """Returns all images of digits-dg as `config` presents them; raises `DataError` if scikit-learn is missing."""
    pixels, labels, domains = rendered_digits()
    mean = torch.tensor(config.mean or (0.5,) * 3).view(3, 1, 1)
    std = torch.tensor(config.std or (0.5,) * 3).view(3, 1, 1)
    images = (torch.tensor(pixels).float() / 255 - mean) / std
    names = [DOMAINS[d] for d in domains]
    ids = [f"{name}/{label}/{source:04d}" for source, (name, label) in enumerate(zip(names, labels, strict=True))]
    everything = TensorImages(images, torch.tensor(labels), ids, names, size=config.image_size or SIZE)
    return Collection("digits-dg", everything, CLASSES, default_unseen=DEFAULT_UNSEEN)


@lru_cache(maxsize=1)
def rendered_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Returns all images (1797 x 3 x 32 x 32), their labels (1797) and the indices of their domains (1797).

    Rendered once per process; the arrays are read-only. Raises `DataError` if scikit-learn is not installed.
    """
    glyphs, labels = source_digits()
    domains = _deal(labels)
    pixels = np.empty((len(labels), 3, SIZE, SIZE), dtype=np.uint8)
    for source, (glyph, domain) in enumerate(zip(glyphs, domains, strict=True)):
        pixels[source] = render(glyph, DOMAINS[domain], np.random.default_rng([_SEED, source]))
    for array in (pixels, labels, domains):
        array.setflags(write=False)
    return pixels, labels, domains


def source_digits() -> tuple[Floats, NDArray[np.int64]]:
    """Returns scikit-learn's digits (1797 x 8 x 8, ink in 0..1) and their labels (1797)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits-dg needs scikit-learn: pip install 'secateur[train]'") from error
    sources, labels = load_digits(return_X_y=True)
    return np.asarray(sources, dtype=np.float64).reshape(-1, 8, 8) / 16.0, np.asarray(labels, dtype=np.int64)


def render(glyph: Floats, domain: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Returns one picture (3 x 32 x 32) of a glyph (8 x 8, ink in 0..1) in the manner of a domain."""
    colours = np.clip(_RENDERERS[domain](glyph, rng), 0.0, 1.0)
    # A shift off the middle keeps exact halves from rounding one way here and the other way elsewhere.
    return np.floor(colours * 255.0 + 0.4990234375).astype(np.uint8)


def save_contact_sheet(path: str | Path, *, columns: int = 20) -> Path:
    """Writes a PNG with two rows of `columns` digits of each domain, in the order of classes, and returns its path."""
    from PIL import Image, ImageDraw

    pixels, labels, domains = rendered_digits()
    scale, margin, rows = 2, 70, 2
    side = SIZE * scale + 2
    sheet = Image.new("RGB", (margin + columns * side, len(DOMAINS) * (rows * side + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for d, name in enumerate(DOMAINS):
        top = d * (rows * side + 6)
        draw.text((6, top + side - 6), name, fill="black")
        mine = np.flatnonzero(domains == d)
        mine = mine[np.argsort(labels[mine], kind="stable")]
        chosen = mine[np.linspace(0, len(mine) - 1, rows * columns).astype(int)]
        for k, source in enumerate(chosen):
            tile = Image.fromarray(np.ascontiguousarray(pixels[source].transpose(1, 2, 0)))
            tile = tile.resize((SIZE * scale, SIZE * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + k % columns * side, top + k // columns * side))
    target = Path(path)
    sheet.save(target, format="PNG")
    return target


def _deal(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns a domain for every digit: each class is shuffled and dealt out in turn, so domains get equal shares."""
    rng = np.random.default_rng(_SEED)
    order = np.concatenate([rng.permutation(np.flatnonzero(labels == c)) for c in range(len(CLASSES))])
    domains = np.empty(len(labels), dtype=np.int64)
    domains[order] = np.arange(len(labels)) % len(DOMAINS)
    return domains


# --- the four domains: (glyph 8 x 8 in 0..1, generator) -> colours 3 x 32 x 32 in 0..1 ---------------------------


def _plain(glyph: Floats, rng: np.random.Generator) -> Floats:
    ink = _enlarged(glyph, rng, fine=1)
    dark, light = rng.uniform(0.0, 0.2), rng.uniform(0.8, 1.0)
    back, front = (dark, light) if rng.random() < 0.5 else (light, dark)
    return np.repeat((back + (front - back) * ink)[None], 3, axis=0)


def _sketch(glyph: Floats, rng: np.random.Generator) -> Floats:
    inside = _enlarged(glyph, rng, fine=_FINE) > 0.45
    line = _dilated(inside, 2) & _dilated(~inside, 1)
    paper = rng.uniform(0.9, 1.0)
    pencil = rng.uniform(0.0, 0.25)
    return np.repeat((paper + (pencil - paper) * _averaged(line))[None], 3, axis=0)


def _texture(glyph: Floats, rng: np.random.Generator) -> Floats:
    ink = np.clip((_enlarged(glyph, rng, fine=1) - 0.2) / 0.4, 0.0, 1.0)
    dark_ground = rng.random() < 0.5
    hue = rng.random()
    value = (0.25, 0.6) if dark_ground else (0.75, 1.0)
    first = _colour(hue, rng.uniform(0.5, 0.9), value[0])
    second = _colour(hue + rng.uniform(0.1, 0.4), rng.uniform(0.4, 0.9), value[1])
    pattern = _PATTERNS[int(rng.integers(len(_PATTERNS)))](rng)
    ground = first + (second - first) * pattern
    front = _colour(
        hue + rng.uniform(0.4, 0.6), rng.uniform(0.1, 0.4) if dark_ground else 0.9, 1.0 if dark_ground else 0.2
    )
    return ground + (front - ground) * ink


def _thick(glyph: Floats, rng: np.random.Generator) -> Floats:
    angle = rng.uniform(-25.0, 25.0)
    inside = _enlarged(glyph, rng, fine=_FINE, angle=angle, scale=2.7) > 0.45
    ink = _averaged(_dilated(inside, int(rng.integers(2, 5))))
    hue = rng.random()
    ground = _colour(hue, rng.uniform(0.1, 0.35), rng.uniform(0.85, 1.0))
    front = _colour(hue + rng.uniform(0.3, 0.7), rng.uniform(0.6, 1.0), rng.uniform(0.2, 0.5))
    return ground + (front - ground) * ink


_RENDERERS: dict[str, Callable[[Floats, np.random.Generator], Floats]] = {
    "plain": _plain,
    "sketch": _sketch,
    "texture": _texture,
    "thick": _thick,
}


# --- drawing ----------------------------------------------------------------------------------------------------


def _enlarged(glyph: Floats, rng: np.random.Generator, *, fine: int, angle: float = 0.0, scale: float = 3.25) -> Floats:
    """Returns the glyph (8 x 8) turned by `angle` degrees, enlarged, shifted by up to 2 pixels, on a `fine` grid."""
    from scipy import ndimage

    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    matrix = np.array([[cos, -sin], [sin, cos]]) / (scale * fine)
    shift = rng.uniform(-2.0, 2.0, size=2) * fine
    middle = (SIZE * fine - 1) / 2
    offset: Any = np.array([3.5, 3.5]) - matrix @ (np.array([middle, middle]) + shift)  # stubs know scalars only
    shape = (SIZE * fine, SIZE * fine)
    return np.clip(ndimage.affine_transform(glyph, matrix, offset, shape, order=3, mode="grid-constant"), 0.0, 1.0)


def _averaged(mask: NDArray[np.bool_]) -> Floats:
    """Returns the share of True in each pixel of the final grid."""
    return mask.reshape(SIZE, _FINE, SIZE, _FINE).mean(axis=(1, 3))


def _dilated(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Returns the mask grown by a disc of the given radius in fine pixels."""
    from scipy import ndimage

    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return np.asarray(ndimage.binary_dilation(mask, x * x + y * y <= radius * radius + 1), dtype=np.bool_)


def _colour(hue: float, saturation: float, value: float) -> Floats:
    """Returns the colour as an array 3 x 1 x 1; `hue` counts turns."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value)).reshape(3, 1, 1)


def _stripes(rng: np.random.Generator) -> Floats:
    turn = rng.uniform(0.0, math.pi)
    period = rng.uniform(5.0, 9.0)
    y, x = np.mgrid[:SIZE, :SIZE]
    phase = (x * math.cos(turn) + y * math.sin(turn)) / period + rng.random()
    return np.clip(4.0 * np.abs(phase - np.floor(phase) - 0.5) - 0.5, 0.0, 1.0)


def _checks(rng: np.random.Generator) -> Floats:
    side = int(rng.integers(3, 6))
    y, x = np.mgrid[:SIZE, :SIZE] + rng.integers(0, 2 * side, size=2)[:, None, None]
    return ((y // side + x // side) % 2).astype(np.float64)


def _blobs(rng: np.random.Generator) -> Floats:
    from scipy import ndimage

    field = ndimage.gaussian_filter(rng.random((SIZE, SIZE)), 2.0, mode="wrap")
    return np.clip((field - field.mean()) / (2.0 * field.std()) + 0.5, 0.0, 1.0)


_PATTERNS: tuple[Callable[[np.random.Generator], Floats], ...] = (_stripes, _checks, _blobs)
