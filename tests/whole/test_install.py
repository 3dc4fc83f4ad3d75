"""The wheel works in another environment and from any folder, and brings ds_configs/, slurm/ and the paper's shapes along."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from pipeline.job.files import BASES
from tests.training import write_job

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pipeline", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = out.glob("zlora-*.whl")
    return file


def test_the_wheel_holds_the_package_and_its_files_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("ds_configs", "slurm"):
        shipped = {f"pipeline/{folder}/{file.name}" for file in (ROOT / folder).iterdir()}
        assert shipped
        assert shipped <= set(names)
    assert {f"pipeline/{file.relative_to(ROOT / 'pipeline')}" for file in BASES.glob("*/config.json")} <= set(names)
    assert {name.split("/")[0] for name in names} == {"pipeline", f"zlora-{wheel.name.split('-')[1]}.dist-info"}


def test_it_runs_from_any_folder_of_another_environment(wheel, gpt2_base, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(
        subprocess.run([python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True).stdout.strip()
    )
    zipfile.ZipFile(wheel).extractall(site)
    # The dependencies are those of this environment; zlora itself comes from the wheel, which stands first on the path.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    elsewhere = tmp_path / "elsewhere"
    job = write_job(elsewhere, gpt2_base)
    where = subprocess.run([python, "-c", "import pipeline.run as r; print(r.__file__)"], cwd=elsewhere, capture_output=True, text=True)
    assert where.stdout.startswith(str(site))
    done = subprocess.run([python, "-m", "pipeline", "train", job, "--set", "train.steps=1"], cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted = subprocess.run([python, "-m", "pipeline", "methods"], cwd=elsewhere, capture_output=True, text=True)
    assert "gpt3-175b: 174,604,259,328 parameters" in counted.stdout
    resolved = (elsewhere / "runs" / "job" / "job.toml").read_text()
    assert str(site / "pipeline" / "ds_configs" / "zero3.json") in resolved
