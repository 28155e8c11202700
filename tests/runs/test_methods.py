"""The table of methods: what a name means."""

import pytest

from prm_hf.runs.methods import BASELINE, CONTROL, GROUPS, LOSS, METHODS, OTHER, PRM, Method, find_method, parse_method


ROW = {"prm_reduction": "per_row", "prm_estimator": "debiased", "prm_signal_beta": 0.98}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("adamw", {"optim": "adamw_torch_fused"}),
        ("adamw_eps:0.3", {"optim": "adamw_torch_fused", "relative_eps": 0.3}),
        ("adamw_embedding:3", {"optim": "adamw_torch_fused"}),
        ("prm_rows", ROW),
        ("prm_rows_eps:10", {**ROW, "relative_eps": 10.0}),
        ("prm_debiased_eps:3", {"prm_reduction": "per_tensor", "prm_estimator": "debiased", "relative_eps": 3.0}),
        ("prm_noisy_labels", {"prm_preset": "noisy_labels"}),
        ("ipo", {"optim": "adamw_torch_fused", "loss_type": ["ipo"]}),
        ("robust", {"optim": "adamw_torch_fused", "loss_type": ["robust"], "label_smoothing": 0.25}),
    ],
)
def test_a_name_becomes_settings(name, changes):
    assert parse_method(name).changes(0.25) == changes


def test_cdpo_is_robust_at_a_negative_rate():
    """(1-e) L + e L_swapped, from TRL's ((1-s) L - s L_swapped) / (1-2s)."""
    for rate in (0.1, 0.3, 0.45):
        s = parse_method("cdpo").changes(rate)["label_smoothing"]
        assert (1 - s) / (1 - 2 * s) == pytest.approx(1 - rate) and -s / (1 - 2 * s) == pytest.approx(rate)
    assert all(parse_method(name).changes(rate) is None for name in ("cdpo", "robust") for rate in (0, 0.5, 0.9))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adam", "`methods`: adam unknown. Known are adamw, adamw_eps, adamw_embedding"),
        ("adamw:3", "'adamw' takes no value, got 'adamw:3'"),
        ("adamw_eps", "'adamw_eps' needs a positive number behind a colon: eps, relative .* got 'adamw_eps'"),
        ("adamw_embedding:-1", "needs a positive number .* got 'adamw_embedding:-1'"),
        ("prm_rows_eps:inf", "needs a positive number .* as in `prm_rows_eps:10`; got 'prm_rows_eps:inf'"),
    ],
)
def test_wrong_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        parse_method(name)


def test_a_caller_may_know_fewer_methods():
    assert parse_method("adamw", known=["adamw"]).name == "adamw"
    with pytest.raises(ValueError, match="cdpo unknown. Known are adamw, ipo.$"):
        parse_method("cdpo", known=["adamw", "ipo"])


def test_names_for_people_groups_and_baselines():
    groups = {
        "adamw": BASELINE,
        "adamw_eps:0.1": BASELINE,
        "cautious": OTHER,
        "prm_debiased": PRM,
        "prm_debiased_eps:10": PRM,
        "constant_q": CONTROL,
        "adamw_matched": CONTROL,
        "cdpo": LOSS,
        "early_stopping_clean": LOSS,
        # names that are not in the table
        "run2-adamw-big": BASELINE,
        "qwen-prm": PRM,
        "search_prm_rows_fixed_eps10": CONTROL,
        "hinge_2": LOSS,
        "my thing": OTHER,
    }
    assert {name: find_method(name).group for name in groups} == groups
    assert find_method("adamw_eps:0.1").label == "AdamW eps 0.1" and find_method("my thing").label == "my thing"
    baselines = {"prm_rows": "adamw", "prm_rows_eps:10": "adamw_eps:10", "adamw_eps:3": "adamw_eps:3", "x": "adamw"}
    assert {name: find_method(name).baseline for name in baselines} == baselines


def test_the_table_holds_together():
    for key, method in METHODS.items():
        assert isinstance(method, Method) and method.key == key == method.name and method.group in GROUPS
        # One with a loss of its own is not of the group that the verdict is about
        assert method.has_mask == (method.group == PRM or key == "prm_robust") and method.base in METHODS
        assert method.value_setting is None or method.value_help is not None
    with_tensor_masks = [key for key, m in METHODS.items() if m.tensor_masks and m.group == PRM]
    assert with_tensor_masks == ["prm_per_tensor", "prm_debiased", "prm_debiased_eps"]
    without_controls = [key for key, m in METHODS.items() if m.group == PRM and not m.has_controls]
    assert without_controls == ["prm_noisy_labels", "prm_stopping"]
