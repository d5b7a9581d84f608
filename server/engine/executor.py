"""One step of the model: a batch in, sampled tokens out, in either mode."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

import torch

from server.engine.attention import AttentionBatch
from server.engine.expert import DecodedExpert
from server.engine.graphs import DecodeGraphs
from server.engine.kernels import Kernels
from server.engine.kv_cache import KVCache
from server.engine.layout import Layout, lay_out
from server.engine.likelihood import likelihoods
from server.engine.merged import MergedWeights
from server.engine.mixed import MixedWeights
from server.engine.model import BaseModel
from server.engine.native_steps import NativeSteps
from server.engine.sampler import Sampled, sample
from server.engine.scheduler import Batch
from server.engine.sequence import Sequence
from server.engine.sites import find_sites
from store.mix import BASE_MIX, Mix


class Executor:
    """Puts the weights in order for a batch and runs it. A batch of the base alone runs the model as it was loaded.

    Attributes:
        merged, mixed: the two ways to apply a mix.
        fast: what runs steps in one launch or call, or None.
        merged_steps, mixed_steps: steps with deltas, by mode.
    """

    def __init__(
        self,
        model: BaseModel,
        cache: KVCache,
        kernels: Kernels,
        merged_bytes: int = 0,
        fast: DecodeGraphs | NativeSteps | None = None,
    ) -> None:
        """Args:
        merged_bytes: memory for the weights of hot mixes.
        fast: what runs steps, where it can, in place of the network's own modules.
        """
        self._model = model
        self._cache = cache
        self.fast = fast
        self.merged = MergedWeights(model.parameters, kernels, merged_bytes)
        self.mixed = MixedWeights(
            *find_sites(model.network, model.parameters, model.try_out), model.parameters, kernels
        )
        self.merged_steps = self.mixed_steps = 0

    def shareable(self, mix: Mix, experts: Mapping[str, DecodedExpert]) -> bool:
        """Whether a mix of resident experts can run in mixed mode."""
        return all(self.mixed.carries(experts[digest]) for digest, _ in mix.parts)

    def run(self, batch: Batch, experts: Mapping[str, DecodedExpert]) -> list[Sampled | None]:
        """Run every sequence's next tokens through the model, side by side in one row; note the likelihoods of prompts.

        Args:
            experts: at least every expert of the batch's mixes, by digest.

        Returns:
            For each piece of work that reaches its sequence's last token, in order, the token sampled there; None
            where the logits are not finite.
        """
        layout = lay_out(batch.work)
        logits = self.logits(layout, experts, mixed=batch.mixed)
        sampling = [item.sequence for item in batch.work if item.samples]
        _score(logits[len(sampling) :], layout.scored)
        return sample(logits[: len(sampling)], sampling)

    def logits(self, layout: Layout, experts: Mapping[str, DecodedExpert], *, mixed: bool) -> torch.Tensor:
        """Run a step that is laid out.

        Args:
            mixed: whether mixes are applied beside the weights; there is one, if not.

        Returns:
            `[logit rows, vocabulary]` float32, until the next step.
        """
        if mixed and any(not span.mix.is_base for span in layout.spans):
            self.merged.apply(BASE_MIX, {})
            made = None
            if self.fast is not None and self.fast.fits(layout):
                terms = self.mixed.terms(layout.spans, layout.logit_spans, experts)
                made = self.fast.run(layout, self.merged.moved, terms)
            self.mixed_steps += 1
            if made is not None:
                return made
            with self.mixed.carrying(layout.spans, layout.logit_spans, experts):
                return self._forward(layout)
        (span,) = layout.spans
        self.merged.apply(span.mix, experts)
        made = None if self.fast is None else self.fast.run(layout, self.merged.moved)
        self.merged_steps += not span.mix.is_base
        return self._forward(layout) if made is None else made

    def begin_anew(self) -> None:
        """Forget what was run to try and to measure: it counts for nothing, and its experts can leave memory."""
        self.mixed.forget()
        self.mixed.seconds = 0.0
        self.merged_steps = self.mixed_steps = 0

    def _forward(self, layout: Layout) -> torch.Tensor:
        attention = AttentionBatch(layout.segments, self._cache, self._model.device)
        return self._model.forward(layout.tokens, attention, layout.logit_rows)


def _score(logits: torch.Tensor, scored: Items[tuple[Sequence, range]]) -> None:
    """Note the likelihoods of prompt tokens in their sequences.

    Args:
        logits: `[tokens, vocabulary]` float32, of the position before each token, sequence after sequence.
        scored: sequences with the range of their tokens.
    """
    start = 0
    for sequence, places in scored:
        best = sequence.request.sampling.prompt_logprobs
        assert best is not None
        stop = start + len(places)
        tokens = sequence.tokens[places.start : places.stop]
        sequence.scored += likelihoods(logits[start:stop], tokens, [best] * len(tokens))
        start = stop
