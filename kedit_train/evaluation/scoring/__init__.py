"""Scores: from a model's answers, texts and weights to numbers with confidence intervals."""
