"""The runs that the tests look at, by path. All of a path are made in one launch, and shared by the tests."""

PER_TENSOR = {"reduction": "per_tensor"}
PER_PARAM = {"reduction": "per_param"}
DEBIASED = {"estimator": "debiased"}

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
}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
# Of a kind that only some paths have: (path, name of the run).
FP16 = {"initial_scale_power": 18, "hysteresis": 1}
SPECIAL = {
    "zero0": {"fp16": {"prm": PER_TENSOR, "fp16": True, "deepspeed": {"fp16": FP16}, **SAVED}},
    "zero1": {
        "round_robin": {"prm": PER_TENSOR, "deepspeed": {"zero_optimization": {"round_robin_gradients": True}}},
        # DeepSpeed's `BF16_Optimizer`
        "bf16_fp32": {"prm": PER_TENSOR, "bf16": True, "deepspeed": FP32_ACCUMULATION, **SAVED},
        "lora_bf16": {"prm": PER_TENSOR, "lora": True, "bf16": True, **SAVED},
    },
    "zero2": {
        "round_robin": {"prm": PER_TENSOR, "deepspeed": {"zero_optimization": {"round_robin_gradients": True}}},
        "bf16_fp32": {"prm": PER_TENSOR, "bf16": True, "deepspeed": FP32_ACCUMULATION, **SAVED},
        "fp16": {"prm": PER_TENSOR, "fp16": True, "deepspeed": {"fp16": FP16}, **SAVED},
        "lora_bf16": {"prm": PER_TENSOR, "lora": True, "bf16": True, **SAVED},
    },
    "zero3": {
        "sub_groups": {"prm": PER_TENSOR, "deepspeed": {"zero_optimization": {"sub_group_size": 6000}}, **SAVED},
        "bf16_fp32": {"prm": PER_TENSOR, "bf16": True, "deepspeed": FP32_ACCUMULATION, **SAVED},
        "fp16": {"prm": PER_TENSOR, "fp16": True, "deepspeed": {"fp16": FP16}, **SAVED},
        "lora_bf16": {"prm": PER_TENSOR, "lora": True, "bf16": True, **SAVED},
    },
    "fsdp2": {
        "fsdp1": {
            "prm": PER_TENSOR,
            "environment": {
                "FSDP_VERSION": "1",
                "FSDP_USE_ORIG_PARAMS": "true",
                "FSDP_SYNC_MODULE_STATES": "false",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
                "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            },
            **SAVED,
        },
        "lora_bf16": {"prm": PER_TENSOR, "lora": True, "bf16": True, **SAVED},
    },
}
SPECIAL["fsdp2"]["fsdp1_flat"] = {
    **SPECIAL["fsdp2"]["fsdp1"],
    "environment": SPECIAL["fsdp2"]["fsdp1"]["environment"] | {"FSDP_USE_ORIG_PARAMS": "false"},
}


def plan(path: str) -> dict[str, dict]:
    """The runs of a path, each that saves followed by one that resumes it half way."""
    runs = {}
    for name, options in (COMMON | SPECIAL.get(path, {})).items():
        runs[name] = options
        if "save_steps" in options:
            runs[f"{name}_resumed"] = options | {"resume": f"{name}/checkpoint-3"}
    runs["to_per_param"] = COMMON["per_tensor"] | {"prm": PER_PARAM, "resume": "per_tensor/checkpoint-3"}
    runs["to_per_tensor"] = COMMON["per_param"] | {"prm": PER_TENSOR, "resume": "per_param/checkpoint-3"}
    return runs
