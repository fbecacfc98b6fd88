"""Evaluation prompts (probes), and two ways to run a model on them: free generation and teacher forcing."""
