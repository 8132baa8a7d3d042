"""All bad inputs as one table."""

from __future__ import annotations

from tests.torture import bad_files, bad_options
from tests.torture.rows import Row


def rows() -> list[Row]:
    """Every row once."""
    return list({(row.command, row.name): row for row in [*bad_options.rows(), *bad_files.rows()]}.values())
