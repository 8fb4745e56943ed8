"""What a batch keeps beside its products, in `<output>/.medmamba/`: lock, index of hashes, attempts.

Nothing here says what is done (the reports do); all of it may be deleted, at the price of reading the archive again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from medmamba.errors import ConfigError
from medmamba.files import MODE, TEMPORARY, hash_file, write_json

STATE = ".medmamba"
DEATHS = 2  # a case whose process died this often is set aside


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """Holds the output folder for this process; the kernel lets go when it dies, so a dead owner blocks nobody.

    Raises ConfigError, naming host and process, when another batch holds it; also for a lock that another host left
    behind (its processes cannot be seen from here).
    """
    path = output / STATE / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, MODE)
    except OSError as error:
        raise ConfigError(
            f"{output}: cannot be written ({error.strerror}); choose another --output or its rights"
        ) from None
    with os.fdopen(handle, "r+", encoding="utf-8") as file:
        owner = _owner(file.read())
        held = _seize(file.fileno(), owner)
        if not held or (owner and owner["host"] != socket.gethostname()):
            raise ConfigError(
                f"{output}: a batch runs there already (host {owner.get('host', '?')}, "
                f"process {owner.get('pid', '?')}); wait for it, or delete {path} when that machine is down"
            )
        _overwrite(file.fileno(), json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        try:
            yield
        finally:
            _overwrite(file.fileno(), "")


def _owner(text: str) -> dict[str, str]:
    try:
        values = json.loads(text)
        return {"host": str(values["host"]), "pid": str(int(values["pid"]))}
    except (ValueError, KeyError, TypeError):
        return {}


def _seize(handle: int, owner: dict[str, str]) -> bool:
    """Takes the kernel's lock; on a file system without locks the process number decides."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        return not owner or not alive(int(owner["pid"]))
    return True


def _overwrite(handle: int, text: str) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)


def alive(pid: int) -> bool:
    """Whether a process of this number runs on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sweep(folder: Path) -> int:
    """Removes the unfinished files (`.NAME.PID.part`) of processes that no longer run; returns how many."""
    removed = 0
    for path in folder.rglob(f".*{TEMPORARY}"):
        pid = path.name.removesuffix(TEMPORARY).rpartition(".")[2]
        if pid.isdigit() and not alive(int(pid)):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


class Index:
    """(path, size, mtime_ns, inode) -> SHA-256, so that an archive is read once; and which reports were tracked."""

    def __init__(self, output: Path) -> None:
        path = output / STATE / "index.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._base = _open_base(path)
        except sqlite3.DatabaseError:  # damaged: it only spares reading, so begin again
            path.unlink()
            self._base = _open_base(path)
        path.chmod(MODE)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.close()

    def hash(self, path: Path, *, reread: bool = False) -> str:
        """Contents of a file, read only when it is new or changed, or `reread`. Raises OSError."""
        status = path.stat()
        name = os.fsencode(path.absolute())
        seen = (status.st_size, status.st_mtime_ns, status.st_ino)
        row = self._base.execute("select size, mtime_ns, inode, sha256 from files where path = ?", (name,)).fetchone()
        if row is not None and tuple(row[:3]) == seen and not reread:
            return str(row[3])
        value = hash_file(path)
        self._base.execute("insert or replace into files values (?, ?, ?, ?, ?)", (name, *seen, value))
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is hashed inside reaches the disk in one write: a series has hundreds of files."""
        with self._base:
            self._base.execute("begin")
            yield

    def tracked(self, title: str, case: str) -> str | None:
        """The stamp under which a case's report was given to tracking."""
        row = self._base.execute("select stamp from tracked where title = ? and id = ?", (title, case)).fetchone()
        return None if row is None else str(row[0])

    def set_tracked(self, title: str, stamps: dict[str, str]) -> None:
        """Remembers stamps by case, all or none."""
        with self._base:
            self._base.execute("begin")
            rows = [(title, case, stamp) for case, stamp in stamps.items()]
            self._base.executemany("insert or replace into tracked values (?, ?, ?)", rows)


def _open_base(path: Path) -> sqlite3.Connection:
    base = sqlite3.connect(path, isolation_level=None)
    base.execute(
        "create table if not exists files (path blob primary key, size int, mtime_ns int, inode int, sha256 text)"
    )
    base.execute("create table if not exists tracked (title text, id text, stamp text, primary key (title, id))")
    return base


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One case being worked on: `count` starts so far under this `key`, `pid` of the last."""

    case: str
    key: str
    pid: int
    count: int
    started: str


def attempt_path(output: Path, title: str, case: str) -> Path:
    return output / STATE / "attempts" / title / f"{case}.json"


def read_attempt(output: Path, title: str, case: str) -> Attempt | None:
    """The attempt that a dead process left behind, or None."""
    try:
        return Attempt(**json.loads(attempt_path(output, title, case).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def begin_attempt(output: Path, title: str, case: str, key: str) -> Attempt:
    """Writes that this process starts on the case; contents that changed since begin to count anew."""
    before = read_attempt(output, title, case)
    count = before.count + 1 if before is not None and before.key == key else 1
    started = datetime.now(UTC).isoformat(timespec="seconds")
    attempt = Attempt(case=case, key=key, pid=os.getpid(), count=count, started=started)
    write_json(attempt_path(output, title, case), asdict(attempt))
    return attempt


def end_attempt(output: Path, title: str, case: str) -> None:
    """The process lived through the case, whatever came out."""
    with suppress(FileNotFoundError):
        attempt_path(output, title, case).unlink()
