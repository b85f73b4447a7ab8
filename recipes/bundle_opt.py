"""A finished run of `train_opt.py` to a bundled model: int8 per row, with its tokenizer.

    python recipes/bundle_opt.py runs/opt-mini src/dejavu/models/opt-mini

In: RUN/model (`config.json` in our names, `model.safetensors`) and RUN/tokenizer.json. Out: a folder that `dejavu` loads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dejavu.config import ModelConfig
from dejavu.files import read_json, read_safetensors
from dejavu.model.bundle import write_bundle
from dejavu.model.tokenizer import load_tokenizer
from dejavu.model.transformer import Transformer


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack a trained model as a bundled one.")
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    config = ModelConfig.from_dict(read_json(options.run / "model" / "config.json"))
    model = Transformer(config)
    weights = read_safetensors(options.run / "model" / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(options.run, bos_token_id=config.bos_token_id, eos_token_ids=config.eos_token_ids)
    write_bundle(model, tokenizer, options.output)


if __name__ == "__main__":
    main()
