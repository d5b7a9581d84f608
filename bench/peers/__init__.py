"""Our server against what a user would pick instead: `python -m bench.peers`."""
