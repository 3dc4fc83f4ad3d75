"""Jobs are read with their own folder as the current one."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
