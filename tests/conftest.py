"""What every test gets: one thread, a cache of its own, and a plain terminal."""

import pytest
import torch

pytest_plugins = ["stock_directories"]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test writes reaches the user's cache, and no test sees what another has cached."""
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
