"""Pictures of a block mask: of characters for the terminal, and PNG."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError, UnsupportedError

__all__ = ["save", "text"]

_CHARACTERS = ("·", "▒", "█")  # empty, partial, full
_NO_MASK = "the call has no mask: every key is allowed"


def text(blocks: Tensor | None, width: int = 64) -> str:
    """Rows of queries, columns of keys; where blocks share a character it is partial unless all agree.

    Args:
        blocks: 0 empty, 1 partial, 2 full, ``[q blocks, kv blocks]``.
        width: characters of a row at most.
    """
    if blocks is None:
        return _NO_MASK
    rows, columns = blocks.shape
    step = max(1, -(-columns // width), -(-rows // width))
    lines = []
    for top in range(0, rows, step):
        cells = [blocks[top : top + step, left : left + step] for left in range(0, columns, step)]
        lines.append("".join(_CHARACTERS[_kind(cell)] for cell in cells))
    share = ", ".join(
        f"{character} {name} {float((blocks == kind).double().mean()):.0%}"
        for kind, (character, name) in enumerate(zip(_CHARACTERS, ("empty", "partial", "full"), strict=True))
    )
    scale = f"; a character is {step}x{step} blocks" if step > 1 else ""
    return "\n".join([*lines, f"queries down, keys across: {share}{scale}"])


def _kind(cell: Tensor) -> int:
    least, most = int(cell.min()), int(cell.max())
    return least if least == most else 1


def save(blocks: Tensor | None, path: str | Path, title: str) -> Path:
    """Write the picture as PNG.

    Raises:
        InputError: there is no mask; the file cannot be written.
        UnsupportedError: matplotlib is not installed.
    """
    if blocks is None:
        raise InputError(f"there is no picture of the mask: {_NO_MASK}.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("a PNG needs matplotlib: pip install 'parallax-compile[viz]'.") from error
    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(blocks.to(torch.float32).cpu().numpy(), cmap="Blues", vmin=0, vmax=2, interpolation="nearest")
    axes.set(title=f"{title}: dark full, light partial, white empty", xlabel="key blocks", ylabel="query blocks")
    path = Path(path)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise InputError(f"cannot write the mask's picture to {path}: {error.strerror or error}.") from error
    return path
