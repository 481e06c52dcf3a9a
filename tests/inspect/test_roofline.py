"""The roofline of real configs against numbers written out by hand, and DESIGN's own arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from families import save_model
from orin_kit.inspect.inspect import inspect
from orin_kit.models.spec import read_spec
from orin_kit.profile.roofline import AGX_ORIN_64GB, Device, Work, tpot, ttft, work_of

CONFIGS = Path(__file__).parents[1] / "data/configs"

# Qwen2.5-1.5B: q and o 1536 x 1536, k and v 256 x 1536, three of 8960 x 1536, 28 layers; table 151,936 x 1536.
LINEARS_1B5 = 28 * (2 * 1536 * 1536 + 2 * 256 * 1536 + 3 * 8960 * 1536)
TABLE_1B5 = 151_936 * 1536
SMALL_1B5 = 28 * (2 * 1536 + 1536 + 2 * 256) + 1536  # norms, biases of q, k, v, the last norm
# Qwen2.5-7B: q and o 3584 x 3584, k and v 512 x 3584, three of 18,944 x 3584; table 152,064 x 3584, untied.
LINEARS_7B = 28 * (2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 18_944 * 3584)
TABLE_7B = 152_064 * 3584
SMALL_7B = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584


def test_qwen_1b5_agrees_with_the_published_and_the_designed() -> None:
    found = inspect(CONFIGS / "Qwen2.5-1.5B-Instruct")
    assert found.kind == "config" and found.model
    assert found.model.parameters == LINEARS_1B5 + TABLE_1B5 + SMALL_1B5 == 1_543_714_304
    assert (found.model.kv_bytes_per_token, found.model.stored_parameters) == (28 * 2 * 2 * 128 * 2, None)
    fp16, int4, int4_table = found.predictions
    cache = 1024 * 28_672
    assert fp16.weights_bytes == 2 * 1_543_714_304
    row = 1536 * 2  # of the tied table, which is read whole as the head
    assert fp16.decode_bytes == 2 * 1_543_714_304 + row + cache
    packed = (LINEARS_1B5 + TABLE_1B5) // 2 + (LINEARS_1B5 + TABLE_1B5) // 128 * 2
    assert int4.decode_bytes == packed + 2 * SMALL_1B5 + 1536 * 2 + cache
    assert int4.decode_bytes == pytest.approx(0.82e9, rel=0.01)  # DESIGN: 0.82 GB a token, 4.0 ms
    assert int4.tpot.bound_ms == pytest.approx(4.0, abs=0.05)
    assert int4.tpot.bound_ms == int4.decode_bytes / 204.8e9 * 1e3
    assert int4.tpot.low_ms == pytest.approx(int4.tpot.bound_ms / 0.85)
    assert int4.tpot.high_ms == pytest.approx(int4.tpot.bound_ms / 0.65)
    assert int4.weights_bytes == packed + 2 * SMALL_1B5 + 2 * TABLE_1B5
    assert int4_table.weights_bytes == packed + 2 * SMALL_1B5  # one table
    assert int4_table.decode_bytes == int4_table.weights_bytes + 1536 // 2 + 1536 // 128 * 2 + cache
    assert int4_table.memory_bytes == int4_table.weights_bytes + 4096 * 28_672
    assert [p.fits for p in found.predictions] == [False, False, True]
    # 128 tokens: 2 operations a weight and token, 4 x 1536 a pair and layer, the head once.
    pairs = 128 * 129 // 2
    operations = 2 * 128 * LINEARS_1B5 + 28 * 4 * 1536 * pairs + 2 * TABLE_1B5
    assert int4.ttft.bound_ms == pytest.approx(operations / 42e12 * 1e3)
    assert int4.ttft.high_ms == pytest.approx(operations / 42e12 / 0.3 * 1e3)
    assert fp16.ttft.bound_ms == pytest.approx(
        (2 * 1_543_714_304 + row + 128 * 28_672) / 204.8e9 * 1e3
    )  # reading is longer


def test_qwen_7b() -> None:
    found = inspect(CONFIGS / "Qwen2.5-7B-Instruct", context=2048, prompt_length=512)
    assert found.model and found.model.parameters == LINEARS_7B + 2 * TABLE_7B + SMALL_7B == 7_615_616_512
    assert found.model.head_parameters == TABLE_7B
    _, int4, int4_table = found.predictions
    tables = TABLE_7B // 2 + TABLE_7B // 32 * 2  # of a head of its own, the embedding is packed in smaller groups
    assert int4_table.weights_bytes == int4.weights_bytes - 2 * TABLE_7B + tables
    packed = (LINEARS_7B + TABLE_7B) // 2 + (LINEARS_7B + TABLE_7B) // 128 * 2
    assert int4.decode_bytes == packed + 2 * SMALL_7B + 3584 * 2 + 2048 * 28 * 2 * 4 * 128 * 2
    assert int4.tpot.bound_ms == int4.decode_bytes / 204.8e9 * 1e3 and not int4.fits
    pairs = 512 * 513 // 2
    operations = 2 * 512 * LINEARS_7B + 28 * 4 * 3584 * pairs + 2 * TABLE_7B
    assert int4.ttft.bound_ms == pytest.approx(operations / 42e12 * 1e3)


def test_published_shares_are_what_the_device_says() -> None:
    """Qwen3-1.7B, 28 layers of 2048: 45.8 tokens/s in BF16 and 101.0 in W4A16, whose head stays BF16."""
    linears = 28 * (2 * 2048 * 2048 + 2 * 1024 * 2048 + 3 * 6144 * 2048)
    table = 151_936 * 2048
    bf16 = 45.8 * 2 * (linears + table) / AGX_ORIN_64GB.bandwidth
    w4a16 = 101.0 * (linears / 2 + linears / 128 * 2 + 2 * table) / AGX_ORIN_64GB.bandwidth
    assert (round(bf16, 2), round(w4a16, 2)) == (0.77, 0.67)
    assert "77 and 67 %" in " ".join(AGX_ORIN_64GB.why)
    low, high = AGX_ORIN_64GB.bandwidth_share
    assert low <= w4a16 <= bf16 <= high


def test_convolutions_read_their_state_and_no_cache(tmp_path: Path) -> None:
    save_model(tmp_path, "conv")
    spec = read_spec(tmp_path)
    work = work_of(spec, 1000, 2)
    assert (work.cache_bytes, work.state_bytes, work.pair_flops) == (0, 3 * 384 * 23 * 2, 0)
    assert work.decode_bytes(10) == work.decode_bytes(500) == 1000 + 3 * 384 * 23 * 2
    linears = 3 * (3 * 384 * 384 + 384 * 384 + 3 * 384 * spec.intermediate_size)
    assert work.flops(5) == 2 * 5 * (linears + 3 * 384 * 24) + 2 * 2048 * 384


def test_the_longer_of_both_counts() -> None:
    device = Device("d", bandwidth=1e9, flops=1e9, bandwidth_share=(0.5, 1.0), compute_share=(0.1, 0.5), why=())
    reading = Work(weight_bytes=1_000_000, cache_bytes=0, state_bytes=0, token_flops=10, pair_flops=0, head_flops=0)
    assert (tpot(reading, 3, device).bound_ms, tpot(reading, 3, device).high_ms) == (1.0, 2.0)
    computing = Work(weight_bytes=1, cache_bytes=1, state_bytes=0, token_flops=1000, pair_flops=2, head_flops=20)
    assert computing.flops(4) == 4000 + 2 * 10 + 20
    assert computing.flops(1, context=9) == 1000 + 2 * 10 + 20
    assert ttft(computing, 4, device).low_ms == pytest.approx(4040 / 1e9 / 0.5 * 1e3)
