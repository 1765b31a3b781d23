"""The command line, ``parallax-compile``: what the package makes of a call, tuning, checks, and the store.

Exit codes: 0 done; 1 a check failed, or the store could not be read or written; 2 a wrong argument; 3 this machine cannot do it
(no GPU, no triton); 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from .errors import InputError, InputTypeError, ParallaxError, UnsupportedError
from .spec import AttentionSpec, family

__all__ = ["main"]

EMITS = ("triton", "ttir", "ttgir", "llir", "ptx", "sass", "resources", "mlir")
_EXIT = ((UnsupportedError, 3), ((InputError, InputTypeError), 2), (ParallaxError, 1))


class _Commands(click.Group):
    """Commands whose errors are one line on standard error and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _warnings_in_a_line():
                return super().invoke(ctx)
        except ParallaxError as error:
            code = next(code for kinds, code in _EXIT if isinstance(error, kinds))
            click.echo(f"error: {error}", err=True)
            ctx.exit(code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings as this tool's other messages, without a line of its source."""
    # Not warnings.catch_warnings(), which would forget the filters of modules that a command imports.
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *_: click.echo(f"warning: {message}", err=True)
    try:
        yield
    finally:
        warnings.showwarning = shown


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="parallax-compile", prog_name="parallax-compile")
def main() -> None:
    """The compiler backend for attention of the local-linear family.

    SPEC is a member's name (PARALLAX, LLA, ...), a spec as JSON (of spec.to_json(), or a file of it), or module:attribute.
    Nothing here needs a GPU but what times kernels: tune and bench; check runs on whatever device there is.
    """


# --- arguments ------------------------------------------------------------------------------------------------------


class _Spec(click.ParamType):
    name = "spec"

    def convert(self, value: Any, param: Any, ctx: Any) -> AttentionSpec:
        return value if isinstance(value, AttentionSpec) else parse_spec(value)


def parse_spec(text: str) -> AttentionSpec:
    """A spec by name, JSON, the path of a JSON file, or ``module:attribute``.

    Raises:
        InputError: none of these.
    """
    named = {name.lower(): spec for name, spec in family().items()}
    if text.lower() in named:
        return named[text.lower()]
    try:
        if text.lstrip().startswith("{"):
            return AttentionSpec.from_json(text)
        if text.endswith(".json"):
            return AttentionSpec.from_json(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"SPEC names the file {text}, which cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"SPEC is no spec as JSON: {error}") from error
    module, colon, attribute = text.partition(":")
    if not colon:
        raise InputError(f"SPEC must be one of {', '.join(family())}, JSON, or module:attribute, but got {text!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's module does when it is imported
        raise InputError(f"SPEC names {text!r}, which cannot be imported: {type(error).__name__}: {error}.") from error
    if not isinstance(found, AttentionSpec):
        raise InputError(f"SPEC names {text!r}, which is no AttentionSpec, but {type(found).__name__}.")
    return found


def _mask(text: str) -> Any:
    from . import masks

    kind, _, size = text.partition(":")
    sized: dict[str, Callable[[int], Any]] = {"window": masks.sliding_window, "prefix": masks.prefix_lm}
    if kind in sized and size.isdecimal():
        try:
            return sized[kind](int(size))
        except ValueError as error:
            raise InputError(f"--mask {text}: {error}") from error
    if text not in ("causal", "none"):
        raise InputError(f"--mask must be none, causal, window:N or prefix:N with a whole number N, but got {text!r}.")
    return masks.causal() if text == "causal" else None


def _masked(spec: AttentionSpec, mask: str | None) -> AttentionSpec:
    return spec if mask is None else spec.replace(mask_mod=_mask(mask))


_spec = click.argument("spec", type=_Spec())
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_mask_option = click.option(
    "--mask", metavar="MASK", help="none, causal, window:N or prefix:N, in place of the spec's."
)
_dtype = click.option("--dtype", default="bf16", show_default=True, help="bf16, fp16 or fp32.")
_backward = click.option("--backward/--no-backward", default=True, show_default=True, help="The gradients too.")


def _shape(default: str, multiple: bool = False) -> Callable[..., Any]:
    return click.option(
        "--shape", default=[default] if multiple else default, show_default=True, metavar="B,H,L,D", multiple=multiple,
        help="H, L and D may be pairs, as in 2,32:8,4096,128: query and key heads (lengths; key and value widths).",
    )  # fmt: skip


def _target(default: str = "auto", cpu: bool = False) -> Callable[..., Any]:
    kinds = "sm_80, sm_89, sm_90, sm_100" + (", cpu" if cpu else "")
    text = f"{kinds}, or auto: this machine's GPU, else sm_90."
    return click.option("--target", default=default, show_default=True, help=text)


def _command(example: str, **options: Any) -> Callable[..., Any]:
    """A command whose help ends with an example."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        return main.command(epilog=f"\b\nExample:\n  {example}", **options)(function)

    return decorate


def _print(as_json: bool, data: Any, text: Any) -> None:
    click.echo(json.dumps(data, indent=2, default=str) if as_json else str(text))


def _operands(spec: AttentionSpec, shape: str, dtype: str, backward: bool) -> list[Any]:
    from .shapes import Shape, dtype_of

    tensors = Shape.of(shape).tensors(spec, dtype_of(dtype), requires_grad=backward)
    return [*tensors, *([None] if len(tensors) == 3 else [])]


# --- commands -------------------------------------------------------------------------------------------------------


@_command("parallax-compile family --json", name="family")
@_json
def family_command(as_json: bool) -> None:
    """The named members: bandwidth, probe, intercept."""
    members = {name: json.loads(spec.to_json()) for name, spec in family().items()}
    _print(as_json, members, family())


@_command("parallax-compile explain PARALLAX --mask causal --shape 4,16,4096,128 --target sm_90 --kernels")
@_spec
@_shape("1,8,2048,128")
@_dtype
@_mask_option
@_target(cpu=True)
@_backward
@click.option("--kernels/--no-kernels", default=False, show_default=True,
              help="Compile them: lookup level, resources, predicted time, advice.")  # fmt: skip
@click.option(
    "--mask-png", type=click.Path(dir_okay=False, path_type=Path), help="Write the mask's picture (matplotlib)."
)
@click.option(
    "--decode",
    is_flag=True,
    help="Of plx.decode: the lengths are query rows and keys of a cache, as in 8,32:8,1:8192,128.",
)
@_json
def explain(
    spec: AttentionSpec, shape: str, dtype: str, mask: str | None, target: str, backward: bool, kernels: bool,
    mask_png: Path | None, decode: bool, as_json: bool,
) -> None:  # fmt: skip
    """The plan of a call: stages, why, least operations and bytes, floors, and what would make it faster."""
    from .explanation import explain as explained
    from .explanation import explain_decode

    if decode and kernels:
        raise InputError("--kernels compiles the stages of plx.attention: leave it out with --decode.")
    spec, backward = _masked(spec, mask), backward and not decode
    tensors = _operands(spec, shape, dtype, backward)
    if decode:
        found = explain_decode(spec, *tensors, target=target)
    else:
        # A block mask has its lists somewhere: on the CPU, with tensors of one number each.
        tensors = [t if t is None else t.new_empty((), device="cpu").expand(t.shape) for t in tensors]
        found = explained(spec, *tensors, target=target, backward=backward, kernels=kernels)
    if mask_png is not None:
        found.save_mask(mask_png)
    _print(as_json, found.to_dict(), found)


@_command(
    "parallax-compile inspect PARALLAX --mask causal --target sm_100 --emit ptx --stage core_forward", name="inspect"
)
@_spec
@_shape("1,2,1024,128")
@_dtype
@_mask_option
@_target()
@_backward
@click.option("--emit", type=click.Choice(EMITS), default="resources", show_default=True, help="What to print.")
@click.option("--stage", help="Only the kernel of this stage.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write every text into this folder.")
@_json
def inspect_command(
    spec: AttentionSpec, shape: str, dtype: str, mask: str | None, target: str, backward: bool, emit: str,
    stage: str | None, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """The kernels of a call compiled for a target, which need not be here."""
    from .inspection import inspect

    spec = _masked(spec, mask)
    tensors = _operands(spec, shape, dtype, backward)
    if emit == "mlir":
        modules = dict(inspect(spec, *tensors, emit="mlir", backward=backward).modules)
        _print(as_json, modules, "\n".join(modules.values()))
        return
    found = inspect(spec, *tensors, target=target, backward=backward)
    kernels = [kernel for kernel in found.kernels if stage is None or kernel.stage == stage]
    if not kernels:
        stages = ", ".join(kernel.stage for kernel in found.kernels if kernel.stage)
        raise InputError(f"--stage must be one of {stages}, but got {stage!r}.")
    if out is not None:
        found.write(out)
    if emit == "resources":
        data = [
            {"name": k.name, "stage": k.stage, "direction": k.direction, "resources": dataclasses.asdict(k.resources),
             "instructions": sorted(k.instructions), "fits": k.fits, "missing": dict(k.missing)}
            for k in kernels
        ]  # fmt: skip
        _print(
            as_json, {"target": found.target.name, "kernels": data}, dataclasses.replace(found, kernels=tuple(kernels))
        )
        return
    texts = {kernel.name: getattr(kernel, emit) for kernel in kernels}
    for kernel in kernels:
        if texts[kernel.name] is None:
            raise UnsupportedError(f"there is no {emit} of {kernel.name}: {kernel.missing.get(emit, 'unknown')}.")
    _print(as_json, texts, "\n".join(texts.values()))


@_command("parallax-compile tune PARALLAX --mask causal --shape 4,16,4096,128 --shape 8,16,2048,64 --effort quick")
@_spec
@_shape("4,16,4096,128", multiple=True)
@click.option(
    "--dtype", default=["bf16"], show_default=True, multiple=True, help="bf16, fp16 or fp32; may be given again."
)
@_mask_option
@click.option("--stage", "stages", multiple=True, help="Only this stage; may be given again.")
@click.option("--effort", type=click.Choice(["quick", "normal", "full"]), default="normal", show_default=True)
@_target()
@_backward
@click.option(
    "--model", is_flag=True, help="Rank by the resource model; no GPU needed; winners are marked as untested."
)
@click.option("--again", is_flag=True, help="Search also what the store has.")
@click.option(
    "--workers", type=click.IntRange(0), help="Compiling processes; default: by free memory, cores less one at most."
)
@_json
def tune(
    spec: AttentionSpec, shape: tuple[str, ...], dtype: tuple[str, ...], mask: str | None, stages: tuple[str, ...],
    effort: str, target: str, backward: bool, model: bool, again: bool, workers: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Search the fastest candidate of each stage on this machine's GPU and keep it in the store."""
    from .tuning import autotune

    report = autotune(
        _masked(spec, mask), list(shape), list(dtype), stages=list(stages) or "all", effort=effort, target=target,
        backward=backward, measures="model" if model else None, again=again, workers=workers,
    )  # fmt: skip
    _print(as_json, report.to_dict(), report)


@_command("parallax-compile aot PARALLAX --mask causal --shape 4,16,4096,128 --target sm_90 --out parallax.plxa")
@_spec
@_shape("4,16,4096,128", multiple=True)
@click.option(
    "--dtype", default=["bf16"], show_default=True, multiple=True, help="bf16, fp16 or fp32; may be given again."
)
@_mask_option
@_target("sm_90")
@_backward
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Where to write the artifact."
)
@_json
def aot(
    spec: AttentionSpec, shape: tuple[str, ...], dtype: tuple[str, ...], mask: str | None, target: str, backward: bool,
    out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Compile calls ahead of time; plx.load_aot runs them on the target's GPU without a compiler."""
    from .ahead_of_time import aot as compiled

    found = compiled(_masked(spec, mask), list(shape), list(dtype), target, backward=backward, path=out)
    calls = [{"shape": call.shape.sizes(), "dtype": call.dtype, "kernels": len(call.cubins)} for call in found.calls]
    data = {"path": str(out), "target": found.target, "versions": found.versions, "calls": calls}
    _print(as_json, data, f"{found}\nwritten to {out}")


@_command("parallax-compile bench PARALLAX --mask causal --shape 4,16,4096,128")
@_spec
@_shape("4,16,4096,128")
@_dtype
@_mask_option
@_backward
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True)
@_json
def bench(
    spec: AttentionSpec,
    shape: str,
    dtype: str,
    mask: str | None,
    backward: bool,
    device: str,
    repeats: int,
    as_json: bool,
) -> None:
    """Time the compiled call on this machine: milliseconds, TFLOP/s, and the share of the plan's floor."""
    from .benching import bench as benched

    found = benched(_masked(spec, mask), shape, dtype, backward=backward, device=device, repeats=repeats)
    _print(as_json, found.to_dict(), found)


@_command("parallax-compile check --member PARALLAX --quick")
@click.option("--member", "members", multiple=True, help="Only this member; may be given again.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--quick", is_flag=True, help="One shape for each member.")
@_json
def check(members: tuple[str, ...], device: str, quick: bool, as_json: bool) -> None:
    """Compile members on this machine's device and compare output and gradients with the float64 reference."""
    from .checking import check as checked

    say = (lambda line: None) if as_json else click.echo
    results = checked(members, device=device, quick=quick, on_result=lambda result: say(str(result)))
    failed = [result for result in results if not result.passed]
    if as_json:
        click.echo(json.dumps([result.to_dict() for result in results], indent=2))
    else:
        click.echo(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    click.get_current_context().exit(1 if failed else 0)


@_command("parallax-compile env --json")
@_json
def env(as_json: bool) -> None:
    """Versions, devices, tools, folders: what a bug report needs."""
    from .environment import environment

    found = environment()
    width = max(map(len, found))
    _print(as_json, found, "\n".join(f"{name:<{width}}  {value}" for name, value in found.items()))


# --- store ----------------------------------------------------------------------------------------------------------


@main.group(epilog="\b\nExample:\n  parallax-compile store list --stage core_forward")
def store() -> None:
    """The store of tuned candidates."""


def _store_command(example: str, name: str) -> Callable[..., Any]:
    return store.command(name=name, epilog=f"\b\nExample:\n  {example}")


def _chosen(device: str | None, stage: str | None) -> Callable[[Any], bool]:
    def wanted(entry: Any) -> bool:
        named = device is None or device.lower() in str(entry.key.get("device")).lower()
        return named and (stage is None or entry.key.get("stage") == stage)

    return wanted


_device_filter = click.option("--device", help="Only of devices whose name contains this.")
_stage_filter = click.option("--stage", help="Only of this stage.")


@_store_command("parallax-compile store list --stage core_forward", "list")
@_device_filter
@_stage_filter
@click.option("--shipped", is_flag=True, help="Of the tables that come with the package instead.")
@_json
def store_list(device: str | None, stage: str | None, shipped: bool, as_json: bool) -> None:
    """The entries, one a line."""
    from tabulate import tabulate

    from .lowering import tuned
    from .tuning import candidate_text

    wanted = _chosen(device, stage)
    entries = tuned.shipped() if shipped else tuned.store().entries()
    found = {name: entry for name, entry in sorted(entries.items()) if wanted(entry)}
    rows = [
        [name[:10], e.key.get("stage"), e.key.get("device"), e.key.get("dtype"),
         f"{e.key.get('width')}/{e.key.get('value_width')}", e.key.get("gqa"), e.key.get("mask"), e.key.get("bucket"),
         candidate_text(e.candidate), e.result.get("milliseconds") or "-",
         "yes" if e.provenance.get("tested") else "no"]
        for name, e in found.items()
    ]  # fmt: skip
    headers = ["entry", "stage", "device", "dtype", "D/Dv", "GQA", "mask", "lengths", "candidate", "ms", "tested"]
    where = "the package" if shipped else tuned.store().directory or "no store: PARALLAX_STORE=off"
    text = f"{tabulate(rows, headers=headers, disable_numparse=True)}\n{len(found)} entries in {where}"
    _print(as_json, {name: dataclasses.asdict(entry) for name, entry in found.items()}, text)


@_store_command("parallax-compile store show 3f2a", "show")
@click.argument("entry")
@_json
def store_show(entry: str, as_json: bool) -> None:
    """Everything of one entry, by the beginning of its name."""
    from .lowering import tuned

    entries = {**tuned.shipped(), **tuned.store().entries()}
    found = [name for name in entries if name.startswith(entry)]
    if len(found) != 1:
        raise InputError(
            f"ENTRY must begin the name of one entry, but {len(found)} begin with {entry!r}. See: store list [--shipped]."
        )
    data = {"name": found[0], **dataclasses.asdict(entries[found[0]])}
    _print(as_json, data, json.dumps(data, indent=2))


@_store_command("parallax-compile store export winners.json --device H100", "export")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@_device_filter
@_stage_filter
@_json
def store_export(path: Path, device: str | None, stage: str | None, as_json: bool) -> None:
    """Write entries into one file."""
    from .lowering import tuned

    count = tuned.store().export(path, _chosen(device, stage))
    _print(as_json, {"entries": count, "path": str(path)}, f"{count} entries written to {path}")


@_store_command("parallax-compile store import winners.json", "import")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@_json
def store_import(path: Path, as_json: bool) -> None:
    """Add the entries of an exported file."""
    from .lowering import tuned

    count = tuned.store().load(path)
    directory = tuned.store().directory
    _print(as_json, {"entries": count, "store": str(directory)}, f"{count} entries added to {directory}")


@_store_command("parallax-compile store prune", "prune")
@click.option(
    "--all", "everything", is_flag=True, help="Remove every entry, not only those that no call can take any more."
)
@_device_filter
@_json
def store_prune(everything: bool, device: str | None, as_json: bool) -> None:
    """Remove entries of other versions of the package, torch, triton or a kernel's text: no call takes them any more."""
    from .lowering import tuned

    current = tuned.versions()

    def stale(entry: Any) -> bool:
        if everything:
            return True
        try:
            changed = tuned.template_digest(entry.key["stage"]) != entry.key.get("template")
        except (KeyError, FileNotFoundError):
            return True
        return changed or any(entry.key.get(name) != version for name, version in current.items())

    wanted = _chosen(device, None)
    count = tuned.store().remove(lambda entry: wanted(entry) and stale(entry))
    _print(as_json, {"removed": count}, f"{count} entries removed")


if __name__ == "__main__":
    main()
