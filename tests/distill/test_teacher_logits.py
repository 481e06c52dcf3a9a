"""Teacher logits on disk: the same values as the live teacher's, found by row, written whole or not at all."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from orin_kit.data.chat import Chat, Message, write_chats
from orin_kit.data.packing import Example, pack
from orin_kit.distill import Recipe
from orin_kit.distill import cache as cache_module
from orin_kit.distill.cache import cache
from orin_kit.distill.dataset import Batches, in_batches, load_dataset, to_tensors
from orin_kit.distill.logits import Dense, TopK, task_loss
from orin_kit.distill.recipe import Temperature
from orin_kit.distill.signals import LiveTeacher, Signal, TensorBatch, Wants
from orin_kit.distill.teacher_logits import (
    StoredTeacher,
    default_temperatures,
    position_bytes,
    row_key,
    vocabulary_digest,
    write_logits,
)
from orin_kit.errors import ArtifactError, UserError
from orin_kit.manifest import MANIFEST, read_manifest, write_artifact
from orin_kit.tokenizer import ChatTokenizer

TOKENIZER = Path(__file__).parents[2] / "calibration/demo-teacher"
VOCAB, PADDED = 2048, 2112
CPU = torch.device("cpu")
LOGITS = Wants(logits=True)
TEMPERATURES = (1.0, 1.4, 2.0)


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    """A teacher in fp64 with peaked predictions and a padded vocabulary whose padding would win if it counted."""
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=PADDED,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
    )
    made = Qwen2ForCausalLM(config).double().eval()
    with torch.no_grad():
        made.lm_head.weight *= 60
        made.lm_head.weight[VOCAB:] *= 2
    return made


def chat(random: np.random.Generator, length: int) -> Example:
    asked = int(random.integers(1, length))
    ids = random.integers(0, VOCAB, length).tolist()
    return Example(ids, [False] * asked + [True] * (length - asked))


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    """Packed rows, single ones of several lengths, and one in which nothing is asked."""
    random = np.random.default_rng(11)
    packed = list(pack([chat(random, int(n)) for n in random.integers(4, 30, 40)], 64))
    single = [chat(random, int(n)) for n in random.integers(2, 64, 9)]
    return [*packed, *single, Example([5, 6, 7], [True, False, False])]


def write(directory: Path, model: Qwen2ForCausalLM, rows: Sequence[Example], k: int = 16, **options: object) -> Path:
    """An artifact as `orin-kit cache` writes it."""
    settings = {"k": k, "temperatures": TEMPERATURES, "vocabulary": vocabulary_digest(TOKENIZER)}
    fields = dict(k=k, temperatures=TEMPERATURES, batch_size=4, device=CPU, vocab_size=VOCAB) | options
    with write_artifact(directory, "logits", inputs={}, settings=settings) as artifact:
        write_logits(LiveTeacher(model), rows, artifact.directory, **fields)  # type: ignore[arg-type]
    return directory


def read(directory: Path) -> StoredTeacher:
    return StoredTeacher(directory, tokenizer=TOKENIZER)


def stored(teacher: StoredTeacher, batch: TensorBatch) -> TopK:
    found = teacher(batch, LOGITS).logits
    assert isinstance(found, TopK)
    return found


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, model: Qwen2ForCausalLM, rows: list[Example]) -> Path:
    """Several shards."""
    return write(tmp_path_factory.mktemp("stored") / "logits", model, rows, shard_bytes=20_000)


@torch.no_grad()
def reference(model: Qwen2ForCausalLM, row: Example) -> np.ndarray:
    """fp64 logits `[asked, VOCAB]` of a row: every chat alone, without padding or packing."""
    parts, start = [], 0
    for length in row.lengths or (len(row.ids),):
        ids, trained = row.ids[start : start + length], row.trained[start : start + length]
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1, :VOCAB]
        parts.append(logits[torch.tensor(trained[1:], dtype=torch.bool)].numpy())
        start += length
    return np.concatenate(parts)


def test_values_against_every_chat_alone(artifact: Path, model: Qwen2ForCausalLM, rows: list[Example]) -> None:
    teacher = read(artifact)
    assert len(list(artifact.glob("logits-*.safetensors"))) > 3
    assert teacher.rows == len(rows)
    for batch in in_batches(rows, 5, CPU):
        found = stored(teacher, batch)
        full = np.concatenate([reference(model, row) for row in batch.rows])
        order = np.argsort(-full, axis=1)[:, :16]
        kept = np.take_along_axis(full, order, 1)
        others = full.copy()
        np.put_along_axis(others, order, -np.inf, 1)
        assert (found.ids.dtype, found.logits.dtype, found.tails.dtype) == (torch.int64, torch.float32, torch.float32)
        np.testing.assert_array_equal(found.ids.numpy(), order)
        np.testing.assert_allclose(found.logits.numpy(), kept - kept[:, :1], rtol=2**-11, atol=1e-7)
        tails = np.stack([np.logaddexp.reduce(others / t, axis=1) - kept[:, 0] / t for t in TEMPERATURES], axis=1)
        np.testing.assert_allclose(found.tails.numpy(), tails, rtol=1e-6, atol=1e-6)


def test_a_row_is_found_in_any_order_and_company(artifact: Path, rows: list[Example]) -> None:
    teacher = read(artifact)
    alone = {row_key(row): stored(teacher, to_tensors([row], CPU)) for row in rows}
    random = np.random.default_rng(3)
    for size in (1, 3, 8, len(rows)):
        order = [rows[i] for i in random.permutation(len(rows))]
        for batch in in_batches(order, size, CPU):
            found = stored(teacher, batch)
            assert found.positions == batch.labels.numel()
            for name in ("ids", "logits", "tails"):
                expected = torch.cat([getattr(alone[row_key(row)], name) for row in batch.rows])
                assert torch.equal(getattr(found, name), expected)


def test_keys_tell_rows_apart() -> None:
    one = Example([1, 2, 3, 4], [False, True, True, True])
    assert row_key(one) == row_key(Example([1, 2, 3, 4], [False, True, True, True], (4,)))
    others = [
        Example([1, 2, 3, 5], one.trained),
        Example(one.ids, [False, False, True, True]),
        Example(one.ids, one.trained, (2, 2)),
        Example([1, 2, 3], one.trained[:3]),
    ]
    assert len({row_key(row) for row in (one, *others)}) == 5


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_against_the_live_teacher(
    tmp_path: Path, model: Qwen2ForCausalLM, rows: list[Example], divergence: str, temperature: float
) -> None:
    batch = to_tensors(rows, CPU)
    live = LiveTeacher(model)(batch, LOGITS).logits
    assert isinstance(live, Dense)
    torch.manual_seed(1)
    student = Dense(live.hidden + 0.3 * torch.randn_like(live.hidden), live.weight[:VOCAB] * 0.9)

    def kd(teacher: Dense | TopK) -> float:
        loss = task_loss(
            student, batch.labels, teacher, teacher_weight=1.0, temperature=temperature, divergence=divergence
        )
        return float(loss.loss)

    exact = kd(live)
    whole = kd(stored(read(write(tmp_path / "whole", model, rows, k=VOCAB)), batch))
    assert whole == pytest.approx(exact, rel=1e-4)
    cut = kd(stored(read(write(tmp_path / "cut", model, rows, k=64)), batch))
    assert 0.85 * exact < cut < exact


class Failing:
    """A teacher that is killed after some batches."""

    def __init__(self, model: Qwen2ForCausalLM, after: int) -> None:
        self.teacher, self.left = LiveTeacher(model), after

    def __call__(self, batch: TensorBatch, wants: Wants) -> Signal:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return self.teacher(batch, wants)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.suffix == ".safetensors"}


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, artifact: Path, model: Qwen2ForCausalLM, rows: list[Example]
) -> None:
    options = dict(k=16, temperatures=TEMPERATURES, batch_size=4, device=CPU, vocab_size=VOCAB, shard_bytes=20_000)
    with pytest.raises(KeyboardInterrupt):
        write_logits(Failing(model, after=4), rows, tmp_path, **options)  # type: ignore[arg-type]
    kept = contents(tmp_path)
    undisturbed = contents(artifact)
    assert 0 < len(kept) < len(undisturbed)
    (tmp_path / "logits-99999.new").write_bytes(b"half a shard")
    touched = {name: (tmp_path / name).stat().st_mtime_ns for name in kept}
    done: list[int] = []
    write_logits(LiveTeacher(model), rows, tmp_path, advance=done.append, **options)  # type: ignore[arg-type]
    assert contents(tmp_path) == undisturbed
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == touched
    assert sum(done) == len(rows)


def test_equal_rows_are_stored_once(tmp_path: Path, model: Qwen2ForCausalLM, rows: list[Example]) -> None:
    once = contents(write(tmp_path / "once", model, rows[:6]))
    assert contents(write(tmp_path / "thrice", model, [*rows[:6], *rows[2:5], *rows[:6]])) == once


def test_size_of_a_position(tmp_path: Path, model: Qwen2ForCausalLM, rows: list[Example]) -> None:
    """The figure of the docstring: 412 bytes at k = 64 and seven temperatures, measured on the files."""
    temperatures = default_temperatures(Temperature(start=2.0, floor=1.0))
    options = dict(k=64, temperatures=temperatures, batch_size=4, device=CPU, vocab_size=VOCAB)
    write_logits(LiveTeacher(model), rows, tmp_path, **options)  # type: ignore[arg-type]
    tensors = load_file(tmp_path / "logits-00001.safetensors")
    positions = to_tensors(rows, CPU).labels.numel()
    assert sum(tensors[name].nbytes for name in ("ids", "logits", "tails")) == 412 * positions
    assert position_bytes(64, len(temperatures)) == 412


@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        (Temperature(start=2.0, floor=1.0), [1.0, 2.0]),
        (Temperature(start=3.0, floor=0.5, factor=0.9), [0.5, 3.0]),
        (Temperature(start=3.0, floor=0.5, factor=1.0), [3.0, 3.0]),
        (Temperature(start=1.0, floor=1.5), [1.5, 1.5]),
    ],
)
def test_default_temperatures(schedule: Temperature, ends: list[float]) -> None:
    found = default_temperatures(schedule)
    assert [found[0], found[-1]] == ends
    assert list(found) == sorted(set(found))
    np.testing.assert_allclose(np.diff(np.log(found)), np.log(ends[1] / ends[0]) / 6, rtol=1e-9)


def peak(run: Callable[[], object]) -> int:
    """Bytes that Python and numpy held at most during a call, beyond what they held before."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_reader_holds_no_shard(tmp_path: Path, model: Qwen2ForCausalLM) -> None:
    random = np.random.default_rng(0)
    many = [Example(random.integers(0, VOCAB, 64).tolist(), [True] * 64) for _ in range(32)]
    directory = write(tmp_path / "logits", model, many, k=VOCAB)
    shard = directory / "logits-00001.safetensors"
    size = shard.stat().st_size
    batch = to_tensors(many[:1], CPU)
    assert peak(lambda: stored(read(directory), batch)) < size / 8
    assert peak(lambda: load_file(shard)) > size / 2  # the same measure sees a shard that is loaded


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path, artifact: Path) -> Path:
    directory = tmp_path / "logits"
    directory.mkdir()
    for file in artifact.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def truncate(directory: Path) -> None:
    shard = directory / "logits-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def garble(directory: Path) -> None:
    shard = directory / "logits-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[8:40] = b"\0" * 32
    shard.write_bytes(data)


def make_a_model(directory: Path) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(manifest | {"kind": "model"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, r"logits-00002\.safetensors has \d+ bytes, its manifest says"),
        (garble, r"logits-00002\.safetensors cannot be read"),
        (lambda d: (d / "logits-00003.safetensors").unlink(), r"lacks its file logits-00003\.safetensors"),
        (make_a_model, "is a model artifact, not logits"),
        (lambda d: (d / MANIFEST).unlink(), "is no logits artifact"),
    ],
)
def test_damage(copy: Path, damage: Callable[[Path], object], words: str) -> None:
    read(copy)
    damage(copy)
    with pytest.raises(ArtifactError, match=words):
        read(copy)


def test_a_foreign_row(artifact: Path, rows: list[Example]) -> None:
    other = Example([*rows[0].ids[:-1], (rows[0].ids[-1] + 1) % VOCAB], rows[0].trained, rows[0].lengths)
    with pytest.raises(UserError, match="does not know a row.*orin-kit cache"):
        read(artifact)(to_tensors([rows[1], other], CPU), LOGITS)


def test_only_logits(artifact: Path, rows: list[Example]) -> None:
    teacher, batch = read(artifact), to_tensors(rows[:2], CPU)
    for wants in (Wants(hidden=(1,)), Wants(attention=(0,)), Wants(embeddings=True, logits=True)):
        with pytest.raises(UserError, match="holds logits alone"):
            teacher(batch, wants)
    assert teacher(batch, Wants()) == Signal()


def test_another_tokenizer(tmp_path: Path, artifact: Path) -> None:
    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[700:702]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="another tokenizer"):
        StoredTeacher(artifact, tokenizer=tmp_path)


@pytest.mark.parametrize(
    ("start", "floor", "fits"), [(2.0, 1.0, True), (1.5, 1.2, True), (3.0, 1.0, False), (2.0, 0.9, False)]
)
def test_temperatures_of_the_recipe(artifact: Path, start: float, floor: float, fits: bool) -> None:
    schedule = Temperature(start=start, floor=floor)
    if fits:
        StoredTeacher(artifact, tokenizer=TOKENIZER, temperature=schedule)
        return
    with pytest.raises(UserError, match="stored for temperatures 1 to 2"):
        StoredTeacher(artifact, tokenizer=TOKENIZER, temperature=schedule)


def test_logits_that_are_no_numbers(tmp_path: Path, rows: list[Example]) -> None:
    def broken(batch: TensorBatch, wants: Wants) -> Signal:
        hidden = torch.ones(batch.labels.numel(), 4)
        hidden[-1] = torch.nan
        return Signal(logits=Dense(hidden, torch.ones(VOCAB, 4)))

    options = dict(k=8, temperatures=TEMPERATURES, batch_size=4, device=CPU)
    with pytest.raises(UserError, match="not finite"):
        write_logits(broken, rows, tmp_path, **options)  # type: ignore[arg-type]
    assert not contents(tmp_path)


@pytest.mark.parametrize("k", [0, VOCAB + 1])
def test_k_that_cannot_be(tmp_path: Path, model: Qwen2ForCausalLM, rows: list[Example], k: int) -> None:
    with pytest.raises(UserError, match="top-k of"):
        write(tmp_path / "logits", model, rows, k=k)
    assert not (tmp_path / "logits").exists()


def test_logits_of_minus_infinity_stay_finite(tmp_path: Path, rows: list[Example]) -> None:
    """A token that a head rules out has no probability, and makes no loss infinite."""

    def ruling(batch: TensorBatch, wants: Wants) -> Signal:
        bias = torch.linspace(0, -8, VOCAB)
        bias[5] = -torch.inf
        bias[6] = -1e9
        return Signal(logits=Dense(torch.ones(batch.labels.numel(), 4), torch.zeros(VOCAB, 4), bias))

    settings = {"k": VOCAB, "temperatures": TEMPERATURES, "vocabulary": vocabulary_digest(TOKENIZER)}
    with write_artifact(tmp_path / "logits", "logits", inputs={}, settings=settings) as artifact:
        write_logits(ruling, rows, artifact.directory, k=VOCAB, temperatures=TEMPERATURES, batch_size=4, device=CPU)
    batch = to_tensors(rows[:3], CPU)
    found = stored(read(tmp_path / "logits"), batch)
    student = Dense(torch.randn(batch.labels.numel(), 8), torch.randn(VOCAB, 8))
    loss = task_loss(student, batch.labels, found, teacher_weight=1.0, temperature=1.0).loss
    expected = student.hidden.double() @ student.weight.double().T
    bias = torch.linspace(0, -8, VOCAB, dtype=torch.float64)
    bias[[5, 6]] = -torch.inf
    p = bias.softmax(-1)
    kl = (torch.xlogy(p, p) - p * expected.log_softmax(-1)).sum(-1).mean()
    assert float(loss) == pytest.approx(float(kl), rel=1e-3)


# --- the verb --------------------------------------------------------------------------------------------------------

Make = Callable[..., Recipe]


def answers(teacher: object, tokenizer: object, prompts: Sequence[Chat], path: Path, **_: object) -> list[Chat]:
    """A random teacher's replies never end; these do, and are kept where the real ones are."""
    chats = [(*prompt, Message("assistant", f"It is {i}.")) for i, prompt in enumerate(prompts)]
    write_chats(path, chats)
    return chats


def test_a_recipe_is_cached(tmp_path: Path, make_recipe: Make, pair_dirs: tuple[Path, Path]) -> None:
    recipe = make_recipe(
        data={"tasks": {"count": 60}, "general": {"tasks": {"count": 20, "seed": 5}}, "row_length": 64}
    )
    figures = cache(recipe, tmp_path / "logits", progress=False)
    manifest = read_manifest(tmp_path / "logits", "logits", verify=True)
    assert manifest.results == figures
    assert manifest.settings["k"] == 64
    assert manifest.settings["vocab_size"] == 2048  # the tokenizer's; the teacher's is padded to 2112
    assert manifest.settings["data"] == recipe.model_dump(mode="json")["data"]
    assert manifest.inputs.keys() == {"teacher"}
    assert figures["bytes_per_position"] == pytest.approx(412, rel=0.02)
    data = load_dataset(recipe, ChatTokenizer(pair_dirs[1]))
    assert data.general is not None
    teacher = StoredTeacher(tmp_path / "logits", tokenizer=pair_dirs[1], temperature=recipe.stages.task.temperature)
    assert figures["rows"] == teacher.rows <= len(data.train) + len(data.general.rehearsed)
    for seed in (0, 9):
        batches = Batches(data, 4, seed, CPU, rehearsal=0.3)
        for index in range(6):
            batch = batches.batch(index)
            found = stored(teacher, batch)
            assert found.positions == batch.labels.numel()
            assert int(found.ids.max()) < 2048
            assert found.tail(recipe.stages.task.temperature.start).shape == batch.labels.shape


def test_a_killed_verb_goes_on(tmp_path: Path, make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(data={"tasks": {"count": 60}, "questions": {"tasks": 12}, "row_length": 64})
    recipe = recipe.model_copy(update={"max_new_tokens": 40})
    out = tmp_path / "logits"
    options = dict(shard_bytes=60_000, progress=False)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "LiveTeacher", lambda model: Failing(model, after=5))
        patch.setattr("orin_kit.distill.run.teacher_answers", answers)
        with pytest.raises(KeyboardInterrupt):
            cache(recipe, out, **options)  # type: ignore[arg-type]
    partial = tmp_path / ".logits.logits-partial"
    kept = contents(partial)
    assert kept
    assert not out.exists()
    with pytest.raises(UserError, match="unfinished logits of another recipe"):
        cache(recipe, out, k=32, **options)  # type: ignore[arg-type]
    cache(recipe, out, **options)  # type: ignore[arg-type]  # the answers are not asked for again
    assert not partial.exists()
    assert (out / "answers.jsonl").is_file()
    monkeypatch.setattr("orin_kit.distill.run.teacher_answers", answers)
    cache(recipe, tmp_path / "undisturbed", **options)  # type: ignore[arg-type]
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert kept.items() < contents(out).items()
    with pytest.raises(UserError, match="exists"):
        cache(recipe, out, **options)  # type: ignore[arg-type]


def test_a_bridged_teacher_has_no_logits(tmp_path: Path, make_recipe: Make) -> None:
    weight = {"teacher_weight": {"start": 0, "every": 0}}
    recipe = make_recipe(
        bridge="sequences",
        data={"tasks": {"count": 60}, "questions": {"tasks": 4}},
        stages={"features": None, "attention": None, "task": weight},
    )
    with pytest.raises(UserError, match="no logits for it"):
        cache(recipe, tmp_path / "logits", progress=False)
