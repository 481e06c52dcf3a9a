"""Back-translation with two tiny Marian models that know a dozen sentences by heart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from families import save_model
from marian import SMALL, save_marian
from orin_kit.data import back_translation
from orin_kit.data.augment import apply_changes
from orin_kit.data.back_translation import Decoding, Translator, back_translate
from orin_kit.data.chat import Chat, Message
from orin_kit.errors import ArtifactError, OrinKitError, UserError

# sentence, what the first model makes of it, what the second makes of that, and the verdict
SENTENCES = (
    ("Ben has 12 red apples.", "Ben a 12 pommes rouges.", "Ben owns 12 red apples.", "changed"),
    ("Then Ben buys 5 more.", "Ensuite Ben achete 5 autres.", "Afterwards Ben gets another 5.", "changed"),
    ("How many apples are there?", "Combien de pommes y a-t-il?", "What is the number of apples?", "changed"),
    ("Please call `f(x)` on https://a.b/c now.", "Appelez `f(x)` https://a.b/c.",
     "Kindly call `f(x)` on https://a.b/c now.", "changed"),
    ("She sells 7 and keeps 3.", "Elle en garde 3 et vend 7.", "She keeps 3 and sells 7.", "lost"),
    ("Give 4 to Ben.", "Donnez 4 a Benoit.", "Give 4 to Benoit.", "lost"),
    ("Is the big one red or blue?", "Le grand est vert?", "Is the large one green?", "lost"),
    ("Say it again.", "Dites encore.", "Say it again.", "unchanged"),
    ("Why is that so?", "Pourquoi cela est tel dans ce monde?", "Why is that so in this whole wide world of ours?",
     "drifted"),
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    home = tmp_path_factory.mktemp("marian")
    save_marian(home / "there", [(old, pivot) for old, pivot, _, _ in SENTENCES])
    save_marian(home / "back", [(pivot, new) for _, pivot, new, _ in SENTENCES])
    return SimpleNamespace(there=home / "there", back=home / "back")


def chats() -> list[Chat]:
    """Sentences in paragraphs, code between them, in several messages."""
    said = [old for old, *_ in SENTENCES]
    code = "```py\nprint('Say it again.', 12)\n```"
    return [
        (Message("system", said[0]), Message("user", f"{said[0]} {said[1]}\n\n{code}\n{said[2]}"),
         Message("assistant", "<think>12 + 5 = 17.</think>\n17"), Message("user", f"  {said[3]}\t"),
         Message("assistant", "Done as Ben said, and here is quite a long answer to it.")),
        (Message("user", f"{said[4]} {said[5]} {said[7]}\n{said[8]}"), Message("assistant", "A gift to Ben.")),
        (Message("user", said[6]), Message("assistant", "blue")),
    ]  # fmt: skip


def test_sentences_come_back_changed_and_all_else_stays(pair: SimpleNamespace) -> None:
    result = back_translate(chats(), pair.there, pair.back)
    new = {old: again for old, _, again, verdict in SENTENCES if verdict == "changed"}
    expected = []
    for message in chats()[0]:
        text = message.content
        for old, again in new.items():
            text = text.replace(old, again) if message.role == "user" else text
        expected.append(Message(message.role, text))
    assert result.chats == [tuple(expected)]
    assert dict(result.sentences) == {"changed": 4, "lost": 3, "unchanged": 1, "drifted": 1}
    assert [(c.before, c.after) for c in result.changes] == list(new.items())
    assert {(c.chat, c.source, c.kind) for c in result.changes} == {(0, 0, "back_translation")}
    assert apply_changes(chats()[0], result.changes) == result.chats[0]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_translations_are_those_of_transformers(pair: SimpleNamespace, temperature: float) -> None:
    decoding = Decoding(beams=3, temperature=temperature, top_p=0.9, max_tokens=40)
    texts = [old for old, *_ in SENTENCES] + ["Ben sells the big blue apples."]
    translator = Translator(pair.there)
    torch.manual_seed(7)
    ours = translator.translate(texts, decoding)
    fast = PreTrainedTokenizerFast.from_pretrained(pair.there)
    model = MarianMTModel.from_pretrained(pair.there)
    how = dict(do_sample=True, temperature=1.5, top_p=0.9, top_k=0) if temperature else dict(num_beams=3)
    torch.manual_seed(7)
    out = model.generate(**fast(texts, padding=True, return_tensors="pt"), max_new_tokens=40, **how)
    assert ours == fast.batch_decode(out, skip_special_tokens=True)


def test_what_does_not_end_in_time_stays(pair: SimpleNamespace) -> None:
    longest = max(len(text.split()) for row in SENTENCES for text in row[:3])
    result = back_translate(chats(), pair.there, pair.back, decoding=Decoding(max_tokens=longest - 3))
    assert result.sentences["unfinished"] == 1
    assert "drifted" not in result.sentences


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_run_cut_short_goes_on_and_comes_to_the_same(
    pair: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    decoding = Decoding(temperature=temperature, batch_size=2, seed=5)
    random_state = torch.random.get_rng_state()
    whole = back_translate(chats(), pair.there, pair.back, decoding=decoding)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    store = tmp_path / "deep" / "translations.jsonl"

    def kill_at_third_batch(more: int, total: int) -> None:
        assert total == len(SENTENCES)
        done.append(more)
        if len(done) == 3:
            raise KeyboardInterrupt

    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        back_translate(chats(), pair.there, pair.back, decoding=decoding, store=store, advance=kill_at_third_batch)
    store.write_bytes(store.read_bytes()[:-9])  # the last line half written
    calls: list[int] = []
    translate = Translator.translate
    monkeypatch.setattr(Translator, "translate", lambda *args: (calls.append(len(args[1])), translate(*args))[1])
    assert back_translate(chats(), pair.there, pair.back, decoding=decoding, store=store) == whole
    assert len(calls) == 2 * 3  # the third batch again, the fourth, the fifth; there and back
    calls.clear()
    assert back_translate(chats(), pair.there, pair.back, decoding=decoding, store=store) == whole
    assert calls == []
    back_translate(chats(), pair.there, pair.back, decoding=Decoding(batch_size=2, beams=2), store=store)
    assert calls  # other settings: nothing in the store is theirs
    assert {row["text"] for row in map(json.loads, store.read_text().splitlines())} == {s for s, *_ in SENTENCES}


def test_marian_tokenizers_of_sentencepiece_load(tmp_path: Path) -> None:
    """The form in which Marian checkpoints are published: two .spm files and a vocab.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import MarianTokenizer

    said = [text for row in SENTENCES for text in row[:3]]
    with (tmp_path / "source.spm").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(said * 20), model_writer=file, vocab_size=90, hard_vocab_limit=False, minloglevel=2
        )
    shutil.copy(tmp_path / "source.spm", tmp_path / "target.spm")
    parts = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "source.spm"))
    names = dict.fromkeys(["</s>", "<unk>", *(parts.id_to_piece(i) for i in range(len(parts))), "<pad>"])
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    files = (str(tmp_path / name) for name in ("source.spm", "target.spm", "vocab.json"))
    tokenizer = MarianTokenizer(*files)
    tokenizer.save_pretrained(tmp_path / "model")
    pad = len(names) - 1
    config = MarianConfig(vocab_size=len(names), **(SMALL | dict(pad_token_id=pad, decoder_start_token_id=pad)))
    torch.manual_seed(1)
    model = MarianMTModel(config).eval()
    with torch.no_grad():
        model.final_logits_bias[0, 0] = 4.0  # it ends soon
    model.save_pretrained(tmp_path / "model")
    ours = Translator(tmp_path / "model").translate(said[:6], Decoding(beams=2, max_tokens=30))
    out = model.generate(**tokenizer(said[:6], padding=True, return_tensors="pt"), num_beams=2, max_new_tokens=30)
    expected = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert [text for text in ours if text is not None] == [
        e for e, t in zip(expected, ours, strict=True) if t is not None
    ]
    assert any(text is not None for text in ours)


def test_checkpoints_that_cannot_serve_are_named(pair: SimpleNamespace, tmp_path: Path) -> None:
    save_model(tmp_path / "causal", "qwen2", num_hidden_layers=1)
    for name, remove in (("tokenless", "tokenizer*"), ("weightless", "*.safetensors"), ("cut", "")):
        shutil.copytree(pair.there, tmp_path / name)
        for file in (tmp_path / name).glob(remove) if remove else ():
            file.unlink()
    cut = tmp_path / "cut/model.safetensors"
    cut.write_bytes(cut.read_bytes()[:5000])
    cases: dict[str, tuple[type[OrinKitError], str]] = {
        "missing": (UserError, "no model directory"),
        "causal": (UserError, "only continues text"),
        "tokenless": (UserError, "tokenizer"),
        "weightless": (ArtifactError, "weights"),
        "cut": (ArtifactError, "weights"),
    }
    for name, (kind, words) in cases.items():
        with pytest.raises(kind, match=words) as raised:
            back_translate(chats(), pair.there, tmp_path / name)
        assert raised.value.mend
        assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize("wrong", [dict(beams=0), dict(batch_size=0), dict(temperature=-1.0), dict(top_p=0.0)])
def test_options_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError):
        Decoding(**wrong)


def test_no_chats_need_no_sentences(pair: SimpleNamespace) -> None:
    result = back_translation.back_translate([], pair.there, pair.back)
    assert (result.chats, result.changes, dict(result.sentences)) == ([], [], {})
