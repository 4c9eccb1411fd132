"""The training engine. Sets what DeepSpeed needs before its import."""

import os
import warnings

import torch

if not torch.cuda.is_available():
    # DeepSpeed would otherwise guess, and log its guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# torch 2.13 renamed two collectives that DeepSpeed calls: one warning per call, which a user cannot fix.
warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated.*")
