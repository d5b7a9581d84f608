"""The tables of `gpu_tables` for all matrices of a model at once, for steps whose experts change all the time.

A batch adds to every matrix in the same rows, and an expert mostly has many matrices in one form. What differs from
matrix to matrix are addresses and factors, which are gathered for all of them in a few operations on arrays; how
launches look is worked out once for every combination of forms that occurs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from server.engine.kernels.gpu_tables import CHUNK_FIELDS, TERM_FIELDS, Launch, term_fields, tile_of
from server.engine.kernels.types import BitPlanes, LoadedDelta, Overwrites, SparseRows, rows_and_columns

_ABSENT, _PLANES, _LISTS, _LEVELS, _OTHER = range(5)
"""What an expert has of a matrix: nothing, planes, lists, lists with levels, what takes other kernels than these."""

Integers = npt.NDArray[np.int64]
Part = tuple[int, int, tuple[tuple[float, int], ...]]
"""First batch row, last one (exclusive), and the weights of experts there, by their place among the batch's."""


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """What tables say of one expert, matrix by matrix: numbers alone, which keep nothing of it in memory.

    Attributes:
        kinds: `[matrices]` uint8, what it has.
        fields: `[matrices, 8]` int64, rows of the term table, whose factors do not count.
        scales: `[matrices]` float64, what factors are at weight 1.
    """

    kinds: npt.NDArray[np.uint8]
    fields: Integers
    scales: npt.NDArray[np.float64]


@dataclass(frozen=True)
class LaunchForm:
    """A `Launch` but for what stands in its table, which has room for so many terms."""

    sparse: bool
    tile: int
    chunks: int
    one: bool
    levels: bool
    terms: int

    @property
    def size(self) -> int:
        """Of the table, in integers."""
        return self.chunks * CHUNK_FIELDS + self.terms * TERM_FIELDS

    def launch(self, table: torch.Tensor) -> Launch:
        return Launch(self.sparse, self.tile, self.chunks, self.one, self.levels, table)


Structure = tuple[LaunchForm, ...]
"""All launches of one matrix, in an order that does not depend on which rows come first."""


@dataclass(frozen=True, eq=False)
class _Pattern:
    """What matrices have in common of which every expert has the same kind.

    Attributes:
        structure: None where terms of several forms meet, or one takes other kernels.
        template: their tables, zeros where terms belong.
        experts, weights: of every term in the tables, one launch after the other.
    """

    structure: Structure | None
    template: list[int]
    experts: list[int]
    weights: list[float]


def expert_rows(deltas: Iterable[LoadedDelta | None]) -> ExpertRows:
    """Of an expert's deltas of all matrices, None where it has none."""
    given = list(deltas)
    kinds = np.array([_kind(delta) for delta in given], np.uint8)
    fields = np.zeros((len(given), TERM_FIELDS), np.int64)
    scales = np.zeros(len(given))
    for place, delta in enumerate(given):
        if isinstance(delta, BitPlanes | SparseRows):
            fields[place], scales[place] = term_fields(1.0, delta), delta.scale
    return ExpertRows(kinds, fields, scales)


class BatchTables:
    """The tables of one batch.

    Attributes:
        structures: how matrices are launched, each structure once, in the order in which matrices have them first.
        index: `[matrices]` int64, the place of each matrix's structure among these.
        size: integers in all tables, each matrix's in one piece.
    """

    def __init__(
        self, experts: Sequence[ExpertRows], parts: Sequence[Part], matrices: Integers, *, padded: bool
    ) -> None:
        """Args:
        parts: disjoint, not empty, ascending.
        matrices: which of the experts' matrices the batch is for.
        padded: whether to add chunks of no rows, and terms that no chunk has, up to powers of two.
        """
        self._experts, self._matrices = experts, matrices
        kinds = np.array([expert.kinds[matrices] for expert in experts]).reshape(len(experts), len(matrices))
        columns = np.ascontiguousarray(kinds.T).tobytes()
        numbers: dict[bytes, int] = {}
        count = len(experts)
        of_matrices = [
            numbers.setdefault(columns[at * count : (at + 1) * count], len(numbers)) for at in range(len(matrices))
        ]
        self._patterns = [_pattern(own, parts, count, padded) for own in numbers]
        places: dict[Structure | None, int] = {}
        self._of_patterns = np.array(
            [places.setdefault(pattern.structure, len(places)) for pattern in self._patterns], np.int64
        )
        self._which = np.array(of_matrices, np.int64)
        self.structures = tuple(places)
        self.index = self._of_patterns[self._which] if len(matrices) else self._which
        counts = np.bincount(self.index, minlength=len(self.structures))
        self._sizes = [sum(form.size for form in structure or ()) for structure in self.structures]
        self.size = sum(size * int(count) for size, count in zip(self._sizes, counts, strict=True))

    @property
    def key(self) -> Hashable:
        """The same for batches that differ in the contents of their tables alone."""
        return self.structures, self.index.tobytes()

    @property
    def complete(self) -> bool:
        """Whether there is a structure for every matrix."""
        return None not in self.structures

    def launches(self, tables: torch.Tensor) -> list[tuple[Launch, ...] | None]:
        """Of every matrix its launches, over tables that `fill` has filled or will; None without a structure.

        Args:
            tables: `[size]` int64.
        """
        found: list[tuple[Launch, ...] | None] = [None] * len(self.index)
        start = 0
        for place, structure in enumerate(self.structures):
            for matrix in np.flatnonzero(self.index == place) if structure is not None else ():
                own = []
                for form in structure or ():
                    own.append(form.launch(tables[start : start + form.size]))
                    start += form.size
                found[matrix] = tuple(own)
        return found

    def fill(self, tables: Integers) -> None:
        """Write all of the tables.

        Args:
            tables: `[size]` int64.
        """
        # One more, of zeros: whose the terms are that pad a table.
        fields = np.zeros((len(self._experts) + 1, len(self._matrices), TERM_FIELDS), np.int64)
        scales = np.zeros((len(self._experts) + 1, len(self._matrices)))
        for place, expert in enumerate(self._experts):
            expert.fields.take(self._matrices, 0, out=fields[place])
            expert.scales.take(self._matrices, 0, out=scales[place])
        start = 0
        for place, (structure, size) in enumerate(zip(self.structures, self._sizes, strict=True)):
            if not structure:
                continue
            here = np.flatnonzero(self.index == place)
            stop = start + len(here) * size
            self._fill(structure, place, here, tables[start:stop].reshape(len(here), size), fields, scales)
            start = stop

    def _fill(
        self,
        structure: Structure,
        place: int,
        here: npt.NDArray[np.intp],
        tables: Integers,
        fields: Integers,
        scales: npt.NDArray[np.float64],
    ) -> None:
        members = np.flatnonzero(self._of_patterns == place)
        patterns = [self._patterns[member] for member in members]
        which = np.searchsorted(members, self._which[here])
        tables[:] = np.array([pattern.template for pattern in patterns], np.int64)[which]
        owners = np.array([pattern.experts for pattern in patterns], np.intp)[which]
        terms = fields[owners, here[:, None]]
        # The product in 64 bits, then rounded once, as `term_fields` does.
        with np.errstate(over="ignore"):
            factors = np.array([pattern.weights for pattern in patterns])[which] * scales[owners, here[:, None]]
            terms[:, :, 1] = factors.astype(np.float32).view(np.int32)
        column = first = 0
        for form in structure:
            column += form.chunks * CHUNK_FIELDS
            own = terms[:, first : first + form.terms].reshape(len(here), -1)
            tables[:, column : column + own.shape[1]] = own
            column, first = column + own.shape[1], first + form.terms


def _kind(delta: LoadedDelta | None) -> int:
    if delta is None or isinstance(delta, Overwrites):
        return _ABSENT
    if rows_and_columns(delta.shape)[1] == 1:  # a size that `add_planes` does not compile with
        return _OTHER
    if isinstance(delta, SparseRows):
        return _LISTS if delta.levels is None else _LEVELS
    return _PLANES if isinstance(delta, BitPlanes) else _OTHER


def _pattern(kinds: bytes, parts: Sequence[Part], nobody: int, padded: bool) -> _Pattern:
    """Args:
    kinds: of one matrix, expert by expert.
    nobody: in whose name tables are padded with terms.
    """
    found: dict[tuple[bool, int], list[Part]] = {}
    for start, stop, terms in parts:
        here = tuple(term for term in terms if kinds[term[1]] != _ABSENT)
        forms = {_LISTS if kinds[expert] == _LEVELS else kinds[expert] for _, expert in here}
        if len(forms) > 1 or _OTHER in forms:
            return _Pattern(None, [], [], [])
        if here:
            sparse = _LISTS in forms
            found.setdefault((sparse, tile_of(sparse, stop - start)), []).append((start, stop, here))
    made = _Pattern((), [], [], [])
    structure = []
    for (sparse, tile), some in sorted(found.items()):
        chunks: list[int] = []
        owners: list[int] = []
        for start, stop, here in some:
            last = len(owners) + len(here)
            for row in range(start, stop, tile):
                chunks += (row, min(row + tile, stop), len(owners), last)
            owners += (expert for _, expert in here)
        count, room = len(chunks) // CHUNK_FIELDS, len(owners)
        if padded:
            count, room = _power(count), _power(room)
        levels = any(kinds[expert] == _LEVELS for expert in owners)
        form = LaunchForm(sparse, tile, count, all(len(here) == 1 for _, _, here in some), levels, room)
        structure.append(form)
        made.template.extend(chunks + [0] * (form.size - len(chunks)))
        made.experts.extend(owners + [nobody] * (room - len(owners)))
        made.weights.extend([weight for _, _, here in some for weight, _ in here] + [0.0] * (room - len(owners)))
    return _Pattern(tuple(structure), made.template, made.experts, made.weights)


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
