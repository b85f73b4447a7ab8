"""Windows that the student writes itself while it trains: it is corrected where its own text leads it, not only on others'.

In: a Student, prompts. Out: windows of ids [W, T] with the positions that ran dense, which are the prompts. A round writes an answer to
each of many prompts at once, messages and texts in turns, with the weights of now and as it would decode: the prompt dense, then by its
own selection, at a temperature drawn for each row. Rows end with their end of text and are laid end to end, through all windows or in
each anew. Each window is used once; when too few are left, another round is written. Source: on-policy distillation, arXiv 2306.13649.

Letters: B rows  T tokens of a window  W windows
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dejavu.config import require
from dejavu.offline.adapt.own_text import Prompts, continued, rows_at_once
from dejavu.offline.adapt.student import Student


def ends(rows_BT: np.ndarray, prompt_tokens: int, eos: Sequence[int]) -> np.ndarray:
    """Tokens of each row up to the first end-of-text token of its answer, which counts [B]."""
    found_BT = np.isin(rows_BT[:, prompt_tokens:], np.array(eos))
    answer_B = np.where(found_BT.any(1), found_BT.argmax(1) + 1, found_BT.shape[1])
    return prompt_tokens + answer_B


def cut_at(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows [W, length] that each begin with a row and hold the next ones as far as there is room, whose ends are dropped; and what is
    left, less than a window."""
    windows, now, size = [], [], 0
    for row in rows:
        now.append(row)
        size += len(row)
        if size >= length:
            windows.append(np.concatenate(now)[:length])
            now, size = [], 0
    return np.stack(windows) if windows else rows[0][:0].reshape(0, length), np.concatenate([rows[0][:0], *now])


class OwnWindows:
    """What the student has written and nobody has read yet.

    length: tokens of a window. anew: every window begins with a prompt, so that answers are read as they were written; not: rows go
    through them. rows: answers of a round for each of two kinds of prompts. temperatures: the least and the largest. seconds: spent on
    writing so far. Raises ValueError where prompts leave no room for an answer.
    """

    def __init__(
        self,
        student: Student,
        prompts: Prompts,
        *,
        length: int,
        anew: bool = False,
        rows: int,
        new_tokens: int,
        temperatures: tuple[float, float],
        eos: Sequence[int],
        seed: int,
        rank: int = 0,
    ) -> None:
        room = student.config.max_positions - prompts.longest
        require(room > 0, f"a prompt of {prompts.longest} tokens fills the model's context; leave --own-share out")
        self.student, self.prompts, self.length, self.anew, self.rows, self.eos = student, prompts, length, anew, rows, tuple(eos)
        self.new_tokens, self.temperatures = min(new_tokens, room), temperatures
        self.seed, self.rank, self.round, self.seconds, self.written = seed, rank, 0, 0.0, 0
        self.ids_WT = torch.empty(0, length, dtype=torch.int32)
        self.dense_WT = torch.empty(0, length, dtype=torch.bool)
        self.rest_T, self.rest_dense_T = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.bool)  # less than a window

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """The next windows [count, T] int64, and where they ran dense [count, T] bool."""
        while len(self.ids_WT) < count:
            self._write()
        taken = self.ids_WT[:count].long(), self.dense_WT[:count]
        self.ids_WT, self.dense_WT = self.ids_WT[count:], self.dense_WT[count:]
        return taken

    def _write(self) -> None:
        """One round."""
        started = time.perf_counter()
        model, (least, largest) = self.student.merged(), self.temperatures
        scorers = self.student.trained or None
        drawn = np.random.default_rng((self.seed, 4, self.rank, self.round))
        generator = torch.Generator(self.student.device).manual_seed(int(drawn.integers(2**62)))
        ids, dense = [self.rest_T.numpy()], [self.rest_dense_T.numpy()]  # of rows
        for number in (2 * self.round, 2 * self.round + 1):
            prompt_BP = self.prompts.batch(number + (self.rank << 32), self.rows)
            heat_B = torch.from_numpy(drawn.uniform(least, largest, self.rows)).float()
            prompt = prompt_BP.shape[1]
            # On a GPU as many at a time as its memory has room for.
            at_once = self.rows if model.device.type == "cpu" else rows_at_once(model, prompt + self.new_tokens, prompt)
            rows = [
                continued(model, prompts, new_tokens=self.new_tokens, generator=generator, temperature_B=heats, scorers=scorers).cpu()
                for prompts, heats in zip(prompt_BP.split(at_once), heat_B.split(at_once), strict=True)
            ]
            rows_BT = torch.cat(rows).numpy().astype(np.int32)
            place_T = np.arange(rows_BT.shape[1])
            end_B = ends(rows_BT, prompt, self.eos)
            ids += [row[:end] for row, end in zip(rows_BT, end_B, strict=True)]
            dense += [place_T[:end] < prompt for end in end_B]
            self.written += int((end_B - prompt).sum())
        self.round += 1
        (ids_WT, rest), (flags_WT, rest_flags) = (self._cut(part) for part in (ids, dense))
        order = drawn.permutation(len(ids_WT))  # both kinds then come in every step
        fresh = torch.from_numpy(ids_WT[order]), torch.from_numpy(flags_WT[order])
        self.rest_T, self.rest_dense_T = torch.from_numpy(rest.copy()), torch.from_numpy(rest_flags.copy())
        self.ids_WT, self.dense_WT = (torch.cat(parts) for parts in zip((self.ids_WT, self.dense_WT), fresh, strict=True))
        self.seconds += time.perf_counter() - started

    def _cut(self, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Windows [W, T] of rows, and what is left over."""
        if self.anew:
            return cut_at(rows, self.length)
        stream = np.concatenate(rows)
        count = len(stream) // self.length
        return stream[: count * self.length].reshape(count, self.length), stream[count * self.length :]

    def state(self) -> dict[str, Tensor]:
        """What a run that goes on needs: windows not read yet, what is left over for the next, and the number of the next round."""
        rest = {"own.rest": self.rest_T, "own.rest_dense": self.rest_dense_T}
        return {"own.ids": self.ids_WT, "own.dense": self.dense_WT, "own.round": torch.tensor([self.round]), **rest}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave. Raises KeyError or ValueError for what it cannot have given."""
        names = ("ids", "dense", "round", "rest", "rest_dense")
        ids_WT, dense_WT, round_1, rest_T, rest_dense_T = (tensors[f"own.{name}"] for name in names)
        shapes = ids_WT.dim() == 2 and ids_WT.shape[1] == self.length and ids_WT.shape == dense_WT.shape and round_1.shape == (1,)
        shapes = shapes and rest_T.dim() == 1 and rest_T.shape == rest_dense_T.shape and len(rest_T) < self.length
        types = [tensors[f"own.{name}"].dtype for name in names] == [torch.int32, torch.bool, torch.int64, torch.int32, torch.bool]
        require(shapes and types, f"own.ids is {ids_WT.dtype} {list(ids_WT.shape)}, and windows have {self.length} tokens")
        vocabulary = self.student.config.vocab_size
        ids_N = torch.cat((ids_WT.flatten(), rest_T))
        known = bool(((ids_N >= 0) & (ids_N < vocabulary)).all()) and int(round_1) >= 0
        require(known, f"own.ids has ids beyond the {vocabulary} of the model")
        self.ids_WT, self.dense_WT, self.round = ids_WT, dense_WT, int(round_1)
        self.rest_T, self.rest_dense_T = rest_T, rest_dense_T
