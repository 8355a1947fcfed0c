"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets named by BOXWRIGHT_TEST_DATA; the test is skipped where there is none."""
    folder = os.environ.get("BOXWRIGHT_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("BOXWRIGHT_TEST_DATA does not name a folder of real data")
    return Path(folder).resolve()
