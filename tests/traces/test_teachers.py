"""Both teachers against transformers one prompt at a time, and their sampling against the softmax in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from families import DEMO_TEACHER
from orin_kit.data.tasks import distinct
from orin_kit.errors import ArtifactError, UnsupportedModelError, UserError
from orin_kit.export.export import export
from orin_kit.quantize.quantize import quantize
from orin_kit.runtime.sampler import Sampling
from orin_kit.tokenizer import ChatTokenizer
from orin_kit.traces.teacher import Reply, context_of, open_teacher

KINDS = ["transformers", "onnx"]
GREEDY = Sampling()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    onnx = tmp_path_factory.mktemp("teacher") / "onnx"
    export(DEMO_TEACHER, onnx, precision="fp32", max_len=200, progress=False)
    tokenizer = ChatTokenizer(DEMO_TEACHER)
    prompts = [tokenizer.encode_chat(task.chat()[:1], reply=True) for task in distinct("test", 21, 18)]
    model = AutoModelForCausalLM.from_pretrained(DEMO_TEACHER, dtype=torch.float32)
    where = {"transformers": DEMO_TEACHER, "onnx": onnx}
    teachers = {kind: open_teacher(where[kind], room=200, batch_size=8, threads=1, provider="cpu") for kind in KINDS}
    made = SimpleNamespace(onnx=onnx, model=model, tokenizer=tokenizer, prompts=prompts, teachers=teachers)
    made.greedy = [reference(made, prompt, 40) for prompt in prompts]
    return made


def reference(demo: SimpleNamespace, prompt: list[int], count: int) -> Reply:
    out = demo.model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=count, eos_token_id=list(demo.tokenizer.stop_ids)
    )[0, len(prompt) :].tolist()
    ended = out[-1] in demo.tokenizer.stop_ids
    return Reply(out[:-1] if ended else out, ended)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_batches_are_transformers_one_by_one(demo: SimpleNamespace, kind: str) -> None:
    replies = demo.teachers[kind].reply(demo.prompts, GREEDY, [0] * len(demo.prompts), 40)
    assert replies == demo.greedy
    assert {reply.finished for reply in replies} == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_tokens_have_the_softmax_of_the_logits(demo: SimpleNamespace, kind: str) -> None:
    """The first token of 600 replies, within five standard deviations; rare tokens are counted as one."""
    prompt = np.random.default_rng(0).integers(3, 2000, 12).tolist()  # after nonsense, many tokens are likely
    count, sampling = 600, Sampling(temperature=2.0, top_p=0.8)
    with torch.no_grad():
        logits = demo.model(torch.tensor([prompt])).logits[0, -1].double().numpy() / sampling.temperature
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    order = np.argsort(-weights)
    kept = order[: np.searchsorted(np.cumsum(weights[order]), sampling.top_p) + 1]
    expected = np.zeros_like(weights)
    expected[kept] = weights[kept] / weights[kept].sum()
    first: list[int] = []
    for start in range(0, count, 60):
        replies = demo.teachers[kind].reply([prompt] * 60, sampling, list(range(start, start + 60)), 1)
        assert all(reply.finished != bool(reply.ids) for reply in replies)
        first += [reply.ids[0] for reply in replies if reply.ids]
    found = np.bincount(first, minlength=len(weights))
    stops = list(demo.tokenizer.stop_ids)
    expected[stops], found[stops] = 0, 0  # a stop token is not among a reply's ids
    assert not found[expected == 0].any()
    common = count * expected >= 5
    assert common.sum() > 5
    slack = 5 * np.sqrt(count * expected * (1 - expected))
    assert (np.abs(found - count * expected) <= slack)[common].all()
    rare = expected[~common].sum()
    assert abs(found[~common].sum() - count * rare) <= 5 * np.sqrt(count * rare * (1 - rare)) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_same_seeds_same_replies(demo: SimpleNamespace, kind: str) -> None:
    sampling, prompts = Sampling(temperature=1.5), demo.prompts[:6]
    teacher, seeds = demo.teachers[kind], [5, 6, 7, 8, 9, 10]
    random_state = torch.random.get_rng_state()
    replies = teacher.reply(prompts, sampling, seeds, 20)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    torch.rand(3)
    assert teacher.reply(prompts, sampling, seeds, 20) == replies
    assert teacher.reply(prompts, sampling, [seed + 6 for seed in seeds], 20) != replies


def test_rows_of_an_onnx_teacher_do_not_depend_on_their_batch(demo: SimpleNamespace) -> None:
    sampling, prompts, teacher = Sampling(temperature=1.2, top_p=0.9), demo.prompts[:6], demo.teachers["onnx"]
    together = teacher.reply(prompts, sampling, range(6), 24)
    assert together == [teacher.reply([prompt], sampling, [i], 24)[0] for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_the_context_cuts_a_reply(demo: SimpleNamespace, kind: str, tmp_path: Path) -> None:
    prompt = demo.prompts[3]
    directory = demo.onnx
    if kind == "transformers":
        directory = tmp_path / "short"
        demo.model.config.max_position_embeddings, before = len(prompt) + 4, demo.model.config.max_position_embeddings
        demo.model.save_pretrained(directory)
        demo.model.config.max_position_embeddings = before
        for file in DEMO_TEACHER.glob("*token*"):
            (directory / file.name).write_bytes(file.read_bytes())
        assert context_of(directory) == len(prompt) + 4
    teacher = open_teacher(directory, room=len(prompt) + 4, batch_size=1, threads=1, provider="cpu")
    (reply,) = teacher.reply([prompt], GREEDY, [0], 50)
    assert reply == reference(demo, prompt, 5)  # a token needs no room of its own to be said, only to be continued
    assert not reply.finished


def test_directories_that_are_no_teacher(demo: SimpleNamespace, tmp_path: Path) -> None:
    assert context_of(demo.onnx) == 200
    with pytest.raises(ArtifactError):
        context_of(tmp_path / "absent")
    quantize(DEMO_TEACHER, tmp_path / "int4", method="rtn", perplexity=False)
    with pytest.raises(UnsupportedModelError, match="orin-kit export"):
        open_teacher(tmp_path / "int4", room=99, batch_size=1, threads=1, provider="cpu")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_bytes((DEMO_TEACHER / "config.json").read_bytes())
    with pytest.raises(ArtifactError):
        open_teacher(tmp_path / "bare", room=99, batch_size=1, threads=1, provider="cpu")
    with pytest.raises(UserError, match="CUDAExecutionProvider"):
        open_teacher(demo.onnx, room=99, batch_size=1, threads=1, provider="cuda")
