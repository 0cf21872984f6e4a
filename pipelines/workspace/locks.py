"""Who is at work in a workspace: locks that the kernel drops with the process that holds them."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from pipelines.errors import Busy, FileFault

OWNER = "owner"  # a file in a draft, locked by the process that is at it, whose number it holds
_NO_FILE = (errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EINVAL)


def take_lock(path: Path, kind: int) -> int | None:
    """The descriptor of a file that is locked as `kind` of flock says, made where it is not there; None where another
    process's lock is in the way. It goes with the process, whose number the file holds where it is locked alone.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        if kind == fcntl.LOCK_EX:
            with contextlib.suppress(OSError):  # a full disk takes no number, and holds the lock all the same
                os.ftruncate(lock, 0)
                os.write(lock, f"{os.getpid()}\n".encode())
        return lock
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise


def holder_of(path: Path) -> str | None:
    """The number of the process that holds a file's lock alone; None where there is none."""
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe's other end is not waited for
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(OSError):
                return os.read(file, 32).decode(errors="replace").strip() or "unknown"
            return "unknown"
        finally:
            os.close(file)
    return None


def owner_of(draft: Path) -> str | None:
    """The number of the process that is at a draft; None where there is none."""
    return holder_of(draft / OWNER)


def refuse_links(paths: Iterable[Path], draft: Path) -> None:
    """FileFault where one of these paths of a draft is a link."""
    if links := [path for path in paths if path.is_symlink()]:
        raise FileFault(f"{links[0]} is a link, through which a run would write elsewhere", f"remove {draft}")


def own(draft: Path) -> int:
    """Make a draft's folder, where it is not there, and be the only process at it; the lock's descriptor. Busy where
    another one is, FileFault for what is no draft, or lies elsewhere.
    """
    while True:
        refuse_links([draft, draft / OWNER], draft)
        with contextlib.suppress(FileExistsError):  # pathlib's exist_ok would look whether it is still there
            os.mkdir(draft)
        try:
            lock = take_lock(draft / OWNER, fcntl.LOCK_EX)
        except FileNotFoundError:  # removed by the process that was at it
            continue
        except OSError as fault:
            if fault.errno in _NO_FILE:
                raise FileFault(f"{draft} is not what a run leaves there", f"remove {draft}") from fault
            raise
        if lock is None:
            if (owner := owner_of(draft)) is None:  # who only looked, as `owner_of` does
                continue
            what = f"process {owner} is making the same {draft.parent.name} artifact in {draft.parents[1]}"
            raise Busy(what, draft=draft)
        try:
            if os.path.samestat(os.fstat(lock), os.stat(draft / OWNER)):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # it was of a draft that is gone
