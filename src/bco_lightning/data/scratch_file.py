"""A file that does not outlive its process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class ScratchFile:
    """A file in the temporary folder that no end of this process leaves behind, not even a kill, where Linux helps."""

    def __init__(self, suffix: str = ".arrow") -> None:
        self._process = os.getpid()
        self._descriptor, self._name = tempfile.mkstemp(prefix="bco_lightning-", suffix=suffix)
        self.path = self._name
        if Path("/proc/self/fd").is_dir():
            # Without a name the file lives as long as it is open; loader workers can open it by this path.
            Path(self._name).unlink()
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
            Path(self._name).unlink(missing_ok=True)
