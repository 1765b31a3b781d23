"""The main job, on real input: declare, explain, train, check, and look at the kernels. `make demo` runs it.

    python examples/demo.py [--out demo_out] [--steps 50] [--device auto] [--seed 0] [--quick]

1. declares two variants and explains their plans;
2. checks the compiled calls, outputs and gradients, against the float64 reference;
3. trains a small byte-level language model on the standard library's own Python sources, Parallax beside softmax attention,
   from the same seed and in the same order;
4. writes the generated GPU kernels (no GPU needed), a loss plot and a summary under --out.

Exits with 1 when an accuracy check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from language_model import LanguageModel
from tabulate import tabulate
from torch import Tensor, nn

import parallax_compile as plx

CONTEXT = 128
BATCH = 8


def variants(heads: int) -> dict[str, plx.AttentionSpec]:
    """Two declarations: the member as the paper has it, and one with mods of its own."""
    return {
        "parallax": plx.PARALLAX.replace(mask_mod=plx.masks.causal()),
        "mine": plx.AttentionSpec(
            score_mod=plx.mods.alibi(heads),
            covariance_mod=plx.mods.tanh_cap(8.0),
            mask_mod=plx.masks.sliding_window(96),
        ),
    }


def heading(text: str) -> None:
    """A section of the console output."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


# --- accuracy -------------------------------------------------------------------------------------------------------


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|`` in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def check(specs: dict[str, plx.AttentionSpec], device: str) -> tuple[list[dict[str, Any]], bool]:
    """Compiled outputs and gradients against float64, beside what the reference itself loses in the same dtype."""
    rows, passed = [], True
    dtypes = (torch.float32, torch.bfloat16)
    for name, spec in specs.items():
        generator = torch.Generator().manual_seed(1)
        base = [torch.randn(2, 4, 200, 48, generator=generator, dtype=torch.float64) for _ in range(4)]
        weights = torch.randn(2, 4, 200, 48, generator=generator, dtype=torch.float64)

        def call(*inputs: Tensor, spec: plx.AttentionSpec = spec) -> Tensor:
            return plx.attention(*inputs, spec=spec)

        def run(function: Any, dtype: torch.dtype, base: Any = base, weights: Any = weights) -> list[Tensor]:
            inputs = [tensor.to(device, dtype).requires_grad_() for tensor in base]
            out = function(*inputs)
            return [out.detach(), *torch.autograd.grad(out, inputs, weights.to(out))]

        want = run(call, torch.float64)
        for dtype in dtypes:
            torch._dynamo.reset()
            got = run(torch.compile(call, fullgraph=True), dtype)
            # What rounding the inputs and outputs to the dtype costs by itself: no computation in it can do better.
            rounded = run(call, dtype)
            for label, mine, reference, exact in zip(("out", "dq", "dk", "dv", "dr"), got, rounded, want, strict=True):
                error, floor = relative_error(mine, exact), relative_error(reference, exact)
                good = error <= 3 * floor + 2 * torch.finfo(dtype).eps
                passed &= good
                rows.append(
                    {
                        "variant": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "tensor": label,
                        "compiled": error,
                        "reference in dtype": floor,
                        "ok": "yes" if good else "NO",
                    }
                )
    return rows, passed


# --- data -----------------------------------------------------------------------------------------------------------


def corpus(limit: int) -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's sources, in the order of their names; every tenth file is for validation."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    train, validation = bytearray(), bytearray()
    for position, path in enumerate(files):
        (validation if position % 10 == 9 else train).extend(path.read_bytes())
        if len(train) > limit:
            break

    def tokens(data: bytearray) -> Tensor:
        return torch.frombuffer(data, dtype=torch.uint8).long()

    return tokens(train), tokens(validation)


def batches(tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """Windows of ``CONTEXT + 1`` bytes at random places, the same for the same seed: ``[BATCH, CONTEXT + 1]``."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, tokens.numel() - CONTEXT - 1, (BATCH,), generator=generator)
        yield torch.stack([tokens[start : start + CONTEXT + 1] for start in starts.tolist()])


# --- training -------------------------------------------------------------------------------------------------------


def optimizers(model: nn.Module, steps: int) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Muon for the hidden matrices, AdamW for the rest; warm-up, then a cosine, for both."""
    hidden = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name and "head" not in name
    ]
    chosen = set(map(id, hidden))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    found = [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01),
    ]

    def rate(step: int) -> float:
        progress = torch.tensor(min(1.0, step / steps))
        return float(min(1.0, (step + 1) / 10) * (0.55 + 0.45 * torch.cos(progress * torch.pi)))

    return found, [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in found]


class Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.bar = name, total, None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Rich

            columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
            self.bar = Rich(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self.task = self.bar.add_task(name, total=total, loss="")
            self.bar.start()

    def update(self, step: int, loss: float) -> None:
        """After each step."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step + 1, loss=f"loss {loss:.3f}")
        elif (step + 1) % max(1, self.total // 8) == 0:
            print(f"{self.name}: step {step + 1}/{self.total}, loss {loss:.3f}", flush=True)

    def close(self) -> None:
        """At the end."""
        if self.bar is not None:
            self.bar.stop()


def train(name: str, spec: plx.AttentionSpec, tokens: tuple[Tensor, Tensor], arguments: Any) -> dict[str, Any]:
    """One model from the seed; losses of every step, validation loss at the end, seconds of compilation and training."""
    torch.manual_seed(arguments.seed)
    torch._dynamo.reset()
    model = LanguageModel(spec=spec, width=arguments.width, layers=arguments.layers, heads=4, context=CONTEXT)
    model.to(arguments.device)
    found, schedules = optimizers(model, arguments.steps)
    losses, progress = [], Progress(name, arguments.steps)
    start, first = time.perf_counter(), 0.0
    for step, batch in zip(range(arguments.steps), batches(tokens[0], arguments.seed), strict=False):
        batch = batch.to(arguments.device)
        loss = model.loss(batch)
        loss.backward()
        for optimizer, schedule in zip(found, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(loss.item())
        progress.update(step, losses[-1])
        if step == 0:
            first = time.perf_counter() - start
    progress.close()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        held_out = [
            model.loss(batch.to(arguments.device)).item()
            for _, batch in zip(range(8), batches(tokens[1], 1), strict=False)
        ]
    return {
        "member": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train loss": sum(losses[-10:]) / len(losses[-10:]),
        "validation loss": sum(held_out) / len(held_out),
        "first step s": first,
        "ms per step": 1e3 * (seconds - first) / max(1, arguments.steps - 1),
        "losses": losses,
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Training loss over steps, one curve a member."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for result in results:
        losses = torch.tensor(result["losses"])
        smooth = losses.unfold(0, min(8, len(losses)), 1).mean(-1)
        (line,) = axes.plot(smooth, label=f"{result['member']}, training")
        axes.axhline(result["validation loss"], color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="nats per byte", title="Byte-level language model on the standard library's sources")
    axes.legend(title="dotted: validation at the end")
    figure.savefig(path, dpi=130)


# --- main -----------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="where everything is written")
    parser.add_argument("--steps", type=int, default=50, help="training steps of each member")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few steps, one kernel: to see that it runs")
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.quick:
        arguments.steps, arguments.layers, arguments.width = 3, 1, 32
    return arguments


def main() -> int:
    """Run it all."""
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    specs = variants(heads=4)
    shape = (BATCH, 4, CONTEXT, arguments.width // 4)
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(4)]

    heading("1. The declarations and their plans")
    for name, spec in specs.items():
        print(f"\n[{name}] {plx.explain(spec, *(torch.empty_like(t, device='cpu') for t in tensors), backward=True)}")

    heading(f"2. Compiled against float64 ({arguments.device})")
    errors, passed = check(dict(list(specs.items())[: 1 if arguments.quick else 2]), arguments.device)
    print(tabulate(errors, headers="keys", floatfmt=".1e"))

    heading(f"3. Training, {arguments.steps} steps of {BATCH} x {CONTEXT} bytes each")
    tokens = corpus(200_000 if arguments.quick else 4_000_000)
    members = {"softmax": plx.SOFTMAX, "parallax": plx.PARALLAX}
    results = [train(name, spec, tokens, arguments) for name, spec in members.items()]
    table = [{key: value for key, value in result.items() if key != "losses"} for result in results]
    summary = tabulate(table, headers="keys", floatfmt=".3f")
    print(summary)

    heading("4. What was generated for sm_90")
    try:
        for name, spec in specs.items():
            inspection = plx.inspect(
                spec, *(torch.empty_like(t, device="cpu", requires_grad=True) for t in tensors), target="sm_90"
            )
            inspection.write(arguments.out / "kernels" / name)
            print(f"[{name}]\n{inspection.table()}\n")
            if arguments.quick:
                break
    except plx.errors.UnsupportedError as error:
        print(f"no kernels: {error}")
    plot(results, arguments.out / "loss.png")
    (arguments.out / "summary.md").write_text(tabulate(table, headers="keys", floatfmt=".3f", tablefmt="github") + "\n")
    record = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "accuracy": errors, "training": results}
    (arguments.out / "summary.json").write_text(json.dumps(record, indent=1))
    print(f"written: {', '.join(sorted(str(path) for path in arguments.out.iterdir()))}")
    print("accuracy: " + ("every error within its bound" if passed else "FAILED, see section 2"))
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
