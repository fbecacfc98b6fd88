"""Compute scores with confidence intervals from a model's answers, texts and weights."""
