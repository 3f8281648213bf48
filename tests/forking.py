"""For tests that fork this interpreter."""

from __future__ import annotations

import torch


def count_gpus() -> None:
    """Have autograd count them now, while there are none.

    It does so at its first backward, once, and starts a thread for each; then backward works in no forked process. A torch
    that is built for CUDA counts eight imagined ones as soon as there has been a tensor without memory: if that was before
    the fork, each child starts eight threads, and now and then is aborted by them ("Invalid thread pool!").
    """
    if not torch.cuda.is_available():
        torch.zeros(1, requires_grad=True).backward()
