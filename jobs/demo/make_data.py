"""Writes the demo's two tasks: films and trains, each from linearised fields to one or two English sentences.

`python make_data.py` rewrites data/{films,trains}/{train,valid,test}.jsonl, always with the same bytes. A
line is {"prompt": ..., "completion": ...}. Lines with the same prompt follow each other: they are different
ways to say the same thing, and all of them are references when a generation is scored. No combination of
values in valid or test occurs in train, and many of the names there occur in no training line at all.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"

Facts = dict[str, str]


@dataclass(frozen=True)
class Split:
    name: str
    prompts: int
    paraphrases: int  # lines for each prompt
    new_names: float  # share of names that come from the part of each pool that train never sees


SPLITS = (Split("train", 400, 3, 0.0), Split("valid", 40, 3, 0.5), Split("test", 60, 4, 0.5))


@dataclass(frozen=True)
class Task:
    name: str
    make_facts: Callable[[random.Random, float], Facts]
    say: Callable[[Facts, random.Random], str]


def pick(pool: list[str], rng: random.Random, new_names: float) -> str:
    """A name from the first four fifths of the pool, or sometimes from the last, which train never sees."""
    known = len(pool) * 4 // 5
    return rng.choice(pool[known:] if rng.random() < new_names else pool[:known])


def some_of(facts: Facts, required: list[str], count: int, rng: random.Random) -> Facts:
    """The required fields and a random choice of the others, in their usual order."""
    optional = [field for field in facts if field not in required]
    chosen = {*required, *rng.sample(optional, count - len(required))}
    return {field: value for field, value in facts.items() if field in chosen}


def and_list(phrases: list[str]) -> str:
    return ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]


def split_words(text: str) -> list[str]:
    return text.split()


# ---- films

TITLE_FIRST = split_words(
    "Glass Paper Crimson Distant Velvet Hollow Second Last Midnight Frozen Borrowed Scarlet Secret "
    "Falling Restless Perfect Missing Wooden Burning Forgotten Stolen Final Patient Crooked Invisible "
    "Lonely Amber Sunken Careless Silent"
)
TITLE_LAST = split_words(
    "Harbour Orchard Lighthouse Promise Witness Engine Carnival Visitor Stranger Kitchen Passenger "
    "Memory Signal Desert Evening Detective Corner Holiday Weekend Neighbour Machine Teacher Avenue "
    "Portrait Bargain Recipe Curtain Comet"
)
TITLE_PATTERNS = ("The {} {}", "The {} {}", "{} {}", "A {} {}", "Beyond the {} {}", "My {} {}")
PEOPLE_FIRST = split_words(
    "Marta Peter Ingrid Carlos Amara Dmitri Sofia Kenji Leila Hugo Priya Stefan Nadia Owen Freya Mateo "
    "Alice Jonas Mina Rafael Astrid Theo Yara Edgar Camille"
)
PEOPLE_LAST = split_words(
    "Lindqvist Osei Moreno Tanaka Petrov Hale Okafor Jansen Novak Romano Adler Costa Haddad Whitfield "
    "Duarte Eriksen Fontaine Gupta Ivanova Keller Marchetti Nakamura Oduya Quigley Sandoval"
)
SETTINGS = split_words(
    "Lisbon Vienna Cairo Boston Athens Dublin Tokyo Havana Venice Moscow Berlin Chicago Naples Oslo "
    "Madrid Kyoto Lima Prague Seville Toronto Warsaw Budapest Glasgow Marseille Nairobi"
)
GENRES = {
    "thriller": "thriller",
    "comedy": "comedy",
    "drama": "drama",
    "western": "western",
    "musical": "musical",
    "horror": "horror film",
    "war": "war film",
    "crime": "crime story",
    "romance": "love story",
    "animation": "animated film",
}
AUDIENCES = {
    "all": "is suitable for all ages",
    "teens": "is best for teenagers",
    "adults": "is for adults only",
}


def person(rng: random.Random, new_names: float) -> str:
    return f"{pick(PEOPLE_FIRST, rng, new_names)} {pick(PEOPLE_LAST, rng, new_names)}"


def film_facts(rng: random.Random, new_names: float) -> Facts:
    title_words = pick(TITLE_FIRST, rng, new_names), pick(TITLE_LAST, rng, new_names)
    title = rng.choice(TITLE_PATTERNS).format(*title_words)
    facts = {
        "title": title,
        "genre": rng.choice(list(GENRES)),
        "year": str(rng.randint(1950, 2024)),
        "director": person(rng, new_names),
        "star": person(rng, new_names),
        "set in": pick(SETTINGS, rng, new_names),
        "minutes": str(rng.randint(75, 180)),
        "audience": rng.choice(list(AUDIENCES)),
    }
    return some_of(facts, ["title", "genre"], rng.choice((3, 3, 4, 4)), rng)


def film_noun_phrase(left: Facts, rng: random.Random) -> str:
    """For example "a 1998 thriller starring Marta Hale"; takes the fields that it says out of `left`."""
    noun = GENRES[left.pop("genre")]
    if "year" in left:
        noun = f"{left.pop('year')} {noun}"
    tails = {
        "director": rng.choice(("by {}", "directed by {}")),
        "star": "starring {}",
        "set in": "set in {}",
    }
    said = [field for field in tails if field in left][: rng.choice((1, 1, 2))]
    start = f"an {noun}" if noun[0] == "a" else f"a {noun}"
    return " ".join([start, *(tails[field].format(left.pop(field)) for field in said)])


def film_verb_phrases(left: Facts, rng: random.Random) -> list[str]:
    patterns = {
        "director": "was directed by {}",
        "star": "stars {}",
        "set in": rng.choice(("is set in {}", "takes place in {}")),
        "minutes": rng.choice(("lasts {} minutes", "runs for {} minutes")),
    }
    phrases = [pattern.format(left[field]) for field, pattern in patterns.items() if field in left]
    return phrases + ([AUDIENCES[left["audience"]]] if "audience" in left else [])


def say_film(facts: Facts, rng: random.Random) -> str:
    left = dict(facts)
    title = left.pop("title")
    openings = ["title"] * 2 + [field for field in ("director", "star", "set in") if field in facts]
    opening = rng.choice(openings)
    if opening == "director":
        first = f"{left.pop('director')} directed {title}, {film_noun_phrase(left, rng)}."
    elif opening == "star":
        acts = rng.choice(("stars", "plays the lead"))
        first = f"{left.pop('star')} {acts} in {title}, {film_noun_phrase(left, rng)}."
    elif opening == "set in":
        first = f"Set in {left.pop('set in')}, {title} is {film_noun_phrase(left, rng)}."
    else:
        first = f"{title} is {film_noun_phrase(left, rng)}."
    rest = film_verb_phrases(left, rng)
    if not rest:
        return first
    if len(rest) == 1 and rng.random() < 0.3:
        return f"{first[:-1]}, and it {rest[0]}."
    return f"{first} It {and_list(rest)}."


# ---- trains

STATIONS = [
    "Ashcombe", "Castle Vale", "Millbrook", "Port Ellery", "Queensferry", "Oakhampton", "Upper Wexley",
    "Elmsworth", "Harrow Green", "Inverlochy", "Kingsbridge", "Larkspur Hill", "Abbotsleigh",
    "Northaven", "Orchard Park", "Pennywell", "Redcliffe", "St Agnes", "Thornaby Cross", "Ullesmere",
    "Victoria Docks", "Westbourne", "Yarrowdale", "Aldermoor", "Bishopsgate", "Cedar Junction",
    "Eastleigh Road", "Fernhill", "Glenmore", "Highfield", "Icknield", "Junction Road", "Lower Marsden",
    "Market Drayley", "Netherby", "Overbrook", "Priory Lane", "Rosemount", "Southgate", "Tiverley",
]  # fmt: skip
STATUSES = {
    "on time": "is on time",
    "late 5": "is running five minutes late",
    "late 10": "is running ten minutes late",
    "late 20": "is running twenty minutes late",
    "busy": "is expected to be busy",
}
BICYCLES = {"yes": "takes bicycles", "no": "does not take bicycles"}
COACHES = {"2": "two", "3": "three", "4": "four", "6": "six", "8": "eight", "10": "ten"}


def train_facts(rng: random.Random, new_names: float) -> Facts:
    start, end, between = "", "", ""
    while len({start, end, between}) < 3:
        start, end, between = (pick(STATIONS, rng, new_names) for _ in range(3))
    facts = {
        "from": start,
        "to": end,
        "departs": f"{rng.randint(5, 23):02}:{rng.randrange(0, 60):02}",
        "platform": str(rng.randint(1, 19)),
        "via": between,
        "status": rng.choice(list(STATUSES)),
        "coaches": rng.choice(list(COACHES)),
        "bicycles": rng.choice(list(BICYCLES)),
    }
    return some_of(facts, ["to", rng.choice(("departs", "platform"))], rng.choice((3, 3, 4, 4)), rng)


def train_noun_phrase(left: Facts, kind: str) -> str:
    """For example "train from Fernhill to St Agnes"; takes the fields that it says out of `left`."""
    start = f" from {left.pop('from')}" if "from" in left else ""
    return f"{kind}{start} to {left.pop('to')}"


def train_verb_phrases(left: Facts, rng: random.Random) -> list[str]:
    phrases = []
    if "departs" in left:
        phrases.append(f"{rng.choice(('leaves', 'departs'))} at {left['departs']}")
    if "from" in left:
        phrases.append(f"comes from {left['from']}")
    if "via" in left:
        phrases.append(rng.choice(("calls at {}", "goes via {}")).format(left["via"]))
    if "coaches" in left:
        phrases.append(f"has {COACHES[left['coaches']]} coaches")
    if "bicycles" in left:
        phrases.append(BICYCLES[left["bicycles"]])
    if "status" in left:
        phrases.append(STATUSES[left["status"]])
    return phrases


def train_opening(left: Facts, rng: random.Random) -> str:
    """The first sentence; takes the fields that it says out of `left`."""
    openings = ["train"]
    if "departs" in left:
        openings += ["time"] + ["clock"] * ("from" in left)
    if "platform" in left:
        openings += ["platform", "passengers"]
    opening = rng.choice(openings)
    if opening == "clock":
        platform = f" from platform {left.pop('platform')}" if "platform" in left else ""
        return f"At {left.pop('departs')} a train leaves {left.pop('from')} for {left.pop('to')}{platform}."
    if opening == "platform":
        kind = f"{left.pop('departs')} train" if "departs" in left else "train"
        return f"Platform {left.pop('platform')} is for the {train_noun_phrase(left, kind)}."
    if opening == "passengers":
        return f"Passengers for {left.pop('to')} should go to platform {left.pop('platform')}."
    time_first = opening == "time" and ("platform" in left or "via" in left)
    subject = f"The {train_noun_phrase(left, left.pop('departs') + ' train' if time_first else 'train')}"
    time = f" at {left.pop('departs')}" if "departs" in left else ""
    if "platform" in left:
        return f"{subject} leaves{time} from platform {left.pop('platform')}."
    return f"{subject} leaves{time}." if time else f"{subject} calls at {left.pop('via')}."


def say_train(facts: Facts, rng: random.Random) -> str:
    left = dict(facts)
    first = train_opening(left, rng)
    rest = train_verb_phrases(left, rng)
    if not rest:
        return first
    subject = "The train" if first.startswith("Passengers") else "It"
    if len(rest) == 1 and rng.random() < 0.3:
        return f"{first[:-1]}, and {subject.lower()} {rest[0]}."
    return f"{first} {subject} {and_list(rest)}."


# ---- files

TASKS = (Task("films", film_facts, say_film), Task("trains", train_facts, say_train))


def paraphrases(task: Task, facts: Facts, count: int, rng: random.Random) -> list[str]:
    """Different texts, and as far as possible with different beginnings."""
    texts = list(dict.fromkeys(task.say(facts, rng) for _ in range(60)))
    seen: set[str] = set()
    fresh, repeated = [], []
    for text in texts:
        beginning = text[:14]
        (repeated if beginning in seen else fresh).append(text)
        seen.add(beginning)
    return (fresh + repeated)[:count]


def main() -> None:
    for task in TASKS:
        rng = random.Random(f"zlora demo {task.name}")
        used: set[str] = set()
        folder = DATA / task.name
        folder.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            lines = []
            while len(lines) < split.prompts * split.paraphrases:
                facts = task.make_facts(rng, split.new_names)
                prompt = " | ".join(f"{field} : {value}" for field, value in facts.items())
                texts = paraphrases(task, facts, split.paraphrases, rng)
                if prompt in used or len(texts) < split.paraphrases:
                    continue
                used.add(prompt)
                lines += [json.dumps({"prompt": prompt, "completion": text}) for text in texts]
            path = folder / f"{split.name}.jsonl"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
