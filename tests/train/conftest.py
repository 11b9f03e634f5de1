"""What the tests of whole runs share."""

import pytest

from tests.train.runs import Runner, make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def train_run(model, monkeypatch):
    """train_run(folder, *flags, ...) -> what the run did; see `Runner`."""
    return Runner(model, monkeypatch)
