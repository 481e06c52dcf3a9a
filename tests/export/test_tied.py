"""One packed table for head and embedding: what it computes, and that it is stored once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import PreTrainedModel

from families import save_model
from formats import rounded
from orin_kit.errors import UserError
from orin_kit.export.decoder import build_decoder
from orin_kit.export.dialects.ort import OrtDialect
from orin_kit.export.export import export
from orin_kit.export.options import GraphOptions
from orin_kit.export.save import save
from orin_kit.export.tensors import DecoderTensors
from orin_kit.manifest import read_manifest
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.formats.format import Packing
from orin_kit.models.packing import PackedWeight, pack
from orin_kit.quantize.rounded import RoundedCheckpoint
from orin_kit.runtime.backends.onnx import OnnxBackend
from orin_kit.runtime.runtime import open_runtime

VOCAB, HIDDEN = 2048, 384


def logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def with_weights(model: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model with a checkpoint's packed weights, the one table included."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(torch.from_numpy(checkpoint.packed(name).dense()))
    assert model.get_input_embeddings().weight is model.lm_head.weight
    return model


def external(graph: onnx.GraphProto) -> dict[str, tuple[int, int]]:
    """Initializers in the data file: name -> offset and length."""
    found = {}
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            found[tensor.name] = int(entries["offset"]), int(entries["length"])
    return found


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "conv"])
def test_a_rounded_tied_model_keeps_one_table(family: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "hf", family)
    options = dict(precision="int4", group_size=64, progress=False)
    export(tmp_path / "hf", tmp_path / "tied", accuracy_level=0, **options)
    export(tmp_path / "hf", tmp_path / "two", tie=False, **options)
    expected = logits(with_weights(model, RoundedCheckpoint(tmp_path / "hf", 64)), ids := some_ids(2, 24))
    assert np.abs(open_runtime(tmp_path / "tied", max_len=32).backend.score(ids) - expected).max() <= 1e-3
    assert read_manifest(tmp_path / "tied").settings["tied_table"] is True

    graph = onnx.load(tmp_path / "tied/model.onnx", load_external_data=False).graph
    places = external(graph)
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    table, head = "model.embed_tokens.weight_packed", "lm_head.weight_packed"
    assert places[table] == places[head] and places[head][1] == VOCAB * HIDDEN // 2
    assert (shapes[table], shapes[head]) == ([VOCAB, HIDDEN // 2], [VOCAB, HIDDEN // 64, 32])
    size = {name: (tmp_path / name / "model.onnx.data").stat().st_size for name in ("tied", "two")}
    assert size["tied"] == sum(length for _, length in set(places.values()))
    assert size["two"] - size["tied"] == VOCAB * HIDDEN // 2 + VOCAB * HIDDEN // 32 * 4  # a table, its fp32 scales
    assert not any(node.op_type == "Reshape" and "embed" in node.input[0] for node in graph.node)


class Packed(RoundedCheckpoint):
    """A tied model's linears, rounded in memory by the tests' own code."""

    def __init__(self, directory: Path, bits: int, size: int) -> None:
        super().__init__(directory, size)
        self.bits = bits

    def packing(self, linear: str) -> Packing | None:
        return Packing(self._linears[linear], self.bits, self.group_size, True) if self.is_packed(linear) else None

    def packed(self, linear: str) -> PackedWeight:
        plain = self.tensor(f"{linear}.weight")
        weight = rounded(plain, self.bits, self.group_size, symmetric=False, order=None)
        codes, zeros = weight.codes.astype(np.uint8), weight.zeros.astype(np.uint8)
        return PackedWeight(self.bits, pack(codes, self.bits), weight.scales, zeros)


@pytest.mark.parametrize(("bits", "size"), [(4, 128), (4, 32), (8, 64)])
def test_asymmetric_tables_of_4_and_8_bits(bits: int, size: int, tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen2", num_hidden_layers=1)
    checkpoint = Packed(tmp_path, bits, size)
    options = GraphOptions(tied_table=True, accuracy_level=0)
    graph = build_decoder(DecoderTensors(checkpoint), OrtDialect, activations="fp32", max_positions=64, options=options)
    save(graph, tmp_path / "model.onnx", progress=False)
    ids = some_ids(1, 24)
    got = OnnxBackend(tmp_path, max_len=32, threads=1).score(ids)
    assert np.abs(got - logits(with_weights(model, checkpoint), ids)).max() <= 1e-3


def test_fp16_shares_the_table_too(tmp_path: Path) -> None:
    model = save_model(tmp_path / "hf", "qwen2")
    export(tmp_path / "hf", tmp_path / "onnx", precision="fp16", progress=False)
    size = (tmp_path / "onnx/model.onnx.data").stat().st_size
    rotary = 2 * 512 * 32 * 2
    assert abs(size - rotary - 2 * sum(p.numel() for p in model.parameters())) < 16384  # biases lie in model.onnx


def test_what_cannot_be_tied_is_said(tmp_path: Path) -> None:
    save_model(tmp_path / "untied", "llama3")
    with pytest.raises(UserError, match="not one packed table.*leave out --tie"):
        export(tmp_path / "untied", tmp_path / "onnx", precision="int4", tie=True, progress=False)
    save_model(tmp_path / "tied", "qwen2")
    with pytest.raises(UserError, match="not one packed table"):
        export(tmp_path / "tied", tmp_path / "onnx", tie=True, progress=False)


def some_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng().integers(0, VOCAB, shape)
