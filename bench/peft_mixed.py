"""PEFT's mixed batch (`adapter_names`) in float32, where it is fastest on a CPU."""

import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from random_llama import VOCAB
from transformers import LlamaForCausalLM


class PeftMixed:
    def __init__(self, base: Path, adapters: list[Path], threads: int) -> None:
        torch.set_num_threads(threads)
        model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._names = [path.name for path in adapters]
        self._model: Any = PeftModel.from_pretrained(
            model, adapters[0], adapter_name=self._names[0]
        )
        for path in adapters[1:]:
            self._model.load_adapter(path, adapter_name=path.name)
        self._model.eval().to(torch.float32)

    @torch.no_grad()
    def decode(self, batch: int, context: int, steps: int) -> float:
        """Generated tokens/s after the prompts, row i on adapter i modulo their number."""
        names = [self._names[row % len(self._names)] for row in range(batch)]
        ids = torch.randint(300, VOCAB, (batch, context))
        out = self._model(input_ids=ids, use_cache=True, logits_to_keep=1, adapter_names=names)
        begin = time.perf_counter()
        for _ in range(steps):
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            out = self._model(
                input_ids=ids,
                past_key_values=out.past_key_values,
                use_cache=True,
                adapter_names=names,
            )
        return batch * steps / (time.perf_counter() - begin)
