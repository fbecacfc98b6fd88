"""One file per kind of training loop: translate its events to the lifecycle of an edit."""
