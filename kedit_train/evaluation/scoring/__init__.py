"""Compute scores with confidence intervals from a model's answers, its losses on texts, and its weights."""
