"""transformers + PEFT on the CPU in float32: the log-probabilities that the engine must give."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from oracle.adapters import assert_shift


@torch.no_grad()
def _round_to_bfloat16(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    for _, parameter in parameters:
        parameter.copy_(parameter.bfloat16().float())


class Reference:
    """One checkpoint and its adapters; results are kept, so asking twice is free.

    `weights` "bfloat16" rounds the base weights to bfloat16 first, `adapter_weights` "bfloat16"
    those of every adapter; the computation is float32 always.
    """

    def __init__(
        self, checkpoint: Path, weights: str = "float32", adapter_weights: str = "float32"
    ) -> None:
        self._adapter_weights = adapter_weights
        auto: Any = AutoModelForCausalLM
        self._model: PreTrainedModel | PeftModel = auto.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.vocab: int = self._model.config.vocab_size
        if weights == "bfloat16":
            _round_to_bfloat16(self._model.named_parameters())
        self._results: dict[tuple[str | None, tuple[int, ...]], torch.Tensor] = {}

    def add_adapter(self, name: str, directory: Path, check: bool = True) -> None:
        """Loads a PEFT directory; `check` asserts that it moves the log-probabilities."""
        if isinstance(self._model, PeftModel):
            self._model.load_adapter(str(directory), adapter_name=name)
        else:
            self._model = PeftModel.from_pretrained(
                self._model, str(directory), adapter_name=name
            ).eval()
        if self._adapter_weights == "bfloat16":
            _round_to_bfloat16(p for p in self._model.named_parameters() if f".{name}." in p[0])
        if check:
            probe = torch.randint(
                self.vocab, (48,), generator=torch.Generator().manual_seed(1)
            ).tolist()
            assert_shift(name, self.log_probs(probe), self.log_probs(probe, name))

    @torch.no_grad()
    def log_probs(self, token_ids: Sequence[int], adapter: str | None = None) -> torch.Tensor:
        """[len(token_ids), vocab] float32: row i is the distribution after tokens 0..i."""
        key = (adapter, tuple(token_ids))
        if key not in self._results:
            ids = torch.tensor([list(token_ids)])
            if adapter is None and isinstance(self._model, PeftModel):
                with self._model.disable_adapter():
                    logits = self._model(input_ids=ids).logits[0]
            else:
                if adapter is not None:
                    assert isinstance(self._model, PeftModel), f"no adapter {adapter!r}"
                    self._model.set_adapter(adapter)
                logits = self._model(input_ids=ids).logits[0]
            self._results[key] = logits.double().log_softmax(-1).float()
        return self._results[key]
