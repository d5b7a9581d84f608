"""Lossy and lossless codes for one tensor of a task vector."""
