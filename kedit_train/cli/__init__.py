"""Commands: the LightningCLI entry that the recipes share, and the ``lightning run`` launcher."""

import os

# Before torch loads OpenMP: its idle threads spin by default, which made a run on two cores that others used as well
# ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
