"""The version of kedit-train. The package metadata and the command line read it from here."""

__version__ = "0.2.0"
