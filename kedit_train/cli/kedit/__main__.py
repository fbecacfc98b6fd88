"""``python -m kedit_train.cli.kedit VERB ...`` is the same as ``kedit VERB ...``."""

import sys

from kedit_train.cli.kedit import main

if __name__ == "__main__":
    sys.exit(main())
