import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The networks here are so small that threads would mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
