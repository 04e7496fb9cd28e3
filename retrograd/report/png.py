"""Small images as text, so that a page can carry them inside.

PNG (ISO/IEC 15948): a signature, then chunks ``length · type · data · CRC-32 of type and data``. IHDR holds size, bit depth and
colour type (0 grey, 2 RGB), IDAT the rows compressed by zlib, each behind a byte that names its filter (0: none), IEND the end.
"""

import base64
import struct
import zlib

import torch
from torch import Tensor

from retrograd.errors import InputError


def encode_png(image: Tensor) -> bytes:
    r"""Encode an image as PNG.

    Args:
        image: grey ``[height, width]`` or RGB ``[height, width, 3]``; bytes, or floats from 0 (black) to 1 (white).

    >>> encode_png(torch.tensor([[0.0, 1.0]]))[:8]
    b'\x89PNG\r\n\x1a\n'
    """
    if image.dim() not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.numel():
        raise InputError(f"an image has shape [height, width] or [height, width, 3], got {tuple(image.shape)}.")
    if not image.is_floating_point() and image.dtype != torch.uint8:
        raise InputError(f"an image holds bytes, or floats from 0 to 1, got {image.dtype}.")
    pixels = image.detach().cpu()
    if image.is_floating_point():
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    height, width = pixels.shape[:2]
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.reshape(height, -1)], dim=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if pixels.dim() == 2 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.numpy().tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def data_uri(image: Tensor) -> str:
    """Return an image as the text that goes into ``src="…"``."""
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
