"""What is recorded gives transformers' own attention maps, and recording changes nothing, for every family."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orin_kit.distill.attention import attention_scores, visible
from orin_kit.distill.record import Projections, recorded_attention
from orin_kit.errors import UserError

SHAPE = dict(
    vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6, head_dim=16
)
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen2": lambda **o: Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2, **o)),
    "qwen3": lambda **o: Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=3, **o)),
    "llama": lambda **o: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=6, **o)),
    "mistral": lambda **o: MistralForCausalLM(
        MistralConfig(**SHAPE, num_key_value_heads=1, **{"sliding_window": 64, **o})
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Every test leaves transformers' table of attention functions as it found it."""
    before = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    yield
    assert (dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)) == before


def packed_rows(batch: int = 2, length: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions that begin anew with every document, and documents; rows but the first end in padding."""
    ids = torch.randint(0, 97, (batch, length))
    positions, documents = torch.zeros_like(ids), torch.full_like(ids, -1)
    for row in range(batch):
        real = length - (int(torch.randint(1, 6, ())) if row else 0)
        cuts = sorted({0, real, *torch.randint(1, real, (2,)).tolist()})
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            positions[row, start:stop] = torch.arange(stop - start)
            documents[row, start:stop] = number
        positions[row, real:] = torch.arange(length - real)
    return ids, positions, documents


def maps_of(recorded: Projections, documents: Tensor) -> Tensor:
    seen = visible(documents, 0, documents.shape[1])
    return attention_scores(recorded.query, recorded.key, recorded.scaling, seen).softmax(-1)


def scaled(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough for maps that are far from even."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0) if p.ndim > 1 else p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@every_family
@pytest.mark.parametrize("packed", [False, True])
def test_maps_are_transformers_own(family: str, packed: bool) -> None:
    model = scaled(FAMILIES[family]())
    ids, positions, documents = packed_rows()
    if not packed:
        positions, documents = torch.arange(ids.shape[1]).expand_as(ids), torch.zeros_like(ids)
    with torch.no_grad(), recorded_attention(model, [0, 2]) as recorded:
        model(ids, position_ids=positions, use_cache=False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, position_ids=positions, use_cache=False, output_attentions=True).attentions
    assert sorted(recorded) == [0, 2]
    for layer, found in recorded.items():
        real = (documents >= 0)[:, None, :, None]
        torch.testing.assert_close(
            torch.where(real, maps_of(found, documents), 0.0), torch.where(real, maps[layer], 0.0)
        )
        assert maps[layer].max(-1).values.std() > 0.05  # or any q and k would do


@every_family
def test_values_are_as_projected(family: str) -> None:
    model = scaled(FAMILIES[family]())
    ids, positions, _ = packed_rows()
    outputs: list[Tensor] = []
    hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    with torch.no_grad(), recorded_attention(model, [1]) as recorded:
        model(ids, position_ids=positions, use_cache=False)
    hook.remove()
    assert torch.equal(recorded[1].value.transpose(1, 2).flatten(2), outputs[0])


@every_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nothing_changes(family: str, implementation: str) -> None:
    model = FAMILIES[family]().train()
    model.set_attn_implementation(implementation)
    settings, hooks = copy.deepcopy(model.config.to_dict()), [dict(m._forward_hooks) for m in model.modules()]
    ids, positions, _ = packed_rows()

    def run() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        out = model(ids, position_ids=positions, use_cache=False).logits
        out.square().sum().backward()
        return out.detach(), [p.grad.clone() for p in model.parameters()]

    before, gradients = run()
    with recorded_attention(model, [1, 2]) as recorded:
        assert model.config._attn_implementation == implementation
        during, same = run()
    assert len(recorded) == 2
    assert torch.equal(before, during)
    assert all(map(torch.equal, gradients, same))
    assert torch.equal(run()[0], before)
    assert model.config._attn_implementation == implementation
    assert model.config.to_dict() == settings
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_teacher_inside_student() -> None:
    """Two recordings at once, of models that share the implementation, keep apart; the inner one ends first."""
    ids, positions, _ = packed_rows()
    for implementation in ("sdpa", "eager"):
        one, two = (scaled(FAMILIES[name]()) for name in ("qwen2", "qwen3"))
        for model in (one, two):
            model.set_attn_implementation(implementation)
        with torch.no_grad(), recorded_attention(one, [1]) as first:
            with recorded_attention(two, [0, 1]) as second:
                two(ids, position_ids=positions)
                one(ids, position_ids=positions)
            alone = first[1].query
            one(ids, position_ids=positions)
        assert (sorted(first), sorted(second)) == ([1], [0, 1])
        assert torch.equal(first[1].query, alone)
        assert first[1].query is not alone


def test_errors_leave_nothing_behind() -> None:
    model = FAMILIES["qwen2"]()
    with pytest.raises(RuntimeError, match="on purpose"), recorded_attention(model, [0]):
        raise RuntimeError("on purpose")
    with pytest.raises(IndexError), recorded_attention(model, [0]) as recorded:
        model(torch.full((1, 4), 1000))  # no such token
    assert not recorded


@every_family
@pytest.mark.parametrize("wrapped", ["plain", "lora", "autocast"])
def test_gradient_checkpointing(family: str, wrapped: str) -> None:
    """Gradients of a loss on recorded tensors are those without checkpointing; the second pass is not recorded."""
    model = FAMILIES[family]().train()
    if wrapped == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
        model.enable_input_require_grads()
    ids, positions, documents = packed_rows()

    def run() -> tuple[list[Tensor], list[Projections]]:
        model.zero_grad()
        autocast = torch.autocast("cpu", torch.bfloat16) if wrapped == "autocast" else nullcontext()
        with recorded_attention(model, [0, 1]) as recorded:
            with autocast:
                logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            found = dict(recorded)
            loss = logits.float().square().mean() + sum(maps_of(p, documents).square().sum() for p in found.values())
            loss.backward()
            assert all(recorded[layer] is found[layer] for layer in found)  # not replaced by the backward pass
            assert sorted(recorded) == [0, 1]
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
        return gradients, list(found.values())

    plain, _ = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []
    decoder = model.get_decoder()
    hook = decoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    again, found = run()
    hook.remove()
    assert len(calls) == 2  # the layer did run twice
    assert len(plain) == len(again) > 0
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    assert all(p.query.requires_grad and p.key.requires_grad for p in found)
    if wrapped == "autocast" and family == "llama":
        assert found[0].value.dtype == torch.bfloat16


class Stage(nn.Module):
    """A loss on recorded tensors alone, as attention distillation without the task's loss."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.student = student

    def forward(self, ids: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        with recorded_attention(self.student, [0, 1]) as recorded:
            self.student.get_decoder()(ids, position_ids=positions, use_cache=False)
        return torch.stack([maps_of(p, documents).square().mean() for p in recorded.values()]).sum()


def fsdp1(stage: Stage) -> nn.Module:
    kinds = {type(stage.student.model.layers[0])}
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=kinds)
    return FullyShardedDataParallel(stage, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp2(stage: Stage) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in stage.student.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(stage, mesh=mesh)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("wrap", [partial(DistributedDataParallel, find_unused_parameters=True), fsdp1, fsdp2])
def test_wrapped_outside(wrap: Callable[[nn.Module], nn.Module], checkpointing: bool) -> None:
    """The student inside a wrapped module has the gradients of the bare one, also in the last recorded layer."""
    rows, model = packed_rows(), FAMILIES["qwen2"]().train()
    plain = Stage(copy.deepcopy(model))
    plain(*rows).backward()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped = wrap(Stage(model))
    wrapped(*rows).backward()
    gradients = {}
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        for name, p in wrapped.named_parameters():
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            plain_name = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
            gradients[plain_name] = torch.zeros(p.shape) if grad is None else grad.clone()
    for name, p in plain.named_parameters():
        zero = torch.zeros_like(p)  # FSDP says nothing of layers without gradients
        torch.testing.assert_close(gradients.get(name, zero), zero if p.grad is None else p.grad)
    assert gradients["student.model.layers.1.self_attn.q_proj.weight"].abs().max() > 0


def test_layers_that_are_not_there() -> None:
    with pytest.raises(UserError, match="qwen2 model has layers 0 to 2"), recorded_attention(FAMILIES["qwen2"](), [3]):
        pass
    shape: dict[str, Any] = dict(SHAPE, num_key_value_heads=2)
    del shape["head_dim"]
    mixed = Lfm2ForCausalLM(Lfm2Config(**shape, layer_types=["conv", "full_attention", "conv"]))
    what = "layer 2: the lfm2 model has no attention there: name some of layers 1"
    with pytest.raises(UserError, match=what), recorded_attention(mixed, [1, 2]):
        pass
    with torch.no_grad(), recorded_attention(mixed, [1]) as recorded:
        mixed(packed_rows()[0], use_cache=False)
    assert recorded[1].query.shape[1] == 6


def test_rows_longer_than_the_sliding_window() -> None:
    model = FAMILIES["mistral"](sliding_window=8)
    what = "layer 1 looks back 8 tokens only, and rows are 9 long"
    with pytest.raises(UserError, match=what), recorded_attention(model, [1]):
        model(torch.zeros(1, 9, dtype=torch.long), use_cache=False)
    with recorded_attention(model, [1]) as recorded:
        model(torch.zeros(1, 8, dtype=torch.long), use_cache=False)
    assert recorded[1].query.shape[2] == 8
