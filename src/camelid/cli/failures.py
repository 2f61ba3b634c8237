"""What the command line says of errors that are not the program's fault."""

import errno

from camelid.errors import UserError

LESS_MEMORY = {
    "train": "Use a smaller data.batch_size or a larger train.accumulate, compute.remat = 'layer', compute.dtype = "
    "'bfloat16', or more devices along mesh.fsdp.",
    "generate": "Use fewer prompts at once, fewer --max-new-tokens, or --dtype bfloat16.",
    "evaluate perplexity": "Use a shorter --sequence-length, or --dtype bfloat16.",
    "data prepare": "Use fewer --workers.",
}
"""by command: what needs less memory"""


def as_user_error(error: Exception, command: str) -> UserError | None:
    """The error as a problem and advice; None if it is neither the user's nor the system's."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return None
        about = f"{error.filename}: " if error.filename else ""
        return UserError(f"{about}{error.strerror}", "Check the path, its permissions, and the disk.")
    text = " ".join(str(error).split())[:300]
    # XLA's errors are known by their text; their class cannot be imported without JAX.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text):
        advice = LESS_MEMORY.get(command, "Close other programs, or use a machine with more memory.")
        return UserError(f"memory ran out{text and ': '}{text}", advice)
    # This is Gloo's text. With other collectives JAX ends the process itself, when heartbeats are missing.
    if isinstance(error, RuntimeError) and "connection" in text.lower() and "peer" in text:
        return UserError("another process of this run has ended", "See its output; then run the same command again.")
    return None
