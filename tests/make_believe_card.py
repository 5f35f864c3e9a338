"""Run the extraction on a make-believe accelerator, and count what a real one would wait for.

    python tests/make_believe_card.py COUNTS.json ARGS...

Runs `run_gemma3_extraction.py ARGS... --device card`. `card` is a device type of its own whose
numbers lie in host memory, so that no accelerator is needed.

It shows whether an operation mixes tensors of the card and of the host (which raises, as on CUDA),
and how many copies and waits each function of the script causes. It cannot show time or memory,
nor a result that is read before a copy has arrived: here every copy is over when it returns.

COUNTS.json has an entry for each function of the script, such as "Extractor.decode":

    up, down    copies to the card and from it that the function made: no other function of the
                script stands between it and the copy
    wait        the same, of other operations whose result the host has to wait for
    below       all three, of the function and of what it called
    calls       of the function in the main thread; of a generator, how often it was resumed

"mixed" counts by function how often host and card were mixed. "elsewhere" is what no function of
the script caused, such as transformers' threads that load weights.
"""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import CodeType

import torch
import transformers
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)
from transformers.models.gemma3 import modeling_gemma3

DEVICE = "card"
SCRIPT_NAME = "run_gemma3_extraction.py"
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING |= {aten._index_put_impl_.default}
# The shape or the Python value that comes of them is known only when the card has run so far.
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
WAITING |= {aten.equal.default, aten._unique2.default, aten.repeat_interleave.Tensor}

counts: defaultdict[str, Counter] = defaultdict(Counter)  # by function of the script, by kind


def function_name(code: CodeType) -> str | None:
    """What a function of the script is called here; None: another's function, or no function."""
    if not code.co_filename.endswith(SCRIPT_NAME):
        return None
    if code.co_name.startswith("<"):  # a comprehension, a lambda or the module itself
        return None
    return code.co_qualname.replace(".<locals>", "")


def script_functions() -> list[str]:
    """The script's functions that are running in this thread, the innermost first."""
    names = []
    frame = sys._getframe(1)
    while frame:
        name = function_name(frame.f_code)
        if name:
            names.append(name)
        frame = frame.f_back
    return names or ["elsewhere"]


def count(kind: str, number: int = 1) -> None:
    """Count a copy, a wait or a mistake for the function that caused it."""
    if not number:
        return
    names = script_functions()
    counts[names[0]][kind] += number
    if kind != "mixed":
        for name in set(names):  # once, if it called itself
            counts[name]["below"] += number


def count_call(frame, event: str, _) -> None:
    """For `sys.setprofile`: count the calls of the script's functions."""
    name = function_name(frame.f_code) if event == "call" else None
    if name:
        counts[name]["calls"] += 1


class Card(Tensor):
    """A tensor on the make-believe card. Its numbers lie in `raw`, a tensor of the host."""

    @staticmethod
    def __new__(cls, raw: Tensor):
        tensor = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"{DEVICE}:0",
        )
        tensor.raw = raw
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_) -> str:
        return f"Card({tuple(self.shape)}, {self.dtype})"  # printing numbers would read them back

    def data_ptr(self) -> int:
        """By which accelerate knows weights that are tied."""
        return self.raw.data_ptr()

    def tolist(self) -> list:
        """Torch's own refuses tensors like this one."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """Every operation with a tensor of the card among its arguments."""
        kwargs = kwargs or {}
        check_devices(operation, args, kwargs)
        count_transfers(operation, args, kwargs)
        outcome = operation(*to_host(args), **to_host(kwargs))
        return to_card(outcome, operation, args, kwargs)


def is_hosted(tensor) -> bool:
    """Whether it is a tensor of the host."""
    return isinstance(tensor, Tensor) and not isinstance(tensor, Card)


def check_devices(operation, args: tuple, kwargs: dict) -> None:
    """Raise RuntimeError where CUDA would: tensors of the host beside those of the card.

    As there, a copy may have both, an index may come from the host, and so may a single number.
    """
    if operation is aten.copy_.default:
        return
    if operation in INDEXING and isinstance(args[0], Card):
        args = (args[0], *args[2:])
    hosted = [leaf for leaf in tree_leaves((args, kwargs)) if is_hosted(leaf) and leaf.dim()]
    if hosted:
        count("mixed")
        shapes = [tuple(tensor.shape) for tensor in hosted]
        raise RuntimeError(f"{operation} has tensors on {DEVICE} and on the host: {shapes}")


def count_transfers(operation, args: tuple, kwargs: dict) -> None:
    """Count what this operation copies between host and card, and what it waits for."""
    if operation is aten.copy_.default:
        target, source = args[:2]
        count("up", is_hosted(source))
        count("down", is_hosted(target))
    elif operation is aten._to_copy.default:
        count("down", leaves_card(kwargs))
    elif operation in INDEXING:
        indices = [index for index in args[1] if index is not None]
        count("up", sum(is_hosted(index) for index in indices))
        count("wait", sum(index.dtype == torch.bool for index in indices))
    elif operation in WAITING:
        count("wait")


def leaves_card(kwargs: dict) -> bool:
    """Whether an operation's result is to lie in host memory."""
    device = kwargs.get("device")
    return device is not None and torch.device(device).type != DEVICE


def to_host(tree):
    """Arguments as the host's own operation takes them."""

    def convert(leaf):
        if isinstance(leaf, Card):
            return leaf.raw
        if isinstance(leaf, torch.device) and leaf.type == DEVICE:
            return torch.device("cpu")
        return leaf

    return tree_map(convert, tree)


def to_card(outcome, operation, args: tuple, kwargs: dict):
    """What an operation gives, on the card again; an argument changed in place is itself."""
    if operation is aten.copy_.default:
        return args[0]
    if leaves_card(kwargs):
        return outcome
    cards = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Card)]
    known = {id(card.raw): card for card in cards}
    for card in cards:
        if card.shape != card.raw.shape or card.stride() != card.raw.stride():
            raise NotImplementedError(f"{operation} changes a shape in place, which Card cannot")

    def convert(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else Card(leaf)

    return tree_map(convert, outcome)


class Backend(_DummyBackendModule):
    """What torch and transformers ask of a device type's module, `torch.card`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def synchronize(self, *_) -> None:
        count("wait")


def make_empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Card(torch.empty(size, dtype=dtype or torch.get_default_dtype()))


def make_empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Card(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))


def make_range(*bounds, dtype=None, layout=None, device=None, pin_memory=None):
    """Torch's own would make an empty tensor larger in place, which `Card` cannot."""
    return Card(torch.arange(*bounds, dtype=dtype))


def copy_from(source, target, non_blocking=False):
    """The copy in `torch.tensor(..., device="card")`, which passes `__torch_dispatch__` by."""
    return Card.__torch_dispatch__(aten.copy_.default, (), (target, source))


def on_host(make_masks):
    """Let transformers make masks on the host, as `vmap` cannot take tensors like `Card`."""

    def make_masks_on_host(*args, **kwargs):
        masks = make_masks(*to_host(args), **to_host(kwargs))
        return tree_map(lambda leaf: Card(leaf) if isinstance(leaf, Tensor) else leaf, masks)

    return make_masks_on_host


def set_up_card() -> torch.library.Library:
    """Make torch know the device type, for as long as what this returns is kept."""
    backend = Backend()
    _setup_privateuseone_for_python_backend(DEVICE, backend_module=backend)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", make_empty, "PrivateUse1")
    library.impl("empty_strided", make_empty_strided, "PrivateUse1")
    for name in ("arange", "arange.start", "arange.start_step"):
        library.impl(name, make_range, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    torch.accelerator.empty_cache = lambda: None  # there is no allocator behind it
    torch.accelerator.synchronize = backend.synchronize
    torch.inference_mode = torch.no_grad  # torch refuses it for tensors like `Card`
    for name in ("create_masks_for_vision_model", "create_masks_for_generate"):
        setattr(modeling_gemma3, name, on_host(getattr(modeling_gemma3, name)))
    return library


def summarise() -> dict[str, dict[str, int]]:
    """The counts as they are written."""
    kinds = ("up", "down", "wait", "below", "calls")
    table = {name: {kind: of[kind] for kind in kinds} for name, of in sorted(counts.items())}
    table["mixed"] = {name: of["mixed"] for name, of in sorted(counts.items()) if of["mixed"]}
    return table


def main(argv: list[str]) -> int:
    """Run the script on the card; its exit status."""
    counts_path = Path(argv[0])
    library = set_up_card()
    sys.path.append(str(Path(__file__).parent.parent))  # behind PYTHONPATH, for a test's script
    import run_gemma3_extraction as script  # not before `inference_mode` is replaced

    sys.setprofile(count_call)
    try:
        return script.main([*argv[1:], "--device", DEVICE])
    finally:
        sys.setprofile(None)
        counts_path.write_text(json.dumps(summarise(), indent=2) + "\n")
        del library


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    raise SystemExit(main(sys.argv[1:]))
