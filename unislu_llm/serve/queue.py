"""Clips that wait to be decoded, and the one thread that decodes them, several together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from starlette.exceptions import HTTPException
from torch import Tensor

from unislu_llm.data.audio import SAMPLE_RATE
from unislu_llm.decoding.answer import Answer
from unislu_llm.errors import UserError

BUSY = 429, "too many requests wait; try again later"
STOPPING = 503, "the server is stopping; try another one"
_MOST = 4 * 3600 * SAMPLE_RATE  # samples that wait: 0.9 GB


class Job(Future[Answer]):
    """A clip `(samples,)` at 16 kHz, and the arguments of `understand` besides."""

    def __init__(self, clip: Tensor, how: Mapping[str, Any]) -> None:
        super().__init__()
        self.clip, self.how = clip, how


class Queue:
    """Jobs in the order in which they came. One thread, which owns the model, takes the oldest and
    those of equal options that are nearest to it in length, and has `decode(clips, how)` answer up
    to `batch_size` of them. What is cancelled is dropped."""

    def __init__(self, decode: Callable[..., Sequence[Answer]], batch_size: int) -> None:
        self._decode, self._batch_size = decode, batch_size
        self._waiting: list[Job] = []
        self._change, self.stopping = threading.Condition(), False
        threading.Thread(target=self._run, daemon=True).start()

    def __len__(self) -> int:
        return sum(not job.cancelled() for job in self._waiting)

    def submit(self, clips: Sequence[Tensor], how: Mapping[str, Any]) -> list[Job]:
        """Put clips in line, all or none; raises HTTPException: 429, or 503 as it stops."""
        jobs = [Job(clip, how) for clip in clips]
        with self._change:
            if self.stopping:
                raise HTTPException(*STOPPING)
            if self._waiting and sum(len(j.clip) for j in (*self._waiting, *jobs)) > _MOST:
                raise HTTPException(*BUSY)
            self._waiting += jobs
            self._change.notify()
        return jobs

    def stop(self) -> None:
        """Refuse what waits and what comes; what is being decoded is answered."""
        with self._change:
            self.stopping, waiting, self._waiting = True, self._waiting, []
            self._change.notify()
        for job in waiting:
            if job.set_running_or_notify_cancel():
                job.set_exception(HTTPException(*STOPPING))

    def _run(self) -> None:
        while not self.stopping:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self.stopping)
                waiting = [job for job in self._waiting if not job.cancelled()]
                # A batch takes as long as its longest clip: those of like length together.
                batch = sorted((job for job in waiting if job.how == waiting[0].how),
                               key=lambda job: abs(len(job.clip) - len(waiting[0].clip)))
                batch = batch[:self._batch_size]
                self._waiting = [job for job in waiting if job not in batch]
            self._answer([job for job in batch if job.set_running_or_notify_cancel()])

    def _answer(self, jobs: Sequence[Job]) -> None:
        try:
            answers = self._decode([job.clip for job in jobs], jobs[0].how) if jobs else ()
        except Exception as error:
            if len(jobs) == 1:
                if not isinstance(error, UserError):
                    logging.getLogger(__name__).exception("a clip could not be decoded")
                jobs[0].set_exception(error)
                return
        else:
            for job, answer in zip(jobs, answers, strict=True):
                job.set_result(answer)
            return
        # One may be at fault, or all too many: tried again out here, where the error is gone, and
        # with it what the batch has in memory.
        for job in jobs:
            self._answer([job])
