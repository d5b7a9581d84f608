"""Mixed mode's arithmetic: deltas in packed form, applied beside the base, each to its own rows of a batch.

`pack` makes the packed form, `backend` chooses who computes with it.
"""

from server.engine.kernels.choice import available, backend, integer_kernels
from server.engine.kernels.packing import dense, gather_rows, pack, packed_bytes, packed_fields
from server.engine.kernels.types import Group, Kernels, LoadedDelta, Overwrites, PackedDelta, Term

__all__ = [
    "Group",
    "Kernels",
    "LoadedDelta",
    "Overwrites",
    "PackedDelta",
    "Term",
    "available",
    "backend",
    "dense",
    "gather_rows",
    "integer_kernels",
    "pack",
    "packed_bytes",
    "packed_fields",
]
