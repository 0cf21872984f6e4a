"""Who is at work in a workspace: locks that the kernel drops with the process that holds them."""

import contextlib
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from pipelines.errors import Busy, FileFault

OWNER = "owner"  # a file in a draft, locked by the process that is at it, whose number it holds


def take_lock(path: Path, kind: int) -> int | None:
    """The descriptor of a file that is locked as `kind` of flock says, made where it is not there; None where another
    process's lock is in the way. It goes with the process.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise


def owner_of(draft: Path) -> str | None:
    """The number of the process that is at a draft; None where there is none."""
    with contextlib.suppress(OSError):
        file = os.open(
            draft / OWNER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        )  # does not wait for a pipe's other end
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.read(file, 32).decode(errors="replace").strip() or "unknown"
        finally:
            os.close(file)
    return None


def refuse_links(paths: Iterable[Path], draft: Path) -> None:
    """FileFault where one of these paths of a draft is a link."""
    if links := [path for path in paths if path.is_symlink()]:
        raise FileFault(f"{links[0]} is a link, through which a run would write elsewhere", f"remove {draft}")


def own(draft: Path) -> int:
    """Make a draft's folder, where it is not there, and be the only process at it; the lock's descriptor. Busy where
    another one is, FileFault for a folder that lies elsewhere.
    """
    while True:
        refuse_links([draft], draft)
        draft.mkdir(exist_ok=True)
        try:
            lock = take_lock(draft / OWNER, fcntl.LOCK_EX)
        except FileNotFoundError:  # removed by the process that was at it
            continue
        if lock is None:
            if (owner := owner_of(draft)) is None:  # who only looked, as `owner_of` does
                continue
            what = f"process {owner} is making the same {draft.parent.name} artifact in {draft.parents[1]}"
            raise Busy(what, "wait until it is done, or stop it")
        try:
            if os.path.samestat(os.fstat(lock), os.stat(draft / OWNER)):
                with contextlib.suppress(OSError):  # a full disk takes no number, and holds the lock all the same
                    os.ftruncate(lock, 0)
                    os.write(lock, f"{os.getpid()}\n".encode())
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # it was of a draft that is gone
