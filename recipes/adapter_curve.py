"""Quality against density of an adapter: its thresholds moved up and down together.

    python recipes/adapter_curve.py smollm2-sparse --text 'text/valid/*.txt' | python recipes/tables.py record curve smollm2-sparse

In: a model with an adapter that predicts neurons, texts. Out: one JSON object with a point for each shift: `shift`, `density`, `kl` and
`rise` (of perplexity) to the dense model, every token masked, in fp32. Scores are logits: at a shift of 0 a neuron is read where the
predictor holds it for likelier needed than not.
"""

from __future__ import annotations

import argparse
import json
import math

import torch

import dejavu
from dejavu.model.masked import MaskedSelection
from dejavu.model.texts import named_texts
from dejavu.offline.adapt.finish import moved
from dejavu.offline.collect import pack_windows

SHIFTS = (-2.0, -1.0, -0.5, -0.2, -0.1, 0.0, 0.1, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--adapter", default="bundled")
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    options = parser.parse_args()
    lm = dejavu.load(options.model, backend="torch", adapter=options.adapter)
    layers = lm.layers()
    assert layers is not None and all(layer.neurons.lookahead is not None for layer in layers), "neurons of every layer are predicted"
    parts = []
    for text in named_texts(options.text).values():
        windows = pack_windows([lm.tokenizer.encode_plain(text)], context=options.length, bos=lm.tokenizer.document_bos)
        parts.append(windows[torch.linspace(0, len(windows) - 1, min(options.windows, len(windows))).long()])
    ids_WT = torch.cat(parts)
    shifted = {shift: MaskedSelection(moved(layers, shift)) for shift in SHIFTS}
    losses: dict[float, list[tuple[float, float]]] = {shift: [] for shift in SHIFTS}  # of every window: KL, rise of the loss
    with torch.inference_mode():
        for ids_T in ids_WT:
            dense_TV = lm.model(ids_T[None])[0].log_softmax(-1)
            for shift, selection in shifted.items():
                sparse_TV = lm.model(ids_T[None], selection)[0].log_softmax(-1)
                kl = float((dense_TV.exp() * (dense_TV - sparse_TV)).sum(-1).mean())
                target = ids_T[1:, None]
                losses[shift].append((kl, float((dense_TV - sparse_TV)[:-1].gather(1, target).mean())))
    points = []
    for shift, values in losses.items():
        kl, rise = (sum(each) / len(values) for each in zip(*values, strict=True))
        points.append({"shift": shift, "density": shifted[shift].counter.mlp_density(), "kl": kl, "rise": math.expm1(rise)})
    print(json.dumps({"tokens": ids_WT.numel(), "points": points}))


if __name__ == "__main__":
    main()
