"""Hosts: one module per kind of training loop, which translates its events to the steps of an edit."""
