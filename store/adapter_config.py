"""`adapter_config.json` of a PEFT adapter: what it says about the arithmetic. What is not known is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from store.checkpoint import read_json
from store.errors import CheckpointError

CONFIG = "adapter_config.json"


class AdapterKind(StrEnum):
    """PEFT's methods whose files are read here; PEFT itself can merge others, too."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    LOHA = "LOHA"
    LOKR = "LOKR"
    IA3 = "IA3"


_WITHOUT_EFFECT = frozenset({
    # Where it came from, and how it was trained.
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
    "lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "target_r", "tinit", "tfinal", "deltaT",
    "beta1", "beta2", "orth_reg_weight", "total_step", "init_weights", "init_ia3_weights", "loftq_config", "eva_config",
    # Which modules are adapted, and with which rank: the tensors tell.
    "target_modules", "exclude_modules", "modules_to_save", "feedforward_modules", "layers_to_transform",
    "layers_pattern", "r", "rank_pattern", "ensure_weight_tying", "decompose_both", "decompose_factor", "bias",
    "lora_bias", "use_dora",
    # Parts of what is refused, where that is switched on.
    "megatron_core", "qalora_group_size", "use_effective_conv2d",
})  # fmt: skip
_USED = frozenset(
    {"alpha", "alpha_pattern", "fan_in_fan_out", "init_lora_weights", "init_r", "lora_alpha", "use_rslora"}
)
_SAME_BASE = ("gaussian", "eva", "orthogonal")
"""Ways to initialise that leave the base's weights alone; others train on a base of their own."""
_MAX_PATTERNS, _MAX_PATTERN = 1000, 500


@dataclass(frozen=True)
class AdapterConfig:
    """How the tensors of an adapter are to be read.

    Attributes:
        kind: the method.
        alpha: `lora_alpha` or `alpha`.
        alphas: patterns over module names → another alpha; the first that matches counts.
        by_root: whether alpha is divided by the root of the rank (rsLoRA).
        init_rank: what AdaLoRA divides by.
        rank: the rank where no tensor tells it (LoKr of two full matrices).
        transposed: whether adapted weights are `[in, out]` (`fan_in_fan_out`).
    """

    kind: AdapterKind
    alpha: float = 1.0
    alphas: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False
    init_rank: int = 1
    rank: int = 1
    transposed: bool = False

    def scaling(self, module: str, rank: int) -> float:
        """What the update of a module is multiplied by."""
        alpha = next((value for key, value in self.alphas.items() if _pattern(key).match(module)), self.alpha)
        if self.kind is AdapterKind.ADALORA:
            return (self.alpha if self.alpha > 0 else self.init_rank) / (self.init_rank + 1e-5)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def read_config(folder: Path) -> AdapterConfig:
    """Read the configuration of an adapter folder.

    Raises:
        CheckpointError: it cannot be read, or asks for what cannot be merged exactly; `param` names it.
    """
    given = read_json(folder / CONFIG)
    if not isinstance(given, dict):
        raise _fault("it must be a JSON object")
    method = given.get("peft_type")
    if method not in list(AdapterKind):
        raise _fault(
            f"the method {str(method)[:40]} is not supported here ({', '.join(AdapterKind)} are): where PEFT can merge "
            "it into the base, do that with merge_and_unload and give the folder of the merged checkpoint",
            "peft_type",
        )
    for key, value in given.items():
        if key not in _WITHOUT_EFFECT | _USED and value not in (None, False, {}, [], ""):
            raise _fault(f"{str(key)[:40]} is not supported", str(key)[:40])
    init = given.get("init_lora_weights", True)
    if not isinstance(init, bool) and init not in _SAME_BASE:
        raise _fault(
            f"init_lora_weights {str(init)[:40]} trains on a changed base; convert the adapter to plain LoRA when "
            "saving it (path_initial_model_for_weight_conversion)",
            "init_lora_weights",
        )
    kind = AdapterKind(method)
    if kind is AdapterKind.LOKR and given.get("rank_pattern"):
        raise _fault("rank_pattern is not supported with LOKR", "rank_pattern")
    return AdapterConfig(
        kind=kind,
        alpha=_number(given, "alpha" if kind in (AdapterKind.LOHA, AdapterKind.LOKR) else "lora_alpha", 8),
        alphas=_patterns(given),
        by_root=given.get("use_rslora") is True,
        init_rank=max(1, int(_number(given, "init_r", 12))),
        rank=max(1, int(_number(given, "r", 8))),
        transposed=given.get("fan_in_fan_out") is True,
    )


def _number(given: Mapping[str, object], key: str, default: float, param: str | None = None) -> float:
    param = param or key
    value = given.get(key, default)
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _fault(f"{key[:40]} must be a number", param)
    except OverflowError:  # an integer that no float holds
        raise _fault(f"{key[:40]} is too large a number", param) from None
    return value


def _patterns(given: Mapping[str, object]) -> dict[str, float]:
    patterns = given.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise _fault(f"alpha_pattern must be an object of at most {_MAX_PATTERNS} entries", "alpha_pattern")
    for key in patterns:
        try:
            if len(key) > _MAX_PATTERN:
                raise re.error("too long")
            _pattern(key)
        except (re.error, OverflowError, RecursionError):
            raise _fault(f"alpha_pattern has the broken pattern {key[:40]}", "alpha_pattern") from None
    return {key: _number(patterns, key, 0, "alpha_pattern") for key in patterns}


def _pattern(key: str) -> re.Pattern[str]:
    """What a key of `alpha_pattern` means: the end of a module's name, from a dot on."""
    return re.compile(rf"(.*\.)?({key})$")


def _fault(what: str, param: str | None = None) -> CheckpointError:
    return CheckpointError(f"{CONFIG}: {what}", param=param)
