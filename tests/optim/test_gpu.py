"""What only a CUDA device can show: `pytest -m gpu`."""

import copy
import itertools

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback, TrainingArguments

from prm_hf.metrics import evaluation
from prm_hf.optim import PRM
from prm_hf.optim.hyperparameters import MASKS, REDUCTIONS
from prm_hf.trainers import PRMDPOConfig, PRMDPOTrainer

from ..tiny import make_model, make_tokenizer, preference_dataset
from .optimizer_runs import MEASURED, SHAPES, schedule


pytestmark = pytest.mark.gpu


def make_params(dtype=torch.float32, extra=((5000, 33), (37, 896), (4096,), (4097,), (300_003,))):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [*SHAPES, *extra]
    return [torch.randn(s, device="cuda", generator=generator).to(dtype).requires_grad_() for s in shapes]


def train(optimizer, params, steps=6, skip=True):
    generator = torch.Generator("cuda").manual_seed(1)
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = schedule(t)
        for i, p in enumerate(params):
            g = torch.randn(p.shape, device="cuda", generator=generator).mul_(0.3).add_(0.05).to(p.dtype)
            p.grad = None if skip and i == 3 and t % 3 == 1 else g
        optimizer.step()


VARIANTS = [
    {},
    {"amsgrad": True, "maximize": True},
    {"decoupled_weight_decay": False, "alpha": 0.05},
    {"mask_warmup_steps": 2, "bias_correction": False},
    {"capturable": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v), "plain"))
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_equals_the_definition_in_float64(implementation, variant):
    """Against the reference on float64 copies, which the CPU tests hold against an independent implementation."""
    for mask, measured in itertools.product(MASKS, MEASURED):
        settings = {"mask": mask, **measured, "weight_decay": 0.1, **variant}
        params = make_params()
        exact = [p.detach().double().requires_grad_() for p in params]
        ours = PRM(params, **{implementation: True}, **settings)
        theirs = PRM(exact, foreach=False, fused=False, **settings)
        generator = torch.Generator("cuda").manual_seed(1)
        for t in range(6):
            ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = schedule(t)
            for i, (p, q) in enumerate(zip(params, exact, strict=True)):
                g = torch.randn(p.shape, device="cuda", generator=generator).mul_(0.3).add_(0.05)
                p.grad, q.grad = (None, None) if i == 3 and t % 3 == 1 else (g, g.double())
            ours.step()
            theirs.step()
        for p, q in zip(params, exact, strict=True):
            if mask != "hard" or measured["reduction"] != "per_param":
                assert (p - q).norm() <= 1e-6 * q.norm()
            elif p.numel():  # of 460,000 decisions a few lie within rounding of their threshold
                assert ((p - q).abs() > 1e-6 * q.abs().max().clamp(min=1)).float().mean() < 1e-4
        stats = ours.get_mask_stats()
        for key, value in theirs.get_mask_stats().items():
            if key not in ("min_q", "max_q"):  # of all elements, those that rounding has changed most
                assert stats[key] == pytest.approx(value, rel=1e-4, abs=1e-12, nan_ok=True), (key, settings)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bfloat16_is_rounded_once(reduction):
    params, shadows = make_params(torch.bfloat16), make_params(torch.bfloat16)
    train(PRM(params, fused=True, reduction=reduction), params, steps=4, skip=False)
    train(PRM(shadows, foreach=True, reduction=reduction), shadows, steps=4, skip=False)
    for p, q in zip(params, shadows, strict=True):
        if p.numel():
            different = (p != q).float().mean()  # where the two float32 results lie on two sides of a tie
            assert different < 2e-2 and (p - q).abs().max() <= 2**-7 * q.abs().max()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_runs_are_bitwise_repeatable(reduction):
    """With rows that several warps share, parts of which, in 1 of 400, a race once stepped with another mask."""
    results = []
    for _ in range(2):
        params = make_params(extra=((5000, 33), (37, 896), (300_003,), (150_000, 896), (20_000, 4864)))
        train(PRM(params, reduction=reduction, estimator="debiased"), params)
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("implementation", "reduction"),
    itertools.product([{"fused": True}, {"foreach": True}, {}], REDUCTIONS),
    ids=str,
)
def test_a_step_never_waits_for_the_device(implementation, reduction):
    params = make_params()
    optimizer = PRM(params, reduction=reduction, **implementation)
    train(optimizer, params, steps=2, skip=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoSynchronization(TrainerCallback):
    """Raises an error if, after the first two steps, the optimizer's step waits for the device."""

    guarded = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step >= 2:
            self.guarded += 1
            torch.cuda.set_sync_debug_mode("error")

    def on_optimizer_step(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("default")


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        tokens = torch.randint(40, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("scheduler", ["linear", "cosine_with_restarts"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"reduction": "per_tensor", "estimator": "debiased"},
        {"reduction": "per_param"},
        {"reduction": "per_tensor", "foreach": True},
        {"reduction": "per_row", "estimator": "debiased", "signal_beta": 0.98},
        {"reduction": "per_tensor", "state_dtype": "bf16"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_step_never_waits_for_the_device_under_the_trainer(settings, bf16, scheduler, tmp_path):
    """With clipping, weight decay in two groups and a schedule, as `Trainer` sets them up."""
    callback = NoSynchronization()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type=scheduler,
        warmup_steps=3,
        weight_decay=0.1,
        bf16=bf16,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        make_model(),
        arguments,
        train_dataset=Tokens(),
        callbacks=[callback],
        optimizer_cls_and_kwargs=(PRM, {"lr": 1e-3, **settings}),
    )
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert callback.guarded == 8 and trainer.state.global_step == 10
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.1}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def test_exp_avg_in_bfloat16(implementation, reduction):
    """Against the definition on the same kept values, step by step: one rounding, to the nearest, at the end."""
    params = make_params()
    twins = [p.detach().clone().requires_grad_() for p in params]
    ours = PRM(params, reduction=reduction, state_dtype="bf16", **implementation)
    theirs = PRM(twins, reduction=reduction, state_dtype="bf16", foreach=False, fused=False)
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(5):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, device="cuda", generator=generator)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            m, expected = ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"]
            assert m.dtype == torch.bfloat16
            if p.numel():
                assert (m != expected).float().mean() < 1e-2  # where two float32 results lie on two sides of a tie
                torch.testing.assert_close(m, expected, rtol=2**-7, atol=1e-6)
                m.copy_(expected)
                q.data.copy_(p.data)


@pytest.mark.parametrize("state_dtype", ["float32", "bf16"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mask_stats_are_those_of_the_same_state_on_the_cpu(reduction, state_dtype):
    """Also where one tensor is not finite; in few launches, though there are hundreds of tensors."""
    params = make_params(extra=((5000, 33), (4097,), (300_003,), *[(7, 3)] * 300))
    ours = PRM(params, reduction=reduction, state_dtype=state_dtype)
    theirs = PRM([p.detach().cpu().requires_grad_() for p in params], reduction=reduction, state_dtype=state_dtype)
    train(ours, params)
    for poisoned in (False, True):
        if poisoned:
            ours.state[params[-1]]["exp_avg_sq"][2, 1] = torch.nan
        theirs.load_state_dict(ours.state_dict())
        ours.get_mask_stats()
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            stats = ours.get_mask_stats()
        assert stats == pytest.approx(theirs.get_mask_stats(), rel=1e-5) and stats["nonfinite_count"] == poisoned
        if not poisoned and reduction != "per_row":  # rows are a launch a tensor
            assert sum(e.count for e in profile.key_averages() if "LaunchKernel" in e.key) < 200


def dpo_trainer(tmp_path, **settings):
    """In mixed precision, on few pairs that it is also evaluated on."""
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments = PRMDPOConfig(tmp_path, bf16=True, per_device_train_batch_size=4, **quiet, **settings)
    rows = preference_dataset(16, flipped=False)
    return PRMDPOTrainer(
        make_model(), make_model(), arguments, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer()
    )


@pytest.mark.parametrize("kwargs", [{}, {"padding_free": True}, {"precompute_ref_log_probs": True}], ids=str)
def test_an_evaluation_from_trls_passes_is_that_of_our_own(kwargs, tmp_path):
    """In mixed precision, in which packed rows and padded ones differ by the rounding of bfloat16."""
    trainer = dpo_trainer(
        tmp_path,
        max_steps=10,
        learning_rate=1e-2,
        prm_mask="none",
        per_device_eval_batch_size=3,
        eval_strategy="no",
        **kwargs,
    )
    assert trainer.evaluate()["eval_drift/kl"] == 0
    trainer.train()
    shared, own = trainer.pair_evaluations["eval"], trainer.evaluate_pairs()
    assert own.chosen.kl.sum() > 1
    for side in ("chosen", "rejected"):
        for column in ("logps", "logratio", "kl"):
            values = [getattr(getattr(pairs, side), column) for pairs in (shared, own)]
            torch.testing.assert_close(*values, rtol=0.03, atol=0.05)


def test_the_host_does_not_wait_between_steps(tmp_path):
    """From the end of a step to the layers of the next it goes on while the device is at the backward pass."""
    trainer = dpo_trainer(
        tmp_path,
        max_steps=4,
        eval_strategy="no",
        drift_metrics=False,
        padding_free=True,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        logging_nan_inf_filter=False,
        accelerator_config={"non_blocking": True},
    )

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, *more, **kwargs):
            if state.global_step < state.max_steps:
                torch.cuda.set_sync_debug_mode("error")

    trainer.add_callback(Watch())
    trainer.model.model.layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_of_liger_are_no_drift(tmp_path):
    """Their rounding is another than that of the model's own layers: the reference has to have them too."""
    pytest.importorskip("liger_kernel")
    settings = {"gradient_checkpointing": False, "padding_free": True, "use_liger_kernel": True}
    trainer = dpo_trainer(tmp_path, max_steps=2, learning_rate=0.0, **settings)
    trainer.train()
    assert trainer.model.model.norm.forward.__module__.startswith("liger_kernel")
    assert trainer.last_eval_metrics["eval_drift/kl"] == 0


@pytest.mark.parametrize("settings", MEASURED, ids=lambda s: f"{s['reduction']}-{s['estimator']}")
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_8bit_state(implementation, settings):
    """On the GPU as on the CPU, by either implementation."""
    extra = ((512, 64), (37, 896), (5, 4099), (4096,), (4097,))
    start = [p.detach().cpu() for p in make_params(extra=extra)]
    results = []
    for device, how in (("cpu", "foreach"), ("cuda", implementation)):
        params = [p.to(device, copy=True).requires_grad_() for p in start]
        optimizer = PRM(params, state_dtype="8bit", **settings, **{how: True})
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            optimizer.step()
        results.append([p.detach().cpu() for p in params])
    for p, q in zip(*results, strict=True):
        if p.numel():  # where rounding decides on another code, a moment differs by up to 6 or 12 %
            assert ((p - q).abs() > 1e-6).float().mean() < 1e-2 and (p - q).abs().max() < 1e-3


def test_drift_is_measured_on_tensor_cores_and_exact_enough():
    """A KL of a short run, over a large vocabulary, against float64."""
    torch.manual_seed(0)
    hidden = torch.randn(512, 896, device="cuda")
    weight = torch.randn(50_000, 896, device="cuda") * 0.1
    targets = torch.randint(50_000, (512,), device="cuda")
    forwards = []
    for w in (weight + 1e-3 * torch.randn_like(weight), weight):
        forwards.append(evaluation.Forward("", hidden, hidden[0], hidden[0], w, None, 1.0, None))
    before = torch.backends.cuda.matmul.allow_tf32
    with evaluation._tensor_cores():
        logps, _, logratio, kl = evaluation._score_tokens(*forwards, targets)
    assert torch.backends.cuda.matmul.allow_tf32 is before
    log_p, log_r = ((hidden.double() @ f.weight.double().t()).log_softmax(-1) for f in forwards)
    expected = (log_p.exp() * (log_p - log_r)).sum(-1)
    assert 1e-4 < expected.mean() < 1e-2
    assert (kl - expected).mean().abs() < 0.01 * expected.mean()
    rows = torch.arange(len(targets), device="cuda")
    assert (logps - log_p[rows, targets]).abs().max() < 0.02
    assert (logratio - (log_p - log_r)[rows, targets]).abs().mean() < 0.01


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grad_scaler_never_waits_for_the_device(reduction):
    """Where steps count on the device the kernel unscales, and skips what overflowed; the numbers stay the same."""
    results = []
    for implementation in ({"fused": True}, {"foreach": True}):
        params = make_params()
        optimizer = PRM(params, reduction=reduction, capturable=True, **implementation)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        scaler.scale(torch.zeros((), device="cuda"))
        generator = torch.Generator("cuda").manual_seed(0)
        for t in range(6):
            scale = 512.0 if t > 3 else 1024.0
            for p in params:
                p.grad = torch.randn(p.shape, device="cuda", generator=generator) * scale
            if t == 3:
                params[0].grad[2, 1] = float("inf")
            if "fused" in implementation and t >= 2:
                torch.cuda.set_sync_debug_mode("error")
            try:
                scaler.step(optimizer)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            scaler.update()
        assert {optimizer.state[p]["step"].item() for p in params} == {5.0}
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cuda_graph(reduction):
    """A captured step, replayed, is the step; lr lives in a tensor that the graph reads."""
    captured, eager = make_params(), make_params()
    optimizers = [
        PRM(ps, lr=torch.tensor(1e-2, device="cuda"), capturable=True, reduction=reduction) for ps in (captured, eager)
    ]
    for ps in (captured, eager):
        for p in ps:
            p.grad = torch.ones_like(p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            optimizers[0].step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for t in range(5):
        for p, q in zip(captured, eager, strict=True):
            g = torch.full_like(p, 0.1 * t - 0.2)
            p.grad.copy_(g if t > 1 else torch.ones_like(p))
            q.grad = g if t > 1 else torch.ones_like(p)
        if t > 1:
            graph.replay()
        optimizers[1].step()
    for p, q in zip(captured, eager, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_more_than_2_to_the_31_elements():
    n = 2**31 + 5
    p = torch.zeros(n, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    p.grad = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    PRM([p], lr=0.25, weight_decay=0.0, reduction="per_tensor", estimator="ema", fused=True).step()
    # t = 1: S = N, q = 1/2, and m̂/√v̂ = 1
    assert p[:3].tolist() == p[-7:-4].tolist() == [-0.125] * 3
    assert p[-1].item() == -0.125 and p.sum(dtype=torch.float64).item() == -0.125 * n


@pytest.mark.parametrize(
    "settings",
    [
        *({"reduction": reduction} for reduction in REDUCTIONS),
        {"reduction": "per_row", "estimator": "debiased", "signal_beta": 0.98},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_step_of_shards_never_waits_for_the_device(settings, tmp_path):
    """FSDP2, of one process: the shards are stepped in two halves with an all-reduce between them."""
    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Linear(300, 70), torch.nn.Linear(70, 5)).cuda()
    sharded = copy.deepcopy(whole)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(sharded)
        optimizers = [PRM(model.parameters(), **settings) for model in (whole, sharded)]
        for t in range(5):
            x = torch.randn(8, 300, device="cuda")
            for model in (whole, sharded):
                model.zero_grad()
                model(x).square().mean().backward()
            optimizers[0].step()
            torch.cuda.set_sync_debug_mode("error" if t > 1 else "default")
            optimizers[1].step()
            torch.cuda.set_sync_debug_mode("default")
        assert "under FSDP2" in optimizers[1].describe_sharding()
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q, rtol=1e-6, atol=1e-7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.distributed.destroy_process_group()
