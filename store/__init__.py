"""Experts at rest: task vectors, codecs, encodings, the expert file, backends and the registry."""
