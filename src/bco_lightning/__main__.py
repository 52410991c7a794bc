"""``python -m bco_lightning``, and the command ``bco-lightning``."""

import gc
import os
import signal
import sys


def main() -> int:
    """Prints versions, or help that is kept, and leaves the rest to the command line proper."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # hardly two micro-batches have the same shapes
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Quiet from now to the last moment of the interpreter; in between ``early`` hears it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from bco_lightning.cli.help import kept_help
    from bco_lightning.parallel.signals import early

    if sys.argv[1:] == ["--version"]:
        import platform
        from importlib.metadata import version

        others = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "transformers", "peft"))
        print(f"bco-lightning {version('bco-lightning')} (Python {platform.python_version()}, {others})")
        return 0
    known = kept_help(sys.argv[1:])
    if known is not None:
        sys.stdout.write(known)
        return 0
    early.install()  # imports take seconds
    heard = signal.signal(signal.SIGINT, _leave)
    # Imports make half a million objects that stay; looking through them for garbage again and again takes a fifth of
    # the time to start, and seconds more when the process ends.
    gc.disable()
    from bco_lightning.cli import app

    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, heard)
    return app.main()


def _leave(*_: object) -> None:
    """Ends the process, in which nothing is begun yet."""
    os.write(2, b"\nSIGINT: stopping.\n")
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
