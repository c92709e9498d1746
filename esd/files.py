"""Look into erased checkpoints and turn them into other forms: `python -m esd.files inspect runs/cat`.

An `erased.safetensors` holds float32 differences from a base, and its provenance. `export --format
official` writes the absolute weights in the form of the original ESD scripts, for
`pipe.unet.load_state_dict(..., strict=False)`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from esd.errors import UserError
from esd.main import tell


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m esd.files", description=(__doc__ or "").split("\n\n")[1])
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="print provenance, and the size of every difference")
    look.add_argument("file", help="erased.safetensors or a run directory")
    look.add_argument("--tensors", action="store_true", help="list every tensor, not only the ten that moved most")
    export = commands.add_parser("export", help="write the checkpoint in another form")
    export.add_argument("file", help="erased.safetensors or a run directory")
    export.add_argument(
        "--format", choices=["official"], required=True, help="official: absolute weights, bare UNet keys"
    )
    export.add_argument("--out", required=True, type=Path, help="file to write")
    export.add_argument(
        "--model", help="the base, a folder or a name on the hub; unless given, the one that the checkpoint names"
    )
    export.add_argument("--revision", help="commit of a base on the hub; unless given, the checkpoint's")
    arguments = parser.parse_args()
    try:
        if arguments.command == "inspect":
            inspect(arguments.file, every=arguments.tensors)
        else:
            export_official(arguments.file, arguments.out, arguments.model, arguments.revision)
    except UserError as error:
        sys.exit(tell(error))


def inspect(file: str, *, every: bool = False) -> None:
    """Prints provenance, how many values a checkpoint changes and by how much, and what moved most."""
    from esd import checkpoint

    found = checkpoint.load(file)
    for name, value in found.provenance.items():
        if name != "fingerprint":
            print(f"{name:<16} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    norms = {name: float(tensor.norm()) for name, tensor in found.differences.items()}
    values = sum(tensor.numel() for tensor in found.differences.values())
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    print(f"{'tensors':<16} {len(norms)}, {values:,} values, differing from the base by {total:.4g} (L2)")
    listed = sorted(norms, key=lambda name: -norms[name])
    for name in listed if every else listed[:10]:
        print(f"  {norms[name]:<10.4g} {'x'.join(map(str, found.differences[name].shape)):<16} {name}")


def export_official(file: str, out: Path, model: str | None = None, revision: str | None = None) -> None:
    """Writes the absolute weights of the changed tensors; the base is loaded to add them to.

    Args:
        file: a checkpoint or a run directory.
        out: file to write.
        model: the base, or None for the one that the checkpoint names.
        revision: commit of a base on the hub, or None for the checkpoint's where it is that base.

    Raises:
        UserError: the file cannot be written, or the base cannot be had or is another.
    """
    from esd import checkpoint
    from esd.families import check_model, load_pipeline

    if out.exists():
        raise UserError(f"--out {out} exists; remove it, or name another file")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or name another file")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: you may not write to the folder {out.parent}; name a file elsewhere")
    found = checkpoint.load(file)
    named = str(found.provenance.get("base", ""))
    base = model or named
    if revision and Path(base).exists():
        raise UserError(f"--revision {revision}: the base {base} is a folder, which has no revisions; leave it out")
    check_model(base, setting="--model")
    if base == named:
        revision = revision or found.provenance.get("revision")
    checkpoint.export_official(found, load_pipeline(base, revision=revision, setting="--model"), out)
    print(
        f"wrote {out}; load it with pipe.unet.load_state_dict(safetensors.torch.load_file({str(out)!r}), strict=False)"
    )


if __name__ == "__main__":
    main()
