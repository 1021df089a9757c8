"""`python -m timm_pudnet.cli`, as `torchrun` starts it."""

import sys

from timm_pudnet.cli import main

if __name__ == '__main__':
    sys.exit(main())
