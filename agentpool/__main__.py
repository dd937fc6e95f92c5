"""`python -m agentpool`: the same as the `agentpool` command."""

import sys

from agentpool.cli import main

if __name__ == "__main__":
    sys.exit(main())
