"""What `prm-hf compare` says of files that do not hold what they should: one line, and the rest goes on."""

import json
import shutil

import pytest

from prm_hf import cli
from prm_hf.compare import compare_experiments, format_comparison, load_runs, plots
from prm_hf.compare.report import as_html

from .compared_runs import ACCURACY, KL, write_grid, write_run


NAME = "adamw_lr1e-04_seed0"
DEEP = "[" * 20000 + "]" * 20000
NOT_JSON = "cannot be read as JSON: "
FILES = [
    ("metrics.json", b"", f"metrics.json {NOT_JSON}it is empty."),
    ("metrics.json", b"\n", f"metrics.json {NOT_JSON}it is empty."),
    (
        "metrics.json",
        b'{"drift/kl": 0.',
        f"metrics.json {NOT_JSON}Expecting ',' delimiter: line 1 column 15",
    ),
    ("metrics.json", b"\x89PNG\r\n\x1a\n\xff\xfe", f"metrics.json {NOT_JSON}it is not text in UTF-8."),
    ("metrics.json", DEEP.encode(), "maximum recursion depth exceeded"),
    ("metrics.json", b"null", "metrics.json must hold a JSON object, and holds None."),
    ("metrics.json", b"[0.7]", "metrics.json must hold a JSON object, and holds [0.7]."),
    ("metrics.json", b'"0.7"', "metrics.json must hold a JSON object, and holds '0.7'."),
    ("metrics.json", b'{"drift/kl": "0.1"}', "metrics.json must map names to numbers; 'drift/kl' is '0.1'."),
    ("metrics.json", b'{"drift/kl": true}', "metrics.json must map names to numbers; 'drift/kl' is True."),
    ("metrics.json", b'{"drift/kl": null}', "metrics.json must map names to numbers; 'drift/kl' is None."),
    ("metrics.json", b'{"drift/kl": [1]}', "metrics.json must map names to numbers; 'drift/kl' is [1]."),
    ("metrics.json", b'{"steps": 1' + b"0" * 400 + b"}", "metrics.json must map names to numbers; 'steps' is 1000"),
    ("metrics.json", b'{"steps": 1' + b"0" * 5000 + b"}", f"metrics.json {NOT_JSON}Exceeds the limit"),
    ("metrics.json", b'{"rewards/accuracies": 70}', "rewards/accuracies is 70, which is no share from 0 to 1."),
    ("metrics.json", b'{"rewards/accuracies": -0.1}', "rewards/accuracies is -0.1, which is no share from 0 to 1."),
    ("metrics.json", b'{"diverged": "yes"}', "metrics.json: 'diverged' must be true or false, and is 'yes'."),
    ("metrics.json", None, "metrics.json cannot be read: Is a directory."),
    ("run.json", b"", f"run.json {NOT_JSON}it is empty."),
    (
        "run.json",
        b"{",
        f"run.json {NOT_JSON}Expecting property name enclosed in double quotes: line 1",
    ),
    ("run.json", b"\x00\xff", f"run.json {NOT_JSON}it is not text in UTF-8."),
    ("run.json", b"[]", "run.json must hold a JSON object, and holds []."),
    ("run.json", b"{}", "run.json has schema None; this version of prm_hf reads schema 1."),
    (
        "run.json",
        {"schema": 2},
        "schema 2; this version of prm_hf reads schema 1. A newer version wrote it: update",
    ),
    ("run.json", {"schema": "1"}, "run.json has schema '1'; this version of prm_hf reads schema 1."),
    ("run.json", {"schema": [1]}, "run.json has schema [1]; this version of prm_hf reads schema 1."),
    ("run.json", {"name": 7}, "run.json: 'name' must be a text, and is 7."),
    ("run.json", {"method": None}, "run.json: 'method' must be a text, and is None."),
    ("run.json", {"method": ""}, "run.json: 'method' must be a text, and is ''."),
    ("run.json", {"method": ["adamw"]}, "run.json: 'method' must be a text, and is ['adamw']."),
    (
        "run.json",
        {"learning_rate": "1e-3"},
        "'learning_rate' must be a number of at least 0, and is '1e-3'.",
    ),
    ("run.json", {"learning_rate": -1}, "run.json: 'learning_rate' must be a number of at least 0, and is -1."),
    ("run.json", {"learning_rate": float("nan")}, "'learning_rate' must be a number of at least 0, and is nan."),
    ("run.json", {"learning_rate": float("inf")}, "'learning_rate' must be a number of at least 0, and is inf."),
    ("run.json", {"learning_rate": None}, "run.json: 'learning_rate' must be a number of at least 0, and is None."),
    ("run.json", {"seed": "0"}, "run.json: 'seed' must be a whole number or null, and is '0'."),
    ("run.json", {"seed": 0.5}, "run.json: 'seed' must be a whole number or null, and is 0.5."),
    ("run.json", {"seed": True}, "run.json: 'seed' must be a whole number or null, and is True."),
    ("run.json", {"seed": [0]}, "run.json: 'seed' must be a whole number or null, and is [0]."),
    ("run.json", {"settings": [1]}, "run.json: 'settings' must be an object of settings, and is [1]."),
    ("run.json", {"settings": None}, "run.json: 'settings' must be an object of settings, and is None."),
    ("run.json", {"settings": {"adamw": {"of": 3}}}, "run.json: 'settings' must be an object of settings, and is {"),
    ("run.json", {"task": ["sft"]}, "run.json: 'task' must be a text, and is ['sft']."),
    ("run.json", {"accuracy": 3}, "run.json: 'accuracy' must be a text, and is 3."),
    ("history.jsonl", b'{"step": 1}\n{"st', f"history.jsonl, line 2, {NOT_JSON}Unterminated string"),
    ("history.jsonl", b'{"step": 1}\n3\n', "history.jsonl, line 2, must hold a JSON object, and holds 3."),
    ("history.jsonl", b"\xff\xfe\xff", f"history.jsonl, line 1, {NOT_JSON}it is not text in UTF-8."),
    ("history.jsonl", None, "history.jsonl cannot be read: Is a directory."),
    ("margins.json", b"", f"margins.json {NOT_JSON}it is empty."),
    ("margins.json", b"[1, -1]", "margins.json must hold a JSON object, and holds [1, -1]."),
    ("margins.json", b'{"heldout": ["a"]}', "margins.json: 'heldout' must be a list of numbers."),
    ("margins.json", b'{"heldout": {"0": 1}}', "margins.json: 'heldout' must be a list of numbers."),
    ("margins.json", b'{"heldout": [[1.0]]}', "margins.json: 'heldout' must be a list of numbers."),
    ("margins.json", b'{"heldout": 3}', "margins.json: 'heldout' must be a list of numbers."),
]


def spoil(folder, file, content):
    """Puts content into a file: bytes, changes of a JSON object, or a folder in its place (None)."""
    path = folder / file
    if content is None:
        path.unlink()
        path.mkdir()
    elif isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    else:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    root = tmp_path_factory.mktemp("grid")
    write_grid(root)
    return root


@pytest.mark.parametrize(("file", "content", "message"), FILES, ids=lambda value: str(value)[:30])
def test_a_run_that_cannot_be_read_is_left_out_with_a_line(tmp_path, capsys, grid, file, content, message):
    shutil.copytree(grid, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / NAME, file, content)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert cli.main(["compare", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    said = " ".join(printed.out.split())
    assert message.removesuffix(".") in said and "Left out, as it cannot be read; train it again" in said
    assert printed.err == "" and "AdamW 1e-3" in " ".join(printed.out.split()) and "AdamW  1e-4" not in printed.out
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before  # reading renames nothing
    # Where it is the only one, there is nothing left to go on with.
    assert cli.main(["compare", str(tmp_path / NAME)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("prm-hf compare: error: ")


def test_a_run_without_run_json(tmp_path, capsys):
    write_grid(tmp_path)
    (tmp_path / NAME / "run.json").unlink()
    assert cli.main(["compare", str(tmp_path)]) == 0
    assert "has metrics.json but no run.json, which names its method" in " ".join(capsys.readouterr().out.split())


STATES = [
    (b"", f"trainer_state.json {NOT_JSON}it is empty."),
    (b"{", f"trainer_state.json {NOT_JSON}Expecting property name"),
    (b"[]", "trainer_state.json has no log_history: it is not the state of a transformers Trainer."),
    (b'{"log_history": 3}', "trainer_state.json has no log_history"),
    (b'{"log_history": [3]}', "trainer_state.json has no log_history"),
    (b'{"log_history": [{"step": "1"}]}', "trainer_state.json: `step` of entry 0 of log_history is '1', no number."),
    (b'{"log_history": [{"step": 1, "eval_rewards/accuracies": 7}]}', "is 7, which is no share from 0 to 1."),
]


@pytest.mark.parametrize(("content", "message"), STATES)
def test_a_trainers_state_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "adamw").mkdir()
    (tmp_path / "adamw" / "trainer_state.json").write_bytes(content)
    with pytest.raises(ValueError) as raised:
        load_runs(tmp_path)
    assert message in str(raised.value)
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    assert message in " ".join(run.problem for run in load_runs(tmp_path))


@pytest.mark.slow
def test_odd_settings_in_a_picture(tmp_path):
    for value in ("x", -1, 1, float("nan"), [1]):
        settings = {"prm_estimator": "ema", "adam_beta1": value}
        write_run(tmp_path / str(value), "prm_per_tensor", 1e-2, 0, 0.75, 0.2, mean_q=0.05, settings=settings)
        assert plots.draw(compare_experiments(tmp_path / str(value))[0])["mask"].startswith(b"\x89PNG")


def test_paths_that_are_no_run_folders(tmp_path, capsys):
    write_run(tmp_path / "runs", "adamw", 1e-3, 0, 0.7, 0.4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    cases = {
        "empty": "empty holds no run: expected a run folder",
        "file": "file is a file: expected a run folder",
        "missing": "missing does not exist: expected",
        "a" * 300: "File name too long",
        "mis\x1b[31ming": "mis\\x1b[31ming does not exist",
        "two\nlines": "two\\nlines does not exist",
        "\udcff": "\\udcff does not exist",
    }
    for name, message in cases.items():
        assert cli.main(["compare", str(tmp_path / "runs"), str(tmp_path / name)]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert cli.main(["compare", "~no_such_user/runs"]) == 2
    assert "~no_such_user/runs does not exist" in capsys.readouterr().err


def test_what_a_writer_set_aside_is_named(tmp_path, capsys):
    write_grid(tmp_path)
    (tmp_path / NAME).rename(tmp_path / f"{NAME}.corrupt")
    assert cli.main(["compare", str(tmp_path)]) == 0
    assert f"{NAME}.corrupt was set aside when it could not be read" in " ".join(capsys.readouterr().out.split())


ODD = [
    None,
    True,
    "x",
    "",
    [],
    {},
    [1],
    {"a": 1},
    float("nan"),
    float("inf"),
    -1,
    0,
    10**400,
    1e308,
    "\x1b[31m\udcff$",
]


@pytest.mark.parametrize(
    "file",
    [
        "margins.json",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("run.json", "metrics.json", "history.jsonl")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("settings", "state")),
    ],
)
def test_no_value_ends_in_a_traceback(tmp_path, file):
    """Every value of every file, replaced by odd ones: read and compared, or refused in our words."""
    root = tmp_path / "runs"
    write_run(root, "adamw", 1e-2, 0, 0.7, 0.4)
    name = write_run(root, "prm_per_tensor", 1e-2, 0, 0.75, 0.2, mean_q=0.05)
    if file == "state":
        shutil.rmtree(root)
        path = root / "prm" / "trainer_state.json"
        path.parent.mkdir(parents=True)
        log = [{"step": 1, "learning_rate": 1e-3, "mask/mean_q": 0.1}, {"step": 2, "train_runtime": 3.0}]
        log.append({"step": 2, "eval_loss": 0.5, f"eval_{ACCURACY}": 0.7, f"eval_{KL}": 0.1})
        path.write_text(json.dumps({"global_step": 2, "max_steps": 4, "log_history": log}))
    else:
        path = root / name / {"settings": "run.json"}.get(file, file)
    text = path.read_text()
    if file == "history.jsonl":
        (line, *rest) = text.splitlines()
        versions = [{**json.loads(line), key: value} for key in (*json.loads(line), KL) for value in ODD]
        texts = ["\n".join([json.dumps(version), *rest]) for version in versions]
    else:
        whole = json.loads(text)
        place = whole["settings"] if file == "settings" else whole["log_history"][-1] if file == "state" else whole
        keys = {"settings": ["beta", "constant_q", "prm_per_tensor", "adam_beta1", "prm_softness"]}.get(file, [*place])
        if file == "run.json":
            keys += ["task", "accuracy"]
        texts = []
        for target in [place, *([whole, *whole["log_history"]] if file == "state" else [])]:
            for key in keys if target is place else [*target]:
                before = target.get(key)
                for value in ODD:
                    target[key] = value
                    texts.append(json.dumps(whole))
                target.pop(key) if before is None else target.update({key: before})
    for odd in texts:
        path.write_text(odd)
        try:
            comparisons = compare_experiments(root)
        except ValueError as error:
            assert str(error)
        else:
            for form in ("table", "json", "markdown"):
                format_comparison(comparisons, form).encode("utf-8")
            assert "\x1b" not in as_html(comparisons, pictures={})
