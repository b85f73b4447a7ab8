"""`--accept-base`: an adapter takes one more form of its base, after a measurement that says it is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dejavu.cli.output import Output

if TYPE_CHECKING:
    from dejavu.language_model import LanguageModel
    from dejavu.model.adapter import Adapter

TOLERANCE = 0.02


def check_own(folder: Path) -> None:
    """Raises ValueError for an adapter that is not a folder of the user's own, to be written to."""
    from dejavu.config import require
    from dejavu.model.hub_name import hub_name

    hub = None if folder.is_dir() else hub_name(str(folder))
    copy = f"get a copy of your own with `hf download {folder} --local-dir DIR`, and give DIR"
    require(hub is None, f"--accept-base writes to the adapter's folder, and {str(folder)!r} is one of the hub; {copy}")


def accept(lm: LanguageModel, folder: Path, texts: list[str], out: Output) -> Adapter:
    """The adapter, which accepts this model from now on, on disk too.

    texts: paths of the text that it was calibrated on. Raises ValueError for another text, and where the model's dense
    perplexity on it differs by over 2 % from the one on record.
    """
    from dejavu.config import require
    from dejavu.files import absolute, write_json, write_text
    from dejavu.model.adapter import CARD_FILE, CONFIG_FILE, Adapter
    from dejavu.model.card import card
    from dejavu.model.texts import corpus_hash, named_texts

    folder = absolute(folder)
    adapter = Adapter.load(folder, model=lm.config, base_hash=lm.base_hash, accept=True)
    if lm.base_hash in adapter.config.base_hashes:
        return adapter
    require(len(texts) > 0, f"--accept-base needs the calibration text of {folder}, {adapter.config.calibration_text}; give it with --text")
    contents = list(named_texts(texts).values())
    found, recorded = corpus_hash(contents), adapter.config.calibration_text_hash
    wanted = adapter.config.calibration_text
    require(found == recorded, f"--text has SHA-256 {found}, but the calibration text of {folder} is {wanted}; give that text")
    ppl = lm.calibration_perplexity(contents, adapter)
    expected = adapter.config.quality["ppl_dense"]
    require(
        abs(ppl / expected - 1) <= TOLERANCE,
        f"{lm.name} has a dense perplexity of {ppl:.4g} on the calibration text, but {folder} was made for one of {expected:.4g}; "
        "they may differ by at most 2 %: train an adapter for this model",
    )
    accepted = adapter.with_base(lm.base_hash)
    write_text(folder / CARD_FILE, card(accepted.config))
    write_json(folder / CONFIG_FILE, accepted.config.to_dict())
    out.say(f"{folder} now accepts {lm.name}: dense perplexity {ppl:.4f}, on record {expected:.4f}")
    return accepted
