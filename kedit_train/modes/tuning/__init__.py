"""Find settings for a model: a small grid, successive halving, and an evaluation on held-out edits."""
