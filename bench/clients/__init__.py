"""Clients that people have, unmodified, against a live server: one module per client, one function per feature."""
