"""Commands: the LightningCLI entry that the recipes share, and the ``lightning run`` launcher."""
