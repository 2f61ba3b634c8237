"""Messages for errors of the user and of the system, which the command line reports without a traceback."""

import errno

from camelid.errors import UserError

LESS_MEMORY = {
    "train": "Use a smaller data.batch_size or a larger train.accumulate, compute.remat = 'layer', compute.dtype = "
    "'bfloat16', or more devices along mesh.fsdp.",
    "generate": "Use fewer prompts at once, fewer --max-new-tokens, or --dtype bfloat16.",
    "evaluate perplexity": "Use a shorter --sequence-length, or --dtype bfloat16.",
    "data prepare": "Use fewer --workers.",
}
LESS_MEMORY["finetune"] = f"Use --lora. {LESS_MEMORY['train']}"
"""Advice for each command that runs out of memory."""


def as_user_error(error: Exception, command: str) -> UserError | None:
    """The error as a UserError; None if it is caused by neither the user nor the system."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return None
        about = f"{error.filename}: " if error.filename else ""
        return UserError(f"{about}{error.strerror}", "Check the path, its permissions, and the disk.")
    text = " ".join(str(error).split())[:300]
    # Errors of XLA are recognized by their text; importing their class would import JAX.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text):
        advice = LESS_MEMORY.get(command, "Close other programs, or use a machine with more memory.")
        return UserError(f"out of memory{text and ': '}{text}", advice)
    # A message of Gloo. With other collectives, JAX ends the process itself when heartbeats are missing.
    if isinstance(error, RuntimeError) and "connection" in text.lower() and "peer" in text:
        return UserError("another process of this run has ended", "See its output; then run the same command again.")
    return None
