r"""How texts are split before byte-level BPE, by the names that GGUF files give it (`tokenizer.ggml.pre`).

In: a name. Out: a pre-tokenizer, and what else follows from the name. Each pattern cuts the pieces that those before it left; what it
matches are pieces, and so is what lies between. The names and what they stand for are facts of llama.cpp (`src/llama-vocab.cpp`), which
spells some patterns otherwise: here are those of the models' own tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from dejavu.config import require

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*",
)  # a word that begins with capitals, or has but them
DIGIT = r"\p{N}"


def _words(digits: str, *, endings: str = ENDINGS + "|", word: str = r"\p{L}+", other: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*") -> str:
    """The pattern of GPT-4 and its many relatives: endings of English, words with one sign before them, numbers, signs, spaces."""
    return rf"{endings}[^\r\n\p{{L}}\p{{N}}]?{word}|{digits}|{other}|{SPACES}"


def _cased(digits: str, *, endings: str = "") -> str:
    """The same with words cut before capitals."""
    return rf"{CASED[0]}{endings}|{CASED[1]}{endings}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"


LLAMA3, QWEN2 = _words(r"\p{N}{1,3}"), _words(DIGIT)
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    CJK,
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES,
)
DEEPSEEK_LETTERS = (  # those of Latin, Greek, Cyrillic and other scripts with two cases
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d"
    "\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK = (
    r"[\r\n]",
    rf"\s?[{DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    DEEPSEEK_CJK,
    r"\p{N}+",
)
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitting:
    """whole: a piece that is a token is taken as it is, whatever the merges say. bos: a text begins with BOS if the file does not say."""

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


DEFAULT = Splitting(patterns=(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
"""What llama.cpp takes for a file that names none, from before there were names."""

_NAMES: dict[str, Splitting] = {
    "default": DEFAULT,
    "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling": Splitting(patterns=(GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Splitting(patterns=(DIGIT, GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Splitting(patterns=(LLAMA3,), whole=True, bos=True),
    "dbrx smaug-bpe chatglm-bpe": Splitting(patterns=(LLAMA3,)),
    "glm4 glm5": Splitting(patterns=(LLAMA3,), whole=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": Splitting(patterns=(QWEN2,)),
    "qwen35": Splitting(patterns=(_words(DIGIT, word=r"[\p{L}\p{M}]+", other=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),)),
    "ufakzeka": Splitting(patterns=(_words(DIGIT, endings=""),)),
    "minicpm5": Splitting(patterns=(r"\p{N}{1,3}", _words(r"\p{N}+")), whole=True),
    "laguna": Splitting(patterns=(r"[^\n]+|[\n]+", QWEN2)),
    "seed-coder": Splitting(patterns=(_words(DIGIT, other=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    "tekken": Splitting(patterns=(_cased(DIGIT),), whole=True, bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Splitting(patterns=(_cased(r"\p{N}{1,3}", endings=ENDINGS + "?"),)),
    "tiny_aya cohere2moe": Splitting(patterns=(r"\d{1,3}(?=(?:\d{3})*\b)", _cased(r"\p{N}{1,3}", endings=ENDINGS + "?"))),
    "falcon": Splitting(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "deepseek-llm": Splitting(patterns=DEEPSEEK),
    "deepseek-coder": Splitting(patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, DIGIT)),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Splitting(patterns=DEEPSEEK3),
    "poro-chat bloom gpt3-finnish": Splitting(patterns=(BLOOM,)),
    "viking": Splitting(patterns=(BLOOM, DIGIT)),
    "bailingmoe bailingmoe2 llada-moe": Splitting(
        patterns=(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
}  # fmt: skip
SPLITTINGS: dict[str, Splitting] = {name: splitting for names, splitting in _NAMES.items() for name in names.split()}


def splitting_of(name: str | None) -> Splitting:
    """The splitting of a name; of None the default. ValueError for a name that is not known here."""
    require(
        name is None or name in SPLITTINGS,
        f"GGUF pre-tokenizer {name!r} is not supported; supported: {', '.join(sorted(SPLITTINGS))}",
    )
    return DEFAULT if name is None else SPLITTINGS[name]
