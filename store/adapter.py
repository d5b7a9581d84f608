"""A PEFT adapter folder as changes of the base's tensors: what PEFT would merge, computed from its files alone.

Formulas: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), AdaLoRA (2303.10512), LoHa (2108.06098),
LoKr (2309.14859), IA3 (2205.05638), as PEFT's `merge` computes them; tests compare both. Nothing is guessed: a tensor
or a setting that is not known is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from store.adapter_config import CONFIG, AdapterConfig, AdapterKind, read_config
from store.checkpoint import Checkpoint, CheckpointTensor, read_tensors
from store.errors import CheckpointError
from store.strict_json import FieldError
from store.task_vector import load_float32

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
    AdapterKind.LORA: ("lora_A.weight", "lora_B.weight"),
    AdapterKind.ADALORA: ("lora_A", "lora_B", "lora_E"),
    AdapterKind.LOHA: ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    AdapterKind.LOKR: ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    AdapterKind.IA3: ("ia3_l",),
}
_ONE_AXIS = ("lora_magnitude_vector", "lora_B.bias")
"""Parts that are no matrices."""
_EXTRA_OF_LORA = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_B.bias")
_FROZEN = "base_layer."

Parts = dict[str, CheckpointTensor]
Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Adapter:
    """An adapter that fits a base.

    Attributes:
        config: how its tensors are read.
        modules: adapted module → its parts by name.
        replaced: tensor of the base → what it became (`modules_to_save`, trained biases).
    """

    base: Checkpoint
    config: AdapterConfig
    modules: dict[str, Parts] = field(default_factory=dict)
    replaced: dict[str, CheckpointTensor] = field(default_factory=dict)

    @property
    def has_magnitudes(self) -> bool:
        """Whether some module is DoRA's."""
        return any("lora_magnitude_vector" in parts for parts in self.modules.values())

    def deltas(self) -> Iterator[tuple[str, torch.Tensor]]:
        """`(name, delta)` in float32 for every tensor of the base, sorted by name; zeros where nothing changes.

        Raises:
            CheckpointError: an adapter's tensor does not fit; `param` names it.
        """
        for name, tensor in self.base.tensors.items():
            yield name, self.delta(name, load_float32(tensor))

    def delta(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What one tensor changes by: float32, of the shape of `weight`, the base's values in float32."""
        module, _, kind = name.rpartition(".")
        parts = self.modules.get(module, {})
        if name in self.replaced or kind != "weight" or not parts:
            known = load_float32(self.replaced[name]) - weight if name in self.replaced else torch.zeros_like(weight)
            return known + self._bias(module, parts, weight) if kind == "bias" else known
        delta = self._merged(name, module, parts, weight)
        self._check_shape(name, tuple(delta.shape))
        return delta

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if shape != (wanted := self.base.tensors[name].shape):
            raise CheckpointError(
                f"the adapter changes {name} by a tensor of the shape {list(shape)}, the base's has {list(wanted)}: it "
                "was trained on another model",
                param=name,
            )

    def _bias(self, module: str, parts: Parts, weight: torch.Tensor) -> torch.Tensor | float:
        """What the adapter of a module does to its bias."""
        if "lora_B.bias" in parts:
            return load_float32(parts["lora_B.bias"]).mul_(self._scaling(module, parts))
        if "ia3_l" in parts and parts["ia3_l"].shape == (len(weight), 1):
            return weight * (load_float32(parts["ia3_l"]).view(-1) - 1)
        return 0.0

    def factors(self, name: str) -> Factors | None:
        """(`[rows, rank]`, `[rank, columns]`), float32, whose product is a tensor's delta; None where it is no such.

        Raises:
            CheckpointError: they do not fit each other or the tensor; `param` is the module or the tensor.
        """
        module, _, kind = name.rpartition(".")
        parts = self.modules.get(module, {})
        if kind != "weight" or "lora_magnitude_vector" in parts or name in self.replaced:
            return None
        found = self._factors(module, parts)
        if found is not None:
            self._check_shape(name, (found[0].shape[0], found[1].shape[1]))
        return found

    def _factors(self, module: str, parts: Parts) -> Factors | None:
        values = {part: load_float32(tensor) for part, tensor in parts.items()}
        if "lora_embedding_A" in parts:
            right, left, transposed = values["lora_embedding_A"], values["lora_embedding_B"], True
        elif self.config.kind is AdapterKind.LORA and parts:
            right, left, transposed = values["lora_A.weight"], values["lora_B.weight"], self.config.transposed
        elif self.config.kind is AdapterKind.ADALORA and parts:
            right, left, transposed = values["lora_A"] * values["lora_E"], values["lora_B"], self.config.transposed
        else:
            return None
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise CheckpointError(f"the adapter's factors of {module} do not fit each other", param=module)
        left = left * self._scaling(module, parts)
        return (right.T.contiguous(), left.T.contiguous()) if transposed else (left, right)

    def _merged(self, name: str, module: str, parts: Parts, weight: torch.Tensor) -> torch.Tensor:
        try:
            if (factors := self._factors(module, parts)) is not None:
                delta = factors[0] @ factors[1]
                if "lora_magnitude_vector" in parts and delta.shape == weight.shape:
                    return self._with_magnitude(load_float32(parts["lora_magnitude_vector"]), weight, delta)
                return delta
            values = {part: load_float32(tensor) for part, tensor in parts.items()}
            if self.config.kind is AdapterKind.IA3:
                scale = values["ia3_l"].T if self.config.transposed else values["ia3_l"]
                shrunk: torch.Tensor = weight * (scale - 1)
                return shrunk
            scaling = self._scaling(module, parts)
            if self.config.kind is AdapterKind.LOHA:
                one = values["hada_w1_a"] @ values["hada_w1_b"]
                return one * (values["hada_w2_a"] @ values["hada_w2_b"]) * scaling
            first, second = (
                values[f"lokr_w{i}"] if f"lokr_w{i}" in values else values[f"lokr_w{i}_a"] @ values[f"lokr_w{i}_b"]
                for i in (1, 2)
            )
            product: torch.Tensor = torch.kron(first, second) * scaling
            return product
        except RuntimeError:  # shapes that do not fit each other
            raise CheckpointError(f"the adapter's tensors for {name} do not fit it or each other", param=name) from None

    def _with_magnitude(self, magnitude: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """DoRA: the norms of the rows (of the columns, where weights are `[in, out]`) are the adapter's own."""
        merged = weight + delta
        axis = 0 if self.config.transposed else 1
        factor = magnitude.view(-1) / merged.norm(dim=axis)
        changed: torch.Tensor = merged * (factor if self.config.transposed else factor[:, None]) - weight
        return changed

    def _scaling(self, module: str, parts: Parts) -> float:
        ranks = {"hada_w1_b": 0, "lora_embedding_A": 0, "lora_A.weight": 0, "lora_A": 0, "lokr_w1_b": 0, "lokr_w2_b": 0}
        rank = next((parts[part].shape[axis] for part, axis in ranks.items() if part in parts), None)
        return self.config.scaling(module, rank or self.config.rank)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def open_adapter(folder: Path, base: Checkpoint) -> Adapter:
    """Read the headers of an adapter and find out what of the base it changes. Its weights are not read yet.

    Raises:
        CheckpointError: it cannot be read, does not fit the base, or is of a kind that is not supported; `param` names
            the tensor or setting.
    """
    try:
        adapter = Adapter(base, read_config(folder))
    except FieldError as error:
        raise CheckpointError(f"{CONFIG}: {error.field} {error.message}", param=error.field) from None
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder.name} holds {CONFIG}, but no {WEIGHTS}; pickled weights are never read here")
    for key, tensor in read_tensors(folder / WEIGHTS).items():
        _place(adapter, key, tensor)
    if not adapter.modules and not adapter.replaced:
        raise CheckpointError(f"{WEIGHTS} holds no tensors")
    for module, parts in adapter.modules.items():
        _check_whole(adapter, module, parts)
    return adapter


def _place(adapter: Adapter, key: str, tensor: CheckpointTensor) -> None:
    path = key.removeprefix(_PREFIX)
    known = _PARTS[adapter.config.kind] + (_EXTRA_OF_LORA if adapter.config.kind is AdapterKind.LORA else ())
    for part in known:
        module = path.removesuffix(f".{part}")
        if module == path:
            continue
        if f"{module}.weight" not in adapter.base.tensors:
            raise CheckpointError(_missing(module), param=key)
        adapter.modules.setdefault(module, {})[part] = tensor
        return
    if path.endswith(".lora_magnitude_vector.weight"):  # since PEFT 0.12
        _place(adapter, path.removesuffix(".weight"), tensor)
        return
    plain = path.replace("modules_to_save.", "", 1).replace(_FROZEN, "", 1)
    if plain not in adapter.base.tensors:
        raise CheckpointError(
            f"the adapter's tensor {key} is no part of {adapter.config.kind} that is known here, nor one of the base",
            param=key,
        )
    if tensor.shape != adapter.base.tensors[plain].shape:
        raise CheckpointError(
            f"{plain} has the shape {list(tensor.shape)} in the adapter and "
            f"{list(adapter.base.tensors[plain].shape)} in the base; tokens must not be added",
            param=key,
        )
    if _FROZEN in path and plain.endswith(".weight"):  # a copy of what was adapted, for readers without the base
        if not torch.equal(load_float32(tensor), load_float32(adapter.base.tensors[plain])):
            raise CheckpointError(f"the adapter was trained on another {plain} than the base's", param=key)
        return
    adapter.replaced[plain] = tensor


def _check_whole(adapter: Adapter, module: str, parts: Parts) -> None:
    kind = adapter.config.kind
    weight = adapter.base.tensors[f"{module}.weight"]
    if kind is AdapterKind.LOKR:
        whole = all(f"lokr_w{i}" in parts or {f"lokr_w{i}_a", f"lokr_w{i}_b"} <= parts.keys() for i in (1, 2))
    elif "lora_embedding_A" in parts or "lora_embedding_B" in parts:
        whole = parts.keys() == {"lora_embedding_A", "lora_embedding_B"}
    else:
        whole = set(_PARTS[kind]) <= parts.keys()
    if not whole:
        raise CheckpointError(
            f"the adapter's tensors for {module} are incomplete, or of a form not known", param=module
        )
    if len(weight.shape) != 2:
        raise CheckpointError(f"{module} is no matrix: adapters of such modules are not supported", param=module)
    for part, tensor in parts.items():
        if part not in _ONE_AXIS and len(tensor.shape) != 2:
            raise CheckpointError(f"{part} of {module} has the shape {list(tensor.shape)}: no matrix", param=module)
    if "lora_E" in parts and parts["lora_E"].shape != (parts["lora_A"].shape[0], 1):
        raise CheckpointError(f"the adapter's factors of {module} do not fit each other", param=module)
    if "lora_B.bias" not in parts:
        return
    if f"{module}.bias" not in adapter.base.tensors:
        raise CheckpointError(f"the adapter gives {module} a bias, and the base has none", param=module)
    given, own = parts["lora_B.bias"].shape, adapter.base.tensors[f"{module}.bias"].shape
    if given != own:
        raise CheckpointError(
            f"the adapter changes the bias of {module} by {list(given)}, the base's has {list(own)}: it was trained on "
            "another model",
            param=module,
        )


def _missing(module: str) -> str:
    tied = "; the output layer is tied to the embedding" if module == "lm_head" else ""
    return f"the adapter changes {module}, which the base does not have as a weight of its own{tied}"
