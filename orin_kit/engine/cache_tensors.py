"""Which tensors of a `trt_native` graph its caches are written from, so that TensorRT's own layer can write them.

The graph says for each cache `present = Where(taken, Transpose(GatherND(Transpose(update), places)), past)`
(`export/dialects/trt_native.py`). TensorRT's parser keeps the names, and the network API puts a KVCacheUpdate layer
there (`trt.Session`).
"""

from __future__ import annotations

import mmap
from pathlib import Path

from orin_kit.engine.plan import past_of
from orin_kit.engine.trt import CacheLayer
from orin_kit.errors import ArtifactError
from orin_kit.inspect.onnx_file import message_of, text_of

CHAIN = (("Where", 1), ("Transpose", 0), ("GatherND", 0), ("Transpose", 0))  # operator, and which input to follow
Node = tuple[str, tuple[str, ...]]  # operator, inputs


def cache_layers(path: Path) -> list[CacheLayer]:
    """The caches of a graph exported with `--dialect trt_native --kv-update select`.

    Raises:
        ArtifactError: the graph writes a cache in another way.
    """
    producers, outputs = _read(path)
    layers = []
    for present in outputs:
        past = past_of(present)
        if past == present or not past.startswith("past_key_values."):
            continue
        update, written = present, producers.get(present)
        for operator, place in CHAIN:
            node = producers.get(update)
            if node is None or node[0] != operator:
                what = f"{path} does not write {present} as the trt_native dialect does"
                raise ArtifactError(what, mend="export it again with this orin-kit")
            update = node[1][place]
        assert written is not None
        if written[1][2] != past:
            raise ArtifactError(f"{path} does not write {present} over {past}", mend="export it again")
        layers.append(CacheLayer(past=past, update=update, present=present))
    return layers


def _read(path: Path) -> tuple[dict[str, Node], list[str]]:
    """The node that each tensor comes from, and the graph's outputs."""
    with path.open("rb") as stream:
        model = message_of(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
    graph = message_of(model[7][0])
    producers: dict[str, Node] = {}
    for node in map(message_of, graph.get(1, ())):
        inputs = tuple(str(name, "utf-8") for name in node.get(1, ()))
        for name in node.get(2, ()):
            producers[str(name, "utf-8")] = (text_of(node, 4), inputs)
    return producers, [text_of(message_of(value), 1) for value in graph.get(12, ())]
