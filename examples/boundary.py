"""What the method is for: a map recovered at the edge of the keys, softmax attention beside local linear attention.

    python examples/boundary.py [--out docs/boundary.png]

Attention as regression: keys are points on a line, values are labels, queries are test points inside and outside of the keys.
Softmax attention averages labels, so that near the edge, where all neighbours lie on one side, it bends towards the inside;
LLA (``plx.LLA``) fits a line around each query, so that an affine map is recovered exactly, edge and beyond, and a smooth or
kinked one to second order where it is smooth. Writes the picture and prints the largest errors. Needs matplotlib (extra viz).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import parallax_compile as plx

KEYS = 48
BANDWIDTH = 0.12
"""Standard deviation of the weights around a query, in units of the keys' interval [-1, 1]."""
RIDGE = 1e-9
EDGE, BEYOND = 1.0, 1.25

MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "affine": lambda x: 0.8 * x + 0.3,
    "smooth": lambda x: torch.sin(2.5 * x),
    "kinked": lambda x: (x - 0.2).abs(),
}
MEMBERS = {"softmax": plx.SOFTMAX, "LLA": plx.LLA.replace(probe=plx.Solved(RIDGE))}


def near(query_points: Tensor, key_points: Tensor) -> Callable[..., Tensor]:
    """A ``score_mod`` that makes the weights a Gaussian kernel around each query: kernel regression's own weights."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = query_points[q_idx] - key_points[kv_idx]
        return -0.5 * (distance / BANDWIDTH) ** 2

    return score_mod


def estimates(queries: int = 251) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Query points ``[Lq]``, key points ``[Lk]``, and each member's estimate ``[Lq, maps]``, all maps in one call."""
    key_points = torch.linspace(-EDGE, EDGE, KEYS, dtype=torch.float64)
    query_points = torch.linspace(-BEYOND, BEYOND, queries, dtype=torch.float64)
    labels = torch.stack([function(key_points) for function in MAPS.values()], -1)
    query, key, value = query_points[None, None, :, None], key_points[None, None, :, None], labels[None, None]
    score_mod = near(query_points, key_points)
    found = {}
    for name, spec in MEMBERS.items():
        attend = torch.compile(lambda q, k, v, spec=spec: plx.attention(q, k, v, spec=spec, score_mod=score_mod))
        found[name] = attend(query, key, value)[0, 0]
    return query_points, key_points, found


def errors(query_points: Tensor, found: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """The largest error of each member on each map, over the last bandwidth inside of the edge and up to the edge."""
    edge = (query_points.abs() > EDGE - BANDWIDTH) & (query_points.abs() <= EDGE)
    return {
        name: {
            label: float((estimate[edge, i] - function(query_points[edge])).abs().max())
            for i, (label, function) in enumerate(MAPS.items())
        }
        for name, estimate in found.items()
    }


def draw(path: Path, query_points: Tensor, key_points: Tensor, found: dict[str, Tensor]) -> None:
    """One panel for each map: the truth, the labels, and both members."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(MAPS), figsize=(10.5, 3.2), layout="constrained")
    for i, (panel, (label, function)) in enumerate(zip(panels, MAPS.items(), strict=True)):
        panel.axvspan(-BEYOND, -EDGE, color="0.93")
        panel.axvspan(EDGE, BEYOND, color="0.93", label="no keys")
        panel.plot(query_points, function(query_points), color="0.6", linewidth=4, label="the map")
        panel.plot(key_points, function(key_points), ".", color="0.35", markersize=3, label="keys and values")
        panel.plot(query_points, found["softmax"][:, i], color="tab:red", label="softmax attention")
        panel.plot(query_points, found["LLA"][:, i], "--", color="tab:blue", label="LLA")
        panel.set_title(label)
        panel.set_xlim(-BEYOND, BEYOND)
        panel.set_xlabel("query")
    panels[0].legend(fontsize=7, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    """Estimate, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("boundary.png"), help="the picture (png, svg, pdf)")
    arguments = parser.parse_args()
    query_points, key_points, found = estimates()
    for name, by_map in errors(query_points, found).items():
        print(
            f"{name}: largest error at the edge " + ", ".join(f"{label} {error:.1e}" for label, error in by_map.items())
        )
    try:
        draw(arguments.out, query_points, key_points, found)
    except ImportError:
        print("matplotlib is not installed: no picture. pip install 'parallax-compile[viz]'", file=sys.stderr)
        return 1
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
