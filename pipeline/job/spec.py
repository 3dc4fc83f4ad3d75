"""A job: what is asked, as frozen values. Every key of the TOML file is a field here, with its default and unit.

In: the names of metrics, the standard library and pydantic. Out: `Job` and its sections; each room is handed only its own section.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.job.cluster import Cluster
from pipeline.job.labels import labels_of
from pipeline.job.method import Method, refuse_together
from pipeline.job.metrics import Script, unknown_metric, unknown_script
from pipeline.job.section import Section, Seed, Split, Text
from pipeline.job.sweep import Sweep
from pipeline.job.task import Mix, Task

Dtype = Literal["fp32", "bf16", "fp16"]
StopSignal = Literal["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU"]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Base(Section):
    model: Text
    """Hugging Face hub id, or a folder with config.json and safetensors files."""
    revision: str | None = None
    """Branch, tag or commit on the hub, its default branch when absent. A folder has none: there this is not looked at."""
    added_tokens: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Tokens that the tokenizer is to have beside its own; their embeddings are trained with the delta."""
    dtype: Dtype = "bf16"
    """Of the base and of compute. The delta's master weights are always fp32."""


class Train(Section):
    batch_examples: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Examples of one optimizer step over all ranks."""
    micro_batch_tokens: PositiveInt = 4096
    """Tokens of one forward pass on one rank: the memory knob. Never changes the result."""
    packing: bool = True
    """Lay the examples of a micro-batch end to end instead of padding them. Never changes the result. DeBERTa is always padded."""
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """Longest example. Absent: the base's context."""
    epochs: PositiveFloat | None = None
    """Passes over the training examples; 1 when neither this nor `steps` is given."""
    steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs."""
    learning_rate: PositiveFloat = 2e-4
    """The largest, after warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After warm-up; linear and cosine end at 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of rising learning rate."""
    warmup_ratio: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """The same as a share of all steps, rounded up."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW, on every trained tensor."""
    adam_betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    """Decay of the two moments."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    clip_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest gradient norm; 0: no clipping."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the target spread over the vocabulary."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """The base's own dropout. Off by default, as in the paper's code."""
    classifier_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """On the input of a task's head. Keyed by example, as a method's is."""
    seed: Seed = 1
    """Of the order of examples, the start of A and of a head, and dropout."""
    save_every_steps: PositiveInt = 500
    """The state, from which a run goes on, and the delta are written this often and at the end."""
    keep_states: PositiveInt = 2
    """The newest so many states stay. With one only, there is none to fall back to if it is damaged."""
    stop_signals: Annotated[tuple[StopSignal, ...], Field(strict=False)] = ("SIGTERM", "SIGUSR1")
    """Any of these to any rank: all ranks finish the step, save, and end with exit code 75. SIGINT (Ctrl-C) always does that."""
    stop_after_bad_steps: PositiveInt = 3
    """Steps in a row whose loss or gradient is not finite end the run with exit code 4. None of them changes the delta."""
    timeout_s: PositiveFloat = 1800.0
    """A rank that gets no further for so long (a hung collective, a dead file system) ends the run with exit code 76."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps are both given. Keep one of them.")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("warmup_steps and warmup_ratio are both given. Keep one of them.")
        return self


class Decoding(Section):
    """How texts are generated."""

    max_new_tokens: PositiveInt = 64
    """Longest generated text."""
    beams: PositiveInt = 1
    """Beam search over so many; 1: greedy."""
    length_penalty: float = 1.0
    """A beam's score is its log-probability / new tokens ** this. The paper: 0.9 for E2E, 0.8 for WebNLG and DART."""
    early_stopping: bool = False
    """End a text's search as soon as `beams` texts are finished, not when none running can be better."""
    no_repeat_ngram: Annotated[int, Field(ge=0)] = 0
    """No run of so many tokens comes twice; 0: no rule. The paper: 4."""
    ngram_scope: Literal["all", "generated"] = "all"
    """Where runs are looked for: in prompt and text, as transformers does, or in the generated text only, as the paper's decoder does."""
    eos_tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = ()
    """Token ids that end a text, beside the tokenizer's end token. The paper's decoder has 628, an empty line."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """Draw tokens from the softmax of logits / temperature; 0: take the likeliest."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from the likeliest so many; 0: from all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draw from the likeliest that have this share together."""
    seed: Seed = 1
    """Of the draws. A text's draws depend on it and the prompt's place only."""
    batch_tokens: PositiveInt = 16384
    """Tokens of one batch on one rank, prompts and room for new ones, times beams: the memory knob."""
    gather: Literal["auto", "once", "each_pass"] = "auto"
    """Under ZeRO-3: the whole base on every rank while scoring, or each layer as each pass needs it. auto: once where it fits."""

    @model_validator(mode="after")
    def _one_way(self) -> Decoding:
        if self.beams > 1 and self.temperature:
            raise ValueError("beams and temperature are both given. Keep one of them.")
        return self


class Evaluate(Decoding):
    """Scores during and after training; the keys of generation included."""

    split: Split = "valid"
    """Scored during training. `zlora evaluate` scores the test split unless told otherwise."""
    at_start: bool = False
    """Also score the base before the first step."""
    every_steps: PositiveInt | None = None
    """Also score this often; the end of training always is."""
    max_prompts: PositiveInt | None = None
    """Score the first so many prompts only."""
    script: Script | None = None
    """Whose way to count the task's metrics. E2E: mteval (default), pymteval; WebNLG, DART: generation_eval (default), challenge."""
    best_metric: str | None = None
    """Keep the delta that has scored best by this metric so far in `best/`: one of the task's metrics, or loss or perplexity."""
    patience: PositiveInt | None = None
    """So many scorings in a row that are no better by `best_metric` end training. Absent: it goes on to its end."""


class Memory(Section):
    config: str = "zero3.json"
    """A file of ds_configs/, a path, or "auto": the fastest that fits is chosen and written to the run as `deepspeed.json`."""
    nvme_path: str | None = None
    """A folder on each node's own disk, for shards of the base where `config` asks for that, or is "auto" and nothing else fits.
    `$NAME` in it comes from the environment of each rank."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    int8_gathers: bool = False
    """Matrices of the frozen base go to other ranks in 8 bits with a scale for each 128 elements: half the bytes of bf16 and fp16, and
    weights that are rounded by up to 0.4 % (in bf16 0.6 %) of the largest of each 128. Shards, scores and what is saved are of the base
    as it is."""


class Published(Section):
    """What others report of this job. `zlora compare` shows it beside your runs; nothing else looks at it."""

    source: Text
    """Where, and which row: "LoRA paper, table 3: GPT-2 medium, LoRA 0.35M"."""
    parameters: PositiveInt | None = None
    """Trained, as printed there."""
    scores: dict[str, float]
    """A column of `zlora compare`, such as "test BLEU", and the value on that metric's own scale."""
    spread: dict[str, float] = Field(default={})
    """What stands behind their ±."""

    @model_validator(mode="after")
    def _of_scores(self) -> Published:
        if alone := [name for name in self.spread if name not in self.scores]:
            raise ValueError(f'spread has "{alone[0]}", and scores has not. Name it there, or leave it out.')
        return self


class Job(Section):
    base: Base
    methods: Annotated[tuple[Method, ...], Field(min_length=1, strict=False)]
    task: Task
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    memory: Memory = Memory()
    cluster: Cluster = Cluster()
    sweep: Sweep | None = None
    published: Published | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Job:
        refuse_together(self.methods)
        return self

    @model_validator(mode="after")
    def _one_prompt(self) -> Job:
        sources = self.task.sources if isinstance(self.task, Mix) else (self.task,)
        for place, method in enumerate(self.methods):
            infix = getattr(method, "infix_tokens", 0)
            if infix and (kind := next((source.kind for source in sources if source.kind in ("chat", "text")), None)):
                raise ValueError(f'methods[{place}].infix_tokens = {infix}: task.kind = "{kind}" has no one prompt to end. Set it to 0.')
        return self

    @model_validator(mode="after")
    def _of_one_kind(self) -> Job:
        if isinstance(self.task, Mix):
            if len({labels_of(source) for source in self.task.sources}) > 1:
                raise ValueError("task.sources: their labels differ, or only some have any. One head serves all: keep those of one kind.")
        elif self.task.weight != 1.0 or self.task.title is not None:
            key = "title" if self.task.title else "weight"
            raise ValueError(f'task.{key}: only sources of a mix have one. Leave it out, or use task.kind = "mix".')
        return self

    @model_validator(mode="after")
    def _scorable(self) -> Job:
        evaluate = self.evaluate
        if problem := unknown_script(self.task.kind, evaluate.script):
            raise ValueError(f"evaluate.script = {problem}")
        if evaluate.best_metric is not None and (problem := unknown_metric(self.task, evaluate.best_metric)):
            raise ValueError(f"evaluate.best_metric = {problem}")
        for key in ("best_metric", "every_steps"):
            if evaluate.patience is not None and getattr(evaluate, key) is None:
                raise ValueError(f"evaluate.patience = {evaluate.patience}: needs evaluate.{key}. Set it, or leave patience out.")
        return self
