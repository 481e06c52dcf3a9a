"""Every dialect on random decoders and ragged batches, prefill and decode, against transformers.

`ort` runs in onnxruntime; `reference` and the TensorRT dialects in onnx.reference, with the plugin operators'
implementations in numpy. TensorRT itself has not run its two.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from transformers import PreTrainedModel

from families import save_model
from orin_kit.export.export import export
from orin_kit.export.plugin_ops import OPS
from orin_kit.quantize.rounded import RoundedCheckpoint
from orin_kit.runtime.runtime import open_runtime
from random_models import MAX_LEN, STEPS, configs, precisions, rows

TOLERANCE = 1e-3  # max abs error of fp32 logits, whose spread is about 1
WAYS = (("ort", "select"), ("reference", "select"), ("trt_plugin", "select"), ("trt_native", "select"),
        ("trt_native", "layer"))  # fmt: skip

Rows = list[NDArray[np.int64]]
Steps = list[NDArray[np.float32]]  # logits [batch, vocab] after the prompts, and after each decoded token


def expected(model: PreTrainedModel, batch: Rows) -> Steps:
    with torch.no_grad():
        alone = [model(torch.from_numpy(row)[None]).logits[0, -STEPS - 1 :].numpy() for row in batch]
    return list(np.stack(alone, axis=1))


def by_onnxruntime(directory: Path, batch: Rows) -> Steps:
    backend = open_runtime(directory, max_len=MAX_LEN, batch_size=len(batch), threads=1).backend
    logits = [backend.prefill([row[:-STEPS].tolist() for row in batch])]
    logits += [backend.decode(np.array([row[at] for row in batch])) for at in range(-STEPS, 0)]
    return logits


def by_onnx_reference(directory: Path, batch: Rows) -> Steps:
    evaluator = ReferenceEvaluator(str(directory / "model.onnx"), new_ops=list(OPS))
    sizes = {"batch": len(batch), "max_len": MAX_LEN}
    caches = {}
    for value in evaluator.proto_.graph.input:
        if value.name.startswith("past_") and value.name != "past_lengths":
            dims = [sizes.get(dim.dim_param, dim.dim_value) for dim in value.type.tensor_type.shape.dim]
            caches[value.name] = np.zeros(dims, np.float32)
    lengths = np.array([len(row) - STEPS for row in batch])
    ids = np.zeros((len(batch), lengths.max()), np.int64)
    for row, length, tokens in zip(ids, lengths, batch, strict=True):
        row[:length] = tokens[:length]
    past, logits = np.zeros(len(batch), np.int64), []
    for step in range(STEPS + 1):
        counts = lengths if step == 0 else np.ones(len(batch), np.int64)
        feed = {"input_ids": ids, "past_lengths": past, "logit_positions": counts[:, None] - 1, "input_lengths": counts}
        feed = {name: feed[name] for name in evaluator.input_names if name in feed} | caches
        out, *present = evaluator.run(None, feed)
        caches = dict(zip(caches, present, strict=True))
        logits.append(out[:, 0])
        past = past + counts
        ids = np.array([row[len(row) - STEPS + step :][:1] for row in batch]) if step < STEPS else ids
    return logits


def save_rounded(model: PreTrainedModel, directory: Path, group_size: int) -> None:
    """Put into `model` what an INT4 export of its checkpoint computes with."""
    checkpoint = RoundedCheckpoint(directory, group_size)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # apart from the embedding
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(torch.from_numpy(checkpoint.packed(name).dense()))
        table = model.get_input_embeddings().weight
        table.copy_(table.half())  # beside a packed head the table is stored in fp16


def check(data: st.DataObject) -> None:
    family, changes = data.draw(configs())
    how = data.draw(precisions())
    batch = data.draw(rows(changes["vocab_size"]))
    with tempfile.TemporaryDirectory() as home:
        model = save_model(Path(home) / "hf", family, **changes)
        if how["precision"] == "int4":
            save_rounded(model, Path(home) / "hf", how["group_size"])
        wanted = expected(model, batch)
        for dialect, kv_update in WAYS:
            out = Path(home) / f"{dialect}-{kv_update}"
            options: dict[str, Any] = dict(activations="fp32", embedding_bits=16, max_len=MAX_LEN, accuracy_level=0)
            export(Path(home) / "hf", out, dialect=dialect, kv_update=kv_update, progress=False, **options, **how)
            run: Callable[[Path, Rows], Steps] = by_onnxruntime if dialect == "ort" else by_onnx_reference
            for step, (got, want) in enumerate(zip(run(out, batch), wanted, strict=True)):
                error = np.abs(got - want).max()
                assert error <= TOLERANCE, f"{dialect} {kv_update}, step {step}: {error}"
            if dialect.startswith("trt"):
                every_value_is_typed(out / "model.onnx")


def every_value_is_typed(path: Path) -> None:
    """The checker takes the graph, and shape inference knows the type and rank of every value."""
    onnx.checker.check_model(str(path))
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
    known = {v.name for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)
             if v.type.tensor_type.elem_type and v.type.tensor_type.HasField("shape")}  # fmt: skip
    made = {name for node in model.graph.node for name in node.output if name}
    assert made <= known, sorted(made - known)[:5]


QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large)


@settings(max_examples=8, deadline=None, suppress_health_check=QUIET)
@given(st.data())
def test_dialects_agree_with_transformers(data: st.DataObject) -> None:
    check(data)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
@given(st.data())
def test_dialects_agree_with_transformers_on_many(data: st.DataObject) -> None:
    check(data)
