"""Synthetic reasoning tasks: short problems whose steps and answers are known exactly.

Each problem has a *key*: the numbers, letters, words and relations that make it this problem, without its phrasing.
The key alone decides the split, so no wording of a test problem can ever be found in the training data.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from orin_kit.data.chat import Chat, Message
from orin_kit.errors import UserError

SPLITS = ("train", "calibration", "test")
EXHAUSTED = 20_000  # known problems in a row: there are hardly any others


@dataclass(frozen=True)
class Task:
    """One problem: what is asked, the worked steps, and the only right answer."""

    kind: str
    key: str
    question: str
    steps: str
    answer: str

    @property
    def response(self) -> str:
        """What a perfect assistant says: `<think>steps</think>` and, on its own line, the answer."""
        return f"<think>{self.steps}</think>\n{self.answer}"

    def chat(self) -> Chat:
        return (Message("user", self.question), Message("assistant", self.response))


def split_of(kind: str, key: str) -> str:
    """The split a problem belongs to: of ten hash buckets one is `test`, one `calibration`, eight `train`."""
    bucket = hashlib.blake2b(f"{kind}:{key}".encode(), digest_size=4).digest()
    return {0: "test", 1: "calibration"}.get(int.from_bytes(bucket, "big") % 10, "train")


def generate(split: str, seed: int, kinds: Sequence[str] = ()) -> Iterator[Task]:
    """An endless stream of problems of one split; the same seed gives the same stream.

    Args:
        split: one of `SPLITS`.
        seed: any integer; streams of different seeds are independent draws from the same problem space.
        kinds: names in `KINDS`, in turn; all of them when empty.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    rng = random.Random(f"{split}-{seed}")
    names = list(kinds or KINDS)
    while True:
        for kind in names:
            task = KINDS[kind](rng)
            while split_of(task.kind, task.key) != split:
                task = KINDS[kind](rng)
            yield task


def distinct(split: str, seed: int, count: int, kinds: Sequence[str] = ()) -> list[Task]:
    """The first `count` problems of a stream with no key twice (what test sets and finite training sets use).

    Raises:
        UserError: these kinds have not so many.
    """
    seen: dict[tuple[str, str], Task] = {}
    known = 0  # drawn since the last new one
    for task in generate(split, seed, kinds):
        known = 0 if seen.setdefault((task.kind, task.key), task) is task else known + 1
        if len(seen) == count:
            break
        if known == EXHAUSTED:
            named = ", ".join(kinds or KINDS)
            raise UserError(f"{count} different problems of {named}: there are about {len(seen)}", "ask for fewer")
    return list(seen.values())


# --- arithmetic ------------------------------------------------------------------------------------------------------

NAMES = "Ana Ben Cleo Dan Eva Finn Gil Hana Ivan June Kai Lena Max Nora Omar Pia Rosa Sam Tess Vera".split()
THINGS = "apples books coins cards eggs keys lemons marbles nuts pens shells stamps".split()
GAINS = ("buys {n} more", "finds {n} more", "gets {n} more")
LOSSES = ("gives {n} away", "loses {n}", "sells {n}")


def arithmetic(rng: random.Random) -> Task:
    """Two or three steps of +, - and x on whole numbers below 200."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    if rng.random() < 0.4:
        boxes, each = rng.randint(2, 9), rng.randint(2, 9)
        total, steps = boxes * each, [f"{boxes} x {each} = {boxes * each}."]
        opening = f"{name} has {boxes} boxes with {each} {things} in each."
        key = f"{boxes}x{each}"
    else:
        total, steps = rng.randint(3, 60), []
        opening, key = f"{name} has {total} {things}.", f"{total}"
    events = []
    for _ in range(rng.randint(1, 2) if steps else 2):
        gain = total < 8 or (total < 140 and rng.random() < 0.5)
        n = rng.randint(2, 40) if gain else rng.randint(2, min(total - 1, 40))
        after = total + n if gain else total - n
        sign = "+" if gain else "-"
        events.append(rng.choice(GAINS if gain else LOSSES).format(n=n))
        steps.append(f"{total} {sign} {n} = {after}.")
        key, total = f"{key}{sign}{n}", after
    question = f"{opening} {name} {' and then '.join(events)}. How many {things} does {name} have now?"
    return Task("arithmetic", key, question, " ".join(steps), str(total))


# --- ordering --------------------------------------------------------------------------------------------------------

RANKS = ("", "second ", "third ")


def ordering(rng: random.Random) -> Task:
    """Sort four or five numbers, or name the k-th smallest or largest."""
    numbers = rng.sample(range(1, 100), rng.randint(4, 5))
    rising = rng.random() < 0.5
    ordered = sorted(numbers, reverse=not rising)
    listed, end = ", ".join(map(str, numbers)), ("smallest" if rising else "largest")
    steps = f" {'<' if rising else '>'} ".join(map(str, ordered)) + "."
    rank = rng.randrange(4)
    if rank == 3:
        other = "largest" if rising else "smallest"
        question, answer = f"Sort these numbers from {end} to {other}: {listed}.", ", ".join(map(str, ordered))
    else:
        question, answer = f"What is the {RANKS[rank]}{end} of these numbers: {listed}?", str(ordered[rank])
    return Task("ordering", "-".join(map(str, sorted(numbers))), question, steps, answer)


# --- counting --------------------------------------------------------------------------------------------------------

COUNTED = {
    "colour": "red blue green black white".split(),
    "animal": "cat dog cow hen pig".split(),
    "shape": "circle square star cross heart".split(),
}


def counting(rng: random.Random) -> Task:
    """How often one word stands in a list of five to nine."""
    group = rng.choice(list(COUNTED))
    words = COUNTED[group]
    wanted = rng.choice(words)
    listed = [wanted if rng.random() < 0.4 else rng.choice(words) for _ in range(rng.randint(5, 9))]
    steps, count = [], 0
    for word in listed:
        count += word == wanted
        steps.append(f"{word} {count}" if word == wanted else word)
    question = rng.choice(
        (f"How many times does {wanted} appear in this list: {{}}?", f"Count the word {wanted} in this list: {{}}.")
    ).format(", ".join(listed))
    return Task("counting", f"{wanted}:{' '.join(listed)}", question, ", ".join(steps) + ".", str(count))


# --- string transforms -----------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _backwards(letters: str) -> str:
    """Number the letters, then read them from the last number down."""
    numbered = [f"{i} {c}" for i, c in enumerate(letters, 1)]
    return ", ".join(numbered) + ". Backwards: " + ", ".join(reversed(numbered)) + "."


def strings(rng: random.Random) -> Task:
    """Reverse, drop, double, move or replace letters in a row of four to six."""
    letters = "".join(rng.sample(LETTERS, rng.randint(4, 6)))
    spelled, one = " ".join(letters), rng.choice(letters)
    new = rng.choice([c for c in LETTERS if c not in letters])
    without, doubled, replaced = letters.replace(one, ""), "".join(c + c for c in letters), letters.replace(one, new)
    marked = ", ".join(f"{c} out" if c == one else c for c in letters) + "."
    pairs, rest = ", ".join(f"{c} {c}" for c in letters), " ".join(letters[1:])
    variants = {  # verb: order, steps, result
        "reverse": (f"Reverse the letters: {spelled}.", _backwards(letters), letters[::-1]),
        "drop": (f"Remove the letter {one} from: {spelled}.", marked, without),
        "double": (f"Write every letter twice: {spelled}.", f"{pairs}.", doubled),
        "move": (
            f"Move the first letter to the end: {spelled}.",
            f"First {letters[0]}, rest {rest}.",
            letters[1:] + letters[0],
        ),
        "replace": (f"Change {one} to {new} in: {spelled}.", f"{one} becomes {new}.", replaced),
        "drop-reverse": (
            f"Remove the letter {one}, then reverse the letters: {spelled}.",
            f"{marked} {_backwards(without)}",
            without[::-1],
        ),
    }
    verb = rng.choice(list(variants))
    order, steps, result = variants[verb]
    detail = {"drop": one, "drop-reverse": one, "replace": one + new}.get(verb, "")
    return Task("strings", f"{verb}:{letters}:{detail}", order, steps, " ".join(result))


# --- logic -----------------------------------------------------------------------------------------------------------

COMPARISONS = (("older", "younger", "oldest", "youngest"), ("taller", "shorter", "tallest", "shortest"),
               ("faster", "slower", "fastest", "slowest"))  # fmt: skip
CREATURES = "blip dax fep glim jorn kip mef plon quib rint tove wug zib".split()


def logic(rng: random.Random) -> Task:
    """Chains of comparison ("who is oldest") or of membership ("is Pip a wug")."""
    return _comparison(rng) if rng.random() < 0.6 else _membership(rng)


def _comparison(rng: random.Random) -> Task:
    people = rng.sample(NAMES, rng.randint(3, 4))
    more, less, most, least = rng.choice(COMPARISONS)
    facts = [
        f"{a} is {more} than {b}." if rng.random() < 0.5 else f"{b} is {less} than {a}." for a, b in pairwise(people)
    ]
    rng.shuffle(facts)
    top = rng.random() < 0.5
    question = f"{' '.join(facts)} Who is the {most if top else least}?"
    key = f"{more}:{'>'.join(people)}"
    return Task("logic", key, question, " > ".join(people) + ".", people[0] if top else people[-1])


def _membership(rng: random.Random) -> Task:
    name, kinds = rng.choice(NAMES), rng.sample(CREATURES, 4)
    chain, stranger = kinds[:3], kinds[3]
    facts = [f"Every {a} is a {b}." for a, b in pairwise(chain)]
    facts.append(f"Every {stranger} is a {chain[0]}.")
    rng.shuffle(facts)
    asked = rng.choice((chain[2], stranger))
    steps = f"{name} is a {chain[0]}, so a {chain[1]}, so a {chain[2]}."
    question = f"{' '.join(facts)} {name} is a {chain[0]}. Must {name} be a {asked}?"
    return Task("logic", f"{'<'.join(kinds)}?{asked}", question, steps, "yes" if asked == chain[2] else "no")


# --- unit conversion -------------------------------------------------------------------------------------------------

UNITS = (  # (large unit, small unit, how many small in one large)
    ("weeks", "days", 7),
    ("dozens", "single eggs", 12),
    ("feet", "inches", 12),
    ("days", "hours", 24),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("meters", "centimeters", 100),
    ("euros", "cents", 100),
)


def conversion(rng: random.Random) -> Task:
    """A length of time, distance or money in smaller units, or split into larger and smaller ones."""
    large, small, factor = rng.choice(UNITS)
    many, rest = rng.randint(2, 9), rng.randint(1, factor - 1)
    product, key = many * factor, f"{factor}*{many}+{rest}"
    if rng.random() < 0.6:
        question = f"How many {small} are {many} {large} and {rest} {small}?"
        steps = f"{many} x {factor} = {product}. {product} + {rest} = {product + rest}."
        return Task("conversion", key, question, steps, str(product + rest))
    question = f"How many whole {large} and how many {small} are {product + rest} {small}?"
    steps = f"{many} x {factor} = {product}. {product + rest} - {product} = {rest}."
    return Task("conversion", key, question, steps, f"{many} {large} and {rest} {small}")


KINDS: dict[str, Callable[[random.Random], Task]] = {
    f.__name__: f for f in (arithmetic, ordering, counting, strings, logic, conversion)
}
