"""The reasoning set: word problems whose steps are worked out in `<think>`, and the synthetic tasks."""

# ruff: noqa: E501

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

from orin_kit.data.chat import Chat, Message
from orin_kit.data.tasks import distinct

PER_FAMILY = 14
SYNTHETIC = 110
PEOPLE = "Amir Bea Carl Dora Emil Fay Gus Ines Jan Kim Leo Mia Ned Olga Paul Rita".split()
GOODS = ("a jacket", "a lamp", "a backpack", "a keyboard", "a pair of shoes", "a kettle")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def problem(question: str, steps: str, answer: str) -> Chat:
    return (Message("user", question), Message("assistant", f"<think>{steps}</think>\n{answer}"))


def reasoning_set(seed: int = 0) -> list[Chat]:
    """All of them, shuffled."""
    rng = random.Random(seed)
    chats = [task.chat() for task in distinct("calibration", seed=17, count=SYNTHETIC)]
    for family in FAMILIES:
        made: dict[Chat, None] = {}
        while len(made) < PER_FAMILY:
            made[family(rng)] = None
        chats += made
    rng.shuffle(chats)
    return chats


def discount(rng: random.Random) -> Chat:
    price, off, thing = 10 * rng.randint(3, 30), rng.choice((5, 10, 15, 20, 25, 30, 40)), rng.choice(GOODS)
    saved = Fraction(price * off, 100)
    left = price - saved
    return problem(
        f"{thing.capitalize()} costs {price} euros. In the sale it is {off}% cheaper. What does it cost now?",
        f"{off}% of {price} is {price} * {off} / 100 = {float(saved):g}. The new price is {price} - {float(saved):g} = "
        f"{float(left):g}.", f"It costs {float(left):g} euros.",
    )  # fmt: skip


def travel(rng: random.Random) -> Chat:
    speed, minutes = 5 * rng.randint(8, 26), 15 * rng.randint(2, 14)
    distance = Fraction(speed * minutes, 60)
    return problem(
        f"A train goes {speed} km/h on average. How far does it get in {minutes} minutes?",
        f"{minutes} minutes are {minutes}/60 = {minutes / 60:g} hours. Distance is speed times time: {speed} * "
        f"{minutes / 60:g} = {float(distance):g} km.", f"{float(distance):g} km",
    )  # fmt: skip


def average(rng: random.Random) -> Chat:
    n = rng.randint(3, 6)
    numbers = [rng.randint(2, 40) for _ in range(n)]
    numbers[-1] += -sum(numbers) % n
    total, listed = sum(numbers), ", ".join(map(str, numbers))
    return problem(
        f"What is the average of {listed}?",
        f"The sum is {' + '.join(map(str, numbers))} = {total}. There are {n} numbers, and {total} / {n} = "
        f"{total // n}.", f"The average is {total // n}.",
    )  # fmt: skip


def marbles(rng: random.Random) -> Chat:
    red, blue, green = (rng.randint(1, 9) for _ in range(3))
    total, share = red + blue + green, Fraction(red, red + blue + green)
    reduced = "" if share.denominator == total else f" Reduced, that is {share}."
    return problem(
        f"A bag holds {red} red, {blue} blue and {green} green marbles. You draw one without looking. How likely is a "
        "red one?", f"There are {red} + {blue} + {green} = {total} marbles, and {red} of them are red, so the "
        f"probability is {red}/{total}.{reduced}", f"{share}",
    )  # fmt: skip


def ages(rng: random.Random) -> Chat:
    a, b = rng.sample(PEOPLE, 2)
    young, more, later = rng.randint(4, 20), rng.randint(2, 15), rng.randint(2, 12)
    old = young + more
    return problem(
        f"{a} is {more} years older than {b}. Together they are {young + old}. How old will {a} be in {later} years?",
        f"Let {b} be x. Then x + (x + {more}) = {young + old}, so 2x = {2 * young} and x = {young}. {a} is {young} + "
        f"{more} = {old} now, and {old} + {later} = {old + later} then.", f"{a} will be {old + later}.",
    )  # fmt: skip


def garden(rng: random.Random) -> Chat:
    long, wide, each = rng.randint(6, 30), rng.randint(3, 20), rng.randint(2, 9)
    around = 2 * (long + wide)
    return problem(
        f"A garden is {long} m long and {wide} m wide. A fence costs {each} euros a metre. What are its area and the "
        "price of a fence all around?", f"Area: {long} * {wide} = {long * wide} square metres. Perimeter: 2 * ({long} + "
        f"{wide}) = {around} m. Price: {around} * {each} = {around * each}.",
        f"The area is {long * wide} square metres, and the fence costs {around * each} euros.",
    )  # fmt: skip


def weekday(rng: random.Random) -> Chat:
    start, ahead = rng.randrange(7), rng.randint(8, 120)
    weeks, rest = divmod(ahead, 7)
    return problem(
        f"Today is {DAYS[start]}. Which day of the week is it in {ahead} days?",
        f"{ahead} = {weeks} * 7 + {rest}, so only {rest} days count. {DAYS[start]} plus {rest} is "
        f"{DAYS[(start + rest) % 7]}.", DAYS[(start + rest) % 7],
    )  # fmt: skip


def progression(rng: random.Random) -> Chat:
    first, step = rng.randint(1, 30), rng.choice((-4, -3, 3, 4, 6, 7, 9, 11))
    if rng.random() < 0.5:
        terms = [first + i * step for i in range(5)]
        why = f"Each number is {abs(step)} {'more' if step > 0 else 'less'} than the one before."
        following = terms[-1] + step
    else:
        factor = rng.choice((2, 3))
        terms = [first * factor**i for i in range(5)]
        why, following = f"Each number is {factor} times the one before.", terms[-1] * factor
    return problem(f"Continue: {', '.join(map(str, terms))}, ...", f"{why} So after {terms[-1]} comes {following}.",
                   str(following))  # fmt: skip


def equation(rng: random.Random) -> Chat:
    x, a, b, c = rng.randint(-9, 12), rng.randint(3, 9), rng.randint(1, 30), 2
    right = a * x + b - c * x
    moved = right - b
    return problem(
        f"Solve for x: {a}x + {b} = {c}x + {right}" if right >= 0 else f"Solve for x: {a}x + {b} = {c}x - {-right}",
        f"Subtract {c}x on both sides: {a - c}x + {b} = {right}. Subtract {b}: {a - c}x = {moved}. Divide by {a - c}: "
        f"x = {x}.", f"x = {x}",
    )  # fmt: skip


def trace(rng: random.Random) -> Chat:
    start, times, add = rng.randint(0, 9), rng.randint(3, 5), rng.randint(2, 6)
    value, said = start, []
    for i in range(times):
        before = value
        value = value + add if i % 2 == 0 else value * 2
        said.append(f"i = {i}: x = {before} {'+ ' + str(add) if i % 2 == 0 else '* 2'} = {value}.")
    program = f"x = {start}\nfor i in range({times}):\n    if i % 2 == 0:\n        x += {add}\n    else:\n        x *= 2\nprint(x)"  # fmt: skip
    return problem(f"What does this program print?\n\n{program}", " ".join(said), str(value))


def workers(rng: random.Random) -> Chat:
    a, b = rng.choice(((3, 6), (4, 12), (6, 12), (10, 15), (6, 3), (20, 30), (12, 4), (5, 20), (8, 24), (9, 18), (10, 40),
                       (12, 6), (15, 10), (15, 30), (14, 35), (21, 28), (18, 9), (30, 60), (36, 45)))  # fmt: skip
    p, q = rng.sample(PEOPLE, 2)
    together = Fraction(a * b, a + b)
    return problem(
        f"{p} paints a fence in {a} hours, {q} in {b} hours. How long do they take together?",
        f"In an hour {p} does 1/{a} and {q} 1/{b}; together that is {Fraction(1, a) + Fraction(1, b)} of the fence. The "
        f"whole takes 1 / ({Fraction(1, a) + Fraction(1, b)}) = {together} hours.", f"{float(together):g} hours",
    )  # fmt: skip


def change(rng: random.Random) -> Chat:
    n, cents, note = rng.randint(2, 7), 5 * rng.randint(8, 70), rng.choice((20, 50))
    cost = n * cents
    note = 50 if cost > 2000 else note
    return problem(
        f"{rng.choice(PEOPLE)} buys {n} notebooks at {cents / 100:.2f} euros each and pays with a {note} euro note. How "
        "much change is due?", f"{n} * {cents / 100:.2f} = {cost / 100:.2f} euros. {note} - {cost / 100:.2f} = "
        f"{(100 * note - cost) / 100:.2f}.", f"{(100 * note - cost) / 100:.2f} euros",
    )  # fmt: skip


def units(rng: random.Random) -> Chat:
    hours, minutes = rng.randint(1, 9), rng.randint(1, 59)
    total = 60 * hours + minutes
    return problem(
        f"How many seconds are {hours} hours and {minutes} minutes?",
        f"{hours} hours are {hours} * 60 = {60 * hours} minutes, and with {minutes} more that is {total} minutes. {total} "
        f"* 60 = {60 * total}.", f"{60 * total} seconds",
    )  # fmt: skip


def larger(rng: random.Random) -> Chat:
    while True:
        a, b, c, d = (rng.randint(1, 12) for _ in range(4))
        b, d = b + a, d + c
        if Fraction(a, b) != Fraction(c, d) and b != d:
            break
    sign, winner = (">", f"{a}/{b}") if a * d > c * b else ("<", f"{c}/{d}")
    return problem(
        f"Which is larger, {a}/{b} or {c}/{d}?", f"Multiply crosswise: {a} * {d} = {a * d} and {c} * {b} = {c * b}. "
        f"{a * d} {sign} {c * b}, so {a}/{b} {sign} {c}/{d}.", f"{winner} is larger.",
    )  # fmt: skip


def queue(rng: random.Random) -> Chat:
    a, b, c, d = rng.sample(PEOPLE, 4)
    facts = [f"{a} stands before {b}.", f"{b} stands before {c}.", f"{c} stands before {d}."]
    shuffled = rng.sample(facts, 3)
    who, place = rng.choice(((a, "first"), (d, "last")))
    return problem(
        f"{' '.join(shuffled)} Who is {place}?", f"From the statements, {a} is before {b}, {b} before {c}, and {c} before "
        f"{d}. The order is {a}, {b}, {c}, {d}, so {who} is {place}.", who,
    )  # fmt: skip


FAMILIES: tuple[Callable[[random.Random], Chat], ...] = (
    discount, travel, average, marbles, ages, garden, weekday, progression, equation, trace, workers, change, units, larger,
    queue,
)  # fmt: skip
