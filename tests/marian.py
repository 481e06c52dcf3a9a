"""Tiny Marian models for back-translation, trained here on a dozen sentences until they know them by heart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

SMALL: dict[str, Any] = dict(
    d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64, dropout=0.0, eos_token_id=0, pad_token_id=1,
    decoder_start_token_id=1, forced_eos_token_id=None,
)  # fmt: skip


def save_marian(directory: Path, pairs: list[tuple[str, str]], steps: int = 60) -> None:
    """A Marian model that has learned `pairs`, with a word tokenizer that AutoTokenizer loads."""
    words = sorted({f"▁{word}" for pair in pairs for text in pair for word in text.split()})
    vocab = {word: i for i, word in enumerate(["</s>", "<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )
    fast.save_pretrained(directory)
    torch.manual_seed(3)
    model = MarianMTModel(MarianConfig(vocab_size=len(vocab), **SMALL))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    source = fast([a for a, _ in pairs], padding=True, return_tensors="pt")
    labels = fast([b for _, b in pairs], padding=True, return_tensors="pt")["input_ids"]
    labels[labels == 1] = -100
    for _ in range(steps):
        loss = model(input_ids=source["input_ids"], attention_mask=source["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(directory)
