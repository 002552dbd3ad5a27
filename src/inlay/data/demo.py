"""The embedded task: records to sentences, made up by seeded rules from the word lists below.

    prompt      journey; by: train; no: 417; who: Anna, Ben; hours: 1; to: Dover; day: Monday; from: York
    completion  On Monday Anna and Ben take the train from York to Dover, a journey of one hour.

Copying is not enough: fields come in any order, one is never told, numbers become words, verbs and
nouns agree in number, lists are joined, and some facts are worked out (the order of the runners, whether
the weather stays). Each record has exactly one sentence, so an exact match means something, and no
sentence occurs twice: what is tested was never seen in training, in whatever order its fields stood.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from inlay.core.errors import OutputError

Facts = dict[str, str]

WOMEN = ("Anna", "Mary", "Jane", "Emma", "Lucy", "Alice", "Ellen", "Sarah", "Kate", "Helen", "Rose", "Grace")
MEN = (
    "Ben",
    "Tom",
    "John",
    "James",
    "Henry",
    "Arthur",
    "Edward",
    "Peter",
    "Paul",
    "Frank",
    "Harry",
    "Robert",
)
PEOPLE = WOMEN + MEN
PLACES = (
    "London",
    "Paris",
    "York",
    "Dover",
    "Rome",
    "Oxford",
    "Bath",
    "Berlin",
    "Vienna",
    "Dublin",
    "Boston",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
GOODS = {
    "loaf": "loaves", "apple": "apples", "knife": "knives", "book": "books", "candle": "candles",
    "hat": "hats", "fish": "fish", "rose": "roses", "box": "boxes", "horse": "horses", "dress": "dresses",
    "shirt": "shirts", "cherry": "cherries", "goose": "geese", "coat": "coats", "key": "keys",
}  # fmt: skip
STATES = ("good", "old", "small", "new", "fine", "large")
DISHES = ("soup", "pie", "cake", "stew", "pudding", "salad")
FOODS = (
    "meat",
    "fish",
    "apples",
    "eggs",
    "butter",
    "milk",
    "bread",
    "cheese",
    "honey",
    "rice",
    "beans",
    "salt",
)
WEATHER = {
    "rain": "it rains",
    "snow": "it snows",
    "sun": "the sun shines",
    "wind": "the wind blows",
    "fog": "there is fog",
}


def joined(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def counted(number: int, one: str, many: str) -> str:
    """``one loaf``, ``two loaves``."""
    return f"{NUMBERS[number]} {one if number == 1 else many}"


def journey(draw: random.Random) -> tuple[Facts, str]:
    who = draw.sample(PEOPLE, draw.choice((1, 1, 2, 3)))
    start, end = draw.sample(PLACES, 2)
    by, day, hours = (
        draw.choice(("train", "coach", "ship", "horse", "foot")),
        draw.choice(DAYS),
        draw.randint(1, 12),
    )
    verb = {"foot": "walk", "horse": "ride"}.get(by, "take")
    verb += "s" if len(who) == 1 else ""
    means = "" if by in ("foot", "horse") else f" the {by}"
    sentence = (
        f"On {day} {joined(who)} {verb}{means} from {start} to {end}, a journey of {counted(hours, 'hour', 'hours')}."
    )
    facts = {"who": ", ".join(who), "from": start, "to": end, "by": by, "day": day, "hours": str(hours)}
    return facts, sentence


def shop(draw: random.Random) -> tuple[Facts, str]:
    seller, place = draw.choice(PEOPLE), draw.choice(PLACES)
    item, state = draw.choice(list(GOODS)), draw.choice(STATES)
    count, price = draw.choice((0, 1, 1, *range(2, 13))), draw.randint(1, 12)
    cost = counted(price, "shilling", "shillings")
    if count == 0:
        sentence = f"{seller} of {place} has no {GOODS[item]} left."
    else:
        each = " each" if count > 1 else ""
        goods = counted(count, f"{state} {item}", f"{state} {GOODS[item]}")
        sentence = f"{seller} of {place} sells {goods} for {cost}{each}."
    facts = {"seller": seller, "place": place, "item": item, "state": state, "count": str(count)}
    return {**facts, "price": str(price)}, sentence


def supper(draw: random.Random) -> tuple[Facts, str]:
    cook, dish, day = draw.choice(PEOPLE), draw.choice(DISHES), draw.choice(DAYS)
    foods, guests = draw.sample(FOODS, draw.randint(1, 3)), draw.choice((0, 0, 1, 1, *range(2, 13)))
    alone = "herself" if cook in WOMEN else "himself"
    for_whom = alone if guests == 0 else counted(guests, "guest", "guests")
    sentence = f"{cook} makes a {dish} of {joined(foods)} for {for_whom} on {day}."
    facts = {"cook": cook, "dish": dish, "with": ", ".join(foods), "guests": str(guests), "day": day}
    return facts, sentence


def weather(draw: random.Random) -> tuple[Facts, str]:
    place, day = draw.choice(PLACES), draw.choice(DAYS)
    morning, night = draw.choice(list(WEATHER)), draw.choice(list(WEATHER))
    if morning == night:
        told = f"{WEATHER[morning]} all {day}"
    else:
        told = f"{WEATHER[morning]} on {day} morning, but at night {WEATHER[night]}"
    return {"place": place, "day": day, "morning": morning, "night": night}, f"In {place} {told}."


def race(draw: random.Random) -> tuple[Facts, str]:
    place, runners = draw.choice(PLACES), draw.sample(PEOPLE, 3)
    seen = draw.sample((0, 1, 2), 3)  # the record lists the runners in any order
    told = ", ".join(f"{rank + 1} {runners[rank]}" for rank in seen)
    sentence = f"In {place} {runners[0]} wins the race before {runners[1]} and {runners[2]}."
    return {"place": place, "results": told}, sentence


KINDS: Mapping[str, Callable[[random.Random], tuple[Facts, str]]] = {
    "journey": journey,
    "shop": shop,
    "supper": supper,
    "weather": weather,
    "race": race,
}


def records(train: int = 2000, valid: int = 100, test: int = 200, *, seed: int = 0) -> dict[str, list[Facts]]:
    """Rows with ``prompt`` and ``completion`` by split; the same seed gives the same rows.

    The kinds take turns, so every split holds them equally.
    """
    draw = random.Random(seed)
    seen: set[str] = set()
    names = list(KINDS)
    sizes = {"test": test, "valid": valid, "train": train}
    return {split: [_unseen(draw, names[n % len(names)], seen) for n in range(size)] for split, size in sizes.items()}


def write_records(folder: Path, splits: Mapping[str, Sequence[Facts]]) -> dict[str, Path]:
    """Write each split as ``<split>.jsonl``, each beside and then renamed.

    Returns:
        The file of each split.

    Raises:
        OutputError: the folder or a file cannot be written.
    """
    paths = {split: folder / f"{split}.jsonl" for split in splits}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, path in paths.items():
            beside = path.with_suffix(".jsonl.partial")
            beside.write_text("".join(json.dumps(row) + "\n" for row in splits[split]), encoding="utf-8")
            os.replace(beside, path)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}; choose another folder") from error
    return paths


def _unseen(draw: random.Random, kind: str, seen: set[str]) -> Facts:
    while True:
        facts, sentence = KINDS[kind](draw)
        if sentence not in seen:
            seen.add(sentence)
            break
    fields = [*facts.items(), ("no", str(draw.randint(100, 999)))]
    draw.shuffle(fields)
    return {"prompt": "; ".join([kind, *(f"{k}: {v}" for k, v in fields)]), "completion": sentence}
