"""The engine: one base model on one device, many experts, batches of requests.

Importing this package does not import torch; `server.engine.engine` does.
"""
