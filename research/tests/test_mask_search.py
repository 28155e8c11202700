"""The mask search: each variant against PRM or a definition of its own, and the table against known curves."""

import json
from multiprocessing import get_context
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from prm_hf import PRM
from prm_hf.compare import compare_runs
from prm_hf.optim.hyperparameters import Hyperparameters
from prm_hf.runs.methods import METHODS
from research import mask_search
from research.searched_prm import SearchedPRM, row_masks
from tests.compare.compared_runs import write_grid, write_run


SETTINGS = {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-3}
DEBIASED = {"estimator": "debiased", "reduction": "per_tensor", "mask_min_elements": 0}
PER_ROW = {**DEBIASED, "reduction": "per_row"}


@pytest.fixture(autouse=True)
def table_of_methods():
    """The variants that a test registers are no methods of other tests."""
    with mock.patch.dict(METHODS):
        yield


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), (2, 3, 2), ())]


def gradients(step):
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=generator) + 0.3 * i for i, shape in enumerate(((3, 4), (5,), (2, 3, 2), ()))]


def train(optimizer_of, steps=12, cut=lambda x: [x]):
    """The parameters after some steps; `cut` says which parts of each tensor are parameters of their own."""
    parts = [[part.detach().clone().requires_grad_() for part in cut(p.detach())] for p in tensors()]
    optimizer = optimizer_of([part for whole in parts for part in whole])
    for step in range(steps):
        for whole, g in zip(parts, gradients(step), strict=True):
            for part, grad in zip(whole, cut(g), strict=True):
                part.grad = grad.clone()
        optimizer.step()
    return torch.cat([part.detach().flatten() for whole in parts for part in whole])


def start():
    return torch.cat([p.detach().flatten() for p in tensors()])


@pytest.mark.parametrize("options", [{}, {"softness": 0.3}, {"softness": 3.0}, {"signal_beta": 0.9}])
def test_what_prm_can_do_is_as_prm_does_it(options):
    """No option, and a signal average that is no wider than the step's, are PRM debiased per_tensor."""
    found = train(lambda params: SearchedPRM(params, **SETTINGS, **options))
    prm = {key: value for key, value in options.items() if key == "softness"}
    expected = train(lambda params: PRM(params, **SETTINGS, **DEBIASED, **prm))
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert (found - start()).abs().max() > 0.1


def test_rows_are_as_tensors_of_their_own():
    def cut(x):
        return list(x) if x.dim() > 1 else [x]

    found = train(lambda params: SearchedPRM(params, **SETTINGS, rows=True))
    assert torch.allclose(found, train(lambda params: PRM(params, **SETTINGS, **DEBIASED), cut=cut), atol=1e-6)
    assert not torch.allclose(found, train(lambda params: SearchedPRM(params, **SETTINGS)), atol=1e-3)
    wide = {**SETTINGS, "signal_beta": 0.98}
    found_wide = train(lambda params: SearchedPRM(params, **wide, rows=True))
    assert torch.allclose(found_wide, train(lambda params: SearchedPRM(params, **wide), cut=cut), atol=1e-6)
    assert not torch.allclose(found_wide, found, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"signal_beta": 0.98}, {"signal_beta": 0.98, "softness": 3.0}])
def test_what_was_found_is_as_prm_does_it(options):
    found = train(lambda params: SearchedPRM(params, **SETTINGS, rows=True, **options))
    expected = train(lambda params: PRM(params, **SETTINGS, **PER_ROW, **options))
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert (found - start()).abs().max() > 0.1


def test_recorded_masks_are_the_means_of_the_steps(tmp_path):
    ours, theirs = tensors(), tensors()
    prm = PRM(ours, **SETTINGS, **PER_ROW, signal_beta=0.98)
    searched = SearchedPRM(theirs, **SETTINGS, rows=True, signal_beta=0.98)
    recorder = mask_search.RowMaskRecorder(SimpleNamespace(find_prm=lambda: prm))
    for step in range(5):
        for p, q, g in zip(ours, theirs, gradients(step), strict=True):
            p.grad, q.grad = g, g.clone()
        prm.step(), searched.step()
        recorder.on_optimizer_step(None, None, None)
    state = SimpleNamespace(is_world_process_zero=True)
    recorder.on_train_end(SimpleNamespace(output_dir=tmp_path), state, None)
    means = torch.load(tmp_path / mask_search.ROW_MASKS, weights_only=True)
    assert [len(q) for q in means] == [3, 1, 2, 1]
    mean = sum(q.mean() * p.numel() for q, p in zip(means, ours, strict=True)) / sum(p.numel() for p in ours)
    assert mean.item() == pytest.approx(torch.stack(searched.mean_qs).mean().item(), rel=1e-5)
    assert 0 < mean < 1


def test_recorded_masks_of_few_elements_are_open_where_those_of_the_run_are():
    """Of 12, 5, 12 and 1 elements, of which PRM masks the tensors of 12."""
    params = tensors()
    prm = PRM(params, **SETTINGS, reduction="per_row", estimator="debiased", mask_min_elements=12)
    for step in range(5):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        prm.step()
    h = Hyperparameters.of_group(prm.param_groups[0])
    found = [row_masks(p, prm.state[p], h) for p in params]
    assert found[1].tolist() == found[3].tolist() == [1.0]
    assert all((0 <= q).all() and (q < 1).all() for q in (found[0], found[2]))
    numel = torch.tensor([p.numel() for p in params])
    mean = (torch.stack([q.double().mean() for q in found]) * numel).sum() / numel.sum()
    assert mean.item() == pytest.approx(prm.get_mask_stats()["mean_q"], rel=1e-5)


def test_shuffled_rows_are_the_same_masks_elsewhere():
    """The gradients are given, so that both have the same masks; at the second step, the first that has any."""
    found = []
    for shuffle in (False, True):
        p = torch.nn.Parameter(torch.zeros(16, 3))
        optimizer = SearchedPRM([p], lr=0.1, rows=True, shuffle=shuffle)
        for step in range(2):
            p.grad = torch.randn(16, 3, generator=torch.Generator().manual_seed(step)) + 1
            optimizer.step()
        state = optimizer.state[p]
        adam = state["exp_avg"] / (1 - 0.9**2) / ((state["exp_avg_sq"] / (1 - 0.999**2)).sqrt() + 1e-8)
        q = -p.detach() / 0.1 / adam
        assert torch.allclose(q, q[:, :1].expand_as(q), atol=1e-4)
        found.append(q[:, 0])
    assert torch.allclose(found[0].sort().values, found[1].sort().values, atol=1e-4)
    assert found[0].std() > 0.1 and not torch.allclose(*found, atol=0.1)


def test_a_pool_has_the_mask_of_its_tensors_side_by_side():
    """Of two matrices of one pool the masks are those of one tensor with the elements of both."""

    def grads(t):
        return [torch.randn(4, 3, generator=torch.Generator().manual_seed(9 * t + i)) + 0.4 * i for i in range(3)]

    parts = [torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(3)]
    pooled = SearchedPRM(parts, lr=0.1, pools=[7, 2, 7])
    whole = [torch.nn.Parameter(torch.zeros(8, 3)), torch.nn.Parameter(torch.zeros(4, 3))]
    joined = SearchedPRM(whole, lr=0.1)
    for t in range(6):
        g = grads(t)
        for p, grad in zip([*parts, *whole], [*g, torch.cat([g[0], g[2]]), g[1]], strict=True):
            p.grad = grad
        pooled.step(), joined.step()
    assert torch.allclose(torch.cat([parts[0], parts[2]]), whole[0], atol=1e-6)
    assert torch.allclose(parts[1], whole[1], atol=1e-6)
    assert pooled.mean_qs[-1].item() == pytest.approx(joined.mean_qs[-1].item(), rel=1e-5)
    separate = [torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(3)]
    optimizer = SearchedPRM(separate, lr=0.1, pools=[0, 1, 2])
    for t in range(6):
        for p, grad in zip(separate, grads(t), strict=True):
            p.grad = grad
        optimizer.step()
    assert not torch.allclose(parts[0], separate[0], atol=1e-3)
    with pytest.raises(ValueError, match="`rows`"):
        SearchedPRM(parts, pools=[0, 0, 1], rows=True)


def test_a_wider_signal_is_by_its_definition():
    """S = mean of the squared wide average less its own noise; the mask weighs it against the noise of the step's."""
    beta, steps = 0.98, 6
    (p,) = [torch.nn.Parameter(torch.zeros(4))]
    optimizer = SearchedPRM([p], lr=0.1, signal_beta=beta)
    m = wide = torch.zeros(4, dtype=torch.float64)
    s = 0.0
    for t in range(1, steps + 1):
        g = torch.randn(4, generator=torch.Generator().manual_seed(t)) + 1
        p.grad = g.clone()
        optimizer.step()
        g = g.double()
        kappa = [(1 - b) / (1 + b) * (1 + b**t) / (1 - b**t) for b in (0.9, beta)]
        if t > 1:
            before = 0.1 / 1.9 * (1 + 0.9 ** (t - 1)) / (1 - 0.9 ** (t - 1))
            s = 0.99 * s + 0.01 * ((g - m / (1 - 0.9 ** (t - 1))) ** 2).mean() / (1 + before)
        m, wide = 0.9 * m + 0.1 * g, beta * wide + (1 - beta) * g
        q = 0.0
        if t > 1:
            variance = s / (1 - 0.99 ** (t - 1))
            signal = max(((wide / (1 - beta**t)) ** 2).mean() - kappa[1] * variance, 0)
            q = float(signal / (signal + kappa[0] * variance))
        assert optimizer.mean_qs[-1] == pytest.approx(q, rel=1e-5)
    assert 0 < q < 1


@pytest.mark.parametrize("clip", [1.0, 0.2])
def test_noise_within_a_step_is_that_of_its_micro_batches(clip):
    """Each gradient is a quarter of the step's; clipping, which comes after all of them, scales them as their sum."""
    p = torch.nn.Parameter(torch.zeros(6))
    optimizer = SearchedPRM([p], lr=0.1, within_step=True)
    signal = noise = 0.0
    for t in range(1, 4):
        g = torch.randn(4, 6, generator=torch.Generator().manual_seed(t)) + 0.2
        for each in g:
            (p @ each / 4).backward()
        assert torch.allclose(p.grad, g.mean(0))
        p.grad.mul_(clip)
        variance = (clip * g).var(0).mean() / 4  # unbiased, of the mean of four
        square = (clip * g.mean(0)).square().mean()
        signal, noise = 0.9 * signal + 0.1 * (square - variance), 0.99 * noise + 0.01 * variance
        optimizer.step()
        optimizer.zero_grad()
        kappa = 0.1 / 1.9 * (1 + 0.9**t) / (1 - 0.9**t)
        s, n = max(signal / (1 - 0.9**t), 0), kappa * noise / (1 - 0.99**t)
        assert optimizer.mean_qs[-1] == pytest.approx(float(s / (s + n)), rel=1e-4)
    p.grad = None
    p.sum().backward()
    with pytest.raises(ValueError, match="needs two micro-batches a step or more, got 1: raise"):
        optimizer.step()


def test_selection_alone_keeps_the_mean_step():
    """Update over Adam's update, averaged over all parameters, is 1 at each step that has a mask."""
    params = tensors()
    optimizer = SearchedPRM(params, lr=0.1, weight_decay=0.0, keep_mean=True)
    after = start()
    for t in range(1, 6):
        before = after
        for p, g in zip(params, gradients(t), strict=True):
            p.grad = g
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in params])
        states = [optimizer.state[p] for p in params]
        m, v = (torch.cat([s[key].flatten() for s in states]) for key in ("exp_avg", "exp_avg_sq"))
        q = (before - after) / 0.1 / (m / (1 - 0.9**t)) * ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        assert q.mean().item() == pytest.approx(0 if t == 1 else 1, abs=1e-4)
    assert q.std() > 0.1


def test_options_that_exclude_each_other_are_named():
    with pytest.raises(ValueError, match="leave out `rows` and `signal_beta`, got True and None"):
        SearchedPRM(tensors(), within_step=True, rows=True)


def plain_name(folder):
    """The name of a run's folder without its hash."""
    return folder.name.rpartition("_")[0]


def metrics_of(folder, name):
    (file,) = (path for path in folder.glob("*/metrics.json") if plain_name(path.parent) == name)
    return json.loads(file.read_text())


@pytest.mark.slow
def test_variants_run_and_are_compared(tmp_path, capsys):
    short = ["--max_steps", "3", "--logging_steps", "1", "--eval_steps", "3", "--warmup_steps", "1"]
    short += ["--max_extensions", "0"]
    shuffled = "search_prm_rows_signal0.98_eps10_shuffled"
    names = ["adamw", "adamw_eps:10", "prm_rows_eps:10", shuffled, "search_prm_within", "search_selection"]
    rates = ["--learning_rates", "1e-3", "1e-2", "--prm_learning_rates", "3e-3", "3e-2", "--seeds", "0", "1"]
    assert mask_search.main(["--output_dir", str(tmp_path), "--methods", *names, *short, *rates]) == 0
    info = {plain_name(path.parent): json.loads(path.read_text()) for path in tmp_path.glob("*/run.json")}
    assert len(info) == 24
    eps = info["adamw_eps10_lr0.01_seed0"]["optimizer"]
    for name, by in ((shuffled, "SearchedPRM"), ("prm_rows_eps10", "PRM")):
        rows = info[f"{name}_lr0.03_seed0"]["optimizer"]
        assert rows["class"] == by and rows["eps"] == eps["eps"]
        assert rows["learning_rate"] == pytest.approx(3 * eps["learning_rate"]) == pytest.approx(0.33)
    assert {each["settings"]["effective_batch_size"] for each in info.values()} == {16}
    metrics = metrics_of(tmp_path, "search_prm_within_lr0.03_seed0")
    assert 0 < metrics["mask/mean_q"] < 1
    assert "search_selection_lr0.001_seed0" in info  # of the mean step, and so of the learning rates, of AdamW
    lines = capsys.readouterr().out.split("areas over log KL:")[1].splitlines()
    assert sum(line.startswith("| search_") for line in lines) == 3
    assert sum(line.startswith("| PRM per_row eps 10 ") for line in lines) == 1

    # Each row's learning rate from the masks of the other seed's run
    rates = ["--learning_rates", "1e-3", "--prm_learning_rates", "3e-2", "--seeds", "0", "1"]
    names = ["adamw", "prm_rows_eps:10", mask_search.FIXED]
    assert mask_search.main(["--output_dir", str(tmp_path), "--methods", *names, *short, *rates]) == 0
    for seed in (0, 1):
        assert list(tmp_path.glob(f"prm_rows_eps10_lr0.03_seed{seed}_*/{mask_search.ROW_MASKS}"))
        metrics = metrics_of(tmp_path, f"{mask_search.FIXED}_lr0.03_seed{seed}")
        assert 0 < metrics["mask/mean_q"] < 1


@pytest.mark.slow
def test_variants_of_modules_and_of_the_embedding(tmp_path):
    short = ["--max_steps", "2", "--logging_steps", "1", "--eval_strategy", "no", "--warmup_steps", "1"]
    short += ["--seeds", "0", "--learning_rates", "1e-3", "--prm_learning_rates", "3e-2"]
    short += ["--output_dir", str(tmp_path)]
    embedding, modules = "search_embedding3_eps10", "search_prm_modules_eps10"
    with pytest.raises(ValueError, match="use_peft"):
        mask_search.main(["--methods", modules, *short])
    assert mask_search.main(["--methods", "adamw_eps:10", embedding, *short]) == 0
    found = [metrics_of(tmp_path, f"{name}_lr0.001_seed0") for name in ("adamw_eps10", embedding)]
    assert found[1]["drift/params_rel"] > 1.05 * found[0]["drift/params_rel"]
    lora = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "all-linear"]
    assert mask_search.main(["--methods", "prm_debiased_eps:10", modules, *short, *lora]) == 0
    names = (f"{name}_lr0.03_seed0" for name in ("prm_debiased_eps10", modules))
    masks = [metrics_of(tmp_path, name)["mask/mean_q"] for name in names]
    assert 0 < masks[1] < 1 and masks[0] != pytest.approx(masks[1], rel=1e-3)


def test_the_table_has_known_areas(tmp_path):
    """PRM lies .05 above AdamW and .02 above the larger eps at each KL."""
    write_grid(tmp_path, seeds=(0, 1, 2), prm_gain=0.05)
    for seed in (0, 1, 2):
        for lr, kl, accuracy in ((1e-4, 0.1, 0.70), (1e-3, 0.4, 0.75), (1e-2, 1.6, 0.65)):
            write_run(tmp_path, "adamw_eps:10", lr, seed, accuracy + 0.03, kl)
    comparison = compare_runs(tmp_path)
    rows = comparison.methods()
    found = mask_search.area(rows["prm_per_tensor"], rows["adamw_eps:10"])
    assert found.accuracy.mean == pytest.approx(0.02, abs=1e-6) and found.kl == (0.2, 0.8)
    assert found.noise_fit.mean == 0  # the same in all of these runs
    (line,) = [line for line in mask_search.table(comparison).splitlines() if "PRM per_tensor" in line]
    assert "+0.050 [" in line and "+0.020 [" in line
    assert mask_search.area(rows["adamw"][:1], rows["adamw"]) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "search_prm_row"], "`methods`: search_prm_row unknown. Known are .* search_prm_rows"),
        (["--methods", "search_prm_rows", "constant_q"], "`constant_q` takes something from a PRM run"),
    ],
)
def test_wrong_methods_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        mask_search.main(arguments)


def parsed_methods(arguments):
    return [method.name for method in mask_search.DPOSearch.parse(arguments).script_args.compared]


@pytest.mark.slow
def test_a_worker_knows_the_variants_and_an_import_adds_none():
    assert not METHODS.keys() & mask_search.VARIANTS.keys()
    with get_context("spawn").Pool(1) as pool:  # as the workers of a comparison start
        assert pool.apply(parsed_methods, (["--methods", *mask_search.VARIANTS],)) == [*mask_search.VARIANTS]


def test_fixed_masks_are_those_of_another_run():
    """Constant masks make AdamW with a learning rate for each row."""
    fixed = [torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0.25]), torch.tensor([1.0, 0.5]), torch.tensor([1.0])]
    found = train(lambda params: SearchedPRM(params, **SETTINGS, rows=True, fixed=fixed))
    start_of = [p.detach().clone() for p in tensors()]
    rows = [list(p) if p.dim() > 1 else [p] for p in start_of]
    rates = [SETTINGS["lr"] * q.item() for whole in fixed for q in whole]
    groups = [
        {"params": [row.clone().requires_grad_()], "lr": rate, "weight_decay": 0.005 / rate if rate else 0.0}
        for row, rate in zip((row for whole in rows for row in whole), rates, strict=True)
    ]
    adamw = torch.optim.AdamW(groups, eps=SETTINGS["eps"])
    for step in range(12):
        grads = [row for g in gradients(step) for row in (g if g.dim() > 1 else [g])]
        for group, g in zip(groups, grads, strict=True):
            group["params"][0].grad = g.clone()
        adamw.step()
    expected = torch.cat([group["params"][0].detach().flatten() for group in groups])
    closed = torch.zeros_like(expected, dtype=torch.bool)
    closed[8:12] = True  # where the mask is 0 only the decay is left
    assert torch.allclose(found[~closed], expected[~closed], rtol=1e-5, atol=1e-6)
    assert torch.allclose(found[closed], start()[closed] * (1 - 0.05 * 0.1) ** 12, rtol=1e-5)


@pytest.mark.slow
def test_fixed_rows_need_the_run_of_another_seed(tmp_path):
    arguments = ["--methods", mask_search.FIXED, "--seeds", "0", "1", "--max_steps", "1"]
    arguments += ["--learning_rates", "1e-3", "--prm_learning_rates", "1e-2", "--output_dir", str(tmp_path)]
    assert mask_search.main(arguments) == 1
    failures = [json.loads(file.read_text())["message"] for file in tmp_path.glob("*/failed.json")]
    assert len(failures) == 2 and all("run prm_rows_eps:10 with all `seeds`" in text for text in failures)


def test_a_recipe_may_be_named_first():
    with pytest.raises(ValueError, match="dpo_noisy or sft_noisy, got 'randomization'"):
        mask_search.main(["recipes/randomization.py"])
    with pytest.raises(ValueError, match="ipo"):  # a loss of DPO
        mask_search.main(["recipes/sft_noisy.py", "--methods", "adamw", "ipo"])
