"""A second device without a card: `counted`, whose tensors are computed on the CPU.

PyTorch lets a device be written in Python (PrivateUse1). Every operation comes by here, and what a card would refuse is
refused: a tensor of the CPU among those of the device, a generator of the CPU for a draw on the device, a NumPy array
of what lies on the device. What is computed on the CPU meanwhile is noted, with the place in the package that did it.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "counted"
PACKAGE = str(Path(__file__).resolve().parents[1] / "cvi_nb")
aten = torch.ops.aten


class _Module(_DummyBackendModule):
    """What PyTorch asks of a device's module."""

    def synchronize(self, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    # It draws with the CPU's generator, whose state others save and restore: `torch.random.fork_rng`.
    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False


_setup_privateuseone_for_python_backend(NAME, _Module())
DEVICE = torch.device(NAME, 0)
# As on a card: these move between devices, or take positions from elsewhere.
MOVES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
TAKES_POSITIONS = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Counted(torch.Tensor):
    """A tensor of the device; `raw` is where it is computed."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Counted:
        options = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, raw.shape, device=DEVICE, requires_grad=False, **options)
        made.raw = raw
        return made

    def tolist(self) -> Any:
        return self.raw.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first")
        return self.raw.numpy(force=True)

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{NAME}({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})


def refuse(function: Any, values: list[Any]) -> None:
    """Raise what a card raises for operands that do not lie together; numbers of the CPU are welcome."""
    if function in TAKES_POSITIONS:  # positions may lie on the CPU, but not what they are positions of
        if not isinstance(values[0], Counted):
            raise RuntimeError(f"indices should be on the cpu as the tensor is, but found {NAME} in {function}")
        return
    for value in values:
        if isinstance(value, torch.Tensor) and not isinstance(value, Counted) and value.dim() > 0:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and cpu in {function}")
        if isinstance(value, torch.Generator):
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu' in {function}")


def computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`function` of the device's tensors, or one that makes some, computed on the CPU."""
    values, _ = tree_flatten((args, kwargs))
    asked = kwargs.get("device")
    target = None if asked is None else torch.device(asked).type
    if not any(isinstance(value, Counted) for value in values) and target != NAME:
        return function(*args, **kwargs)
    if function not in MOVES:
        refuse(function, values)

    def lowered(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        return value.raw if isinstance(value, Counted) else value

    if function is aten._copy_from.default:
        function, args = aten.copy_.default, (args[1], args[0])
    out = function(*tree_map(lowered, args), **tree_map(lowered, kwargs))
    if (target or NAME) != NAME or (function is aten.copy_.default and not isinstance(args[0], Counted)):
        return out
    known = {id(value.raw): value for value in values if isinstance(value, Counted)}  # in place: the same comes back

    def lifted(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, Counted):
            return value
        return known[id(value)] if id(value) in known else Counted(value)

    return tree_map(lifted, out)


_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(lambda function, *args, **kwargs: computed(function, args, kwargs), "PrivateUse1")


class _FromData(TorchFunctionMode):
    """`torch.tensor(numbers, device=…)` and `x[[0, 1]]`, which a device in Python cannot do: made on the CPU first."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            device = kwargs.pop("device", None)
            made = function(*args, **kwargs)
            return made if device is None else made.to(device)
        if function is torch.Tensor.new_tensor and isinstance(args[0], Counted):
            device = kwargs.pop("device", DEVICE)
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs).to(device)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Counted):
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            at = tuple(torch.tensor(one) if isinstance(one, list) else one for one in at)
            args = (args[0], at if isinstance(args[1], tuple) else at[0], *args[2:])
        return function(*args, **kwargs)


class OnDevice(TorchDispatchMode):
    """Inside, the device exists. `astray` counts numbers that the package computed on the CPU, by file and operation.

    Not counted: what makes, draws, moves or views without arithmetic, and tensors of fewer than `least` numbers.
    """

    FREE = (
        "rand randn randint randperm normal bernoulli multinomial exponential uniform random geometric empty zeros "
        "ones full fill arange linspace eye scalar_tensor copy clone lift detach view reshape permute transpose select "
        "slice expand squeeze unsqueeze split unbind index gather stack cat as_strided alias t tril_indices "
        "unsafe_view set resize local_scalar_dense repeat new_zeros new_empty new_ones new_full zero unfold chunk "
        "diagonal to"
    ).split()

    def __init__(self, least: int = 784) -> None:
        super().__init__()
        self.least, self.astray, self.there = least, Counter[str](), 0

    def __enter__(self) -> Any:
        self.data = _FromData()
        self.data.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.data.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = computed(function, args, kwargs or {})
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Counted):
                self.there += tensor.numel()
            elif isinstance(tensor, torch.Tensor) and tensor.numel() >= self.least:
                self.note(function.overloadpacket.__name__, tensor)
        return out

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """One result on the CPU, by the line of the package that asked for it."""
        stripped = name.strip("_")
        if any(stripped == free.strip("_") or stripped.startswith(f"{free}_") for free in self.FREE):
            return
        frame = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            place = Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()
            self.astray[f"{place}:{frame.f_code.co_name} {name}"] += tensor.numel()


def run_cells(notebook: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """The code cells of a notebook with `parameters`, in this process, as papermill would; its names afterwards."""
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(colors="NoColor")
    try:
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code":
                continue
            shell.run_cell("".join(cell["source"]), store_history=True).raise_error()
            if "parameters" in cell["metadata"].get("tags", []):
                given = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
                shell.run_cell(f"# Parameters\n{given}", store_history=True).raise_error()
        return dict(shell.user_ns)
    finally:
        InteractiveShell.clear_instance()


def computes(notebook: Path) -> bool:
    """Whether a notebook asks a network, on a device that it chooses; the others lay out what these have computed."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return re.search(r"import torch|from torch|load_classifier|load_defended|choose_device", code) is not None
