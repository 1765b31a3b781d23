"""Which candidates a stage is offered: what was tuned before the table's default.

A stage asks a :class:`Question`; the answer comes from the first level that has one which the target can hold:

    ==========  ====================================================================================================
    exact       the store, for this very question
    bucket      the store, for lengths of the same bucket (and whatever the minor switches are)
    shipped     the table that comes with the package, of the nearest problem measured on this compute capability
    heuristic   the table of :mod:`.candidates`
    ==========  ====================================================================================================

``kernel_options`` that settle a stage's tiles come before all of them. Every decision goes to the log (``TORCH_LOGS=
"+parallax_compile"``), to torch's structured trace, and to whoever listens (:func:`listening`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .. import templates
from ..version import __version__
from .candidates import SPECIALIZED_STAGES, Candidate, candidates, forced_fields, padded
from .store import Entry, Store, canonical, decoded
from .torch_compat_inductor import length_hint, trace_artifact

__all__ = [
    "Answer",
    "Level",
    "Question",
    "ask",
    "bucket",
    "exploring",
    "listening",
    "offered",
    "shipped",
    "store",
    "using",
]

Level = Literal["explored", "kernel_options", "exact", "bucket", "shipped", "heuristic"]

_log = logging.getLogger(__name__)

_TABLES_CAPABILITY = "9.0"  # of the GPU that the table of candidates was found on

# Constants of a template that say nothing about which tile is best, or stand elsewhere in the question.
_NOISE = ("SCALE", "LOG2E", "LN2", "D", "DV", "D_PAD", "DV_PAD", "GQA", "BLOCK_SPARSE", "HAS_FULL_BLOCKS", "HAS_MASK")
# Switches that move a row or two of numbers: a candidate that was best without them is taken with them.
_MINOR = (
    "SAVE_VALUE_MEAN",
    "HAS_QUERY_SUM",
    "HAS_PROBE_SUM",
    "KNOWN_QUERY_SUM",
    "KNOWN_PROBE_SUM",
    "Q_BLOCK",
    "KV_BLOCK",
    "SEGMENTS",
    "PARTS",
    "TOTAL_SEGMENTS",
)


@dataclass(frozen=True)
class Question:
    """What a stage's best candidate depends on: the key of the store.

    Attributes:
        stage: the stage.
        template: digest of its kernel's text.
        device, capability: the GPU's product name and compute capability.
        dtype: of the inputs.
        width, value_width: ``D``, ``Dv``.
        gqa: query heads of a key head.
        mask: ``none``, ``predicate`` (asked for every pair) or ``blocks`` (lists of blocks).
        spec: the structure of the member and of its mods as JSON: the template's switches and the mods' digests, without
            captured values.
        minor: switches that a candidate is carried over, as JSON.
        q_length, kv_length: lengths; those of the first call where they are symbols.
        bucket: the two lengths' :func:`bucket`.
        package, torch, triton: versions.
    """

    stage: str
    template: str
    device: str
    capability: str
    dtype: str
    width: int
    value_width: int
    gqa: int
    mask: str
    spec: str
    minor: str
    q_length: int
    kv_length: int
    bucket: str
    package: str
    torch: str
    triton: str

    def key(self) -> dict[str, Any]:
        """The fields, as the store keeps them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Answer:
    """What a stage was offered, and why.

    Attributes:
        level: which level answered.
        candidates: best first; the default mode takes the first.
        entry: what the store or the shipped table holds; None for the other levels.
        passed_over: levels that had an answer which the target cannot hold or the call cannot take.
    """

    question: Question
    level: Level
    candidates: tuple[Candidate, ...]
    entry: Entry | None = None
    passed_over: tuple[str, ...] = ()

    @property
    def candidate(self) -> Candidate:
        """The first."""
        return self.candidates[0]

    def why(self) -> str:
        """A sentence."""
        reasons = {
            "explored": "a search is under way",
            "kernel_options": "kernel_options settle it",
            "exact": "the store has this very problem",
            "bucket": f"the store has lengths of the same bucket ({self.question.bucket})",
            "shipped": "the shipped table has a problem like it",
            "heuristic": "nothing was tuned for it",
        }
        text = reasons[self.level]
        if self.level == "heuristic" and self.question.capability != _TABLES_CAPABILITY:
            text += ", and the table of defaults was found on an H100: untested on this GPU"
        if self.entry is not None:
            result, provenance = self.entry.result, self.entry.provenance
            measured = f"{result['milliseconds']:.3f} ms" if result.get("milliseconds") else "not measured"
            shape = f" at {tuple(result['shape'])}" if result.get("shape") else ""
            text += f": {measured}{shape} on {provenance.get('device', self.entry.key.get('device'))}"
            if self.level == "shipped" and self.entry.key.get("device") != self.question.device:
                text += ", another device than this one"
            if not provenance.get("tested", True):
                text += ", from the resource model, untested"
        if self.passed_over:
            text += f" (passed over, because it does not fit this call: {', '.join(self.passed_over)})"
        return text


# --- state ----------------------------------------------------------------------------------------------------------

_store = Store()
_listeners: list[list[Answer]] = []
_explored: dict[str, Sequence[Candidate]] | None = None


def store() -> Store:
    """The store that lookups read."""
    return _store


@contextlib.contextmanager
def using(other: Store) -> Iterator[Store]:
    """Let lookups read ``other`` meanwhile."""
    global _store
    before, _store = _store, other
    try:
        yield other
    finally:
        _store = before


@contextlib.contextmanager
def listening() -> Iterator[list[Answer]]:
    """Every answer that is given meanwhile."""
    heard: list[Answer] = []
    _listeners.append(heard)
    try:
        yield heard
    finally:
        # By identity: two listeners that heard the same are equal lists.
        _listeners[:] = [listener for listener in _listeners if listener is not heard]


@contextlib.contextmanager
def exploring(spaces: Mapping[str, Sequence[Candidate]]) -> Iterator[None]:
    """Offer a stage, after its default, the candidates of ``spaces``, whatever was tuned; stages that are not there as ever."""
    global _explored
    before, _explored = _explored, dict(spaces)
    try:
        yield
    finally:
        _explored = before


# --- asking ---------------------------------------------------------------------------------------------------------


def bucket(length: int) -> int:
    """The least power of two that is at least ``length``, and at least 16: lengths of a bucket share a winner."""
    return max(16, 1 << math.ceil(math.log2(max(1, length))))


def ask(
    stage: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    constants: Mapping[str, Any],
    lengths: tuple[Any, Any],
    mods: Mapping[str, str] | None = None,
) -> Question:
    """The question of a stage that Inductor is lowering.

    Args:
        stage: the template's name.
        device: of the call: the GPU, or the pretended one.
        dtype: of the inputs.
        constants: what the template is filled with whatever the candidate is.
        lengths: of queries and keys; symbols count as what they were in the first call, and are not guarded on.
        mods: digests of the mods and the mask (:func:`.mod_graphs.digest`).
    """
    properties = torch.cuda.get_device_properties(device)
    switches = {name: value for name, value in constants.items() if name not in _NOISE}
    minor = {name: switches.pop(name) for name in _MINOR if name in switches}
    mask = "blocks" if constants.get("BLOCK_SPARSE") else "predicate" if constants.get("HAS_MASK") else "none"
    q_length, kv_length = (length_hint(length) for length in lengths)
    return Question(
        stage=stage,
        template=template_digest(stage),
        device=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        dtype=str(dtype).removeprefix("torch."),
        width=int(constants["D"]),
        value_width=int(constants["DV"]),
        gqa=int(constants.get("GQA", 1)),
        mask=mask,
        spec=canonical({"switches": switches, "mods": dict(mods or {})}),
        minor=canonical(minor),
        q_length=q_length,
        kv_length=kv_length,
        bucket=f"{bucket(q_length)}x{bucket(kv_length)}",
        **versions(),
    )


@functools.cache
def versions() -> dict[str, str]:
    """Of the package, torch and triton, as the key has them."""
    import triton

    return {"package": __version__, "torch": torch.__version__.partition("+")[0], "triton": triton.__version__}


@functools.cache
def template_digest(stage: str) -> str:
    """Digest of a stage's text, and of its warp-specialised kernel's, which is a candidate of it."""
    names = [stage, *([f"{stage}_specialized"] if stage in SPECIALIZED_STAGES else [])]
    return hashlib.sha256("".join(map(templates.load, names)).encode()).hexdigest()[:12]


def offered(question: Question, **limits: Any) -> list[Candidate]:
    """Candidates for the stage that asks, best first, at least one; the answer is logged.

    Args:
        limits: as for :func:`.candidates.candidates`.
    """
    answer = _answer(question, limits)
    for listener in _listeners:
        listener.append(answer)
    _log.info("%s: %s, level %s: %s", question.stage, answer.candidate, answer.level, answer.why())
    trace_artifact(
        f"parallax_{question.stage}_candidate",
        lambda: {
            "question": question.key(),
            "level": answer.level,
            "why": answer.why(),
            "candidates": [dataclasses.asdict(candidate) for candidate in answer.candidates],
        },
    )
    return list(answer.candidates)


def _answer(question: Question, limits: Mapping[str, Any]) -> Answer:
    stage = question.stage
    if _explored is not None and stage in _explored:
        limits = {**limits, "options": None}
        default = _settled(question, limits, stored=False)
        found = candidates(stage, **{**limits, "listed": _explored[stage]})
        others = [candidate for candidate in found if candidate != default.candidate]
        return Answer(question, "explored", (default.candidate, *others), default.entry)
    return _settled(question, limits)


def _settled(question: Question, limits: Mapping[str, Any], *, stored: bool = True) -> Answer:
    """The answer where no search is under way; without the store, what the package itself would take."""
    stage = question.stage
    usual = candidates(stage, **limits)
    if forced_fields(stage, limits.get("options") or {}):
        return Answer(question, "kernel_options", tuple(usual))
    passed_over: list[str] = []
    for level, entry in _lookups(question, stored):
        candidate = _candidate(entry)
        held = [] if candidate is None else candidates(stage, **{**limits, "listed": [candidate]})
        # Tiles are cut to the mask's blocks; a candidate that was cut is another one than was measured.
        if held and (held[0] == candidate or level == "shipped"):
            rest = [other for other in usual if other != held[0]]
            return Answer(question, level, (held[0], *rest), entry, tuple(passed_over))
        passed_over.append(level)
    return Answer(question, "heuristic", tuple(usual), None, tuple(passed_over))


def _candidate(entry: Entry) -> Candidate | None:
    """The entry's candidate; None for one that this version cannot express."""
    known = {field.name: field.type for field in dataclasses.fields(Candidate)}
    values = dict(entry.candidate)
    if not set(values) <= set(known):
        return None
    try:
        candidate = Candidate(**values)
    except TypeError:
        return None
    sizes = (candidate.block_m, candidate.block_n)
    sound = all(isinstance(size, int) and 16 <= size <= 512 and not size & (size - 1) for size in sizes)
    sound &= candidate.num_warps in (1, 2, 4, 8, 16) and isinstance(candidate.num_stages, int)
    return candidate if sound and 1 <= candidate.num_stages <= 8 and isinstance(candidate.tma, bool) else None


def _lookups(question: Question, stored: bool) -> Iterator[tuple[Level, Entry]]:
    """What each level has, in order."""
    entries = _store.entries() if stored else {}
    key = question.key()
    if entries:
        exact = entries.get(_digest(key))
        if exact is not None:
            yield "exact", exact
        near = _in_bucket(key, entries)
        if near is not None and near is not exact:
            yield "bucket", near
    best = _nearest(key, shipped())
    if best is not None:
        yield "shipped", best


def _digest(key: Mapping[str, Any]) -> str:
    return Entry(key, {}).digest


_WITHIN_BUCKET = ("q_length", "kv_length", "minor")


def _in_bucket(key: Mapping[str, Any], entries: Mapping[str, Entry]) -> Entry | None:
    """Of the entries that agree in all but lengths and minor switches, the one with the nearest lengths."""
    major = {name: value for name, value in key.items() if name not in _WITHIN_BUCKET}
    agreeing = [
        entry for entry in entries.values() if all(entry.key.get(name) == value for name, value in major.items())
    ]
    return min(agreeing, key=lambda entry: (_distance(key, entry.key), entry.digest), default=None)


def _nearest(key: Mapping[str, Any], entries: Mapping[str, Entry]) -> Entry | None:
    """Of the shipped entries for this stage, capability, element size, padded widths and kind of probe, the most like it."""

    def hard(of: Mapping[str, Any]) -> tuple[Any, ...]:
        itemsize = {"bfloat16": 2, "float16": 2, "float32": 4}.get(of.get("dtype", ""))
        widths = padded(of["width"]), padded(of["value_width"])
        return of["stage"], of["capability"], itemsize, *widths, _switches(of).get("HAS_PROBE")

    def soft(entry: Entry) -> tuple[Any, ...]:
        of = entry.key
        mine, theirs = _switches(key), _switches(of)
        differing = sum(mine.get(name) != theirs.get(name) for name in {*mine, *theirs})
        plain = [name for name in ("device", "mask", "dtype", "gqa", "template") if of.get(name) != key[name]]
        return ("device" in plain, differing, len(plain), _distance(key, of), entry.digest)

    alike = [entry for entry in entries.values() if hard(entry.key) == hard(key)]
    return min(alike, key=soft, default=None)


def _switches(key: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(key["spec"])["switches"]


def _distance(key: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How far apart the lengths are, in doublings."""
    return sum(abs(math.log2(max(1, key[name]) / max(1, other[name]))) for name in ("q_length", "kv_length"))


@functools.cache
def shipped() -> dict[str, Entry]:
    """The tables that come with the package: ``shipped_*.json`` beside this module, with their provenance inside."""
    found: dict[str, Entry] = {}
    for path in sorted(Path(__file__).parent.glob("shipped_*.json")):
        entries, problems = decoded(path.read_text(encoding="utf-8"))
        for problem in problems:
            _log.warning("%s: %s", path.name, problem)
        found |= entries
    return found
