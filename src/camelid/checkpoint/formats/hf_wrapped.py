"""Tensors whose names begin otherwise than their format's, because the model was saved inside a wrapper or alone."""

import re
from collections.abc import Collection, Mapping

from camelid.checkpoint.tensors import Tensor

# What torch.compile, FSDP, activation checkpointing and DeepSpeed put before the names of a module that they wrap,
# which may be the whole model or each of its layers.
MODULES = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
BASE = "model."
"""what the names of a model without a head begin with once it has one"""


def unwrapped(
    tensors: Mapping[str, Tensor], norm: str, wanted: Collection[str] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by the names that their format has, and a note where they had others.

    `norm` is the format's name of the last norm, and `wanted` are some that are right as they are. Beside MODULES, a
    prefix of all names is removed, whatever it is: `module.` of DDP, `base_model.model.` of PEFT, the name of an
    attribute. Names without BASE, which AutoModel saves, get it. The last norm, of which a model has one, shows the
    prefix; where there are two, as of a student and its teacher, names stay as they are.
    """
    plain = {name: MODULES.sub("", name) for name in tensors}
    before = after = ""
    for inner in dict.fromkeys((norm, norm.removeprefix(BASE))):
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
    found = {f"{module}." for name in tensors for module in MODULES.findall(name)}
    removed = " and ".join(repr(part) for part in [*sorted(found), before] if part)
    told = [f"without {removed}, left by a wrapper"] if removed else []
    told += [f"with {after!r} in front, which a model saved without its head lacks"] if after else []
    return {names[name]: tensor for name, tensor in tensors.items()}, (
        f"the names of tensors are read {' and '.join(told)}",
    )
