"""GGUF files, as llama.cpp's converters write them.

In: a `.gguf` file, or any part of a split one. Out: a Hugging Face-like config dict, tensors under plain Hugging Face names as views of
the mapped file, and a Tokenizer. `header` reads what a file says of itself, `families` what that means for a model, `tokenizer` and
`splitting` what it means for text.
"""

from dejavu.model.gguf.file import GGUFFile

__all__ = ["GGUFFile"]
