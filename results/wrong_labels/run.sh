#!/usr/bin/env bash
# The decisive runs on wrong labels: `bash results/wrong_labels/run.sh gsm8k`, or another function, from the
# repository's root. Every command may be repeated: it goes on where it stopped. The folder of the model and the files
# of rows are arguments, because both came without a hub:
#
#   MODEL=models/qwen DATA=data MINUTES=25 bash results/wrong_labels/run.sh gsm8k
#
# With MINUTES a command starts no run after that many, and ends with the exit code 75 where runs are left.
set -euo pipefail

model=${MODEL:-models/qwen}
data=${DATA:-.}
out=${OUT:-runs/wrong_labels}
more=${MORE:-} # further flags of every comparison, as `--use_peft --lora_r 16` with an OUT of its own
minutes=${MINUTES:+--max_minutes $MINUTES}
dpo="python recipes/sweep.py recipes/dpo_noisy.py --config recipes/qwen2.5-0.5b/one_pair_a_prompt.yaml
    --model_name_or_path $model $minutes $more"

# What is claimed is decided by these, in every function: the strongest AdamW, PRM, what repair adds to each, and AdamW
# on clean labels, by which recovery is measured.
main="adamw adamw_eps:10 prm_rows_eps:10 adamw_clean"
repairs="filter:adamw_eps:10 relabel:adamw_eps:10 soft:adamw_eps:10
    filter:prm_rows_eps:10 relabel:prm_rows_eps:10 soft:prm_rows_eps:10
    relabel:adamw_eps:10+prm_rows_eps:10 relabel:prm_rows_eps:10+adamw_eps:10"
# Other answers to noise. Losses that are corrected by a noise rate need one that is known.
baselines="interpolate:0.5 beta:0.3 beta:1 trimmed:0.2 trimmed:0.4 drdpo:1 casmo"
by_rate="cdpo robust prm_robust"
solve="--solve_dataset_name $data/gsm8k_sft.test.jsonl --solve_rows 600 --solve_batch_size 300"

gsm8k() { # correct against wrong solutions, one pair a prompt: 756 to train on, 232 held out
    local rows="--dataset_name $data/gsm8k_pairs.train.jsonl --eval_dataset_name $data/gsm8k_pairs.test.jsonl"
    $dpo $rows --output_dir "$out/gsm8k" --methods $main $repairs
    $dpo $rows --output_dir "$out/gsm8k/noise0.3" --methods $main $baselines $by_rate --noise_rate 0.3
}

wmt23() { # real noise: trained on one professional rater, held out where all three agree
    local rows="--dataset_name $data/wmt23_raters.train.jsonl --eval_dataset_name $data/wmt23_raters.test.jsonl"
    local rater
    for rater in 0 1 2; do
        $dpo $rows --label_votes_column votes --label_rater $rater --heldout_filter_column unanimous --noise_rate 0 \
            --output_dir "$out/wmt23/rater$rater" --methods $main $repairs $baselines
    done
}

on_policy() { # one right and one wrong answer of the model itself; measured by the problems that it solves, too
    pairs
    local rows="--dataset_name $out/on_policy.jsonl --dataset_test_split test" # split by prompt, 20 % held out
    $dpo $rows $solve --output_dir "$out/on_policy" --noise_rate 0.3 0.2 0.4 0 --methods $main $repairs
    $dpo $rows $solve --output_dir "$out/on_policy/noise0.3" --noise_rate 0.3 --methods $main $baselines $by_rate
}

pairs() { # eight answers to each of the 3,000 training problems; checked exactly
    mkdir -p "$out"
    accelerate launch --num_processes "${GPUS:-1}" recipes/pairs.py "$data/gsm8k_sft.train.jsonl" --model "$model" \
        --samples 8 --temperature 0.8 --max_new_tokens 320 --batch_size 256 --output "$out/on_policy.jsonl"
}

votes() { # no model: what the pairs of a prompt say about each other's labels
    python research/wrong_labels_votes.py "$data/gsm8k_pairs.train.jsonl" results/wrong_labels/votes.json
}

sft() { # solutions of which 30 % belong to another problem; measured by the held-out problems that are solved
    python recipes/sweep.py recipes/sft_noisy.py --config recipes/qwen2.5-0.5b/sft_wrong_completions.yaml $minutes $more \
        --model_name_or_path "$model" --dataset_name "$data/gsm8k_sft.train.jsonl" \
        --eval_dataset_name "$data/gsm8k_sft.test.jsonl" --output_dir "$out/sft" \
        --methods $main filter:adamw_eps:10 filter:prm_rows_eps:10
}

"$@"
