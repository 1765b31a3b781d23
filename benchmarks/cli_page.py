"""Write docs/cli.md: what each command prints, by running it here.

    python benchmarks/cli_page.py [--check]

``--check`` runs what does not depend on the releases of torch and triton, and compares; exits with 1 where the page is old.
What needs a GPU is shown from a recorded run (benchmarks/results/tune-*.txt).
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cli.md"

HEAD = """<!-- Made by benchmarks/cli_page.py: edit there. -->

# Command line

`parallax-compile` comes with the package. SPEC is a member's name, a spec as JSON (text or a file), or `module:attribute` for a
variant of your own. Every command takes `--json` and has `--help` with an example. Only `tune` and `bench` time anything; the
rest works on a machine without a GPU, for `sm_80`, `sm_89`, `sm_90` and `sm_100`.

| exit code | means |
|---|---|
| 0 | done |
| 1 | a check failed, or the store could not be read or written |
| 2 | a wrong argument |
| 3 | this machine cannot do it: no GPU, no triton |
| 130 | interrupted; what was tuned until then is kept |
"""


@dataclass(frozen=True)
class Transcript:
    """A command, what is said of it, and whether every release prints the same."""

    command: str
    text: str
    stable: bool = True
    lines: int = 60


TRANSCRIPTS = (
    Transcript("family", "The named members."),
    Transcript(
        "explain PARALLAX --mask causal --shape 4,16,4096,128 --target sm_90",
        "The plan of a call, its floor, and its mask: stages, why each is there, least operations and bytes.",
    ),
    Transcript(
        "explain SOFTMAX --mask window:512 --shape 1,16,4096,64 --target sm_90 --no-backward --kernels",
        "With `--kernels` the stages' kernels are compiled: which level of the lookup answered, what they take, how long they "
        "should, and what would make it faster.",
        stable=False,
    ),
    Transcript(
        "explain PARALLAX --decode --shape 8,32:8,1:8192,128 --target sm_90",
        "`--decode` explains a call of `plx.decode`: one row of each sequence against a cache of 8192 keys.",
    ),
    Transcript(
        "inspect SOFTMAX --mask causal --shape 1,2,1024,64 --target sm_80 --no-backward",
        "The kernels of a call, compiled for a target that need not be here. `--emit triton|ttir|ttgir|llir|ptx|sass|mlir` "
        "prints a text, `--out FOLDER` writes them all.",
        stable=False,
    ),
    Transcript(
        "inspect SOFTMAX --shape 1,2,1024,64 --target sm_90 --no-backward --emit ptx --stage core_forward",
        "The PTX of one stage.",
        stable=False,
        lines=16,
    ),
    Transcript(
        "store list", "What was tuned on this machine; `store show`, `export`, `import` and `prune` go with it."
    ),
    Transcript("explain SOFTMAX --shape 4,16", "A wrong argument is one line on standard error, and exit code 2."),
    Transcript("tune --help", "Every command explains itself."),
)


def output(transcript: Transcript, store: Path) -> str:
    """What a user sees."""
    from parallax_compile.lowering import tuned
    from parallax_compile.lowering.store import Store

    from parallax_compile.cli import main

    with tuned.using(Store(store)):
        result = CliRunner().invoke(main, transcript.command.split(), prog_name="parallax-compile")
    lines = result.output.replace(str(store), "~/.local/share/parallax-compile/tuned").rstrip().splitlines()
    if len(lines) > transcript.lines:
        lines = [*lines[: transcript.lines], "..."]
    if result.exit_code:
        lines.append(f"$ echo $?\n{result.exit_code}")
    return "\n".join(line.rstrip() for line in lines)


def section(transcript: Transcript, printed: str) -> str:
    return f"{transcript.text}\n\n```console\n$ parallax-compile {transcript.command}\n{printed}\n```\n"


def recorded() -> str:
    """The tuning run of a GPU machine."""
    found = sorted((ROOT / "benchmarks" / "results").glob("tune-h[0-9]*.txt"))
    if not found:
        return ""
    text = found[-1].read_text(encoding="utf-8").rstrip()
    where = found[-1].relative_to(ROOT)
    later = "tune-scan-h200-2026-11-30.txt"
    told = f"A tuning run (`{where}`). Its winners are the shipped table of that GPU; those of the scan and of LLA's"
    what = f"{told}\nsolver, whose kernels have changed since, are of a later run (`benchmarks/results/{later}`)."
    what += " What it calls overlapped, a\nform of one forward, is gone."
    return f"{what}\n\n```console\n{text}\n```\n"


def main() -> int:
    check = "--check" in sys.argv
    os.environ["COLUMNS"] = "110"
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    parts = [HEAD]
    old = []
    with tempfile.TemporaryDirectory() as folder:
        for transcript in TRANSCRIPTS:
            if check and not transcript.stable:
                continue
            part = section(transcript, output(transcript, Path(folder)))
            parts.append(part)
            if part not in page:
                old.append(transcript.command)
    parts.append(recorded())
    if not check:
        PAGE.write_text("\n".join(part for part in parts if part), encoding="utf-8")
        return 0
    if old or HEAD not in page or recorded() not in page:
        print(
            f"docs/cli.md is old: {', '.join(old) or 'its head or its tuning run'}. Run: python benchmarks/cli_page.py"
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
