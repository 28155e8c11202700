"""The runs that the tests look at, by path. All of a path are made in one launch, and shared by the tests."""

PER_TENSOR = {"reduction": "per_tensor", "estimator": "ema"}
PER_PARAM = {"reduction": "per_param", "estimator": "ema"}
DEBIASED = {"estimator": "debiased"}
PER_ROW = {"reduction": "per_row", "signal_beta": 0.98} | DEBIASED

# By name of the file in `accelerate_configs/`, the number of processes.
PATHS = {
    "single": 1,
    "ddp": 2,
    "fsdp2": 2,
    "zero0": 2,
    "zero1": 2,
    "zero2": 2,
    "zero3": 2,
    "zero2_offload": 2,
    "zero3_offload": 2,
}

REFUSES_REDUCTIONS = ("single", "fsdp2", "zero2", "zero3")  # as the others do, by the same code
SAVED = {"steps": 6, "save_steps": 3}
# On every path, in float32 unless the name says otherwise, with the same batches.
COMMON = {
    "per_tensor": {"prm": PER_TENSOR, "accumulation": 2, **SAVED},
    "per_param": {"prm": PER_PARAM, **SAVED},
    "per_tensor_debiased": {"prm": PER_TENSOR | DEBIASED, "tied": False},
    "per_param_debiased": {"prm": PER_PARAM | DEBIASED},
    "lora": {"prm": PER_TENSOR, "lora": True, **SAVED},
    "frozen": {"prm": PER_TENSOR, "frozen": True},
    "bf16": {"prm": PER_TENSOR, "bf16": True, **SAVED},
    "lora_bf16": {"prm": PER_TENSOR, "lora": True, "bf16": True, **SAVED},
    "per_row": {"prm": PER_ROW, "accumulation": 2, **SAVED},
    "per_row_bf16": {"prm": PER_ROW, "bf16": True, **SAVED},
    "per_row_lora": {"prm": {"reduction": "per_row", "estimator": "ema"}, "lora": True},
}
# What only some paths have, by path.
# With stage 1 that is DeepSpeed's `BF16_Optimizer`, unless the optimizer is offloaded
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}
SUB_GROUPS = {"zero_optimization": {"sub_group_size": 6000}}
PLAIN = {"prm": PER_TENSOR, **SAVED}
BF16_FP32 = PLAIN | {"bf16": True, "deepspeed": FP32_ACCUMULATION}
FP16 = PLAIN | {"fp16": True, "overflow_at": 2, "deepspeed": {"fp16": {"initial_scale_power": 8}}}
FSDP1 = {
    "FSDP_VERSION": "1",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_SYNC_MODULE_STATES": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
FULL_STATE = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
BF16_STATE = PLAIN | {"prm": PER_TENSOR | {"state_dtype": "bf16"}}
# With matrices that are in 8 bits wherever they lie, and some that are in flat buffers alone
LARGER = {"model": {"hidden_size": 64, "intermediate_size": 97}, **SAVED}
IN_8_BITS = {
    f"{name}_8bit": {"prm": prm | {"state_dtype": "8bit"}, **LARGER}
    for name, prm in {"per_tensor": PER_TENSOR, "per_row": PER_ROW, "per_param": PER_PARAM}.items()
}
REFUSED_STATE = {"prm": PER_TENSOR | {"state_dtype": "bf16"}}
PURE_BF16 = PLAIN | {"dtype": "bfloat16"}  # parameters in bfloat16, without float32 copies
UNIVERSAL_ROWS = {"prm": {"reduction": "per_row"} | DEBIASED, **SAVED}  # universal checkpoints keep all of its state
REFUSED_ROWS = {"prm": PER_ROW}
# By the Triton kernels, interpreted, in two halves; whole tensors they mask without telling
KERNELS = {
    "per_tensor_kernel": {"prm": PER_TENSOR | {"fused": True}, **SAVED},
    "per_row_kernel": {"prm": PER_ROW | {"fused": True}, **SAVED},
}
SPECIAL = {
    "single": {"pure_bf16": PURE_BF16},
    "ddp": {"pure_bf16": PURE_BF16, "per_tensor_8bit": IN_8_BITS["per_tensor_8bit"]},
    "fsdp2": {
        **KERNELS,
        **IN_8_BITS,
        "per_row_8bit": IN_8_BITS["per_row_8bit"] | {"environment": FULL_STATE},
        "pure_bf16": PURE_BF16,
        "bf16_state": BF16_STATE,
        "per_row_bf16_state": {"prm": PER_ROW | {"state_dtype": "bf16"}, **SAVED},
        "plain": PLAIN,
        "fsdp1": PLAIN | {"environment": FSDP1},
        "refused_state": REFUSED_STATE | {"environment": FSDP1},
        "refused_rows": REFUSED_ROWS | {"environment": FSDP1},
        "fsdp1_flat": {"prm": PER_TENSOR, "environment": FSDP1 | {"FSDP_USE_ORIG_PARAMS": "false"}},
    },
    # DeepSpeed refuses to accumulate bfloat16 in float32 there
    "zero0": {"fp16": FP16},
    "zero1": {
        "per_row_universal": UNIVERSAL_ROWS,
        "bf16_fp32": BF16_FP32,
        "plain": PLAIN,
        "round_robin": PLAIN | {"deepspeed": ROUND_ROBIN},
    },
    "zero2": {
        **KERNELS,
        **IN_8_BITS,
        "per_row_bf16_state": {"prm": PER_ROW | {"state_dtype": "bf16"}, **SAVED},
        "per_row_universal": UNIVERSAL_ROWS,
        "bf16_fp32": BF16_FP32,
        "fp16": FP16,
        "plain": PLAIN,
        "round_robin": PLAIN | {"deepspeed": ROUND_ROBIN},
    },
    "zero3": {
        **KERNELS,
        "bf16_fp32": BF16_FP32,
        "fp16": FP16,
        "plain": PLAIN,
        "per_row_8bit": IN_8_BITS["per_row_8bit"],
        "sub_groups": PLAIN | {"deepspeed": SUB_GROUPS},
        "per_row_universal": UNIVERSAL_ROWS,
        "per_row_sub_groups": {"prm": PER_ROW, "deepspeed": SUB_GROUPS, **SAVED},
    },
    "zero2_offload": {"bf16_fp32": BF16_FP32},
    "zero3_offload": {"bf16_fp32": BF16_FP32},
}


def plan(path: str) -> dict[str, dict]:
    """The runs of a path, each that saves followed by one that resumes it half way."""
    runs = {}
    for name, options in (COMMON | SPECIAL.get(path, {})).items():
        runs[name] = options
        if "save_steps" in options:
            runs[f"{name}_resumed"] = options | {"resume": f"{name}/checkpoint-3"}
    if path in REFUSES_REDUCTIONS:
        runs["to_per_param"] = COMMON["per_tensor"] | {"prm": PER_PARAM, "resume": "per_tensor/checkpoint-3"}
        runs["to_per_tensor"] = COMMON["per_param"] | {"prm": PER_TENSOR, "resume": "per_param/checkpoint-3"}
    return runs
