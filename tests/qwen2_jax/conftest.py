"""What the evaluations by lm-evaluation-harness are tested on."""

import pytest

from tests.oracles.harness import write_tasks


@pytest.fixture(scope="session")
def data_sets_stay_here(tmp_path_factory):
    """What the package of that name keeps goes away with the tests, in commands that they start too."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def tasks(tmp_path_factory, data_sets_stay_here):
    """A folder with NAME.yaml for each kind of task."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))
