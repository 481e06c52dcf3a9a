"""A decoder checkpoint, plain or quantized by whomever: the one way to its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import ArtifactError, UnsupportedModelError
from orin_kit.models.formats.format import Format, Packing
from orin_kit.models.formats.registry import read_format
from orin_kit.models.packing import PackedWeight
from orin_kit.models.spec import EMBEDDING, HEAD, read_spec
from orin_kit.models.weights import WeightSource

MISMATCH = "the weights do not belong to this config.json; get both from one model"


class Checkpoint:
    """A model directory's spec and weights.

    Names are those of the plain checkpoint: a linear is "model.layers.0.mlp.up_proj", its tensor ends in ".weight".
    A tied head is the embedding table, unless it is packed by itself.

    Attributes:
        directory: of the checkpoint.
        spec: its config.
        source: its tensors as they are stored.
        scheme: how its linears are packed; None for plain checkpoints.

    Raises:
        ArtifactError: config or weights missing or broken.
        UnsupportedModelError: a family, field or quantization that orin-kit does not know.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.spec = read_spec(directory)
        config = self.spec.quantization_config
        self.scheme: Format | None = None if config is None else read_format(config)
        self.source = WeightSource(directory)
        self._shapes = self.spec.tensor_shapes()
        self._shapes[f"{HEAD}.weight"] = self._shapes[f"{EMBEDDING}.weight"]  # of tied checkpoints too
        self._zero_biases = self._strange_biases()

    @property
    def is_quantized(self) -> bool:
        """Whether linears are packed."""
        return self.scheme is not None

    def __contains__(self, name: str) -> bool:
        """Whether the config says that there is such a plain tensor."""
        return name in self._shapes

    def tensor(self, name: str) -> NDArray[Any]:
        """A plain tensor in its stored dtype, a view of mapped memory.

        Raises:
            ArtifactError: it is missing or of another shape than the config says.
        """
        stored = f"{EMBEDDING}.weight" if name == f"{HEAD}.weight" and self.spec.tie_word_embeddings else name
        return self._checked(name, self.source.get(stored))

    def float32(self, name: str) -> NDArray[np.float32]:
        """A tensor as a fresh fp32 array, dequantized when it is packed.

        Raises:
            ArtifactError: see `tensor` and `packed`.
        """
        linear = name.removesuffix(".weight")
        return self.packed(linear).dense() if self.is_packed(linear) else np.array(self.tensor(name), np.float32)

    def is_packed(self, linear: str) -> bool:
        """Whether a linear, named without ".weight", is stored quantized."""
        return self.scheme is not None and f"{linear}.{self.scheme.weight_part}" in self.source

    def packing(self, linear: str) -> Packing | None:
        """How a linear is quantized, without reading its weights; None where it is plain.

        Raises:
            ArtifactError: its tensors are missing, contradict each other, or have another shape than the config says.
        """
        if self.scheme is None or not self.is_packed(linear):
            return None
        packing = self.scheme.packing(self.source, linear)
        self._check_shape(f"{linear}.weight", packing.shape)
        return packing

    def packed(self, linear: str) -> PackedWeight:
        """A quantized linear in the canonical packing, its arrays views of mapped memory where the format allows.

        Raises:
            ArtifactError: it is plain; or see `packing`.
        """
        if self.scheme is None or not self.is_packed(linear):
            raise ArtifactError(f"{self.directory}: {linear} is not quantized", mend="quantize the model")
        weight = self.scheme.read(self.source, linear)
        self._check_shape(f"{linear}.weight", weight.shape)
        return weight

    def kv_scales(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """A layer's int8 KV cache scales, key and value, fp32 `[kv_heads, head_dim]`; None where none are stored.

        `cached = round(x / scale)`, keys after RoPE.

        Raises:
            ArtifactError: config.json says that there are scales, but they are missing, no numbers or misshapen.
        """
        if self.scheme is None or self.spec.layout.mixer != "attention":
            return None
        names = _kv_scale_names(layer)
        # Scales for each channel are stored where config.json has no scheme for them (quantize/kv_layout.py).
        if self.scheme.kv_bits is None and not any(name in self.source for name in names):
            return None
        key, value = (self._kv_scale(name) for name in names)
        return key, value

    def check_complete(self) -> None:
        """Say that the weights are not those of the config.

        Raises:
            ArtifactError: a tensor is missing, or of another shape.
            UnsupportedModelError: there are tensors that this family does not have.
        """
        known = set(self._shapes) | self._zero_biases
        for name in self._shapes:
            linear = name.removesuffix(".weight")
            if self.packing(linear) is None:
                self.tensor(name)
            elif self.scheme is not None:
                known |= {f"{linear}.{part}" for part in self.scheme.parts}
        for layer in range(self.spec.num_hidden_layers):
            if self.kv_scales(layer) is not None:
                names = _kv_scale_names(layer)
                known |= {*names, *(name.replace("_scale", "_zero_point") for name in names)}
        # Tied checkpoints may repeat the head, and old ones hold the rotary frequencies.
        extra = sorted(n for n in self.source.names if n not in known and not n.endswith("rotary_emb.inv_freq"))
        if extra:
            what = f"{self.directory} has {len(extra)} tensors that {self.spec.model_type} does not, e.g. {extra[0]}"
            raise UnsupportedModelError(what, mend="give a plain checkpoint (merge adapters into it first)")

    def _strange_biases(self) -> set[str]:
        """Biases that the family does not have. AutoGPTQ gives every linear one, of zeros."""
        linears = [name.removesuffix(".weight") for name, shape in self._shapes.items() if len(shape) == 2]
        strange = {f"{name}.bias" for name in linears if f"{name}.bias" in self.source} - self._shapes.keys()
        for name in sorted(strange):
            if self.source.get(name).any():
                what = f"{self.directory}: {name} is a bias that {self.spec.model_type} does not have"
                raise UnsupportedModelError(what, mend=MISMATCH)
        return strange

    def _kv_scale(self, name: str) -> NDArray[np.float32]:
        """Of one scale in all, one a head, or one a channel, however many axes of length 1 they come with."""
        stored, heads = self.source.float32(name), self.spec.num_key_value_heads
        if stored.size not in (1, heads, heads * self.spec.head_dim):
            what = f"{self.directory}: {name} is {list(stored.shape)} for {heads} heads of {self.spec.head_dim}"
            raise ArtifactError(what, mend=MISMATCH)
        if not (np.isfinite(stored) & (stored > 0)).all():
            raise ArtifactError(f"{self.directory}: {name} has scales that are not positive", mend=MISMATCH)
        by_head = stored.reshape(1 if stored.size == 1 else heads, -1)
        return np.ascontiguousarray(np.broadcast_to(by_head, (heads, self.spec.head_dim)))

    def _checked(self, name: str, tensor: NDArray[Any]) -> NDArray[Any]:
        self._check_shape(name, tensor.shape)
        return tensor

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if shape != self._shapes[name]:
            what = f"{self.directory}: {name} is {list(shape)}, config.json says {list(self._shapes[name])}"
            raise ArtifactError(what, mend=MISMATCH)


def _kv_scale_names(layer: int) -> tuple[str, str]:
    return f"model.layers.{layer}.self_attn.k_scale", f"model.layers.{layer}.self_attn.v_scale"
