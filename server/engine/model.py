"""The base model: loaded, checked, and run one ragged batch at a time."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from server.engine.attention import ATTENTION_NAME, AttentionBatch, Segment, SlotBatch
from server.engine.fused import fuse
from server.engine.kv_cache import KVShape
from server.engine.large_pages import lay_out
from server.engine.options import BaseWeights
from server.engine.quantised import Packed, quantise
from store.errors import CheckpointError
from store.fingerprint import manifest_of
from store.manifest import BaseManifest

log = logging.getLogger(__name__)

_PROBE_TOKENS = 24
_PROBE_TOLERANCE = {torch.float32: 1e-3}
_PROBE_TOLERANCE_REDUCED = 0.1
"""Rounding differs by a few percent in 16 bits; an architecture that ignores the interface is off by far more."""


class BaseModel:
    """A causal LM of transformers, run without padding over the paged cache, plus its early layers for routing.

    Attributes:
        parameters: every parameter by its checkpoint name (tied ones once). The merged mode swaps what they point to.
        stop_tokens: ids that end the model's turn.
        context_length: most tokens of prompt and answer together.
        vocabulary: token ids are below this.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        feature_layer: int,
        cache_dir: Path | None,
        weights: BaseWeights = BaseWeights.FULL,
    ) -> None:
        """Load and check the base.

        Args:
            weights: what its linear layers are kept as; the manifest is that of the checkpoint all the same.

        Raises:
            CheckpointError: the folder holds no model that this engine can run.
            InvalidRequestError: `weights` cannot be had here.
        """
        manifest = manifest_of(folder, cache_dir)
        try:
            config = AutoConfig.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation=ATTENTION_NAME, use_safetensors=True
            )
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(f"transformers cannot load the base: {error}", param="base") from error
        nn.Module.to(model, device)
        if device.type == "cpu" and weights is BaseWeights.FULL:  # else one that stays would keep all beside it
            lay_out(model.parameters())
        stop_tokens = _stop_tokens(folder, config.get_text_config())
        self._take_over(model, manifest, stop_tokens, feature_layer, weights, cache_dir)

    @classmethod
    def of_network(cls, network: PreTrainedModel, manifest: BaseManifest, *, feature_layer: int) -> BaseModel:
        """A base that is in memory already, made with `attn_implementation=ATTENTION_NAME` on its device.

        Raises:
            CheckpointError: the engine cannot run it.
        """
        base = cls.__new__(cls)
        nn.Module.eval(network)
        base._take_over(network, manifest, frozenset(), feature_layer, BaseWeights.FULL, None)
        return base

    def _take_over(
        self,
        model: PreTrainedModel,
        manifest: BaseManifest,
        stop_tokens: frozenset[int],
        feature_layer: int,
        weights: BaseWeights,
        cache_dir: Path | None,
    ) -> None:
        self.manifest = manifest
        self.device, self.dtype = model.device, model.dtype
        self._model: PreTrainedModel = model.requires_grad_(False)
        self.parameters: dict[str, nn.Parameter] = dict(self._model.named_parameters())
        absent = sorted(set(self.manifest.tensors) - set(self.parameters) - set(dict(self._model.named_buffers())))
        if absent:
            raise CheckpointError(
                f"this architecture renames or fuses its weights when loaded ({absent[0]} and {len(absent) - 1} more "
                "have no parameter of that name), so experts could not be applied to it",
                param="base",
            )
        if weights is not BaseWeights.FULL:
            quantise(self._model, weights, self.device, cache_dir)
        text = model.config.get_text_config()
        self.context_length: int = text.max_position_embeddings
        self.hidden_size: int = text.hidden_size
        self.vocabulary: int = text.vocab_size
        self.kv_shape = KVShape(
            layers=text.num_hidden_layers,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            dtype=self.dtype,
        )
        self.query_heads: int = text.num_attention_heads
        self.stop_tokens = stop_tokens
        self.feature_layer = min(feature_layer, text.num_hidden_layers)
        self._early = self._early_layers(self.feature_layer)
        fuse(self._model, self.kv_shape.head_dim, cache_dir)
        self._check_attention()

    @property
    def network(self) -> nn.Module:
        """The modules that `forward` runs."""
        return self._model

    def try_out(self, rows: int, wanted: int) -> None:
        """Run so many arbitrary tokens, and compute the logits of so many of them."""
        tokens = [position % self.vocabulary for position in range(rows)]
        self.forward(tokens, AttentionBatch([Segment(0, rows, 0, ())], None, self.device), list(range(wanted)))

    @torch.inference_mode()
    def forward(self, tokens: list[int], batch: AttentionBatch, logit_rows: list[int]) -> torch.Tensor:
        """Run one step.

        Args:
            tokens: ids of all rows, segment after segment.
            batch: the rows' layout; its cache receives their keys and values.
            logit_rows: rows whose next-token logits are wanted.

        Returns:
            `[len(logit_rows), vocabulary]` float32.
        """
        ids = torch.tensor([tokens], device=self.device)
        wanted = torch.tensor(logit_rows, dtype=torch.int64, device=self.device)
        output = self._model(
            input_ids=ids, position_ids=self._positions(batch), use_cache=False, logits_to_keep=wanted, batch=batch
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    @torch.inference_mode()
    def decode(self, ids: torch.Tensor, positions: torch.Tensor, batch: SlotBatch) -> torch.Tensor:
        """One token more of every row; everything comes from tensors and nothing goes back to the host.

        Args:
            ids, positions: `[rows]` int64, on the device.

        Returns:
            `[rows, vocabulary]` of the model's dtype.
        """
        output = self._model(input_ids=ids[None], position_ids=positions[None], use_cache=False, batch=batch)
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def features(self, prompts: list[list[int]]) -> torch.Tensor:
        """Routing features: the pristine base's hidden states after `feature_layer` layers, mean over the prompt.

        The first token is left out of the mean (it is an attention sink whose state says nothing of the text),
        unless it is the only one.

        Args:
            prompts: token ids, at least one each.

        Returns:
            `[len(prompts), hidden_size]` float32 on the CPU.
        """
        segments, start = [], 0
        for prompt in prompts:
            segments.append(Segment(start, start + len(prompt), 0, ()))
            start += len(prompt)
        batch = AttentionBatch(segments, None, self.device)
        ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=self.device)
        hidden = self._early(input_ids=ids, position_ids=self._positions(batch), use_cache=False, batch=batch)
        states = hidden.last_hidden_state[0].float()
        return torch.stack([states[min(s.start + 1, s.stop - 1) : s.stop].mean(dim=0) for s in segments]).cpu()

    def _positions(self, batch: AttentionBatch) -> torch.Tensor:
        positions = [position for s in batch.segments for position in range(s.context, s.length)]
        return torch.tensor([positions], device=self.device)

    def _early_layers(self, layers: int) -> nn.Module:
        """The decoder cut after `layers` layers, in modules of its own that share the pristine weights' memory.

        Merged mode points the model's parameters elsewhere and never writes to pristine memory, so features do not
        depend on what is patched.
        """
        decoder: nn.Module = self._model.get_decoder()  # type: ignore[no-untyped-call]
        stack = getattr(decoder, "layers", None)
        if not isinstance(stack, nn.ModuleList) or not hasattr(decoder, "norm"):
            raise CheckpointError(f"{type(decoder).__name__} has no stack of layers followed by a norm", param="base")
        shared: dict[int, object] = {
            id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in decoder.parameters()
        }
        shared |= {id(module): module for module in decoder.modules() if isinstance(module, Packed)}
        kept = nn.ModuleList(stack[:layers])
        shared[id(stack)] = copy.deepcopy(kept, shared)
        early: nn.Module = copy.deepcopy(decoder, shared)
        early.norm = nn.Identity()
        return early

    def _check_attention(self) -> None:
        """Compare our ragged attention with transformers' own on a short prompt, so that an architecture which
        ignores the attention interface is refused at start instead of answering wrongly."""
        tokens = torch.randint(self.vocabulary, (_PROBE_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
        layout = AttentionBatch([Segment(0, len(tokens), 0, ())], None, self.device)
        ours = self.forward(tokens, layout, [len(tokens) - 1])
        self._model.set_attn_implementation("eager")
        try:
            with torch.inference_mode():
                reference = self._model(input_ids=torch.tensor([tokens], device=self.device), use_cache=False)
        finally:
            self._model.set_attn_implementation(ATTENTION_NAME)
        expected = reference.logits[0, -1:].float()
        error = float((ours - expected).norm() / expected.norm())
        reduced = any(isinstance(module, Packed) for module in self._model.modules())
        tolerance = _PROBE_TOLERANCE_REDUCED if reduced else _PROBE_TOLERANCE.get(self.dtype, _PROBE_TOLERANCE_REDUCED)
        if not error < tolerance:
            raise CheckpointError(
                f"this architecture does not compute the same over the paged cache (relative error {error:.2g})",
                param="base",
            )


def _stop_tokens(folder: Path, config: object) -> frozenset[int]:
    try:
        declared = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        declared = None
    declared = getattr(config, "eos_token_id", None) if declared is None else declared
    return frozenset([declared] if isinstance(declared, int) else declared or ())
