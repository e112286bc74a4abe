"""What every test file needs. Its place also puts the repository's root on the import path, for the files in tests/."""

import pytest
import torch

import parallel


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads on a busy two-core machine are slower than one, and erratic."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def world_of_one():
    """The process group that train.main makes; here one for all tests."""
    parallel.start_ranks("cpu", timeout_minutes=5)
    yield
    torch.distributed.destroy_process_group()
