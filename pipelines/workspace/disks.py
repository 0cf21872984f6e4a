"""What disks do to those who write, in words that name the file and the way out."""

import errno
import os
import re
from pathlib import Path

from pipelines.errors import FileFault, HqdmError

# What a disk can do to any write, whichever library was writing.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def raise_disk_fault(fault: BaseException | None, folder: Path) -> None:
    """Raise FileFault in the place of what a library made of a full or broken disk, which seldom names a file."""
    if not isinstance(fault, Exception) or isinstance(fault, HqdmError):
        return
    link, seen = fault, set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        rust = re.search(r"\(os error (\d+)\)", str(link))
        number = link.errno if isinstance(link, OSError) else int(rust[1]) if rust else None
        if number in _DISK:
            where = getattr(link, "filename", None) or folder
            hint = "see that the path, its rights and its disk are right; the same command goes on"
            if number in (errno.ENOSPC, errno.EDQUOT):
                hint = "make room (hqdm gc --dry-run lists what can go); the same command goes on"
            elif number == errno.EFBIG:
                hint = "raise the limit on the size of files (ulimit -f); the same command goes on"
            raise FileFault(f"{where}: {os.strerror(number)}", hint) from fault
        link = link.__cause__ or link.__context__
