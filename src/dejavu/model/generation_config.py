"""generation_config.json: how the text of a model, or of an adapter, is to be drawn, and the ids of BOS and EOS.

In: a folder. Out: a GenerationConfig. The rules are those of transformers: temperature, top_k and top_p count where do_sample is true, and
without it a text is greedy; a file that samples and names no top_k means 50, and 0 means none. Nothing in the file stops a model from
loading: what is damaged, odd or not computed here becomes a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dejavu.config import SamplingConfig
from dejavu.files import read_json

GENERATION_FILE = "generation_config.json"
TOP_K = 50
# Fields that change nothing of a text: how transformers computes it, or how another program's draft does.
WITHOUT_EFFECT = (
    "bos_token_id", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
    "continuous_batching_config", "transformers_version", "_from_model_config", "early_stopping", "length_penalty", "low_memory",
    "decoder_start_token_id", "prefill_chunk_size", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type", "use_mtp",
)  # fmt: skip
NEUTRAL: dict[str, Any] = {"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "top_h": 1.0, "typical_p": 1.0}
NEUTRAL |= {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0}
NEUTRAL |= dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_p"), 0)
NEUTRAL |= dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha"), 0)  # 0 is a token, or a time, elsewhere
READ = ("do_sample", "temperature", "top_k", "top_p", "bos_token_id", "eos_token_id")
CALL_KEYS = ("max_length", "max_new_tokens", "pad_token_id", "output_attentions", "output_hidden_states", "output_scores", "output_logits")
CALL_KEYS += ("return_dict_in_generate",)  # what a caller of ours says, or gets, in another way
OF_SAMPLING = ("min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
SHOWN = 40  # characters of a value in a note


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """sampling: None where the file does not say whether to sample. token_ids: bos_token_id and eos_token_id, as far as there are any."""

    sampling: SamplingConfig | None = None
    token_ids: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_generation_config(folder: Path, *, of: str = "") -> GenerationConfig:
    """What the file of a folder says; nothing where there is none. of: whose it is, for notes, such as " of the adapter"."""
    path = folder / GENERATION_FILE
    if not path.is_file():
        return GenerationConfig(token_ids={})
    try:
        values = read_json(path)
    except (ValueError, RecursionError) as error:
        return GenerationConfig(token_ids={}, notes=(f"{GENERATION_FILE}{of} is not used: {error}",))
    if not isinstance(values, dict):
        return GenerationConfig(token_ids={}, notes=(f"{GENERATION_FILE}{of} is not used: it holds no JSON object",))
    odd: list[str] = []

    def take(key: str, default: Any, *kinds: type, valid: Any = lambda value: True) -> Any:
        value = values.get(key)
        if value is None:
            return default
        if type(value) in kinds and valid(value):
            return value
        odd.append(f"{key} {_shown(value)}")
        return default

    sampled = take("do_sample", None, bool)
    temperature = take("temperature", 1.0, int, float, valid=lambda value: 0 <= value <= 1e9)
    top_k = take("top_k", TOP_K, int, valid=lambda value: 0 <= value < 1 << 31)
    top_p = take("top_p", 1.0, int, float, valid=lambda value: 0 < value <= 1)
    token_ids = {"bos_token_id": take("bos_token_id", None, int), "eos_token_id": take("eos_token_id", None, int, list, valid=_are_ids)}
    sampling = None if sampled is None else SamplingConfig()
    if sampled:
        sampling = SamplingConfig(temperature=float(temperature), top_k=top_k or None, top_p=float(top_p) if top_p < 1 else None)
    unused = [] if sampled else [f"{key} {value}" for key, value in (("temperature", temperature), ("top_p", top_p)) if value != 1]
    beyond = [f"{key} {_shown(value)}" for key, value in values.items() if _is_beyond(key, value, sampled=bool(sampled))]
    notes = (("not used, as it makes no sense: ", odd), ("not used, as do_sample is not true: ", unused), ("not applied: ", beyond))
    return GenerationConfig(
        sampling=sampling,
        token_ids={key: value for key, value in token_ids.items() if value is not None},
        notes=tuple(f"{GENERATION_FILE}{of}: {what}{', '.join(fields)}" for what, fields in notes if fields),
    )


def generation_values(sampling: SamplingConfig | None) -> dict[str, Any]:
    """What a file holds that means this sampling, for this package and for transformers; nothing for None."""
    if sampling is None:
        return {}
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}


def changes_nothing(key: str, value: Any) -> bool:
    """Whether a field of a generation config is at a value that leaves every text as it is."""
    neutral = isinstance(value, int | float) and value == NEUTRAL.get(key)
    return key in WITHOUT_EFFECT or value is None or value is False or neutral


def _is_beyond(key: str, value: Any, *, sampled: bool) -> bool:
    known = key in READ or key in CALL_KEYS or (key in OF_SAMPLING and not sampled)
    return not (known or changes_nothing(key, value) or value in ([], {}, ""))


def _are_ids(value: int | list[Any]) -> bool:
    return all(type(token_id) is int for token_id in (value if isinstance(value, list) else [value]))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
