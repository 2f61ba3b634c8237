"""Prefixes of tensor names that differ because the model was saved inside a wrapper, or without its head."""

import re
from collections.abc import Collection, Mapping

from camelid.checkpoint.tensors import Tensor

# Inserted by torch.compile, FSDP, activation checkpointing and DeepSpeed before the name of a module that they wrap,
# which may be the entire model or each of its layers.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
BASE_MODEL = "model."
"""prefix of all other tensors in a model with a head, which a model saved without its head lacks"""


def unwrapped(
    tensors: Mapping[str, Tensor], norm: str, wanted: Collection[str] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the tensors by their names in the format, and a note if these names differ from those in the files.

    `norm` is the name of the final norm in the format, and names in `wanted` are kept. Apart from WRAPPERS, any common
    prefix is removed: `module.` of DDP, `base_model.model.` of PEFT, or the name of an attribute. BASE_MODEL is
    prepended to the names of an AutoModel. The prefix is detected from the final norm, of which a model has one; if
    there are two, as in a student with its teacher, the names are kept.
    """
    plain = {name: WRAPPERS.sub("", name) for name in tensors}
    before = after = ""
    for inner in dict.fromkeys((norm, norm.removeprefix(BASE_MODEL))):
        prefixes = {
            name.removesuffix(inner) for name in plain.values() if re.fullmatch(rf"(.*\.)?{re.escape(inner)}", name)
        }
        if len(prefixes) > 1:
            return dict(tensors), ()
        if prefixes:
            before, after = prefixes.pop(), norm.removesuffix(inner)
            break
    names = {
        name: after + short.removeprefix(before) if short.startswith(before) and short not in wanted else short
        for name, short in plain.items()
    }
    if len({*names.values()}) < len(names) or all(name == other for name, other in names.items()):
        return dict(tensors), ()
    found = {f"{wrapper}." for name in tensors for wrapper in WRAPPERS.findall(name)}
    removed = " and ".join(repr(prefix) for prefix in [*sorted(found), before] if prefix)
    changes = [f"without {removed}, which a wrapper inserted"] if removed else []
    changes += [f"with the prefix {after!r}, which a model saved without its head lacks"] if after else []
    return {names[name]: tensor for name, tensor in tensors.items()}, (
        f"the names of tensors are read {' and '.join(changes)}",
    )
