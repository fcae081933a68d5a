r"""Graded prompts of our own for small models, to try ``harness audit`` on.

``python -m harness.scenarios.graded -o FILE``

Each of `KINDS` has six ways to ask (a template family, which is a session of the trace: its records are alike), and
each family so many records, all different and all a first turn. Truths are balanced, so that no constant answer passes.
``--form few-shot`` is for base models: three answered examples before each question, drawn apart from all that are
asked; send it with ``--extra-body '{"stop": ["\n\n"]}'``. The same seed gives the same file, byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import click

Form = Literal["chat", "few-shot"]
Check = dict[str, object]
_list = str.split
FAMILY = 7
"""Records of a family, by default."""
SHOTS = 3
RATE = 4.0
"""Requests/s of the trace, on average."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question: what the template is filled with, a right answer, and the check."""

    slots: dict[str, str]
    answer: str
    check: Check


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of work."""

    level: Literal["easy", "medium", "hard"]
    max_tokens: int
    make: Callable[[Random, int, int], Item]
    """From a source of chance, the family (0 to 5) and the place in it, by which truths are balanced."""
    templates: Sequence[str]
    """Six, or one where families differ in what is asked."""


NAMES = _list("Anna Ben Carla David Elif Farid Grace Hugo Ines Jonas Kira Liam Mona Nils Olga Pedro Quinn Rosa Samir "
              "Tara Umar Vera Walt Zoe")  # fmt: skip
CITIES = _list("Berlin Paris Madrid Rome Oslo Lisbon Vienna Dublin Prague Athens Warsaw Budapest")
MONTHS = _list("January February March April May June July August September October November December")
COLOURS = _list("red blue green white black yellow")
THINGS = _list("car bicycle boat tent piano camera guitar lamp table scooter")
WORDS = _list("apple river stone cloud table green seven window paper silver garden music tiger bread ocean candle "
              "mountain yellow pencil rocket winter island bottle carpet dragon feather hammer jacket kettle ladder "
              "magnet needle orange pepper rabbit saddle tunnel velvet walnut zebra")  # fmt: skip
GROUPS = {
    "animal": _list("dog horse cow sheep lion rabbit tiger goat elephant wolf"),
    "fruit": _list("apple banana cherry grape lemon peach pear plum mango melon"),
    "tool": _list("hammer saw drill shovel axe wrench screwdriver rake pliers chisel"),
    "colour": _list("red blue green yellow purple orange brown pink grey black"),
    "vehicle": _list("car bus train bicycle truck ship tram plane boat tractor"),
    "body part": _list("hand foot knee elbow nose ear shoulder finger neck ankle"),
}
TOPICS = {
    "sports": ("The striker|Our goalkeeper|The tennis player|The young runner|The referee|The swimming team",
               "won the final|lost the match|scored twice|trained hard|broke the record|left the field"),
    "cooking": ("Fry the onions|Bake the cake|Boil the pasta|Stir the sauce|Chop the carrots|Roast the chicken",
                "for ten minutes|with a pinch of salt|until it is soft|in a large pan|with some butter|on low heat"),
    "weather": ("Heavy rain|A strong wind|Thick fog|Light snow|A thunderstorm|Warm sunshine",
                "is expected on Friday|came from the north|will last all day|covered the coast|ended in the evening|"
                "is likely tonight"),
    "music": ("The guitarist|The choir|A young singer|The orchestra|The drummer|The famous pianist",
              "played a new song|gave a concert|recorded an album|practised the melody|sang at the festival|"
              "wrote a symphony"),
}  # fmt: skip
FEELINGS = {
    "positive": ("The hotel|The phone|This book|The restaurant|The new chair|The film",
                 "was wonderful and I loved it|is the best I ever had|made me very happy|is great, I recommend it"),
    "negative": ("The hotel|The phone|This book|The restaurant|The new chair|The film",
                 "was terrible and I hated it|is the worst I ever had|made me very angry|is awful, do not buy it"),
    "neutral": ("The hotel|The phone|The book|The restaurant|The chair|The film",
                "was made in 2019|is on the list|comes in two sizes|is next to the station"),
}  # fmt: skip
FACTS = (
    ("What is the capital of {}?", "Italy=Rome Spain=Madrid Japan=Tokyo Egypt=Cairo Germany=Berlin Austria=Vienna "
     "Portugal=Lisbon Greece=Athens Norway=Oslo Ireland=Dublin Russia=Moscow China=Beijing Cuba=Havana"),
    ("What is the opposite of {}?", "hot=cold early=late big=small|little fast=slow happy=sad|unhappy "
     "open=closed|close light=dark|heavy old=young|new rich=poor full=empty strong=weak wet=dry hard=soft|easy"),
    ("What is the past tense of the verb {}?", "go=went eat=ate see=saw take=took write=wrote sing=sang drive=drove "
     "buy=bought think=thought give=gave speak=spoke know=knew teach=taught"),
    ("What is the plural of {}?", "mouse=mice child=children foot=feet tooth=teeth man=men goose=geese knife=knives "
     "leaf=leaves city=cities wolf=wolves box=boxes woman=women baby=babies"),
    ("On which continent is {}?", "Kenya=Africa France=Europe Japan=Asia Brazil=South_America Canada=North_America "
     "Nigeria=Africa Poland=Europe India=Asia Peru=South_America Mexico=North_America Egypt=Africa Spain=Europe "
     "China=Asia"),
    ("Which animal makes this: {}?", "milk=cow|cows honey=bee|bees wool=sheep eggs=hen|chicken|hens|chickens "
     "silk=silkworm|silkworms webs=spider|spiders pearls=oyster|oysters feathers=bird|birds bacon=pig|pigs "
     "beef=cow|cattle|cows nests=bird|birds dams=beaver|beavers ivory=elephant|elephants"),
)  # fmt: skip
UNITS = (("minutes", "hours", 60), ("days", "weeks", 7), ("cents", "dollars", 100), ("months", "years", 12),
         ("hours", "days", 24), ("legs", "dogs", 4))  # fmt: skip


def _one(draw: Random, parts: str) -> str:
    return draw.choice(parts.split("|"))


def _labelled(draw: Random, place: int, sentences: dict[str, tuple[str, str]]) -> Item:
    label = list(sentences)[place % len(sentences)]
    text = f"{' '.join(_one(draw, part) for part in sentences[label])}."
    return Item({"text": text}, label, {"type": "choice", "choices": list(sentences), "answer": label})


def _topic(draw: Random, family: int, place: int) -> Item:
    return _labelled(draw, place, TOPICS)


def _feeling(draw: Random, family: int, place: int) -> Item:
    return _labelled(draw, place, FEELINGS)


def _who(draw: Random, family: int, place: int) -> Item:
    names, things = draw.sample(NAMES, 3), draw.sample(THINGS, 3)
    text = " ".join(f"{n} has a {draw.choice(COLOURS)} {t}." for n, t in zip(names, things, strict=True))
    right = place % 3
    return Item({"text": text, "thing": things[right]}, names[right],
                {"type": "choice", "choices": names, "answer": names[right]})  # fmt: skip


def _extract(draw: Random, family: int, place: int) -> Item:
    name, city = draw.choice(NAMES), draw.choice(CITIES)
    number, day = draw.randint(1000, 9999), f"{draw.randint(1, 28)} {draw.choice(MONTHS)}"
    email = f"{name.lower()}{draw.randint(10, 99)}@{draw.choice(['example.com', 'mail.org', 'shop.net'])}"
    what, answer, text = [
        ("email address", email, f"Please send the invoice for {name} to {email} before Friday."),
        ("phone number", f"555-{number}", f"You can reach {name} in {city} under 555-{number} in the afternoon."),
        ("order number", f"A{number}", f"Order A{number} for {name} was shipped to {city} on Monday."),
        ("city", city, f"{name} moved to {city} last year and works there as a teacher."),
        ("date", day, f"The meeting with {name} in {city} will take place on {day} at noon."),
        ("price", f"${number / 100:.2f}", f"{name} bought the lamp in {city} for ${number / 100:.2f} yesterday."),
    ][family]
    return Item({"text": text, "what": what}, answer, {"type": "contains", "of": [answer]})


def _arithmetic(draw: Random, sign: str, most: int) -> Item:
    a, b = draw.randint(2, most), draw.randint(2, most)
    value = a + b if sign == "+" else a * b
    return Item({"a": str(a), "b": str(b)}, str(value), {"type": "number", "value": value})


def _odd(draw: Random, family: int, place: int) -> Item:
    groups = draw.sample([*GROUPS], 3)
    words, right = [draw.choice(GROUPS[group]) for group in groups], place % 3
    if "orange" in words:
        return _odd(draw, family, place)
    return Item({"words": ", ".join(words), "group": groups[right]}, words[right],
                {"type": "choice", "choices": words, "answer": words[right]})  # fmt: skip


def _json(draw: Random, family: int, place: int) -> Item:
    name, age, city = draw.choice(NAMES), draw.randint(18, 79), draw.choice(CITIES)
    text = draw.choice([f"{name} is {age} years old and lives in {city}.", f"{name}, {age}, comes from {city}.",
                        f"My neighbour {name} from {city} turned {age} in May."])  # fmt: skip
    text += f" {draw.choice(NAMES)}, {draw.randint(18, 79)}, lives next door."
    told = {"name": name, "age": age, "city": city}
    exactly = {key: {"const": value} for key, value in told.items()}
    schema = {"type": "object", "required": [*told], "properties": exactly}
    return Item({"text": text}, json.dumps(told), {"type": "json_schema", "schema": schema})


def _fact(draw: Random, family: int, place: int) -> Item:
    question, pairs = FACTS[family]
    what, answers = draw.choice(pairs.split()).replace("_", " ").split("=")
    of = answers.split("|")
    return Item({"question": question.format(what)}, of[0], {"type": "contains", "of": of})


def _format(draw: Random, family: int, place: int) -> Item:
    words = draw.sample(WORDS, 3)
    how, answer = [
        ("as a list separated by semicolons", "; ".join(words)),
        ("in capital letters, separated by commas", ", ".join(words).upper()),
        ("as a numbered list with 1., 2. and 3.", "\n".join(f"{k}. {w}" for k, w in enumerate(words, 1))),
        ("as a list with a hyphen before each", "\n".join(f"- {w}" for w in words)),
        ("joined by plus signs", " + ".join(words)),
        ("one on each line", "\n".join(words)),
    ][family]
    pattern = r"\s*".join(re.escape(part) for part in re.split(r"\s+", answer))
    return Item({"words": f"{words[0]}, {words[1]} and {words[2]}", "how": how}, answer,
                {"type": "regex", "pattern": rf"\s*{pattern}[.\s]*", "full": True})  # fmt: skip


def _copy(draw: Random, family: int, place: int) -> Item:
    words = " ".join(draw.sample(WORDS, 2 + place % 4))
    return Item({"words": words}, words, {"type": "contains", "of": [words]})


def _summary(draw: Random, family: int, place: int) -> Item:
    city, (who, what, why) = draw.choice(CITIES), draw.choice([
        ("library", "stay open until midnight", "Students asked for longer hours."),
        ("museum", "be free on Sundays", "More families shall come."),
        ("harbour", "close to cars in June", "Shop owners fear for their customers."),
        ("school", "plant two hundred trees", "The old ones were lost in a storm."),
        ("hospital", "buy a small robot", "It brings medicine to the rooms."),
        ("bakery", "sell bread at night", "Many people work late."),
        ("stadium", "get a new roof", "Rain ruined the last two finals."),
        ("theatre", "cut its prices by half", "Half of its seats were empty."),
        ("bridge", "be painted green", "The citizens voted for it."),
        ("airport", "ban flights at night", "Neighbours could not sleep."),
        ("zoo", "take in three young lions", "They lost their mother."),
        ("market", "move to the old square", "The new place was too small."),
    ])  # fmt: skip
    month = draw.choice(MONTHS)
    text = (f"After a long debate {city} has decided: the {who} will {what}. {why} {draw.choice(NAMES)} will lead the "
            f"work, which begins in {month} and costs {draw.randint(2, 90)} thousand euros.")  # fmt: skip
    short: Check = {"type": "regex", "pattern": r"\s*(\S+\s+){3,21}\S+\s*", "full": True}
    named: Check = {"type": "contains", "of": [who, city, month], "all": True}
    right = f"From {month} on the {who} of {city} will {what}."
    return Item({"text": text}, right, {"type": "all", "checks": [short, named]})


def _code(draw: Random, family: int, place: int) -> Item:
    n, word = draw.randint(2, 30), draw.choice(WORDS)
    name, args, does, body, test = draw.choice([
        ("add", "x", f"returns x plus {n}", f"x + {n}", f"f(3) == {3 + n} and f(-1) == {n - 1}"),
        ("scale", "x", f"returns x times {n}", f"x * {n}", f"f(3) == {3 * n} and f(0) == 0"),
        ("above", "x", f"returns True if x is greater than {n}, else False", f"x > {n}",
         f"f({n + 1}) is True and f({n}) is False"),
        ("first", "items", "returns the first element of a list", "items[0]",
         f"f([{n}, 1]) == {n} and f(['a']) == 'a'"),
        ("last", "items", "returns the last element of a list", "items[-1]", f"f([1, {n}]) == {n} and f(['a']) == 'a'"),
        ("total", "items", "returns the sum of a list of numbers", "sum(items)",
         f"f([{n}, 2]) == {n + 2} and f([]) == 0"),
        ("largest", "items", "returns the largest number of a list", "max(items)", f"f([1, {n}, 0]) == {n}"),
        ("shout", "text", "returns the text in upper case", "text.upper()", f"f('{word}') == '{word.upper()}'"),
        ("backwards", "text", "returns the text reversed", "text[::-1]", f"f('{word}') == '{word[::-1]}'"),
        ("size", "text", "returns the length of the text", "len(text)", f"f('{word}') == {len(word)} and f('') == 0"),
        ("label", "text", f"returns the text with '{word} ' before it", f"'{word} ' + text", f"f('b') == '{word} b'"),
        ("even", "x", "returns True if x is even, else False", "x % 2 == 0", "f(4) is True and f(3) is False"),
        ("square", "x", "returns x squared", "x * x", f"f({n}) == {n * n} and f(-2) == 4"),
        ("words", "text", "returns how many words the text has", "len(text.split())", f"f('{word} a b') == 3"),
    ])  # fmt: skip
    name = f"{name}_{draw.choice(WORDS)}"
    return Item({"name": name, "args": args, "does": does}, f"def {name}({args}):\n    return {body}",
                {"type": "code", "test": f"f = {name}\nassert {test}"})  # fmt: skip


def _unit(draw: Random, family: int, place: int) -> Item:
    part, whole, size = UNITS[family]
    n = draw.randint(1, 12)
    return Item({"n": str(n), "part": part, "whole": whole}, str(n * size), {"type": "number", "value": n * size})


def _sequence(draw: Random, family: int, place: int) -> Item:
    first, step = draw.randint(1, 30), draw.choice([1, 2, 3, 5, 10])
    series = [first + k * step for k in range(5)]
    return Item({"series": ", ".join(map(str, series[:4]))}, str(series[4]), {"type": "number", "value": series[4]})


def _letter(draw: Random, family: int, place: int) -> Item:
    word = draw.choice([one for one in WORDS if one[0] not in "adimst"])  # words of their own in "I can't", "it's a"
    return Item({"word": word}, word[0], {"type": "contains", "of": [word[0]]})


_SUMS = ("What is {a} SIGN {b}? Answer with the number only.", "Calculate {a} SIGN {b}. Write only the result.",
         "{a} SIGN {b} = ?", "Tell me the result of {a} SIGN {b}.", "Please work out: {a} SIGN {b}",
         "A pupil asks: how much is {a} SIGN {b}? Give the number.")  # fmt: skip


def _sums(sign: str, level: Literal["easy", "medium", "hard"], most: int) -> Kind:
    templates = [one.replace("SIGN", sign) for one in _SUMS]
    return Kind(level, 24, lambda draw, family, place: _arithmetic(draw, sign, most), templates)


KINDS = {
    "topic": Kind("medium", 12, _topic, (
        "Choose the topic of this text: sports, cooking, weather or music. Answer with one word.\nText: {text}",
        "{text}\nIs this about sports, cooking, weather or music? Write one word.",
        "Topics: sports, cooking, weather, music.\nWhich one fits this sentence best? {text}",
        "Label the sentence with sports, cooking, weather or music.\nSentence: {text}",
        "A newspaper has the pages sports, cooking, weather and music. On which page is this? {text}",
        "Read: {text}\nWrite its category: sports, cooking, weather or music.")),
    "feeling": Kind("medium", 12, _feeling, (
        "Is this review positive, negative or neutral? Answer with one word.\nReview: {text}",
        "{text}\nHow does the writer feel: positive, negative or neutral? Write one word.",
        "Label the sentence with positive, negative or neutral.\nSentence: {text}",
        "A customer wrote: {text} Was that positive, negative or neutral?",
        "Sentiment of this text (positive, negative, neutral): {text}",
        "Read: {text}\nAnswer with positive, negative or neutral only.")),
    "who": Kind("medium", 16, _who, (
        "{text} Who has the {thing}? Answer with the name only.", "Text: {text}\nWhose is the {thing}? Write one name.",
        "Read this: {text}\nWhich person has a {thing}?", "{text}\nI want to borrow the {thing}. Whom do I ask?",
        "{text}\nName the owner of the {thing}.", "Question: who owns the {thing}?\nText: {text}")),
    "extract": Kind("easy", 24, _extract, ("Find the {what} in this text and write only that.\nText: {text}",)),
    "add": _sums("+", "easy", 20),
    "times": _sums("times", "hard", 10),
    "odd": Kind("medium", 16, _odd, (
        "Which of these words is a {group}: {words}? Answer with one word.", "Words: {words}\nWhich one is a {group}?",
        "Pick the {group} from this list: {words}", "{words}\nOne of these is a {group}. Write it.",
        "I need a {group}. Choose one word of {words}.", "From {words}, name the {group} and nothing else.")),
    "json": Kind("hard", 60, _json, (
        'Write a JSON object with the keys "name", "age" and "city" for this text. Write only the JSON.\nText: {text}',
        '{text}\nTurn this into JSON with "name" (text), "age" (number) and "city" (text).',
        'Extract "name", "age" and "city" as JSON: {text}',
        'Fill in {{"name": ..., "age": ..., "city": ...}} from the text. Write only JSON.\nText: {text}',
        'Text: {text}\nJSON with the keys "name", "age", "city":',
        'A program reads your answer as JSON with "name", "age" and "city". Text: {text}')),
    "fact": Kind("easy", 24, _fact, ("{question} Answer in a few words.",)),
    "format": Kind("hard", 40, _format, ("Write the words {words} {how}. Write nothing else.",)),
    "copy": Kind("easy", 32, _copy, (
        "Repeat these words exactly and write nothing else: {words}", "Copy this text: {words}",
        "Write the following line once more: {words}", "Say exactly this: {words}", "Echo: {words}",
        "Type these words in the same order: {words}")),
    "summary": Kind("medium", 60, _summary, (
        "Summarise this text in one sentence of at most 20 words: what, where and from when?\n{text}",
        "{text}\nWrite a headline of at most 20 words for this, with place and month.",
        "What will happen where, and from when? Answer in one short sentence.\nText: {text}",
        "Text: {text}\nSummary in one short sentence, with place and month:",
        "Shorten this to one sentence with place and month: {text}",
        "Tell a friend in one short sentence what happens where, and from when: {text}")),
    "code": Kind("hard", 80, _code, (
        "Write a Python function {name}({args}) that {does}. Write only the code.",
        "Python: define {name}({args}), which {does}.", "Complete in Python. The function {name}({args}) {does}.",
        "I need Python code: def {name}({args}) that {does}. No explanation.",
        "Implement the function {name}({args}) in Python. It {does}.",
        "Give me a short Python function called {name} with the argument {args} that {does}.")),
    "unit": Kind("hard", 32, _unit, ("How many {part} do {n} {whole} have? Answer with the number only.",)),
    "sequence": Kind("medium", 24, _sequence, (
        "What is the next number: {series}? Answer with the number only.", "Continue with one number: {series},",
        "Which number comes after these: {series}", "The series {series} goes on. What is the next number?",
        "Numbers: {series}. Next number?", "Complete the pattern with one number: {series}, ?")),
    "letter": Kind("easy", 16, _letter, (
        "What is the first letter of the word {word}? Answer with the letter only.",
        "Write the first letter of {word}.", "With which letter does {word} begin?", "First letter of {word}?",
        "The word is {word}. Which letter comes first?", "Name the letter that starts the word {word}.")),
}  # fmt: skip
FAMILIES = 6


def records(seed: int = 7, each: int = FAMILY, form: Form = "chat") -> Iterator[dict[str, object]]:
    """Rows of the trace in the order of their times, ``each`` of every family."""
    draw = Random(f"{seed}")
    asked = [one for name, kind in KINDS.items() for family in range(FAMILIES) for one in _family(
        Random(f"{seed} {name} {family}"), name, kind, family, each, form)]  # fmt: skip
    draw.shuffle(asked)
    at = 0.0
    for row in asked:
        at += draw.expovariate(RATE)
        yield {"arrival_s": round(at, 3), **row}


def _family(draw: Random, name: str, kind: Kind, family: int, each: int, form: Form) -> Iterator[dict[str, object]]:
    template = kind.templates[family % len(kind.templates)]
    seen: set[str] = set()

    def fresh(place: int) -> tuple[str, Item]:
        for _ in range(1000):
            item = kind.make(draw, family, place)
            question = template.format(**item.slots)
            if question not in seen:
                seen.add(question)
                return question, item
        raise ValueError(f"{name} has fewer than {each} different questions in family {family}")

    cue = "Answer:\n" if name == "code" else "Answer: "  # a space before it would be an indent
    shots = "".join(f"Task: {question}\n{cue}{item.answer}\n\n" for question, item in map(fresh, range(SHOTS)))
    for place in range(each):
        question, item = fresh(place + family)
        said: dict[str, object] = (
            {"messages": [{"role": "user", "content": question}]}
            if form == "chat"
            else {"prompt": f"{shots}Task: {question}\n{cue}".rstrip(" ")}
        )
        yield {
            **said, "session_id": f"{name}-{family}", "turn": 0, "max_tokens": kind.max_tokens, "answer": item.answer,
            "check": item.check, "tags": {"kind": name, "level": kind.level},
        }  # fmt: skip


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to write.")
@click.option("--form", type=click.Choice(["chat", "few-shot"]), default="chat", show_default=True)
@click.option("--each", type=click.IntRange(1, 8), default=FAMILY, show_default=True, help="Records of a family.")
@click.option("--seed", type=int, default=7, show_default=True)
def main(output: Path, form: Form, each: int, seed: int) -> None:
    """Write a trace of graded prompts for small models, for harness audit."""
    rows = list(records(seed, each, form))
    output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    click.echo(f"{len(rows):,} records in {len(KINDS) * FAMILIES} families of {len(KINDS)} kinds: {output}")


if __name__ == "__main__":
    main()
