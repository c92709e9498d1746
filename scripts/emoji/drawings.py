"""The designers' drawings: fetched as npm packages, checked against pinned hashes, rendered to RGBA once.

    python scripts/emoji/drawings.py            # -> data/emoji/drawings.npz

Needs the `emoji` extra (resvg_py, scipy) and the `npm` client.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from catalogue import THINGS
from PIL import Image

DATA = Path(__file__).resolve().parents[2] / "data" / "emoji"
SIDE = 128
"""Pixels a drawing is rendered at; twice the model's resolution."""
NEEDED_BYTES = 400 * 2**20

PACKAGES = {
    "twemoji": ("@iconify-json/twemoji@1.2.5", "5d5d820790565b764f2728675d487c9ee4c1fc83916d8567d5aca8ba7527c242"),
    "noto": ("@iconify-json/noto@1.2.9", "9eac6ef4e7ec122b6f0e7ac281d61008afdbc720d0ce861e398b939daaa347c6"),
    "fluent-emoji": (
        "@iconify-json/fluent-emoji@1.2.7",
        "87f3336be6f46747d40d046a15ffa8b23809ff7a1a280b5d3521d3782fb85de7",
    ),
    "fluent-emoji-high-contrast": (
        "@iconify-json/fluent-emoji-high-contrast@1.2.6",
        "c522fb74fef65ccef67b38dfdbf0f3dcd4353339e4b8faec4aa45faf83ed4739",
    ),
}
"""Designer -> (npm package, sha256 of the package's icons.json)."""


class DrawingsError(RuntimeError):
    """A package cannot be had or is not the one the model was made from, or there is no room for it."""


def fetch(designer: str, folder: Path) -> dict[str, str]:
    """Return one designer's SVG documents by slug, fetching the package if it is not there yet.

    Raises:
        DrawingsError: no npm, no such package, or a package whose icons differ from the pinned hash.
    """
    package, pinned = PACKAGES[designer]
    target = folder / f"{designer}.json"
    if not target.exists():
        if shutil.which("npm") is None:
            raise DrawingsError("npm was not found; install Node.js (it only downloads the drawings) and run again")
        done = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise DrawingsError(f"npm could not fetch {package}: {done.stderr.strip() or 'no reason given'}")
        archive = folder / done.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None
            partial = target.with_suffix(".part")
            partial.write_bytes(member.read())
        os.replace(partial, target)
        archive.unlink()
    raw = target.read_bytes()
    seen = hashlib.sha256(raw).hexdigest()
    if pinned and seen != pinned:
        raise DrawingsError(
            f"{target} has sha256 {seen}, the model was made from {pinned}; delete the file to fetch {package} again"
        )
    icons = json.loads(raw)
    width, height = icons.get("width", 16), icons.get("height", 16)
    return {
        slug: f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {icon.get("width", width)} {icon.get("height", height)}">{icon["body"]}</svg>'
        for slug, icon in icons["icons"].items()
    }


def render(svg: str) -> np.ndarray:
    """Return an SVG document as uint8 RGBA (128, 128, 4), straight alpha, black ink for `currentColor`."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg.replace("currentColor", "#000"), width=SIDE, height=SIDE)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGBA", (SIDE, SIDE))  # resvg keeps the document's proportions: a few are not square
    square.paste(drawing, ((SIDE - drawing.width) // 2, (SIDE - drawing.height) // 2))
    return np.asarray(square)


def slug(label: str) -> str:
    """Return the icon sets' slug of a Unicode label."""
    return label.lower().replace(" ", "-")


def build(folder: Path = DATA, others: int = 300) -> Path:
    """Render every thing by every designer, and `others` things outside the list, into `drawings.npz`.

    The archive holds `things` (n_designers, n_things, 128, 128, 4), `others` (m, 128, 128, 4) for the judge's
    "neither", and `designers`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < NEEDED_BYTES:
        raise DrawingsError(f"{folder} has less than {NEEDED_BYTES // 2**20} MiB free; make room and run again")
    sets = {designer: fetch(designer, folder) for designer in PACKAGES}
    things = []
    for designer, svgs in sets.items():
        missing = [t.label for t in THINGS if slug(t.label) not in svgs]
        if missing:
            raise DrawingsError(f"{designer} does not draw {', '.join(missing)}; take them out of catalogue.py")
        things.append(np.stack([render(svgs[slug(t.label)]) for t in THINGS]))
        print(f"{designer}: {len(THINGS)} drawings", flush=True)
    known = {slug(t.label) for t in THINGS}
    related = {word for t in THINGS for word in (t.name.replace(" ", "-"), *slug(t.label).split("-"))}
    outside = sorted(
        s for s in sets["twemoji"] if s in sets["noto"] and s not in known and not related & set(s.split("-"))
    )
    rng = np.random.default_rng(0)
    outside = [outside[i] for i in rng.permutation(len(outside))[:others]]
    extra = np.stack([render(sets[d][s]) for s in outside for d in ("twemoji", "noto")])
    partial = folder / "drawings.part.npz"
    np.savez_compressed(partial, things=np.stack(things), others=extra, designers=np.array(list(PACKAGES)))
    os.replace(partial, folder / "drawings.npz")
    return folder / "drawings.npz"


def main() -> None:
    """Render the drawings, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    try:
        print("drawings are in", build(parser.parse_args().data))
    except DrawingsError as error:
        sys.exit(f"drawings: {error}")


if __name__ == "__main__":
    main()
