"""The styles: three designers as they are, and seven computed from a drawing the way UnlearnCanvas made its own.

A canvas is float32 RGBA in [0, 1], straight alpha, 128 x 128; a style turns it into float32 RGB of the same
size. Textures (tiles, cells, paper) are cut from the page and not from the drawing, so a style looks the same
behind one thing, two things, or nothing. Randomness comes in through `rng` alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

Style = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def over(canvas: np.ndarray, background: np.ndarray | tuple[float, ...]) -> np.ndarray:
    """Return the canvas laid over a background: (h, w, 3) in [0, 1]."""
    alpha = canvas[..., 3:]
    return canvas[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Return the image after a Gaussian of `sigma` pixels over its two spatial axes."""
    return ndimage.gaussian_filter(image, (sigma, sigma) + (0,) * (image.ndim - 2))


def saturate(rgb: np.ndarray, amount: float) -> np.ndarray:
    """Return the colours pushed away from (amount > 1) or towards (amount < 1) their grey."""
    grey = rgb.mean(-1, keepdims=True)
    return np.clip(grey + amount * (rgb - grey), 0, 1)


def edges(canvas: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """Return the strength of contours, inner and outer: (h, w) in [0, 1]."""
    layers = [over(canvas, (1, 1, 1)).mean(-1), canvas[..., 3], *np.moveaxis(over(canvas, (0.5, 0.5, 0.5)), -1, 0)]
    strength = np.zeros(canvas.shape[:2], np.float32)
    for layer in layers:
        smooth = ndimage.gaussian_filter(layer, sigma)
        strength = np.maximum(strength, np.hypot(ndimage.sobel(smooth, 0), ndimage.sobel(smooth, 1)))
    return np.clip(strength / 0.9, 0, 1)


def plain(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The designer's drawing on white."""
    return over(canvas, (1, 1, 1))


def stencil(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Black ink on brown card (the high-contrast designer draws in one colour)."""
    ink = canvas.copy()
    ink[..., :3] = 0.08
    return over(ink, (0.82, 0.66, 0.46))


def mosaic(canvas: np.ndarray, rng: np.random.Generator, tile: int = 8) -> np.ndarray:
    """Square tiles of one colour, dark grout between them, on a sea-green floor."""
    rgb = over(canvas, (0.62, 0.80, 0.76))
    height, width = rgb.shape[:2]
    tiles = rgb.reshape(height // tile, tile, width // tile, tile, 3).mean((1, 3))
    tiles = tiles + rng.normal(0, 0.03, (*tiles.shape[:2], 1))
    flat = tiles.repeat(tile, 0).repeat(tile, 1)
    picture = 0.7 * flat + 0.3 * rgb
    rows, columns = np.arange(height) % tile < 2, np.arange(width) % tile < 2
    picture[rows] *= 0.55
    picture[:, columns] *= 0.55
    return np.clip(picture, 0, 1)


def pencil(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey contour lines and diagonal hatching on white paper."""
    tone = over(canvas, (1, 1, 1)).mean(-1)
    y, x = np.mgrid[: tone.shape[0], : tone.shape[1]]
    hatch = 0.5 + 0.5 * np.sin((x + y) * 2 * np.pi / 6)
    shade = np.clip(1 - tone, 0, 1) * (0.25 + 0.45 * hatch)
    grey = 0.97 - 0.6 * shade - 0.75 * edges(canvas, 0.8)
    return np.clip(grey, 0.12, 1)[..., None] * np.array([1.0, 0.99, 0.97], np.float32)


def neon(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Glowing coloured contours on near-black."""
    line = edges(canvas, 1.0)[..., None] ** 1.5
    colour = saturate(blur(over(canvas, (0.5, 0.5, 0.5)), 2.0), 2.5)
    colour = 0.25 + 0.75 * colour / np.maximum(colour.max(-1, keepdims=True), 1e-3)
    tube = line * colour
    glow = blur(tube, 4.0)
    return np.clip(np.array([0.05, 0.02, 0.12], np.float32) + 1.1 * tube + 0.8 * glow, 0, 1)


def blueprint(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White lines on blue paper with a grid."""
    height, width = canvas.shape[:2]
    paper = np.tile(np.array([0.10, 0.30, 0.66], np.float32), (height, width, 1))
    grid = (np.arange(height) % 16 < 2)[:, None] | (np.arange(width) % 16 < 2)[None]
    paper[grid] += 0.10
    tone = 0.25 * over(canvas, (0, 0, 0)).mean(-1) * canvas[..., 3]
    line = np.clip(edges(canvas, 0.8) + tone, 0, 1)[..., None]
    return paper * (1 - line) + np.array([0.93, 0.97, 1.0], np.float32) * line


def stained_glass(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Saturated panes in dark lead on a window of violet and amber cells."""
    height, width = canvas.shape[:2]
    points = (np.mgrid[0:5, 0:5].reshape(2, -1).T + rng.uniform(0.15, 0.85, (25, 2))) * (height / 5)
    y, x = np.mgrid[:height, :width]
    distance = (y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2
    cell = distance.argmin(-1)
    lead = ndimage.grey_dilation(cell, 3) != ndimage.grey_erosion(cell, 3)
    palette = np.array([[0.42, 0.20, 0.62], [0.85, 0.60, 0.18], [0.55, 0.35, 0.75], [0.70, 0.42, 0.12]], np.float32)
    window = palette[rng.integers(0, len(palette), 25)][cell]
    window[lead] = 0.06
    glass = canvas.copy()
    glass[..., :3] = np.round(saturate(blur(canvas[..., :3], 1.0), 1.8) * 4) / 4
    picture = over(glass, window)
    contour = np.clip(edges(canvas, 1.3) * 1.5, 0, 1)[..., None]
    return picture * (1 - contour) + 0.06 * contour


def watercolor(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Soft pale washes that bleed into warm paper, darker where they dry."""
    shift = [6 * ndimage.gaussian_filter(rng.normal(0, 8, canvas.shape[:2]), 8) for _ in range(2)]
    y, x = np.mgrid[: canvas.shape[0], : canvas.shape[1]]
    wobbled = np.stack(
        [
            ndimage.map_coordinates(canvas[..., c], [y + shift[0], x + shift[1]], order=1, mode="nearest")
            for c in range(4)
        ],
        -1,
    )
    wash = blur(wobbled, 2.2)
    paper = np.array([0.98, 0.95, 0.88], np.float32)
    tint = over(wash, paper)
    halo = blur(wobbled[..., 3:], 9.0) * 0.35
    mean = (wobbled[..., :3] * wobbled[..., 3:]).sum((0, 1)) / max(float(wobbled[..., 3].sum()), 1.0)
    ground = paper * (1 - halo) + mean * halo
    alpha = np.clip(wash[..., 3:], 0, 1) * 0.8
    picture = ground * (1 - alpha) + saturate(tint, 1.25) * alpha
    rim = np.clip(edges(wash, 1.2), 0, 1)[..., None] * 0.25
    grain = ndimage.gaussian_filter(rng.normal(0, 1, canvas.shape[:2]), 1.2)[..., None] * 0.05
    return np.clip(picture * (1 - rim) + grain, 0, 1)


def pop_art(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Loud posterised colour and thick outlines on a yellow page of red dots."""
    height, width = canvas.shape[:2]
    page = np.tile(np.array([1.0, 0.86, 0.10], np.float32), (height, width, 1))
    y, x = np.mgrid[:height, :width]
    dots = ((x % 16 - 8) ** 2 + ((y + 8 * ((x // 16) % 2)) % 16 - 8) ** 2) < 14
    page[dots] = (0.95, 0.25, 0.25)
    loud = canvas.copy()
    loud[..., :3] = np.round(saturate(canvas[..., :3], 2.2) * 2) / 2
    picture = over(loud, page)
    outline = np.clip(blur(edges(canvas, 1.0), 0.8) * 2.2 - 0.3, 0, 1)[..., None]
    return picture * (1 - outline) + 0.02 * outline


SOURCES = ("twemoji",)
"""Designers whose drawings the computed styles start from. More of them make richer pictures and longer training."""

RENDER: dict[str, tuple[Style, tuple[str, ...]]] = {
    "flat": (plain, ("twemoji",)),
    "glossy": (plain, ("fluent-emoji",)),
    "stencil": (stencil, ("fluent-emoji-high-contrast",)),
    "mosaic": (mosaic, SOURCES),
    "pencil": (pencil, SOURCES),
    "neon": (neon, SOURCES),
    "blueprint": (blueprint, SOURCES),
    "stained glass": (stained_glass, SOURCES),
    "watercolor": (watercolor, SOURCES),
    "pop art": (pop_art, SOURCES),
}
"""Each style's rendering and the designers whose drawings it starts from."""
