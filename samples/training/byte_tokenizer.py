"""A tokenizer.json whose tokens are bytes, so that the trained models take text."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

__all__ = ["save_byte_tokenizer"]


def save_byte_tokenizer(file: Path) -> None:
    """Write a tokenizer whose id of a byte is the byte."""
    tokenizer = Tokenizer(models.BPE(vocab={_letter(byte): byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(file))


def _letter(byte: int) -> str:
    """The letter of a byte in byte-level tokenizers: printable ones stand for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(0x100 + sum(other not in printable for other in range(byte)))
