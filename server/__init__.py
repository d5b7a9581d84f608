"""The running service: HTTP API, generation, engine and command line."""

__version__ = "0.1.0"
