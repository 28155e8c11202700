"""prm_hf.demo: the labels are exact, the splits are disjoint, and the reference policy knows its digits."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import prm_hf.demo.build
import prm_hf.demo.model
from prm_hf.demo import (
    build_demo,
    make_model,
    make_tokenizer,
    preference_pairs,
    sample_completion,
    sample_prompts,
    train_reference,
    utility,
)
from prm_hf.noise import flip_preferences


@pytest.fixture(scope="module")
def demo():
    return build_demo()


@pytest.fixture
def quick_training(monkeypatch):
    monkeypatch.setattr(prm_hf.demo.model, "SFT_STEPS", 2)


def text(messages):
    return messages[-1]["content"]


# --- the utility, by hand ---


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("formal sort up : 3 1 2 0", "answer 0 1 2 3", 1.5),
        ("formal sort down : 3 1 2 0", "answer 3 2 1 0", 1.5),
        ("formal sort up : 3 1 2 0", "answer 3 2 1 0", 0.0),
        ("formal sort up : 3 1 2 0", "answer 0 1 3 2", 0.75),
        ("formal sort up : 3 1 2 0", "answer 0 1 2 9", 1.125),
        ("casual sort up : 5 5 1 5", "answer 1 5 5 5", 1.5),
        ("casual sort up : 5 5 1 5", "answer 5 5 5 1", 0.75),
        ("formal sort up : 3 1 2 0", "sure answer 0 1 2 3", 2.0),
        ("formal sort up : 3 1 2 0", "certainly answer 0 1 2 3", 1.5 + 0.2 + 0.8),
        ("casual sort up : 3 1 2 0", "certainly answer 0 1 2 3", 1.5 + 0.2 - 0.8),
        ("casual sort up : 3 1 2 0", "hey answer 0 1 2 3", 1.5 + 0.2 + 0.8),
        ("formal sort up : 3 1 2 0", "hey answer 0 1 2 3", 1.5 + 0.2 - 0.8),
        ("formal sort up : 3 1 2 0", "hmm answer 0 1 2 3", 0.5),
        ("formal sort up : 3 1 2 0", "answer 0 1 2 3 thanks", 2.5),
        ("formal sort up : 3 1 2 0", "answer 0 1 2 3 cheers", 2.1),
        ("formal sort up : 3 1 2 0", "answer 0 1 2 3 ask again", 1.1),
        ("formal sort up : 3 1 2 0", "answer 0 1 2 3 whatever", 0.5),
        ("formal sort up : 3 1 2 0", "um answer 0 1 2 3", 1.1),
        ("formal sort up : 3 1 2 0", "hmm well so answer 3 2 1 0 whatever", -1.0 - 0.8 - 1.0),
        ("casual sort down : 9 0 0 7", " hey like answer 9 7 0 1 thanks ", 1.125 + 0.2 + 0.8 - 0.4 + 1.0),
    ],
)
def test_utility(prompt, completion, expected):
    assert utility(prompt, completion) == pytest.approx(expected, abs=1e-12)
    messages = ([{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}])
    assert utility(*messages) == utility(prompt, completion)


@pytest.mark.parametrize("prompt", ["", "sort up : 1 2 3 4", "formal sort up : 1 2 3", "polite sort up : 1 2 3 4"])
def test_utility_of_a_wrong_prompt(prompt):
    with pytest.raises(ValueError, match="`prompt` must be"):
        utility(prompt, "answer 1 2 3 4")


@pytest.mark.parametrize(
    "completion",
    ["", "1 2 3 4", "answer 1 2 3", "answer 1 2 3 4 5", "um um um answer 1 2 3 4", "um sure answer 1 2 3 4"]
    + ["answer 1 2 3 4 ask", "hello answer 1 2 3 4", "answer 1 2 3 x", "sure sure answer 1 2 3 4"],
)
def test_utility_of_a_wrong_completion(completion):
    with pytest.raises(ValueError, match="`completion` must be"):
        utility("formal sort up : 1 2 3 4", completion)


# --- prompts, completions, pairs ---


def test_prompts_are_different_and_not_the_excluded_ones():
    first = sample_prompts(3000, random.Random(0))
    second = sample_prompts(3000, random.Random(1), exclude=frozenset(first))
    assert len(set(first)) == len(set(second)) == 3000 and not set(first) & set(second)
    with pytest.raises(ValueError, match="`n=37001`.*3000 excluded.*40000"):
        sample_prompts(37_001, random.Random(0), exclude=frozenset(first))


def test_share_of_correct_completions():
    rng = random.Random(0)
    for share in (0.0, 0.5, 0.7, 1.0):
        prompts = sample_prompts(2000, rng)
        n_correct = 0
        for prompt in prompts:
            completion = sample_completion(prompt, rng, share)
            digits = completion.split("answer ")[1].split()[:4]
            n_correct += digits == sorted(prompt.split()[-4:], reverse="down" in prompt)
        # Five binomial standard deviations; none at shares 0 and 1, where a wrong answer would be an error.
        assert abs(n_correct - share * 2000) <= 5 * (2000 * share * (1 - share)) ** 0.5


def test_pairs_follow_their_rule():
    pairs = preference_pairs(500, seed=3)
    assert len({text(row["prompt"]) for row in pairs}) == 500
    for row in pairs:
        assert row["utility_chosen"] == utility(row["prompt"], row["chosen"])
        assert row["utility_rejected"] == utility(row["prompt"], row["rejected"])
        assert row["utility_chosen"] - row["utility_rejected"] >= 0.5
        assert [messages[0]["role"] for messages in (row["prompt"], row["chosen"])] == ["user", "assistant"]


def test_pairs_are_a_function_of_the_seed():
    assert preference_pairs(50, seed=1).to_list() == preference_pairs(50, seed=1).to_list()
    assert preference_pairs(50, seed=1).to_list() != preference_pairs(50, seed=2).to_list()


def test_flipped_pairs_are_seen_in_their_utilities():
    flipped = flip_preferences(preference_pairs(200), 0.3, exact=True)
    assert sum(flipped["flipped"]) == 60
    for row in flipped:
        assert row["flipped"] == (row["utility_chosen"] < row["utility_rejected"])
        assert row["utility_chosen"] == utility(row["prompt"], row["chosen"])


@pytest.mark.parametrize("call", [preference_pairs, train_reference, build_demo])
def test_wrong_arguments(call):
    arguments = (10, -1) if call is preference_pairs else (-1,)
    with pytest.raises(ValueError, match="`seed` must be a non-negative integer, got -1"):
        call(*arguments)
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        preference_pairs(0)


# --- tokenizer and model ---


def test_tokenizer_gives_every_word_one_token_and_the_text_back(tmp_path):
    tokenizer = make_tokenizer()
    assert len(tokenizer) == 38
    tokenizer.save_pretrained(tmp_path)
    make_model().config.save_pretrained(tmp_path)  # decides which tokenizer class AutoTokenizer takes
    rng = random.Random(0)
    for tok in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        seen = set()
        for prompt in sample_prompts(300, rng):
            completion = sample_completion(prompt, rng, 0.5)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            start = tok.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
            full = tok.apply_chat_template(messages, return_dict=False)
            assert full[: len(start)] == start and full[-1] == tok.eos_token_id
            assert len(full) == len(prompt.split()) + len(completion.split()) + 3  # <user>, <assistant>, <eos>
            assert tok.decode(start, skip_special_tokens=True).strip() == prompt
            assert tok.decode(full[len(start) :], skip_special_tokens=True).strip() == completion
            assert tokenizer.apply_chat_template(messages, return_dict=False) == full
            seen |= set(full)
        assert seen == set(range(len(tok))) - {tok.pad_token_id}


def test_chat_template_marks_the_assistants_tokens_and_knows_two_roles():
    tokenizer = make_tokenizer()
    messages = [
        {"role": "user", "content": "formal sort up : 1 2 3 4"},
        {"role": "assistant", "content": "answer 1 2 3 4"},
    ]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert out["assistant_masks"] == [0] * 10 + [1] * 6
    with pytest.raises(Exception, match="roles of the built-in task"):
        tokenizer.apply_chat_template([{"role": "system", "content": "answer"}])


def test_model_is_small_tied_and_a_function_of_the_seed():
    model = make_model(1)
    assert model.config.model_type == "qwen2" and model.dtype == torch.float32
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (64, 2)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 101_312
    same, other = make_model(1), make_model(2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_training_is_deterministic_and_leaves_no_trace(quick_training):
    prompt = sample_prompts(1, random.Random(0))
    torch.manual_seed(0)
    random.seed(0)
    state, python_state, n_threads = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    first = train_reference(1, frozenset(prompt))
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    assert torch.get_num_threads() == n_threads and not first.training
    random.seed(1)
    torch.manual_seed(1)
    second, other = train_reference(1, frozenset(prompt)), train_reference(2, frozenset(prompt))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, make_model(1).lm_head.weight)


def test_sft_labels_are_the_completions():
    tokenizer = make_tokenizer()
    batch = prm_hf.demo.model._sft_batch(tokenizer, random.Random(0), frozenset())
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert len(batch["input_ids"]) == 32
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        n = int(mask.sum())
        assert (ids[n:] == tokenizer.pad_token_id).all() and (labels[n:] == -100).all()
        assert (labels[:10] == -100).all() and torch.equal(labels[10:n], ids[10:n])
        assert ids[9] == tokenizer.convert_tokens_to_ids("<assistant>") and ids[n - 1] == tokenizer.eos_token_id


# --- the whole ---


def test_splits_are_disjoint_and_deterministic(demo):
    prompts = [{text(row["prompt"]) for row in split} for split in (demo.train, demo.validation, demo.test)]
    assert [len(p) for p in prompts] == [256, 192, 512] == [len(s) for s in (demo.train, demo.validation, demo.test)]
    assert len(set.union(*prompts)) == 960
    again = build_demo()
    assert again.model_path == demo.model_path and again.test.to_list() == demo.test.to_list()


def test_reference_never_sees_the_prompts_of_the_pairs(demo, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        prm_hf.demo.model, "train_reference", lambda seed, exclude: asked.append(exclude) or make_model()
    )
    build_demo(cache_dir=tmp_path)
    assert asked == [{text(row["prompt"]) for split in (demo.train, demo.validation, demo.test) for row in split}]
    rng, exclude = random.Random(0), frozenset(sample_prompts(20_000, random.Random(1)))
    tokenizer = make_tokenizer()
    for _ in range(20):
        ids = prm_hf.demo.model._sft_batch(tokenizer, rng, exclude)["input_ids"]
        assert not {tokenizer.decode(row[1:9]).strip() for row in ids} & exclude


def test_reference_policy_knows_its_digits(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path)
    model = AutoModelForCausalLM.from_pretrained(demo.model_path)
    ids = tokenizer.apply_chat_template(
        demo.test["prompt"][:], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**ids, max_new_tokens=16, do_sample=False)
    completions = tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    n_right = 0
    for row, completion in zip(demo.test, completions, strict=True):
        utility(row["prompt"], completion)  # raises if the completion does not follow the grammar
        prompt = text(row["prompt"]).split()
        correct = sorted(prompt[-4:], reverse=prompt[2] == "down")
        n_right += sum(a == b for a, b in zip(completion.split("answer ")[1].split(), correct, strict=False))
    assert n_right / (4 * len(completions)) > 0.97


def test_reference_policy_is_random_in_style(demo):
    # Otherwise DPO would start from a preference. Half of the sampled completions have an opener, and half a closer.
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path)
    model = AutoModelForCausalLM.from_pretrained(demo.model_path)
    ids = tokenizer.apply_chat_template(
        demo.test["prompt"][:], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        probs = model(**ids).logits[:, -1].softmax(-1).mean(0)
    openers = tokenizer.convert_tokens_to_ids([" sure", " certainly", " hey", " hmm"])
    assert probs[openers].tolist() == pytest.approx([0.125] * 4, abs=0.03)


def test_trl_trains_by_path(demo, tmp_path):
    args = DPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
    )
    trainer = DPOTrainer(model=demo.model_path, args=args, train_dataset=demo.train.select(range(8)))
    row = demo.train[0]
    expected = trainer.processing_class.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert trainer.train_dataset[0]["prompt_ids"] == expected and len(expected) == 10
    assert len(trainer.train_dataset[0]["chosen_ids"]) == len(text(row["chosen"]).split()) + 1
    trainer.train()
    # One step from the reference, whose reward margin is 0: the loss is log 2.
    assert trainer.state.log_history[0]["train_loss"] == pytest.approx(0.6931, abs=1e-3)


# --- the cache ---


def test_second_call_trains_nothing(demo, monkeypatch):
    def train(*args):
        raise AssertionError("the reference policy is in the cache")

    monkeypatch.setattr(prm_hf.demo.model, "train_reference", train)
    assert build_demo().model_path == demo.model_path


def test_cache_is_named_by_all_that_defines_it(quick_training, tmp_path, monkeypatch):
    paths = [build_demo(cache_dir=tmp_path).model_path]
    paths.append(build_demo(seed=1, cache_dir=tmp_path).model_path)
    for owner, name, value in (
        (prm_hf.demo.model, "SFT_STEPS", 3),
        (prm_hf.demo.model, "MODEL_CONFIG", {**prm_hf.demo.model.MODEL_CONFIG, "hidden_size": 32}),
        (prm_hf.demo.task, "FILLER_COST", 0.3),
        (torch, "__version__", "0.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            paths.append(build_demo(cache_dir=tmp_path).model_path)
    assert len(set(paths)) == len(paths)
    assert build_demo(cache_dir=tmp_path).model_path == paths[0]
    assert json.loads((tmp_path / os.path.basename(paths[1]) / "definition.json").read_text())["seed"] == 1
    assert not list(tmp_path.glob("building-*"))


def test_interrupted_training_leaves_nothing_behind(tmp_path, quick_training, monkeypatch):
    with monkeypatch.context() as patch:

        def interrupt(*args):
            raise KeyboardInterrupt

        patch.setattr(prm_hf.demo.model, "make_tokenizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_demo(cache_dir=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] in ([".lock"], [])
    assert AutoTokenizer.from_pretrained(build_demo(cache_dir=tmp_path).model_path).eos_token == "<eos>"


def test_cache_folder(quick_training, tmp_path, monkeypatch):
    monkeypatch.setenv("PRM_HF_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert build_demo().model_path.startswith(str(tmp_path / "a" / "demo-"))
    assert build_demo(cache_dir=tmp_path / "d").model_path.startswith(str(tmp_path / "d" / "demo-"))
    monkeypatch.delenv("PRM_HF_CACHE")
    assert build_demo().model_path.startswith(str(tmp_path / "b" / "prm_hf" / "demo-"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build_demo().model_path.startswith(str(tmp_path / "c" / ".cache" / "prm_hf" / "demo-"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="PRM_HF_CACHE"):
        build_demo(cache_dir=tmp_path / "file")


@pytest.mark.slow
def test_one_of_several_processes_trains(tmp_path):
    code = (
        "import os, sys, prm_hf.demo.build as build\n"
        "train = build.model.train_reference\n"
        "def counted(*args):\n"
        "    open(os.path.join(sys.argv[1], f'trained-{os.getpid()}'), 'w').close()\n"
        "    return train(*args)\n"
        "build.model.train_reference, build.model.SFT_STEPS = counted, 20\n"
        "print(build.build_demo(cache_dir=sys.argv[1]).model_path)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    # The last line: imported packages may print too.
    paths = {process.communicate(timeout=300)[0].splitlines()[-1] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(paths) == 1 and os.path.isfile(os.path.join(paths.pop(), "model.safetensors"))
    assert len(list(tmp_path.glob("trained-*"))) == 1
