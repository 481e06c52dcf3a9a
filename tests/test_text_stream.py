"""TextStream: the pieces add up to the whole decoding, and none ends inside a UTF-8 character."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from orin_kit.tokenizer import ChatTokenizer, TextStream

DEMO = Path(__file__).parents[1] / "calibration/demo-teacher"
TEXTS = {
    "ascii": "The answer is 42.\nNext line,\ttabbed.",
    "emoji": "😀 👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🇯🇵 and 👍🏽!",
    "combining": "e\u0301a\u0308 n\u0303 \u0928\u092e\u0938\u094d\u0924\u0947 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!",
    "cjk": "日本語の文章。中文測試，한국어 텍스트。𠮷野家",
    "mixed": "a中b😀c é日 ß",
    "replacement": "a real \ufffd in the text, twice \ufffd\ufffd.",
}


def byte_level(directory: Path) -> ChatTokenizer:
    """The demo tokenizer: whatever it has not seen in training is spelled out byte by byte."""
    for file in DEMO.iterdir():
        if file.suffix in (".json", ".jinja"):
            (directory / file.name).write_bytes(file.read_bytes())
    return ChatTokenizer(directory)


def byte_fallback(directory: Path) -> ChatTokenizer:
    """As Llama 2 and Mistral: blanks are U+2581, and characters out of vocabulary are tokens like <0xE4>."""
    letters = [chr(c) for c in range(33, 127)] + ["\u2581", "\u2581T", "\u2581answer"]
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters])}
    tokenizer = Tokenizer(models.Unigram([(t, -1.0) for t in vocab], unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return ChatTokenizer(directory)


def metaspace(directory: Path) -> ChatTokenizer:
    """A tokenizer whose decoder strips the blank before a text's first word, and has characters as tokens."""
    characters = sorted(set("".join(TEXTS.values())) - {" "})
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "\u2581", *characters])}
    tokenizer = Tokenizer(models.Unigram([(t, -1.0) for t in vocab], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return ChatTokenizer(directory)


@pytest.fixture(params=[byte_level, byte_fallback, metaspace])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> ChatTokenizer:
    made: ChatTokenizer = request.param(tmp_path)
    return made


def pieces(tokenizer: ChatTokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(i) for i in ids), stream.close()]


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_add_up_and_none_is_half_a_character(tokenizer: ChatTokenizer, name: str) -> None:
    ids = tokenizer.encode(TEXTS[name])
    given = pieces(tokenizer, ids)
    assert "".join(given) == tokenizer.decode(ids) == TEXTS[name]
    if name != "replacement":
        assert not any("\ufffd" in piece for piece in given)


@pytest.mark.parametrize("name", ["emoji", "cjk", "mixed"])
def test_a_character_comes_with_its_last_token(tokenizer: ChatTokenizer, name: str) -> None:
    """Nothing is held back longer than needed: at every whole character all of the text so far has been given out."""
    ids, stream, said = tokenizer.encode(TEXTS[name]), TextStream(tokenizer), ""
    for count, token in enumerate(ids, 1):
        said += stream.push(token)
        so_far = tokenizer.decode(ids[:count])
        if not so_far.endswith("\ufffd"):
            assert said == so_far


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_answer_cut_inside_a_character_ends_in_replacement(tmp_path: Path, cut: int) -> None:
    tokenizer = byte_level(tmp_path)
    ids = tokenizer.encode("ok 😀")
    assert len(tokenizer.encode("😀")) == 4  # one token a byte
    given = pieces(tokenizer, ids[: len(ids) - cut])
    assert "".join(given[:-1]).rstrip() == "ok"
    assert given[-1].strip() and set(given[-1].strip()) == {"\ufffd"}
    assert "".join(given) == tokenizer.decode(ids[: len(ids) - cut])


def test_bytes_that_are_no_utf8_do_not_hold_back_what_follows(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    tail = tokenizer.encode("😀")[-1:]  # a continuation byte without its character
    ids = [*tokenizer.encode("x"), *tail, *tokenizer.encode("yes, 日本")]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == "x\ufffdyes, 日本"


def test_special_tokens_are_silent_and_cost_no_blank(tokenizer: ChatTokenizer) -> None:
    stop = tokenizer.id_of("</s>") or tokenizer.id_of("<|im_end|>")
    assert stop is not None
    ids = [stop, *tokenizer.encode("The answer"), stop, *tokenizer.encode(" is"), stop, stop]
    given = pieces(tokenizer, ids)
    assert "".join(given) == tokenizer.decode(ids)
    shown = TextStream(tokenizer, skip_special=False)
    assert "".join([*(shown.push(i) for i in ids), shown.close()]) == tokenizer.decode(ids, skip_special=False)


def test_any_tokens_of_a_byte_level_model_add_up(tmp_path: Path) -> None:
    """A random model's output: bytes in any order, invalid most of the time."""
    tokenizer = byte_level(tmp_path)
    rng = random.Random()
    for _ in range(200):
        ids = [rng.randrange(len(tokenizer)) if rng.random() < 0.3 else rng.randrange(3, 259) for _ in range(40)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
