"""Hosts: one module per kind of training loop. Each module translates the loop's events to steps of an edit."""
