"""Measure and limit weight changes, with anchor weights, projections, K-FAC factors and Fisher information."""
