"""The commands ``kedit``, ``lightning run`` and ``python -m kedit_train``."""

import os

# This must be set before torch loads OpenMP. By default its idle threads spin, which slows a run down when other
# processes use the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
