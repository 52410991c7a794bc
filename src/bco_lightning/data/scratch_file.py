"""A file that does not outlive the processes that hold it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class ScratchFile:
    """A file in the temporary folder that no end of its processes leaves behind, not even a kill, where Linux helps.

    Args:
        suffix: End of its name.
        shared: The path of another process's file, to hold that one: it stays until the last of its holders removes it
            or ends. Only the process that made it takes away its name, where it has one.

    Raises:
        OSError: If there is no such file.
    """

    def __init__(self, suffix: str = ".arrow", *, shared: str | None = None) -> None:
        self._process, self._name = os.getpid(), None
        if shared is None:
            self._descriptor, self._name = tempfile.mkstemp(prefix="bco_lightning-", suffix=suffix)
        else:
            self._descriptor = os.open(shared, os.O_RDONLY)
        self.path = shared or str(self._name)
        if Path("/proc/self/fd").is_dir():
            # Without a name the file lives as long as it is open; other processes can open it by this path.
            self._unlink()
            self.path = f"/proc/{self._process}/fd/{self._descriptor}"

    def allocate(self, num_bytes: int) -> None:
        """Takes its place on the disk now: in a mapped file, a page that finds no room later kills the process.

        Raises:
            OSError: If there is not enough room.
        """
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(self._descriptor, 0, num_bytes)

    def remove(self) -> None:
        """Deletes it; in a forked process it does nothing."""
        # A forked loader worker has the same data set, and must not take it from the others when it ends.
        if os.getpid() == self._process and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._unlink()

    def _unlink(self) -> None:
        if self._name is not None:
            Path(self._name).unlink(missing_ok=True)
