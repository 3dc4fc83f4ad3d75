"""What the plan says of this run on these ranks, and how what is measured compares: a line where it leaves the plan, and no more.

The plan is asked about the micro-batches that there really were. On a GPU memory is what torch's allocator has handed out, and throughput
is held to the plan's. On a CPU memory is all that is this process's own, neither files nor libraries, and the allocator keeps much of what
is freed, so the margin is wider; throughput is held to the run's own best: how fast a CPU is, nobody knows beforehand.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace

import torch

from pipeline.cluster.launch import returns_at_once
from pipeline.evaluate.score import Scores
from pipeline.job.errors import JobError
from pipeline.plan.hardware import ATTAINED, named
from pipeline.plan.judge import MARGIN, Footprint, OwnBest, Pace, Promise, judge_memory, judge_promise, middle
from pipeline.plan.layers import MicroBatch
from pipeline.plan.memory import Memory, beside, memory
from pipeline.plan.work import work
from pipeline.planning.tables import plan_markdown
from pipeline.runs.session import Session
from pipeline.tasks.batch import alike
from pipeline.tasks.order import deal
from pipeline.train.loop import Course, Taken
from pipeline.train.process import held, runnable

_FIRST = 10
"""Steps of a sitting before memory is looked at: ZeRO-3 knows its order by then, and long examples have come."""
_WARM, _PROMISED = 5, 15
"""Throughput is held to the plan's by the steps between."""
_SLICE = 0.15
"""Of a GPU's memory: what drivers keep to themselves is less."""
_SPARE = {"cpu": 256 << 20, "cuda": 128 << 20}
_MARGIN = {"cpu": 0.3, "cuda": MARGIN}
"""Of memory. Trainings of GPT-2 small on CPU ranks were at 1.00 to 1.16 of the plan's."""


class Outlook:
    """Of one sitting, on the first rank."""

    def __init__(self, session: Session, course: Course) -> None:
        self._session, self._course = session, course
        self._cpu = session.ranks.device.type == "cpu"
        try:
            self._asked = replace(session.setting, example_tokens=course.data.longest)
            self._found: Memory | None = memory(self._asked)
            told = "" if self._cpu or self._known else "The plan does not know this GPU: it takes it for one of these.\n\n"
            self.text = told + plan_markdown(self._asked, self._found, work(self._asked, self._found))
        except JobError as error:
            self._found, self.text = None, f"The plan does not know this job: {error}"
        self._before, self._early = self._peak(), 0
        self._said, self._views = 0, 1.0
        self._told = {False: 0, True: 0}
        self._steps: list[Pace] = []
        self._own = OwnBest()
        self._processor_s = time.process_time()

    def took(self, taken: Taken) -> list[str]:
        """What a step has to tell, mostly nothing."""
        pace, taken_steps = self._pace(taken), len(self._steps) + 1
        if taken_steps <= _PROMISED:
            self._steps.append(pace)
        found = [
            self._memory(taken.progress.step),
            self._promised() if taken_steps == _PROMISED else None,
            self._own.took(pace, taken.values["step_s"]),
        ]
        return [line for line in found if line]

    def scored(self, scores: Scores) -> list[str]:
        """What a scoring has to tell."""
        found = self._found
        if found is None:
            return []
        asked, e = self._asked, self._asked.element_bytes
        resident = sum(found.parts[name] for name in ("base_shard", "delta", "gradients", "optimizer"))
        # Labels are not generated, but the base is gathered for them as well.
        whole = 0 if scores.gathering.each_pass or not asked.copies else asked.shape.parameters * e
        full = max(found.allocated["forward"], found.allocated["generate"], resident + whole + found.parts["logits_and_loss"])
        line = self._over(self._risen(), self._in_all(full), scoring=True)
        return [line] if line else []

    def _in_all(self, used: int) -> int:
        """What the plan says, for so many bytes of tensors."""
        if not self._cpu:
            return used
        gpu = self._asked.gpu
        # The interpreter with its libraries, and copies of the state while it is written behind training.
        return int((1 + gpu.fragmentation) * used) + max(gpu.context_bytes, self._session.held_before) + 2 * beside(self._asked).state_file

    @property
    def _known(self) -> bool:
        """The plan has this GPU, and this is no slice of it."""
        if self._cpu:
            return False
        total = self._asked.gpu.memory_bytes
        row = named(torch.cuda.get_device_name(self._session.ranks.device), total)
        return row is not None and abs(row.memory_bytes - total) < _SLICE * row.memory_bytes

    def _peak(self) -> int:
        if self._cpu:
            return held().peak
        return torch.cuda.max_memory_allocated(self._session.ranks.device)

    def _risen(self) -> int:
        """The most so far, where it came since this was last asked; else 0."""
        peak = self._peak()
        if peak <= self._before:
            return 0
        self._before = peak
        return held().anonymous_peak if self._cpu else peak

    def _memory(self, step: int) -> str | None:
        risen, number = self._risen(), step - self._course.start.step
        if self._found is None:
            return None
        if number < _FIRST:
            self._early = max(self._early, risen)
            return None
        if number == _FIRST:
            risen = max(self._early, risen)
            steps = range(step - _FIRST + 1, step + 1)
        else:
            steps = range(step, step + 1)
        if risen > self._told[False]:
            for each in steps:
                self._expect(each)
        return self._over(risen, self._said, scoring=False)

    def _expect(self, step: int) -> None:
        """Takes in what the plan says of a step's micro-batches on this rank."""
        course, job = self._course, self._session.train
        examples = course.examples(step - 1)
        lengths = [course.data.tokens(index) for index in examples]
        for chosen in deal(lengths, self._session.ranks.count, job.micro_batch_tokens, job.packing)[0]:
            if not chosen:
                continue
            targets = sum(course.data.targets(examples[i]) for i in chosen)
            batch = _batch([lengths[i] for i in chosen], len(chosen) if self._asked.head_outputs else targets, job.packing)
            used = memory(self._asked, batch).allocated
            said = self._in_all(max(used[phase] for phase in ("forward", "backward", "step", "save")))
            if said > self._said:
                self._said, self._views = said, batch.padded_tokens / batch.tokens

    def _over(self, measured: int, said: int, scoring: bool) -> str | None:
        asked, found, device = self._asked, self._found, self._session.ranks.device
        if measured <= self._told[scoring] or found is None:
            return None
        gathered = max(found.gathered.forward, found.gathered.backward, found.gathered.finish)
        spare, margin = _SPARE[device.type], _MARGIN[device.type]
        line = judge_memory(
            Footprint(
                said=said,
                measured=measured,
                spare=spare,
                margin=margin,
                scoring=scoring,
                returns=not self._cpu or returns_at_once(),
                guess=asked.shape.notes[0] if asked.shape.notes else "",
                ungathered=(asked.shape.parameters - gathered) * asked.element_bytes if asked.copies else 0,
                views=self._views,
                reserved=0 if self._cpu else torch.cuda.max_memory_reserved(device),
                capacity=asked.gpu.memory_bytes,
            )
        )
        # What was told is told again only when it has grown as much once more.
        reached = measured if line else said
        self._told[scoring] = reached + max(int(margin * reached), spare)
        return line

    def _pace(self, taken: Taken) -> Pace:
        values, ranks = taken.values, self._session.ranks.count
        used, self._processor_s = time.process_time() - self._processor_s, time.process_time()
        rounds = max(1, -(-int(values["tokens"]) // (ranks * self._session.train.micro_batch_tokens)))
        return Pace(
            step=taken.progress.step,
            tokens_per_s=values["tokens"] / values["step_s"],
            data_share=values["data_s"] / values["step_s"],
            padding_share=values["padding_share"],
            tokens=values["tokens"] / (ranks * rounds),
            processor_s=1000 * used / values["tokens"],
            runnable=runnable(),
            cores=os.cpu_count() or 1,
        )

    def _promised(self) -> str | None:
        """Throughput beside the plan's, on a GPU that it knows."""
        if self._found is None or not self._known:
            return None
        pace, batch = middle(self._steps[_WARM:]), self._asked.batch_examples
        rounds = max(1, -(-int(pace.tokens) // self._asked.micro_batch_tokens))
        tokens = pace.tokens * rounds * self._asked.ranks
        done = work(replace(self._asked, example_tokens=max(1, round(tokens / batch))), self._found)
        return judge_promise(
            Promise(
                tokens_per_s=tokens / done.step_s,
                tokens_to_hide=done.tokens_to_hide if self._asked.sharers > 1 else 0,
                micro_batch_s=done.compute_s / self._asked.micro_batches,
                layers=self._asked.shape.layers,
                attained=ATTAINED,
            ),
            pace,
        )


def _batch(lengths: list[int], labels: int, packed: bool) -> MicroBatch:
    """A micro-batch as the plan counts it, by the lengths of its examples."""
    views = [(len(group), lengths[group[0]]) for group in alike(lengths)] if packed else [(len(lengths), max(lengths))]
    padded, pairs = sum(count * longest for count, longest in views), sum(count * longest**2 for count, longest in views)
    return MicroBatch(sum(lengths) if packed else padded, padded, labels, len(lengths), max(lengths), pairs)
