"""What accelerate is told: device, precision, several processes."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from orin_kit.errors import UserError

PATIENCE = timedelta(hours=12)  # that processes wait for the first one, which alone scores and writes


def make_accelerator(precision: str) -> Accelerator:
    """accelerate's own choice of device and processes (`accelerate launch`), at the recipe's precision.

    Raises:
        UserError: fp16 without a GPU, DeepSpeed, or FSDP of version 1.
    """
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision: fp16 needs a GPU", mend="use bf16 or fp32 on a CPU")
    AcceleratorState._reset_state()  # a second run in one process may have another precision
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision),
        # Alignment stages leave the layers above the aligned ones without a gradient.
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    state = accelerator.state
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu" and _fsdp_asked():
        # accelerate knows FSDP on accelerators alone; torch's own, which it calls, does CPUs as well.
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # where accelerate looks it up anew
    if state.distributed_type == DistributedType.FSDP:
        # accelerate's own policy adds gradients up, and hands losses out, in the lower precision. Without one autocast
        # decides what is multiplied in it, as in a single process, and sums stay in fp32.
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if state.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "distill does not train with DeepSpeed", mend="use accelerate launch --use_fsdp --fsdp_version 2"
        )
    if state.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("distill shards with version 2 of FSDP", mend="add --fsdp_version 2 to accelerate launch")
    return accelerator


def _fsdp_asked() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
