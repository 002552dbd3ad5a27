"""Which library wrote a single file of tensors: loralib or t-few. Nothing here needs torch."""

from __future__ import annotations

from inlay.core.errors import AdapterFileError
from inlay.formats.archive import Archive

LORA = (".lora_A", ".lora_B")
SCALE = ".multi_lora_b"


def kind_of(file: Archive) -> str:
    """``loralib`` or ``t-few``, by the names of the tensors.

    Raises:
        AdapterFileError: it is neither.
    """
    if any(n.endswith(LORA) for n in file.shapes):
        return "loralib"
    if any(n.endswith(SCALE) for n in file.shapes):
        return "t-few"
    raise AdapterFileError(
        f"{file.path}: has neither loralib's lora_A and lora_B nor t-few's multi_lora_b; expected the tensors of one "
        "adapter"
    )
