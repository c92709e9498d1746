"""Names of files and folders: as typed, made from any text, and where esd keeps its settings."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from esd.errors import UserError


def expanded(path: Any) -> Any:
    """A path with a leading ~ replaced by the home directory; None stays None."""
    return os.path.expanduser(path) if path else path


def slug(text: str) -> str:
    """A file name for any text: plain letters and digits for the eye, 8 hex digits of a hash."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    return f"{plain or 'concept'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def conf_dir() -> Path:
    """The folder of YAML files: inside the package in a wheel, beside it in a clone.

    Raises:
        UserError: neither exists, so the installation is incomplete.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise UserError(f"no conf/ in {package} or beside it: this installation of esd is incomplete; install it again")
