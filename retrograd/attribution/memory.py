"""How much memory this process, or its accelerator, has held at most."""

import sys

import torch


def peak_memory(device: torch.device) -> int | None:
    """Return bytes, or None where the system does not tell.

    >>> peak_memory(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes everywhere but there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
