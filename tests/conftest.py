"""Fixtures of all tests: the shipped network and images, and a check that nobody touches global random states."""

import random

import numpy as np
import pytest
import torch

from queryfoil import data, models


@pytest.fixture(scope="session")
def network():
    return models.load("fashion-resnet")


@pytest.fixture(scope="session")
def clothes():
    return data.load("fashion-mnist", "attack")


@pytest.fixture
def same_random_states():
    """Fails the test if it changed the global random state of torch, NumPy or Python."""

    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    yield
    assert states() == before
