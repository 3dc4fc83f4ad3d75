"""What the fork server of `tests.lives` loads before it forks."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import pipeline.run  # noqa: F401

torch.set_num_threads(1)
