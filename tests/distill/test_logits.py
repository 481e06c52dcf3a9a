"""The chunked task loss against float64 numpy written from the formulas; gradients against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orin_kit.distill.logits import DIVERGENCES, Dense, TaskLoss, TopK, task_loss, top_k
from orin_kit.errors import UserError

KINDS = sorted(DIVERGENCES)
RNG = np.random.default_rng()


def dense(positions: int, vocab: int, hidden: int, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> Dense:
    """Logits with a spread of about 2, as an LM's are; a leaf that wants gradients."""
    make = lambda *shape, scale=1.0: (torch.randn(*shape, dtype=dtype) * scale).requires_grad_()  # noqa: E731
    return Dense(make(positions, hidden), make(vocab, hidden, scale=2 / hidden**0.5), make(vocab) if bias else None)


def frozen(logits: Dense) -> Dense:
    return Dense(logits.hidden.detach(), logits.weight.detach(), None if logits.bias is None else logits.bias.detach())


def as_numpy(logits: Dense) -> np.ndarray:
    hidden, weight = (t.detach().double().numpy() for t in (logits.hidden, logits.weight))
    return hidden @ weight.T + (0 if logits.bias is None else logits.bias.detach().double().numpy())


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.sum(p * np.log(p / q), -1)


def reference(kind: str, p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    """Of distributions: the teacher's p and the student's q."""
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return kl(p, q)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def gradients(loss: TaskLoss, logits: Dense) -> list[Tensor]:
    wanted = [t for t in (logits.hidden, logits.weight, logits.bias) if t is not None]
    return list(torch.autograd.grad(loss.loss, wanted))


def labels_for(logits: Dense) -> Tensor:
    return torch.randint(0, logits.vocab, (logits.positions,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ours", "theirs"), [(300, 300), (300, 320), (320, 300)])
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (2.0, 0.1), (0.7, 0.0), (3.0, 1.0)])
def test_against_numpy(kind: str, ours: int, theirs: int, temperature: float, beta: float) -> None:
    student, teacher = dense(23, ours, 16, bias=True), dense(23, theirs, 24)
    labels, weight = labels_for(student), float(RNG.uniform(0.1, 0.9))
    s, t = as_numpy(student), as_numpy(teacher)
    for vocab_size in (None, 290):
        shared = min(ours, theirs, vocab_size or ours)
        q, p = softmax(s[:, :shared] / temperature), softmax(t[:, :shared] / temperature)
        kd = reference(kind, p, q, beta).mean() * temperature**2
        ce = -np.log(softmax(s)[np.arange(23), labels]).mean()
        found = task_loss(
            student,
            labels,
            teacher,
            teacher_weight=weight,
            temperature=temperature,
            divergence=kind,
            beta=beta,
            chunk=7,
            vocab_size=vocab_size,
        )
        assert found.kd is not None
        assert float(found.kd) == pytest.approx(kd, rel=2e-5)
        assert float(found.ce) == pytest.approx(ce, rel=2e-5)
        assert found.loss.item() == pytest.approx((1 - weight) * ce + weight * kd, rel=2e-5)
        assert not found.ce.requires_grad
        assert not found.kd.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_gradients_against_finite_differences(kind: str, stored: bool, weight: float) -> None:
    student, teacher = dense(5, 12, 4, bias=True, dtype=torch.double), dense(5, 14, 3, dtype=torch.double)
    labels = labels_for(student)
    cut = Dense(teacher.hidden, teacher.weight[:12])
    signal = top_k(cut, 4, (2.0,)) if stored else frozen(teacher)

    def loss(hidden: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        at = Dense(hidden, weights, bias)
        settings: dict[str, Any] = dict(temperature=2.0, divergence=kind, beta=0.3, chunk=2)
        return task_loss(at, labels, signal, teacher_weight=weight, **settings).loss

    assert torch.autograd.gradcheck(loss, (student.hidden, student.weight, student.bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [False, True])
def test_chunks_do_not_change_the_result(kind: str, stored: bool) -> None:
    student, teacher = dense(37, 200, 16, bias=True), frozen(dense(37, 200, 8))
    labels = labels_for(student)
    found = []
    for chunk in (1, 10, 37, 1000, None):
        signal = top_k(teacher, 20, (1.5,), chunk) if stored else teacher
        loss = task_loss(
            student, labels, signal, teacher_weight=0.5, temperature=1.5, divergence=kind, beta=0.7, chunk=chunk
        )
        found.append([loss.loss.detach(), *gradients(loss, student)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_cost_nothing(kind: str) -> None:
    student = dense(11, 151, 16, bias=True)
    loss = task_loss(
        student, labels_for(student), frozen(student), teacher_weight=1.0, temperature=2.0, divergence=kind, chunk=4
    )
    assert loss.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert float(loss.ce) > 1.0
    for gradient in gradients(loss, student):
        assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [False, True])
def test_extreme_logits_stay_finite(kind: str, stored: bool) -> None:
    """Logits of +-1e4: most probabilities underflow to 0, and no product of 0 and a logarithm may become NaN."""
    scale = 1e4
    student, teacher = dense(9, 64, 8), frozen(dense(9, 64, 8))
    big_student = Dense(student.hidden, (student.weight.detach() * scale).requires_grad_())
    big_teacher = Dense(teacher.hidden, teacher.weight * scale)
    signal = top_k(big_teacher, 5, (1.0,)) if stored else big_teacher
    labels = labels_for(student)
    loss = task_loss(big_student, labels, signal, teacher_weight=0.5, temperature=1.0, divergence=kind)
    assert bool(torch.isfinite(loss.loss))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(loss, big_student))
    if not stored and kind == "forward_kl":
        s, t = as_numpy(big_student), as_numpy(big_teacher)
        log_q, log_p = (x - x.max(-1, keepdims=True) for x in (s, t))
        log_q -= np.log(np.exp(log_q).sum(-1, keepdims=True))
        expected = np.sum(softmax(t) * (log_p - np.log(np.exp(log_p).sum(-1, keepdims=True)) - log_q), -1).mean()
        assert loss.kd is not None
        assert float(loss.kd) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("small", [1e-3, 1e-4])
def test_jsd_becomes_each_kl_at_its_ends(small: float) -> None:
    """JSD / beta goes to KL(teacher || student) as beta goes to 0, JSD / (1 - beta) to the reverse as it goes to 1."""
    student, teacher = (dense(13, 50, 8, dtype=torch.double) for _ in range(2))
    # A spread of 0.4: how fast the limit is reached depends on the largest ratio of two probabilities.
    student, teacher = (frozen(Dense(0.2 * logits.hidden, logits.weight)) for logits in (student, teacher))
    labels = labels_for(student)

    def kd(kind: str, beta: float) -> float:
        loss = task_loss(student, labels, teacher, teacher_weight=1.0, temperature=1.0, divergence=kind, beta=beta)
        return loss.loss.item()

    assert kd("jsd", small) / small == pytest.approx(kd("forward_kl", 0.5), rel=10 * small)
    assert kd("jsd", 1 - small) / small == pytest.approx(kd("reverse_kl", 0.5), rel=10 * small)
    assert kd("jsd", 0.0) == kd("forward_kl", 0.5)
    assert kd("jsd", 1.0) == kd("reverse_kl", 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_a_lower_bound_and_grows_to_the_whole(kind: str, temperature: float) -> None:
    student, teacher = dense(29, 120, 8, dtype=torch.double), frozen(dense(29, 120, 8, dtype=torch.double))
    labels, settings = labels_for(student), dict(teacher_weight=1.0, temperature=temperature, divergence=kind, beta=0.4)

    def kd(signal: Dense | TopK) -> float:
        return task_loss(student, labels, signal, **settings).loss.item()  # type: ignore[arg-type]

    whole = kd(teacher)
    bounds = [kd(top_k(teacher, k, (1.0, 2.0))) for k in (1, 4, 16, 64, 119, 120)]
    assert all(low <= high + 1e-12 for low, high in zip(bounds, [*bounds[1:], whole], strict=True))
    assert 0 < bounds[0] < 0.9 * whole
    assert bounds[-2:] == pytest.approx([whole, whole], rel=1e-9)  # a bucket of one token, and an empty one


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_of_all_tokens_has_the_gradients_of_the_whole(kind: str) -> None:
    student, teacher = dense(17, 90, 8, bias=True), frozen(dense(17, 90, 8))
    labels, settings = labels_for(student), dict(teacher_weight=0.7, temperature=2.0, divergence=kind, chunk=5)
    found = [
        gradients(task_loss(student, labels, signal, **settings), student)  # type: ignore[arg-type]
        for signal in (teacher, top_k(teacher, 90, (2.0,)))
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_top_k_against_numpy() -> None:
    teacher, k, temperatures = dense(31, 77, 8, bias=True), 9, (0.5, 1.0, 4.0)
    found, logits = top_k(teacher, k, (1.0, 0.5, 4.0), chunk=4), as_numpy(teacher)
    assert found.temperatures == temperatures
    order = np.argsort(-logits, -1)
    assert (found.ids.numpy() == order[:, :k]).all()
    np.testing.assert_allclose(found.logits.numpy(), np.take_along_axis(logits, order[:, :k], -1), rtol=1e-4, atol=1e-5)
    rest = np.take_along_axis(logits, order[:, k:], -1)
    expected = np.stack([np.log(np.exp(rest / t).sum(-1)) for t in temperatures], -1)
    np.testing.assert_allclose(found.tails.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not found.logits.requires_grad
    assert bool(torch.isneginf(top_k(teacher, 77, (1.0,)).tails).all())


def test_tails_between_recorded_temperatures() -> None:
    """Linear in 1/T between close temperatures: never below the true tail, and near it."""
    teacher = dense(40, 5000, 16, dtype=torch.double)
    recorded = top_k(teacher, 32, (1.0, 1.25, 1.5, 1.75, 2.0))
    errors = []
    for temperature in (1.1, 1.3, 1.6, 1.9):
        error = recorded.tail(temperature) - top_k(teacher, 32, (temperature,)).tails[:, 0]
        assert float(error.min()) >= -1e-9  # convex: the chord lies above
        errors.append(float(error.max()))
    assert max(errors) < 0.02  # nats
    whole = top_k(teacher, 5000, (1.0, 2.0)).tail(1.5)  # empty tails stay empty
    assert float(whole.max()) < -1e29
    torch.testing.assert_close(recorded.tail(1.5), recorded.tails[:, 2])
    for outside in (0.9, 2.1):
        with pytest.raises(UserError, match="stored at 1, 1.25, 1.5, 1.75, 2"):
            recorded.tail(outside)


def test_autocast_is_close_to_fp32() -> None:
    """fp32 masters, a bf16 teacher: the loss in bf16 is off by what bf16 logits are off."""
    student, teacher = dense(64, 500, 32, bias=True), frozen(dense(64, 500, 48))
    labels, settings = labels_for(student), dict(teacher_weight=0.5, temperature=2.0, chunk=20)
    teacher = Dense(teacher.hidden.bfloat16(), teacher.weight.bfloat16())
    exact = task_loss(student, labels, teacher, **settings)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        close = task_loss(student, labels, teacher, **settings)  # type: ignore[arg-type]
    assert close.loss.dtype == torch.float32
    assert close.loss.item() == pytest.approx(exact.loss.item(), rel=5e-3)
    assert close.loss.item() != exact.loss.item()  # it did run in bf16
    for a, b in zip(gradients(close, student), gradients(exact, student), strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    """No autocast, weights in half precision: gradients in their dtype; fp16's small ones do not vanish."""
    student = dense(3000, 40, 16)
    half = Dense(*(t.detach().to(dtype).requires_grad_() for t in (student.hidden, student.weight)))
    exact = Dense(*(t.detach().float().requires_grad_() for t in (half.hidden, half.weight)))
    teacher, labels = frozen(dense(3000, 40, 16)), labels_for(student)
    settings: dict[str, Any] = dict(teacher_weight=0.5, temperature=2.0, chunk=999)
    found = torch.autograd.grad(task_loss(half, labels, teacher, **settings).loss * 1024, (half.hidden, half.weight))
    expected = gradients(task_loss(exact, labels, teacher, **settings), exact)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert float((a.float() / 1024 - b).norm() / b.norm()) < 2e-2


def test_no_position_costs_nothing() -> None:
    student, teacher = dense(0, 30, 8, bias=True), frozen(dense(0, 30, 8))
    for signal in (None, teacher, top_k(teacher, 3, (1.0,))):
        loss = task_loss(student, labels_for(student), signal, teacher_weight=0.5, temperature=1.0)
        assert loss.loss.item() == 0.0
        assert all(bool((gradient == 0).all()) for gradient in gradients(loss, student))


def test_without_a_teacher_it_is_cross_entropy() -> None:
    student, teacher = dense(19, 60, 8, bias=True), frozen(dense(19, 60, 8))
    labels = labels_for(student)
    plain = nn.functional.cross_entropy(nn.functional.linear(student.hidden, student.weight, student.bias), labels)
    expected = torch.autograd.grad(plain, (student.hidden, student.weight, student.bias))
    for signal, weight in ((None, 0.5), (teacher, 0.0)):
        found = task_loss(student, labels, signal, teacher_weight=weight, temperature=2.0, chunk=8)
        assert found.kd is None
        torch.testing.assert_close(found.loss, plain)
        torch.testing.assert_close(gradients(found, student), list(expected))


def test_used_twice_and_backward_twice_in_one_graph() -> None:
    """A tied head that a second loss uses too, one graph kept for two backward passes."""
    table = nn.Embedding(50, 8)
    tokens, labels, teacher = torch.randint(0, 50, (12,)), torch.randint(0, 50, (12,)), frozen(dense(12, 50, 6))
    settings: dict[str, Any] = dict(teacher_weight=0.4, temperature=2.0, chunk=5)
    hidden = table(tokens)

    def naive(at: Tensor) -> Tensor:
        student, target = at @ table.weight.t(), teacher.hidden @ teacher.weight.t()
        kd = nn.functional.kl_div(
            (student / 2).log_softmax(-1), (target / 2).log_softmax(-1), log_target=True, reduction="batchmean"
        )
        return 0.6 * nn.functional.cross_entropy(student, labels) + 0.4 * 4 * kd

    expected = torch.autograd.grad(3 * naive(hidden) + naive(hidden.sin()), table.weight, retain_graph=True)
    ours = [task_loss(Dense(at, table.weight), labels, teacher, **settings).loss for at in (hidden, hidden.sin())]
    total = 3 * ours[0] + ours[1]
    for keep in (True, False):
        found = torch.autograd.grad(total, table.weight, retain_graph=keep)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Sees the result of every operation, within autograd functions too."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = (leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        self.elements = max(self.elements, *made, 0)
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [False, True])
def test_all_logits_never_exist(kind: str, stored: bool) -> None:
    positions, vocab, chunk = 600, 300, 10
    student, teacher = dense(positions, vocab, 8), frozen(dense(positions, vocab + 20, 8))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        signal = top_k(Dense(teacher.hidden, teacher.weight[:vocab]), 20, (2.0,), chunk) if stored else teacher
        loss = task_loss(
            student, labels_for(student), signal, teacher_weight=0.5, temperature=2.0, divergence=kind, chunk=chunk
        )
        loss.loss.backward()
    assert 0 < largest.elements <= positions * (20 if stored else 8)  # hidden states, or the stored k: not the logits
    assert kept
    assert max(kept) <= positions * 8


def test_nothing_is_kept_where_nothing_learns() -> None:
    student, teacher = dense(12, 40, 8), frozen(dense(12, 40, 8))
    labels, settings = labels_for(student), dict(teacher_weight=0.5, temperature=2.0)
    with torch.no_grad():
        silent = task_loss(student, labels, teacher, **settings)  # type: ignore[arg-type]
    assert not silent.loss.requires_grad
    head_only = Dense(student.hidden.detach(), student.weight)
    loss = task_loss(head_only, labels, teacher, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(loss.loss.detach(), silent.loss)
    loss.loss.backward()
    assert student.hidden.grad is None
    assert student.weight.grad is not None
    assert not task_loss(frozen(student), labels, teacher, **settings).loss.requires_grad  # type: ignore[arg-type]


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)

    def forward(self, tokens: Tensor, labels: Tensor, teacher: Dense) -> Tensor:
        hidden = self.table(tokens).tanh()
        settings: dict[str, Any] = dict(teacher_weight=0.5, temperature=2.0, chunk=3)
        return task_loss(Dense(hidden, self.table.weight), labels, teacher, **settings).loss


def test_gradients_pass_through_ddp() -> None:
    """One process is enough: its buckets, hooks and all-reduce are those of many."""
    tokens, labels = torch.randint(0, 40, (2, 16))
    inputs = (tokens, labels, frozen(dense(16, 40, 6)))
    alone = Student()
    alone(*inputs).backward()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        reduced: list[Tensor] = []

        # Without annotations: DDP reads them, and does not understand them as text.
        def doubled(_, bucket):  # type: ignore[no-untyped-def]
            reduced.append(bucket.buffer().clone())
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer() * 2)
            return done

        twin = Student()
        twin.load_state_dict(alone.state_dict())
        model = nn.parallel.DistributedDataParallel(twin)
        model.register_comm_hook(None, doubled)
        model(*inputs).backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(torch.cat(reduced).view(40, 8), alone.table.weight.grad)
    torch.testing.assert_close(twin.table.weight.grad, 2 * alone.table.weight.grad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "chi2"}, "divergence 'chi2' is not known"),
        ({"teacher_weight": 1.5}, "teacher_weight 1.5"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"vocab_size": 30}, "name token"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, "labels of shape"),
        ({"temperature": 3.0}, "temperature 3 for teacher logits stored at 1, 2"),
    ],
)
def test_what_cannot_be_is_said(fields: dict[str, Any], message: str) -> None:
    student, teacher = dense(12, 40, 8), frozen(dense(12, 40, 8))
    bias = torch.zeros(40)
    bias[-1] = 100.0  # the last token is among every position's k
    stored = top_k(Dense(teacher.hidden, teacher.weight, bias), 3, (1.0, 2.0))
    settings: dict[str, Any] = dict(labels=labels_for(student), teacher_weight=0.5, temperature=1.0) | fields
    with pytest.raises(UserError, match=message):
        task_loss(student, settings.pop("labels"), stored, **settings)
