"""Work that is spread over processes and machines."""

from retrograd.distributed.ray_executor import RayExecutor

__all__ = ["RayExecutor"]
