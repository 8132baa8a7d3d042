"""Accept an edit of a sealed JSON file (config.json of a checkpoint, manifest.json, samples.json, metrics.json, ...).

    python -m runtime.seal exps/plain/checkpoints/0400000/config.json

These files hold a digest of their own content, so that damage is noticed. After an intended edit, this command writes
the digest anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime import errors, files
from runtime.errors import require
from runtime.options import option, read


@dataclass(frozen=True, kw_only=True)
class Options:
    file: str = option(help="the edited file; may come first, without the flag")


def main(argv: Sequence[str] | None = None) -> None:
    """Seal the file as it is now."""
    file = read(Options, argv, prog="python -m runtime.seal", description=__doc__, first="file").file
    value = files.read_json(file)
    require(
        isinstance(value, dict) and files.SEAL in value,
        f"{file} has no {files.SEAL}: give a file that has, such as the config.json of a checkpoint",
    )
    if value[files.SEAL] == files.seal(value):
        print(f"{file}: nothing to do, its seal fits")
        return
    files.write_sealed(file, value)
    print(f"{file}: sealed")


if __name__ == "__main__":
    errors.run(main)
