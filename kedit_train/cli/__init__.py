"""The commands ``kedit``, ``lightning run`` and ``python -m kedit_train``."""

import os

# This variable must be set before torch loads OpenMP. With PASSIVE, idle threads of OpenMP sleep. By default they spin
# (wait actively), which slows a run down when other processes use the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
