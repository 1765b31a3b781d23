"""The store of tuned candidates: JSON files that many processes may read and write at once.

One file for each device, in the user's data folder, or where ``PARALLAX_STORE`` says. A file is replaced as a whole, under a
lock beside it, so that a reader never sees half of one. What a file says is checked, never trusted: a file that is no store, or
entries that do not match their own key, are set aside (``*.aside-N``) and reported once, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, StoreError

__all__ = ["FORMAT", "Entry", "Store", "canonical", "decoded", "default_directory", "encoded", "key_digest"]

FORMAT = "parallax-compile tuned candidates, 1"
ENVIRONMENT = "PARALLAX_STORE"
"""Environment variable: the folder of the store; ``off`` for none."""

_LOCK_SECONDS = 60.0
_log = logging.getLogger(__name__)


def canonical(value: Any) -> str:
    """JSON that is the same for the same data: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def key_digest(key: Mapping[str, Any]) -> str:
    """The name of a key: a digest of its canonical fields."""
    return hashlib.sha256(canonical(dict(key)).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Entry:
    """One winner.

    Attributes:
        key: the fields of the question that it answers (:class:`~.tuned.Question`).
        candidate: its fields (:class:`~.candidates.Candidate`).
        result: what was measured: ``milliseconds``, ``default_milliseconds``, ``tried``, ``failed``, ``effort``, ``shape``.
        provenance: who measured it: ``source``, ``device``, ``versions``, ``date``, ``tested``.
    """

    key: Mapping[str, Any]
    candidate: Mapping[str, Any]
    result: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The name that it is stored under."""
        return key_digest(self.key)


def encoded(entries: Iterable[Entry]) -> str:
    """The text of a store file."""
    ordered = sorted(entries, key=lambda entry: (str(entry.key.get("stage")), canonical(dict(entry.key))))
    body = {
        entry.digest: {
            "key": dict(entry.key),
            "candidate": dict(entry.candidate),
            "result": dict(entry.result),
            "provenance": dict(entry.provenance),
        }
        for entry in ordered
    }
    return json.dumps({"format": FORMAT, "entries": body}, indent=1) + "\n"


def decoded(text: str) -> tuple[dict[str, Entry], list[str]]:
    """The sound entries of a store file, and what is wrong with the rest of it."""
    try:
        data = json.loads(text)
    except ValueError as error:
        return {}, [f"it is not JSON ({error})"]
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("entries"), dict):
        return {}, [f"it does not say {FORMAT!r}"]
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for name, item in data["entries"].items():
        parts = [item.get(part) if isinstance(item, dict) else None for part in ("key", "candidate")]
        if not all(isinstance(part, dict) for part in parts):
            problems.append(f"entry {name} has no key or no candidate")
            continue
        extra = [item.get(part) if isinstance(item.get(part), dict) else {} for part in ("result", "provenance")]
        entry = Entry(*parts, *extra)  # type: ignore[arg-type]
        if entry.digest != name:
            problems.append(f"entry {name} does not match its key")
            continue
        entries[name] = entry
    return entries, problems


def default_directory() -> Path | None:
    """The folder of the user's store; None where ``PARALLAX_STORE=off``."""
    given = os.environ.get(ENVIRONMENT)
    if given == "off":
        return None
    if given:
        return Path(given)
    import platformdirs

    return Path(platformdirs.user_data_dir("parallax-compile", appauthor=False)) / "tuned"


class Store:
    """Winners by key, shared by all processes of a user.

    Args:
        directory: where the files are; None is :func:`default_directory`. It is made by the first write.

    Attributes:
        problems: what was set aside, refused or could not be written, in words.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._given = None if directory is None else Path(directory)
        self._read: dict[Path, tuple[tuple[int, int, int], dict[str, Entry]]] = {}
        self._unsaved: dict[str, Entry] = {}
        self._guard = threading.RLock()
        self.problems: list[str] = []

    @property
    def directory(self) -> Path | None:
        """The folder; None where there is no store."""
        return self._given or default_directory()

    def entries(self) -> dict[str, Entry]:
        """Every sound entry, with those of this process that could not be written."""
        with self._guard:
            found: dict[str, Entry] = {}
            for path in self._paths():
                found |= self._of(path)
            return {**found, **self._unsaved}

    def fingerprint(self) -> str:
        """Digest of all that a lookup can find here; empty without entries. Part of the key of torch's compile caches."""
        entries = self.entries()
        if not entries:
            return ""
        text = canonical(sorted((name, canonical(dict(entry.candidate))) for name, entry in entries.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def put(self, entries: Iterable[Entry]) -> bool:
        """Add entries, in place of those with their keys.

        Returns:
            whether they are on disk. Where they cannot be (a read-only folder), they hold for this process, with a warning.
        """
        by_path: dict[Path, list[Entry]] = {}
        entries = list(entries)
        directory = self.directory
        if directory is None:
            self._unsaved |= {entry.digest: entry for entry in entries}
            return False
        for entry in entries:
            by_path.setdefault(directory / _file_name(entry), []).append(entry)
        saved = True
        for path, added in by_path.items():
            changes = {entry.digest: entry for entry in added}

            def merged(kept: dict[str, Entry], changes: dict[str, Entry] = changes) -> dict[str, Entry]:
                return {**kept, **changes}

            try:
                self._replace(path, merged)
                for name in changes:
                    self._unsaved.pop(name, None)
            except OSError as error:
                saved = False
                self._unsaved |= changes
                self._report(f"cannot write {path} ({error}): what was found holds for this process only.")
        return saved

    def remove(self, unwanted: Callable[[Entry], bool]) -> int:
        """Remove the entries for which ``unwanted`` is true; how many there were.

        Raises:
            StoreError: the folder cannot be written.
        """
        removed = 0
        with self._guard:
            dropped = [name for name, entry in self._unsaved.items() if unwanted(entry)]
            for name in dropped:
                del self._unsaved[name]
        removed += len(dropped)
        for path in self._paths():
            count = sum(map(unwanted, self._of(path).values()))
            if not count:
                continue
            try:
                self._replace(path, lambda kept: {n: entry for n, entry in kept.items() if not unwanted(entry)})
            except OSError as error:
                raise StoreError(
                    f"cannot write {path}: {error}. Give yourself the right, or name another store."
                ) from error
            removed += count
        return removed

    def export(self, path: str | Path, wanted: Callable[[Entry], bool] = lambda entry: True) -> int:
        """Write entries into one file, which :meth:`load` takes; how many."""
        chosen = [entry for entry in self.entries().values() if wanted(entry)]
        try:
            _write(Path(path), encoded(chosen))
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error}.") from error
        return len(chosen)

    def load(self, path: str | Path) -> int:
        """Add the entries of an exported file; how many.

        Raises:
            StoreError: the file cannot be read, or is no store; entries that do not match their key are refused too; or the
                entries cannot be written.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"cannot read {path}: {error}.") from error
        entries, problems = decoded(text)
        if problems:
            raise StoreError(f"{path} is no store to import: {'; '.join(problems)}.")
        if self.directory is None:
            raise StoreError(f"there is no store to add to: {ENVIRONMENT}=off. Name a folder.")
        if not self.put(entries.values()):
            raise StoreError(
                f"{path} was read, but {self.directory} cannot be written. Name another folder: {ENVIRONMENT}."
            )
        return len(entries)

    # --- files ------------------------------------------------------------------------------------------------------

    def _paths(self) -> list[Path]:
        directory = self.directory
        try:
            return [] if directory is None else sorted(directory.glob("*.json"))
        except OSError:
            return []

    def _of(self, path: Path) -> dict[str, Entry]:
        """The sound entries of a file, read again only when it changed."""
        with self._guard:
            try:
                status = path.stat()
                stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
                known = self._read.get(path)
                if known is not None and known[0] == stamp:
                    return known[1]
                entries, problems = _parsed(path)
            except FileNotFoundError:
                return {}
            except OSError as error:
                self._report(f"cannot read {path} ({error}): its entries are ignored.")
                return {}
            if problems:
                self._set_aside(path)
                with contextlib.suppress(OSError):
                    status = path.stat()
                    stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            self._read[path] = (stamp, entries)
            return entries

    def _set_aside(self, path: Path) -> None:
        """Move a damaged file away and write what is sound in it back; in a read-only folder, only say so."""
        try:
            with _locked(path):
                entries, problems = _parsed(path)  # another process may have been here first
                if not problems:
                    return
                aside = _unused(path)
                os.replace(path, aside)
                if entries:
                    _write(path, encoded(entries.values()))
            self._report(f"set aside {path} as {aside.name}: {_few(problems)}. {len(entries)} entries were kept.")
        except FileNotFoundError:
            return
        except OSError as error:
            self._report(f"{path} is damaged and cannot be set aside ({error}): what is sound in it is used.")

    def _replace(self, path: Path, change: Callable[[dict[str, Entry]], dict[str, Entry]]) -> None:
        """Read, change and write a file under its lock."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._of(path)  # sets a damaged file aside
        with _locked(path):
            try:
                kept, _ = _parsed(path)
            except FileNotFoundError:
                kept = {}
            _write(path, encoded(change(kept).values()))

    def _report(self, problem: str) -> None:
        if problem in self.problems:
            return
        self.problems.append(problem)
        _log.info(problem)
        warnings.warn(f"parallax-compile's store: {problem}", stacklevel=4)


def _parsed(path: Path) -> tuple[dict[str, Entry], list[str]]:
    try:
        return decoded(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, [f"it is not text ({error})"]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; an OSError where that is impossible."""
    import filelock

    try:
        with filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            yield
    except filelock.Timeout as error:
        raise OSError(f"another process has held {path.name}.lock for {_LOCK_SECONDS:.0f} s") from error


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # a temporary file is for its owner's eyes only
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _unused(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
        number += 1
    return aside


def _few(problems: list[str]) -> str:
    rest = len(problems) - 3
    return "; ".join(problems[:3]) + (f"; and {rest} more" if rest > 0 else "")


def _file_name(entry: Entry) -> str:
    device = entry.key.get("device")
    if not isinstance(device, str) or not device:
        raise InputError("an entry of the store needs the name of its device in its key.")
    return re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower() + ".json"
