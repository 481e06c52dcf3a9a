"""AWQ's folds leave a model as it is, its scales lose less than plain rounding where channels stand out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dequantize import dequantized

from families import FAMILIES, save_model
from orin_kit.models import families as models
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.formats.compressed_tensors import WeightScheme
from orin_kit.quantize import awq
from orin_kit.quantize.awq import Awq, Inputs, apply_fold, channel_owners, search_scale
from orin_kit.quantize.int4 import quantize_groups
from orin_kit.quantize.layerwise import LayerwiseDecoder
from orin_kit.quantize.rtn import rtn
from orin_kit.quantize.sections import sections
from orin_kit.quantize.sequential import FOLDS, Fold, observe, quantize_sequentially

INT4 = WeightScheme()
SCHEMES = [WeightScheme(4, 128, True), WeightScheme(4, 64, False), WeightScheme(8, 32, True), WeightScheme(4, 32, True)]


def random_scale(weights: object, inputs: Inputs, owner: torch.Tensor, scheme: object) -> torch.Tensor:
    return torch.rand(int(owner.max()) + 1) * 3 + 0.2


@pytest.mark.parametrize("name", FAMILIES)
def test_folds_leave_the_logits_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any scales at all: GQA, biases, q/k norms."""
    model = save_model(tmp_path, name)
    ids = torch.randint(0, 2048, (2, 33))
    with torch.no_grad():
        expected = model(ids).logits
    monkeypatch.setattr(awq, "search_scale", random_scale)
    checkpoint = Checkpoint(tmp_path)
    decoder = LayerwiseDecoder(checkpoint)
    hidden = decoder.embed(ids)
    for index, layer in enumerate(model.model.layers):
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        layer.requires_grad_(False)
        inputs, outputs = observe(decoder, layer, hidden, FOLDS[checkpoint.spec.model_type], lambda n: Inputs(n, 128))
        for fold, read in inputs.items():
            apply_fold(layer, fold, read, checkpoint.spec.head_dim, WeightScheme(4, read.group_size))
        hidden = outputs
        changed = {n for n, p in layer.named_parameters() if not torch.equal(p, before[n])}
        unscaled = {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.o_proj.bias", "mlp.gate_proj.bias"}
        unscaled |= {"mlp.down_proj.bias", "self_attn.q_norm.weight", "self_attn.k_norm.weight"}
        unscaled |= {"conv.in_proj.bias", "conv.out_proj.bias"}
        assert changed == set(before) - unscaled, index
    with torch.no_grad():
        folded = model(ids).logits
    assert (folded - expected).abs().max() < 1e-4 * expected.abs().max()


def test_folded_inputs_are_those_of_the_folded_layer(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2")
    checkpoint = Checkpoint(tmp_path)
    decoder = LayerwiseDecoder(checkpoint)
    hidden = decoder.embed(torch.randint(0, 2048, (3, 40)))
    layer = decoder.layer(0)
    inputs, _ = observe(decoder, layer, hidden, FOLDS["qwen2"], lambda n: Inputs(n, 64))
    for fold, read in inputs.items():
        apply_fold(layer, fold, read, checkpoint.spec.head_dim, WeightScheme(4, read.group_size))
    again, _ = observe(decoder, layer, hidden, FOLDS["qwen2"], lambda n: Inputs(n, 64))
    for fold, read in inputs.items():
        torch.testing.assert_close(read.magnitude, again[fold].magnitude, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(read.gram, again[fold].gram, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(torch.cat(read.sampled), torch.cat(again[fold].sampled), rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_all_tokens() -> None:
    x = torch.randn(7, 50, 64).double()
    inputs = Inputs(350, 32)
    for part in x.float().split(2):
        inputs.add(part)
    flat = x.view(-1, 64)
    torch.testing.assert_close(inputs.magnitude.double(), flat.abs().mean(0), rtol=1e-5, atol=1e-6)
    gram = flat.T @ flat / 350
    torch.testing.assert_close(
        inputs.gram.double(), torch.stack([gram[:32, :32], gram[32:, 32:]]), rtol=1e-4, atol=1e-5
    )


def test_query_heads_read_their_value_head() -> None:
    # 2 value heads of 3 channels, 4 query heads: repeat_kv of transformers gives each value head to two neighbours.
    from transformers.models.qwen2.modeling_qwen2 import repeat_kv

    values = torch.arange(6.0).view(1, 2, 1, 3)
    expected = repeat_kv(values, 2).transpose(1, 2).reshape(-1)
    assert channel_owners(6, 12, 3).tolist() == expected.int().tolist()
    assert channel_owners(6, 6, 3).tolist() == list(range(6))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("outliers", [0, 5])
def test_search_never_loses_more_than_plain_rounding(outliers: int, scheme: WeightScheme) -> None:
    x = torch.randn(300, 256)
    x[:, torch.randperm(256)[:outliers]] *= 20
    weights = [torch.randn(96, 256), torch.randn(32, 256)]
    inputs = Inputs(300, scheme.group_size)
    inputs.add(x)
    scale = search_scale(weights, inputs, torch.arange(256), scheme)

    def error(scale: torch.Tensor) -> float:
        total = 0.0
        gram, how = inputs.gram_after(scale).numpy(), dict(bits=scheme.bits, symmetric=scheme.symmetric)
        for w in weights:
            packed = quantize_groups((w * scale).numpy(), scheme.group_size, gram=gram, **how)
            lost = torch.from_numpy(packed.dense()) / scale - w
            total += float((x @ lost.T).square().sum() / (x @ w.T).square().sum())
        return total

    assert error(scale) < (0.85 if outliers else 1.00001) * error(torch.ones(256))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "conv"])
def test_awq_beats_rounding_where_channels_stand_out(name: str, tmp_path: Path) -> None:
    """A few channels of the norms' outputs are 20 times the others', as in trained models of size."""
    model = save_model(tmp_path, name, num_hidden_layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            for key, parameter in layer.named_parameters():
                if key.endswith(("layernorm.weight", "operator_norm.weight", "ffn_norm.weight")):
                    parameter[torch.randperm(384)[:6]] *= 20
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    cut = sections(checkpoint.spec, INT4, None)
    rows = torch.randint(0, 2048, (24, 64))
    ids = torch.randint(0, 2048, (8, 64))
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        errors = []
        awq_parts = quantize_sequentially(checkpoint, cut, rows.numpy(), Awq(checkpoint.spec.head_dim))
        for parts in (rtn(checkpoint, cut), awq_parts):
            model.load_state_dict(dequantized(parts), strict=False)
            errors.append(float((model.model(ids).last_hidden_state - expected).square().mean()))
    assert errors[1] < 0.6 * errors[0], errors


def test_folds_name_every_linear_once() -> None:
    for family, folds in FOLDS.items():
        consumers = [name for fold in folds for name in fold.consumers]
        layout = models.FAMILIES[family].layout
        assert sorted(consumers) == sorted((*layout.mixer_in, layout.mixer_out, layout.gate, layout.up, layout.down)), (
            family
        )
    assert Fold("self_attn.v_proj", ("self_attn.o_proj",)) in FOLDS["qwen2"]
