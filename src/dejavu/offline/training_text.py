"""What all methods of a training share: windows of a text, those that train, calibrate and check, and the dense model's runs of them.

In: a checkpoint and token ids of documents. Out: a TrainingText. Dense runs are made when they are first asked for, and once.

Letters: W windows  T tokens of a window
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dejavu.model.checkpoint import Checkpoint
from dejavu.model.transformer import Transformer
from dejavu.offline.budget import DenseRuns
from dejavu.offline.collect import pack_windows
from dejavu.offline.split import Split, fitting_windows, split_windows, training_context


@dataclass(slots=True, kw_only=True)
class TrainingText:
    """ids_WT: the windows that are used, where the model is. given: tokens of the text. measured: the split with the beginnings that
    calibrate and check."""

    model: Transformer
    given: int
    ids_WT: Tensor
    split: Split
    measured: Split
    _dense: DenseRuns | None = field(default=None, init=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, document_ids: Sequence[Sequence[int]]) -> TrainingText:
        """Raises ValueError for a text that is too short."""
        model = checkpoint.model
        packed_WT = pack_windows(document_ids, context=training_context(model.config), bos=checkpoint.tokenizer.document_bos)
        ids_WT = fitting_windows(packed_WT, model.config).to(model.device)
        split = split_windows(ids_WT)
        return cls(model=model, given=packed_WT.numel(), ids_WT=ids_WT, split=split, measured=split.measured(model.num_parameters))

    @property
    def dense(self) -> DenseRuns:
        """Of the measured windows."""
        if self._dense is None:
            self._dense = DenseRuns.of(self.model, self.measured)
        return self._dense
