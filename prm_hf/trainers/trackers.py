"""Whether the trackers of `report_to` can begin a run: whether they are installed and have a login."""

import os
from collections.abc import Iterable

from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks


def check_trackers(report_to: str | Iterable[str] | None, trackio_space_id: str | None = None) -> None:
    """Checks what a Trainer finds out when it is made, and a tracker when training begins.

    The first process asks the client of a tracker for its login; in a terminal, W&B then asks for a key. Whether
    a service accepts the key is not checked.

    Args:
        report_to: as `TrainingArguments` takes it.
        trackio_space_id: the same.

    Raises:
        ValueError: transformers has no such tracker, or it has no login.
        ImportError: a tracker is not installed, or not set up.
    """
    if report_to == "all":
        report_to = get_available_reporting_integrations()
    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        try:
            trackers = get_reporting_integration_callbacks(name)  # none of "none"
        except ValueError as error:
            raise ValueError(f"`report_to` has {name!r}: {error}") from error
        try:
            for tracker in trackers:
                tracker()
        except (RuntimeError, ImportError, ValueError) as error:
            hint = f" {_SET_UP[name]}" if name in _SET_UP else ""
            raise ImportError(f"`report_to` has {name!r}: {error}{hint} Or leave it out of `report_to`.") from error
        if os.environ.get("RANK", "0") != "0":
            continue
        problem = {"wandb": _wandb, "trackio": lambda: _trackio(trackio_space_id)}.get(name, lambda: None)()
        if problem is not None:
            raise ValueError(f"`report_to` has {name!r}: {problem}, or leave it out of `report_to`.")


def _wandb() -> str | None:
    """What keeps W&B from beginning a run."""
    import wandb

    if wandb.run is not None or wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return None
    try:
        wandb.login(verify=False)
    except wandb.Error as error:
        return f"{error} Run `wandb login`, set `WANDB_API_KEY`, set `WANDB_MODE=offline` to write to the disk alone"
    return None


def _trackio(space_id: str | None) -> str | None:
    """What keeps trackio from beginning a run. Without a Space it writes to the disk, and needs no login."""
    from huggingface_hub import get_token

    name = "trackio_space_id" if space_id else "TRACKIO_SPACE_ID"
    space_id = space_id or os.environ.get(name)
    if not space_id or get_token() is not None:
        return None
    return (
        f"`{name}` is {space_id!r}, and there is no token for the Hub. Run `hf auth login`, unset `{name}` to write "
        "to the disk alone"
    )


# transformers says "not installed" of a client without a key as well
_SET_UP = {"comet_ml": "Where it is installed, it has no key: run `comet login`, or set `COMET_API_KEY`."}
