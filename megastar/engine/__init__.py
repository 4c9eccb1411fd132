"""The only package that imports deepspeed. What must be said before that import is said here."""

import os
import warnings

import torch

if not torch.cuda.is_available():
    # DeepSpeed would otherwise guess, and tell about its guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# torch 2.13 renamed two collectives that DeepSpeed calls: a warning a call, none of them the user's to mend.
warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated.*")
