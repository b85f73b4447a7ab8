"""Texts and prompts that the tiny models read."""

from __future__ import annotations

PROMPT = "the cat sat on the mat"
TEXT = " ".join(["the cat sat on the mat and then the other cat ran to the hat"] * 30)
WORDS = "the cat sat on the mat and then the other cat ran to the hat there that the man had on his hand in the end\n"
LONG_TEXT = "".join(WORDS[7 * i % 50 :] for i in range(120))
