"""Small tokenizer directories of the three kinds that models use, as transformers writes them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The quick brown fox jumps over the lazy dog. Ünïcödé naïve café!",
    "def main():\n    return {'a': 1, 'b': [2, 3]}\n",
    "日本語のテキストと emoji 😀👩‍👩‍👧 mixed, 한국어도.",
    "hello hello world world the the of of and and in in  two  spaces",
] * 4


def _save(tokenizer: Tokenizer, path: Path, **options: Any) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(path)
    return path


def byte_level_bpe(path: Path, **options: Any) -> Path:
    """GPT-2 and Llama 3 style."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    roles = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    return _save(tokenizer, path, **(roles | options))


def byte_fallback_bpe(path: Path, **options: Any) -> Path:
    """Llama 2 style: pieces with spaces as U+2581, and a token for each byte."""
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        [s for s in SENTENCES if s.isascii()],
        trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False),
    )
    state = json.loads(trained.to_str())
    pieces = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    order = special + [f"<0x{i:02X}>" for i in range(256)] + pieces[len(special) :]
    state["model"]["vocab"] = {token: i for i, token in enumerate(order)}
    state["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return _save(tokenizer, path, **(roles | options))


def char_level(path: Path, **options: Any) -> Path:
    """One token a character."""
    chars = sorted({c for s in SENTENCES for c in s})
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *chars])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _save(tokenizer, path, **(roles | options))


MAKERS = {
    "byte_level_bpe": byte_level_bpe,
    "byte_fallback_bpe": byte_fallback_bpe,
    "char_level": char_level,
}
