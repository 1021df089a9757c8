"""The command line, `timm-pudnet`: calls the public API, says what it found, what it wrote and what to do next.

One module a command or two; what they share is in `group`.
"""

from timm_pudnet.cli import compare, denoise, evaluate, finetune, info, predict, share, train  # noqa: F401
from timm_pudnet.cli.group import main

__all__ = ['main']
