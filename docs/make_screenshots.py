"""TensorBoard's pages of a short run, as a browser shows them, as PNG files.

    python docs/make_screenshots.py FOLDER [--runs RUNS]

Trains the demo's two jobs for a minute each and profiles one (unless --runs names a folder of runs that are there), starts TensorBoard
on them and has a headless Chromium take a picture of each page. Needs chromium or google-chrome, and two free cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.cluster.launch import PROGRAM, visible_gpus

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--disable-3d-apis",
)  # fmt: skip
PAGES = {
    "time_series": ("timeseries", 1900, False),
    "scalars": ("scalars", 1500, True),
    "custom_scalars": ("custom_scalars", 1000, True),
    "text": ("text", 1700, False),
    "images": ("images", 1000, False),
    "histograms": ("histograms", 800, False),
    "distributions": ("distributions", 800, False),
    "hparams": ("hparams", 500, True),
}
"""Name -> TensorBoard's page, its height in pixels, and whether all runs are shown or the first of them."""
RENDER_MS = 25_000
DEMO = ("evaluate.every_steps=20", "train.save_every_steps=40", "evaluate.max_prompts=30")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("folder", type=Path, help="where the pictures go")
    asked.add_argument("--runs", type=Path, help="a folder of runs; absent: two are trained")
    arguments = asked.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"error: no browser: none of {', '.join(BROWSERS)} is on the PATH. Install one (apt install chromium).")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = arguments.runs or trained(Path(scratch) / "runs")
        found = sorted(file.parent for file in runs.glob("*/job.toml"))
        for every in (True, False):
            with tensorboard(found if every else found[:1]) as address:
                for name in (name for name, (_, _, all_runs) in PAGES.items() if all_runs == every):
                    page, height, _ = PAGES[name]
                    file = arguments.folder / f"{name}.png"
                    picture(browser, f"{address}/?darkMode=false#{page}", file, height)
                    print(f"{file}  ({file.stat().st_size / 1024:.0f} KiB)")


def trained(runs: Path) -> Path:
    """The demo's two jobs, briefly."""
    ranks = [] if visible_gpus() else ["--ranks", "2"]
    sets = [word for value in DEMO for word in ("--set", value)]
    for task in ("films", "trains"):
        command = [sys.executable, "-c", PROGRAM, "train", f"jobs/demo/{task}.toml", "--run", str(runs / task), *ranks, *sets]
        subprocess.run(command, cwd=ROOT, check=True)
    command = [sys.executable, "-c", PROGRAM, "profile", "jobs/demo/films.toml", "--run", str(runs / "films"), *ranks]
    subprocess.run(command, cwd=ROOT, check=True)
    return runs


@contextmanager
def tensorboard(runs: list[Path]) -> Iterator[str]:
    """Its address, once it answers and has read the runs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    places = [(run.name, run / "tensorboard") for run in runs] + [(f"{run.name} profile", run / "profile") for run in runs]
    named = ",".join(f"{name}:{place.resolve()}" for name, place in places if place.is_dir())
    command = [sys.executable, "-m", "tensorboard.main", "--logdir_spec", named, "--port", str(port), "--load_fast", "false"]
    # Every histogram and text that there is, not a sample.
    server = subprocess.Popen(
        [*command, "--samples_per_plugin", "text=100,histograms=100"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    address = f"http://localhost:{port}"
    try:
        for _ in range(120):
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags") as answer:
                    if b"train/loss" in answer.read():
                        break
            except OSError:
                continue
        else:
            sys.exit("error: TensorBoard shows no run. Name a folder with folders that zlora train has written.")
        yield address
    finally:
        server.terminate()
        server.wait()


def picture(browser: str, address: str, file: Path, height: int) -> None:
    """What a window of 1400 pixels shows of a page when it has loaded."""
    with tempfile.TemporaryDirectory() as profile:
        size = [f"--user-data-dir={profile}", f"--window-size=1400,{height}", f"--virtual-time-budget={RENDER_MS}"]
        subprocess.run(
            [browser, *QUIET, *size, f"--screenshot={file.resolve()}", address],
            check=True, timeout=180, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "TZ": "UTC"},
        )  # fmt: skip


if __name__ == "__main__":
    main()
