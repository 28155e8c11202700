"""Which FSDP settings keep the tensors apart. (How their shards are read is in `layout.py`.)"""

FLAT_PARAMETERS = (
    "PRM cannot tell the tensors in FSDP1's flat parameters apart. Set `fsdp_use_orig_params: true` "
    "(`use_orig_params=True`), or use FSDP2 (`fsdp_version: 2`)."
)
LOST_STATE = (
    "accelerate loads no optimizer state from an FSDP1 checkpoint of `SHARDED_STATE_DICT`, so the optimizer would "
    "start anew. Use `fsdp_state_dict_type: FULL_STATE_DICT`, or FSDP2 (`fsdp_version: 2`)."
)


def check_plugin(fsdp_version: int, use_orig_params: bool | None) -> None:
    """Raises ValueError if the settings of accelerate's FSDP plugin make one flat parameter of several tensors."""
    if fsdp_version == 1 and not use_orig_params:
        raise ValueError(FLAT_PARAMETERS)
