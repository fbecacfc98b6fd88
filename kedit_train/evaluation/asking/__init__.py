"""Probes, and the two ways to put them to a model: free generation and teacher forcing."""
