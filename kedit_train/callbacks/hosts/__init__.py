"""When things happen: one translation per training loop, from its events to the lifecycle of an edit."""
