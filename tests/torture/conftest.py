from __future__ import annotations

import pytest

from tests.torture import world as worlds
from tests.torture.world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return worlds.build(tmp_path_factory.mktemp("world"))
