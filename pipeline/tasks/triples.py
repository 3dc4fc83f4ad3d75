"""Sets of triples and their texts: what WebNLG and DART share, and the XML form that both are released in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from pipeline.job.errors import JobError
from pipeline.tasks.example import Pair
from pipeline.tasks.files import whole_text

Triple = tuple[str, str, str]

_LINE = "line in the file"


@dataclass(frozen=True)
class Text:
    """One of the texts that say a set of triples."""

    text: str
    comment: str
    """WebNLG: the annotators' "good" or "toFix". DART: where it is from."""
    source: str


@dataclass(frozen=True)
class Entry:
    category: str
    triples: tuple[Triple, ...]
    texts: tuple[Text, ...]


def linearise(triples: tuple[Triple, ...]) -> str:
    """`subject : predicate : object`, joined by ` | `: the paper's form."""
    return " | ".join(" : ".join(triple) for triple in triples)


def pair(prompt: str, text: Text) -> Pair:
    """Raises:
    JobError: the text is empty."""
    if not text.text.strip():
        raise JobError(f"{text.source}: the text is empty: there is nothing to learn. Mend or remove it.")
    return Pair(prompt, " " + text.text.strip(), text.source)


def as_triple(text: str, where: str) -> Triple:
    """`subject | predicate | object`.

    Raises:
        JobError: it has another number of parts, or an empty one.
    """
    return checked_triple(text.split(" | "), where)


def checked_triple(parts: list[str], where: str) -> Triple:
    """Raises:
    JobError: not three parts, or an empty one."""
    if len(parts) != 3 or not all(part.strip() for part in parts):
        raise JobError(f"{where}: {json.dumps(parts)[:200]} is not a triple of subject, predicate and object. Mend it.")
    subject, predicate, target = (part.strip() for part in parts)
    return subject, predicate, target


def read_benchmark(file: Path) -> Iterator[Entry]:
    """The entries of a file in WebNLG's XML form, in file order.

    Raises:
        JobError: not such a file, an entry without triples or texts, or one that is there twice.
    """
    seen: dict[str, str] = {}
    for entry in _tree(file).iter("entry"):
        where = f"{file}:{entry.get(_LINE)}"
        name = _attribute(entry, "eid", where)
        if name in seen:
            raise JobError(f'{where}: the entry "{name}" is there twice; the first is at line {seen[name]}. Remove one or rename it.')
        seen[name] = str(entry.get(_LINE))
        triples = tuple(as_triple(*_content(part, file)) for part in entry.findall("modifiedtripleset/mtriple"))
        texts = tuple(
            Text(content, _attribute(part, "comment", where), where)
            for part in entry.findall("lex")
            for content, where in (_content(part, file),)
        )
        yield complete(Entry(_attribute(entry, "category", where), triples, texts), where)
    if not seen:
        raise JobError(f"{file}:1: no <entry> in it. Is this the official file?")


def complete(entry: Entry, where: str) -> Entry:
    """Raises:
    JobError: it lacks triples or texts."""
    if not entry.triples:
        raise JobError(f"{where}: the entry has no triples. Mend or remove it.")
    if not entry.texts:
        raise JobError(f"{where}: the entry has no text: there is nothing to learn. Is this the file with the texts? Mend or remove it.")
    return entry


def _tree(file: Path) -> Element:
    """The file's elements, each with its line among its attributes."""
    builder, parser = TreeBuilder(), expat.ParserCreate()

    def refuse_doctype(*_: object) -> None:
        raise JobError(f"{file}:{parser.CurrentLineNumber}: a document type, which the official files have not. Remove it.")

    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse_doctype
    parser.StartElementHandler = lambda tag, found: builder.start(tag, {**found, _LINE: str(parser.CurrentLineNumber)})
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(whole_text(file), True)
    except expat.ExpatError as error:
        message = expat.ErrorString(error.code)
        raise JobError(f"{file}:{error.lineno}: not valid XML: {message} at column {error.offset + 1}. Mend the line.") from None
    return builder.close()


def _attribute(element: Element, name: str, where: str) -> str:
    value = element.get(name)
    if value is None:
        raise JobError(f'{where}: <{element.tag}> has no attribute "{name}". Mend the line.')
    return value


def _content(element: Element, file: Path) -> tuple[str, str]:
    where = f"{file}:{element.get(_LINE)}"
    if len(element):
        raise JobError(f"{where}: <{element.tag}> holds <{element[0].tag}>, not text alone. Is this the official file?")
    return element.text or "", where
