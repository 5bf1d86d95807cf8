"""What the tests with real processes share: worlds that leave nothing behind, whatever becomes of the test."""

import pytest
import torch

from tests.e2e.processes import World


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # the nodes need the rest


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path / "world")
    yield world
    world.close()
