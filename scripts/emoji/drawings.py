"""The designers' drawings: fetched as npm packages, checked against pinned hashes, rendered to RGBA once.

    python scripts/emoji/drawings.py            # -> data/emoji/drawings.npz

Needs the `emoji` extra (resvg_py) and the `npm` client.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from catalogue import THINGS
from files import Refused, arguments, digest, need, whole
from PIL import Image

DATA = Path(__file__).resolve().parents[2] / "data" / "emoji"
SIDE = 128
"""Pixels a drawing is rendered at; twice the model's resolution."""
NEEDED_BYTES = 400 * 2**20
BLANK = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>'

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


ALIKE = (
    *("face", "rolling-on-the-floor-laughing", "star-struck", "oclock", "thirty", "taxi", "minibus", "trolleybus"),
    *("sport-utility-vehicle", "houses", "books", "sunglasses", "christmas-tree"),
)
"""Words of slugs that show a listed thing under another name: a yellow face is a smiley, "two-thirty" a clock."""
VARIANT = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "adult", "child", "facing", "right"}
"""Words that tell variants of one emoji apart."""


class DrawingsError(Refused):
    """A package cannot be had or is not the one the model was made from, or things are missing in it."""


def fetch(designer: str, folder: Path) -> dict[str, str]:
    """Return one designer's SVG documents by slug, fetching the package if it is not there yet.

    Raises:
        DrawingsError: no npm, no such package, or a package whose icons differ from the pinned hash.
    """
    package, pinned = PACKAGES[designer]
    target = folder / f"{designer}.json"
    if target.exists():
        raw = target.read_bytes()
        refuse_changed(raw, pinned, f"{target}; delete the file to fetch {package} again")
    else:
        raw = download(package, folder)
        refuse_changed(raw, pinned, f"{package} as npm has it now; the drawings it had cannot be made from it")
        with whole(target) as partial:
            partial.write_bytes(raw)
    icons = json.loads(raw)
    width, height = icons.get("width", 16), icons.get("height", 16)
    return {
        slug: f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {icon.get("width", width)} {icon.get("height", height)}">{icon["body"]}</svg>'
        for slug, icon in icons["icons"].items()
    }


def download(package: str, folder: Path) -> bytes:
    """Return the icons.json of an npm package; nothing stays in `folder`.

    Raises:
        DrawingsError: no npm, no such package, or no icons in it.
    """
    if shutil.which("npm") is None:
        raise DrawingsError("npm was not found; install Node.js (it only downloads the drawings) and run again")
    with tempfile.TemporaryDirectory(prefix="part.", dir=folder) as place:
        done = subprocess.run(["npm", "pack", "--silent", package], cwd=place, capture_output=True, text=True)
        archive = next(Path(place).glob("*.tgz"), None)
        if done.returncode or archive is None:
            why = done.stderr.strip() or "no reason given"
            raise DrawingsError(f"npm could not fetch {package}: {why}; mend the connection and run again")
        try:
            with tarfile.open(archive) as tar:
                member = tar.extractfile("package/icons.json")
                return member.read() if member else b""
        except (KeyError, tarfile.TarError, OSError) as error:
            raise DrawingsError(f"what npm fetched as {package} holds no icons ({error}); run again") from error


def refuse_changed(raw: bytes, pinned: str, what: str) -> None:
    """Raise DrawingsError, naming `what` differs, if the bytes do not have the pinned hash."""
    if (seen := digest([raw])) != pinned:
        raise DrawingsError(f"sha256 {seen} is not {pinned}, which the model was made from: {what}")


def render(svg: str) -> np.ndarray:
    """Return an SVG document as uint8 RGBA (128, 128, 4), straight alpha, black ink for `currentColor`.

    Raises:
        DrawingsError: no resvg_py.
    """
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise DrawingsError("resvg_py is missing; install it with: pip install -e '.[emoji]'") from error

    png = resvg_py.svg_to_bytes(svg_string=svg.replace("currentColor", "#000"), width=SIDE, height=SIDE)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGBA", (SIDE, SIDE))  # resvg keeps the document's proportions: a few are not square
    square.paste(drawing, ((SIDE - drawing.width) // 2, (SIDE - drawing.height) // 2))
    return np.asarray(square)


def slug(label: str) -> str:
    """Return the icon sets' slug of a Unicode label."""
    return label.lower().replace(" ", "-")


def outside(slugs: set[str]) -> list[str]:
    """Return those slugs that show nothing of the list, one for all the variants of an emoji."""
    listed = {name for t in THINGS for name in (slug(t.name), slug(t.label), *map(slug, t.synonyms))}
    shown = [s for s in sorted(slugs) if "skin-tone" not in s and not any(holds(s, n) for n in (*listed, *ALIKE))]
    return list({base(s): s for s in reversed(shown)}.values())[::-1]


def holds(slug: str, name: str) -> bool:
    """Return whether a slug holds the whole of a name: "black-cat" holds "cat", "red-heart" not "red-apple"."""
    return f"-{name}-" in f"-{slug}-"


def base(slug: str) -> str:
    """Return what the variants of one emoji share: "man-running-facing-right" and "person-running" are "running"."""
    return "-".join(word for word in slug.split("-") if word not in VARIANT) or "person"


def build(folder: Path = DATA, others: int = 300) -> Path:
    """Render every thing by every designer, and `others` things outside the list, into `drawings.npz`.

    The archive holds `things` (n_designers, n_things, 128, 128, 4), the `labels` of the things, `others`
    (m, 128, 128, 4) for the judge's "neither", each emoji by two designers in a row, and `designers`.
    """
    need(folder, NEEDED_BYTES)
    sets = {designer: fetch(designer, folder) for designer in PACKAGES}
    things = []
    for designer, svgs in sets.items():
        missing = [t.label for t in THINGS if slug(t.label) not in svgs]
        if missing:
            raise DrawingsError(f"{designer} does not draw {', '.join(missing)}; take them out of catalogue.py")
        things.append(np.stack([render(svgs[slug(t.label)]) for t in THINGS]))
        print(f"{designer}: {len(THINGS)} drawings", flush=True)
    unlisted = outside(set(sets["twemoji"]) & set(sets["noto"]))
    rng = np.random.default_rng(0)
    picked = [unlisted[i] for i in rng.permutation(len(unlisted))[:others]]
    extra = np.stack([render(sets[d][s]) for s in picked for d in ("twemoji", "noto")])
    labels, designers = [t.label for t in THINGS], list(PACKAGES)
    with whole(folder / "drawings.npz") as partial:
        np.savez_compressed(partial, things=np.stack(things), others=extra, labels=labels, designers=designers)
    return folder / "drawings.npz"


def main() -> None:
    """Render the drawings, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    args = arguments(parser)
    render(BLANK)  # what cannot be rendered need not be fetched
    print("drawings are in", build(args.data))


if __name__ == "__main__":
    main()
