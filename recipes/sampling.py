"""Which temperature and top_p a sparse model writes well at, for the generation_config.json of an adapter or a model.

    python recipes/sampling.py smollm2-sparse --dtype int8 --temperature 0.3 0.5 0.7 1 --top-p 0.9 1 --show

In: a model, settings to try. Out: for each setting and both modes a JSON line: `nll`, the mean negative log-likelihood of the
samples' tokens under the dense model, in nats, and `worst`, that of the worst sample; `repeated`, the share of 4-grams of a sample
that it had before; `distinct`, the share of samples that differ from all others. Too cold a model loops, too hot it breaks words:
a sparse model's samples should be about as likely as the dense model's own are at a temperature that people use. --show prints
the texts, for a person to read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch

import dejavu
from dejavu.language_model import LanguageModel
from dejavu.model.template import chat_ids
from judged_prompts import BEGINNINGS, MESSAGES

PROMPTS = 6  # of those that judge.py asks, the first
GRAM = 4


def repeated(ids: Sequence[int]) -> float:
    """The share of the n-grams that occurred before; 0 for a text too short to have two."""
    grams = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def nll(lm: LanguageModel, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> float:
    """Mean over the new tokens, of the dense model."""
    logprob_TV = lm.logits([*prompt_ids, *new_ids], dense=True)[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return -float(logprob_TV.gather(1, torch.tensor(new_ids)[:, None]).mean())


def measure(lm: LanguageModel, options: argparse.Namespace, *, temperature: float, top_p: float, dense: bool) -> dict[str, object]:
    chat = lm.tokenizer.chat_template is not None
    nlls, loops, texts = [], [], []
    for prompt in (MESSAGES if chat else BEGINNINGS)[:PROMPTS]:
        message = [{"role": "user", "content": prompt}] if chat else prompt
        prompt_ids = lm.tokenizer.encode(message) if isinstance(message, str) else chat_ids(lm.tokenizer, message)
        for seed in range(options.seeds if temperature > 0 else 1):
            text = lm.generate(
                message, max_new_tokens=options.new_tokens, temperature=temperature, top_k=lm.config.vocab_size, top_p=top_p, seed=seed,
                dense=dense,
            )  # fmt: skip
            nlls.append(nll(lm, prompt_ids, text.token_ids))
            loops.append(repeated(text.token_ids))
            texts.append(str(text))
            if options.show:
                print(f"--- {temperature} {top_p} {'dense' if dense else 'sparse'} {seed} {prompt}\n{text}", flush=True)
    mode = "dense" if dense else "sparse"
    figures = {"nll": round(sum(nlls) / len(nlls), 3), "worst": round(max(nlls), 3), "repeated": round(sum(loops) / len(loops), 3)}
    facts = {"model": lm.name, "dtype": lm.dtype, "mode": mode, "temperature": temperature, "top_p": top_p}
    return facts | figures | {"distinct": round(len(set(texts)) / len(texts), 3), "texts": len(texts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what dejavu.load takes")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--top-p", type=float, nargs="+", default=[0.9, 1.0])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--show", action="store_true", help="print the texts")
    options = parser.parse_args()
    lm = dejavu.load(options.model, dtype=options.dtype, threads=options.threads)
    for temperature in options.temperature:
        for top_p in options.top_p if temperature > 0 else options.top_p[:1]:
            for dense in (False, True):
                print(json.dumps(measure(lm, options, temperature=temperature, top_p=top_p, dense=dense)), flush=True)


if __name__ == "__main__":
    main()
