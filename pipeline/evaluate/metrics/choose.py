"""Task -> its metrics, by the names and on the scale of the official script.

In: predictions and the references of each. Out: metrics by name, and notes on what was left out and why.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from pipeline.job.errors import JobError
from pipeline.job.labels import glue_labels
from pipeline.job.metrics import METRICS, unknown_script


def refuse_unknown(kind: str, script: str | None, tables: Path | None = None) -> None:
    """Raises:
    JobError: there is no such task, or it has no such script or no tables. Before any file is read."""
    if kind not in METRICS:
        raise JobError(f'--task "{kind}": there is no such task. Use one of {", ".join(METRICS)}.')
    if problem := unknown_script(kind, script):
        raise JobError(f"--script {problem}")
    if tables is not None and kind != "wikisql":
        raise JobError(f"--tables {tables}: only wikisql has tables. Leave it out.")


def metrics_of(
    kind: str, predictions: list[str], references: list[list[str]], script: str | None = None, tables: Path | None = None
) -> tuple[dict[str, float], list[str]]:
    """Scores predictions; the second answer are notes for the person.

    Args:
        kind: one of METRICS, which has the names of the answer too.
        references: at least one, not empty, for each prediction. GLUE has exactly one.
        script: whose way to count. E2E: `mteval` (default) or `pymteval`, the official script's Perl and its Python mode. WebNLG and
            DART: `generation_eval` (default), as the LoRA paper did, or `challenge`, as the challenge of 2017 did. Others have one.
        tables: WikiSQL's tables, for its execution accuracy: a .tables.jsonl or .db file, or a folder of them.

    Raises:
        JobError: a script that the task does not have, or a value that is not the task's.
    """
    match kind, script:
        case "e2e", None | "mteval":
            return _e2e(predictions, references, "mteval")
        case "e2e", "pymteval":
            return _e2e(predictions, references, "pymteval")
        case "webnlg" | "dart", None | "generation_eval":
            return _generation_eval(predictions, references)
        case "webnlg" | "dart", "challenge":
            return _challenge(predictions, references, lowercase=kind == "webnlg")
        case "samsum", None:
            from pipeline.evaluate.metrics.rouge import rouge

            return rouge(predictions, references), []
        case "wikisql", None:
            return _wikisql(predictions, references, tables)
        case "texts", None:
            from pipeline.evaluate.metrics.own import bleu, exact_match

            return {"BLEU": bleu(predictions, references), "exact_match": exact_match(predictions, references)}, []
        case "stsb", None:
            return _correlations(predictions, _only(references)), []
        case "regression", None:
            from pipeline.evaluate.metrics.glue import rmse

            error = rmse(_numbers(predictions, "predictions"), _numbers(_only(references), "references"))
            return {**_correlations(predictions, _only(references)), "rmse": error}, []
        case "classification", None:
            from pipeline.evaluate.metrics.glue import accuracy, macro_f1, matthews

            both = (predictions, _only(references))
            return {"accuracy": accuracy(*both), "f1": macro_f1(*both), "matthews": matthews(*both)}, []
        case (("cola" | "sst2" | "mrpc" | "qqp" | "mnli" | "qnli" | "rte"), None):
            return _labels(kind, predictions, _only(references)), []
    refuse_unknown(kind, script)
    raise AssertionError(f"no way to score {kind} by {script}")


def _e2e(predictions: list[str], references: list[list[str]], script: Literal["mteval", "pymteval"]) -> tuple[dict[str, float], list[str]]:
    """tuetschek/e2e-metrics: mteval's tokens for BLEU and NIST, COCO's for the others."""
    from pipeline.evaluate.metrics.cider import cider
    from pipeline.evaluate.metrics.meteor import meteor
    from pipeline.evaluate.metrics.mteval import bleu, nist
    from pipeline.evaluate.metrics.ptb import words
    from pipeline.evaluate.metrics.rouge import rouge_l_coco

    found, wanted = [words(text) for text in predictions], [[words(text) for text in group] for group in references]
    values: dict[str, float | str] = {
        "BLEU": bleu(predictions, references, "13a", lowercase=True, smooth=True) / 100,
        "NIST": nist(predictions, references, script),
        "METEOR": meteor([" ".join(text) for text in found], [[" ".join(text) for text in group] for group in wanted]),
        "ROUGE_L": rouge_l_coco(found, wanted),
        "CIDEr": cider(found, wanted),
    }
    return _split(values)


def _generation_eval(predictions: list[str], references: list[list[str]]) -> tuple[dict[str, float], list[str]]:
    """WebNLG/GenerationEval behind the paper's post-processing: lower-cased, split at all that is not a letter or digit.

    The paper keeps six references and fills up with the first one, which changes no maximum; so they are not repeated here.
    """
    from nltk.tokenize.destructive import NLTKWordTokenizer

    from pipeline.evaluate.metrics.meteor import meteor
    from pipeline.evaluate.metrics.mteval import bleu
    from pipeline.evaluate.metrics.ter import ter_pyter

    tokenise = NLTKWordTokenizer().tokenize
    found, wanted = [_split_words(text) for text in predictions], [[_split_words(text) for text in group[:6]] for group in references]
    found_tokens, wanted_tokens = [" ".join(tokenise(t)) for t in found], [[" ".join(tokenise(t)) for t in group] for group in wanted]
    return _split(
        {
            "BLEU": bleu(found, wanted, "13a", lowercase=False, smooth=False),
            "METEOR": meteor(found_tokens, wanted_tokens),
            "TER": ter_pyter(found_tokens, wanted_tokens),
        }
    )


def _challenge(predictions: list[str], references: list[list[str]], lowercase: bool) -> tuple[dict[str, float], list[str]]:
    """multi-bleu.perl, METEOR and tercom on the texts as they are, which the challenge tokenised before."""
    from pipeline.evaluate.metrics.meteor import meteor
    from pipeline.evaluate.metrics.mteval import bleu
    from pipeline.evaluate.metrics.ter import ter_tercom

    return _split(
        {
            "BLEU": bleu(predictions, padded(references), "none", lowercase=lowercase, smooth=False),
            "METEOR": meteor(predictions, references),
            "TER": ter_tercom(predictions, references),
        }
    )


def padded(references: list[list[str]]) -> list[list[str]]:
    """Groups of one size: multi-bleu.perl reads a missing reference as an empty one, whose length can be the nearest to a short text's."""
    most = max(map(len, references))
    return [group + [""] * (most - len(group)) for group in references]


def _wikisql(predictions: list[str], references: list[list[str]], tables: Path | None) -> tuple[dict[str, float], list[str]]:
    """A question with several references was asked so often in the official file, and counts so often."""
    from pipeline.evaluate.metrics.wikisql import logical_form
    from pipeline.evaluate.metrics.wikisql_tables import accuracies

    pairs = [(text, other) for text, group in zip(predictions, references, strict=True) for other in group]
    found, wanted = [text for text, _ in pairs], [other for _, other in pairs]
    if tables is not None:
        return accuracies(found, wanted, tables), []
    note = "ex_accuracy: left out: it needs the tables. Use zlora score --tables with the split's .tables.jsonl or .db, or their folder."
    try:
        return {"lf_accuracy": logical_form(found, wanted)}, [note]
    except ValueError as error:
        raise JobError(f"references: number {error.args[0] + 1} is neither WikiSQL's JSON nor its SQL. Mend it.") from None


def _labels(kind: str, predictions: list[str], labels: list[str]) -> dict[str, float]:
    from pipeline.evaluate.metrics.glue import accuracy, f1, matthews

    predictions, labels = _places(kind, predictions), _places(kind, labels)
    match kind:
        case "cola":
            return {"matthews": matthews(predictions, labels), "accuracy": accuracy(predictions, labels)}
        case "mrpc" | "qqp":
            return {"accuracy": accuracy(predictions, labels), "f1": f1(predictions, labels, positive="1")}
        case _:
            return {"accuracy": accuracy(predictions, labels)}


def _places(kind: str, texts: list[str]) -> list[str]:
    """Labels by their places, as the official files have most of them; names are read too."""
    names = glue_labels(kind) or ()
    return [str(names.index(text)) if (text := found.strip()) in names else text for found in texts]


def _correlations(predictions: list[str], scores: list[str]) -> dict[str, float]:
    from pipeline.evaluate.metrics.glue import pearson, spearman

    ours, theirs = _numbers(predictions, "predictions"), _numbers(scores, "references")
    return {"pearson": pearson(ours, theirs), "spearman": spearman(ours, theirs)}


def _numbers(texts: list[str], place: str) -> list[float]:
    numbers = []
    for count, text in enumerate(texts, 1):
        if not re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", text) or not math.isfinite(float(text)):
            raise JobError(f'{place}: number {count} is "{text[:80]}", not a finite number. Mend it.')
        numbers.append(float(text))
    return numbers


def _only(references: list[list[str]]) -> list[str]:
    for number, group in enumerate(references, 1):
        if len(group) != 1:
            raise JobError(f"references: number {number} has {len(group)} of them; this task has one of each. Remove the others.")
    return [group[0] for group in references]


def _split(values: dict[str, float | str]) -> tuple[dict[str, float], list[str]]:
    """What has a value, and the notes on what has none."""
    notes = [value for value in values.values() if isinstance(value, str)]
    return {name: value for name, value in values.items() if not isinstance(value, str)}, notes


def _split_words(text: str) -> str:
    return " ".join(" ".join(re.split(r"(\W)", text.lower())).split())
