"""The process behind test_private.py: lives without each private name in turn, and prints how that went.

torch and transformers are imported once; each name then goes in a child of its own (a fork: cheap, and nothing that a
child registers with torch or breaks in it outlives it). A name that torch and transformers can do without is deleted
for real. One that they need themselves is hidden from `wavlm_fast._private` alone, which looks with `getattr`, by
giving that module a `getattr` of its own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
import traceback
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.wavlm import modeling_wavlm as hf

ROOT = Path(__file__).parent.parent
# Not torch's or transformers' at all: shows that what is done without a name is not what passes with it.
NONE = ("", "")


def main():
    first = json.loads(in_child(look_around))
    for module in first["modules"]:  # nobody has to import them again
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    gc.freeze()  # no child has to look through all of torch for garbage
    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "a fork would keep one thread of several"
    print(json.dumps([*NONE, "there"]))
    for owner, name in first["names"]:
        print(json.dumps([owner, name, in_child(live_without, owner, name)]), flush=True)


def in_child(function, *arguments):
    """What a function returns in a child process, a string; the traceback if it raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = function(*arguments)
        except BaseException:
            said = traceback.format_exc()
        with os.fdopen(writer, "w") as pipe:
            pipe.write(said)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    return said if status == 0 else f"ended with status {status}: {said}"


def look_around():
    """The private names, and what is imported by what the children do."""
    before = set(sys.modules)
    live_without(*NONE)
    from wavlm_fast import _private

    ours = ("wavlm", "private", "__main__")
    return json.dumps({
        "names": [(name.owner, name.name) for name in _private.NAMES],
        "modules": sorted(m for m in set(sys.modules) - before if not m.startswith(ours)),
    })


def live_without(owner, name):
    sys.path.insert(0, str(Path(__file__).parent / "models"))
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    how = "there"
    if name:
        how = "deleted" if delete(pkgutil.resolve_name(owner), name) else "hidden"
        hide(owner, name)
    from private_life import live

    live(owner, name)
    return how


def delete(owner, name):
    """Delete an attribute, if torch and transformers do without it."""
    try:
        kept = getattr(owner, name)
        delattr(owner, name)
    except (AttributeError, TypeError):  # an instance's, a module's that is imported when asked for, or C's
        return False
    if in_child(plain_life) == "well":  # some names end the process
        return True
    setattr(owner, name, kept)
    return False


def plain_life():
    config = transformers.WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=[8, 8],
        conv_stride=[5, 2], conv_kernel=[10, 3], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        mask_time_length=2, tdnn_dim=[8], tdnn_kernel=[3], tdnn_dilation=[1],
    )  # fmt: skip
    model, mask = hf.WavLMForXVector(config).train(), torch.ones(2, 400, dtype=torch.long)
    model(torch.randn(2, 400), attention_mask=mask).logits.sum().backward()
    model.to("cpu").bfloat16().float().eval()(torch.randn(2, 400), output_hidden_states=True)
    torch.nn.utils.weight_norm(torch.nn.Conv1d(2, 2, 1))
    library = torch.library.Library("wavlm_fast_probe", "FRAGMENT")
    library.define("probe(Tensor x) -> Tensor")
    library.impl("probe", lambda x: x.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake("wavlm_fast_probe::probe", torch.empty_like, lib=library)
    torch.library.register_autograd("wavlm_fast_probe::probe", lambda ctx, grad: grad, lib=library)
    torch.ops.wavlm_fast_probe.probe(torch.ones(2, requires_grad=True)).sum().backward()
    with torch._subclasses.FakeTensorMode():
        torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).softmax(-1)
    return "well"


def hide(owner, name):
    """Import `wavlm_fast._private`, before all else of the package, in a world without `owner.name`."""
    whose = pkgutil.resolve_name(owner)

    def look(thing, attribute, *default):
        if attribute == name and (thing is whose or (isinstance(whose, type) and isinstance(thing, whose))):
            if not default:
                raise AttributeError(name)
            return default[0]
        return getattr(thing, attribute, *default)

    spec = importlib.util.spec_from_file_location("wavlm_fast._private", ROOT / "wavlm_fast" / "_private.py")
    module = importlib.util.module_from_spec(spec)
    module.getattr = look
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
