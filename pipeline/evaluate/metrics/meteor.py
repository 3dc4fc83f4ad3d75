"""METEOR 1.5 (Denkowski and Lavie 2014), by its authors' program, which is Java.

In: predictions and the references of each, tokenised as the task's script does. Out: the score of the corpus, from 0 to 1, or a note
that says what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.job.errors import JobError

JAR_VARIABLE = "METEOR_JAR"
_LIMIT_S = 1800
_ENDS_WITH_US = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
"""Linux (1: PR_SET_PDEATHSIG, 9: SIGKILL): training that is stopped or killed meanwhile leaves no Java behind."""


def meteor(predictions: list[str], references: list[list[str]]) -> float | str:
    """The score; or, where Java or the program is missing or fails, one line on what to do.

    Raises:
        JobError: METEOR_JAR names no file.
    """
    if missing := meteor_missing():
        return missing
    java, jar = shutil.which("java"), find_jar()
    assert java is not None
    assert jar is not None
    with tempfile.TemporaryDirectory(prefix="zlora-meteor-") as folder:
        alone = [sys.executable, "-IS", "-c", _ENDS_WITH_US] if sys.platform == "linux" else []
        program = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(jar)]
        command = [*alone, *program, *arguments(Path(folder), predictions, references)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"METEOR: left out: {jar.name} did not end within {_LIMIT_S} s."
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("Final score:"):
            return float(line.split()[-1])
    said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
    return (
        f"METEOR: left out: `java -jar {jar}` ended with code {done.returncode} and said: {said[0][:200]}. "
        "It needs Java 8 or later and 2 GB of memory."
    )


def meteor_missing() -> str | None:
    """What METEOR lacks here, as `meteor` says it; None where it lacks nothing.

    Raises:
        JobError: METEOR_JAR names no file.
    """
    if shutil.which("java") is None:
        return "METEOR: left out: it needs Java 8 or later, and there is no `java` on the PATH. Install one, then score again."
    if find_jar() is None:
        return (
            "METEOR: left out: its program is not here. Run: pip install 'zlora[meteor]' (104 MB), "
            f"or set {JAR_VARIABLE} to the path of a meteor-1.5.jar with its data/ folder beside it."
        )
    return None


def arguments(folder: Path, predictions: list[str], references: list[list[str]]) -> list[str]:
    """Writes the program's files, and says how to call it."""
    found, wanted, most = folder / "predictions", folder / "references", max(map(len, references))
    # The program reads the same number of references for all; an empty one scores 0 and the best counts.
    found.write_text("".join(_line(text) for text in predictions), encoding="utf-8")
    wanted.write_text("".join(_line(text) for group in references for text in group + [""] * (most - len(group))), encoding="utf-8")
    return [str(found), str(wanted), "-l", "en", "-norm", "-r", str(most)]


def find_jar() -> Path | None:
    if named := os.environ.get(JAR_VARIABLE):
        if not Path(named).is_file():
            raise JobError(f"{JAR_VARIABLE}={named}: there is no such file. Correct or unset the variable.")
        return Path(named).resolve()
    package = importlib.util.find_spec("pycocoevalcap")
    for folder in package.submodule_search_locations or () if package else ():
        if (jar := Path(folder) / "meteor" / "meteor-1.5.jar").is_file():
            return jar
    return None


def _line(text: str) -> str:
    return " ".join(text.split()) + "\n"
