"""PackRCNN from Python: `from packrcnn import load`, and the command `packrcnn` of the installed package."""

import os
import runpy
import sys

from common import UserError

__all__ = ["UserError", "command"]


def command() -> None:
    """The command `packrcnn`, which is the program of the module `train`; modules of your own are found in the working
    directory."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    runpy.run_module(f"{__package__}.train".lstrip("."), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    command()
