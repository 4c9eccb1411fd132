"""Files of weights that a user names: pickled by torch.save, or safetensors.

Unpickling can run arbitrary code, so only torch's restricted reader (``weights_only=True``) is used.
"""

from __future__ import annotations

import pickle
import re
import types
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastar.errors import UserError
from megastar.utils.files import open_regular
from megastar.utils.json_file import shown
from megastar.utils.weights.safetensors_header import open_tensors, read_header
from megastar.utils.weights.weight_parts import check_whole, is_index, read_parts


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file, of the files of a .safetensors.index.json, or of a torch.save file, also below
    ``state_dict`` or ``model``.

    On the CPU, memory-mapped where possible, in the file's types. Raises ``UserError``.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file: name a .pth or .safetensors file of weights")
    if is_index(path):
        return read_parts(path)
    if path.suffix == ".safetensors":
        check_whole(path)
        _, entries = read_header(path)
        with open_tensors(path) as f:
            return {name: f.get_tensor(name) for name in entries}
    content: Any = load_pickled(path)
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    if wrong := next((k for k, v in content.items() if not isinstance(k, str) or not isinstance(v, Tensor)), None):
        raise UserError(f"{path} contains {shown(str(wrong))}, which is not a tensor: use a file with named tensors")
    described, size = sum(v.numel() * v.element_size() for v in content.values()), path.stat().st_size
    if described > size:  # views of small storages, which take memory when they are converted
        raise UserError(
            f"{path} is damaged: its tensors have {described} bytes, the file only {size}: download it again"
        )
    return dict(content)


def load_pickled(path: Path) -> dict[str, Any]:
    """The content of a torch.save file, tensors memory-mapped. ``UserError`` for anything but plain data."""
    # LlamaGen's trainer stores its command line; load it as a plain namespace.
    try:
        with torch.serialization.safe_globals([(types.SimpleNamespace, "argparse.Namespace")]):
            mapped = _is_plain_zip(path)  # older files are one pickle
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"an object of {found.group(1)}" if found else "unexpected objects"
        raise UserError(
            f"{path} contains {what}, which can run code when loaded: "
            "ask its author for a file with tensors only, or for safetensors"
        ) from error
    except UserError:
        raise
    except Exception as error:  # torch.load raises many types for damaged files
        message = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path} is truncated or not a torch.save file ({message}): download it again") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} contains a {type(content).__name__}, not a dictionary of weights: use a file with named tensors"
        )
    return content


def _is_plain_zip(path: Path) -> bool:
    """Whether the file is a zip as ``torch.save`` writes it: nothing compressed, so that it holds no more than its size."""
    with open_regular(path) as f:
        if not zipfile.is_zipfile(f):
            return False
        with zipfile.ZipFile(f) as archive:
            if packed := [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]:
                raise UserError(
                    f"{path} is damaged or was not written by torch.save: {shown(packed[0])} in it is compressed: download it again"
                )
    return True
