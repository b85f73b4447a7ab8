"""Triton's interpreter, faster: it replaces the functions of triton.language once for all, not on each call of a function.

As it is, each launch and each call between kernels looks through every member of the language again, which takes longer
than what is computed. What a call replaces is left as it is between launches too: no kernel is compiled in this process.
"""

from __future__ import annotations

import os
import sys
import types


def pytest_collection_finish() -> None:
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or os.environ.get("TRITON_INTERPRET") != "1" or not hasattr(interpreter, "_LangPatchScope"):
        return
    language = sys.modules["triton.language"]
    sees_all = types.FunctionType((lambda: None).__code__, {"tl": language, "core": language.core})
    interpreter._patch_lang(sees_all)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()  # pyrefly: ignore[missing-attribute]
