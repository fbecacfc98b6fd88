"""Limit how far weights move: anchor weights, projections of the change, and the statistics for projections."""
