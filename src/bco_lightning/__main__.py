"""``python -m bco_lightning``."""

import gc
import sys

from bco_lightning.help_texts import answer


def main() -> int:
    """Answers what needs no PyTorch at once, and leaves the rest to the command line proper."""
    status = answer(sys.argv[1:])
    if status is not None:
        return status
    # Imports make half a million objects that stay; looking through them for garbage again and again takes a fifth of
    # the time to start, and seconds more when the process ends.
    gc.disable()
    from bco_lightning import cli

    gc.freeze()
    gc.enable()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
