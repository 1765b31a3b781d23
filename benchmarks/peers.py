"""Peers' Triton kernels compiled ahead, without a GPU, so that their autotuners only time them on the machine that has one.

    python benchmarks/peers.py compile --cache DIR [--match TEXT] [--share 0/2] [--seconds 60]   # here, under `nice`
    python benchmarks/peers.py check --cache DIR [--match TEXT]                                   # what a real call would find
    python benchmarks/peers.py pack --cache DIR --archive peers.tar.xz
    python benchmarks/peers.py unpack --cache DIR --archive peers.tar.xz                          # on the machine with the GPU

The peers' own Python code runs on tensors without memory for a pretended GPU; what they launch goes through Triton's
``JITFunction.run`` as it always does, so that the specialisation of the arguments, and with it the key in Triton's cache, is
that of a real call. A configuration is compiled in a process of its own, of at most ``--seconds`` of processor time; what takes
longer is left out, by name.

Triton's key holds the text of the kernel and of Triton, and the version of ptxas. Inductor changes two of a process'
settings when it first compiles, unless they are set: which ptxas Triton uses, and where its cache is. So **both must be set in
every process**, as ``TRITON_PTXAS_PATH`` and ``TRITON_CACHE_DIR`` (``unpack`` prints the lines), else the peers' kernels are
compiled again one by one.

Where the cache holds the list that ``unpack`` writes, :func:`prepare` lets the autotuners take configurations from it alone,
and time each as :data:`TIMED_CALLS` says (left alone, they do for 125 ms) while no other process times one; what they chose,
and how many they left out, is recorded (:func:`tuned`).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import resource
import signal
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

PEERS = ("parallax", "fla", "flashlla")
"""Top-level modules of the peers that tune themselves with Triton's autotuner."""

TARGET = "sm_90"
LISTED = "peers.json"
TIMED_CALLS, TIMED_MS = 10, 25.0
"""A configuration is timed so often, or as often as fits into so many milliseconds, after two calls that are not counted."""


def use(cache: Path) -> None:
    """Set Triton's cache, and its ptxas as Inductor does (that of the torch wheel, if it has one), before Triton needs them."""
    spec = importlib.util.find_spec("torch")
    found = Path(str(spec and spec.origin)).parent / "bin" / "ptxas"
    if found.is_file():
        os.environ.setdefault("TRITON_PTXAS_PATH", str(found))
    os.environ["TRITON_CACHE_DIR"] = str(cache)


# --- which calls -----------------------------------------------------------------------------------------------------


def calls() -> dict[str, Callable[[], Any]]:
    """Forward and backward of each peer in each row of ``training.py`` and ``family.py``, by name, on tensors without memory.

    Many share their kernels, whose keys hold widths, ratios of heads and what divides by 16, but not always a length.
    """
    import torch
    from contenders import CONTENDERS, Case, cases
    from contenders import Contender as Trained
    from family import rows
    from family_contenders import Contender, Problem
    from measure import directions, operands

    def training(contender: Trained, case: Case) -> None:
        inputs, grad = operands(case, "meta", torch.bfloat16)
        directions(contender.build(case, "meta"), inputs, grad, contender.method)["both"]()

    def family(contender: Contender, problem: Problem) -> None:
        contender.build(problem, *problem.operands("meta", torch.bfloat16)).both()

    found: dict[str, Callable[[], Any]] = {}
    shapes = [case for case in cases("cpu").values() if case.plain_causal and case.name != "tiny"]
    shapes += [Case(f"accuracy {width}", 1, 2, 2, 1024, width) for width in (64, 128)]
    for trained in CONTENDERS:
        for case in shapes:
            if trained.module in PEERS:
                found[f"{trained.name}, {case.name}"] = functools.partial(training, trained, case)
    for row in rows():
        for peer in row.peers:
            found[f"{peer.name}, {row.name}"] = functools.partial(family, peer, row.problem)
    return found


@dataclass
class Task:
    """A kernel to compile: ``source``, ``target`` and ``options`` as Triton's ``compile`` takes them.

    Attributes:
        call: the first name of :func:`calls` that launches it.
        rest: Triton's key but for what it says of Triton's own text.
    """

    call: str
    source: Any
    target: Any
    options: dict[str, Any]
    rest: str

    @property
    def folder(self) -> str:
        """Its folder in Triton's cache."""
        from triton.runtime.cache import triton_key

        return _folder(triton_key() + self.rest)

    @property
    def kernel(self) -> str:
        """Module and name."""
        return f"{self.source.fn.module}.{self.source.name}"

    @property
    def configuration(self) -> str:
        """Constants and options that tell it from the other configurations of its kernel."""
        names = self.source.fn.arg_names
        constants = {names[path[0]]: value for path, value in self.source.constants.items() if len(path) == 1}
        shown = {name: value for name, value in constants.items() if isinstance(value, (int, str)) and name.isupper()}
        shown |= {name: self.options[name] for name in ("num_warps", "num_stages") if name in self.options}
        return ", ".join(f"{name} {value}" for name, value in shown.items())


def _folder(key: str) -> str:
    digest = hashlib.sha256(key.encode()).digest()
    return base64.b32encode(digest).decode().rstrip("=")


def _rest(source: Any, target: Any, options: dict[str, Any]) -> str:
    """What Triton's key says after Triton's own text."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_key, triton_key

    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    return get_cache_key(source, backend, parsed, get_cache_invalidating_env_vars()).removeprefix(triton_key())


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Let torch, Triton and the peers see a GPU of kind :data:`TARGET`, on which nothing runs."""
    import torch
    from parallax_compile.lowering import torch_compat_codegen as compat
    from parallax_compile.lowering.targets import resolve

    target = resolve(TARGET)
    with contextlib.ExitStack() as stack:
        stack.enter_context(compat.pretend_gpu(target))
        for name, answer in {
            "is_available": lambda: True,
            "get_device_name": lambda *device: "NVIDIA H200",
            "device": contextlib.nullcontext,
            "synchronize": lambda *device: None,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        if importlib.util.find_spec("fla") is not None:
            from fla.utils import hardware

            # It chooses tiles by the index of a tensor's device, which there is none of without memory.
            sizes = defaultdict(lambda: target.shared_memory_per_block)
            stack.enter_context(mock.patch.object(hardware, "get_all_max_shared_mem", return_value=sizes))
            hardware.check_shared_mem.cache_clear()
            stack.callback(hardware.check_shared_mem.cache_clear)
        yield


def tasks(match: str = "") -> list[Task]:
    """Every kernel of every configuration that the calls whose name contains ``match`` would launch, each once."""
    import triton.compiler
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    found: dict[str, Task] = {}
    launch = JITFunction.run
    current = ""

    def collect(source: Any, target: Any, options: dict[str, Any]) -> object:
        task = Task(current, source, target, options, _rest(source, target, options))
        found.setdefault(task.folder, task)
        return object()

    def run(function: Any, *arguments: Any, **named: Any) -> Any:
        return launch(function, *arguments, **{**named, "warmup": True})

    def tune(tuner: Any, *arguments: Any, **named: Any) -> Any:
        tuner.nargs = dict(zip(tuner.arg_names, arguments, strict=False))
        for config in tuner.prune_configs(named):
            tuner.fn.run(*arguments, **named, **config.all_kwargs())

    with (
        mock.patch.object(triton.compiler, "compile", collect),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(Autotuner, "run", tune),
    ):
        for name, call in calls().items():
            if match in name:
                current = name
                call()
    for task in found.values():
        task.source.fn.device_caches.clear()  # what stood in for its compiled kernel
    return list(found.values())


# --- compiling -------------------------------------------------------------------------------------------------------


def _held(cache: Path, folder: str) -> bool:
    return any((cache / folder).glob("__grp__*.json"))


def compile_tasks(wanted: list[Task], cache: Path, seconds: int) -> None:
    """Compile what neither the cache holds nor an earlier run gave up, and write the outcome of each beside it."""
    outcomes = cache / "outcomes"
    outcomes.mkdir(parents=True, exist_ok=True)
    for position, task in enumerate(wanted):
        told = outcomes / f"{task.folder}.json"
        if told.exists():
            continue
        start = time.monotonic()
        outcome = "compiled" if _held(cache, task.folder) else _compiled_apart(task, seconds)
        took = time.monotonic() - start
        if outcome == "compiled" and not _held(cache, task.folder):
            raise RuntimeError(
                f"{task.kernel} was compiled under another key than {task.folder}: the keys cannot be trusted."
            )
        entry = {
            "kernel": task.kernel,
            "configuration": task.configuration,
            "rest": task.rest,
            "outcome": outcome,
            "seconds": round(took, 1),
        }
        told.write_text(json.dumps(entry), encoding="utf-8")
        print(f"{position + 1}/{len(wanted)} {task.kernel} {task.configuration}: {outcome}, {took:.1f} s", flush=True)


def _compiled_apart(task: Task, seconds: int) -> str:
    """Compile in a process of its own, which may be stopped; ``compiled``, or why not."""
    import triton.compiler

    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # of this process, and again of ptxas
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)  # triton prints the PTX that ptxas refused
        try:
            triton.compiler.compile(task.source, target=task.target, options=task.options)
        except BaseException as error:
            print(f"{type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)
            stopped = [f"error code {-number}" for number in (signal.SIGXCPU, signal.SIGKILL)]  # ptxas was
            os._exit(2 if any(each in str(error) for each in stopped) else 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # a ptxas whose parent was stopped
    if status == 0:
        return "compiled"
    stopped = os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 2
    return f"took over {seconds} s" if stopped else "failed"


# --- the archive -----------------------------------------------------------------------------------------------------


def about() -> dict[str, Any]:
    """What Triton's keys depend on beside the kernels: of this process."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.nvidia.compiler import CUDAOptions, file_hash, get_ptxas_version
    from triton.runtime.cache import triton_key

    return {
        "triton": triton.__version__,
        "triton_key": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas": get_ptxas_version(90),
        "libdevice": file_hash(dict(CUDAOptions().extern_libs)["libdevice"]),
        "environment": get_cache_invalidating_env_vars(),
    }


def pack(cache: Path, archive: Path) -> None:
    """Write what Triton needs to find the compiled kernels: of each its metadata and cubin, and the list of all."""
    import triton
    from parallax_compile.lowering.targets import resolve

    most = resolve(TARGET).shared_memory_per_block
    entries: dict[str, Any] = {}
    with tarfile.open(archive, "w:xz", preset=9) as tar:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        found = [
            (told.stem, json.loads(told.read_text(encoding="utf-8"))) for told in (cache / "outcomes").glob("*.json")
        ]
        for folder, entry in sorted(found, key=lambda each: (each[1]["kernel"], each[1]["configuration"])):
            entries[folder] = entry
            if entry["outcome"] != "compiled":
                continue
            for file in sorted((cache / folder).iterdir()):
                if file.suffix == ".cubin":
                    # What asks for more shared memory than there is is refused before it is loaded.
                    metadata = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
                    add(f"{folder}/{file.name}", b"" if metadata["shared"] > most else file.read_bytes())
                elif file.suffix == ".json" and not file.name.startswith("__grp__"):
                    add(f"{folder}/{file.name}", file.read_bytes())
        listed = {"about": about(), "triton": triton.__version__, "kernels": entries}
        add(LISTED, json.dumps(listed).encode())
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")
    print(coverage(entries))


def unpack(cache: Path, archive: Path) -> int:
    """Put the archive's kernels into a cache of this machine; 1 where its Triton would not find them."""
    from triton.runtime.cache import triton_key

    with tarfile.open(archive, "r:xz") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
    listed = json.loads(files.pop(LISTED))
    here, there = about(), listed["about"]
    differ = [name for name in here if here[name] != there[name]]
    for name in differ:
        print(f"{name} differs: {there[name]!r} where the kernels were compiled, {here[name]!r} here")
    if differ and differ != ["triton_key"]:
        return 1
    # Another build of the same release: its kernels are filed under its own key.
    folders = {old: _folder(triton_key() + entry["rest"]) for old, entry in listed["kernels"].items()}
    for name, content in files.items():
        old, file = name.split("/")
        path = cache / folders[old] / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for folder in {cache / folders[name.split("/")[0]] for name in files}:
        metadata = next(file for file in folder.glob("*.json") if not file.name.startswith("__grp__"))
        group = {file.name: str(file) for file in folder.iterdir() if not file.name.startswith("__grp__")}
        (folder / f"__grp__{metadata.name}").write_text(json.dumps({"child_paths": group}), encoding="utf-8")
    listed["kernels"] = {folders[old]: entry for old, entry in listed["kernels"].items()}
    (cache / LISTED).write_text(json.dumps(listed), encoding="utf-8")
    print(coverage(listed["kernels"]))
    for name in ("TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"):
        if name in os.environ:
            print(f"export {name}={os.environ[name]}")
    return 0


def coverage(entries: dict[str, Any]) -> str:
    """How many configurations of each kernel were compiled, and which were not."""
    kernels: dict[str, list[Any]] = {}
    for entry in entries.values():
        kernels.setdefault(entry["kernel"], []).append(entry)
    lines = []
    for kernel, each in sorted(kernels.items()):
        left = [entry for entry in each if entry["outcome"] != "compiled"]
        lines.append(f"{kernel}: {len(each) - len(left)} of {len(each)} configurations")
        lines += [f"  without {entry['configuration']}: {entry['outcome']}" for entry in left]
    return "\n".join(lines)


# --- tuning from the cache -------------------------------------------------------------------------------------------

_tuned: dict[str, dict[str, Any]] = {}
_left_out: list[str] = []


def tuned() -> dict[str, dict[str, Any]]:
    """What the peers' autotuners did since this was asked last, by kernel; empty without a cache compiled ahead.

    Of each: how many configurations it has, how many of them were timed and how many were left out because nothing compiled
    them ahead (the others do not fit the GPU), the seconds it took, and what it chose.
    """
    found = dict(_tuned)
    _tuned.clear()
    return found


def prepare() -> None:
    """Let autotuners time what the cache holds of the peers' kernels and nothing else; does nothing without such a cache.

    What autotuners did before is forgotten (:func:`tuned`).
    """
    _tuned.clear()
    cache = Path(os.environ.get("TRITON_CACHE_DIR", ""))
    if not (cache / LISTED).is_file():
        return
    import triton.compiler
    from filelock import FileLock
    from measure import Clock, summary
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.errors import PTXASError

    if hasattr(Autotuner, "from_cache"):
        return
    compile_now, bench, run = triton.compiler.compile, Autotuner._bench, Autotuner.run
    timing, clock = FileLock(cache / "timing.lock"), functools.cache(lambda: Clock("cuda"))
    refusing = False

    def held_or_refused(source: Any, target: Any, options: dict[str, Any]) -> Any:
        if refusing and source.fn.module.partition(".")[0] in PEERS:
            task = Task("", source, target, options, _rest(source, target, options))
            if not _held(cache, task.folder):
                _left_out.append(task.configuration)
                raise PTXASError("not compiled ahead")  # to the autotuner, a configuration that cannot be compiled
        return compile_now(source, target=target, options=options)

    def benchmark(call: Callable[[], Any], quantiles: Any) -> list[float]:
        call()  # loads the kernel, while others may be timing
        with timing:
            first = clock()(call, 1)[0]
            found = summary(clock()(call, max(1, min(TIMED_CALLS, int(TIMED_MS / first)))))
        return [found[f"ms_{share * 100:.0f}" if share != 0.5 else "ms"] for share in quantiles]

    def timed(tuner: Any, *arguments: Any, **named: Any) -> Any:
        # Until one could be timed: the tuner would choose one of those that could not, and compile it.
        nonlocal refusing
        refusing, before = True, refusing
        times = bench(tuner, *arguments, **named)
        refusing = before and times[0] == float("inf")
        return times

    def tune(tuner: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal refusing
        known, refusing = len(tuner.cache), True
        name = f"{tuner.base_fn.__module__}.{tuner.base_fn.__name__}"
        _left_out.clear()
        try:
            result = run(tuner, *arguments, **named)
        except PTXASError as error:
            raise RuntimeError(f"no configuration of {name} was compiled ahead for this call.") from error
        finally:
            refusing = False
        if len(tuner.cache) > known:
            count = sum(times[0] < float("inf") for times in tuner.configs_timings.values())
            _tuned[name] = {
                "configurations": len(tuner.configs_timings),
                "timed": count,
                "left_out": len(_left_out),
                "seconds": round(tuner.bench_time, 2),
                "chosen": str(tuner.best_config),
            }
        return result

    triton.compiler.compile = held_or_refused
    Autotuner._bench, Autotuner.run, Autotuner.from_cache = timed, tune, True
    Autotuner.do_bench = property(lambda tuner: benchmark)


# --- command line ----------------------------------------------------------------------------------------------------


def main() -> int:
    """Compile, check, pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compile", "check", "pack", "unpack", "about"))
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("TRITON_CACHE_DIR", "/tmp/peers-cache")))
    parser.add_argument("--archive", type=Path, default=Path("peers.tar.xz"))
    parser.add_argument("--match", default="", help="calls whose name contains this")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th kernel, from the I-th")
    parser.add_argument("--seconds", type=int, default=60, help="of processor time that a configuration may take")
    arguments = parser.parse_args()
    use(arguments.cache)
    if arguments.what == "about":
        print(json.dumps(about(), indent=1))
        return 0
    if arguments.what == "pack":
        pack(arguments.cache, arguments.archive)
        return 0
    if arguments.what == "unpack":
        return unpack(arguments.cache, arguments.archive)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    with pretended():
        wanted = tasks(arguments.match)
        if arguments.what == "compile":
            index, count = map(int, arguments.share.split("/"))
            compile_tasks(wanted[index::count], arguments.cache, arguments.seconds)
            return 0
        missing = [task for task in wanted if not _held(arguments.cache, task.folder)]
        for task in missing:
            print(f"missing: {task.call}: {task.kernel} {task.configuration}")
        print(f"{len(wanted) - len(missing)} of {len(wanted)} kernels are in {arguments.cache}")
        return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
