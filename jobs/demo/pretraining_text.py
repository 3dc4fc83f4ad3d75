"""Writes the text that the demo's base model is pretrained on.

Each document takes an entity of some domain (see pretraining_domains.py) with random facts, and tells the
same facts more than once: as a list, a table, questions and answers or a note, and as prose. A model can
only guess the second telling by copying values and by turning fields into sentences, which are the skills
that a small delta can build on. A share of plain stories and of text about nothing in particular keeps it
from knowing only these domains.

`python pretraining_text.py` prints a sample.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pretraining_domains as words
from pretraining_domains import Domain

END = "<|endoftext|>"

Facts = dict[str, str]


@dataclass
class Subject:
    """One entity: what it is, what it is called and what is known about it."""

    domain: Domain
    noun: str
    name: str
    facts: Facts


def made_word(rng: random.Random) -> str:
    syllables = rng.choice((1, 2, 2, 2, 3))
    return "".join(rng.choice(words.ONSETS) + rng.choice(words.VOWELS) for _ in range(syllables)).capitalize() + rng.choice(words.CODAS)


def place(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.2:
        return f"{rng.choice(words.PLACE_FIRST_WORDS)} {made_word(rng)}"
    if kind < 0.45:
        return made_word(rng) + rng.choice(words.PLACE_ENDINGS)
    if kind < 0.6:
        return rng.choice(words.THINGS).capitalize() + rng.choice(words.PLACE_ENDINGS)
    if kind < 0.7:
        return f"{rng.choice((made_word(rng), rng.choice(words.LAST_NAMES)))} {rng.choice(words.PLACE_WORDS)}"
    if kind < 0.9:
        return rng.choice(words.PLACES)
    return made_word(rng)


def last_name(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return made_word(rng)
    if kind < 0.7:
        return rng.choice(words.LAST_NAMES)
    if kind < 0.85:
        return made_word(rng) + rng.choice(("son", "man", "er", "ley", "s"))
    return rng.choice(words.THINGS).capitalize() + rng.choice(("", "man", "er", "son"))


def person(rng: random.Random) -> str:
    first = rng.choice(words.FIRST_NAMES) if rng.random() < 0.6 else made_word(rng)
    return f"{first} {last_name(rng)}"


def title(rng: random.Random) -> str:
    adjectives = words.ADJECTIVES + words.TITLE_ADJECTIVES
    adjective = rng.choice(adjectives) if rng.random() < 0.8 else made_word(rng)
    nouns = words.THINGS + words.TITLE_NOUNS
    thing, other = rng.choice(nouns).capitalize(), rng.choice(nouns).capitalize()
    pattern = rng.choice((
        "The {a} {t}", "{a} {t}s", "The {t} of {p}", "{t} and {o}", "A {t} in {p}", "The {a} {t} {o}",
        "{t} Without {o}", "Under the {a} {t}", "The {t}'s {o}", "{a} {t}", "{p}", "No {t} for {f}",
    ))  # fmt: skip
    return pattern.format(a=adjective, t=thing, o=other, p=place(rng), f=rng.choice(words.FIRST_NAMES))


def big_number(rng: random.Random) -> str:
    return str(rng.randrange(100, 1000) * rng.choice((1, 1, 10, 100)))


def clock(rng: random.Random) -> str:
    hour, minute = rng.randrange(24), rng.choice((rng.randrange(60), rng.randrange(0, 60, 5)))
    if rng.random() < 0.7:
        return f"{hour:02}:{minute:02}"
    return f"{hour % 12 + 1} {'am' if hour < 12 else 'pm'}"


def price(rng: random.Random) -> str:
    amount = rng.choice((str(rng.randrange(2, 300)), f"{rng.randrange(1, 60)}.{rng.randrange(100):02}"))
    return rng.choice(("${}", "{} euros", "£{}", "{} dollars")).format(amount)


def one_of(options: list[str] | tuple[str, ...]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(options)


VALUE_MAKERS: dict[str, Callable[[random.Random], str]] = {
    "made": made_word,
    "place": place,
    "person": person,
    "title": title,
    "big": big_number,
    "clock": clock,
    "price": price,
    "company": lambda rng: f"{last_name(rng)} {rng.choice(('and Co', 'Works', 'Group', 'Brothers', 'Labs'))}",
    "number": lambda rng: str(rng.randrange(2, 100)),
    "small": lambda rng: rng.choice((str(rng.randrange(1, 13)), rng.choice(words.SMALL_NUMBERS))),
    "year": lambda rng: str(rng.randrange(1700, 2030)),
    "date": lambda rng: f"{rng.randrange(1, 29)} {rng.choice(words.MONTHS)}",
    "letter": one_of(tuple("ABCDEFGHKLMNPRSTX")),
    "first": one_of(words.FIRST_NAMES),
    "adjective": one_of(words.ADJECTIVES),
    "thing": one_of(words.THINGS),
    "Thing": lambda rng: rng.choice(words.THINGS).capitalize(),
    "food": one_of(words.FOODS),
    "colour": one_of(words.COLOURS),
    "material": one_of(words.MATERIALS),
    "hobby": one_of(words.HOBBIES),
    "hobby_name": lambda rng: rng.choice(words.HOBBIES).capitalize(),
    "habit": one_of(words.HABITS),
    "team": one_of(words.TEAMS),
    "weekday": one_of(words.WEEKDAYS),
    "month": one_of(words.MONTHS),
}


def fill(pattern: str, rng: random.Random, known: Facts) -> str:
    """Choose one of the pattern's options and put values where it has {names}."""
    option = rng.choice(pattern.split("|"))

    def value(match: re.Match[str]) -> str:
        key = match.group(1)
        return known[key] if key in known else VALUE_MAKERS[key](rng)

    return re.sub(r"\{([^}]+)\}", value, option)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def tidy(text: str) -> str:
    """Put "an" before vowels."""
    return re.sub(r"\b([Aa]) (?=[aeioAEIO])", r"\1n ", text)


def make_subject(rng: random.Random) -> Subject:
    domain = rng.choice(words.DOMAINS)
    noun = rng.choice(domain.noun.split("|"))
    local = {"noun": capital(noun), "kind_name": capital(noun)}
    name = capital(fill(domain.name, rng, local))
    fields = rng.sample(list(domain.fields), rng.randint(2, min(5, len(domain.fields))))
    return Subject(domain, noun, name, {field: fill(domain.fields[field], rng, local) for field in fields})


def placeholders(pattern: str) -> set[str]:
    return set(re.findall(r"\{([^}]+)\}", pattern)) - {"name", "noun"}


def prose(subject: Subject, rng: random.Random) -> str:
    """Say all the facts that the domain has words for, each once, in random order."""
    facts = subject.facts
    known = facts | {"name": subject.name, "noun": subject.noun}
    openings = [opening for opening in subject.domain.openings if placeholders(opening) <= facts.keys()]
    sentences, said = [], set()
    if openings and rng.random() < 0.85:
        opening = rng.choice(openings)
        sentences.append(capital(fill(opening, rng, known)))
        said |= placeholders(opening)

    phrases = []
    for predicate in rng.sample(subject.domain.predicates, len(subject.domain.predicates)):
        needs = placeholders(predicate)
        if needs and needs <= facts.keys() and not needs & said:
            phrases.append(fill(predicate, rng, known))
            said |= needs

    while phrases:
        first = not sentences
        pronoun = subject.domain.pronoun or rng.choice((f"the {subject.noun}", subject.name.split()[0]))
        who = subject.name if first or rng.random() < 0.2 else rng.choice((pronoun, f"the {subject.noun}"))
        together = [phrases.pop() for _ in range(min(len(phrases), rng.choice((1, 1, 2, 2, 3))))]
        if first and len(together) > 1 and rng.random() < 0.4:
            which = "which" if subject.domain.pronoun else "who"
            sentences.append(f"{capital(who)}, {which} {together[0]}, {' and '.join(together[1:])}.")
        elif not first and len(together) == 1 and rng.random() < 0.3:
            sentences[-1] = f"{sentences[-1][:-1]}, and {who} {together[0]}."
        else:
            listed = ", ".join(together[:-1]) + " and " + together[-1] if len(together) > 1 else together[0]
            sentences.append(f"{capital(who)} {listed}.")
    return tidy(" ".join(sentences))


def structured(subject: Subject, rng: random.Random) -> str:
    """Write the facts as a list, a table, a form, a note or questions and answers."""
    rows = list(subject.facts.items())
    rng.shuffle(rows)
    name_key = rng.choice(("name", subject.noun, subject.noun))
    rows.insert(0 if rng.random() < 0.7 else rng.randrange(len(rows) + 1), (name_key, subject.name))
    layout = rng.randrange(15)
    if layout == 0:
        return "\n".join(f"{key} = {value}" for key, value in rows)
    if layout == 1:
        return "; ".join(f"{key}: {value}" for key, value in rows)
    if layout == 2:
        return "\n".join(f"- {capital(key)}: {value}" for key, value in rows)
    if layout == 3:
        return ", ".join(f"{key} ({value})" for key, value in rows)
    if layout == 4:
        return "".join(f"<{key}>{value}</{key}>" for key, value in rows)
    if layout == 5:
        return "{" + ", ".join(f'"{key}": "{value}"' for key, value in rows) + "}"
    if layout == 6:
        return "\n".join(f"| {key} | {value} |" for key, value in rows)
    if layout == 7:
        return "Notes: " + ", ".join(value for _, value in rows) + "."
    if layout == 8:
        return "\n".join(f"Q: What is the {key}? A: {value}." for key, value in rows)
    if layout == 9:
        return " ".join(f"[{key}] {value}" for key, value in rows)
    if layout == 10:
        return ", ".join(f"{key} -> {value}" for key, value in rows)
    if layout == 11:
        return "\n".join(f"{number}. {key} - {value}" for number, (key, value) in enumerate(rows, 1))
    if layout == 12:
        return " ".join(f"The {key} is {value}." for key, value in rows)
    if layout == 13:
        return " / ".join(f"{key} : {value}" for key, value in rows)
    return " & ".join(f"{key} is {value}" for key, value in rows)


ANYTHING = Domain("thing", "{made}", {}, (), ())


def any_subject(rng: random.Random) -> Subject:
    """A thing with arbitrary fields: the only way to say them is the same for all."""
    makers = [key for key in VALUE_MAKERS if key not in ("letter", "hobby", "habit")]
    fields = rng.sample(words.ANY_FIELDS, rng.randint(2, 5))
    name = VALUE_MAKERS[rng.choice(("made", "title", "place", "person", "company"))](rng)
    noun = rng.choice(words.THINGS)
    facts = {field: VALUE_MAKERS[rng.choice(makers)](rng) for field in fields}
    return Subject(ANYTHING, noun, capital(name), facts)


def any_prose(subject: Subject, rng: random.Random) -> str:
    rows = list(subject.facts.items())
    rng.shuffle(rows)
    sentences = []
    for number, (key, value) in enumerate(rows):
        owner = f"{subject.name}'s" if number == 0 or rng.random() < 0.3 else "Its"
        pattern = rng.choice((
            "{owner} {key} is {value}.",
            "{value} is the {key} of {name}.",
            "The {key} of {name} is {value}.",
            "{name} has the {key} {value}.",
            "For the {key}, {name} has {value}.",
            "With {value} as its {key}, {name} is known.",
        ))  # fmt: skip
        sentences.append(capital(pattern.format(owner=owner, key=key, value=value, name=subject.name)))
    return " ".join(sentences)


def letter(subject: Subject, rng: random.Random) -> str:
    reader, writer = rng.choice(words.FIRST_NAMES), person(rng)
    start = rng.choice(words.LETTER_STARTS)
    return f"Dear {reader},\n{start} {subject.name}. {prose(subject, rng)}\nYours, {writer}"


def story(rng: random.Random) -> str:
    """A few simple events in which the same people, places and things come back."""
    hero, friend = rng.sample(words.FIRST_NAMES, 2)
    if rng.random() < 0.5:
        hero, friend = made_word(rng), made_word(rng)
    where, thing, food = place(rng), rng.choice(words.THINGS), rng.choice(words.FOODS)
    colour, feeling = rng.choice(words.COLOURS), rng.choice(words.FEELINGS)
    events = [
        f"{hero} went to {where} with {friend}.",
        f"{hero} found a {colour} {thing} near {where}.",
        f"{friend} wanted the {thing}.",
        f"They ate {food} together.",
        f"{hero} gave the {colour} {thing} to {friend}.",
        f"{friend} was {feeling}.",
        f'"Where is my {thing}?" asked {friend}.',
        f'"I have the {thing}," said {hero}.',
        f"In {where} it was {rng.choice(('cold', 'warm', 'dark'))}.",
        f"{friend} said that {hero} could keep the {thing}.",
        f"After that, {hero} was no longer {feeling}.",
        f"{hero} bought {food} for {price(rng)} and gave some to {friend}.",
        f"At {clock(rng)} they went home.",
    ]
    chosen = sorted(rng.sample(range(len(events)), rng.randint(3, 7)))
    starts = (
        f"One day, {hero} met {friend} in {where}.",
        f"There was once a {rng.choice(('boy', 'girl', 'man', 'woman'))} called {hero}.",
        f"{hero} and {friend} lived in {where}.",
        f"{hero} had a {colour} {thing}.",
    )
    start = rng.choice(starts)
    return tidy(" ".join([start] + [events[index] for index in chosen]))


def document(rng: random.Random) -> str:
    """One document: mostly two tellings of the same facts, sometimes only one, or a story."""
    kind = rng.random()
    if kind < 0.07:
        return story(rng)
    if kind < 0.22:
        subject, telling = any_subject(rng), any_prose
    else:
        subject, telling = make_subject(rng), prose
    facts, text = structured(subject, rng), telling(subject, rng)
    if kind < 0.66:
        # An end mark between facts and prose: what follows it may still be about the same thing.
        return f"{facts}{END} {text}" if rng.random() < 0.6 else f"{facts}\n{text}"
    if kind < 0.74:
        return f"{text}\n{facts}"
    if kind < 0.82:
        return f"{text}{END} {telling(subject, rng)}"
    if kind < 0.87:
        return f"{facts}\n{letter(subject, rng)}"
    if kind < 0.93:
        other = make_subject(rng)
        return f"{facts}\n{structured(other, rng)}\n{text} {prose(other, rng)}"
    if kind < 0.97:
        return f"{facts}{END} {structured(subject, rng)}"
    return text


def documents(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    while True:
        yield document(rng)


if __name__ == "__main__":
    sample = documents(0)
    for _ in range(25):
        print(next(sample), end="\n---\n")
