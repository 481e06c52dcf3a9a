"""The chat set: everyday questions, translations, mails, code, rewriting, device commands; some of several turns."""

# ruff: noqa: E501

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from chat_texts import (
    ADVICE,
    ASKS,
    CODE,
    CONCEPTS,
    COUNTRIES,
    DEVICE,
    LANGUAGES,
    MAILS,
    PHRASES,
    RECIPES,
    REWRITES,
    TONES,
)  # fmt: skip

from orin_kit.data.chat import Chat, Message

FIELDS = ("country", "capital", "continent", "currency", "language")


def chat(*turns: str, system: str | None = None) -> Chat:
    """Turns of user and assistant, one after the other."""
    messages = [Message("system", system)] if system else []
    return (*messages, *(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns)))


def chat_set(seed: int = 0) -> list[Chat]:
    """All of them, shuffled."""
    rng = random.Random(seed)
    chats = [made for family in (concepts, countries, tables, translations, recipes, mails, code, rewrites, devices,
                                 advice) for made in family(rng)]  # fmt: skip
    rng.shuffle(chats)
    return chats


def concepts(rng: random.Random) -> Iterator[Chat]:
    names = list(CONCEPTS)
    for i, (name, text) in enumerate(CONCEPTS.items()):
        yield chat(ASKS[i % len(ASKS)].format(name), text)
        other = rng.choice([n for n in names if n != name])
        first, second = text.split(". ", 1)
        yield chat(f"Explain {name} in one sentence.", f"{first}.", "And what else should I know?", second,
                   f"Thanks! And {other}?", CONCEPTS[other])  # fmt: skip


def countries(rng: random.Random) -> Iterator[Chat]:
    for name, capital, continent, currency, language in COUNTRIES:
        yield chat(f"What is the capital of {name}?", f"The capital of {name} is {capital}.",
                   "What do people speak and pay with there?",
                   f"They speak {language}, and pay with the {currency}.")  # fmt: skip
        yield chat(f"I am travelling to {name} next month. Any basics I should know?",
                   f"{name} lies in {continent}. Its capital is {capital}, the official language is {language}, and you "
                   f"pay in {currency}. Check the entry rules for your passport and take a plug adapter.")  # fmt: skip


def tables(rng: random.Random) -> Iterator[Chat]:
    for _ in range(24):
        rows = [dict(zip(FIELDS, row, strict=True)) for row in rng.sample(COUNTRIES, 3)]
        fields = rng.sample(FIELDS[1:], 2)
        picked = [{"country": row["country"], **{f: row[f] for f in fields}} for row in rows]
        text = "; ".join(", ".join(f"{k}: {v}" for k, v in row.items()) for row in picked)
        if rng.random() < 0.5:
            answer = "```json\n" + json.dumps(picked, ensure_ascii=False, indent=2) + "\n```"
            yield chat(f"Turn this into JSON: {text}", answer)
        else:
            head = ["country", *fields]
            lines = [head, ["---"] * 3, *([row[f] for f in head] for row in picked)]
            answer = "\n".join("| " + " | ".join(line) + " |" for line in lines)
            yield chat(f"Make a Markdown table of this: {text}", answer)


def translations(rng: random.Random) -> Iterator[Chat]:
    for english, *others in PHRASES:
        for language, text in zip(LANGUAGES, others, strict=True):
            yield chat(f'How do you say "{english}" in {language}?', f'In {language} you say: "{text}"')
        language, text = rng.choice(list(zip(LANGUAGES, others, strict=True)))
        yield chat(text, english, system=f"Translate every message from {language} into English. Say nothing else.")


def recipes(rng: random.Random) -> Iterator[Chat]:
    for dish, (ingredients, steps) in RECIPES.items():
        numbered = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
        yield chat(f"How do I make {dish}?", f"You need: {ingredients}.\n\n{numbered}")
        bullets = "\n".join(f"- {item.strip()}" for item in ingredients.split(","))
        yield chat(
            f"Write a shopping list for {dish}.", bullets, "And how is it done, in one paragraph?", " ".join(steps)
        )


def mails(rng: random.Random) -> Iterator[Chat]:
    for i, (who, what, close) in enumerate(MAILS):
        for tone in (TONES[i % len(TONES)], TONES[(i + 1) % len(TONES)]):
            formal = tone in ("formal", "polite")
            hello, bye = ("Dear Sir or Madam,", "Yours faithfully,") if formal else ("Hello,", "Best wishes,")
            opening = "I am writing to let you know that" if formal else "Just to let you know:"
            yield chat(f"Write a {tone} email to {who} saying that {what}.",
                       f"{hello}\n\n{opening} {what.replace('their order', 'your order')}. {close}\n\n{bye}\nAlex")  # fmt: skip


def code(rng: random.Random) -> Iterator[Chat]:
    for question, text, note in CODE:
        yield chat(question, f"```\n{text}\n```\n{note}")
        yield chat(f"What does this code do?\n\n{text}", f"It answers this request: {question} {note}")


def rewrites(rng: random.Random) -> Iterator[Chat]:
    for before, after in REWRITES:
        yield chat(f"Make this sentence better: {before}", after)
        words = len(after.split())
        yield chat(f"Rewrite this clearly and correctly, please.\n\n{before}", after, "How many words is that?",
                   f"It has {words} words; the original had {len(before.split())}.")  # fmt: skip


def devices(rng: random.Random) -> Iterator[Chat]:
    system = "You control a home robot. Answer with JSON only."
    for said, done in DEVICE:
        yield chat(said, done, system=system)
    for _ in range(20):
        (a, b), (c, d), (e, f) = rng.sample(DEVICE, 3)
        yield chat(a, b, c, d, e, f, system=system)


def advice(rng: random.Random) -> Iterator[Chat]:
    for question, answer in ADVICE:
        yield chat(question, answer)
        sentences = [s.strip(" .") for s in answer.split(". ")]
        yield chat(f"{question} Give me a short list.", "\n".join(f"- {s}" for s in sentences))
        yield chat(question, f"{sentences[0]}.", "Go on.", ". ".join(sentences[1:]) + ".",
                   "Thank you, that helps.", "You are welcome! Ask me any time.")  # fmt: skip
