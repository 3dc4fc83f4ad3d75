"""What the fork server of `tests.ranks` loads before it forks: all that training a small base loads."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.utils.tensorboard.summary
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401

import pipeline.run  # noqa: F401

torch.set_num_threads(1)
